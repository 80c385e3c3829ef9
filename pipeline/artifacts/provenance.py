"""Records what made an artifact: stage, settings, parents, and the versions of this program and its packages."""

import functools
import importlib.metadata
import re
import subprocess
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DISTRIBUTION = "gpt-oss-dflash"
SOURCE = Path(__file__).resolve().parents[1]  # the package
UNKNOWN = "unknown"


def provenance(stage: str, config: Mapping[str, Any], parents: Mapping[str, str]) -> dict[str, Any]:
    """Returns what makes an artifact: stage, settings, git commit, package versions, parents' fingerprints.

    No clock and no host name: an artifact made twice has the same bytes.
    """
    return {
        "stage": stage,
        "config": dict(config),
        "git_commit": git_commit(),
        "packages": package_versions(),
        "parents": dict(parents),
    }


def version() -> str:
    """Returns the version of this program; `unknown` for a package folder that was copied by hand."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return str(_project().get("version", UNKNOWN))


@functools.cache
def git_commit() -> str:
    """Returns the commit of the source that runs, `-dirty` where files of it were changed since.

    It is `unknown` where that source is in no repository: installed, or copied below somebody else's.
    """
    is_tracked = _git("ls-files", "--error-unmatch", "artifacts/provenance.py") is not None
    commit = _git("rev-parse", "HEAD") if is_tracked else None
    if not commit:
        return UNKNOWN
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(top)conf")
    return f"{commit}-dirty" if changed else commit


def package_versions() -> dict[str, str | None]:
    """Returns the installed versions of what this program requires; null for what is not installed."""
    return {name: _installed_version(name) for name in _required()}


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _required() -> list[str]:
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        requirements = _project().get("dependencies", [])
    always = [requirement for requirement in requirements if "extra ==" not in requirement]
    names = {re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0] for requirement in always}
    return sorted({*names, "jaxlib"})


@functools.cache
def _project() -> dict[str, Any]:
    """Returns the [project] table of a checkout that is not installed."""
    file = SOURCE.parent / "pyproject.toml"
    return tomllib.loads(file.read_text()).get("project", {}) if file.is_file() else {}


def _git(*arguments: str) -> str | None:
    """Returns what git answers about the package's folder, or None where it fails."""
    try:
        answer = subprocess.run(["git", *arguments], cwd=SOURCE, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
