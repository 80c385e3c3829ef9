"""Shows what a probe found: times, break-even, speedups, and the bill."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.feasibility import step_times
from pipeline.feasibility.bill import Bill, cost_per_million
from pipeline.feasibility.step_times import StepTimes
from pipeline.pages.columns import columns


def times_table(found: Mapping[str, Sequence[StepTimes]], accept_lengths: Sequence[float], rate: float) -> str:
    """Returns a table with a line for each machine, number of requests at once and block size.

    The block size with the largest speedup, where each drafted token is accepted at `rate`, is marked with *.
    """
    head = ("plain ms", "draft ms", "verify ms", "break-even", *(f"at {length:g}" for length in accept_lengths))
    rows: list[tuple[str, ...]] = [("machine", "at once", "block", *head, "perfect", f"rate {rate:g}")]
    for name, times in found.items():
        for slots in sorted({one.concurrency for one in times}):
            some = [one for one in times if one.concurrency == slots]
            best = step_times.best_block_size(some, rate)
            rows += [_line(name, one, accept_lengths, rate, is_best=one is best) for one in some]
    return columns(rows)


def experts_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table of the experts of a layer that blocks choose: at random, at the agreement, and counted."""
    names = ("at_random", "modelled", "counted")
    lines: list[tuple[str, ...]] = [("at once", "tokens each", "experts if random", "modelled", "counted")]
    for one in rows:
        values = (f"{one[name]:.1f}" if name in one else "" for name in names)
        lines.append((f"{one['concurrency']}", f"{one['block_size']}", *values))
    return columns(lines if any("counted" in one for one in rows) else [line[:-1] for line in lines])


def bill_table(found: Mapping[str, Bill], price_per_hour: float | None) -> str:
    """Returns a table of what making a draft takes on each machine; money where a price of all devices is known."""
    rows: list[tuple[str, ...]] = [("machine", "features", "answering", "training", "cost")]
    for name, one in found.items():
        money = "" if price_per_hour is None else f"{one.cost(price_per_hour):.2f}"
        size = f"{one.cache_bytes / 1e9:.1f} GB"
        rows.append((name, size, f"{one.cache_hours:.2f} h", f"{one.train_hours:.2f} h", money))
    return columns(rows)


def values(times: StepTimes, rate: float, price_per_hour: float | None) -> dict[str, Any]:
    """Returns the JSON values of a line; speedups are those of accept_lengths 1, 2, .. to the block size."""
    length = step_times.accept_length_of_rate(rate, times.block_size)
    found: dict[str, Any] = {
        "concurrency": times.concurrency,
        "block_size": times.block_size,
        "plain_seconds": times.plain,
        "draft_seconds": times.draft,
        "verify_seconds": times.verify,
        "host_seconds": times.host,
        "break_even_accept_length": times.break_even,
        "largest_speedup": times.largest_speedup,
        "speedups": {str(accepted): times.speedup(float(accepted)) for accepted in range(1, times.block_size + 1)},
        "accept_length_of_rate": length,
        "plain_tokens_per_second": times.tokens_per_second(),
        "dflash_tokens_per_second": times.tokens_per_second(length),
    }
    if price_per_hour is not None:
        for arm in ("plain", "dflash"):
            speed = found[f"{arm}_tokens_per_second"]
            found[f"{arm}_cost_per_million_tokens"] = cost_per_million(price_per_hour, speed)
    return found


def _line(name: str, one: StepTimes, accept_lengths: Sequence[float], rate: float, *, is_best: bool) -> tuple[str, ...]:
    times = [f"{seconds * 1e3:.3f}" for seconds in (one.plain + one.host, one.draft, one.verify + one.host)]
    speedups = [f"{one.speedup(length):.2f}x" if length <= one.block_size else "" for length in accept_lengths]
    expected = one.speedup(step_times.accept_length_of_rate(rate, one.block_size))
    return (
        name,
        f"{one.concurrency}",
        f"{one.block_size}",
        *times,
        f"{one.break_even:.2f}",
        *speedups,
        f"{one.largest_speedup:.2f}x",
        f"{expected:.2f}x{'*' if is_best else ' '}",
    )
