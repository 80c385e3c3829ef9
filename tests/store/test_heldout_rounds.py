"""Texts with the rounds over them, on disk and back."""

import pytest

from pipeline.artifacts import PipelineError
from pipeline.dflash import scored
from pipeline.dflash.acceptance import Acceptance
from pipeline.dflash.scored import ScoredText

TEXTS = [
    ScoredText(prompt_id="one", prompt_tokens=2, token_ids=(7, 8, 1, 2, 3, 4, 5, 6), kept=(2, 1)),
    ScoredText(prompt_id="two", prompt_tokens=1, token_ids=(9, 3, 5), kept=(0,)),
]


def test_they_are_read_back_as_they_were_written(tmp_path):
    (tmp_path / scored.FILE).write_bytes(scored.to_lines(TEXTS))
    assert scored.read(tmp_path / scored.FILE) == TEXTS


def test_a_text_is_a_prompt_and_its_answer():
    assert (TEXTS[0].prompt_ids, TEXTS[0].answer_ids) == ((7, 8), (1, 2, 3, 4, 5, 6))


def test_their_rounds_add_up():
    assert scored.acceptance_of(TEXTS, 4) == Acceptance((1, 1, 1, 0))


@pytest.mark.parametrize("text", [None, "{", '{"prompt_id": "one"}\n'], ids=["no file", "no JSON", "lacks keys"])
def test_what_is_not_such_a_file_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / scored.FILE).write_text(text)
    with pytest.raises(PipelineError, match=r"heldout.jsonl does not tell the rounds .*run stage=train again"):
        scored.read(tmp_path / scored.FILE)
