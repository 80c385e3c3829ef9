"""Bodies of /v1/chat/completions: messages in the target's chat format, tools, and what of the answer is wanted."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema

from pipeline.engine.sampling_params import SamplingParams
from pipeline.errors import PipelineError
from pipeline.model.layers.token_rules import MAX_LOGPROBS
from pipeline.prompts.messages import EFFORTS, THINKING
from pipeline.prompts.turns import join_instructions, separate_calls
from pipeline.serve.errors import ApiError
from pipeline.serve.schema.fields import Body, Wanted, parse, shown
from pipeline.serve.schema.messages import Message
from pipeline.serve.schema.options import UNSERVED, Count, Options, require_consistent, sampling_of

LEAST_EFFORT = "minimal"  # OpenAI's word for less than low, which Harmony does not have
_TEXT_ALONE = "only text answers are supported: leave it out"
_UNSERVED = {
    **UNSERVED,
    "functions": (([],), "this older form is not supported: use tools"),
    "function_call": (("none", "auto"), "this older form is not supported: use tool_choice"),
    "modalities": ((["text"],), _TEXT_ALONE),
    "audio": ((), _TEXT_ALONE),
    "prediction": ((), "predicted outputs come from the draft alone: leave it out"),
    "web_search_options": ((), "web search is not supported: leave it out"),
    "verbosity": (("medium",), "the model knows no verbosity: use medium or leave it out"),
    "echo": ((False,), "the prompt is not echoed in a chat: use false or leave it out"),
    "add_generation_prompt": ((True,), "the model always answers: use true or leave it out"),
    "continue_final_message": ((False,), "an answer is not continued: use false or leave it out"),
    "add_special_tokens": ((False,), "the chat format writes them itself: use false or leave it out"),
    "documents": (([],), "documents are not supported: write them into a message"),
    "chat_template": ((), "the target's own template is used: leave it out"),
}


def _effort(value: Any) -> str:
    found = "low" if value == LEAST_EFFORT else value
    if found not in EFFORTS:
        raise ApiError(f"reasoning_effort is {shown(value)}; supported: {', '.join(EFFORTS)}", param="reasoning_effort")
    return str(found)


def _choice(value: Any) -> str:
    """Returns none, auto or required, or behind a colon the name of the function that must be called."""
    if isinstance(value, str) and value in ("none", "auto", "required"):
        return value
    if isinstance(value, dict) and value.get("type") == "function":
        function = value.get("function", value)
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str):
            return f":{name}"
    raise ApiError(
        f"tool_choice is {shown(value)}; supported: none, auto, required, "
        'or {"type": "function", "function": {"name": ...}}',
        param="tool_choice",
        code="unsupported_value",
    )


ChosenEffort = Annotated[str, PlainValidator(_effort), WithJsonSchema({"enum": [LEAST_EFFORT, *EFFORTS]})]
ToolChoice = Annotated[
    str,
    PlainValidator(_choice),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["none", "auto", "required"]},
                {
                    "type": "object",
                    "properties": {
                        "type": {"const": "function"},
                        "function": {
                            "type": "object",
                            "properties": {"name": {"type": "string"}},
                            "required": ["name"],
                        },
                    },
                    "required": ["type", "function"],
                },
            ]
        }
    ),
]
NumTop = Annotated[int, Field(ge=0, le=MAX_LOGPROBS), Wanted(f"a whole number from 0 to {MAX_LOGPROBS}")]


class TemplateOptions(Body):
    """What a client hands to the chat template."""

    reasoning_effort: ChosenEffort | None = None
    reasoning_strength: ChosenEffort | None = None
    enable_thinking: Annotated[Literal[True] | None, Wanted("true: this model always thinks")] = None


class ChatBody(Options):
    """Holds a body of /v1/chat/completions."""

    messages: Annotated[list[Message], Wanted("a list of role and content objects")]
    max_completion_tokens: Count | None = None
    reasoning_effort: ChosenEffort | None = None
    chat_template_kwargs: TemplateOptions | None = None
    include_reasoning: bool = True
    return_rounds: Annotated[bool, Field(description="Whether chunks of a stream show each round's tokens.")] = False
    return_meta_info: Annotated[bool, Field(description="Whether the reply has SGLang's numbers of rounds.")] = False
    logprobs: bool = False
    top_logprobs: NumTop | None = None
    tools: Annotated[list[Any], Wanted("a list of functions")] = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @property
    def limit(self) -> int | None:
        """The most tokens that the answer may have; None where nothing was said."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def effort(self) -> str | None:
        """The reasoning effort, by either name; None where nothing was said."""
        if self.reasoning_effort is not None or self.chat_template_kwargs is None:
            return self.reasoning_effort
        return self.chat_template_kwargs.reasoning_effort or self.chat_template_kwargs.reasoning_strength

    @property
    def offered(self) -> list[Any]:
        """The tools that may be called."""
        return [] if self.tool_choice == "none" else self.tools

    @property
    def must_call(self) -> str | None:
        """The function that must be called, "" for any of them, None where none must be."""
        if self.tool_choice == "required":
            return ""
        return self.tool_choice[1:] if self.tool_choice and self.tool_choice.startswith(":") else None

    def conversation(self) -> list[dict[str, Any]]:
        """Returns the messages as `conversation_of` does."""
        return conversation_of(self.messages)

    def sampling(self, stops: tuple[int, ...], default_temperature: float) -> SamplingParams:
        """Returns how tokens are chosen, without a key; raises ApiError."""
        return sampling_of(self, stops, default_temperature, (self.top_logprobs or 0) if self.logprobs else None)


def conversation_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Returns messages as `prompts.messages` takes them; raises ApiError where their order has no meaning.

    Instructions at the beginning are joined, parallel calls follow each other, and a text beside a call belongs to
    the analysis, as the chat format has it.
    """
    try:
        turns = separate_calls(join_instructions([message.as_dict() for message in messages]))
    except PipelineError as error:
        raise ApiError(f"messages {error}", param="messages") from error
    return [_joined(turn) for turn in turns]


def _joined(turn: dict[str, Any]) -> dict[str, Any]:
    thinking = next((turn[name] for name in THINKING if turn.get(name)), None)
    if not (turn.get("tool_calls") and turn["content"] and thinking):
        return turn
    return {"role": turn["role"], "tool_calls": turn["tool_calls"], "thinking": f"{thinking}\n{turn['content']}"}


def read_chat(body: Any, model: str) -> ChatBody:
    """Returns the body of a request to /v1/chat/completions for the served `model`; raises ApiError."""
    found = parse(ChatBody, body, model, _UNSERVED, required=("messages",))
    require_consistent(found, 1)
    if None not in (found.max_tokens, found.max_completion_tokens) and found.max_tokens != found.max_completion_tokens:
        raise ApiError(
            f"max_tokens is {found.max_tokens} and max_completion_tokens is {found.max_completion_tokens}; give one of "
            "them, or the same value",
            param="max_completion_tokens",
        )
    if found.return_token_ids and found.stream:
        raise ApiError("return_token_ids is served without stream alone: leave either out", param="return_token_ids")
    if found.return_meta_info and found.stream:
        raise ApiError("return_meta_info is served without stream alone: leave either out", param="return_meta_info")
    if found.return_rounds and not found.stream:
        raise ApiError("return_rounds is served with stream alone: set stream to true", param="return_rounds")
    if not found.skip_special_tokens:
        raise ApiError(
            "skip_special_tokens is False; a chat's control tokens are not part of its texts: use true, or "
            "return_token_ids",
            param="skip_special_tokens",
            code="unsupported_value",
        )
    if found.top_logprobs is not None and not found.logprobs:
        raise ApiError("top_logprobs is given without logprobs; set logprobs to true", param="top_logprobs")
    require_choosable(found)
    return found


def require_choosable(body: ChatBody) -> None:
    """Raises ApiError when a call is demanded of a function that is not offered."""
    name = body.must_call
    if name is None:
        return
    if not body.tools:
        raise ApiError("tool_choice demands a call and there are no tools; offer some", param="tool_choice")
    functions = [tool.get("function") if isinstance(tool, dict) else None for tool in body.tools]
    names = [function.get("name") for function in functions if isinstance(function, dict)]
    if name and name not in names:
        raise ApiError(
            f"tool_choice names the function {shown(name)}; offered: {', '.join(map(str, names))}", param="tool_choice"
        )
