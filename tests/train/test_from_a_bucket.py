"""Training reads a cache in a bucket as it reads one in a directory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.artifacts import artifact, storage
from pipeline.artifacts.artifact import Artifact
from pipeline.config.fields import CHECKPOINT, TEACHER_CACHE
from pipeline.workspace.workspace import Workspace
from tests.support import buckets
from tests.support import training as tiny_training
from tests.support.compiled import QUICKLY
from tests.support.paths import ROOT

TRAIN = """
import sys
from pathlib import Path
from tests.support import training as tiny_training
from tests.support.recorder import Recorder
from pipeline.artifacts import provenance
from pipeline.train import stage
if __name__ == "__main__":
    provenance.git_commit = lambda: tiny_training.GIT_COMMIT
    config = tiny_training.configuration(Path(sys.argv[1]))
    config.teacher_cache.path = sys.argv[2]
    stage.run(config, Recorder())
"""


def _checkpoint(config: object) -> Artifact:
    path = Workspace(config).address(CHECKPOINT)
    return artifact.read(path, CHECKPOINT, make_with="the test", verify=True)


@pytest.mark.slow
@pytest.mark.parametrize("service", buckets.SERVICES)
def test_the_draft_is_the_same_to_the_byte(service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = tiny_training.trained()
    cache = Workspace(trained).open(TEACHER_CACHE)
    config = tiny_training.configuration(tmp_path)
    (tmp_path / "target").symlink_to(tiny_training.root_of(trained) / "target")
    with buckets.EMULATORS[service]() as (url, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        prefix = storage.parse_path(f"{url}/a/cache")
        for name in storage.list_files(cache.path):
            (prefix / name).write_bytes((cache.path / name).read_bytes())
        config.teacher_cache.path = str(prefix)
        done = subprocess.run(
            [sys.executable, "-c", TRAIN, str(tmp_path), str(prefix)],
            env=os.environ | {"PYTHONPATH": str(ROOT)} | QUICKLY,
            capture_output=True,
            text=True,
            timeout=tiny_training.LIMIT_SECONDS,
        )
        assert done.returncode == 0, done.stderr
        assert _checkpoint(config).fingerprint == _checkpoint(trained).fingerprint
