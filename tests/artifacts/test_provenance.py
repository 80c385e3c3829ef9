"""The commit and the package versions that an artifact records."""

import subprocess

import pytest

from pipeline.artifacts import provenance


def git(folder, *arguments):
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with the files of a checkout, as the source that runs; it is in no repository."""
    for name in ("pipeline/artifacts/provenance.py", "conf/config.yaml", "tests/test_main.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("first\n")
    monkeypatch.setattr(provenance, "SOURCE", tmp_path / "pipeline")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return tmp_path


@pytest.fixture
def commit(checkout):
    """The commit of the checkout's files."""
    git(checkout, "init", "--quiet")
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "-m", "first")
    return git(checkout, "rev-parse", "HEAD")


def git_commit():
    """What a command that starts now would find: a process asks git once."""
    return provenance.git_commit.__wrapped__()


def test_an_unchanged_checkout_is_its_commit(commit):
    assert git_commit() == commit


@pytest.mark.parametrize("name", ["pipeline/artifacts/provenance.py", "conf/config.yaml"])
def test_a_checkout_whose_program_or_configuration_was_changed_is_dirty(checkout, commit, name):
    (checkout / name).write_text("second\n")
    assert git_commit() == f"{commit}-dirty"
    git(checkout, "add", name)
    assert git_commit() == f"{commit}-dirty"


@pytest.mark.parametrize("name", ["tests/test_main.py", "pipeline/notes.txt"])
def test_other_and_untracked_files_do_not_make_a_checkout_dirty(checkout, commit, name):
    (checkout / name).write_text("second\n")
    assert git_commit() == commit


def test_a_source_outside_git_is_unknown(checkout):
    assert git_commit() == "unknown"


def test_a_copy_below_another_repository_is_not_that_repositorys_commit(checkout):
    git(checkout, "init", "--quiet")
    git(checkout, "add", "conf")
    git(checkout, "commit", "--quiet", "-m", "somebody else's")
    assert git_commit() == "unknown"


def test_without_git_the_commit_is_unknown(commit, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_commit() == "unknown"


def test_packages_that_are_not_installed_are_null(monkeypatch):
    monkeypatch.setattr(provenance, "_required", lambda: ["easydel", "not-a-package"])
    assert provenance.package_versions() == {"easydel": "0.3.0", "not-a-package": None}
