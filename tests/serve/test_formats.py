"""Answers that must have a form: JSON by a schema, expressions, choices, the arguments of calls."""

import json

import jax
import numpy as np
import openai
import pytest
from pydantic import BaseModel

from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.gpt_oss.weights import random_weights
from pipeline.prompts.chat_format import stop_token_ids
from pipeline.serve.answer_grammar import call_grammar, harmony_grammar, plain_grammar
from pipeline.serve.forms import choice_form, grammar_form, json_form, regex_form
from pipeline.serve.grammars import MAX_GRAMMARS, Grammars
from tests.serve.test_api import FINAL, TOOL, USER, create_engine
from tests.serve.test_fields import seen_requests
from tests.support import models as tiny_models
from tests.support.fake_engine import VOCABULARY
from tests.support.random_draft import random_draft
from tests.support.serving import MODEL, client_of, serving

NUMBER = {
    "type": "object",
    "properties": {"x": {"type": "integer"}},
    "required": ["x"],
    "additionalProperties": False,
}
STRICT = {"type": "function", "function": {"name": "a.b-c_d", "strict": True, "parameters": NUMBER}}
FREE = {"type": "function", "function": {"name": "free"}}
AFTER_ANALYSIS = "<|channel|>analysis<|message|>Let me {think}.<|end|><|start|>assistant"


@pytest.fixture
def grammars(tokenizer):
    return Grammars(tokenizer, VOCABULARY)


def read(grammars, tokenizer, grammar, text):
    """How much of a text the grammar's masks allow, token by token."""
    constraint, found = grammars.compiled(grammar).start(), []
    for token in tokenizer.encode(text, add_special_tokens=False):
        masks = np.zeros((1, VOCABULARY // 32), np.uint32)
        constraint.fill([], masks)
        if not np.unpackbits(masks.view(np.uint8), bitorder="little")[token]:
            break
        constraint.advance([token])
        found.append(token)
    return tokenizer.decode(found)


@pytest.mark.parametrize(
    ("form", "tools", "text", "allowed"),
    [
        (json_form(NUMBER), [], '<|channel|>final<|message|>{"x": 31}<|return|>', None),
        (json_form(NUMBER), [], AFTER_ANALYSIS + '<|channel|>final<|message|>{"x": 31}<|return|>', None),
        (json_form(NUMBER), [], '<|channel|>final <|constrain|>json<|message|>{ "x":\n3 }<|return|>', None),
        (json_form(NUMBER), [], '<|channel|>final<|message|>{"x": "a"}<|return|>', '<|channel|>final<|message|>{"x":'),
        (json_form(NUMBER), [], '<|channel|>final<|message|>{"x": 3}<|call|>', '<|channel|>final<|message|>{"x": 3}'),
        (json_form(NUMBER), [], "<|channel|>analysis<|message|>No<|return|>", "<|channel|>analysis<|message|>No"),
        (json_form(NUMBER), [], "<|channel|>commentary to=functions.a", "<|channel|>commentary"),
        (None, [STRICT], "<|channel|>final<|message|>Any text, {really}.<|return|>", None),
        (
            None,
            [STRICT],
            '<|channel|>commentary to=functions.a.b-c_d <|constrain|>json<|message|>{"x": 3}<|call|>',
            None,
        ),
        (
            None,
            [STRICT, FREE],
            '<|channel|>commentary to=functions.a.b-c_d <|constrain|>json<|message|>{"y": 3}<|call|>',
            '<|channel|>commentary to=functions.a.b-c_d <|constrain|>json<|message|>{"',
        ),
        (None, [STRICT, FREE], "<|channel|>commentary to=functions.free <|constrain|>json<|message|>Oh<|call|>", None),
        (
            json_form(NUMBER),
            [STRICT],
            '<|channel|>commentary to=functions.a.b-c_d <|constrain|>json<|message|>{"x": 3}<|call|>',
            None,
        ),
    ],
)
def test_an_answer_in_harmony_is_free_where_no_form_is_asked_for(grammars, tokenizer, form, tools, text, allowed):
    found = read(grammars, tokenizer, harmony_grammar(form, tools), text)
    assert found.rstrip(' "') == (text if allowed is None else allowed).rstrip(' "')


@pytest.mark.parametrize(
    ("tools", "with_schemas", "text", "is_allowed"),
    [
        ([STRICT, FREE], True, '.a.b-c_d <|constrain|>json<|message|>{"x": 3}<|call|>', True),
        ([STRICT, FREE], False, '.a.b-c_d <|constrain|>json<|message|>{"y": 3}<|call|>', False),
        ([STRICT, FREE], False, '.free <|constrain|>json<|message|>{"y": [3]}<|call|>', True),
        ([STRICT, FREE], True, ".other <|constrain|>json<|message|>{}<|call|>", False),
        ([STRICT], True, '{"x": 3}<|call|>', True),
        ([FREE], False, '{"y": 3}<|call|>', True),
        ([FREE], False, "[3]<|call|>", False),
    ],
)
def test_a_demanded_call_has_a_known_name_and_its_arguments(grammars, tokenizer, tools, with_schemas, text, is_allowed):
    grammar = call_grammar(tools, is_named=text[0] != ".", with_schemas=with_schemas)
    assert (read(grammars, tokenizer, grammar, text) == text) == is_allowed


@pytest.mark.parametrize(
    ("form", "text", "is_allowed"),
    [
        (regex_form("a/b\\/[/]\n"), "a/b//\n<|return|>", True),
        (regex_form("[0-9]{2,3}"), "1<|return|>", False),
        (choice_form(["yes", 'né"o\n']), 'né"o\n<|return|>', True),
        (choice_form(["yes", "no"]), "nope<|return|>", False),
        (grammar_form('start: "a" b\nb: "b"+'), "abb<|return|>", True),
        (grammar_form('start: "a" b\nb: "b"+'), "a<|return|>", False),
        (json_form({"type": "object"}), '{"a": [1, null, "<|end|>"]}<|return|>', False),  # a control token is no text
        (json_form({"type": "object"}), '{"a": [1, null, "é"]}<|call|>', True),
        (json_form(NUMBER), '{"x":' + 40 * " " + "3}<|return|>", False),  # spaces for ever
    ],
)
def test_a_text_has_its_form_and_a_stop_token(grammars, tokenizer, form, text, is_allowed):
    grammar = plain_grammar(form, stop_token_ids(tokenizer))
    assert (read(grammars, tokenizer, grammar, text) == text) == is_allowed


def test_masks_of_drafted_tokens_are_those_behind_them_and_the_answer_has_not_moved(grammars, tokenizer):
    grammar = plain_grammar(json_form(NUMBER), stop_token_ids(tokenizer))
    constraint = grammars.compiled(grammar).start()
    drafted = tokenizer.encode('{"x": 5}', add_special_tokens=False)
    masks = np.zeros((len(drafted) + 1, VOCABULARY // 32), np.uint32)
    for _ in range(2):
        assert constraint.fill(drafted, masks) == drafted
    single = np.zeros((1, VOCABULARY // 32), np.uint32)
    for index, token in enumerate(drafted):
        constraint.fill([], single)
        assert (single[0] == masks[index]).all()
        constraint.advance([token])
    constraint.fill([], single)
    assert (single[0] == masks[-1]).all()


def test_what_is_certain_stands_for_what_was_drafted(grammars, tokenizer):
    form = choice_form(["a certain text"])
    constraint = grammars.compiled(plain_grammar(form, stop_token_ids(tokenizer))).start()
    masks = np.zeros((8, VOCABULARY // 32), np.uint32)
    assert "a certain text".startswith(tokenizer.decode(constraint.fill([7] * 7, masks)))


def test_a_drafted_token_that_may_not_stand_there_ends_what_is_known(grammars, tokenizer):
    constraint = grammars.compiled(plain_grammar(regex_form("[ab][cd]"), stop_token_ids(tokenizer))).start()
    a, c, x = (tokenizer.encode(text, add_special_tokens=False)[0] for text in "acx")
    masks = np.zeros((4, VOCABULARY // 32), np.uint32)
    assert constraint.fill([a, x, c], masks) == [a, x, c]
    assert masks[:2].any(axis=1).all()
    assert constraint.fill([a, c, c], masks)[:2] == [a, c]  # it goes on as before


def test_grammars_are_compiled_once_and_not_remembered_for_ever(grammars, tokenizer):
    texts = [plain_grammar(choice_form([str(index)]), [3]) for index in range(MAX_GRAMMARS + 1)]
    first = grammars.compiled(texts[0])
    assert grammars.compiled(texts[0]) is first
    for text in texts[1:]:
        grammars.compiled(text)
    assert grammars.compiled(texts[0]) is not first


@pytest.fixture
def engine(tokenizer):
    return create_engine(tokenizer, max_length=400)


@pytest.fixture
def client(engine, tokenizer):
    with serving(engine, tokenizer) as address, client_of(address) as client:
        yield client


FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": NUMBER, "strict": True}}


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": FORMAT},
        {"response_format": {"type": "json_object"}},
        {"guided_json": NUMBER},
        {"guided_json": json.dumps(NUMBER)},
        {"guided_regex": "[0-9]+"},
        {"guided_choice": ["a", "b"]},
        {"guided_grammar": 'start: "a"'},
        {"structured_outputs": {"json": NUMBER}},
        {"structured_outputs": {"regex": "a", "choice": None}},
        {"structured_outputs": {"choice": ["a"]}},
        {"structured_outputs": {"grammar": 'start: "a"'}},
        {"structured_outputs": {"json_object": True}},
    ],
)
def test_a_form_reaches_the_engine_from_both_endpoints(client, engine, body):
    seen = seen_requests(engine)
    client.chat.completions.create(model=MODEL, messages=[USER], n=2, extra_body=body)
    client.completions.create(model=MODEL, prompt="Go", extra_body=body)
    assert all(request.grammar is not None for request in seen)
    assert seen[0].grammar is seen[1].grammar is not seen[2].grammar


def test_what_asks_for_no_form_has_no_grammar(client, engine):
    seen = seen_requests(engine)
    client.chat.completions.create(model=MODEL, messages=[USER], response_format={"type": "text"}, tools=[TOOL])
    client.completions.create(model=MODEL, prompt="Go", extra_body={"structured_outputs": {"json_object": False}})
    assert [request.grammar for request in seen] == [None, None]


@pytest.mark.parametrize("strict", [True, False])
def test_strict_functions_have_a_grammar_and_others_none_unless_a_call_is_demanded(client, engine, strict):
    tool = {"type": "function", "function": TOOL["function"] | {"strict": strict}}
    seen = seen_requests(engine)
    for choice in ("auto", "none", "required", {"type": "function", "function": {"name": "add"}}):
        client.chat.completions.create(model=MODEL, messages=[USER], tools=[tool], tool_choice=choice)
    assert [request.grammar is not None for request in seen] == [strict, False, True, True]


def test_a_demanded_call_of_a_function_that_is_not_strict_may_have_any_schema(client, engine):
    parameters = {"type": "object", "not": {"type": "null"}}
    tool = {"type": "function", "function": {"name": "add", "parameters": parameters}}
    seen = seen_requests(engine)
    client.chat.completions.create(model=MODEL, messages=[USER], tools=[tool], tool_choice="required")
    assert seen[0].grammar is not None
    tool["function"]["strict"] = True
    with pytest.raises(openai.BadRequestError, match='tools cannot be followed: .*"not"'):
        client.chat.completions.create(model=MODEL, messages=[USER], tools=[tool], tool_choice="required")


def test_responses_have_forms(client, engine):
    seen = seen_requests(engine)
    reply = client.responses.create(
        model=MODEL, input="Go", text={"format": {"type": "json_schema", "name": "n", "schema": NUMBER, "strict": True}}
    )
    client.responses.create(model=MODEL, input="Go", text={"format": {"type": "text"}})
    assert [request.grammar is not None for request in seen] == [True, False]
    assert reply.output_text == FINAL  # of a scripted engine


class Sum(BaseModel):
    """What OpenAI's client makes a schema of."""

    x: int
    y: list[str]


def test_openais_client_makes_its_schema_of_a_class(client, engine):
    seen = seen_requests(engine)
    with pytest.raises(ValueError, match="Sum"):  # the scripted answer is no JSON
        client.chat.completions.parse(model=MODEL, messages=[USER], response_format=Sum)
    assert seen[0].grammar is not None


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"response_format": {"type": "xml"}}, "response_format", "supported"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "a schema"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format", "supported"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "response_format",
            "not",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}},
            "response_format",
            "type must be",
        ),
        ({"guided_regex": "("}, "guided_regex", "cannot be followed"),
        ({"guided_grammar": "start: x"}, "guided_grammar", "cannot be followed"),
        ({"guided_choice": []}, "guided_choice", "wanted a list"),
        ({"guided_json": "{"}, "guided_json", "wanted a JSON schema"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "one of"),
        ({"structured_outputs": {"x": 1}}, "structured_outputs", "one of"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex", "give one of them"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos", "leave either out"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://a.test/b"}}}},
            "response_format",
            "http://a.test/b",
        ),
    ],
)
def test_a_form_that_cannot_be_followed_is_refused_by_name(client, body, param, message):
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        client.completions.create(model=MODEL, prompt="Go", extra_body=body)
    assert refused.value.param == param


POINT = {
    "type": "object",
    "properties": {"kind": {"enum": ["near", "far"]}, "is_new": {"type": "boolean"}, "none": {"type": "null"}},
    "required": ["kind", "is_new", "none"],
    "additionalProperties": False,
}


def random_pair():
    """A target that was never trained, with a draft that was not either."""
    config = GptOssConfig.from_hf(
        tiny_models.LEGACY_TARGET | {"vocab_size": VOCABULARY, "max_position_embeddings": 512}
    )
    target = TargetModel(config, jax.jit(lambda key: random_weights(config, key))(jax.random.key(0)))
    return target, random_draft(config)


@pytest.mark.usefixtures("compiled_quickly")
@pytest.mark.parametrize("with_draft", [False, True], ids=["plain", "DFLASH"])
def test_a_model_that_never_saw_json_writes_it(tokenizer, with_draft):
    """Random weights, at several temperatures and streamed: every answer is JSON of the schema."""
    target, draft = random_pair()
    config = EngineConfig(
        num_slots=3,
        max_length=512,
        prefill_chunk=64,
        page_size=16,
        stop_token_ids=tuple(stop_token_ids(tokenizer)),
        samples=True,
    )
    engine = Engine(target, draft if with_draft else None, config)
    tool = {"type": "function", "function": {"name": "place", "parameters": POINT}}
    schema = {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT}}
    with serving(engine, tokenizer) as address, client_of(address, timeout=300) as client:
        reply = client.completions.create(
            model=MODEL, prompt="Go", n=4, temperature=1.5, max_tokens=200, extra_body={"response_format": schema}
        )
        texts = [choice.text for choice in reply.choices]
        assert [choice.finish_reason for choice in reply.choices] == ["stop"] * 4
        called = client.chat.completions.create(
            model=MODEL, messages=[USER], tools=[tool], tool_choice={"type": "function", "function": {"name": "place"}}
        )
        (call,) = called.choices[0].message.tool_calls
        stream = client.completions.create(
            model=MODEL, prompt="Go", max_tokens=200, stream=True, temperature=1, extra_body={"guided_json": POINT}
        )
        texts += [call.function.arguments, "".join(chunk.choices[0].text for chunk in stream if chunk.choices)]
        free = client.completions.create(model=MODEL, prompt="Go", max_tokens=20, temperature=0)
    for text in texts:
        point = json.loads(text)
        assert list(point) == ["kind", "is_new", "none"]
        assert point["kind"] in ("near", "far")
        assert isinstance(point["is_new"], bool)
        assert point["none"] is None
    assert call.function.name == "place"
    with pytest.raises(json.JSONDecodeError):
        json.loads(free.choices[0].text)
