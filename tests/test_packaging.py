"""The distribution: a wheel built from the sdist runs outside a checkout, with its own configuration files."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from tests.support.paths import ROOT

CHECKOUT_FILES = ("README.md", "CHANGELOG.md", "Makefile", "requirements.lock", "LICENSE", "docs/architecture.md")


def run(command: list[str], folder: Path, **environment: str) -> str:
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    run([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder)], ROOT)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def installed(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel that the sdist builds, installed."""
    folder = tmp_path_factory.mktemp("installed")
    run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "wheels")], sdist)
    (wheel,) = (folder / "wheels").glob("*.whl")
    options = ["--quiet", "--no-index", "--no-deps", "--disable-pip-version-check", "--target", str(folder / "site")]
    run([sys.executable, "-m", "pip", "install", *options, str(wheel)], folder)
    return folder / "site"


def test_the_sdist_holds_what_a_reader_and_the_tests_need(sdist: Path) -> None:
    missing = [name for name in CHECKOUT_FILES if not (sdist / name).is_file()]
    assert missing == []
    tracked = {path.relative_to(ROOT) for room in ("pipeline", "conf", "tests") for path in (ROOT / room).rglob("*.py")}
    assert [str(path) for path in sorted(tracked) if not (sdist / path).is_file()] == []


def test_an_installed_wheel_runs_anywhere_with_its_own_configuration(installed: Path, tmp_path: Path) -> None:
    python = {"PYTHONPATH": str(installed)}
    found = run(
        [sys.executable, "-c", "import pipeline.cli.stages as s; print(s.__file__, s.CONF)"], tmp_path, **python
    )
    assert found.split() == [str(installed / "pipeline/cli/stages.py"), str(installed / "pipeline/conf")]
    assert run([sys.executable, "-m", "pipeline", "--version"], tmp_path, **python).startswith("gpt-oss-dflash 0.")
    table = run([sys.executable, "-m", "pipeline"], tmp_path, **python)
    assert "teacher_cache" in table
    job = ["--cfg", "job", "stage=compile", "target=gpt_oss_20b", "compile.topology=v6e:2x4"]
    config = yaml.safe_load(run([sys.executable, "-m", "pipeline", *job], tmp_path, **python))
    assert config["draft"]["num_hidden_layers"] == 8
    assert list(tmp_path.iterdir()) == []


def test_the_command_of_the_wheel_is_the_programs_door(installed: Path, tmp_path: Path) -> None:
    script = installed / "bin" / "gpt-oss-dflash"
    version = run([sys.executable, str(script), "--version"], tmp_path, PYTHONPATH=str(installed))
    assert version == run([sys.executable, "-m", "pipeline", "--version"], tmp_path, PYTHONPATH=str(installed))
    assert "(commit unknown)" in version  # of whatever repository the folder lies in
