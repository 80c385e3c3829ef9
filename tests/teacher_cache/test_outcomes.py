"""Every prompt has an outcome, in order, whatever the engine refuses."""

from pathlib import Path

import pytest

from pipeline.artifacts import PipelineError
from pipeline.model import checkpoints
from pipeline.model.gpt_oss_weights import WeightsForm
from pipeline.prompts.messages import Message
from pipeline.prompts.sources import prompt_of
from pipeline.teacher_cache.generate import Answered, Failed, Rendered, answer


def test_a_prompt_that_the_engine_refuses_has_failed_and_the_others_are_answered(target_directory: Path) -> None:
    config, weights = checkpoints.load_target(target_directory, WeightsForm())
    tokens = [(5, 6), (7, config.vocab_size), (8,), (9,) * 41, (10, 11)]
    rows = [Rendered(prompt_of([Message("user", str(ids))], "low"), ids, None) for ids in tokens]
    finished = []

    def outcomes(some: list[Rendered]) -> list[Answered | Failed]:
        return answer(
            weights,
            config,
            some,
            stop_token_ids=(293,),
            slots=4,
            max_prompt_tokens=40,
            max_new_tokens=6,
            on_finished=lambda one: finished.append(one.request_id),
        )

    found = outcomes(rows)
    assert [type(one) for one in found] == [Answered, Failed, Answered, Failed, Answered]
    assert [one.prompt for one in found] == [row.prompt for row in rows]
    assert all(one.token_ids[: one.prompt_tokens] == ids for one, ids in zip(found, tokens, strict=True)
               if isinstance(one, Answered))  # fmt: skip
    assert "the target knows 0..299" in found[1].reason
    assert "prompt has 41 tokens and 6 more are wanted" in found[3].reason
    assert len(finished) == 3
    with pytest.raises(PipelineError, match=r"can answer none of 2 prompts; the first: prompt has token ids \[300\]"):
        outcomes([rows[1], rows[3]])
