"""How a target's conversations are written: decided by its tokenizer's control tokens, here and nowhere else.

A Harmony tokenizer (GPT-OSS's, the tiny target's) has channels and reasoning efforts. Any other is taken to be
that of a plain chat model, such as ChatML's: the template writes the turns, the end-of-sequence token ends the
answer, and the answer has no channels. A reasoning effort means nothing there: prompts keep theirs as a label
that no template reads, and the server refuses a request that asks for one.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from pipeline.artifacts import PipelineError
from pipeline.prompts import harmony
from pipeline.prompts.messages import effort_problem, messages_problem
from pipeline.prompts.tokenizer import control_token_problem, special_token_ids

ENDINGS = ("<|im_end|>", "<|endoftext|>")  # end a generation in plain formats too, where the tokenizer has them


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """What differs between formats. `spoken_roles` gives the roles whose turns the template writes as another's."""

    stop_tokens: tuple[str, ...]
    has_channels: bool
    has_efforts: bool
    spoken_roles: Mapping[str, str]


HARMONY = ChatFormat(stop_tokens=harmony.STOP_TOKENS, has_channels=True, has_efforts=True, spoken_roles={})


def chat_format_of(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """The format of a tokenizer's conversations; PipelineError when nothing ends an answer."""
    added = tokenizer.get_added_vocab()
    if any(token in added for token in harmony.CHANNEL_TOKENS):  # all it needs are looked for where they are used
        return HARMONY
    endings = [tokenizer.eos_token, *ENDINGS]
    stops = tuple(dict.fromkeys(token for token in endings if token in added))
    if not stops:
        raise PipelineError(
            f"the tokenizer {tokenizer.name_or_path or '(in memory)'} has no control token that ends an answer "
            f"(eos_token is {tokenizer.eos_token!r}); set eos_token in its tokenizer_config.json"
        )
    # templates other than Harmony's were never trained with a developer
    return ChatFormat(stop_tokens=stops, has_channels=False, has_efforts=False, spoken_roles={"developer": "system"})


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
    problem = messages_problem(messages) or effort_problem(effort)
    problem = problem or control_token_problem(tokenizer, [message["content"] for message in messages])
    if problem is not None:
        raise PipelineError(problem)
    options: dict[str, Any] = {"reasoning_effort": effort}
    if date is not None:
        options["strftime_now"] = lambda _format: date  # a render variable hides the environment's global
    roles = chat_format_of(tokenizer).spoken_roles
    turns = [{**message, "role": roles.get(message["role"], message["role"])} for message in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **options)
    except TemplateError as error:
        raise PipelineError(f"the chat template refuses the messages: {error}; change them") from error
    return tokenizer.encode(text, add_special_tokens=False)


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a generation. Harmony's: return (answered), call (a tool is wanted), endoftext."""
    return special_token_ids(tokenizer, chat_format_of(tokenizer).stop_tokens)
