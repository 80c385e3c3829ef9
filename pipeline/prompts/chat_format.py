"""Chooses a target's chat format from its tokenizer's control tokens, and renders prompts in it.

A Harmony tokenizer (GPT-OSS's, the tiny target's) has channels and reasoning efforts. Any other is taken to be
that of a plain chat model, such as ChatML's: the template writes the turns, the end-of-sequence token ends the
answer, and the answer has no channels. Such a model has no reasoning efforts: prompts keep theirs as a label
that no template reads, and the server refuses a request that asks for one. It has no tools either, because its
template would leave them out silently.
"""

import dataclasses
import datetime
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from pipeline.errors import PipelineError
from pipeline.prompts import harmony, spelled
from pipeline.prompts.messages import Message, effort_problem, message_of, messages_problem
from pipeline.prompts.sources import Prompt
from pipeline.prompts.text_length import TextTooLong
from pipeline.prompts.tokenizer import Tokenizer, control_token_problem, special_token_ids
from pipeline.prompts.tools import tools_of, tools_problem

PLAIN_STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")  # stop plain formats too, where the tokenizer has them


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """Holds what differs between formats; `spoken_roles` maps roles to those under which the template writes them."""

    stop_tokens: tuple[str, ...]
    has_channels: bool
    has_efforts: bool
    has_tools: bool
    spoken_roles: Mapping[str, str]


HARMONY = ChatFormat(
    stop_tokens=harmony.STOP_TOKENS, has_channels=True, has_efforts=True, has_tools=True, spoken_roles={}
)


def chat_format_of(tokenizer: Tokenizer) -> ChatFormat:
    """Returns the format of a tokenizer's conversations; raises PipelineError when no token ends an answer."""
    added = tokenizer.get_added_vocab()
    if any(token in added for token in harmony.CHANNEL_TOKENS):  # the others are looked up where they are used
        return HARMONY
    stop_tokens = [tokenizer.eos_token, *PLAIN_STOP_TOKENS]
    stops = tuple(dict.fromkeys(token for token in stop_tokens if token in added))
    if not stops:
        raise PipelineError(
            f"the tokenizer {tokenizer.name_or_path or '(in memory)'} has no control token that ends an answer "
            f"(eos_token is {tokenizer.eos_token!r}); set eos_token in its tokenizer_config.json"
        )
    # models with other templates were not trained with a developer role
    return ChatFormat(
        stop_tokens=stops,
        has_channels=False,
        has_efforts=False,
        has_tools=False,
        spoken_roles={"developer": "system"},
    )


def render_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    effort: str,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    date: str | None = None,
    may_be_empty: bool = False,
    most_characters: int | None = None,
) -> list[int]:
    """Returns the prompt's tokens by the tokenizer's chat template, ending where the assistant begins.

    `messages` and `tools` are in the shape of OpenAI's API. `date` (`2025-08-05`) replaces today's in templates that
    print it, as the official one does: otherwise two runs on different days see different prompts. A control token
    that a text spells stays text. Raises PipelineError for messages that do not make a prompt, for tools where the
    format has none, for a content that is empty unless it `may_be_empty`, and for spelled control tokens where the
    tokenizer or the template cannot tell them apart; TextTooLong for a prompt of more than `most_characters`.
    """
    problem = messages_problem(messages, may_be_empty=may_be_empty) or tools_problem(tools) or effort_problem(effort)
    if problem is not None:
        raise PipelineError(problem)
    chat_format, conversation = chat_format_of(tokenizer), [message_of(message) for message in messages]
    turns = [_turn(message, chat_format) for message in conversation]
    functions = [tool.as_dict() for tool in tools_of(tools)]
    problem = _tools_problem(chat_format, conversation, functions)
    if problem is not None:
        raise PipelineError(problem)
    options: dict[str, Any] = {"reasoning_effort": effort}
    if date is not None:  # a render variable hides the environment's global
        options["strftime_now"] = datetime.date.fromisoformat(date).strftime

    def rendered(change: Callable[[str], str]) -> str:
        offered = {"tools": _changed(functions, change)} if functions else {}
        return _apply_template(tokenizer, _changed(turns, change), options | offered)

    plain = rendered(lambda text: text)
    if most_characters is not None and len(plain) > most_characters:
        raise TextTooLong(len(plain), most_characters)
    problem = control_token_problem(tokenizer, _texts([*turns, *functions]))
    if problem is None:
        return tokenizer.encode(plain, add_special_tokens=False)
    token_ids = spelled.encode(tokenizer, plain, rendered)
    if token_ids is None:
        raise PipelineError(problem)
    return token_ids


def _apply_template(tokenizer: Tokenizer, turns: list[dict[str, Any]], options: dict[str, Any]) -> str:
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **options)
        assert isinstance(text, str), "tokenize=False of one conversation"
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no tokenizer takes
        raise PipelineError(f"the conversation is not valid Unicode ({error}); correct its texts") from error
    except (TemplateError, TypeError) as error:  # TypeError: the official one joins a tool's defaults as texts
        raise PipelineError(f"the chat template refuses the conversation: {error}; change it") from error
    return text


def prompt_token_ids(tokenizer: Tokenizer, prompt: Prompt, *, date: str | None) -> list[int]:
    """Returns the tokens of a prompt of a prompt set; raises PipelineError as `render_prompt` does."""
    messages = [message.as_dict() for message in prompt.messages]
    tools = [tool.as_dict() for tool in prompt.tools]
    return render_prompt(tokenizer, messages, prompt.effort, tools=tools, date=date)


def _turn(message: Message, chat_format: ChatFormat) -> dict[str, Any]:
    """Returns a message as templates take it: arguments are objects (OpenAI's are texts), absent fields left out."""
    turn: dict[str, Any] = {"role": chat_format.spoken_roles.get(message.role, message.role)}
    if message.content or not message.tool_calls:
        turn["content"] = message.content
    if message.thinking is not None and chat_format.has_channels:
        turn["thinking"] = message.thinking
    if message.tool_calls:
        calls = [(call.name, json.loads(call.arguments)) for call in message.tool_calls]
        turn["tool_calls"] = [
            {"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls
        ]
    return turn


def _tools_problem(chat_format: ChatFormat, messages: Sequence[Message], tools: Sequence[Any]) -> str | None:
    if chat_format.has_tools or not (tools or any(message.tool_calls for message in messages)):
        return None
    return "the target's chat format has no tools; leave tools and the calls of tools out"


def _texts(value: Any) -> Iterator[str]:
    """Yields every text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """Returns a JSON value with every text in it changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _changed(item, change) for key, item in value.items()}
    return [_changed(item, change) for item in value] if isinstance(value, list) else value


def stop_token_ids(tokenizer: Tokenizer) -> list[int]:
    """Returns the tokens that end a generation; in Harmony return (answered), call (of a tool) and endoftext."""
    return special_token_ids(tokenizer, chat_format_of(tokenizer).stop_tokens)
