"""What was written down is there again, whatever happened to the last line."""

from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.teacher_cache.reply_log import ReplyLog


def test_entries_are_found_again_and_the_later_of_two_counts(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "replies.jsonl"
    with ReplyLog(path) as log:
        log.append({"key": "a", "text": "é\u2028\n"})
        log.append({"key": "b", "failed": "no"})
    with ReplyLog(path) as log:
        log.append({"key": "b", "text": "yes"})
    with ReplyLog(path) as log:
        assert log.entries == {"a": {"key": "a", "text": "é\u2028\n"}, "b": {"key": "b", "text": "yes"}}
    assert len(path.read_bytes().splitlines()) == 3


def test_a_line_is_on_the_disk_when_it_is_appended(tmp_path: Path) -> None:
    with ReplyLog(tmp_path / "replies.jsonl") as log:
        log.append({"key": "a"})
        assert (tmp_path / "replies.jsonl").read_bytes() == b'{"key":"a"}\n'


@pytest.mark.parametrize(
    "torn", [b"{", b'{"key":"b"}', b'{"key":"\xc3'], ids=["brace", "no newline", "half a character"]
)
def test_a_torn_last_line_is_cut_off_and_its_place_written_again(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "replies.jsonl"
    path.write_bytes(b'{"key":"a"}\n' + torn)
    with ReplyLog(path) as log:
        assert list(log.entries) == ["a"]
        log.append({"key": "c"})
    assert path.read_bytes() == b'{"key":"a"}\n{"key":"c"}\n'


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"key":1}', b"\xff"])
def test_a_damaged_line_before_the_last_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "replies.jsonl"
    path.write_bytes(b'{"key":"a"}\n' + line + b'\n{"key":"b"}\n')
    with pytest.raises(PipelineError, match=r"replies\.jsonl, line 2 is damaged; delete that line"):
        ReplyLog(path)
