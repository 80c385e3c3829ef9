"""Checks that the prompts of a draft's training are, token by token, what serving renders from the same messages."""

from collections.abc import Mapping, Sequence

from pipeline.errors import PipelineError
from pipeline.prompts.chat_format import prompt_token_ids
from pipeline.prompts.sources import Prompt
from pipeline.prompts.tokenizer import Tokenizer
from pipeline.store.heldout_rounds import HeldoutText

SHOWN_TOKENS = 8


def require_rendering(
    texts: Sequence[HeldoutText], prompts: Mapping[str, Prompt], tokenizer: Tokenizer, date: str
) -> None:
    """Raises PipelineError when the prompt of a text is not the rendering of the prompt of its id."""
    wrong = [
        problem
        for text in texts
        if (problem := _problem(text, prompts.get(text.prompt_id), tokenizer, date)) is not None
    ]
    if wrong:
        raise PipelineError(
            f"{len(wrong)} of {len(texts)} held-out prompts that the draft was trained beside are not what serving "
            "makes of them: the chat template, the date or the tokenizer was another one. Make the teacher cache and "
            f"the draft anew\n  {wrong[0]}"
        )


def _problem(text: HeldoutText, prompt: Prompt | None, tokenizer: Tokenizer, date: str) -> str | None:
    name = f"prompt {text.prompt_id[:12]}"
    if prompt is None:
        return f"{name}: not in the prompt set of this configuration"
    wanted = prompt_token_ids(tokenizer, prompt, date=date)
    found = list(text.prompt_ids)
    if found == wanted:
        return None
    same = (left == right for left, right in zip(found, wanted, strict=False))
    first = next((index for index, is_same in enumerate(same) if not is_same), min(len(found), len(wanted)))
    left, right = (tokenizer.decode(ids[first : first + SHOWN_TOKENS]) for ids in (found, wanted))
    return f"{name}: from token {first} on found {left!r}, wanted {right!r}"
