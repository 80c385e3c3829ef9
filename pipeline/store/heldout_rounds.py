"""Stores held-out texts of the target with the rounds that the training evaluation counted over them, as JSON lines."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.artifacts.storage import StoragePath
from pipeline.dflash.acceptance import Acceptance
from pipeline.errors import PipelineError

FILE = "heldout.jsonl"  # in a checkpoint: what its evaluation read, and the rounds that it counted


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldoutText:
    """Holds a prompt with the target's answer, and the drafted tokens that each round over it accepted.

    The first `prompt_tokens` of `token_ids` are the prompt's.
    """

    prompt_id: str
    prompt_tokens: int
    token_ids: tuple[int, ...]
    accepted_per_round: tuple[int, ...]

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The prompt's tokens."""
        return self.token_ids[: self.prompt_tokens]

    @property
    def answer_ids(self) -> tuple[int, ...]:
        """The target's tokens."""
        return self.token_ids[self.prompt_tokens :]


def acceptance_of(texts: Iterable[HeldoutText], block_size: int) -> Acceptance:
    """Returns the acceptance over the rounds of all texts."""
    return Acceptance.of([count for text in texts for count in text.accepted_per_round], block_size)


def to_lines(texts: Sequence[HeldoutText]) -> bytes:
    """Returns one JSON object a line, in the order of the texts."""
    return "".join(json.dumps(dataclasses.asdict(text), sort_keys=True) + "\n" for text in texts).encode()


def read_texts(file: StoragePath) -> list[HeldoutText]:
    """Reads what `to_lines` wrote. Raises PipelineError when there is no such file or it holds something else."""
    try:
        return [_text(json.loads(line)) for line in file.read_text().splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PipelineError(
            f"{file} does not hold the rounds of the training evaluation ({error!r}); run stage=train again"
        ) from error


def _text(row: dict[str, Any]) -> HeldoutText:
    accepted = row["kept"] if "kept" in row else row["accepted_per_round"]  # `kept` is what version 0.1 wrote
    return HeldoutText(
        prompt_id=row["prompt_id"],
        prompt_tokens=row["prompt_tokens"],
        token_ids=tuple(row["token_ids"]),
        accepted_per_round=tuple(accepted),
    )
