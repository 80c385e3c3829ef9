"""Shards: which prompts each holds, how one is made, and which of an interrupted run's are kept."""

import dataclasses
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from pipeline.artifacts import PipelineError, fingerprint_of
from pipeline.model.gpt_oss_config import GptOssConfig
from pipeline.model.gpt_oss_weights import GptOssWeights
from pipeline.serve.engine import Finished
from pipeline.teacher_cache import store
from pipeline.teacher_cache.capture import Disagreement, capture, disagreements
from pipeline.teacher_cache.generate import Answered, Rendered, answer

log = logging.getLogger("pipeline")

# How far a token may lie below the best logit and still pass for a tie: float32 sums in another order differ
# by 1e-5, bfloat16 logits of 16 to 32 are 0.125 apart.
TIE_GAP = {"float32": 1e-3, "bfloat16": 0.5}


@dataclasses.dataclass(frozen=True)
class Plan:
    """One shard before it is made. `fingerprint` stands for all that decides its bytes."""

    split: str
    path: Path
    rows: tuple[Rendered, ...]
    fingerprint: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """The target and how it answers."""

    weights: GptOssWeights
    config: GptOssConfig
    tapped_layers: tuple[int, ...]
    stop_token_ids: tuple[int, ...]
    slots: int
    max_prompt_tokens: int
    max_new_tokens: int

    @property
    def precision(self) -> str:
        """float32 or bfloat16."""
        return self.weights.embedding.dtype.name


def plan(
    root: Path, rows: Mapping[str, Sequence[Rendered]], shard_sequences: int, settings: Mapping[str, Any]
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


def reports_of_complete(plans: Sequence[Plan]) -> dict[Path, dict[str, Any]]:
    """The reports of the shards that an interrupted run of the same settings has left whole."""
    found = {one.path: store.read_report(one.path, one.fingerprint) for one in plans}
    return {path: report for path, report in found.items() if report is not None}


def clear_except(root: Path, kept: Mapping[Path, Any]) -> None:
    """Delete everything in the scratch directory but the shards to keep: its bytes must not tell of a kill."""
    splits = [root / split for split in store.SPLITS if (root / split).is_dir()]
    for path in [*root.iterdir(), *(path for split in splits for path in split.iterdir())]:
        if path in splits or path in kept:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def make(one: Plan, teacher: Teacher, on_finished: Callable[[Finished], None]) -> dict[str, Any]:
    """Answer a shard's prompts, capture the features, write the shard; returns its report.

    Raises PipelineError when features are not finite, or when a float32 target contradicts its own text.
    """
    answers = answer(
        teacher.weights,
        teacher.config,
        one.rows,
        stop_token_ids=teacher.stop_token_ids,
        slots=teacher.slots,
        max_prompt_tokens=teacher.max_prompt_tokens,
        max_new_tokens=teacher.max_new_tokens,
        on_finished=on_finished,
    )
    lengths = [len(row.token_ids) for row in answers]
    offsets = np.cumsum([0, *lengths])
    token_ids = np.concatenate([np.array(row.token_ids, np.int32) for row in answers])
    width = len(teacher.tapped_layers) * teacher.config.hidden_size
    features = np.empty((len(token_ids), width), ml_dtypes.bfloat16)
    differing: dict[int, list[Disagreement]] = {}
    texts = [row.token_ids for row in answers]
    for index, captured in capture(teacher.weights, teacher.config, teacher.tapped_layers, texts):
        _require_finite(captured.features, answers[index])
        features[offsets[index] : offsets[index + 1]] = captured.features
        found = disagreements(captured, texts[index], answers[index].prompt_tokens)
        if found:
            differing[index] = found
    _judge(differing, answers, teacher.precision)
    report = _report(answers, differing)
    rows = store.Rows(
        prompt_ids=[row.prompt.prompt_id for row in answers],
        efforts=[row.prompt.effort for row in answers],
        finish_reasons=[row.finish_reason for row in answers],
        num_tokens=lengths,
        prompt_tokens=[row.prompt_tokens for row in answers],
    )
    store.write_shard(one.path, rows, token_ids, features, fingerprint=one.fingerprint, report=report)
    return report


def _require_finite(features: np.ndarray, row: Answered) -> None:
    bad = np.flatnonzero(~store.is_finite(features).all(axis=1))
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


def _report(answers: Sequence[Answered], differing: Mapping[int, list[Disagreement]]) -> dict[str, Any]:
    num_tokens = sum(len(row.token_ids) for row in answers)
    return {
        "num_sequences": len(answers),
        "num_tokens": num_tokens,
        "num_generated_tokens": num_tokens - sum(row.prompt_tokens for row in answers),
        "num_stopped": sum(row.finish_reason == "stop" for row in answers),
        "disagreements": [
            {"row": index, **dataclasses.asdict(one)} for index in sorted(differing) for one in differing[index]
        ],
    }
