"""Defines the outcome of a prompt, answered or failed; answers rendered prompts with our engine."""

import dataclasses
from collections.abc import Callable, Sequence

from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.request import Completion, Request
from pipeline.engine.sampling_params import GREEDY, SamplingParams
from pipeline.errors import PipelineError
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.layers.sampling import Sampling
from pipeline.model.parallel.runtime import SINGLE_DEVICE, Runtime
from pipeline.prompts.sources import Prompt
from pipeline.teacher_cache.origin import ENGINE, AnswerOrigin
from pipeline.teacher_cache.render import RenderedPrompt


@dataclasses.dataclass(frozen=True)
class AnsweredPrompt:
    """Holds a prompt and its answer as tokens, of which the first `prompt_tokens` are the prompt's."""

    prompt: Prompt
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class FailedPrompt:
    """Holds a prompt that got no answer, and the reason."""

    prompt: Prompt
    reason: str


OnFinished = Callable[[Completion], None]
Answering = Callable[[Sequence[RenderedPrompt], OnFinished], Sequence[AnsweredPrompt | FailedPrompt]]


def finished(row: RenderedPrompt, answer: tuple[tuple[int, ...], str], on_finished: OnFinished) -> AnsweredPrompt:
    """Returns a prompt with an answer from outside (tokens, and why they end), after reporting that it is finished."""
    token_ids, reason = answer
    completion = Completion(
        request_id=row.prompt.prompt_id, token_ids=token_ids, finish_reason=reason, accepted_per_round=()
    )
    on_finished(completion)
    return _answered(row, completion)


def answer_prompts(
    target: TargetModel,
    rows: Sequence[RenderedPrompt],
    engine_config: EngineConfig,
    *,
    max_new_tokens: int,
    on_finished: OnFinished,
    origin: AnswerOrigin = ENGINE,
    draft: DraftModel | None = None,
    runtime: Runtime = SINGLE_DEVICE,
) -> list[AnsweredPrompt | FailedPrompt]:
    """Returns the target's answers in the order of `rows`, with a FailedPrompt for each that the engine refuses.

    A new engine is built for each call, so that the answers depend on these rows alone and not on what ran before.
    With a draft it decodes by DFLASH, which gives the same answers. Raises PipelineError when the engine refuses all.
    """
    engine = Engine(target, draft, engine_config, runtime)
    keys: Sequence[tuple[int, int] | None]
    keys = origin.keys([row.prompt.prompt_id for row in rows]) or [None] * len(rows)
    requests = [
        Request(
            request_id=str(index),
            prompt_ids=row.token_ids,
            max_new_tokens=max_new_tokens,
            sampling=_params(origin.sampling, key),
        )
        for index, (row, key) in enumerate(zip(rows, keys, strict=True))
    ]
    problems = {request.request_id: _problem(engine, request) for request in requests}
    if all(problems.values()):
        raise PipelineError(f"the target can answer none of {len(rows)} prompts; the first: {problems['0']}")
    completions = {}
    for completion in engine.generate(request for request in requests if not problems[request.request_id]):
        completions[completion.request_id] = completion
        on_finished(completion)
    return [
        FailedPrompt(row.prompt, problem) if problem else _answered(row, completions[name])
        for (name, problem), row in zip(problems.items(), rows, strict=True)
    ]


def _params(sampling: Sampling | None, key: tuple[int, int] | None) -> SamplingParams:
    if sampling is None or key is None:
        return GREEDY
    return SamplingParams(temperature=sampling.temperature, top_p=sampling.top_p, key=key)


def _problem(engine: Engine, request: Request) -> str | None:
    try:
        engine.check(request)
    except PipelineError as error:  # the other prompts of the set can still be answered
        return str(error)
    return None


def _answered(row: RenderedPrompt, completion: Completion) -> AnsweredPrompt:
    token_ids = row.token_ids + completion.token_ids
    return AnsweredPrompt(row.prompt, token_ids, len(row.token_ids), completion.finish_reason)
