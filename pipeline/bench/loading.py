"""What a configuration's benchmark runs: its requests, the sizes of its engines, and the models."""

import contextlib
import functools
import logging
from collections.abc import Sequence
from pathlib import Path

from pipeline.artifacts.artifact import Artifact
from pipeline.bench import conversations, servers, workload
from pipeline.bench.arms import PLAIN
from pipeline.bench.engines import Networks
from pipeline.engine.config import EngineConfig
from pipeline.engine.request import Request
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.parallel.runtime import Runtime
from pipeline.prompts import benchmarks
from pipeline.prompts.sources import Prompt
from pipeline.workspace.loading import load_draft, load_target, runtime_for
from pipeline.workspace.specs import effort_of
from pipeline.workspace.workspace import Workspace

log = logging.getLogger("pipeline")


class Models:
    """Loads the target and an exported draft when they are first wanted, and once."""

    def __init__(self, workspace: Workspace, exported: Artifact) -> None:
        self._workspace, self._exported = workspace, exported

    @functools.cached_property
    def loaded(self) -> tuple[TargetModel, DraftModel, Runtime]:
        """The target and the draft on the devices, and how they are split over them."""
        config, directory = self._workspace.config, Path(str(self._exported.path))  # drafts are on a disk
        runtime = runtime_for(config.mesh, self._workspace.target.path, draft=directory)
        target = load_target(config.target, self._workspace.target.path, runtime)
        return target, load_draft(config.target.precision, directory, runtime), runtime

    def networks(self, requests: Sequence[Request]) -> Networks:
        """Returns what engines for these requests are made of."""
        target, draft, runtime = self.loaded
        return Networks(target=target, draft=draft, runtime=runtime, sizes=engine_sizes(self._workspace, requests))


def prompts(workspace: Workspace, exported: Artifact, models: Models) -> list[Prompt]:
    """Returns the prompts that a benchmark is run on: those of its prompt sets, or held-out ones.

    Where questions have several turns, the target answers the ones before the last.
    """
    config = workspace.config
    if not config.bench.prompt_sets:
        return workload.held_out(workspace.prompts.prompts, config.prompts.heldout_fraction)
    asked = [one for name in config.bench.prompt_sets for one in benchmarks.questions(name, config.bench.num_prompts)]
    effort = effort_of(config.prompts, config.seed)
    return conversations.prompts_of(asked, effort, lambda earlier: _final_texts(workspace, exported, models, earlier))


def _final_texts(workspace: Workspace, exported: Artifact, models: Models, earlier: Sequence[Prompt]) -> list[str]:
    """Returns the target's final texts for prompts that later turns follow, by plain decoding."""
    wanted = workspace.config.bench
    log.info("bench: the target answers %d prompts that later turns follow", len(earlier))
    requests = workload.requests_of(
        rendered(workspace, earlier),
        num_prompts=len(earlier),
        max_new_tokens=wanted.max_new_tokens,
        prompt_tokens=None,
    )
    with contextlib.ExitStack() as opened:
        if wanted.plain_url is not None:
            arm = opened.enter_context(servers.server_arms(workspace, exported))(wanted.slots)[PLAIN]
        else:
            arm = models.networks(requests).arm(has_draft=False)
        answers = arm.run(requests).answers
    ordered = [answers[one.request_id].token_ids for one in requests]
    return [conversations.final_text(ids, workspace.tokenizer) for ids in ordered]


def rendered(workspace: Workspace, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Returns the token ids of prompts as they are, however long requests are made."""
    return workload.rendered(prompts, workspace.tokenizer, date=workspace.config.prompts.date)


def requests_for(workspace: Workspace, prompt_ids: Sequence[list[int]]) -> list[Request]:
    """Returns the requests of rendered prompts, as many as are asked for, and says when there are fewer."""
    wanted = workspace.config.bench
    num_prompts = len(prompt_ids) if wanted.prompt_sets else wanted.num_prompts
    requests = workload.requests_of(
        prompt_ids,
        num_prompts=num_prompts,
        max_new_tokens=wanted.max_new_tokens,
        prompt_tokens=wanted.prompt_tokens,
    )
    if wanted.temperature:
        requests = workload.sampled(requests, wanted.temperature, workspace.config.seed)
    if len(requests) < num_prompts:
        log.info("bench: the prompt set holds out %d prompts; all are used", len(requests))
    return requests


def engine_sizes(workspace: Workspace, requests: Sequence[Request]) -> EngineConfig:
    """Returns the sizes of both arms' engines, in which every request fits."""
    config = workspace.config
    return EngineConfig(
        num_slots=config.bench.slots,
        max_length=max(len(request.prompt_ids) + request.max_new_tokens for request in requests),
        prefill_chunk=config.engine.prefill_chunk,
        page_size=config.engine.page_size,
        samples=config.bench.temperature > 0,
        stop_token_ids=workspace.stop_token_ids,
    )
