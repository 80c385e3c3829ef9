"""Writes the server's metrics in Prometheus' text format; acceptance is read from the engine, never recomputed.

Those that mean what a metric of vLLM's means are there under its name too, so that dashboards made for it work.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pipeline.dflash.acceptance import Acceptance
from pipeline.serve.served_engine import ServedEngine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
REQUEST_OUTCOMES = ("stop", "length", "refused", "cancelled", "failed")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
MODEL = "model_name"  # vLLM's label


def _histogram(text: str) -> Histogram:
    return Histogram("seconds", text, buckets=SECONDS, registry=None)


@dataclasses.dataclass
class Counters:
    """Holds what the HTTP side counts: prompts by how they ended, tokens, and how long clients waited."""

    requests: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    prompt_tokens: int = 0
    generated_tokens: int = 0
    first_token_seconds: Histogram = dataclasses.field(
        default_factory=lambda: _histogram("Seconds from a request to its first token.")
    )
    inter_token_seconds: Histogram = dataclasses.field(
        default_factory=lambda: _histogram(
            "Seconds between two outputs of a request, of a token or of a round's tokens."
        )
    )
    request_seconds: Histogram = dataclasses.field(
        default_factory=lambda: _histogram("Seconds from a request to its last token.")
    )


def exposition(counters: Counters, engine: ServedEngine, model: str, *, healthy: bool) -> str:
    """Returns all metrics as text. The plain arm has no rounds and shows none."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_ServerMetrics(counters, engine, healthy))
    registry.register(_VllmMetrics(counters, engine, model))
    return generate_latest(registry).decode()


def _rounds(engine: ServedEngine) -> list[Acceptance]:
    """Returns the acceptance of the draft's own block size, then of smaller ones."""
    return [engine.acceptance, *(one for _, one in sorted(engine.smaller_blocks.items()))]


def _num_drafted(rounds: list[Acceptance]) -> int:
    return sum(one.num_rounds * (one.block_size - 1) for one in rounds)


class _ServerMetrics(Collector):
    """Reads the counters of server and engine when they are asked for."""

    def __init__(self, counters: Counters, engine: ServedEngine, healthy: bool) -> None:
        self._counters, self._engine, self._healthy = counters, engine, healthy

    def collect(self) -> Iterator[Metric]:
        """Yields every family of metrics."""
        counters, engine, times = self._counters, self._engine, self._engine.times
        yield _gauge("serve_healthy", "1 while the engine runs, 0 after it failed.", int(self._healthy))
        outcomes = {name: counters.requests[name] for name in REQUEST_OUTCOMES}
        yield _labelled(CounterMetricFamily, "serve_requests", "Prompts by how they ended.", "outcome", outcomes)
        yield _gauge("serve_requests_running", "Requests that hold a slot.", engine.num_running)
        yield _gauge("serve_requests_waiting", "Requests that wait for a slot.", engine.num_waiting)
        yield _gauge("serve_pages_free", "Key/value pages that no request uses.", engine.num_free_pages)
        yield _counter("serve_requests_preempted", "Requests that lost their pages for a while.", engine.num_preempted)
        yield _counter("serve_step_seconds", "Seconds of all steps.", times.prefill_seconds + times.decode_seconds)
        text = "Seconds of steps in which the host did not wait for the devices: what it costs at most."
        yield _counter("serve_host_seconds", text, times.host_seconds)
        text = "Tokens of prompts whose keys and values were there already."
        yield _counter("serve_reused_tokens", text, times.reused_tokens)
        yield _counter("serve_prompt_tokens", "Tokens of accepted prompts.", counters.prompt_tokens)
        yield _counter("serve_generated_tokens", "Tokens of answers.", counters.generated_tokens)
        if engine.block_size is None:
            return
        seen, every = engine.acceptance, _rounds(engine)
        rounds = {str(one.block_size): one.num_rounds for one in every}
        text = "Rounds of draft and verify by their block size."
        yield _labelled(CounterMetricFamily, "serve_rounds_by_block_size", text, "block_size", rounds)
        yield _counter("serve_rounds", "Rounds of draft and verify.", sum(one.num_rounds for one in every))
        yield _counter("serve_drafted_tokens", "Tokens that the draft proposed.", _num_drafted(every))
        accepted = sum(one.num_accepted for one in every)
        yield _counter("serve_accepted_tokens", "Drafted tokens that the target accepted.", accepted)
        yield from self._estimates()
        yield _gauge("serve_accept_length", "Mean tokens a round yields, 1 to the block size.", seen.accept_length)
        yield _gauge("serve_accept_rate", "Accepted share of the drafted tokens.", seen.accept_rate)
        at_k = {str(k): rate for k, rate in enumerate(seen.accept_rate_at_k, start=1)}
        text = "Share of rounds that accepted at least k drafted tokens."
        yield _labelled(GaugeMetricFamily, "serve_accept_rate_at_k", text, "k", at_k)

    def _estimates(self) -> Iterator[Metric]:
        """Yields why the next round has the block size that it has, where there is a choice."""
        found = self._engine.block_estimates
        if found:
            lengths = {str(size): one.accept_length for size, one in sorted(found.items())}
            text = "Tokens that a round of a block size is expected to yield; 1 is plain decoding."
            yield _labelled(GaugeMetricFamily, "serve_block_size_accept_length", text, "block_size", lengths)
            seconds = {str(size): one.seconds for size, one in sorted(found.items())}
            text = "Seconds that a round of a block size took."
            yield _labelled(GaugeMetricFamily, "serve_block_size_seconds", text, "block_size", seconds)


class _VllmMetrics(Collector):
    """Gives the metrics that mean the same by vLLM's names and with its label."""

    def __init__(self, counters: Counters, engine: ServedEngine, model: str) -> None:
        self._counters, self._engine, self._model = counters, engine, model

    def collect(self) -> Iterator[Metric]:
        """Yields every family of metrics."""
        counters, engine = self._counters, self._engine
        used = 1 - engine.num_free_pages / engine.num_pages
        yield self._one(GaugeMetricFamily, "num_requests_running", "Requests that hold a slot.", engine.num_running)
        yield self._one(GaugeMetricFamily, "num_requests_waiting", "Requests without a slot.", engine.num_waiting)
        yield self._one(GaugeMetricFamily, "kv_cache_usage_perc", "Share of the key/value pages in use.", used)
        yield self._one(CounterMetricFamily, "num_preemptions", "Preempted requests.", engine.num_preempted)
        yield self._one(CounterMetricFamily, "prompt_tokens", "Tokens of prompts.", counters.prompt_tokens)
        yield self._one(CounterMetricFamily, "generation_tokens", "Tokens of answers.", counters.generated_tokens)
        reused = engine.times.reused_tokens
        asked = reused + engine.times.prefill_tokens
        yield self._one(CounterMetricFamily, "prefix_cache_queries", "Tokens looked for in the cache.", asked)
        yield self._one(CounterMetricFamily, "prefix_cache_hits", "Tokens found in the cache.", reused)
        ended = CounterMetricFamily("vllm:request_success", "Finished requests.", labels=[MODEL, "finished_reason"])
        for reason in ("stop", "length"):
            ended.add_metric([self._model, reason], counters.requests[reason])
        yield ended
        yield from self._histogram("time_to_first_token_seconds", counters.first_token_seconds)
        yield from self._histogram("inter_token_latency_seconds", counters.inter_token_seconds)
        yield from self._histogram("e2e_request_latency_seconds", counters.request_seconds)
        if engine.block_size is not None:
            yield from self._speculation(_rounds(engine))

    def _speculation(self, rounds: list[Acceptance]) -> Iterator[Metric]:
        counts = {
            "num_drafts": ("Rounds of draft and verify.", sum(one.num_rounds for one in rounds)),
            "num_draft_tokens": ("Drafted tokens.", _num_drafted(rounds)),
            "num_accepted_tokens": ("Accepted drafted tokens.", sum(one.num_accepted for one in rounds)),
        }
        for name, (text, value) in counts.items():
            yield self._one(CounterMetricFamily, f"spec_decode_{name}", text, value)
        name = "vllm:spec_decode_num_accepted_tokens_per_pos"
        by_position = CounterMetricFamily(name, "Accepted drafted tokens by position.", labels=[MODEL, "position"])
        for position in range(rounds[0].block_size - 1):
            accepted = sum(one.num_accepted_at_k[position] for one in rounds if position < one.block_size - 1)
            by_position.add_metric([self._model, str(position)], accepted)
        yield by_position

    def _one(
        self,
        family: type[CounterMetricFamily] | type[GaugeMetricFamily],
        name: str,
        text: str,
        value: int | float,
    ) -> Metric:
        return _labelled(family, f"vllm:{name}", text, MODEL, {self._model: value})

    def _histogram(self, name: str, histogram: Histogram) -> Iterator[Metric]:
        for found in histogram.collect():
            metric = Metric(f"vllm:{name}", found.documentation, "histogram")
            for sample in found.samples:
                suffix = sample.name.removeprefix(found.name)
                if suffix != "_created":
                    metric.add_sample(f"vllm:{name}{suffix}", {MODEL: self._model, **sample.labels}, sample.value)
            yield metric


def _gauge(name: str, text: str, value: int | float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: int | float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def _labelled(
    family: type[CounterMetricFamily] | type[GaugeMetricFamily],
    name: str,
    text: str,
    label: str,
    samples: Mapping[str, int | float],
) -> Metric:
    metric = family(name, text, labels=[label])
    for value, sample in samples.items():
        metric.add_metric([value], sample)
    return metric
