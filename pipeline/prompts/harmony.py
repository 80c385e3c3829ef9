"""Conversations to tokens, in the Harmony format (github.com/openai/harmony, docs/format.md)."""

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from pipeline.artifacts import PipelineError
from pipeline.prompts.messages import effort_problem, messages_problem
from pipeline.prompts.tokenizer import special_token_ids

STOP_TOKENS = ("<|return|>", "<|call|>", "<|endoftext|>")
HEADER_TOKENS = ("<|start|>", "<|channel|>")  # what follows them, up to <|message|>, is not text


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, str]],
    effort: str,
    *,
    date: str | None = None,
) -> list[int]:
    """The prompt's tokens by the tokenizer's chat template, ending where the assistant begins.

    `date` (`2025-08-05`) stands in for today's in templates that print it, as the official one does: two
    runs on different days otherwise see different prompts. Raises PipelineError for messages that do not
    make a prompt, and for texts that spell a control token (they would end the turn they stand in).
    """
    problem = messages_problem(messages) or effort_problem(effort) or _control_token_problem(tokenizer, messages)
    if problem is not None:
        raise PipelineError(problem)
    options: dict[str, Any] = {"reasoning_effort": effort}
    if date is not None:
        options["strftime_now"] = lambda _format: date  # a render variable hides the environment's global
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **options)
    except TemplateError as error:
        raise PipelineError(f"the chat template refuses the messages: {error}; change them") from error
    return tokenizer.encode(text, add_special_tokens=False)


def render_completion(tokenizer: PreTrainedTokenizerBase, analysis: str, final: str) -> list[int]:
    """The tokens that follow `render_prompt`: analysis, final and `<|return|>`, as the model writes them."""
    problem = _control_token_problem(tokenizer, [{"content": analysis}, {"content": final}])
    if problem is not None:
        raise PipelineError(problem)
    text = (
        f"<|channel|>analysis<|message|>{analysis}<|end|><|start|>assistant<|channel|>final<|message|>{final}<|return|>"
    )
    return tokenizer.encode(text, add_special_tokens=False)


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a generation: return (answered), call (a tool is wanted), endoftext."""
    return special_token_ids(tokenizer, STOP_TOKENS)


def _control_token_problem(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> str | None:
    control_tokens = tokenizer.get_added_vocab()
    found = sorted({token for message in messages for token in control_tokens if token in message["content"]})
    if not found:
        return None
    return f"a text spells the control tokens {', '.join(found)}; wanted plain text: take them out"
