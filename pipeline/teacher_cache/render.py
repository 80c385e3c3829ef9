"""Renders prompts as tokens, and records why a prompt is skipped."""

import dataclasses
from collections.abc import Sequence

from pipeline.errors import PipelineError
from pipeline.prompts.chat_format import prompt_token_ids
from pipeline.prompts.sources import Prompt
from pipeline.prompts.tokenizer import Tokenizer

SHOWN_SKIPS = 5


@dataclasses.dataclass(frozen=True)
class RenderedPrompt:
    """Holds a prompt and its tokens; `skipped` is the reason why it is left out, None when it is used."""

    prompt: Prompt
    token_ids: tuple[int, ...]
    skipped: str | None


def render_prompts(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], max_prompt_tokens: int, split: str, *, date: str
) -> list[RenderedPrompt]:
    """Returns every prompt of a split as tokens on the day `date`, unusable ones with the reason in `skipped`.

    Raises PipelineError when none is usable.
    """
    rendered = [_render(tokenizer, prompt, max_prompt_tokens, date) for prompt in prompts]
    if all(row.skipped for row in rendered):
        reasons = "\n  ".join(f"{row.prompt.prompt_id[:12]}: {row.skipped}" for row in rendered[:SHOWN_SKIPS])
        raise PipelineError(
            f"none of the {len(rendered)} {split} prompts can be used; raise teacher_cache.max_prompt_tokens or give "
            f"other prompts\n  {reasons}"
        )
    return rendered


def _render(tokenizer: Tokenizer, prompt: Prompt, max_prompt_tokens: int, date: str) -> RenderedPrompt:
    try:
        token_ids = tuple(prompt_token_ids(tokenizer, prompt, date=date))
    except PipelineError as error:  # one unusable prompt of a large set is reported, counted and left out
        return RenderedPrompt(prompt, (), str(error))
    if len(token_ids) > max_prompt_tokens:
        return RenderedPrompt(prompt, token_ids, f"{len(token_ids)} tokens, at most {max_prompt_tokens} are wanted")
    return RenderedPrompt(prompt, token_ids, None)
