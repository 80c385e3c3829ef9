"""The base of request bodies: strict types, and one error that names a field, what was found and what is wanted."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from pipeline.serve.errors import ApiError

WANTED = {  # by pydantic's kind of error
    "bool_type": "true or false",
    "dict_type": "an object",
    "finite_number": "a number",
    "float_type": "a number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_type": "an object",
    "none_required": "null",
    "string_type": "a string",
}


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Says, in the annotation of a field, what a wrong value of it should have been."""

    text: str


class Body(BaseModel):
    """A JSON object whose fields are all known: what is not served is refused, never ignored."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


AnyBody = TypeVar("AnyBody", bound=Body)
Unserved = Mapping[str, tuple[tuple[Any, ...], str]]  # the values of a field that ask for nothing, and what to do


def parse(kind: type[AnyBody], body: Any, served: str, unserved: Unserved, *, required: Sequence[str] = ()) -> AnyBody:
    """Returns a body for the `served` model, null fields left out; raises ApiError that names the first wrong field.

    Fields of `unserved` are taken with a value that asks for nothing, and have no further meaning. The `required` ones
    count as null where they are left out.
    """
    if not isinstance(body, dict):
        raise ApiError(f"the body is {shown(body)}; wanted a JSON object")
    values = {key: value for key, value in body.items() if value is not None}
    _require_served(values.get("model"), served)
    for key in [key for key in values if key in unserved and key not in kind.model_fields]:
        neutral, advice = unserved[key]
        value = values.pop(key)
        if not any(_same(value, harmless) for harmless in neutral):
            raise ApiError(f"{key} is {shown(value)}; {advice}", param=key, code="unsupported_value")
    unknown = next((key for key in values if key not in kind.model_fields), None)
    if unknown is not None:
        raise ApiError(
            f"the parameter {shown(unknown)} is not known; supported: {', '.join(kind.model_fields)}",
            param=unknown.encode(errors="replace").decode(),  # half of a surrogate pair cannot be sent back
            code="unknown_parameter",
        )
    try:
        return kind.model_validate(dict.fromkeys(required) | values)
    except ValidationError as error:
        raise _refusal(kind, error.errors(include_url=False)[0]) from error


def _require_served(name: Any, served: str) -> None:
    if not isinstance(name, str):
        raise ApiError(f"model is {shown(name)}; wanted a name; {served!r} is served", param="model")
    if name != served:
        raise ApiError(
            f"the model {shown(name)} is not served here; served: {served!r}",
            param="model",
            code="model_not_found",
            status=404,
        )


def _refusal(kind: type[Body], error: ErrorDetails) -> ApiError:
    """Returns what is answered to a field that pydantic refuses; fields of a field are written with a dot."""
    first, *inner = error["loc"]
    name = str(first) + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in inner)
    reason = error["type"]
    if reason == "missing":
        return ApiError(f"{name} is missing", param=str(first))
    if reason == "extra_forbidden":
        return ApiError(f"{shown(name)} is not known; leave it out", param=str(first), code="unknown_parameter")
    if reason == "value_error":  # one of our own, which says it all
        return ApiError(f"{name} {error['ctx']['error']}", param=str(first))
    is_whole = not inner or (len(inner) == 1 and isinstance(inner[0], int) and reason == "model_type")
    wanted = _wanted_in(kind.model_fields[str(first)]) if is_whole else None
    if wanted is None and reason == "literal_error":
        wanted = f"one of {error['ctx']['expected'].replace(' or ', ', ')}"
    if wanted is None:
        wanted = WANTED.get(reason) or error["msg"].removeprefix("Input should be ")
    return ApiError(f"{name} is {shown(error['input'])}; wanted {wanted}", param=str(first))


def _wanted_in(field: FieldInfo) -> str | None:
    """Returns what the annotation of a field says that it wants, also inside of a union with null."""
    parts = [field.metadata, *(getattr(one, "__metadata__", ()) for one in typing.get_args(field.annotation))]
    return next((each.text for part in parts for each in part if isinstance(each, Wanted)), None)


def shown(value: Any) -> str:
    """Returns a value of a body as an error names it, in ASCII and cut where it is long."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def valid_text(value: Any, param: str) -> str:
    """Returns a text that tokenizers take; raises ApiError for another value, and for half of a surrogate pair."""
    if not isinstance(value, str):
        raise ApiError(f"{param} has {shown(value)} for a text; wanted a string", param=param)
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell it
        raise ApiError(f"{param} is not valid Unicode ({error}); correct the text", param=param) from error
    return value


def is_integer(value: Any) -> bool:
    """Returns whether a value is a whole number, which true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _same(value: Any, other: Any) -> bool:
    return isinstance(value, bool) == isinstance(other, bool) and value == other
