"""`serve.engine`: another program serves the target and its draft, by itself or behind this server as a gateway."""

import logging
import os
import shlex
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.external import launcher
from pipeline.external.launcher import LaunchedServer
from pipeline.external.serving_engines import ENGINES, Service, ServingEngine
from pipeline.serve import server
from pipeline.serve.auth import is_loopback
from pipeline.workspace.workspace import DRAFT, Workspace

log = logging.getLogger("pipeline")

HEALTH = "/health"
TOKEN_ENGINES = ("sglang_jax", "sglang")  # that take and give tokens, as the gateway needs


def launched_command(workspace: Workspace, port: int) -> list[str]:
    """Returns the command of the engine that the configuration names, behind which the gateway is or nothing.

    Raises PipelineError when the engine cannot serve this, and says beforehand what it cannot do.
    """
    config = workspace.config
    wanted = config.serve
    engine = ENGINES[wanted.engine.value]
    with_draft = wanted.mode.value == "dflash"
    if with_draft:
        if engine.why_not is not None:
            raise PipelineError(f"serve.engine={wanted.engine.value} cannot serve a draft: {engine.why_not}")
        for note in engine.notes:
            log.warning("%s %s: %s (source: %s)", engine.title, engine.version, note, engine.source)
    draft = workspace.open(DRAFT) if with_draft else None
    service = Service(
        target=str(Path(str(workspace.target.path)).resolve()),
        draft=None if draft is None else str(Path(str(draft.path)).resolve()),
        block_size=None if draft is None else draft.contract["draft"]["block_size"],
        precision=config.target.precision.value,
        slots=wanted.slots,
        max_length=config.engine.max_length,
        page_size=config.engine.page_size,
        prefill_chunk=config.engine.step_tokens or 8 * config.engine.prefill_chunk,
        host="127.0.0.1" if wanted.gateway else wanted.host,
        port=port,
        extra=wanted.engine_args,
    )
    return engine.command(wanted.engine_python, service)


def require_launchable(workspace: Workspace) -> None:
    """Raises PipelineError for settings that do not go together with another engine."""
    wanted = workspace.config.serve
    if wanted.gateway:
        if wanted.engine.value not in TOKEN_ENGINES:
            known = " or ".join(TOKEN_ENGINES)
            raise PipelineError(f"serve.gateway stands before {known}; serve.engine is {wanted.engine.value}")
        return
    if not wanted.insecure and not is_loopback(wanted.host):
        raise PipelineError(
            f"serve.host is {wanted.host}, where other machines reach serve.engine={wanted.engine.value} without a "
            "key; set serve.gateway=true, which asks for keys, or serve.insecure=true"
        )


def start(workspace: Workspace, port: int, on_line: Callable[[str], None] = launcher.write_line) -> LaunchedServer:
    """Returns the engine's server, healthy; raises PipelineError when it is missing, another, or does not get there."""
    config = workspace.config
    wanted = config.serve
    engine = ENGINES[wanted.engine.value]
    command = launched_command(workspace, port)
    _require_version(wanted.engine_python, engine)
    unknown = launcher.unknown_flags(command[: engine.program_words], engine.help_flag, command)
    if unknown:
        raise PipelineError(
            f"{engine.title} does not know {', '.join(unknown)}; take what is yours out of serve.engine_args, or start "
            "the engine yourself with what serve.dry_run=true prints"
        )
    log.info("starting %s", shlex.join(command))
    url = server.address("127.0.0.1" if wanted.gateway else wanted.host, port)
    launched = LaunchedServer(command, url=url, on_line=on_line)
    try:
        launched.wait_until_healthy(HEALTH, wanted.engine_start_seconds, log.info)
    except BaseException:  # a signal too: nothing is left behind
        launched.stop()
        raise
    return launched


def run_alone(workspace: Workspace) -> None:
    """Runs the engine's own server until it ends, passes signals on, and ends with its exit status."""
    require_launchable(workspace)
    config = workspace.config
    port = server.free_port(config.serve.host, config.serve.port)
    if config.serve.dry_run:
        print(shlex.join(launched_command(workspace, port)))
        return
    launched = start(workspace, port)
    with launcher.signals_passed_to(launched):
        print(f"{config.serve.engine.value} serves {config.target.name} on {launched.url}")
        print("Ctrl-C ends it", flush=True)
        status = launched.wait()
    if status:
        raise SystemExit(status)


class EngineBehind:
    """Keeps the engine behind a gateway, on a port of its own; raises PipelineError as `start` does.

    When the engine ends by itself this process gets SIGINT, and `status` is what it ended with.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.status: int | None = None
        self._is_wanted = True
        self._launched = start(workspace, server.free_port("127.0.0.1", 0))
        self.url = self._launched.url
        threading.Thread(target=self._watch, daemon=True).start()

    def stop(self) -> None:
        """Ends the engine."""
        self._is_wanted = False
        self._launched.stop()

    def _watch(self) -> None:
        status = self._launched.wait()
        if self._is_wanted:
            self.status = status
            log.error("the engine has ended with %d; the gateway ends too", status)
            os.kill(os.getpid(), signal.SIGINT)


def _require_version(python: str, engine: ServingEngine) -> None:
    found = launcher.version_of(python, engine.package)
    if found != engine.version:
        raise PipelineError(
            f"{python} has {engine.package} {found}; this pipeline knows the flags of {engine.version}: install that "
            "one, or start the engine yourself with the command that serve.dry_run=true prints"
        )
