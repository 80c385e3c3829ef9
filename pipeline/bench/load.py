"""When the requests of an open loop arrive: whether the server is ready for them or not."""

import numpy as np


def poisson_arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Returns the seconds at which `count` requests arrive, at random, `rate` a second on average."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    return [float(at) for at in np.cumsum(gaps)]
