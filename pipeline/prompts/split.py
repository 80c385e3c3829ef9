"""Splits prompts into train and held-out by hash."""

from collections.abc import Iterable

from pipeline.errors import PipelineError
from pipeline.prompts.sources import Prompt

ID_DIGITS = 16  # the first 8 bytes of the prompt's id
ID_RANGE = 2**64


def is_heldout(prompt_id: str, heldout_fraction: float) -> bool:
    """Returns whether a prompt is held out, which depends on its messages alone and not on their source."""
    return int(prompt_id[:ID_DIGITS], 16) < heldout_fraction * ID_RANGE  # exact: int against float


def split_by_hash(prompts: Iterable[Prompt], heldout_fraction: float) -> tuple[list[Prompt], list[Prompt]]:
    """Returns train and held-out prompts, each in the order of `prompts`; no prompt is in both.

    Raises PipelineError for a fraction outside of (0, 1) and when a side is empty.
    """
    if not 0 < heldout_fraction < 1:
        raise PipelineError(f"heldout_fraction is {heldout_fraction}; it must be between 0 and 1")
    train: list[Prompt] = []
    heldout: list[Prompt] = []
    for prompt in prompts:
        (heldout if is_heldout(prompt.prompt_id, heldout_fraction) else train).append(prompt)
    if not train or not heldout:
        raise PipelineError(
            f"{len(train) + len(heldout)} prompts with heldout_fraction {heldout_fraction} give "
            f"{len(train)} for training and {len(heldout)} held out; both must have some: "
            "give more prompts or another fraction"
        )
    return train, heldout
