"""The page at `/` in a real browser: keyboard alone, dark mode, a phone's width, with the target alone beside it."""

import pytest

from tests.serve.test_api import ANALYSIS, FINAL, create_engine
from tests.support.corpus_tokenizer import corpus_tokenizer
from tests.support.environments import told_by
from tests.support.serving import serving

pytestmark = [pytest.mark.conformance, pytest.mark.slow]  # in an environment of its own


def test_a_person_sees_what_was_drafted_and_accepted(tmp_path):
    tokenizer = corpus_tokenizer(600)
    engines = [create_engine(tokenizer, max_length=400, block_size=size) for size in (8, None)]
    for engine in engines:
        engine.step_seconds = 0.01
    with serving(engines[0], tokenizer, plain=engines[1]) as address:
        seen = told_by("browser", "page_in_chromium", url=f"{address}/", screenshot=tmp_path / "page.png")
    found = seen["visits"]
    for visit in found.values():
        assert visit["answers"] == [FINAL, FINAL]
        assert visit["analyses"] == [ANALYSIS, ANALYSIS]
        assert "the same text" in visit["status"]
        assert visit["accepted"][0] > visit["own"][0] > 0
        assert visit["accepted"][1] == 0 < visit["own"][1]
        drafted, alone = visit["shown"]
        assert float(drafted["accept length"]) == pytest.approx(3, abs=0.4)  # the scripted engine's rounds of three
        assert alone["rounds"] == "none"
        assert float(drafted["tokens/s"]) > 0 < float(alone["tokens/s"])
        assert visit["key_is_hidden"]
        assert not visit["overflows"]
        assert visit["noise"] == []
    assert [visit["is_beside"] for visit in found.values()] == [True, True, False]
    assert found["desk"]["ground"] == found["phone"]["ground"] != found["dark"]["ground"]
    assert any("completions" in route for route in seen["description"]["routes"])
    assert seen["description"]["noise"] == []
