"""Files as people have them: by their literal bytes, alone, in directories, by patterns and from the standard input."""

import gzip
import io
import json
import os
import subprocess
import sys

import datasets
import pytest
import zstandard

from pipeline.config.choices import PromptSource
from pipeline.config.fields import TEACHER_CACHE
from pipeline.config.schema import PipelineConfig, PromptsConfig
from pipeline.errors import PipelineError
from pipeline.prompts import files
from pipeline.prompts.files import prompt_files
from pipeline.prompts.sources import Reading, from_dataset, from_files
from pipeline.workspace import settings, specs
from tests.support.paths import ROOT

LINES = b'{"prompt": "one"}\n{"prompt": "two"}\n'
ARRAY = b'[\n  {"prompt": "one"},\n  {"prompt": "two"}\n]\n'
ZSTD = zstandard.ZstdCompressor()


@pytest.fixture(autouse=True)
def fresh(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    files.standard_input.cache_clear()
    yield
    files.standard_input.cache_clear()


def texts(found):
    return [prompt.messages[-1].content for prompt in found.prompts]


READ = {
    "plain": LINES,
    "a byte order mark": b"\xef\xbb\xbf" + LINES,
    "Windows lines": LINES.replace(b"\n", b"\r\n"),
    "gzip": gzip.compress(LINES),
    "gzip with a byte order mark": gzip.compress(b"\xef\xbb\xbf" + LINES),
    "two gzip files joined": gzip.compress(LINES[:18]) + gzip.compress(LINES[18:]),
    "zstd": ZSTD.compress(LINES),
    "two zstd files joined": ZSTD.compress(LINES[:18]) + ZSTD.compress(LINES[18:]),
    "an array": ARRAY,
    "an array in one line": b'[{"prompt": "one"}, {"prompt": "two"}]',
    "a compressed array": gzip.compress(ARRAY),
}


@pytest.mark.parametrize("content", READ.values(), ids=READ.keys())
def test_a_file_is_read_by_what_it_holds_whatever_it_is_called(tmp_path, content):
    (tmp_path / "prompts").write_bytes(content)
    assert texts(from_files([tmp_path / "prompts"], "low")) == ["one", "two"]


@pytest.mark.parametrize("content", READ.values(), ids=READ.keys())
def test_the_standard_input_is_read_once_and_counts_by_its_bytes(tmp_path, monkeypatch, content):
    (tmp_path / "prompts").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    piped, named = (PromptsConfig(source=PromptSource.jsonl, path=path) for path in ("-", str(tmp_path / "prompts")))
    for _ in range(2):
        assert settings.prompt_content(piped, None) == settings.prompt_content(named, None)
        assert specs.prompt_set(piped, 0) == specs.prompt_set(named, 0)


REFUSED = {
    "latin-1": (b'{"prompt": "\xe9"}', r"can't decode byte 0xe9 .*; give a JSONL file in UTF-8"),
    "UTF-16": ('{"prompt": "one"}'.encode("utf-16"), "can't decode byte 0xff .*; give a JSONL file in UTF-8"),
    "half of a gzip file": (gzip.compress(LINES)[:-12], "ended before the end-of-stream marker"),
    "half of a zstd file": (ZSTD.compress(LINES)[:-4], "ends inside of a zstd frame"),
    "bytes after gzip's": (gzip.compress(LINES) + b"more", "Not a gzipped file"),
    "half of a parquet file": (b"PAR1 and no more", "cannot read prompts from .*arquet"),
    "half of an array": (ARRAY[:-3], "begins as a JSON array and is not JSON .* at line 3 column 20"),
    "a torn line": (LINES[:-4], "has 1 bad rows of 2; mend or delete them:\n  line 2: is not JSON"),
    "nothing": (b"", "holds no prompt"),
    "an empty array": (b"[]", "holds no prompt"),
    "nothing compressed": (gzip.compress(b""), "holds no prompt"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_damaged_file_is_refused_whatever_becomes_of_bad_rows(tmp_path, content, message):
    (tmp_path / "prompts.jsonl").write_bytes(content)
    for skips in (False, True):
        with pytest.raises(PipelineError, match=message):
            from_files([tmp_path / "prompts.jsonl"], "low", Reading(skips=skips))


def test_a_directory_and_a_pattern_are_their_files_in_order(tmp_path):
    datasets.Dataset.from_dict({"prompt": ["three"]}).to_parquet(tmp_path / "c.parquet")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "two"}'))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.json").write_bytes(b'[{"prompt": "one"}]')
    (tmp_path / "README.md").write_text("no prompts")
    wanted = [tmp_path / "a" / "z.json", tmp_path / "b.jsonl.gz", tmp_path / "c.parquet"]
    assert prompt_files(str(tmp_path)) == wanted
    assert texts(from_files(wanted, "low")) == ["one", "two", "three"]
    assert prompt_files(str(tmp_path / "*.[jp]*")) == wanted[1:]
    assert prompt_files(str(tmp_path / "**" / "*.json")) == wanted[:1]


def test_a_file_whose_name_is_a_pattern_is_that_file(tmp_path):
    (tmp_path / "a[1].jsonl").write_bytes(LINES)
    assert prompt_files(str(tmp_path / "a[1].jsonl")) == [tmp_path / "a[1].jsonl"]


def test_a_relative_pattern_is_looked_for_here(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    monkeypatch.chdir(tmp_path)
    assert [str(path) for path in prompt_files("*.jsonl")] == ["a.jsonl"]


def test_where_nothing_is_found_it_is_said(tmp_path):
    with pytest.raises(PipelineError, match=r"a directory without a file that ends in \.jsonl, "):
        prompt_files(str(tmp_path))
    for name in ("none.jsonl", "*.jsonl"):
        with pytest.raises(PipelineError, match=r"prompts.path is .*, which is no file; give a JSONL file of prompts"):
            prompt_files(str(tmp_path / name))


def test_several_files_count_by_their_bytes_and_order_and_one_as_it_always_did(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.jsonl").write_bytes(LINES)
    (tmp_path / "x" / "b.jsonl").write_bytes(b'{"prompt": "three"}')

    def content(path):
        return settings.prompt_content(PromptsConfig(source=PromptSource.jsonl, path=str(path)), None)["prompts.path"]

    single, several = content(tmp_path / "x" / "a.jsonl"), content(tmp_path / "x")
    assert single == "e7f2ddf56e846ab990166caecc4a21dc0daad62ac6873f8796abc370e9a50f94"
    (tmp_path / "x").rename(tmp_path / "y")
    assert several == content(tmp_path / "y") == content(tmp_path / "y" / "*")
    (tmp_path / "y" / "a.jsonl").rename(tmp_path / "y" / "c.jsonl")
    assert several != content(tmp_path / "y")


def test_new_settings_are_in_no_key_until_they_are_set():
    config = PipelineConfig()
    names = {"prompts.shape", "prompts.on_bad_row"}
    assert not names & settings.declared(config, TEACHER_CACHE).keys()


def test_a_compressed_file_is_a_dataset(tmp_path):
    for name, content in (("a.jsonl.gz", gzip.compress(LINES)), ("b.jsonl.zst", ZSTD.compress(LINES))):
        (tmp_path / name).write_bytes(content)
        assert texts(from_dataset(str(tmp_path / name), "train", "prompt", "low")) == ["one", "two"]


def test_what_is_piped_into_all_is_kept_for_its_stages(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(LINES)))
    program = "import json; from pipeline.prompts import files; print(json.dumps(files.standard_input().decode()))"
    with files.kept_standard_input():
        stage = subprocess.run(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, check=True
        )
        assert json.loads(stage.stdout) == LINES.decode()
    assert files.KEPT_INPUT not in os.environ


def test_a_terminal_is_no_prompt_file(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(PipelineError, match="prompts.path is -, and nothing is piped in"):
        files.standard_input()
