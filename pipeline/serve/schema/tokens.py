"""Bodies of /tokenize and /detokenize, which are vLLM's."""

from typing import Annotated, Any

from pydantic import Field

from pipeline.serve.errors import ApiError
from pipeline.serve.schema.chat import ChosenEffort, conversation_of
from pipeline.serve.schema.fields import Body, Wanted, parse, valid_text
from pipeline.serve.schema.messages import Message

_UNSERVED = {
    "add_generation_prompt": ((True,), "use true or leave it out"),
    "return_token_strs": ((False,), "leave it out"),
}


class TokenizeBody(Body):
    """Holds a body of /tokenize: a text, or messages."""

    model: str
    prompt: str | None = None
    add_special_tokens: bool = False
    messages: Annotated[list[Message] | None, Wanted("a list of role and content objects")] = None
    tools: Annotated[list[Any], Wanted("a list of functions")] = Field(default_factory=list)
    reasoning_effort: ChosenEffort | None = None

    @property
    def effort(self) -> str | None:
        """The reasoning effort, as in a chat."""
        return self.reasoning_effort

    @property
    def offered(self) -> list[Any]:
        """The tools that may be called, as in a chat."""
        return self.tools

    def conversation(self) -> list[dict[str, Any]]:
        """Returns the messages as a chat's are."""
        return conversation_of(self.messages or [])


class DetokenizeBody(Body):
    """Holds a body of /detokenize."""

    model: str
    tokens: Annotated[list[int], Wanted("a list of token ids")]


def read_tokenize(body: Any, model: str) -> TokenizeBody:
    """Returns the body of a request to /tokenize for the served `model`; raises ApiError."""
    found = parse(TokenizeBody, _with_model(body, model), model, _UNSERVED)
    if (found.prompt is None) == (found.messages is None):
        raise ApiError("wanted exactly one of prompt and messages", param="prompt")
    if found.prompt is not None:
        valid_text(found.prompt, "prompt")
    return found


def read_detokenize(body: Any, model: str) -> DetokenizeBody:
    """Returns the body of a request to /detokenize for the served `model`; raises ApiError."""
    return parse(DetokenizeBody, _with_model(body, model), model, {}, required=("tokens",))


def _with_model(body: Any, model: str) -> Any:
    """Returns a body that may leave the model out, as vLLM's may."""
    return {"model": model, **body} if isinstance(body, dict) else body
