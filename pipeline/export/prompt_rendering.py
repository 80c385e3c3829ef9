"""Whether the prompts that a draft was trained on are, token by token, what serving makes of the same messages."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from pipeline.artifacts import PipelineError
from pipeline.dflash.scored import ScoredText
from pipeline.prompts.chat_format import prompt_token_ids
from pipeline.prompts.sources import Prompt

SHOWN_TOKENS = 8


def require_rendering(
    texts: Sequence[ScoredText], prompts: Mapping[str, Prompt], tokenizer: PreTrainedTokenizerBase, date: str
) -> None:
    """Raise PipelineError when the prompt of a text is not the rendering of the prompt of its id."""
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


def _problem(text: ScoredText, prompt: Prompt | None, tokenizer: PreTrainedTokenizerBase, date: str) -> str | None:
    name = f"prompt {text.prompt_id[:12]}"
    if prompt is None:
        return f"{name}: not in the prompt set of this configuration"
    wanted = prompt_token_ids(tokenizer, prompt, date=date)
    found = list(text.prompt_ids)
    if found == wanted:
        return None
    same = (left == right for left, right in zip(found, wanted, strict=False))
    at = next((index for index, is_same in enumerate(same) if not is_same), min(len(found), len(wanted)))
    left, right = (tokenizer.decode(ids[at : at + SHOWN_TOKENS]) for ids in (found, wanted))
    return f"{name}: from token {at} on found {left!r}, wanted {right!r}"
