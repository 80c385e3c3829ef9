"""A second process reads what the first one compiled."""

import os
import subprocess
import sys

from pipeline.workspace import compiled_programs

PROGRAM = """
import logging, sys
from pathlib import Path
import jax, jax.numpy as jnp
from pipeline.workspace.compiled_programs import use_persistent_cache
found = use_persistent_cache(Path(sys.argv[1]))
hits = []
jax.monitoring.register_event_listener(lambda name, **more: hits.append(name))
jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x))(jnp.ones((8, 8)))
print(found, sum(name.endswith("/compilation_cache/cache_hits") for name in hits))
"""


def run(directory, **variables):
    """The path, the hits and what was written to stderr; XLA is as silent about programs that it reads as
    `python -m pipeline` asks it to be: it warns of features of the processor that are none (`prefer-no-gather`)."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(directory)],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **variables}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    path, hits = done.stdout.split()
    return path, int(hits), done.stderr


def test_a_second_start_compiles_nothing_again(tmp_path):
    path, hits, _ = run(tmp_path)
    assert path.startswith(str(tmp_path / "compiled"))
    assert hits == 0
    again, hits, errors = run(tmp_path)
    assert again == path
    assert hits > 0
    assert errors == ""


def test_a_directory_of_ones_own_choice_is_left_alone(tmp_path):
    own = tmp_path / "own"
    path, _, _ = run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(own))
    assert path == "None"
    assert own.is_dir()
    assert not (tmp_path / "compiled").exists()


def test_where_nothing_can_be_written_programs_are_compiled_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled_programs.os, "access", lambda *arguments: False)
    assert compiled_programs.use_persistent_cache(tmp_path) is None


def test_where_there_can_be_no_directory_programs_are_compiled_each_time(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert run(file)[0] == "None"
