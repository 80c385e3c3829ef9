import pytest

from pipeline.serve.text_stream import Detokenizer, StopStrings

TEXTS = ["naïve café", "東京 is big", "👩‍👩‍👧 family 🎉", "a\n\n  b\t", "1 + 1 = 2"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_text_are_whole_characters_and_add_up(tokenizer, text):
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push([token_id]) for token_id in tokenizer.encode(text, add_special_tokens=False)]
    assert "".join(pieces) + detokenizer.flush() == text
    assert "\ufffd" not in "".join(pieces)


def test_text_is_returned_as_soon_as_it_is_certain(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    first, *rest = tokenizer.encode("é", add_special_tokens=False)
    assert detokenizer.push([*tokenizer.encode("ab", add_special_tokens=False), first]) == "ab"
    assert detokenizer.push(rest) == "é"


def test_bytes_that_are_no_character_are_shown_once_something_follows(tokenizer):
    broken = tokenizer.encode("é", add_special_tokens=False)[:1]
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push(broken * 5) == ""
    assert detokenizer.push(tokenizer.encode("a", add_special_tokens=False)) == "\ufffd" * 5 + "a"
    assert detokenizer.push(broken) == ""
    assert detokenizer.flush() == "\ufffd"


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "found"),
    [
        (["END"], ["ab", "EN", "D", "x"], ["ab", "", "", ""], True),
        (["END"], ["abE", "Nx"], ["ab", "ENx"], False),
        (["\n\n"], ["a\n", "b\n\nc"], ["a", "\nb"], True),
        (["aab"], ["aa", "ab"], ["", "a"], True),
        (["xyz", "b"], ["ab", "c"], ["a", ""], True),
        (["bc", "abcd"], ["abcd"], ["a"], True),
    ],
    ids=["over pieces", "false start", "line", "overlapping itself", "two", "complete first"],
)
def test_a_text_ends_before_its_first_stop_string(stops, pieces, shown, found):
    matcher = StopStrings(stops)
    assert [matcher.push(piece) for piece in pieces] == shown
    assert matcher.found is found


def test_what_only_began_like_a_stop_string_is_returned_at_the_end():
    matcher = StopStrings(["END"])
    assert matcher.push("the EN") + matcher.flush() == "the EN"
