"""Shards: which prompts each holds, how one is made, and which of an interrupted run's are kept."""

import dataclasses
import functools
import logging
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import UInt8

from pipeline import places
from pipeline.artifacts import PipelineError, fingerprint_of
from pipeline.machine import ONE_DEVICE, Machine
from pipeline.model.gpt_oss_config import GptOssConfig
from pipeline.model.gpt_oss_weights import GptOssWeights
from pipeline.places import BucketPath, Place
from pipeline.prompts.channels import Channel, ChannelTokens, channels
from pipeline.serve.engine import Finished
from pipeline.teacher_cache import features as codec
from pipeline.teacher_cache import store
from pipeline.teacher_cache.capture import Captured, Disagreement, capture, disagreements
from pipeline.teacher_cache.generate import Answered, Failed, Rendered, answer
from pipeline.teacher_cache.origin import ENGINE, Divergence, Origin

log = logging.getLogger("pipeline")

# How far a token may lie below the best logit and still pass for a tie: float32 sums in another order differ
# by 1e-5, bfloat16 logits of 16 to 32 are 0.125 apart.
TIE_GAP = {"float32": 1e-3, "bfloat16": 0.5}


@dataclasses.dataclass(frozen=True)
class Plan:
    """One shard before it is made. `fingerprint` stands for all that decides its bytes."""

    split: str
    path: Place
    rows: tuple[Rendered, ...]
    fingerprint: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """The target and how it answers; without `tapped_layers` no features are taken.

    `elsewhere` gives the answers of an endpoint, where that is their origin.
    """

    weights: GptOssWeights
    config: GptOssConfig
    tapped_layers: tuple[int, ...]
    stop_token_ids: tuple[int, ...]
    channel_tokens: ChannelTokens
    slots: int
    max_prompt_tokens: int
    max_new_tokens: int
    origin: Origin = ENGINE
    elsewhere: Callable[[Sequence[Rendered], Callable[[Finished], None]], list[Answered | Failed]] | None = None
    here: Machine = ONE_DEVICE

    def answer(self, rows: Sequence[Rendered], on_finished: Callable[[Finished], None]) -> Sequence[Answered | Failed]:
        """The answers to prompts, in their order."""
        if self.elsewhere is not None:
            return self.elsewhere(rows, on_finished)
        return answer(
            self.weights,
            self.config,
            rows,
            stop_token_ids=self.stop_token_ids,
            slots=self.slots,
            max_prompt_tokens=self.max_prompt_tokens,
            max_new_tokens=self.max_new_tokens,
            on_finished=on_finished,
            origin=self.origin,
            here=self.here,
        )

    def capture(self, texts: Sequence[Sequence[int]], prompt_ids: Sequence[str]) -> Iterator[tuple[int, Captured]]:
        """The features of the answers to these prompts, and what the target says itself (`capture.capture`)."""
        run, mesh = self.here.run, self.here.mesh
        drawn, keys = self.origin.sampling, self.origin.keys(prompt_ids)
        return capture(self.weights, self.config, self.tapped_layers, texts, drawn=drawn, keys=keys, run=run, mesh=mesh)

    @property
    def precision(self) -> str:
        """float32 or bfloat16."""
        return self.weights.embedding.dtype.name


def plan(
    root: Place, rows: Mapping[str, Sequence[Rendered]], shard_sequences: int, settings: Mapping[str, Any]
) -> list[Plan]:
    """Cut the usable prompts of every split into shards, by position."""
    plans = []
    for split, all_rows in rows.items():
        usable = [row for row in all_rows if row.skipped is None]
        for index, at in enumerate(range(0, len(usable), shard_sequences)):
            part = tuple(usable[at : at + shard_sequences])
            # the tokens too: a template that prints the day renders other prompts tomorrow
            texts = [[row.prompt.prompt_id, row.prompt.effort, row.token_ids] for row in part]
            fingerprint = fingerprint_of([store.FORMAT, settings, texts])
            plans.append(Plan(split, store.shard_path(root, split, index), part, fingerprint))
    return plans


def reports_of_complete(plans: Sequence[Plan], *, verify: bool = True) -> dict[Place, dict[str, Any]]:
    """The reports of the shards that are there, complete and of these settings (`store.read_report`)."""
    with ThreadPoolExecutor(places.AT_ONCE) as workers:
        found = workers.map(lambda one: store.read_report(one.path, one.fingerprint, verify=verify), plans)
        return {one.path: report for one, report in zip(plans, found, strict=True) if report is not None}


def clear_except(root: Place, kept: Collection[Place]) -> None:
    """Delete everything where a cache is built but the shards to keep: its bytes must not tell of a kill."""
    for stray in _pieces(root) - set(kept):
        places.remove(stray)


def _pieces(root: Place) -> set[Place]:
    """Shards, begun ones too, and the files beside them."""
    if isinstance(root, BucketPath):
        return {functools.reduce(operator.truediv, name.split("/")[:2], root) for name in places.files(root)}
    splits = {root / split for split in store.SPLITS if (root / split).is_dir()}
    return ({*root.iterdir()} - splits).union(*(split.iterdir() for split in splits))


def make(
    one: Plan,
    teacher: Teacher,
    layout: store.Layout,
    on_finished: Callable[[Finished], None],
    staging: Path | None = None,
) -> dict[str, Any]:
    """Answer a shard's prompts, capture the features, write the shard; returns its report.

    Raises PipelineError when features are not finite, when a float32 target contradicts its own text, or when an
    endpoint's text is not the target's.
    """
    outcomes = teacher.answer(one.rows, on_finished)
    answers = [row for row in outcomes if isinstance(row, Answered)]
    lengths = [len(row.token_ids) for row in answers]
    offsets = np.cumsum([0, *lengths])
    token_ids = np.concatenate([np.array(row.token_ids, np.int32) for row in answers] or [np.empty(0, np.int32)])
    spoken = np.concatenate(
        [channels(teacher.channel_tokens, np.array(row.token_ids), row.prompt_tokens) for row in answers]
        or [np.empty(0, np.uint8)]
    )
    has_features = layout.stored != "none"
    features = np.empty((len(token_ids), layout.feature_size), ml_dtypes.bfloat16) if has_features else None
    differing: dict[int, list[Disagreement]] = {}
    divergence = Divergence()
    texts = [row.token_ids for row in answers]
    for index, captured in teacher.capture(texts, [row.prompt.prompt_id for row in answers]):
        if features is not None:
            _require_finite(captured.features, answers[index])
            features[offsets[index] : offsets[index + 1]] = captured.features
        if teacher.origin.endpoint is not None:
            generated = captured.shortfall[answers[index].prompt_tokens - 1 : -1]
            divergence += Divergence.of(generated, teacher.origin, TIE_GAP[teacher.precision])
            continue
        found = disagreements(captured, texts[index], answers[index].prompt_tokens)
        if found:
            differing[index] = found
    _judge(differing, answers, teacher.precision)
    _judge_endpoint(divergence, teacher.origin)
    report = _report(answers, spoken, differing)
    failed = [row for row in outcomes if isinstance(row, Failed)]
    if failed:
        log.warning("teacher_cache: %d prompts of %s got no answer: %s", len(failed), one.path, failed[0].reason)
        report["failed"] = [{"prompt_id": row.prompt.prompt_id, "reason": row.reason} for row in failed]
    if teacher.origin.endpoint is not None:
        report["divergence"] = dataclasses.asdict(divergence)
    rows = store.Rows(
        prompt_ids=[row.prompt.prompt_id for row in answers],
        efforts=[row.prompt.effort for row in answers],
        finish_reasons=[row.finish_reason for row in answers],
        num_tokens=lengths,
        prompt_tokens=[row.prompt_tokens for row in answers],
    )
    return store.write_shard(
        one.path,
        rows,
        token_ids,
        spoken,
        features,
        layout=layout,
        fingerprint=one.fingerprint,
        report=report,
        staging=staging,
    )


def _require_finite(features: np.ndarray, row: Answered) -> None:
    bad = np.flatnonzero(~codec.is_finite({"features": features}))
    if len(bad):
        raise PipelineError(
            f"the target's features for prompt {row.prompt.prompt_id} are not finite at {len(bad)} positions, the "
            f"first at {bad[0]}; check the target's weights, or use target.precision=float32"
        )


def _judge(differing: Mapping[int, list[Disagreement]], answers: Sequence[Answered], precision: str) -> None:
    """Near-ties are told; a float32 target that clearly contradicts its own text is a bug, and stops."""
    found = [(one, answers[index]) for index, several in sorted(differing.items()) for one in several]
    if not found:
        return
    worst, row = max(found, key=lambda pair: pair[0].gap)
    text = (
        f"{len(found)} generated tokens differ from what the target says when it reads the whole text; the clearest: "
        f"prompt {row.prompt.prompt_id[:12]}, position {worst.position}, generated {worst.found_id}, read "
        f"{worst.wanted_id}, logit gap {worst.gap:.3g}"
    )
    if precision == "float32" and worst.gap > TIE_GAP[precision]:
        raise PipelineError(
            f"{text}; more than {TIE_GAP[precision]} is no rounding: the engine or the forward pass is wrong, report it"
        )
    log.warning("teacher_cache: %s", text)


def _judge_endpoint(divergence: Divergence, origin: Origin) -> None:
    problem = divergence.problem(origin)
    if problem is None:
        return
    text, is_refused = problem
    if is_refused:
        raise PipelineError(f"{text}: let it serve the target of this configuration, and run the same command again")
    log.warning("teacher_cache: %s", text)


def _report(
    answers: Sequence[Answered], spoken: UInt8[np.ndarray, " tokens"], differing: Mapping[int, list[Disagreement]]
) -> dict[str, Any]:
    counts = Counter(spoken.tolist())
    num_tokens = sum(len(row.token_ids) for row in answers)
    return {
        "num_sequences": len(answers),
        "num_tokens": num_tokens,
        "num_generated_tokens": num_tokens - sum(row.prompt_tokens for row in answers),
        "num_tokens_by_channel": {channel.name: counts[channel] for channel in Channel},
        "num_stopped": sum(row.finish_reason == "stop" for row in answers),
        "disagreements": [
            {"row": index, **dataclasses.asdict(one)} for index in sorted(differing) for one in differing[index]
        ],
    }
