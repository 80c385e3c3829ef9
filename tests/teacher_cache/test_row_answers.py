"""Answers at the end of the prompts' own rows: the engine's cache where the target wrote them, and none otherwise."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.artifacts import artifact
from pipeline.artifacts.artifact import Artifact
from pipeline.config.choices import Generator, PromptSource
from pipeline.config.fields import TEACHER_CACHE
from pipeline.config.schema import PipelineConfig
from pipeline.errors import PipelineError
from pipeline.prompts import corpus
from pipeline.prompts.tokenizer import train_tokenizer
from pipeline.store.layout import HEADER, SPLITS
from pipeline.store.reader import open_split
from pipeline.teacher_cache import stage
from pipeline.workspace.workspace import Workspace
from tests.support import speaking
from tests.support.cached import configuration
from tests.support.chatml import chatml_tokenizer
from tests.support.compiled import quickly
from tests.support.recorder import Recorder

NUM_ROWS, MAX_NEW_TOKENS = 24, 40
Spoken = tuple[Path, list[dict[str, Any]]]  # a target, and conversations whose last turn it wrote


@dataclasses.dataclass(frozen=True)
class Kind:
    """A target's chat format, how an answer in it becomes a message, and how many prompts give enough of them."""

    tokenizer: Callable[[], Any]
    options: dict[str, Any]
    message: Callable[[str], dict[str, str] | None]
    mask_token: str
    num_prompts: int


def harmony_tokenizer() -> Any:
    texts = [corpus.conversation(0, index, "low").prompt for index in range(200)]
    return train_tokenizer(texts, speaking.VOCAB_SIZE)


def chatml_message(text: str) -> dict[str, str] | None:
    content = text.removesuffix("<|im_end|>")
    return {"role": "assistant", "content": content} if content else None


KINDS = {
    "Harmony": Kind(
        harmony_tokenizer,
        {"ends": speaking.HARMONY_ENDS, "follow": speaking.HARMONY},
        speaking.harmony_message,
        "<|reserved_200000|>",
        90,
    ),
    "ChatML": Kind(chatml_tokenizer, {"ends": speaking.CHATML_ENDS}, chatml_message, "<gh_stars>", 36),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def spoken(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Spoken:
    directory = tmp_path_factory.mktemp("speaking")
    tokenizer = KINDS[kind].tokenizer()
    speaking.save_speaking_target(directory, tokenizer, **KINDS[kind].options)
    config = settings(kind, directory, directory / "outputs")
    config.prompts.source, config.prompts.count = PromptSource.generated, KINDS[kind].num_prompts
    with quickly():
        stage.run(config, Recorder())
    found = made_by(config)
    asked = {line["prompt_id"]: line["messages"] for line in lines_of(found)}
    conversations = []
    for name, row in rows_of(found):
        message = KINDS[kind].message(tokenizer.decode(row.token_ids[row.prompt_tokens :]))
        if message is not None:
            conversations.append({"messages": [*asked[name], message]})
    assert len(conversations) >= NUM_ROWS
    np.random.default_rng(0).shuffle(conversations)  # of both splits
    # those with an analysis, which are few, come first
    conversations.sort(key=lambda row: -len(row["messages"][-1]))
    return directory, conversations[:NUM_ROWS]


def settings(kind: str, target: Path, outputs: Path) -> PipelineConfig:
    config = configuration(target, outputs)
    config.draft.mask_token = KINDS[kind].mask_token
    config.prompts.source, config.prompts.count = PromptSource.jsonl, None
    config.teacher_cache = dataclasses.replace(
        config.teacher_cache, max_prompt_tokens=200, max_new_tokens=MAX_NEW_TOKENS
    )
    return config


@pytest.fixture
def reading(kind: str, spoken: Spoken, tmp_path: Path) -> Callable[..., PipelineConfig]:
    """A configuration that takes the answers of these rows."""

    def configured(rows: list[Any], generator: Generator = Generator.given, name: str = "chats") -> PipelineConfig:
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = settings(kind, spoken[0], tmp_path / "outputs")
        config.prompts.path, config.teacher_cache.generator = str(file), generator
        return config

    return configured


def made_by(config: PipelineConfig) -> Artifact:
    path = Workspace(config).address(TEACHER_CACHE)
    return artifact.read(path, TEACHER_CACHE, make_with="the test", verify=True)


def lines_of(cache: Artifact) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (cache.path / stage.PROMPTS).read_text().splitlines()]


def rows_of(cache: Artifact) -> Iterator[tuple[str, Any]]:
    for split in SPLITS:
        reader = open_split(cache.path, split)
        yield from zip(reader.prompt_ids, reader.read(range(reader.num_sequences)), strict=True)


def contents(cache: Artifact) -> dict[str, bytes]:
    """The bytes of everything that training reads: tokens, channels, features, and which rows they are."""
    files = [file for file in cache.path.glob("*/*/**/*") if file.is_file() and file.name != "shard.json"]
    return {str(file.relative_to(cache.path)): file.read_bytes() for file in files}


def sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    others = [{key: turn[key] for key in turn.keys() - {"role", "content"}} for turn in row["messages"]]
    turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in row["messages"]]
    return {"conversations": [turn | other for turn, other in zip(turns, others, strict=True)]}


def test_answers_that_the_target_wrote_give_the_engines_cache(
    kind: str, spoken: Spoken, reading: Callable[..., PipelineConfig], caplog: pytest.LogCaptureFixture
) -> None:
    rows = spoken[1]
    engine = reading(rows, Generator.engine)
    stage.run(engine, Recorder())
    wanted = contents(made_by(engine))
    assert any("/features/" in name for name in wanted)
    ends = [open_split(made_by(engine).path, split).finish_reasons for split in SPLITS]
    assert {"stop", "length"} == {reason for reasons in ends for reason in reasons}
    assert kind != "Harmony" or any("reasoning_content" in row["messages"][-1] for row in rows)
    for name, shaped in (("chats", rows), ("shared", [sharegpt(row) for row in rows])):
        tracker, config = Recorder(), reading(shaped, name=name)
        config.teacher_cache.verify = 1.0
        with caplog.at_level(logging.INFO, "pipeline"):
            stage.run(config, tracker)
        found = made_by(config)
        assert contents(found) == wanted
        assert f"the answer at the end of {NUM_ROWS} taken" in caplog.text
        assert found.settings["teacher_cache.generator"] == "given"
        assert tracker.metrics["teacher_cache/gold_accept_length"] == config.draft.block_size
        assert tracker.metrics["teacher_cache/verified_sequences"] == len(open_split(found.path, "train").prompt_ids)
        assert [tracker.documents[stage.SUMMARY]["splits"][split]["divergence"] for split in SPLITS] == [0, 0]
    stage.run(config, tracker)  # complete: verified again


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(
    spoken: Spoken, reading: Callable[..., PipelineConfig]
) -> None:
    config = reading(spoken[1])
    stage.run(config, Recorder())
    whole = made_by(config)
    scratch = artifact.scratch_of(whole.path)
    shutil.move(whole.path, scratch)
    for file in (stage.SUMMARY, stage.PROMPTS, HEADER, artifact.CONTRACT, artifact.MANIFEST):
        (scratch / file).unlink()
    shutil.rmtree(scratch / "train" / "00001")
    (scratch / "heldout" / "00000" / "rows.json").unlink()
    stage.run(config, Recorder())
    assert made_by(config).fingerprint == whole.fingerprint


def test_answers_to_other_prompts_are_refused_with_the_name_of_their_file(
    spoken: Spoken, reading: Callable[..., PipelineConfig]
) -> None:
    rows = spoken[1]
    moved = [
        {"messages": [*row["messages"][:-1], other["messages"][-1]]}
        for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)
    ]
    config = reading(moved)
    for _ in range(2):
        with pytest.raises(PipelineError) as raised:
            stage.run(config, Recorder())
        assert str(raised.value).startswith(f"the answers in {config.prompts.path} are not the target's: ")
        assert "generated tokens are not the target's choice, 5% may be" in str(raised.value)
        assert str(raised.value).endswith("or let the target answer: teacher_cache.generator=engine")
    assert not artifact.exists(Workspace(config).address(TEACHER_CACHE))


@pytest.mark.parametrize("kind", ["ChatML"], indirect=True, scope="module")
def test_answers_that_were_sampled_are_taken_as_such(kind: str, reading: Callable[..., PipelineConfig]) -> None:
    """They are far from greedy ones, and surprise the target no more than its own samples do."""
    engine = reading([], Generator.engine)
    engine.prompts.source, engine.prompts.count = PromptSource.generated, KINDS[kind].num_prompts
    engine.teacher_cache.temperature = 0.7
    stage.run(engine, Recorder())
    drawn = made_by(engine)
    asked = {line["prompt_id"]: line["messages"] for line in lines_of(drawn)}
    tokenizer = Workspace(engine).tokenizer
    rows = []
    for name, row in rows_of(drawn):
        message = KINDS[kind].message(tokenizer.decode(row.token_ids[row.prompt_tokens :]))
        rows += [] if message is None else [{"messages": [*asked[name], message]}]
    config = reading(rows)
    with pytest.raises(PipelineError, match=r"are not the target's choice.*teacher_cache\.temperature"):
        stage.run(config, Recorder())
    config.teacher_cache.temperature = 0.7
    stage.run(config, Recorder())
    wanted = {name: row.token_ids for name, row in rows_of(drawn)}
    found = dict(rows_of(made_by(config)))
    assert len(found) == len(rows) > 9
    assert all(np.array_equal(row.token_ids, wanted[name]) for name, row in found.items())


def test_answers_that_cannot_be_written_are_failed_prompts(
    spoken: Spoken, reading: Callable[..., PipelineConfig], caplog: pytest.LogCaptureFixture
) -> None:
    rows = json.loads(json.dumps(spoken[1]))
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    rows[1]["messages"][-1] = {"role": "assistant", "content": "a <|im_end|> b <|end|>"}
    rows[2]["messages"].append({"role": "assistant", "content": "More."})
    rows[3]["messages"].pop()
    config, tracker = reading(rows), Recorder()
    stage.run(config, tracker)
    assert "1 without an answer left out: rows 4" in caplog.text
    failed = {line["failed"] for line in lines_of(made_by(config))} - {None}
    assert len(failed) == 2
    assert any("a text spells the control tokens" in reason for reason in failed)
    assert any("the answer has 2 turns; wanted one" in reason for reason in failed)
    assert tracker.metrics["teacher_cache/failed"] == 2
    assert tracker.metrics["teacher_cache/num_sequences"] == NUM_ROWS - 3
    for row in rows[4:8]:
        row["messages"][-1] = {"role": "assistant", "content": None, "tool_calls": [call, call]}
    config = reading(rows, name="worse")
    with pytest.raises(PipelineError) as raised:
        stage.run(config, Recorder())
    assert f"worse.jsonl has no usable answer to 6 of {NUM_ROWS - 1} prompts, at most 10% may fail" in str(raised.value)
    assert "4 prompts: the answer has" in str(raised.value)


def test_rows_without_any_answer_are_one_error(spoken: Spoken, reading: Callable[..., PipelineConfig]) -> None:
    config = reading([{"prompt": "Hi"}, {"messages": spoken[1][0]["messages"][:-1]}])
    with pytest.raises(PipelineError) as raised:
        stage.run(config, Recorder())
    assert str(raised.value) == (
        f"{config.prompts.path} has no answer at the end of any of its 2 rows, which teacher_cache.generator=given "
        "takes; give conversations whose last turn is the assistant's, or let the target answer: "
        "teacher_cache.generator=engine"
    )
