"""EasyDeL's run-<step> directories: marks complete ones, and takes out what differs between equal runs."""

import json
import shutil
from pathlib import Path

from pipeline.artifacts.files import write_json

COMPLETE = "complete.json"
NO_CLOCK = {"timestamp": "1970-01-01T00:00:00+00:00"}
NO_MACHINE = {"backend": None, "platform": None}  # EasyDeL forgets them itself when it resumes
SETTLED = {"metadata.json": NO_CLOCK, "checkpoint_metadata.json": NO_CLOCK, "config.json": NO_MACHINE}
DROPPED = ("README.md", "easydel-training-arguments.json")  # clocks, device names, absolute paths


def path_of(root: Path, step: int) -> Path:
    """Returns where the run directory of a step is."""
    return root / f"run-{step}"


def settle(run: Path, step: int) -> None:
    """Marks a run directory that is wholly written, after taking out what depends on clock, machine or path.

    What is left is the same for every run that computed the same numbers.
    """
    for name in DROPPED:
        (run / name).unlink(missing_ok=True)
    for name, values in SETTLED.items():
        write_json(run / name, json.loads((run / name).read_text()) | values)
    write_json(run / COMPLETE, {"step": step})


def keep_only(root: Path, run: Path | None) -> None:
    """Deletes every run directory of `root` but `run`: unfinished ones, and those of earlier steps."""
    for other in root.glob("run-*"):
        if other != run:
            shutil.rmtree(other)


def latest(root: Path) -> int:
    """Returns the step of the last complete run directory; 0 without one."""
    return max((json.loads(mark.read_text())["step"] for mark in root.glob(f"run-*/{COMPLETE}")), default=0)
