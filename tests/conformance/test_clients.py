"""Unchanged clients of OpenAI's API with their default parameters, from an environment of their own."""

import json

import pytest

from tests.serve.test_api import ARGUMENTS, FINAL, create_engine
from tests.support.corpus_tokenizer import corpus_tokenizer
from tests.support.environments import told_by
from tests.support.serving import MODEL, serving

pytestmark = [pytest.mark.conformance, pytest.mark.slow]  # in an environment of its own


def test_clients_are_answered_unchanged():
    tokenizer = corpus_tokenizer(600)
    engine = create_engine(tokenizer, max_length=700)
    script_of, arguments = engine.script, tokenizer.encode(f"{ARGUMENTS}<|call|>", add_special_tokens=False)
    opening = tokenizer.encode("functions.Sum <|constrain|>json<|message|>", add_special_tokens=False)

    def answered(request):  # a call that is demanded has begun already
        is_begun = request.prompt_ids[-len(opening) :] == tuple(opening)
        return arguments if is_begun else script_of(request)

    engine.script = answered
    with serving(engine, tokenizer) as address:
        found = told_by("clients", "openai_clients", url=address, model=MODEL)
    assert found.pop("langchain, completions") == "the text é goes on and on"
    assert found.pop("langchain, tools") == ["add"]
    assert found.pop("instructor") == json.loads(ARGUMENTS)
    assert set(found.values()) == {FINAL}
    assert len(found) == 8
