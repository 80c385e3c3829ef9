"""When the tokens of answers reached their client, and the latencies that follow from it."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

PERCENTILES = (50, 90, 99)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline:
    """Holds when a request was sent and when tokens of its answer came, in seconds of one clock.

    `arrivals` are pairs of a time and of the tokens that came together then: one of a plain step, up to K of a round.
    """

    submitted: float
    arrivals: tuple[tuple[float, int], ...]

    @property
    def num_tokens(self) -> int:
        """The number of tokens of the answer."""
        return sum(count for _, count in self.arrivals)

    @property
    def first_seconds(self) -> float:
        """The time to the first token."""
        return self.arrivals[0][0] - self.submitted

    @property
    def decode_seconds(self) -> float:
        """The time from the first token to the last."""
        return self.arrivals[-1][0] - self.arrivals[0][0]

    @property
    def gaps(self) -> list[float]:
        """The seconds between arrivals."""
        times = [at for at, _ in self.arrivals]
        return [later - earlier for earlier, later in itertools.pairwise(times)]


def shares_of(timelines: Sequence[Timeline], seconds: float) -> Float[np.ndarray, " N"]:
    """Returns what each answer took of the seconds in which all of them were decoded, N in all.

    Answers that run beside each other share a step in equal parts, so that an answer's share is that of its decoding
    time in the sum of all decoding times.
    """
    each = np.array([one.decode_seconds for one in timelines])
    total = each.sum()
    return each * (seconds / total) if total > 0 else np.full(len(each), seconds / max(len(each), 1))


def latencies(timelines: Sequence[Timeline]) -> dict[str, float]:
    """Returns time to first token, time per output token and time between arrivals, in milliseconds, by percentile."""
    several = [one for one in timelines if one.decode_seconds > 0]
    values: Mapping[str, list[float]] = {
        "ttft": [one.first_seconds for one in timelines],
        "tpot": [one.decode_seconds / max(one.num_tokens - one.arrivals[0][1], 1) for one in several],
        "itl": [gap for one in several for gap in one.gaps],
    }
    found = {}
    for name, seconds in values.items():
        for percentile in PERCENTILES if seconds else ():
            found[f"{name}_p{percentile}_ms"] = float(np.percentile(seconds, percentile)) * 1e3
    return found


def goodput(timelines: Sequence[Timeline], seconds: float, *, ttft_seconds: float, tpot_seconds: float) -> float:
    """Returns the requests a second that met both objectives: first token and time per output token at most these."""
    good = sum(
        one.first_seconds <= ttft_seconds
        and one.decode_seconds <= tpot_seconds * max(one.num_tokens - one.arrivals[0][1], 1)
        for one in timelines
    )
    return good / seconds


def steady_tokens_per_second(timelines: Sequence[Timeline], num_at_once: int) -> float:
    """Returns the speed while `num_at_once` answers were being written: without the beginning and the end of a load.

    NaN where there was no such time.
    """
    edges = sorted([(one.arrivals[0][0], 1) for one in timelines] + [(one.arrivals[-1][0], -1) for one in timelines])
    running, since, spans = 0, 0.0, []
    for at, change in edges:
        if running >= num_at_once and at > since:
            spans.append((since, at))
        running, since = running + change, at
    seconds = sum(end - start for start, end in spans)
    if not seconds:
        return float("nan")
    arrivals = np.array(sorted(pair for one in timelines for pair in one.arrivals[1:]))
    times, counts = arrivals[:, 0], np.cumsum(np.concatenate([[0.0], arrivals[:, 1]]))
    tokens = sum(
        counts[np.searchsorted(times, end, side="right")] - counts[np.searchsorted(times, start, side="right")]
        for start, end in spans
    )
    return float(tokens) / seconds
