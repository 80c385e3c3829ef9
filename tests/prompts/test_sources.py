import dataclasses
import hashlib
import json

import datasets
import pytest

from pipeline.errors import PipelineError
from pipeline.prompts.messages import Message, message_of
from pipeline.prompts.sources import from_dataset, from_files, generated, limited, prompt_of
from pipeline.prompts.split import split_by_hash
from pipeline.prompts.tools import tools_of


@pytest.fixture
def rows_file(tmp_path):
    def write(*lines):
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return path

    return write


@pytest.fixture(autouse=True)
def dataset_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def test_the_id_is_the_sha256_of_the_messages_without_the_effort():
    prompt = prompt_of([Message("user", "é")], "low")
    expected = hashlib.sha256(b'[{"content":"\\u00e9","role":"user"}]').hexdigest()
    assert prompt.prompt_id == prompt_of([Message("user", "é")], "high").prompt_id == expected


CALLING = {
    "role": "assistant",
    "content": "",
    "thinking": "Look.",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}],
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"b": {}, "a": {}}}}}


def test_the_id_covers_thinking_calls_and_tools():
    turns = [Message("user", "x"), message_of(CALLING), Message("tool", "1")]
    tools = tools_of([TOOL])
    ids = [
        prompt_of(turns, "low").prompt_id,
        prompt_of(turns, "low", tools).prompt_id,
        prompt_of([turns[0], message_of(CALLING | {"thinking": None}), turns[2]], "low").prompt_id,
        prompt_of([turns[0], message_of(CALLING | {"tool_calls": []}), turns[2]], "low").prompt_id,
        prompt_of(turns, "low", tools_of([{"function": TOOL["function"] | {"description": "x"}}])).prompt_id,
    ]
    assert len(set(ids)) == len(ids)
    assert ids[0] == prompt_of([message_of(message.as_dict()) for message in turns], "high").prompt_id


@pytest.mark.parametrize("spelled", [[TOOL], json.dumps([TOOL])], ids=["list", "JSON"])
def test_rows_bring_tool_calls_results_and_tools(rows_file, spelled):
    turns = [{"role": "user", "content": "x"}, CALLING, {"role": "tool", "content": "1", "tool_call_id": "a"}]
    path = rows_file({"messages": turns, "tools": spelled}, {"prompt": "one", "tools": None})
    wanted = (
        prompt_of([Message("user", "x"), message_of(CALLING), Message("tool", "1")], "low", tools_of([TOOL])),
        prompt_of([Message("user", "one")], "low"),
    )
    assert from_files([path], "low").prompts == wanted
    assert list(wanted[0].tools[0].as_dict()["function"]["parameters"]["properties"]) == ["b", "a"]


def test_a_table_of_conversations_gives_what_the_same_rows_give_as_jsonl(rows_file, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "x"}, CALLING, {"role": "tool", "content": "1"}],
         "tools": json.dumps([TOOL]), "effort": "high"},
        {"messages": [{"role": "user", "content": "y"}], "tools": None, "effort": None},
    ]  # fmt: skip
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    found = from_dataset(str(tmp_path / "rows.parquet"), "train", "messages", "low")
    assert found == from_files([rows_file(*rows)], "low")
    assert [prompt.effort for prompt in found.prompts] == ["high", "low"]


def test_a_row_with_bad_tools_is_named(rows_file):
    for tools in ("no JSON", [{"label": "f"}]):
        with pytest.raises(PipelineError, match=r"line 1: tools"):
            from_files([rows_file({"prompt": "x", "tools": tools})], "low")


def test_generated_prompts_are_distinct_and_as_many_as_asked_for():
    found = generated(7, 3_000, "medium")
    assert len({prompt.prompt_id for prompt in found.prompts}) == len(found.prompts) == 3_000
    assert found.num_duplicates > 0
    assert {prompt.effort for prompt in found.prompts} == {"medium"}


def test_a_longer_generated_set_begins_with_the_shorter_one():
    assert generated(7, 200, "low").prompts[:50] == generated(7, 50, "low").prompts


@pytest.mark.parametrize(("count", "effort"), [(0, "low"), (5, "none")], ids=["count", "effort"])
def test_generating_nothing_or_with_an_unknown_effort_is_refused(count, effort):
    with pytest.raises(PipelineError, match=r"must be positive|wanted one of low"):
        generated(0, count, effort)


def test_jsonl_rows_are_prompts_or_messages_with_their_own_effort(rows_file):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    path = rows_file(
        {"prompt": "one"},
        "",
        {"messages": chat, "effort": "high"},
        {"prompt": "one"},
        "  ",
        {"prompt": "two\u2028lines", "reasoning_effort": "low", "id": 3},
    )
    found = from_files([path], "medium")
    assert found.num_duplicates == 1
    assert found.prompts == (
        prompt_of([Message("user", "one")], "medium"),
        prompt_of([Message("system", "Be brief."), Message("user", "Hi")], "high"),
        prompt_of([Message("user", "two\u2028lines")], "low"),
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": ', "line 2: is not JSON .* wanted one object a line"),
        ("[1]", "line 2: is a list; wanted an object with prompt or messages"),
        ({"text": "x"}, "line 2: has the fields text; wanted exactly one of prompt and messages"),
        ({"prompt": "x", "messages": []}, "line 2: has the fields prompt, messages; wanted exactly one"),
        ({"prompt": 5}, "line 2: has prompt 5; wanted a non-empty string"),
        ({"prompt": " "}, "line 2: has prompt ' '; wanted a non-empty string"),
        (
            {"prompt": "x", "effort": "max"},
            "line 2: reasoning effort is 'max'; wanted one of low, medium, high",
        ),
        ({"prompt": "x", "effort": "low", "reasoning_effort": "high"}, "line 2: .* wanted one of them"),
        ({"messages": []}, r"line 2: messages is \[\]; wanted a non-empty list"),
        ({"messages": "x"}, "line 2: messages is 'x'; wanted a non-empty list"),
        ({"messages": ["x"]}, r"line 2: messages\[0\] is 'x'; wanted an object with role and content"),
        (
            {"messages": [{"role": "bot", "content": "x"}]},
            r"line 2: messages\[0\] has role 'bot'; wanted one of",
        ),
        ({"messages": [{"role": "user"}]}, r"line 2: messages\[0\] has content None; wanted a string"),
        ({"messages": [{"role": "user", "content": ""}]}, r"line 2: messages\[0\] has empty content"),
        (
            {"messages": [{"role": "assistant", "content": "x"}]},
            "line 2: the last message is the assistant's",
        ),
    ],
    ids=[
        "broken JSON",
        "no object",
        "no prompt",
        "both",
        "number",
        "blank",
        "effort",
        "two efforts",
        "no messages",
        "text for messages",
        "text for a message",
        "role",
        "no content",
        "empty content",
        "assistant last",
    ],
)
def test_a_bad_row_is_named_with_its_file_and_line(rows_file, row, message):
    path = rows_file({"prompt": "good"}, row)
    with pytest.raises(PipelineError, match=rf"prompts\.jsonl has 1 bad rows of 2.*\n +{message}"):
        from_files([path], "low")


def test_all_bad_rows_are_told_at_once_and_many_are_counted(rows_file):
    path = rows_file(*["{}"] * 13)
    with pytest.raises(PipelineError) as caught:
        from_files([path], "low")
    assert "13 bad rows of 13" in str(caught.value)
    assert "line 10:" in str(caught.value)
    assert "line 11:" not in str(caught.value)
    assert str(caught.value).endswith("and 3 more")


@pytest.mark.parametrize("lines", [[], ["", " "]], ids=["no bytes", "blank lines"])
def test_an_empty_file_is_refused(rows_file, lines):
    with pytest.raises(PipelineError, match=r"holds no prompt; wanted at least one row such as"):
        from_files([rows_file(*lines)], "low")


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(PipelineError, match=r"cannot read prompts from .*No such file"):
        from_files([tmp_path / "none.jsonl"], "low")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(PipelineError, match=r"cannot read prompts from .*give a JSONL file in UTF-8"):
        from_files([tmp_path / "latin.jsonl"], "low")


def test_a_local_dataset_gives_the_prompts_of_a_text_column(rows_file):
    path = rows_file({"question": "one", "n": 1}, {"question": "two", "n": 2}, {"question": "one", "n": 3})
    for name in (str(path), str(path.parent)):
        found = from_dataset(name, "train", "question", "low")
        assert found.prompts == tuple(prompt_of([Message("user", text)], "low") for text in ("one", "two"))
        assert found.num_duplicates == 1


def test_a_local_dataset_gives_the_prompts_of_a_column_of_messages(rows_file):
    path = rows_file({"chat": [{"role": "user", "content": "one"}]})
    assert from_dataset(str(path), "train", "chat", "low").prompts == (prompt_of([Message("user", "one")], "low"),)


@pytest.mark.parametrize(
    ("split", "column", "message"),
    [
        ("train", "answer", "has no column 'answer'; wanted one of question"),
        (
            "test",
            "question",
            "cannot load dataset .* split test .*; check the name, the split and the network",
        ),
        ("train", "question", r"has 1 bad rows of 2; mend or delete them:\n  row 1: messages is None"),
    ],
    ids=["column", "split", "row"],
)
def test_a_dataset_that_does_not_fit_is_refused(rows_file, split, column, message):
    path = rows_file({"question": "one"}, {"question": None})
    with pytest.raises(PipelineError, match=message):
        from_dataset(str(path), split, column, "low")


def test_a_file_of_unknown_format_is_refused(tmp_path):
    (tmp_path / "prompts.xml").write_text("<a/>")
    with pytest.raises(PipelineError, match=r"ends in '\.xml'; wanted one of \.json"):
        from_dataset(str(tmp_path / "prompts.xml"), "train", "question", "low")


def test_a_hub_dataset_without_network_is_refused_with_what_to_do(monkeypatch):
    def unreachable(*_arguments, **_options):
        raise ConnectionError("Couldn't reach 'some/name' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(
        PipelineError, match=r"cannot load dataset some/name, .*Couldn't reach.* give a local directory"
    ):
        from_dataset("some/name", "train", "question", "low")


def test_a_parquet_file_and_a_directory_of_them_give_the_prompts_of_a_column_of_messages(tmp_path):
    chats = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}],
        [{"role": "user", "content": "two"}],
        [{"role": "user", "content": "three"}],
    ]
    for index, part in enumerate((chats[:2], chats[2:])):
        rows = {"chat": part, "n": [index] * len(part), "reasoning_effort": ["high", None][: len(part)]}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / f"part-{index}.parquet")
    wanted = [prompt_of([Message(**message) for message in chat], "low") for chat in chats]
    wanted[0] = dataclasses.replace(wanted[0], effort="high")
    wanted[2] = dataclasses.replace(wanted[2], effort="high")
    assert from_dataset(str(tmp_path / "part-0.parquet"), "train", "chat", "low").prompts == tuple(wanted[:2])
    assert from_dataset(str(tmp_path), "train", "chat", "low").prompts == tuple(wanted)


def test_what_save_to_disk_wrote_is_read_with_and_without_splits(tmp_path):
    rows = datasets.Dataset.from_dict({"prompt": ["one", "two"]})
    rows.save_to_disk(tmp_path / "bare")
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "split")
    wanted = tuple(prompt_of([Message("user", text)], "low") for text in ("one", "two"))
    assert from_dataset(str(tmp_path / "bare"), "train", "prompt", "low").prompts == wanted
    assert from_dataset(str(tmp_path / "split"), "test", "prompt", "low").prompts == wanted
    with pytest.raises(PipelineError, match=r"split train \(ValueError: it has the splits test\)"):
        from_dataset(str(tmp_path / "split"), "train", "prompt", "low")


def test_prompts_that_differ_in_white_space_alone_are_one_and_the_first_is_kept(rows_file):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    path = rows_file(
        {"prompt": "one  two"},
        {"prompt": " one two\n"},
        {"prompt": "onetwo"},
        {"messages": [{"role": "user", "content": "one\ttwo"}]},
        {"messages": [{"role": "system", "content": "one"}, {"role": "user", "content": "two"}]},
        {"messages": [{"role": "user", "content": "one two"}], "tools": tools},
    )
    found = from_files([path], "low")
    assert [prompt.messages[-1].content for prompt in found.prompts] == ["one  two", "onetwo", "two", "one two"]
    assert found.num_duplicates == 2


def test_a_limited_set_is_the_same_in_any_order_and_grows_without_losing_any():
    found = generated(7, 400, "low")
    backwards = dataclasses.replace(found, prompts=found.prompts[::-1])
    few, many = limited(found, 50), limited(found, 200)
    assert set(few.prompts) == set(limited(backwards, 50).prompts)
    assert set(few.prompts) < set(many.prompts) < set(found.prompts)
    assert list(few.prompts) == [prompt for prompt in found.prompts if prompt in few.prompts]
    assert (few.num_over, few.num_duplicates) == (350, found.num_duplicates)
    assert limited(found, 400) == limited(found, None) == limited(found, 9999) == found
    train, heldout = split_by_hash(many.prompts, 0.25)  # who is held out has nothing to do with who is chosen
    assert 25 < len(heldout) < 80
    assert len(train) + len(heldout) == 200


def test_a_hub_datasets_subset_and_revision_are_asked_for(monkeypatch):
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_dict({"prompt": ["one"]})

    monkeypatch.setattr("datasets.load_dataset", load)
    from_dataset("some/name", "train", "prompt", "low", subset="en", revision="abc")
    assert asked == [(("some/name", "en"), {"split": "train", "revision": "abc"})]
