import collections

import pytest

from pipeline.prompts.efforts import EffortMix
from pipeline.prompts.messages import Message
from pipeline.prompts.sources import from_files, generated, prompt_of
from pipeline.prompts.split import is_heldout

EVEN = {"low": 1.0, "medium": 1.0, "high": 1.0}


@pytest.mark.parametrize(
    "shares", [EVEN, {"low": 0.7, "high": 0.1}, {"high": 3.0, "low": 0.0}], ids=["even", "two", "one alone"]
)
def test_each_effort_gets_its_share_of_the_prompts(shares):
    prompts = generated(0, 3000, EffortMix(0, shares)).prompts
    counts = collections.Counter(prompt.effort for prompt in prompts)
    for effort in EVEN:
        share = shares.get(effort, 0) / sum(shares.values())
        assert abs(counts[effort] / 3000 - share) < 4 * (share * (1 - share) / 3000) ** 0.5 + 1e-9  # four deviations


def test_held_out_prompts_have_the_same_mix():
    prompts = generated(0, 3000, EffortMix(0, EVEN)).prompts
    counts = collections.Counter(prompt.effort for prompt in prompts if is_heldout(prompt.prompt_id, 0.2))
    assert all(0.25 < count / counts.total() < 0.42 for count in counts.values())


def test_a_prompts_effort_follows_from_the_seed_and_the_prompt_alone():
    mix = EffortMix(5, EVEN)
    few, many = generated(1, 50, mix).prompts, generated(1, 200, mix).prompts
    assert many[:50] == few
    again = (prompt_of(prompt.messages, mix) for prompt in few)
    assert [(each.prompt_id, each.effort) for each in few] == [(each.prompt_id, each.effort) for each in again]
    assert few != generated(1, 50, EffortMix(6, EVEN)).prompts
    assert [prompt.prompt_id for prompt in few] == [prompt.prompt_id for prompt in generated(1, 50, "low").prompts]


def test_the_draw_is_pinned_so_that_caches_of_an_earlier_version_stay_what_they_were():
    efforts = [prompt_of([Message("user", str(index))], EffortMix(0, EVEN)).effort for index in range(8)]
    assert efforts == ["high", "low", "medium", "high", "low", "high", "low", "medium"]


def test_rows_with_an_effort_of_their_own_keep_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(f'{{"prompt": "{index}", "effort": "high"}}\n{{"prompt": "x{index}"}}\n' for index in range(50))
    )
    prompts = from_files([path], EffortMix(0, {"low": 1.0, "medium": 1.0})).prompts
    assert {prompt.effort for prompt in prompts[::2]} == {"high"}
    assert {prompt.effort for prompt in prompts[1::2]} == {"low", "medium"}
