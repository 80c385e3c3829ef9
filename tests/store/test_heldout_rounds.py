"""Texts with the rounds over them, on disk and back."""

import pytest

from pipeline.dflash.acceptance import Acceptance
from pipeline.errors import PipelineError
from pipeline.store import heldout_rounds
from pipeline.store.heldout_rounds import HeldoutText

TEXTS = [
    HeldoutText(prompt_id="one", prompt_tokens=2, token_ids=(7, 8, 1, 2, 3, 4, 5, 6), accepted_per_round=(2, 1)),
    HeldoutText(prompt_id="two", prompt_tokens=1, token_ids=(9, 3, 5), accepted_per_round=(0,)),
]


def test_they_are_read_back_as_they_were_written(tmp_path):
    (tmp_path / heldout_rounds.FILE).write_bytes(heldout_rounds.to_lines(TEXTS))
    assert heldout_rounds.read_texts(tmp_path / heldout_rounds.FILE) == TEXTS


def test_a_text_is_a_prompt_and_its_answer():
    assert (TEXTS[0].prompt_ids, TEXTS[0].answer_ids) == ((7, 8), (1, 2, 3, 4, 5, 6))


def test_their_rounds_add_up():
    assert heldout_rounds.acceptance_of(TEXTS, 4) == Acceptance((1, 1, 1, 0))


@pytest.mark.parametrize("text", [None, "{", '{"prompt_id": "one"}\n'], ids=["no file", "no JSON", "lacks keys"])
def test_what_is_not_such_a_file_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / heldout_rounds.FILE).write_text(text)
    with pytest.raises(PipelineError, match=r"heldout.jsonl does not hold the rounds .*run stage=train again"):
        heldout_rounds.read_texts(tmp_path / heldout_rounds.FILE)
