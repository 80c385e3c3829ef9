"""Every prompt has an outcome, in order, whatever the engine refuses."""

from pathlib import Path

import pytest

from pipeline.engine.config import EngineConfig
from pipeline.errors import PipelineError
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf.directory import read_target
from pipeline.prompts.messages import Message
from pipeline.prompts.sources import prompt_of
from pipeline.teacher_cache.answer import AnsweredPrompt, FailedPrompt, answer_prompts
from pipeline.teacher_cache.render import RenderedPrompt


def test_a_prompt_that_the_engine_refuses_has_failed_and_the_others_are_answered(target_directory: Path) -> None:
    target = read_target(target_directory, WeightFormat())
    tokens = [(5, 6), (7, target.config.vocab_size), (8,), (9,) * 41, (10, 11)]
    rows = [RenderedPrompt(prompt_of([Message("user", str(ids))], "low"), ids, None) for ids in tokens]
    finished = []

    def outcomes(some: list[RenderedPrompt]) -> list[AnsweredPrompt | FailedPrompt]:
        return answer_prompts(
            target,
            some,
            EngineConfig(num_slots=4, max_length=46, prefill_chunk=40, stop_token_ids=(293,)),
            max_new_tokens=6,
            on_finished=lambda completion: finished.append(completion.request_id),
        )

    found = outcomes(rows)
    assert [type(outcome) for outcome in found] == [
        AnsweredPrompt,
        FailedPrompt,
        AnsweredPrompt,
        FailedPrompt,
        AnsweredPrompt,
    ]
    assert [outcome.prompt for outcome in found] == [row.prompt for row in rows]
    for outcome, ids in zip(found, tokens, strict=True):
        if isinstance(outcome, AnsweredPrompt):
            assert outcome.token_ids[: outcome.prompt_tokens] == ids
    assert "the target knows 0..299" in found[1].reason
    assert "prompt has 41 tokens and 6 more are wanted" in found[3].reason
    assert len(finished) == 3
    with pytest.raises(PipelineError, match=r"can answer none of 2 prompts; the first: prompt has token ids \[300\]"):
        outcomes([rows[1], rows[3]])
