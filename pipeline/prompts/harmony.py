"""Conversations to tokens and back, in the Harmony format (github.com/openai/harmony, docs/format.md)."""

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


def split_channels(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> tuple[str, str]:
    """The analysis and the final text in a completion, whole or cut off anywhere.

    No token is lost silently: channels other than final (commentary) count as analysis, and text outside of
    any message as final. A header cut off before its `<|message|>` is no text. Reading ends at a stop token.
    """
    names = (*STOP_TOKENS, *HEADER_TOKENS, "<|end|>", "<|message|>")
    spelled = dict(zip(special_token_ids(tokenizer, names), names, strict=True))
    texts: dict[str, list[str]] = {"analysis": [], "final": []}
    header: list[int] | None = None  # the tokens of the header being read; None inside a body
    channel, body = "final", []

    for token_id in [*token_ids, None]:
        name = spelled.get(token_id)
        if token_id is not None and name is None:
            (body if header is None else header).append(token_id)
            continue
        if body:
            texts[channel].append(_decode(tokenizer, body, cut_off=token_id is None))
            body = []
        if name in HEADER_TOKENS:
            header = []
        elif name == "<|message|>":
            channel, header = _channel_of(tokenizer, header), None
        elif name == "<|end|>":
            channel, header = "final", None
        else:  # a stop token, or the end
            break
    return "\n".join(texts["analysis"]), "\n".join(texts["final"])


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a generation: return (answered), call (a tool is wanted), endoftext."""
    return special_token_ids(tokenizer, STOP_TOKENS)


def _channel_of(tokenizer: PreTrainedTokenizerBase, header: list[int] | None) -> str:
    words = tokenizer.decode(header or [], skip_special_tokens=True).split()
    return "final" if not words or words[0] == "final" else "analysis"


def _decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], *, cut_off: bool) -> str:
    text = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.rstrip("\ufffd") if cut_off else text  # a character cut in the middle is not shown


def _control_token_problem(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> str | None:
    control_tokens = tokenizer.get_added_vocab()
    found = sorted({token for message in messages for token in control_tokens if token in message["content"]})
    if not found:
        return None
    return f"a text spells the control tokens {', '.join(found)}; wanted plain text: take them out"
