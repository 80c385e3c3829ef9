"""`stage=serve`: the target, alone or with its draft, behind an OpenAI-style HTTP server."""

import contextlib
import json
import logging
import time

from pipeline import hosts, lineage
from pipeline.artifacts import PipelineError
from pipeline.config import PipelineConfig, ServeMode
from pipeline.machine import machine, read_draft, read_target
from pipeline.model import checkpoints
from pipeline.prompts.chat_format import stop_token_ids
from pipeline.prompts.tokenizer import load_tokenizer
from pipeline.serve import server
from pipeline.serve.api import Api, create_app
from pipeline.serve.engine import Draft, Engine
from pipeline.serve.leading import LeadingEngine, follow
from pipeline.serve.worker import Worker
from pipeline.tracking import Run

log = logging.getLogger("pipeline")


def run(config: PipelineConfig, tracker: Run) -> None:
    """Serve until SIGINT or SIGTERM, then log the acceptance of all that was served.

    Of several hosts the first one serves and the others compute with it.
    """
    wanted = config.serve
    if not hosts.is_first():
        target = lineage.target(config)
        engine = _engine(config, target, stop_token_ids(load_tokenizer(target.path)))
        engine.warm_up()
        follow(engine)
        return
    with contextlib.closing(server.bind(wanted.host, wanted.port)) as listener:  # first: a port is soon refused
        target = lineage.target(config)
        tokenizer = load_tokenizer(target.path)
        engine = _engine(config, target, stop_token_ids(tokenizer))
        started = time.monotonic()
        engine.warm_up()
        log.info("compiled and warmed up in %.1f s", time.monotonic() - started)
        leads = isinstance(engine, LeadingEngine)
        if leads:
            engine.lead()

        worker = Worker(engine, engine.keep_waiting if leads else None)
        effort = lineage.default_effort(config)
        api = Api(worker, engine, tokenizer, model=config.target.name, effort=effort, date=wanted.date)
        serving = server.create_server(create_app(api), listener, cut=worker.end)
        worker.start()
        try:
            _announce(config.target.name, wanted.mode, server.url(listener))
            server.serve(serving, listener)
        finally:
            if not worker.stop():
                log.warning("the engine did not end its last step in time")
            elif leads:
                engine.end()
    seen = engine.acceptance
    tracker.log_metrics({f"serve/{name}": count for name, count in _counts(api).items()})
    if engine.block_size is not None and seen.num_rounds:
        tracker.log_metrics(seen.metrics())
        log.info(
            "%d rounds, accept_length %.2f, accept_rate %.3f", seen.num_rounds, seen.accept_length, seen.accept_rate
        )
    if worker.failure is not None:
        raise PipelineError(f"the engine failed while serving: {worker.failure}; the log above has the traceback")


def _engine(config: PipelineConfig, target: lineage.Target, stop_ids: list[int]) -> Engine:
    wanted = config.serve
    model = checkpoints.read_config(target.path)
    limit = model.get("max_position_embeddings")
    if limit is not None and wanted.max_length > limit:  # before the weights are read
        raise PipelineError(
            f"serve.max_length is {wanted.max_length}; {config.target.name} has {limit} positions "
            f"(max_position_embeddings); set serve.max_length to {limit} or less"
        )
    drafted = lineage.exported_draft(config, target) if wanted.mode is ServeMode.dflash else None
    here = machine(config.mesh, target.path, draft=None if drafted is None else drafted.path)
    target_config, weights = read_target(config, target.path, here)
    draft = None
    if drafted is not None:
        draft_config, draft_weights = read_draft(config, drafted.path, here)
        draft = Draft(draft_weights, draft_config)
    kind = LeadingEngine if hosts.are_several() and hosts.is_first() else Engine
    return kind(
        weights,
        target_config,
        stop_token_ids=stop_ids,
        slots=wanted.slots,
        max_length=wanted.max_length,
        prefill_chunk=wanted.prefill_chunk,
        draft=draft,
        run=here.run,
        mesh=here.mesh,
    )


def _counts(api: Api) -> dict[str, int]:
    counters = api.counters
    return {
        "requests": sum(counters.requests.values()),
        "prompt_tokens": counters.prompt_tokens,
        "generated_tokens": counters.generated_tokens,
    }


def _announce(name: str, mode: ServeMode, address: str) -> None:
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "What is 17 + 25?"}]})
    print(f"serving {name} ({mode.value}) on {address}")
    print(f"try: curl {address}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'")
    print("Ctrl-C ends it", flush=True)
