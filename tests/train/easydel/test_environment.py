"""EasyDeL is imported in processes of its own: what the import does to a process stays with it."""

import os
import subprocess
import sys

from tests.support.paths import ROOT

PROGRAM = """
import os
from pipeline.train.easydel import environment
environment.prepare()
import jax, easydel
print(os.environ["HOME"], jax.config.jax_compilation_cache_dir)
"""


def test_easydel_is_imported_where_the_home_directory_cannot_be_written(tmp_path):
    variables = os.environ | {"PYTHONPATH": str(ROOT), "HOME": "/dev/null", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    run = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-4000:]
    home, caches = run.stdout.split()[-2:]
    assert home == "/dev/null"
    assert caches.startswith(str(tmp_path))
    assert not list(tmp_path.glob("easydel-home-*")), "the temporary home is removed at exit"
