"""`stage=serve` puts the target, alone or with its draft, behind an OpenAI-style HTTP server."""

import contextlib
import json
import logging
import time

from pipeline import distributed
from pipeline.config.choices import ServeMode
from pipeline.config.schema import PipelineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.multihost import PrimaryEngine, follow_primary
from pipeline.errors import PipelineError
from pipeline.serve import server
from pipeline.serve.api import Api, create_app
from pipeline.serve.engine_thread import EngineThread
from pipeline.serve.loading import engine_of
from pipeline.tracking.run import Run
from pipeline.workspace.workspace import Workspace

log = logging.getLogger("pipeline")


def run(config: PipelineConfig, tracker: Run) -> None:
    """Serves until SIGINT or SIGTERM, then logs the acceptance of all that was served.

    Of several hosts the primary serves and the others compute with it.
    """
    wanted, workspace = config.serve, Workspace(config)
    is_dflash = wanted.mode is ServeMode.dflash
    if not distributed.is_primary():
        engine = engine_of(workspace, with_draft=is_dflash)
        engine.warm_up()
        follow_primary(engine)
        return
    with contextlib.closing(server.bind(wanted.host, wanted.port)) as listener:  # first: a port is soon refused
        engine = engine_of(workspace, with_draft=is_dflash)
        started = time.monotonic()
        engine.warm_up()
        log.info("compiled and warmed up in %.1f s", time.monotonic() - started)
        primary = engine if isinstance(engine, PrimaryEngine) else None
        if primary is not None:
            primary.start_broadcasting()

        engine_thread = EngineThread(engine, None if primary is None else primary.broadcast_idle)
        api = Api(
            engine_thread,
            engine,
            workspace.tokenizer,
            model=config.target.name,
            effort=wanted.reasoning_effort.value,
            date=wanted.date,
        )
        serving = server.create_server(create_app(api), listener, cut=engine_thread.end)
        engine_thread.start()
        try:
            _announce(config.target.name, wanted.mode, server.url(listener))
            server.serve(serving, listener)
        finally:
            if not engine_thread.stop():
                log.warning("the engine did not end its last step in time")
            elif primary is not None:
                primary.shut_down_followers()
    _report(tracker, api, engine)
    if engine_thread.failure is not None:
        raise PipelineError(f"the engine failed while serving: {engine_thread.failure}; the log has the traceback")


def _report(tracker: Run, api: Api, engine: Engine) -> None:
    counters, seen = api.counters, engine.acceptance
    tracker.log_metrics(
        {
            "serve/requests": sum(counters.requests.values()),
            "serve/prompt_tokens": counters.prompt_tokens,
            "serve/generated_tokens": counters.generated_tokens,
        }
    )
    if engine.block_size is not None and seen.num_rounds:
        tracker.log_metrics(seen.metrics())
        log.info(
            "%d rounds, accept_length %.2f, accept_rate %.3f", seen.num_rounds, seen.accept_length, seen.accept_rate
        )


def _announce(name: str, mode: ServeMode, address: str) -> None:
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "What is 17 + 25?"}]})
    print(f"serving {name} ({mode.value}) on {address}")
    print(f"try: curl {address}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'")
    print("Ctrl-C ends it", flush=True)
