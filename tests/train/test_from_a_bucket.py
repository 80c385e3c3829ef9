"""Training reads a cache in a bucket as it reads one in a directory."""

import os
import subprocess
import sys
from pathlib import Path

import buckets
import pytest
import tiny_training

from pipeline import artifacts, lineage, places
from pipeline.artifacts import Artifact

TRAIN = """
import sys
from pathlib import Path
import tiny_training
from pipeline import artifacts
from pipeline.train import stage
if __name__ == "__main__":
    artifacts.git_commit = lambda: tiny_training.GIT_COMMIT
    config = tiny_training.configuration(Path(sys.argv[1]))
    config.teacher_cache.path = sys.argv[2]
    stage.run(config, tiny_training.Recorder())
"""


def _checkpoint(config: object) -> Artifact:
    path = lineage.checkpoint_address(config, lineage.target(config))
    return artifacts.read(path, lineage.CHECKPOINT, make_with="the test", verify=True)


@pytest.mark.slow
@pytest.mark.parametrize("service", buckets.EMULATORS)
def test_the_draft_is_the_same_to_the_byte(service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = tiny_training.trained()
    cache = lineage.teacher_cache(trained, lineage.target(trained))
    config = tiny_training.configuration(tmp_path)
    (tmp_path / "target").symlink_to(tiny_training.root_of(trained) / "target")
    with buckets.EMULATORS[service]() as (url, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        place = places.place_of(f"{url}/a/cache")
        for name in places.files(cache.path):
            (place / name).write_bytes((cache.path / name).read_bytes())
        config.teacher_cache.path = str(place)
        where = os.pathsep.join(str(Path(tiny_training.__file__).parents[part]) for part in (0, 1))
        done = subprocess.run(
            [sys.executable, "-c", TRAIN, str(tmp_path), str(place)],
            env=os.environ | {"PYTHONPATH": where},
            capture_output=True,
            text=True,
            timeout=tiny_training.LIMIT_SECONDS,
        )
        assert done.returncode == 0, done.stderr
        assert _checkpoint(config).fingerprint == _checkpoint(trained).fingerprint
