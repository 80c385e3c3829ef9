"""The tiny target that the package has ready trained, so that a demo begins with one that answers."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.artifacts.hashing import file_sha256
from pipeline.errors import PipelineError

DIRECTORY = Path(__file__).with_name("tiny")
WEIGHTS, RECORD = "model.safetensors", "training.json"
FROM_SCRATCH = "target.pretrain.from_scratch=true"


def copy(directory: Path, scratch: Path, sha256: str, settings: Mapping[str, Any]) -> None:
    """Copies the trained target in `directory` into `scratch`.

    Raises PipelineError when the weights do not have this sha256, when another file is not what the record says, or
    when the target was trained with other settings than these.
    """
    path = directory / RECORD
    if not path.is_file():
        raise PipelineError(f"{path} is missing: the package is incomplete; install it again, or set {FROM_SCRATCH}")
    record = json.loads(path.read_text(encoding="utf-8"))
    _require_settings(record["settings"], settings)
    for name, wanted in (record["files"] | {WEIGHTS: sha256}).items():
        found = file_sha256(directory / name) if (directory / name).is_file() else "missing"
        if found != wanted:
            raise PipelineError(
                f"{directory / name} has sha256 {found}, wanted {wanted}: the package is damaged; install it again, or "
                f"set {FROM_SCRATCH}"
            )
        shutil.copyfile(directory / name, scratch / name)


def _require_settings(trained_with: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    names = sorted(name for name in trained_with.keys() | wanted.keys() if trained_with.get(name) != wanted.get(name))
    if names:
        listed = "\n  ".join(f"{name}: {trained_with.get(name)}, wanted {wanted.get(name)}" for name in names)
        raise PipelineError(
            f"the trained target of the package has other settings than these; set {FROM_SCRATCH} to train one with "
            f"them\n  {listed}"
        )
