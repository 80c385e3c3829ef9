"""Runs another trainer beside ours: same draft, first weights, batches, machine and number of threads.

The other trainer is a command that gets the names of two files (`external/command.py`). It reads the first one,

    {"draft": directory, "data": file, "order": [[index, ...], ...], "num_anchors": n, "threads": n, "seed": n,
     "recipe": {...}, "attention": name or null, "draft_out": file or null}

trains the draft of the directory (HF layout, float32) one step per batch of `order`, `num_anchors` blocks in each, by
the `recipe` (`PeerRecipe`), writes its tensors to `draft_out` unless that is null, and writes to the second file

    {"step_seconds": [s, ...], "losses": [x, ...], "attention": name}

The data is an .npz of the distinct sequences end to end: token_ids [tokens], features [tokens, L*D] as the bits of
bfloat16, generated [tokens], offsets [sequences + 1], and the target's embedding and head, both [V, D].
"""

import dataclasses
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from pipeline.external import command as peer_command
from pipeline.model.layers.linear import Matrix, TransposedMatrix

KEY = "train_peer.command"
WARM_UP_STEPS = 3  # of a pass, not counted


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeerRecipe:
    """Holds how the other trainer trains: its name for block positions' weights, and the settings of its trainer."""

    weights: str
    decay: float
    smoothing: float
    trainer: dict[str, Any]


# Defaults of `speculators train --speculator-type dflash` 0.9.0 (train/config/schema.py): Muon beside AdamW, linear
# decay after 1 % of warm-up, D-PACE weights. Our number of steps replaces its number of epochs.
PUBLISHED = PeerRecipe(
    weights="dpace",
    decay=4.0,
    smoothing=0.5,
    trainer={"optimizer": "muon", "lr": 1e-3, "muon_lr": 1e-3, "weight_decay": 0.01, "scheduler_type": "linear"},
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeerData:
    """Holds the file of the sequences, and by index those in each step's batch."""

    file: Path
    order: list[list[int]]
    num_tokens: list[int]  # of each step's batch, without padding

    @classmethod
    def write(
        cls, file: Path, batches: Iterable[dict[str, np.ndarray]], embedding: Float[Array, "V D"], head: Matrix
    ) -> "PeerData":
        """Writes the sequences of these batches (fields of a `TrainBatch`, a sequence to a row), each once."""
        indices: dict[bytes, int] = {}
        sequences: list[dict[str, np.ndarray]] = []
        order: list[list[int]] = []
        for batch in batches:
            order.append([])
            for row, generated in enumerate(batch["generated"]):
                end = np.flatnonzero(generated)[-1] + 1  # the loss neither reads nor predicts later positions
                sequence = {name: batch[name][row, :end] for name in ("token_ids", "generated", "features")}
                key = sequence["token_ids"].tobytes() + sequence["generated"].tobytes()
                if key not in indices:
                    indices[key] = len(sequences)
                    sequences.append(sequence)
                order[-1].append(indices[key])
        lengths = [len(sequence["token_ids"]) for sequence in sequences]
        tokens = {name: np.concatenate([sequence[name] for sequence in sequences]) for name in sequences[0]}
        np.savez(
            file,
            **{**tokens, "features": tokens["features"].view(np.int16)},
            offsets=np.cumsum([0, *lengths]),
            embedding=np.asarray(embedding),
            head=np.asarray(head.array if isinstance(head, TransposedMatrix) else head.T),
        )
        return cls(file=file, order=order, num_tokens=[sum(lengths[index] for index in batch) for batch in order])


def run_peer_trainer(
    command: Sequence[str],
    draft: Path,
    data: PeerData,
    recipe: PeerRecipe,
    *,
    num_anchors: int,
    seed: int,
    attention: str | None = None,
    draft_out: Path | None = None,
) -> dict[str, Any]:
    """Returns the other trainer's answer. Raises PipelineError when it fails."""
    question = {
        "draft": str(draft),
        "data": str(data.file),
        "order": data.order,
        "num_anchors": num_anchors,
        "threads": len(os.sched_getaffinity(0)),  # as many as XLA uses
        "seed": seed,
        "recipe": dataclasses.asdict(recipe),
        "attention": attention,
        "draft_out": None if draft_out is None else str(draft_out),
    }
    return peer_command.run_json(command, question, KEY)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingComparison:
    """Holds the seconds of each step, pass by pass, ours and theirs, and the tokens of each step's batch."""

    ours: tuple[tuple[float, ...], ...]
    theirs: tuple[tuple[float, ...], ...]
    num_tokens: tuple[int, ...]

    @property
    def ratios(self) -> list[float]:
        """Returns by pass how many times as fast our step is: the median over steps, each with the same batch."""
        return [
            statistics.median(their / our for our, their in list(zip(*steps, strict=True))[WARM_UP_STEPS:])
            for steps in zip(self.ours, self.theirs, strict=True)
        ]

    def metrics(self) -> dict[str, float]:
        """Returns the metrics as they are logged."""
        ratios = self.ratios
        return {
            "train_peer/ours_tokens_per_second": self._speed(self.ours),
            "train_peer/theirs_tokens_per_second": self._speed(self.theirs),
            "train_peer/ratio": statistics.median(ratios),
            "train_peer/ratio_min": min(ratios),
            "train_peer/ratio_max": max(ratios),
        }

    def _speed(self, passes: Sequence[Sequence[float]]) -> float:
        return statistics.median(
            tokens / seconds
            for steps in passes
            for tokens, seconds in list(zip(self.num_tokens, steps, strict=True))[WARM_UP_STEPS:]
        )
