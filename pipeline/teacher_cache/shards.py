"""Plans and makes the shards of a teacher cache, and finds those that an interrupted run completed."""

import dataclasses
import functools
import logging
import operator
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import UInt8

from pipeline.artifacts import storage
from pipeline.artifacts.hashing import fingerprint_of
from pipeline.artifacts.storage import BucketPath, StoragePath
from pipeline.engine.capture import Captured, Disagreement, capture, disagreements
from pipeline.engine.config import EngineConfig
from pipeline.engine.ties import TIE_GAP
from pipeline.errors import PipelineError
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.parallel.runtime import SINGLE_DEVICE, Runtime
from pipeline.prompts.channels import Channel, ChannelTokens, channels
from pipeline.store import feature_codec
from pipeline.store.layout import CACHE_FORMAT, NO_FEATURES, SPLITS, CacheLayout, ShardRows, shard_path
from pipeline.store.writer import ShardContents, read_report, write_shard
from pipeline.teacher_cache.answer import AnsweredPrompt, Answering, FailedPrompt, OnFinished, answer_prompts
from pipeline.teacher_cache.origin import ENGINE, AnswerOrigin, Divergence
from pipeline.teacher_cache.render import RenderedPrompt

log = logging.getLogger("pipeline")


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """Holds one shard before it is made; `fingerprint` covers everything that decides its bytes."""

    split: str
    path: StoragePath
    rows: tuple[RenderedPrompt, ...]
    fingerprint: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """Holds the target and how it answers; without `tapped_layers` no features are captured.

    A `draft` decodes with the target. `outside_answers` returns the answers that an endpoint or the prompts' rows gave,
    where one is their origin.
    """

    target: TargetModel
    engine: EngineConfig
    tapped_layers: tuple[int, ...]
    channel_tokens: ChannelTokens
    max_new_tokens: int
    origin: AnswerOrigin = ENGINE
    outside_answers: Answering | None = None
    draft: DraftModel | None = None
    runtime: Runtime = SINGLE_DEVICE

    def answer(
        self, rows: Sequence[RenderedPrompt], on_finished: OnFinished
    ) -> Sequence[AnsweredPrompt | FailedPrompt]:
        """Returns the answers to prompts, in their order."""
        if self.outside_answers is not None:
            return self.outside_answers(rows, on_finished)
        return answer_prompts(
            self.target,
            rows,
            self.engine,
            max_new_tokens=self.max_new_tokens,
            on_finished=on_finished,
            origin=self.origin,
            draft=self.draft,
            runtime=self.runtime,
        )

    def capture(self, texts: Sequence[Sequence[int]], prompt_ids: Sequence[str]) -> Iterator[tuple[int, Captured]]:
        """Yields the features of the answers to these prompts, and the target's own choices (`capture.capture`)."""
        keys = self.origin.keys(prompt_ids)
        return capture(
            self.target, self.tapped_layers, texts, sampling=self.origin.sampling, keys=keys, runtime=self.runtime
        )

    @property
    def precision(self) -> str:
        """Returns the name of the weights' dtype: float32 or bfloat16."""
        return self.target.weights.embedding.dtype.name


def plan_shards(
    root: StoragePath, rows: Mapping[str, Sequence[RenderedPrompt]], shard_sequences: int, settings: Mapping[str, Any]
) -> list[ShardPlan]:
    """Divides the usable prompts of every split into shards of `shard_sequences`, in order."""
    plans = []
    for split, all_rows in rows.items():
        usable = [row for row in all_rows if row.skipped is None]
        for index, first in enumerate(range(0, len(usable), shard_sequences)):
            part = tuple(usable[first : first + shard_sequences])
            # tokens are included because a template that prints the day renders other prompts tomorrow
            texts = [[row.prompt.prompt_id, row.prompt.effort, row.token_ids] for row in part]
            fingerprint = fingerprint_of([CACHE_FORMAT, settings, texts])
            plans.append(ShardPlan(split, shard_path(root, split, index), part, fingerprint))
    return plans


def reports_of_complete(plans: Sequence[ShardPlan], *, verify: bool = True) -> dict[StoragePath, dict[str, Any]]:
    """Returns the reports of the shards that are complete and made with these settings (`store.read_report`)."""
    with ThreadPoolExecutor(storage.AT_ONCE) as workers:
        found = workers.map(lambda plan: read_report(plan.path, plan.fingerprint, verify=verify), plans)
        return {plan.path: report for plan, report in zip(plans, found, strict=True) if report is not None}


def clear_except(root: StoragePath, complete: Collection[StoragePath]) -> None:
    """Deletes everything in `root` except `complete`, so that a run that was killed leaves no trace in a cache."""
    for stray in _pieces(root) - set(complete):
        storage.remove(stray)


def _pieces(root: StoragePath) -> set[StoragePath]:
    """Returns the paths of all shards, incomplete ones too, and of the files beside them."""
    if isinstance(root, BucketPath):
        return {functools.reduce(operator.truediv, name.split("/")[:2], root) for name in storage.list_files(root)}
    splits = [root / split for split in SPLITS if (root / split).is_dir()]
    return {path for directory in (root, *splits) for path in directory.iterdir() if path not in splits}


def make_shard(
    plan: ShardPlan,
    teacher: Teacher,
    layout: CacheLayout,
    on_finished: OnFinished,
    staging: Path | None = None,
) -> dict[str, Any]:
    """Answers a shard's prompts, captures the features and writes the shard; returns its report.

    Raises PipelineError when features are not finite, when a float32 target contradicts its own text, or when a
    text from outside is not the target's.
    """
    outcomes = teacher.answer(plan.rows, on_finished)
    answers = [row for row in outcomes if isinstance(row, AnsweredPrompt)]
    lengths = [len(row.token_ids) for row in answers]
    offsets = np.cumsum([0, *lengths])
    token_ids = np.concatenate([np.array(row.token_ids, np.int32) for row in answers] or [np.empty(0, np.int32)])
    channel_ids = np.concatenate(
        [channels(teacher.channel_tokens, np.array(row.token_ids), row.prompt_tokens) for row in answers]
        or [np.empty(0, np.uint8)]
    )
    has_features = layout.stored != NO_FEATURES
    features = np.empty((len(token_ids), layout.feature_size), ml_dtypes.bfloat16) if has_features else None
    differing: dict[int, list[Disagreement]] = {}
    divergence = Divergence()
    texts = [row.token_ids for row in answers]
    for index, captured in teacher.capture(texts, [row.prompt.prompt_id for row in answers]):
        if features is not None:
            _require_finite(captured.features, answers[index])
            features[offsets[index] : offsets[index + 1]] = captured.features
        if not teacher.origin.is_engine:
            generated = captured.shortfall[answers[index].prompt_tokens - 1 : -1]
            divergence += Divergence.of(generated, teacher.origin, TIE_GAP[teacher.precision])
            continue
        found = disagreements(captured, texts[index], answers[index].prompt_tokens)
        if found:
            differing[index] = found
    _judge(differing, answers, teacher.precision)
    _judge_outside(divergence, teacher.origin)
    report = _report(answers, channel_ids, differing)
    failed = [row for row in outcomes if isinstance(row, FailedPrompt)]
    if failed:
        log.warning("teacher_cache: %d prompts of %s got no answer: %s", len(failed), plan.path, failed[0].reason)
        report["failed"] = [{"prompt_id": row.prompt.prompt_id, "reason": row.reason} for row in failed]
    if not teacher.origin.is_engine:
        report["divergence"] = dataclasses.asdict(divergence)
    rows = ShardRows(
        prompt_ids=[row.prompt.prompt_id for row in answers],
        efforts=[row.prompt.effort for row in answers],
        finish_reasons=[row.finish_reason for row in answers],
        num_tokens=lengths,
        prompt_tokens=[row.prompt_tokens for row in answers],
    )
    return write_shard(
        plan.path,
        ShardContents(rows=rows, token_ids=token_ids, channels=channel_ids, features=features),
        layout=layout,
        fingerprint=plan.fingerprint,
        report=report,
        staging=staging,
    )


def _require_finite(features: np.ndarray, row: AnsweredPrompt) -> None:
    bad = np.flatnonzero(~feature_codec.is_finite({"features": features}))
    if len(bad):
        raise PipelineError(
            f"the target's features for prompt {row.prompt.prompt_id} are not finite at {len(bad)} positions, the "
            f"first at {bad[0]}; check the target's weights, or use target.precision=float32"
        )


def _judge(differing: Mapping[int, list[Disagreement]], answers: Sequence[AnsweredPrompt], precision: str) -> None:
    """Warns about near-ties; raises PipelineError for a float32 target that clearly contradicts its own text."""
    found = [(disagreement, answers[index]) for index in sorted(differing) for disagreement in differing[index]]
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


def _judge_outside(divergence: Divergence, origin: AnswerOrigin) -> None:
    problem = divergence.problem(origin)
    if problem is None:
        return
    text, is_refused = problem
    if is_refused:
        raise PipelineError(f"{text}: {origin.mend}")
    log.warning("teacher_cache: %s", text)


def _report(
    answers: Sequence[AnsweredPrompt],
    channel_ids: UInt8[np.ndarray, " tokens"],
    differing: Mapping[int, list[Disagreement]],
) -> dict[str, Any]:
    counts = Counter(channel_ids.tolist())
    num_tokens = sum(len(row.token_ids) for row in answers)
    return {
        "num_sequences": len(answers),
        "num_tokens": num_tokens,
        "num_generated_tokens": num_tokens - sum(row.prompt_tokens for row in answers),
        "num_tokens_by_channel": {channel.name: counts[channel] for channel in Channel},
        "num_stopped": sum(row.finish_reason == "stop" for row in answers),
        "disagreements": [
            {"row": index, **dataclasses.asdict(disagreement)}
            for index in sorted(differing)
            for disagreement in differing[index]
        ],
    }
