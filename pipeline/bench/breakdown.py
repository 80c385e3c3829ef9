"""Acceptance of answers, and of parts of them, with intervals: over all, by family, by effort, by channel."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from pipeline.bench import intervals
from pipeline.bench.intervals import Interval
from pipeline.dflash.acceptance import Acceptance
from pipeline.engine.request import Completion
from pipeline.prompts.channels import Channel, ChannelTokens, channels

Rounds = Sequence[Sequence[int]]  # the accepted tokens of each round of each answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labels:
    """Holds what is known of a prompt: its kind of question, where its source says it, and its effort."""

    family: str | None
    effort: str


def accept_length_interval(rounds: Rounds) -> Interval:
    """Returns the interval of accept_length over answers."""
    return intervals.accept_length_interval(_sums(rounds), np.array([len(some) for some in rounds]))


def at_k_intervals(rounds: Rounds, block_size: int) -> list[Interval]:
    """Returns the interval of accept_rate_at_k for k = 1..K-1."""
    counts = np.array([[sum(one >= k for one in some) for k in range(1, block_size)] for some in rounds])
    return intervals.share_intervals(counts, np.array([len(some) for some in rounds]))


def by_label(rounds: Rounds, labels: Sequence[str | None], block_size: int) -> dict[str, dict[str, Any]]:
    """Returns the acceptance of the answers of each label; answers without one, or without rounds, are left out."""
    groups: dict[str, list[Sequence[int]]] = {}
    for some, label in zip(rounds, labels, strict=True):
        if label is not None and some:
            groups.setdefault(label, []).append(some)
    return {label: _figures(groups[label], block_size) for label in sorted(groups)}


def by_channel(
    answers: Sequence[Completion], prompt_ids: Sequence[Sequence[int]], tokens: ChannelTokens, block_size: int
) -> dict[str, dict[str, Any]]:
    """Returns the acceptance of the rounds in each channel: a round belongs to the channel of its first token."""
    groups: dict[str, list[Sequence[int]]] = {}
    for answer, prompt in zip(answers, prompt_ids, strict=True):
        ids = np.array([*prompt, *answer.token_ids])
        found = channels(tokens, ids, len(prompt))
        starts = len(prompt) + 1 + np.cumsum([0, *(count + 1 for count in answer.accepted_per_round)])[:-1]
        of_answer: dict[str, list[int]] = {}
        for start, count in zip(starts, answer.accepted_per_round, strict=True):
            name = Channel(int(found[min(start, len(ids) - 1)])).name
            of_answer.setdefault(name, []).append(count)
        for name, some in of_answer.items():
            groups.setdefault(name, []).append(some)
    return {name: _figures(groups[name], block_size) for name in sorted(groups)}


def label_breakdowns(rounds: Rounds, labels: Sequence[Labels], block_size: int) -> dict[str, Mapping[str, Any]]:
    """Returns `by_label` for families and for efforts; a kind of which there is one label or none is left out."""
    found = {
        "family": by_label(rounds, [one.family for one in labels], block_size),
        "effort": by_label(rounds, [one.effort for one in labels], block_size),
    }
    return {kind: groups for kind, groups in found.items() if len(groups) > 1}


def _figures(rounds: Rounds, block_size: int) -> dict[str, Any]:
    found, interval = (
        Acceptance.of([one for some in rounds for one in some], block_size),
        accept_length_interval(rounds),
    )
    return {
        "accept_length": found.accept_length,
        "accept_length_low": interval.low,
        "accept_length_high": interval.high,
        "num_answers": len(rounds),
        "num_rounds": found.num_rounds,
    }


def _sums(rounds: Rounds) -> Int[np.ndarray, " N"]:
    return np.array([sum(some) for some in rounds])
