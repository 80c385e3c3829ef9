"""Both arms at further loads: so many requests at once, or so many arriving a second."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence

from pipeline.bench import arms, report, timeline
from pipeline.bench.arms import DFLASH, PLAIN, Arm, ArmPass
from pipeline.bench.load import poisson_arrivals
from pipeline.engine.request import Request

log = logging.getLogger("pipeline")

REQUESTS_A_SLOT = 4  # at least, so that most of a pass has every slot busy


def at_once(
    arms_of: Callable[[int], Mapping[str, Arm]], requests: Sequence[Request], slot_counts: Sequence[int], repeats: int
) -> list[dict[str, float]]:
    """Returns the values of both arms for each number of requests at once."""
    points = []
    for slots in slot_counts:
        load = _repeated(requests, REQUESTS_A_SLOT * slots)
        pair = {name: arm for name, arm in arms_of(slots).items() if name in (PLAIN, DFLASH)}
        found = arms.compare_arms(pair, load, repeats, on_pass=functools.partial(log_pass, where=f", {slots} slots"))
        points.append(report.at_load(found, slots))
    return points


def arriving(
    pair: Mapping[str, Arm],
    requests: Sequence[Request],
    rates: Sequence[float],
    *,
    ttft_seconds: float,
    tpot_seconds: float,
    seed: int,
) -> list[dict[str, float]]:
    """Returns latencies and goodput of both arms for each rate of requests a second; arms must be warm.

    Requests arrive at the same times for both. Goodput counts those with their first token, and with the time of each
    later one, within these seconds.
    """
    points = []
    for rate in rates:
        arrivals, point = poisson_arrivals(len(requests), rate, seed), {"request_rate": float(rate)}
        for name in (PLAIN, DFLASH):
            one = pair[name].run(requests, arrivals)
            times = list(one.timelines.values())
            good = timeline.goodput(times, one.seconds, ttft_seconds=ttft_seconds, tpot_seconds=tpot_seconds)
            point |= {f"{name}_goodput": good}
            point |= {f"{name}_{key}": value for key, value in timeline.latencies(times).items()}
            log_pass(name, one, f", {rate:g} requests a second")
        points.append(point)
    return points


def log_pass(arm: str, one: ArmPass, where: str = "") -> None:
    """Logs the speed of a pass."""
    log.info("bench: %-6s %6.0f tokens/s (%d tokens%s)", arm, one.tokens_per_second, one.decode_tokens, where)


def _repeated(requests: Sequence[Request], least: int) -> list[Request]:
    """Returns the requests, over again under other ids where there are fewer than `least`."""
    times = -(-least // len(requests))
    return [
        dataclasses.replace(one, request_id=f"{one.request_id} again {again}") if again else one
        for again in range(times)
        for one in requests
    ]
