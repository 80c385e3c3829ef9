"""Rows as people have them: each case is the literal content of a file, and the prompt that it must give."""

import json
import logging

import datasets
import pytest

from pipeline.errors import PipelineError
from pipeline.prompts import shapes
from pipeline.prompts.messages import Message, message_of
from pipeline.prompts.sources import Reading, from_dataset, from_files, prompt_of
from pipeline.prompts.tools import tools_of
from tests.prompts.test_messages import ACCEPTED


@pytest.fixture
def rows_file(tmp_path):
    def write(text):
        path = tmp_path / "prompts.jsonl"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture(autouse=True)
def dataset_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def messages(*turns):
    """Messages, each given as `role: content`."""
    return [Message(*turn.split(": ", 1)) for turn in turns]


def calling(name, arguments="{}", **more):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return message_of({"role": "assistant", "tool_calls": [call], **more})


HI, BRIEF = messages("user: Hi"), messages("system: Be brief.", "user: Hi")
FLAT_TOOL = [{"type": "function", "function": {"name": "f", "description": "F.", "parameters": {"type": "object"}}}]
READ = {
    "ShareGPT": (
        '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"},'
        ' {"from": "human", "value": "Go on"}, {"from": "gpt", "value": "No."}]}',
        messages("user: Hi", "assistant: Yes?", "user: Go on"),
    ),
    "ShareGPT with role and content": (
        '{"id": 1, "conversations": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]}',
        BRIEF,
    ),
    "ShareGPT's other names": (
        '{"conversation": [{"from": "system", "value": "Be brief."}, {"from": "user", "value": "Hi"},'
        ' {"from": "assistant", "value": "Yes?"}]}',
        BRIEF,
    ),
    "ShareGPT as text": ('{"conversations": "[{\\"from\\": \\"human\\", \\"value\\": \\"Hi\\"}]"}', HI),
    "ShareGPT with tools": (
        '{"conversations": [{"from": "human", "value": "Hi"},'
        ' {"from": "function_call", "value": "{\\"name\\": \\"f\\", \\"arguments\\": {\\"n\\": 1}}"},'
        ' {"from": "observation", "value": "3"}, {"from": "gpt", "value": "It is 3."}]}',
        [*HI, calling("f", '{"n": 1}'), Message("tool", "3")],
    ),
    "messages as text": ('{"messages": "[{\\"role\\": \\"user\\", \\"content\\": \\"Hi\\"}]"}', HI),
    "the assistant last": (
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]}',
        HI,
    ),
    "an empty answer last": (
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]}',
        HI,
    ),
    "Alpaca": ('{"instruction": "Hi", "input": "", "output": "Yes?"}', HI),
    "Alpaca with an input": (
        '{"instruction": "Add.", "input": "1, 2", "output": "3"}',
        messages("user: Add.\n1, 2"),
    ),
    "Alpaca with a system": ('{"instruction": "Hi", "system": "Be brief.", "output": "Yes?"}', BRIEF),
    "parts": (
        '{"messages": [{"role": "user", "content":'
        ' [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}]}',
        messages("user: one two"),
    ),
    "a thought": (
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?",'
        ' "reasoning_content": "Hm."}, {"role": "user", "content": "Go on"},'
        ' {"role": "assistant", "content": "No.", "thinking": "So."}]}',
        [*HI, Message("assistant", "Yes?", "Hm."), Message("user", "Go on")],
    ),
    "a system beside": ('{"system": "Be brief.", "messages": [{"role": "user", "content": "Hi"}]}', BRIEF),
    "a system that is no text": ('{"system": 1, "messages": [{"role": "user", "content": "Hi"}]}', HI),
    "the same system twice": (
        '{"system": "Be brief.", "messages": [{"role": "system", "content": "Be brief."},'
        ' {"role": "user", "content": "Hi"}]}',
        BRIEF,
    ),
    "an empty system": (
        '{"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}]}',
        HI,
    ),
    "system and developer": (
        '{"messages": [{"role": "system", "content": "Be brief."}, {"role": "developer", "content": "No lists."},'
        ' {"role": "user", "content": "Hi"}]}',
        [Message("system", "Be brief.\n\nNo lists."), *HI],
    ),
    "UltraChat": (
        '{"prompt": "Hi", "prompt_id": "a", "messages": [{"role": "user", "content": "Hi"},'
        ' {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Go on"},'
        ' {"role": "assistant", "content": "No."}]}',
        messages("user: Hi", "assistant: Yes?", "user: Go on"),
    ),
    "no prompt beside messages": ('{"prompt": null, "messages": [{"role": "user", "content": "Hi"}]}', HI),
    "a prompt of messages": ('{"prompt": [{"role": "user", "content": "Hi"}], "chosen": "Yes?"}', HI),
    "other roles": ('{"messages": [{"role": "Human", "content": "Hi"}, {"role": "GPT", "content": "Yes?"}]}', HI),
    "User": ('{"messages": [{"role": "User", "content": "Hi"}]}', HI),
    "empty tools": ('{"messages": [{"role": "user", "content": "Hi"}], "tools": ""}', HI),
    "an older call": (
        '{"messages": [{"role": "user", "content": "Hi"},'
        ' {"role": "assistant", "content": null, "function_call": {"name": "f", "arguments": "{}"}},'
        ' {"role": "function", "name": "f", "content": "3"}]}',
        [*HI, calling("f"), Message("tool", "3")],
    ),
    "parallel calls": (
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "thinking": "Both.",'
        ' "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}},'
        ' {"id": "b", "function": {"name": "g", "arguments": ""}}]},'
        ' {"role": "tool", "tool_call_id": "b", "content": "2"},'
        ' {"role": "tool", "tool_call_id": "a", "content": "1"}]}',
        [*HI, calling("f", thinking="Both."), Message("tool", "1"), calling("g"), Message("tool", "2")],
    ),
    "flat calls": (
        '{"messages": [{"role": "user", "content": "Hi"},'
        ' {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"n": 1}}]},'
        ' {"role": "tool", "content": "3"}]}',
        [*HI, calling("f", '{"n": 1}'), Message("tool", "3")],
    ),
}


@pytest.mark.parametrize(("text", "wanted"), READ.values(), ids=READ.keys())
def test_a_row_whose_meaning_is_plain_is_read(rows_file, text, wanted):
    assert from_files([rows_file(text)], "low").prompts == (prompt_of(wanted, "low"),)


@pytest.mark.parametrize(("text", "wanted"), READ.values(), ids=READ.keys())
def test_a_table_of_such_rows_gives_the_same_prompts(tmp_path, text, wanted):
    row = json.loads(text)
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    assert from_files([tmp_path / "rows.parquet"], "low").prompts == (prompt_of(wanted, "low"),)
    if not isinstance(row.get("prompt", []), str | None):  # there the column is read, as it always was
        assert from_dataset(str(tmp_path / "rows.parquet"), "train", "prompt", "low").prompts[0].messages == (*wanted,)


def test_a_flat_schema_is_a_tool_and_minimal_is_low(rows_file):
    path = rows_file(
        '{"prompt": "Hi", "tools": [{"name": "f", "description": "F.", "parameters": {"type": "object"}}],'
        ' "reasoning_effort": "minimal"}'
    )
    assert from_files([path], "high").prompts == (prompt_of(HI, "low", tools_of(FLAT_TOOL)),)


@pytest.mark.parametrize("turns", [*ACCEPTED.values()], ids=[*ACCEPTED])
def test_messages_that_always_were_read_are_the_same_when_their_shape_is_named(turns):
    strict, named = shapes.read({"messages": turns}, None), shapes.read({"messages": turns}, "messages")
    assert [prompt_of(map(message_of, found.messages), "low") for found in (strict, named)] == [
        prompt_of(map(message_of, turns), "low")
    ] * 2


def test_prompts_have_the_ids_that_version_0_1_gave_them(rows_file):
    path = rows_file(
        '{"prompt": "one", "id": 3, "system": "x"}\n'
        '{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]}\n'
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "thinking": "Look.",'
        ' "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]},'
        ' {"role": "tool", "content": "1"}], "tools": [{"type": "function", "function": {"name": "f"}}]}\n'
        '{"prompt": "two", "instruction": "three", "conversations": []}\n'
    )
    assert [prompt.prompt_id[:12] for prompt in from_files([path], "low").prompts] == IDS_OF_0_1


IDS_OF_0_1 = ["a05b8cd35785", "158ab9a5f9ff", "68ac99cd5c6c", "8ebc47733d77"]

USER = '{"role": "user", "content": "Hi"}'
LEFT_OUT = {
    "nobody asks": ('{"conversations": [{"from": "gpt", "value": "Yes?"}]}', shapes.NO_USER),
    "an image": (
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"},'
        ' {"type": "image_url", "image_url": {"url": "a.png"}}]}]}',
        shapes.MEDIA,
    ),
    "sound": (
        '{"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": ""}}]}]}',
        shapes.MEDIA,
    ),
    "images beside": ('{"conversations": [{"from": "human", "value": "<image>"}], "images": ["a.png"]}', shapes.MEDIA),
    "no prompt": ('{"prompt": null}', "has prompt None; wanted a non-empty string"),
    "an empty turn": (
        f'{{"messages": [{USER}, {{"role": "assistant", "content": ""}}, {USER}]}}',
        "messages[1] has empty content",
    ),
    "a late system": (
        f'{{"messages": [{USER}, {{"role": "system", "content": "Be brief."}}]}}',
        "messages[1] has role 'system' after other messages",
    ),
    "calls without results": (
        f'{{"messages": [{USER}, {{"role": "assistant", "tool_calls": [{{"name": "f"}}, {{"name": "g"}}]}},'
        f' {{"role": "tool", "content": "1"}}, {USER}]}}',
        "has 2 calls side by side, not all of which have a result",
    ),
    "another effort": ('{"prompt": "Hi", "effort": "max"}', "reasoning effort is 'max'; wanted one of"),
    "a list": ("[1]", "is a list; wanted an object with prompt or messages"),
    "half a character": ('{"instruction": "\\ud83d"}', "is not valid Unicode"),
    "a history": ('{"instruction": "Hi", "history": [["a", "b"]]}', "has a history beside the instruction"),
    "no known field": ('{"question": "Hi"}', "has the fields question; wanted exactly one of prompt and messages"),
}


@pytest.mark.parametrize(("text", "why"), LEFT_OUT.values(), ids=LEFT_OUT.keys())
def test_another_row_is_left_out_and_counted_or_refused(rows_file, caplog, text, why):
    path = rows_file('{"prompt": "good"}\n' + text)
    with caplog.at_level(logging.INFO, "pipeline"):
        found = from_files([path], "low", Reading(skips=True))
    assert (len(found.prompts), found.num_left_out) == (1, 1)
    assert why in caplog.messages[0]
    assert "1 " in caplog.messages[0]
    assert "left out: rows 2" in caplog.messages[0]
    with pytest.raises(PipelineError, match="has 1 bad rows of 2; mend or delete them:\n  line 2: "):
        from_files([path], "low")
    with pytest.raises(PipelineError, match="has 1 bad rows of 1; mend or delete them:\n  line 1: "):
        from_files([rows_file(text if text != "[1]" else "1")], "low", Reading(skips=True))


def test_one_line_says_how_a_file_was_read(rows_file, caplog):
    answered = '{"conversations": [{"from": "human", "value": "%d"}, {"from": "gpt", "value": "Yes?"}]}\n'
    silent = '{"conversations": [{"from": "gpt", "value": "Yes?"}]}\n'
    text = "".join(silent if index % 2 else answered % index for index in range(24)) + '{"conversations": 5}\n'
    with caplog.at_level(logging.INFO, "pipeline"):
        from_files([rows_file(text)], "low", Reading(skips=True))
    (line,) = caplog.messages
    assert line.endswith(
        "prompts.jsonl: 25 ShareGPT rows, 12 without a user turn left out: rows 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, "
        "..., 1 not readable left out: rows 25 (the first messages is 5; wanted a non-empty list of role and content "
        "objects), the answer at the end of 12 left out"
    )


def test_a_line_that_is_torn_is_never_left_out(rows_file):
    with pytest.raises(PipelineError, match=r"has 1 bad rows of 2.*\n +line 2: is not JSON"):
        from_files([rows_file('{"prompt": "good"}\n{"prompt": "ba')], "low", Reading(skips=True))


BOTH = {
    "prompt and other messages": (
        '{"prompt": "Hi", "messages": [{"role": "user", "content": "Ho"}]}', "prompt", "messages"
    ),
    "ShareGPT and Alpaca": (
        '{"conversations": [{"from": "human", "value": "Hi"}], "instruction": "Ho"}', "sharegpt", "alpaca"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "first", "second"), BOTH.values(), ids=BOTH.keys())
def test_two_readings_are_both_named_and_the_shape_chooses(rows_file, text, first, second):
    path = rows_file(text)
    for skips in (False, True):
        with pytest.raises(PipelineError, match=rf"line 1 has .* prompts\.shape={first} or prompts\.shape={second}"):
            from_files([path], "low", Reading(skips=skips))
    assert from_files([path], "low", Reading(shape=first)).prompts == (prompt_of(HI, "low"),)
    assert from_files([path], "low", Reading(shape=second)).prompts == (prompt_of(messages("user: Ho"), "low"),)


def test_what_a_prompt_hides_is_told(rows_file, caplog):
    with caplog.at_level(logging.INFO, "pipeline"):
        from_files([rows_file('{"prompt": "a", "instruction": "b"}\n{"prompt": "c", "system": "d"}')], "low")
    assert caplog.messages[0].endswith(
        "2 prompt rows; prompts.shape=alpaca would read instruction instead; system is not read beside a prompt, only "
        "beside messages"
    )


def test_a_column_of_conversations_as_text_can_be_read_in_two_ways(tmp_path):
    text = '[{"role": "user", "content": "Hi"}]'
    datasets.Dataset.from_dict({"chat": [text]}).to_parquet(tmp_path / "rows.parquet")
    source = (str(tmp_path / "rows.parquet"), "train", "chat", "low")
    with pytest.raises(PipelineError, match=r"choose prompts\.shape=prompt or prompts\.shape=messages"):
        from_dataset(*source)
    assert from_dataset(*source, Reading(shape="messages")).prompts == (prompt_of(HI, "low"),)
    assert from_dataset(*source, Reading(shape="prompt")).prompts == (prompt_of([Message("user", text)], "low"),)


def test_a_datasets_column_of_sharegpt_turns_is_read(tmp_path):
    rows = [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}], "prompt": "Ho"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    name = str(tmp_path / "rows.parquet")
    wanted = (prompt_of(HI, "low"),)
    assert from_dataset(name, "train", "conversations", "low").prompts == wanted
    assert from_dataset(name, "train", "prompt", "low", Reading(shape="sharegpt")).prompts == wanted
    assert from_dataset(name, "train", "prompt", "low").prompts == (prompt_of(messages("user: Ho"), "low"),)


ANSWERED = Reading(skips=True, takes_answers=True)
CALL = {"function": {"name": "f", "arguments": '{"n": 1}'}}
ANSWERS = {  # the row, and the fields of its answer that say something
    "messages": (
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]}',
        {"content": "Yes?"},
    ),
    "ShareGPT": (
        '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]}',
        {"content": "Yes?"},
    ),
    "Alpaca": ('{"instruction": "Hi", "input": "", "output": "Yes?"}', {"content": "Yes?"}),
    "Alpaca's other name": ('{"instruction": "Hi", "output": "", "response": "Yes?"}', {"content": "Yes?"}),
    "parts": (
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "assistant",'
        ' "content": [{"type": "text", "text": "Ye"}, {"type": "text", "text": "s?"}]}]}',
        {"content": "Yes?"},
    ),
    "an analysis": (
        '{"prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "reasoning": "Hm.", "content": "Yes?"}]}',
        {"content": "Yes?", "reasoning": "Hm."},
    ),
    "a call": (
        '{"conversations": [{"from": "human", "value": "Hi"},'
        ' {"from": "function_call", "value": "{\\"name\\": \\"f\\", \\"arguments\\": \\"{\\\\\\"n\\\\\\": 1}\\"}"}]}',
        {"tool_calls": [CALL]},
    ),
    "an older call": (
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": null,'
        ' "function_call": {"name": "f", "arguments": "{\\"n\\": 1}"}}]}',
        {"tool_calls": [CALL]},
    ),
}


@pytest.mark.parametrize(("text", "wanted"), ANSWERS.values(), ids=ANSWERS.keys())
def test_the_answer_at_the_end_is_read_where_it_is_wanted_and_changes_no_id(rows_file, tmp_path, text, wanted):
    path = rows_file(text)
    alone, found = from_files([path], "low"), from_files([path], "low", ANSWERED)
    assert found.prompts == alone.prompts == (prompt_of(HI, "low"),)
    assert not alone.answers
    ((prompt_id, (turn,)),) = found.answers.items()
    assert prompt_id == found.prompts[0].prompt_id
    assert {name: turn[name] for name in turn.keys() - {"role"} if turn[name]} == wanted
    datasets.Dataset.from_list([json.loads(text)]).to_parquet(tmp_path / "rows.parquet")
    if "prompt" not in text:
        from_table = from_dataset(str(tmp_path / "rows.parquet"), "train", "prompt", "low", ANSWERED)
        assert from_table.prompts == found.prompts
        assert [turn["content"] for (turn,) in from_table.answers.values()] == [turn["content"]]


SILENT = {
    "a prompt": '{"prompt": "Hi"}',
    "the user last": '{"messages": [{"role": "user", "content": "Hi"}]}',
    "an empty answer": '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]}',
    "a tool last": json.dumps(
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "tool_calls": [CALL]},
                {"role": "tool", "content": "1"},
            ]
        }
    ),
    "Alpaca without an output": '{"instruction": "Hi", "output": ""}',
}


@pytest.mark.parametrize("text", SILENT.values(), ids=SILENT.keys())
def test_a_row_without_an_answer_is_left_out_where_answers_are_wanted(rows_file, caplog, text):
    path = rows_file('{"instruction": "good", "output": "Yes."}\n' + text)
    with caplog.at_level(logging.INFO, "pipeline"):
        found = from_files([path], "low", ANSWERED)
    assert (len(found.prompts), found.num_left_out) == (1, 1)
    assert "1 without an answer left out: rows 2, the answer at the end of 1 taken" in caplog.messages[0]
    with pytest.raises(PipelineError, match="has 1 bad rows of 2; mend or delete them:\n  line 2: without an answer"):
        from_files([path], "low", Reading(takes_answers=True))
    with pytest.raises(PipelineError, match="has no answer at the end of any of its 1 rows"):
        from_files([rows_file(text)], "low", ANSWERED)
    assert len(from_files([path], "low").prompts) == 1


def test_of_several_answers_to_a_prompt_the_first_is_taken(rows_file, caplog):
    rows = [("Hi", "One."), (" Hi", "Two."), ("Ho", "Three."), ("Hi", "One.")]
    text = "\n".join(json.dumps({"instruction": asked, "output": answer}) for asked, answer in rows)
    found = from_files([rows_file(text)], "low", ANSWERED)
    assert [found.answers[prompt.prompt_id][0]["content"] for prompt in found.prompts] == ["One.", "Three."]
    assert found.num_duplicates == 2
    assert "1 rows repeat a prompt with another answer, which is left out: the first row's is taken" in caplog.text
