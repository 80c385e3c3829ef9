"""The paper's prompt sets: asked as the published benchmark asks them, from copies as people have them."""

import gzip
import json

import datasets
import pytest

from pipeline.errors import PipelineError
from pipeline.prompts.benchmarks import SETS, Question, questions
from tests.support.oracles import run_oracle

ROWS = {
    "gsm8k": [
        {"question": "Tom has 3 {red} apples.\nHow many?", "answer": "#### 3"},
        {"question": "1 + 1?", "answer": ""},
    ],
    "math500": [{"problem": "Find $\\frac{1}{2} + {3}$.", "solution": "", "answer": "", "unique_id": "a"}],
    "humaneval": [
        {"task_id": "HumanEval/0", "prompt": 'def f(x):\n    """{x} and %s"""\n', "test": "", "entry_point": "f"}
    ],
    "mbpp": [{"task_id": 2, "prompt": "Write a function {to} add.", "code": "", "test_list": []}],
    "mt-bench": [
        {"prompt_id": 81, "category": "writing", "prompt": ["Write a {poem}.", "Now a song."], "reference": []}
    ],
}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_set_of_the_published_benchmark_is_asked_as_it_asks_it(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    run_oracle("benchmark_prompts", rows=tmp_path / "rows.json", out=tmp_path / "asked.json")
    published = json.loads((tmp_path / "asked.json").read_text())
    assert published.keys() == SETS.keys() - {"alpaca"}
    for name, one in published.items():
        ours = questions(f"{name}:{write_lines(tmp_path / f'{name}.jsonl', ROWS[name])}", 10)
        asked = [tuple(turns) if isinstance(turns, list) else (turns,) for turns in one["asked"]]
        assert [question.turns for question in ours] == asked
        assert (SETS[name].dataset, SETS[name].subset, SETS[name].split) == (
            one["dataset"],
            one["subset"],
            one["split"],
        )


def test_alpaca_is_asked_as_it_is_written(tmp_path):
    rows = [{"instruction": "Sum up.", "input": "A long text.", "output": "x"}, {"instruction": "Hi", "input": ""}]
    asked = questions(f"alpaca:{write_lines(tmp_path / 'alpaca.jsonl', rows)}", 10)
    assert asked == [
        Question(set_name="alpaca", turns=("Sum up.\nA long text.",)),
        Question(set_name="alpaca", turns=("Hi",)),
    ]


def test_copies_are_read_as_people_have_them(tmp_path):
    gsm8k = ROWS["gsm8k"]
    wanted = questions(f"gsm8k:{write_lines(tmp_path / 'a.jsonl', gsm8k)}", 10)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "a.json").write_text(json.dumps(gsm8k))
    loaded = datasets.Dataset.from_list(gsm8k)
    loaded.to_parquet(tmp_path / "a.parquet")
    datasets.DatasetDict({"test": loaded}).save_to_disk(tmp_path / "saved")
    for name in ("a.jsonl.gz", "a.json", "a.parquet", "saved"):
        assert questions(f"gsm8k:{tmp_path / name}", 10) == wanted, name
    fastchat = [{"question_id": 81, "category": "writing", "turns": ROWS["mt-bench"][0]["prompt"]}]  # lm-sys's own file
    (one,) = questions(f"mt-bench:{write_lines(tmp_path / 'question.jsonl', fastchat)}", 10)
    assert one.turns == ("Write a {poem}.", "Now a song.")
    full = [{"task_id": 1, "text": "Write a function.", "code": ""}]  # MBPP as it was before it was sanitized
    assert questions(f"mbpp:{write_lines(tmp_path / 'mbpp.jsonl', full)}", 10)[0].turns == ("Write a function.",)


def test_the_same_questions_are_chosen_whatever_their_order_and_more_hold_fewer(tmp_path):
    rows = [{"question": f"What is {index}?"} for index in range(40)]
    few = questions(f"gsm8k:{write_lines(tmp_path / 'a.jsonl', rows)}", 5)
    turned = questions(f"gsm8k:{write_lines(tmp_path / 'b.jsonl', rows[::-1] + rows)}", 5)
    more = questions(f"gsm8k:{tmp_path / 'a.jsonl'}", 9)
    assert len(few) == 5
    assert set(few) == set(turned) < set(more)


@pytest.mark.parametrize(
    ("wanted", "rows", "said"),
    [
        ("gsm9k", None, "bench.prompt_sets names 'gsm9k'; it must be one of gsm8k, math500"),
        ("gsm8k", [{"problem": "?"}], r"line 1 has the fields problem; wanted a question in question, as openai/gsm8k"),
        ("mt-bench", [{"turns": ["Hi", 3]}], r"has the fields turns; wanted a question in prompt or turns"),
        ("gsm8k", ["text"], r"line 1 has the fields none"),
        ("gsm8k", [], "holds no question"),
    ],
)
def test_a_wrong_name_or_copy_is_refused_with_what_was_wanted(tmp_path, wanted, rows, said):
    copy = "" if rows is None else f":{write_lines(tmp_path / 'rows.jsonl', rows)}"
    with pytest.raises(PipelineError, match=said):
        questions(wanted + copy, 3)


def test_a_copy_that_is_not_there_and_one_that_is_torn_are_refused(tmp_path):
    with pytest.raises(PipelineError, match="cannot load dataset"):
        questions(f"gsm8k:{tmp_path}/nothing", 3)
    (tmp_path / "torn.jsonl").write_text('{"question": "1?"}\n{"question": "2')
    with pytest.raises(PipelineError, match="line 2 is not JSON"):
        questions(f"gsm8k:{tmp_path / 'torn.jsonl'}", 3)
