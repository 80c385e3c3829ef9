"""`stage=serve` puts the target, alone or with its draft, behind an OpenAI-style HTTP server."""

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipeline import distributed
from pipeline.config.choices import EngineName, ServeMode
from pipeline.config.schema import PipelineConfig, ServeConfig
from pipeline.engine.multihost import PrimaryEngine, follow_primary
from pipeline.errors import PipelineError
from pipeline.serve import auth, launched, server
from pipeline.serve.api import Api
from pipeline.serve.app import create_app
from pipeline.serve.draft_watch import DraftWatch
from pipeline.serve.engine_thread import EngineThread
from pipeline.serve.grammars import Grammars
from pipeline.serve.limits import Limits
from pipeline.serve.loading import engine_of, engine_with
from pipeline.serve.remote_engine import RemoteEngine
from pipeline.serve.replaceable_engine import ReplaceableEngine
from pipeline.serve.request_reader import ServedModel
from pipeline.serve.served_engine import ServedEngine
from pipeline.tracking import registry
from pipeline.tracking.run import Run
from pipeline.workspace import specs
from pipeline.workspace.workspace import DRAFT, Workspace

log = logging.getLogger("pipeline")


def run(config: PipelineConfig, tracker: Run) -> None:
    """Serves until SIGINT or SIGTERM, then logs the acceptance of all that was served.

    Of several hosts the primary serves and the others compute with it.
    """
    config, present = _with_registered_draft(config)
    wanted, workspace = config.serve, Workspace(config)
    is_dflash = wanted.mode is ServeMode.dflash
    if not distributed.is_primary():
        follower = engine_of(workspace, with_draft=is_dflash)
        follower.warm_up()
        follow_primary(follower, Grammars(workspace.tokenizer, follower.vocab_size).compiled)
        return
    _require_comparable(wanted)
    if wanted.engine is not EngineName.own and (wanted.dry_run or not wanted.gateway):
        launched.run_alone(workspace)
        return
    keys = auth.read_keys(wanted.api_keys)
    auth.require_guarded(wanted.host, keys, insecure=wanted.insecure)
    with (
        contextlib.closing(server.bind(wanted.host, wanted.port)) as listener,  # first: a port is soon refused
        _engines(workspace) as engines,
    ):
        served, engine = _served_model(workspace), engines[0]
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
        watch = _watch(config, engine, present)
        try:
            scheme = "http" if wanted.tls_certificate is None else "https"
            _announce(served.name, wanted.mode, server.url(listener, scheme=scheme), has_keys=len(keys) > 0)
            server.serve(serving, listener)
        finally:
            if watch is not None:
                watch.stop()
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


@contextlib.contextmanager
def _engines(workspace: Workspace) -> Iterator[Sequence[ServedEngine]]:
    """Gives the engine that is served, warm, and beside it the one without a draft where both are compared.

    An engine behind a gateway is ended with the server; raises PipelineError when it has ended before.
    """
    wanted = workspace.config.serve
    if wanted.engine is not EngineName.own:
        launched.require_launchable(workspace)
        behind = launched.EngineBehind(workspace)
        try:
            remote = RemoteEngine(
                behind.url, workspace.serving_engine, workspace.model.vocab_size, plain_url=wanted.plain_url
            )
            with contextlib.closing(remote):
                yield [remote]
        finally:
            behind.stop()
        if behind.status is not None:
            raise PipelineError(f"the engine behind the gateway ended with {behind.status}; its log says why")
        return
    engine = engine_of(workspace, with_draft=wanted.mode is ServeMode.dflash)
    engines = [engine, engine.plain_beside()] if wanted.compare else [engine]
    started = time.monotonic()
    for one in engines:
        one.warm_up(lambda name: log.info("ready after %.1f s: %s", time.monotonic() - started, name))
    yield engines if wanted.draft is None else [ReplaceableEngine(engine, engine), *engines[1:]]


def _with_registered_draft(config: PipelineConfig) -> tuple[PipelineConfig, str]:
    """Returns the configuration with the draft of `serve.draft` as `export.path`, and the draft's fingerprint."""
    if config.serve.draft is None:
        return config, ""
    found = registry.resolve(config.serve.draft, uri=config.tracking.uri, output_dir=Path(config.output_dir))
    log.info("serve: %s is version %s, %s", config.serve.draft, found.number, found.source)
    export = dataclasses.replace(config.export, path=found.source)
    return dataclasses.replace(config, export=export), found.fingerprint


def _watch(config: PipelineConfig, engine: ServedEngine, present: str) -> DraftWatch | None:
    """Starts to follow promotions where the draft is named by its address in the registry."""
    if not isinstance(engine, ReplaceableEngine):
        return None

    def find() -> tuple[str, Callable[[], ServedEngine]]:
        changed, found = _with_registered_draft(config)
        return found, lambda: engine_with(engine.first, Workspace(changed))

    watch = DraftWatch(engine, present, find, config.serve.draft_poll_seconds)
    watch.start()
    return watch


def _require_comparable(wanted: ServeConfig) -> None:
    if wanted.compare and wanted.engine is not EngineName.own:
        raise PipelineError(f"serve.compare is true and serve.engine is {wanted.engine.value}; leave either out")
    if wanted.compare and wanted.mode is ServeMode.plain:
        raise PipelineError("serve.compare is true and serve.mode is plain, which serves no draft; leave either out")
    if wanted.compare and distributed.is_multihost():
        raise PipelineError("serve.compare is true on several hosts, which run one engine; leave it out")


def _end(threads: Sequence[EngineThread]) -> None:
    for thread in threads:
        thread.end()


def _report(tracker: Run, api: Api, engine: ServedEngine) -> None:
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
    if temperature is None and wanted.gateway and wanted.mode is ServeMode.dflash and wanted.plain_url is None:
        temperature = 0.0  # all that the engine behind the gateway can do
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
