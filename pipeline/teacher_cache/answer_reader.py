"""Turns answers from outside into the tokens that the target wrote: reported ones, or a message in its chat format."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import PipelineError
from pipeline.prompts.chat_format import chat_format_of
from pipeline.prompts.harmony import render_completion
from pipeline.prompts.messages import THINKING
from pipeline.prompts.tokenizer import Tokenizer, control_token_problem, special_token_ids
from pipeline.prompts.tools import tool_calls_of, tool_calls_problem

STOP, CUT = "stop", "length"  # why an answer ended
SHOWN_CHARACTERS = 200

AnswerTokens = tuple[tuple[int, ...], str]  # an answer's tokens, and STOP or CUT


class BadAnswer(Exception):
    """Reports what is no answer to its prompt, or one whose tokens it does not tell; the message says why."""


class AnswerReader:
    """Turns answers into tokens of the target's chat format, at most `max_new_tokens` of each.

    `stop_token_ids` end an answer; the first of them is the one that the target's turns end with.
    """

    def __init__(self, tokenizer: Tokenizer, stop_token_ids: Sequence[int], max_new_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._format = chat_format_of(tokenizer)
        self._stops = tuple(stop_token_ids)
        self._vocabulary = len(tokenizer)
        self._max_new_tokens = max_new_tokens

    def reported(self, token_ids: Any) -> AnswerTokens:
        """Returns tokens as they are reported, up to the first that ends an answer; raises BadAnswer."""
        if not isinstance(token_ids, list) or not all(
            isinstance(token, int) and 0 <= token < self._vocabulary for token in token_ids
        ):
            raise BadAnswer(f"token_ids is {shortened(token_ids)}; wanted ids from 0 to {self._vocabulary - 1}")
        ends = [index for index, token in enumerate(token_ids) if token in self._stops]
        return self._limited(token_ids[: ends[0] + 1] if ends else token_ids)

    def rendered(self, message: Mapping[str, Any], *, was_cut: bool) -> AnswerTokens:
        """Returns the tokens of an assistant's message in the shape of OpenAI's API, as the model writes it.

        They end with the token that ends a turn unless the text was cut off. Raises BadAnswer.
        """
        content, analysis = _text(message, "content"), _text(message, *THINKING)
        calls = message.get("tool_calls") or []
        if not (content or analysis or calls):
            raise BadAnswer("the answer is empty")
        if not self._format.has_channels:
            return self._limited(self._plain(content, analysis, calls, was_cut))
        if was_cut and calls:
            raise BadAnswer("the answer was cut off in a tool call, whose tokens its text does not tell")
        if not (content or calls or was_cut):
            raise BadAnswer("the answer has reasoning alone, and no final text")
        return self._limited(self._harmony(content, analysis, calls, was_cut))

    def _harmony(self, content: str, analysis: str, calls: Any, was_cut: bool) -> list[int]:
        try:
            problem = tool_calls_problem(calls) if calls else None
            if problem is not None:
                raise BadAnswer(f"the answer {problem}")
            tokens = render_completion(
                self._tokenizer,
                analysis or None,
                content or (None if calls else ""),
                tool_calls=tool_calls_of(calls),
            )
        except PipelineError as error:
            raise BadAnswer(str(error)) from error
        if not was_cut:
            return tokens
        end = "<|return|>" if content else "<|end|>"  # the first <|end|> closes the analysis, which spells none
        return tokens[: tokens.index(special_token_ids(self._tokenizer, [end])[0])]

    def _plain(self, content: str, analysis: str, calls: Any, was_cut: bool) -> list[int]:
        problem = control_token_problem(self._tokenizer, [content])
        if calls or analysis:
            problem = f"the answer has {'tool calls' if calls else 'reasoning'}, which the target's format has not"
        if problem is not None:
            raise BadAnswer(problem)
        tokens = self._tokenizer.encode(content, add_special_tokens=False)
        return tokens if was_cut else [*tokens, self._stops[0]]

    def _limited(self, tokens: Sequence[int]) -> AnswerTokens:
        if not tokens:
            raise BadAnswer("the answer is empty")
        tokens = tuple(tokens[: self._max_new_tokens])
        return tokens, STOP if tokens[-1] in self._stops else CUT


def _text(message: Mapping[str, Any], *names: str) -> str:
    found = {name: message[name] for name in names if message.get(name)}
    for name, text in found.items():
        if not isinstance(text, str):
            raise BadAnswer(f"{name} is {shortened(text)}; wanted text")
    if len(set(found.values())) > 1:
        raise BadAnswer(f"the answer has {' and '.join(found)}, which differ; wanted one of them")
    return next(iter(found.values()), "")


def shortened(value: Any) -> str:
    """Returns a value's repr for an error, shortened to SHOWN_CHARACTERS."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
