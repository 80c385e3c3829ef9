"""The server's counters in Prometheus' text format; acceptance is the engine's, read and never recomputed."""

import collections
import dataclasses

from pipeline.serve.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OUTCOMES = ("stop", "length", "refused", "cancelled", "failed")


@dataclasses.dataclass
class Counters:
    """What the HTTP side counts: prompts by how they ended, and tokens."""

    requests: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    prompt_tokens: int = 0
    generated_tokens: int = 0


def exposition(counters: Counters, engine: Engine, *, healthy: bool) -> str:
    """All metrics, one family after the other. The plain arm has no rounds and shows none."""
    lines: list[str] = []

    def family(name: str, kind: str, text: str, samples: dict[str, int | float]) -> None:
        lines.extend((f"# HELP serve_{name} {text}", f"# TYPE serve_{name} {kind}"))
        lines.extend(f"serve_{name}{labels} {_number(value)}" for labels, value in samples.items())

    family("healthy", "gauge", "1 while the engine runs, 0 after it failed.", {"": int(healthy)})
    outcomes = {f'{{outcome="{name}"}}': counters.requests[name] for name in OUTCOMES}
    family("requests_total", "counter", "Prompts by how they ended.", outcomes)
    family("requests_running", "gauge", "Requests that hold a slot.", {"": engine.num_running})
    family("requests_waiting", "gauge", "Requests that wait for a slot.", {"": engine.num_waiting})
    family("prompt_tokens_total", "counter", "Tokens of accepted prompts.", {"": counters.prompt_tokens})
    family("generated_tokens_total", "counter", "Tokens answered.", {"": counters.generated_tokens})
    if engine.block_size is not None:
        seen = engine.acceptance
        drafted = seen.num_rounds * (seen.block_size - 1)
        family("rounds_total", "counter", "Rounds of draft and verify.", {"": seen.num_rounds})
        family("drafted_tokens_total", "counter", "Tokens that the draft proposed.", {"": drafted})
        family("kept_tokens_total", "counter", "Drafted tokens that the target kept.", {"": seen.num_kept})
        family("accept_length", "gauge", "Mean tokens a round yields, 1..B.", {"": seen.accept_length})
        family("accept_rate", "gauge", "Kept share of the drafted tokens.", {"": seen.accept_rate})
        at_k = {f'{{k="{k}"}}': rate for k, rate in enumerate(seen.accept_rate_at_k, start=1)}
        family("accept_rate_at_k", "gauge", "Share of rounds that kept at least k drafted tokens.", at_k)
    return "\n".join(lines) + "\n"


def _number(value: int | float) -> str:
    return "NaN" if value != value else repr(value)
