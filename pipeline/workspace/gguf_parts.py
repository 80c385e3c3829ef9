"""Finds the files of a GGUF, which llama.cpp may have split, and identifies them by their content."""

import re
from pathlib import Path

from pipeline.artifacts.hashing import fingerprint_of, remembered_sha256
from pipeline.errors import PipelineError

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def parts_of(path: Path) -> list[Path]:
    """Returns the file, or all parts of a split one, whichever of them is named.

    Raises PipelineError that names the parts that are not there.
    """
    match = _SPLIT.fullmatch(path.name)
    names = [path.name]
    if match is not None:
        count = int(match["count"])
        names = [f"{match['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    found = [path.with_name(name) for name in names]
    absent = [part.name for part in found if not part.is_file()]
    if absent and len(found) > 1:
        raise PipelineError(f"target.gguf is {path}; {', '.join(absent)} of its {len(found)} parts is not beside it")
    if absent:
        raise PipelineError(f"target.gguf is {path}, which is no file; give the path of the GGUF file")
    return found


def content_sha256(path: Path, memory: Path | None) -> str:
    """Returns the sha256 of the file, or one of all parts together; `memory` is as in `remembered_sha256`."""
    sha256s = [remembered_sha256(part, memory) for part in parts_of(path)]
    return sha256s[0] if len(sha256s) == 1 else fingerprint_of(sha256s)
