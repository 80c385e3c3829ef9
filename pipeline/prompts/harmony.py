"""Holds Harmony's control tokens and renders answers in it (github.com/openai/harmony, docs/format.md)."""

from collections.abc import Sequence

from pipeline.errors import PipelineError
from pipeline.prompts.tokenizer import Tokenizer, control_token_problem
from pipeline.prompts.tools import ToolCall, call_problem

STOP_TOKENS = ("<|return|>", "<|call|>", "<|endoftext|>")
CONSTRAIN = "<|constrain|>"  # in a header, before the type of a call's arguments
CHANNEL_TOKENS = ("<|channel|>", "<|return|>")  # a tokenizer with one of them is meant to be Harmony's
NEXT_MESSAGE = "<|end|><|start|>assistant"


def render_completion(
    tokenizer: Tokenizer,
    analysis: str | None = None,
    final: str | None = None,
    *,
    tool_calls: Sequence[ToolCall] = (),
) -> list[int]:
    """Returns the tokens that follow a prompt, as the model writes them, up to and including its stop token.

    A turn ends with the final text and `<|return|>`, or with a call and `<|call|>`; the text beside a call is its
    preamble, which goes to the commentary channel. A call's recipient follows the channel, where the model writes
    it (docs/format.md, "Receiving tool calls"); openai-harmony reads both forms and writes it after the role. Raises
    PipelineError for a turn without end, for more than one call, for an invalid call, and for texts that spell a
    control token.
    """
    problem = _turn_problem(final, tool_calls)
    spoken = [analysis, final, *(text for call in tool_calls for text in (call.name, call.arguments))]
    problem = problem or control_token_problem(tokenizer, [text for text in spoken if text is not None])
    if problem is not None:
        raise PipelineError(problem)
    messages = [] if analysis is None else [f"<|channel|>analysis<|message|>{analysis}"]
    if final is not None:
        messages.append(f"<|channel|>{'commentary' if tool_calls else 'final'}<|message|>{final}")
    messages += [
        f"<|channel|>commentary to=functions.{call.name} {CONSTRAIN}json<|message|>{call.arguments}"
        for call in tool_calls
    ]
    text = NEXT_MESSAGE.join(messages) + ("<|call|>" if tool_calls else "<|return|>")
    return tokenizer.encode(text, add_special_tokens=False)


def _turn_problem(final: str | None, tool_calls: Sequence[ToolCall]) -> str | None:
    if len(tool_calls) > 1:
        return f"an answer has {len(tool_calls)} tool calls; a call ends the turn: wanted one at most"
    if not tool_calls and final is None:
        return "an answer has neither a final text nor a tool call; wanted one of them"
    problems = (call_problem(call.name, call.arguments) for call in tool_calls)
    return next((f"an answer {problem}" for problem in problems if problem is not None), None)
