"""The engine's answers to rendered prompts."""

import dataclasses
from collections.abc import Callable, Sequence

from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.request import Completion, Request
from pipeline.errors import PipelineError
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.parallel.runtime import SINGLE_DEVICE, Runtime
from pipeline.prompts.sources import Prompt
from pipeline.teacher_cache.origin import ENGINE, AnswerOrigin
from pipeline.teacher_cache.render import RenderedPrompt


@dataclasses.dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt with the target's answer: all tokens, of which `prompt_tokens` are the prompt's."""

    prompt: Prompt
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class FailedPrompt:
    """A prompt that got no answer, and why."""

    prompt: Prompt
    reason: str


def answer_prompts(
    target: TargetModel,
    rows: Sequence[RenderedPrompt],
    engine_config: EngineConfig,
    *,
    max_new_tokens: int,
    on_finished: Callable[[Completion], None],
    origin: AnswerOrigin = ENGINE,
    runtime: Runtime = SINGLE_DEVICE,
) -> list[AnsweredPrompt | FailedPrompt]:
    """Returns the target's answers, in the order of `rows`; a prompt that the engine refuses has failed.

    The engine is made anew, so that the answers depend on these rows alone and not on what ran before. Raises
    PipelineError when it refuses all.
    """
    engine = Engine(target, None, engine_config, runtime)
    keys = origin.keys([row.prompt.prompt_id for row in rows]) or [None] * len(rows)
    requests = [
        Request(request_id=str(index), prompt_ids=row.token_ids, max_new_tokens=max_new_tokens, sampling_key=key)
        for index, (row, key) in enumerate(zip(rows, keys, strict=True))
    ]
    problems = {request.request_id: _problem(engine, request) for request in requests}
    if all(problems.values()):
        raise PipelineError(f"the target can answer none of {len(rows)} prompts; the first: {problems['0']}")
    finished = {}
    for one in engine.generate(request for request in requests if not problems[request.request_id]):
        finished[one.request_id] = one
        on_finished(one)
    return [
        FailedPrompt(row.prompt, problem) if problem else _answered(row, finished[name])
        for (name, problem), row in zip(problems.items(), rows, strict=True)
    ]


def _problem(engine: Engine, request: Request) -> str | None:
    try:
        engine.check(request)
    except PipelineError as error:  # as in `render`
        return str(error)
    return None


def _answered(row: RenderedPrompt, finished: Completion) -> AnsweredPrompt:
    return AnsweredPrompt(row.prompt, row.token_ids + finished.token_ids, len(row.token_ids), finished.finish_reason)
