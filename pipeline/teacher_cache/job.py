"""Plans the work of one teacher_cache command: renders prompts, plans shards, loads the target that answers."""

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.artifacts import artifact
from pipeline.artifacts.hashing import fingerprint_of
from pipeline.artifacts.storage import StoragePath
from pipeline.engine.config import EngineConfig
from pipeline.errors import PipelineError
from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.hf.directory import read_draft_config
from pipeline.model.layers.sampling import Sampling
from pipeline.prompts.channels import channel_tokens
from pipeline.prompts.chat_format import chat_format_of
from pipeline.prompts.split import split_by_hash
from pipeline.store.layout import NO_FEATURES, SPLITS, CacheLayout
from pipeline.teacher_cache import shards
from pipeline.teacher_cache.answer import Answering
from pipeline.teacher_cache.answer_reader import AnswerReader
from pipeline.teacher_cache.origin import AnswerOrigin
from pipeline.teacher_cache.render import RenderedPrompt, render_prompts
from pipeline.teacher_cache.row_answers import RowAnswers
from pipeline.teacher_cache.shards import ShardPlan, Teacher
from pipeline.teacher_cache.summary import PROMPTS
from pipeline.teacher_cache.writers import Writer
from pipeline.workspace import settings, specs
from pipeline.workspace.loading import load_draft, load_target, runtime_for
from pipeline.workspace.workspace import TEACHER_CACHE, Workspace

log = logging.getLogger("pipeline")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheJob:
    """Holds which shards are to be made of which prompts, and where; `staging` holds a shard before its upload."""

    workspace: Workspace
    path: StoragePath
    layout: CacheLayout
    rows: dict[str, list[RenderedPrompt]]
    plans: list[ShardPlan]
    writer: Writer
    staging: Path

    @property
    def root(self) -> StoragePath:
        """Returns the directory or prefix in which the cache is built."""
        return artifact.scratch_of(self.path)

    @property
    def draft(self) -> DFlashConfig:
        """Returns the config of the draft whose tapped layers are stored."""
        return self.workspace.draft_config


def job_of(workspace: Workspace) -> CacheJob:
    """Returns the job of this configuration: its prompts are rendered, nothing is answered yet."""
    config, draft = workspace.config, workspace.draft_config
    _require_positions(workspace)
    path, decided = workspace.address(TEACHER_CACHE), workspace.settings(TEACHER_CACHE)
    rows = rendered_prompts(workspace)
    writer = Writer(config.teacher_cache.writer, config.teacher_cache.num_writers)
    # a shard of an interrupted run is reused only with these settings and this very target
    made_from = {"settings": decided, "target": workspace.target.fingerprint}
    return CacheJob(
        workspace=workspace,
        path=path,
        layout=_layout(settings.feature_store(config).value, draft),
        rows=rows,
        plans=shards.plan_shards(artifact.scratch_of(path), rows, config.teacher_cache.shard_sequences, made_from),
        writer=writer,
        staging=workspace.root / TEACHER_CACHE / f"{fingerprint_of(made_from)[:12]}-{writer.index}.upload",
    )


def rendered_prompts(workspace: Workspace) -> dict[str, list[RenderedPrompt]]:
    """Returns every prompt of every split as tokens; logs how many are used and why the others are not."""
    prompts, longest = workspace.config.prompts, workspace.config.teacher_cache.max_prompt_tokens
    found = workspace.prompts
    sides = split_by_hash(found.prompts, prompts.heldout_fraction)
    rows = {
        split: render_prompts(workspace.tokenizer, side, longest, split, date=prompts.date)
        for split, side in zip(SPLITS, sides, strict=True)
    }
    skipped = [row for split_rows in rows.values() for row in split_rows if row.skipped]
    used = {split: sum(row.skipped is None for row in split_rows) for split, split_rows in rows.items()}
    log.info(
        "teacher_cache: %d prompts = %d train + %d held out + %d skipped (and %d repeated, %d over prompts.count)",
        len(found.prompts),
        used["train"],
        used["heldout"],
        len(skipped),
        found.num_duplicates,
        found.num_over,
    )
    if skipped:
        first = skipped[0]
        log.warning(
            "teacher_cache: %d prompts are skipped, all of them listed in %s; the first, %s: %s",
            len(skipped),
            PROMPTS,
            first.prompt.prompt_id[:12],
            first.skipped,
        )
    return rows


def teacher_of(workspace: Workspace) -> Teacher:
    """Returns the target of this configuration and how it answers; its weights are read."""
    config, wanted = workspace.config, workspace.config.teacher_cache
    directory = workspace.answering_draft
    if directory is not None:
        specs.require_fitting(read_draft_config(directory), workspace.model, directory, key="teacher_cache.draft")
    runtime = runtime_for(config.mesh, workspace.target.path, draft=directory)
    stored, origin = settings.feature_store(config).value, answer_origin(workspace)
    return Teacher(
        target=load_target(config.target, workspace.target.path, runtime),
        engine=EngineConfig(
            num_slots=wanted.slots,
            max_length=wanted.max_prompt_tokens + wanted.max_new_tokens,
            prefill_chunk=min(config.engine.prefill_chunk, wanted.max_prompt_tokens),
            page_size=config.engine.page_size,
            samples=origin.sampling is not None,
            stop_token_ids=workspace.stop_token_ids,
        ),
        tapped_layers=workspace.draft_config.tapped_layers if stored != NO_FEATURES else (),
        channel_tokens=channel_tokens(workspace.tokenizer),
        max_new_tokens=wanted.max_new_tokens,
        origin=origin,
        draft=None if directory is None else load_draft(config.target.precision, directory, runtime),
        runtime=runtime,
    )


def answer_origin(workspace: Workspace) -> AnswerOrigin:
    """Returns who writes the answers of this configuration's cache, and how their tokens are chosen."""
    cache = workspace.config.teacher_cache
    host = settings.endpoint_host(workspace.config)
    return AnswerOrigin(
        endpoint=None if host is None else f"{cache.openai.model} at {host}",
        rows=settings.answer_rows(workspace.config),
        sampling=Sampling(cache.temperature, cache.top_p) if cache.temperature else None,
        seed=workspace.config.seed,
    )


def outside_answers(job: CacheJob, missing: Sequence[ShardPlan], reply_log: Path) -> Answering | None:
    """Returns a function that returns answers from outside to prompts of `missing`; None where our engine answers.

    Raises PipelineError when too many prompts have none.
    """
    workspace = job.workspace
    origin, longest = answer_origin(workspace), workspace.config.teacher_cache.max_new_tokens
    reader = AnswerReader(workspace.tokenizer, workspace.stop_token_ids, longest)
    if origin.endpoint is not None:
        return _fetch(workspace, reader, missing, reply_log)
    if origin.rows is None:
        return None
    answers = RowAnswers(workspace.prompts.answers, reader, origin.rows)
    if missing:  # all are judged: which are missing depends on where an earlier run ended
        answers.require_enough([row for plan in job.plans for row in plan.rows])
    return answers.answer


def _fetch(workspace: Workspace, reader: AnswerReader, missing: Sequence[ShardPlan], reply_log: Path) -> Answering:
    """Fetches the endpoint's answers to the prompts of all missing shards; returns what `outside_answers` does."""
    wanted = workspace.config.teacher_cache
    from pipeline.teacher_cache.endpoint import Endpoint, EndpointClient  # imported late: openai takes a second
    from pipeline.teacher_cache.endpoint_replies import EndpointApi, RequestTemplate

    endpoint = Endpoint(
        url=str(wanted.openai.url),
        key=os.environ.get(wanted.openai.api_key_env),
        concurrency=wanted.openai.concurrency,
        timeout_seconds=wanted.openai.timeout_seconds,
        retries=wanted.openai.retries,
    )
    template = RequestTemplate(
        api=EndpointApi[wanted.openai.api.value],
        model=str(wanted.openai.model),
        origin=answer_origin(workspace),
        max_new_tokens=wanted.max_new_tokens,
        has_efforts=chat_format_of(workspace.tokenizer).has_efforts,
        extra=wanted.openai.extra,
    )
    client = EndpointClient(endpoint, template, reader, reply_log)
    client.fetch([row for plan in missing for row in plan.rows])
    return client.answer


def _layout(stored: str, draft: DFlashConfig) -> CacheLayout:
    if stored == NO_FEATURES:
        return CacheLayout(stored=stored, feature_size=0, num_tapped=0)
    return CacheLayout(stored=stored, feature_size=draft.feature_size, num_tapped=len(draft.tapped_layers))


def _require_positions(workspace: Workspace) -> None:
    cache, positions = workspace.config.teacher_cache, workspace.model.max_position_embeddings
    wanted = cache.max_prompt_tokens + cache.max_new_tokens
    if wanted > positions:
        raise PipelineError(
            f"teacher_cache.max_prompt_tokens + teacher_cache.max_new_tokens is {wanted}; the target has "
            f"{positions} positions: lower either"
        )
    block_size = workspace.draft_config.block_size
    if cache.max_new_tokens <= block_size:  # the check of the cache could not look at a single block
        raise PipelineError(
            f"teacher_cache.max_new_tokens is {cache.max_new_tokens}; it must be above the draft's block size "
            f"({block_size}), so that an answer can hold a whole block after its first token"
        )
