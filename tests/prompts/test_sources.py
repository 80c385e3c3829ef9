import hashlib
import json

import datasets
import pytest

from pipeline.artifacts import PipelineError
from pipeline.prompts.messages import Message, message_of
from pipeline.prompts.sources import from_dataset, from_jsonl, generated, prompt_of
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
    assert from_jsonl(path, "low").prompts == wanted
    assert list(wanted[0].tools[0].as_dict()["function"]["parameters"]["properties"]) == ["b", "a"]


def test_a_table_of_conversations_gives_what_the_same_rows_give_as_jsonl(rows_file, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "x"}, CALLING, {"role": "tool", "content": "1"}],
         "tools": json.dumps([TOOL]), "effort": "high"},
        {"messages": [{"role": "user", "content": "y"}], "tools": None, "effort": None},
    ]  # fmt: skip
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    found = from_dataset(str(tmp_path / "rows.parquet"), "train", "messages", "low")
    assert found == from_jsonl(rows_file(*rows), "low")
    assert [prompt.effort for prompt in found.prompts] == ["high", "low"]


def test_a_row_with_bad_tools_is_named(rows_file):
    for tools in ("no JSON", [{"name": "f"}]):
        with pytest.raises(PipelineError, match=r"line 1: tools"):
            from_jsonl(rows_file({"prompt": "x", "tools": tools}), "low")


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
    found = from_jsonl(path, "medium")
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
        from_jsonl(path, "low")


def test_all_bad_rows_are_told_at_once_and_many_are_counted(rows_file):
    path = rows_file(*["{}"] * 13)
    with pytest.raises(PipelineError) as caught:
        from_jsonl(path, "low")
    assert "13 bad rows of 13" in str(caught.value)
    assert "line 10:" in str(caught.value)
    assert "line 11:" not in str(caught.value)
    assert str(caught.value).endswith("and 3 more")


@pytest.mark.parametrize("lines", [[], ["", " "]], ids=["no bytes", "blank lines"])
def test_an_empty_file_is_refused(rows_file, lines):
    with pytest.raises(PipelineError, match=r"holds no prompt; wanted at least one row such as"):
        from_jsonl(rows_file(*lines), "low")


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(PipelineError, match=r"cannot read prompts from .*No such file"):
        from_jsonl(tmp_path / "none.jsonl", "low")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(PipelineError, match=r"cannot read prompts from .*give a JSONL file in UTF-8"):
        from_jsonl(tmp_path / "latin.jsonl", "low")


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
