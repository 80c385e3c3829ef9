"""Fields that say what form an answer must have: OpenAI's response_format, and vLLM's structured outputs."""

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema

from pipeline.serve import forms
from pipeline.serve.errors import ApiError
from pipeline.serve.schema.fields import shown, valid_text

HARMLESS = ("name", "description", "strict")  # of a JSON schema's format; it is followed exactly in any case


def response_form(value: Any, param: str = "response_format") -> str | None:
    """Returns the form that a response_format asks for, None for any text; raises ApiError."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text" and value.keys() == {"type"}:
        return None
    if kind == "json_object" and value.keys() == {"type"}:
        return forms.json_form({"type": "object"})
    if kind == "json_schema":
        inner = {key: value[key] for key in value if key not in ("type", "json_schema")}
        nested = value.get("json_schema")
        found = nested if isinstance(nested, dict) and not inner else inner if nested is None else {}
        if isinstance(found.get("schema"), dict) and not found.keys() - {"schema", *HARMLESS}:
            return forms.json_form(found["schema"])
    raise ApiError(
        f'{param} is {shown(value)}; supported: {{"type": "text"}}, {{"type": "json_object"}}, or the type json_schema '
        "with a name and a schema",
        param=param,
    )


def _schema(value: Any, param: str) -> str:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ApiError(f"{param} is {shown(value)}; wanted a JSON schema", param=param) from error
    if not isinstance(value, dict):
        raise ApiError(f"{param} is {shown(value)}; wanted a JSON schema", param=param)
    return forms.json_form(value)


def _regex(value: Any, param: str) -> str:
    return forms.regex_form(valid_text(value, param))


def _choice(value: Any, param: str) -> str:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
        raise ApiError(f"{param} is {shown(value)}; wanted a list of texts that are not empty", param=param)
    return forms.choice_form([valid_text(text, param) for text in value])


def _grammar(value: Any, param: str) -> str:
    return forms.grammar_form(valid_text(value, param))


def _any_object(value: Any, param: str) -> str | None:
    if not isinstance(value, bool):
        raise ApiError(f"{param} is {shown(value)}; wanted true or false", param=param)
    return forms.json_form({"type": "object"}) if value else None


KINDS: Mapping[str, Callable[[Any, str], str | None]] = {
    "json": _schema,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "json_object": _any_object,
}


def _structured(value: Any) -> str | None:
    """Returns the form that vLLM's structured_outputs asks for; raises ApiError."""
    asked = {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else {}
    if len(asked) != 1 or not asked.keys() <= KINDS.keys():
        raise ApiError(
            f"structured_outputs is {shown(value)}; wanted an object with one of {', '.join(KINDS)}",
            param="structured_outputs",
        )
    kind, item = next(iter(asked.items()))
    return KINDS[kind](item, "structured_outputs")


def _guided(kind: str) -> Any:
    def read(value: Any) -> str | None:
        return KINDS[kind](value, f"guided_{kind}")

    return read


_SCHEMA = {"type": "object"}
_FORMATS = {
    "anyOf": [
        {"type": "object", "properties": {"type": {"enum": ["text", "json_object"]}}, "required": ["type"]},
        {
            "type": "object",
            "properties": {
                "type": {"const": "json_schema"},
                "json_schema": {
                    "type": "object",
                    "properties": {"name": {"type": "string"}, "schema": _SCHEMA, "strict": {"type": "boolean"}},
                    "required": ["schema"],
                },
            },
            "required": ["type", "json_schema"],
        },
    ]
}
_CHOICES = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}
ResponseFormat = Annotated[str | None, PlainValidator(response_form), WithJsonSchema(_FORMATS)]
StructuredOutputs = Annotated[
    str | None,
    PlainValidator(_structured),
    WithJsonSchema(
        {
            "type": "object",
            "properties": {
                "json": {"anyOf": [_SCHEMA, {"type": "string"}]},
                "regex": {"type": "string"},
                "choice": _CHOICES,
                "grammar": {"type": "string"},
                "json_object": {"type": "boolean"},
            },
            "minProperties": 1,
            "maxProperties": 1,
        }
    ),
]
GuidedJson = Annotated[str | None, PlainValidator(_guided("json")), WithJsonSchema(_SCHEMA)]
GuidedRegex = Annotated[str | None, PlainValidator(_guided("regex")), WithJsonSchema({"type": "string"})]
GuidedChoice = Annotated[str | None, PlainValidator(_guided("choice")), WithJsonSchema(_CHOICES)]
GuidedGrammar = Annotated[str | None, PlainValidator(_guided("grammar")), WithJsonSchema({"type": "string"})]
