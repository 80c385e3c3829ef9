"""`stage=serve` puts the target, alone or with its draft, behind an OpenAI-style HTTP server."""

import contextlib
import json
import logging
import time
from collections.abc import Sequence

from pipeline import distributed
from pipeline.config.choices import ServeMode
from pipeline.config.schema import PipelineConfig, ServeConfig
from pipeline.engine.engine import Engine
from pipeline.engine.multihost import PrimaryEngine, follow_primary
from pipeline.errors import PipelineError
from pipeline.serve import auth, server
from pipeline.serve.api import Api
from pipeline.serve.app import create_app
from pipeline.serve.engine_thread import EngineThread
from pipeline.serve.grammars import Grammars
from pipeline.serve.limits import Limits
from pipeline.serve.loading import engine_of
from pipeline.serve.request_reader import ServedModel
from pipeline.tracking.run import Run
from pipeline.workspace import specs
from pipeline.workspace.workspace import DRAFT, Workspace

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
        follow_primary(engine, Grammars(workspace.tokenizer, engine.vocab_size).compiled)
        return
    keys = auth.read_keys(wanted.api_keys)
    auth.require_guarded(wanted.host, keys, insecure=wanted.insecure)
    _require_comparable(wanted)
    with contextlib.closing(server.bind(wanted.host, wanted.port)) as listener:  # first: a port is soon refused
        served, engine = _served_model(workspace), engine_of(workspace, with_draft=is_dflash)
        engines = [engine, engine.plain_beside()] if wanted.compare else [engine]
        started = time.monotonic()
        for one in engines:
            one.warm_up(lambda name: log.info("ready after %.1f s: %s", time.monotonic() - started, name))
        primary = engine if isinstance(engine, PrimaryEngine) else None
        if primary is not None:
            primary.start_broadcasting()
        if is_dflash:
            _warn_of_effort(workspace, served.effort)
        threads = [EngineThread(one, None if primary is None else primary.broadcast_idle) for one in engines]
        limits = Limits(
            max_body_bytes=wanted.max_body_bytes,
            max_waiting=wanted.max_waiting,
            max_connections=wanted.max_connections,
            client_seconds=wanted.client_seconds,
            max_requests_per_key=wanted.max_requests_per_key,
            request_seconds=wanted.request_seconds,
        )
        apis = [
            Api(thread, one, workspace.tokenizer, served, limits) for thread, one in zip(threads, engines, strict=True)
        ]
        app = create_app(
            apis[0],
            keys=keys,
            plain=apis[1] if wanted.compare else None,
            cors_origins=wanted.cors_origins,
            logs_requests=wanted.log_requests,
        )
        serving = server.create_server(
            app,
            listener,
            cut=lambda: _end(threads),
            limits=limits,
            on_drain=lambda: _drain(apis),
            drain_seconds=wanted.drain_seconds,
            certificate=_certificate(wanted),
        )
        for thread in threads:
            thread.start()
        try:
            scheme = "http" if wanted.tls_certificate is None else "https"
            _announce(served.name, wanted.mode, server.url(listener, scheme=scheme), has_keys=len(keys) > 0)
            server.serve(serving, listener)
        finally:
            _end(threads)
            have_ended = [thread.stop() for thread in threads]
            if not all(have_ended):
                log.warning("the engine did not end its last step in time")
            elif primary is not None:
                primary.shut_down_followers()
    _report(tracker, apis[0], engine)
    failure = next((thread.failure for thread in threads if thread.failure is not None), None)
    if failure is not None:
        raise PipelineError(f"the engine failed while serving: {failure}; the log has the traceback")


def _require_comparable(wanted: ServeConfig) -> None:
    if wanted.compare and wanted.mode is ServeMode.plain:
        raise PipelineError("serve.compare is true and serve.mode is plain, which serves no draft; leave either out")
    if wanted.compare and distributed.is_multihost():
        raise PipelineError("serve.compare is true on several hosts, which run one engine; leave it out")


def _end(threads: Sequence[EngineThread]) -> None:
    for thread in threads:
        thread.end()


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


def _served_model(workspace: Workspace) -> ServedModel:
    wanted = workspace.config.serve
    temperature = wanted.default_temperature
    return ServedModel(
        name=workspace.config.target.name,
        effort=wanted.reasoning_effort.value,
        temperature=specs.default_temperature(workspace.target.path) if temperature is None else temperature,
        date=wanted.date,
    )


def _warn_of_effort(workspace: Workspace, effort: str) -> None:
    """Says when requests that name no effort get one that the draft was not trained for."""
    trained = workspace.open(DRAFT).contract["text"]["reasoning_efforts"]
    if trained and effort not in trained:
        log.warning(
            "serve.reasoning_effort is %s and the draft was trained on answers at %s: it will accept less; set "
            "serve.reasoning_effort, or train it with prompts.effort=mixed",
            effort,
            ", ".join(trained),
        )


def _certificate(wanted: ServeConfig) -> tuple[str, str] | None:
    if wanted.tls_certificate is None or wanted.tls_key is None:
        return None
    return wanted.tls_certificate, wanted.tls_key


def _drain(apis: Sequence[Api]) -> None:
    """Takes no request any more; called in a signal handler."""
    for api in apis:
        api.is_draining = True
    running = sum(api.engine.num_running + api.engine.num_waiting for api in apis)
    log.info("finishing %d requests; a second signal ends them", running)


def _announce(name: str, mode: ServeMode, address: str, *, has_keys: bool) -> None:
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "What is 17 + 25?"}], "temperature": 0})
    key = " -H 'Authorization: Bearer KEY'" if has_keys else ""
    print(f"serving {name} ({mode.value}) on {address}")
    print(f"in a browser: {address}/")
    print(f"try: curl {address}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'")
    print("Ctrl-C ends it", flush=True)
