"""Runs `stage=all`: a process per stage, which ends with its parent."""

import os
import signal
import subprocess
import sys
import threading
import time

from hydra.core.hydra_config import HydraConfig

from pipeline.cli.stages import STAGES_OF_ALL
from pipeline.config.choices import Stage
from pipeline.tracking.run import Run

PARENT_RUN_ID = "PIPELINE_PARENT_RUN_ID"  # environment variable: set by `all` for the stages that it starts


class StageFailed(Exception):
    """Says that a stage that `all` started ended with `code`; the stage has printed why."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def run_all(tracker: Run) -> None:
    """Runs the stages one after the other, each in a process of its own.

    Of its own, because importing EasyDeL rewrites XLA_FLAGS and other variables of its process, and because a
    GPU or TPU belongs to one process at a time, which gives its memory back only when it ends.
    """
    seconds: dict[str, float] = {}
    for stage in STAGES_OF_ALL:
        started = time.monotonic()
        code = _run_in_process(stage, tracker.run_id)
        if code:
            ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed (exit code {code})"
            raise StageFailed(
                f"stage={stage.value} {ended}; the stages after it did not run; the same command goes on from there",
                128 - code if code < 0 else code,
            )
        seconds[stage.value] = time.monotonic() - started
        tracker.log_metrics({f"all/{stage.value}_seconds": seconds[stage.value]})
    widths = max(map(len, seconds)) + 2
    print("\n".join(f"{name:<{widths}}{value:8.1f} s" for name, value in seconds.items()))
    print(f"{'all':<{widths}}{sum(seconds.values()):8.1f} s")


def _run_in_process(stage: Stage, parent_run_id: str) -> int:
    """Runs one stage with this command's overrides; returns its exit code, negative when a signal killed it.

    The stage holds the read end of our pipe as its stdin and ends when that closes, so that it never outlives us.
    """
    sources = HydraConfig.get().runtime.config_sources
    folders = [f"--config-dir={source.path}" for source in sources if source.provider == "command-line"]
    overrides = [text for text in HydraConfig.get().overrides.task if text.split("=", 1)[0].lstrip("+") != "stage"]
    command = [sys.executable, "-m", "pipeline", *folders, f"stage={stage.value}", *overrides]
    sys.stdout.flush()
    environment = os.environ | {PARENT_RUN_ID: parent_run_id}
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise


def live_and_die_with_parent() -> None:
    """Leaves Ctrl-C, in a stage of `all`, to the parent, which sends SIGTERM, and ends when the parent has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        os._exit(1)  # like kill -9, which every stage withstands: two of them must never write the same artifact

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()
