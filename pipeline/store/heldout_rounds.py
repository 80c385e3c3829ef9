"""Texts of the target beside the rounds that a draft ran over them; JSON lines on disk."""

import dataclasses
import json
from collections.abc import Iterable, Sequence

from pipeline.artifacts import PipelineError
from pipeline.dflash.acceptance import Acceptance
from pipeline.places import Place

FILE = "heldout.jsonl"  # in a checkpoint: what its evaluation read, and the rounds that it counted


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredText:
    """A prompt with the target's answer, `prompt_tokens` of `token_ids` being the prompt's; kept per round."""

    prompt_id: str
    prompt_tokens: int
    token_ids: tuple[int, ...]
    kept: tuple[int, ...]

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The prompt's tokens."""
        return self.token_ids[: self.prompt_tokens]

    @property
    def answer_ids(self) -> tuple[int, ...]:
        """The target's tokens."""
        return self.token_ids[self.prompt_tokens :]


def acceptance_of(texts: Iterable[ScoredText], block_size: int) -> Acceptance:
    """The rounds of all texts."""
    return Acceptance.of([kept for text in texts for kept in text.kept], block_size)


def to_lines(texts: Sequence[ScoredText]) -> bytes:
    """One JSON object a line, in this order."""
    return "".join(json.dumps(dataclasses.asdict(text), sort_keys=True) + "\n" for text in texts).encode()


def read(file: Place) -> list[ScoredText]:
    """What `to_lines` wrote. Raises PipelineError when there is no such file or it holds something else."""
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        return [ScoredText(**{**row, "token_ids": tuple(row["token_ids"]), "kept": tuple(row["kept"])}) for row in rows]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise PipelineError(
            f"{file} does not tell the rounds of the training evaluation ({error!r}); run stage=train again"
        ) from error
