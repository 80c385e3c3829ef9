"""Prompts to tokens, and the target's own answers to them."""

import dataclasses
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from pipeline.artifacts import PipelineError
from pipeline.machine import ONE_DEVICE, Machine
from pipeline.model.gpt_oss_config import GptOssConfig
from pipeline.model.gpt_oss_weights import GptOssWeights
from pipeline.prompts.chat_format import prompt_token_ids
from pipeline.prompts.sources import Prompt
from pipeline.serve.engine import Engine, Finished
from pipeline.serve.scheduler import Request
from pipeline.teacher_cache.origin import ENGINE, Origin

PREFILL_CHUNK = 64
SHOWN_SKIPS = 5


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A prompt and its tokens; `skipped` tells why it is left out, None when it is used."""

    prompt: Prompt
    token_ids: tuple[int, ...]
    skipped: str | None


@dataclasses.dataclass(frozen=True)
class Answered:
    """A prompt with the target's answer: all tokens, of which `prompt_tokens` are the prompt's."""

    prompt: Prompt
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class Failed:
    """A prompt that got no answer, and why."""

    prompt: Prompt
    reason: str


def render(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], max_prompt_tokens: int, split: str, *, date: str
) -> list[Rendered]:
    """Every prompt of a split in Harmony's tokens on the day `date`, each usable or marked with why it is skipped.

    Raises PipelineError when none is usable.
    """
    rendered = [_render(tokenizer, prompt, max_prompt_tokens, date) for prompt in prompts]
    if all(row.skipped for row in rendered):
        reasons = "\n  ".join(f"{row.prompt.prompt_id[:12]}: {row.skipped}" for row in rendered[:SHOWN_SKIPS])
        raise PipelineError(
            f"none of the {len(rendered)} {split} prompts can be used; raise teacher_cache.max_prompt_tokens or give "
            f"other prompts\n  {reasons}"
        )
    return rendered


def _render(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, max_prompt_tokens: int, date: str) -> Rendered:
    try:
        token_ids = tuple(prompt_token_ids(tokenizer, prompt, date=date))
    except PipelineError as error:  # one unusable prompt of a large set is told, counted and left out
        return Rendered(prompt, (), str(error))
    if len(token_ids) > max_prompt_tokens:
        return Rendered(prompt, token_ids, f"{len(token_ids)} tokens, at most {max_prompt_tokens} are wanted")
    return Rendered(prompt, token_ids, None)


def answer(
    weights: GptOssWeights,
    config: GptOssConfig,
    rows: Sequence[Rendered],
    *,
    stop_token_ids: Sequence[int],
    slots: int,
    max_prompt_tokens: int,
    max_new_tokens: int,
    on_finished: Callable[[Finished], None],
    origin: Origin = ENGINE,
    here: Machine = ONE_DEVICE,
) -> list[Answered | Failed]:
    """The target's answers, in the order of `rows`; a prompt that the engine refuses has failed.

    The engine is made anew, so that the answers depend on these rows alone and not on what ran before. Raises
    PipelineError when it refuses all.
    """
    engine = Engine(
        weights,
        config,
        stop_token_ids=stop_token_ids,
        slots=slots,
        max_length=max_prompt_tokens + max_new_tokens,
        prefill_chunk=min(PREFILL_CHUNK, max_prompt_tokens),
        sampling=origin.sampling,
        run=here.run,
        mesh=here.mesh,
    )
    keys = origin.keys([row.prompt.prompt_id for row in rows]) or [None] * len(rows)
    requests = [
        Request(request_id=str(index), prompt_ids=row.token_ids, max_new_tokens=max_new_tokens, key=keys[index])
        for index, row in enumerate(rows)
    ]
    problems = {request.request_id: _problem(engine, request) for request in requests}
    if all(problems.values()):
        raise PipelineError(f"the target can answer none of {len(rows)} prompts; the first: {problems['0']}")
    finished = {}
    for one in engine.generate(request for request in requests if not problems[request.request_id]):
        finished[one.request_id] = one
        on_finished(one)
    return [
        Failed(row.prompt, problems[name]) if problems[name] else _answered(row, finished[name])
        for name, row in zip(problems, rows, strict=True)
    ]


def _problem(engine: Engine, request: Request) -> str | None:
    try:
        engine.check(request)
    except PipelineError as error:  # as in `render`
        return str(error)
    return None


def _answered(row: Rendered, finished: Finished) -> Answered:
    return Answered(row.prompt, row.token_ids + finished.token_ids, len(row.token_ids), finished.finish_reason)
