"""Writes the server's metrics in Prometheus' text format; acceptance is read from the engine, never recomputed."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pipeline.engine.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
REQUEST_OUTCOMES = ("stop", "length", "refused", "cancelled", "failed")


@dataclasses.dataclass
class Counters:
    """Holds what the HTTP side counts: prompts by how they ended, and tokens."""

    requests: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    prompt_tokens: int = 0
    generated_tokens: int = 0


def exposition(counters: Counters, engine: Engine, *, healthy: bool) -> str:
    """Returns all metrics as text. The plain arm has no rounds and shows none."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_ServerMetrics(counters, engine, healthy))
    return generate_latest(registry).decode()


class _ServerMetrics(Collector):
    """Reads the counters of server and engine when they are asked for."""

    def __init__(self, counters: Counters, engine: Engine, healthy: bool) -> None:
        self._counters, self._engine, self._healthy = counters, engine, healthy

    def collect(self) -> Iterator[Metric]:
        """Yields every family of metrics."""
        counters, engine = self._counters, self._engine
        yield _gauge("healthy", "1 while the engine runs, 0 after it failed.", int(self._healthy))
        outcomes = {name: counters.requests[name] for name in REQUEST_OUTCOMES}
        yield _labelled(CounterMetricFamily, "requests", "Prompts by how they ended.", "outcome", outcomes)
        yield _gauge("requests_running", "Requests that hold a slot.", engine.num_running)
        yield _gauge("requests_waiting", "Requests that wait for a slot.", engine.num_waiting)
        yield _gauge("pages_free", "Key/value pages that no request uses.", engine.num_free_pages)
        yield _counter("requests_preempted", "Requests that lost their pages for a while.", engine.num_preempted)
        text = "Tokens of prompts whose keys and values were there already."
        yield _counter("reused_tokens", text, engine.times.reused_tokens)
        yield _counter("prompt_tokens", "Tokens of accepted prompts.", counters.prompt_tokens)
        yield _counter("generated_tokens", "Tokens of answers.", counters.generated_tokens)
        if engine.block_size is None:
            return
        seen = engine.acceptance
        every = {seen.block_size: seen, **engine.smaller_blocks}
        rounds = {str(size): one.num_rounds for size, one in sorted(every.items())}
        text = "Rounds of draft and verify by their block size."
        yield _labelled(CounterMetricFamily, "rounds_by_block_size", text, "block_size", rounds)
        yield _counter("rounds", "Rounds of draft and verify.", sum(one.num_rounds for one in every.values()))
        drafted = sum(one.num_rounds * (size - 1) for size, one in every.items())
        yield _counter("drafted_tokens", "Tokens that the draft proposed.", drafted)
        accepted = sum(one.num_accepted for one in every.values())
        yield _counter("accepted_tokens", "Drafted tokens that the target accepted.", accepted)
        yield from self._estimates()
        yield _gauge("accept_length", "Mean tokens a round yields, 1 to the block size.", seen.accept_length)
        yield _gauge("accept_rate", "Accepted share of the drafted tokens.", seen.accept_rate)
        at_k = {str(k): rate for k, rate in enumerate(seen.accept_rate_at_k, start=1)}
        text = "Share of rounds that accepted at least k drafted tokens."
        yield _labelled(GaugeMetricFamily, "accept_rate_at_k", text, "k", at_k)

    def _estimates(self) -> Iterator[Metric]:
        """Yields why the next round has the block size that it has, where there is a choice."""
        found = self._engine.block_estimates
        if found:
            lengths = {str(size): one.accept_length for size, one in sorted(found.items())}
            text = "Tokens that a round of a block size is expected to yield; 1 is plain decoding."
            yield _labelled(GaugeMetricFamily, "block_size_accept_length", text, "block_size", lengths)
            seconds = {str(size): one.seconds for size, one in sorted(found.items())}
            text = "Seconds that a round of a block size took."
            yield _labelled(GaugeMetricFamily, "block_size_seconds", text, "block_size", seconds)


def _gauge(name: str, text: str, value: int | float) -> Metric:
    return GaugeMetricFamily(f"serve_{name}", text, value=value)


def _counter(name: str, text: str, value: int | float) -> Metric:
    return CounterMetricFamily(f"serve_{name}", text, value=value)


def _labelled(
    family: type[CounterMetricFamily] | type[GaugeMetricFamily],
    name: str,
    text: str,
    label: str,
    samples: Mapping[str, int | float],
) -> Metric:
    metric = family(f"serve_{name}", text, labels=[label])
    for value, sample in samples.items():
        metric.add_metric([value], sample)
    return metric
