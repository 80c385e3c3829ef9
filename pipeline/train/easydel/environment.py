"""What must be set before EasyDeL is imported, for it reads the environment then and rewrites much of it.

Source: docs/easydel.md#what-importing-it-does.
"""

import atexit
import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import absl.logging
import jax

from pipeline.train.easydel import torch_free

VARIABLES = {
    "EASYDEL_AUTO": "0",  # leaves XLA_FLAGS, NCCL's variables, JAX's tracebacks and log levels alone
    "EJKERNEL_AUTOTUNE_POLICY": "heuristics",  # no kernel is measured at first use
    "ENABLE_DISTRIBUTED_INIT": "0",
    "LOGGING_LEVEL_ED": "ERROR",
    "WANDB_MODE": "disabled",
}
CACHES = ("easydel", "ejkernel-cache")  # directories of ~/.cache that the import makes


def prepare() -> None:
    """Makes EasyDeL importable and quiet, and keeps it from changing how JAX was started."""
    os.environ |= VARIABLES
    absl.logging.set_verbosity(absl.logging.ERROR)  # grain warns of a profiler that nobody asked for
    device = jax.devices()[0]  # started now, under our own XLA_FLAGS and share of memory
    torch_free.install()
    with _writable_home():
        import easydel.trainers  # noqa: F401 (late: it costs seconds, and only a stage that trains pays them)

    if device.platform == "cpu":  # EasyDeL points the cache at its own directory; on CPU that only warns
        jax.config.update("jax_enable_compilation_cache", False)


@contextlib.contextmanager
def _writable_home() -> Iterator[None]:
    """Sets HOME to a temporary directory for the block where EasyDeL could not make its caches in the present one.

    The directory stays until the process ends, for the caches in it are used until then.
    """
    if _caches_can_be_made():
        yield
        return
    before = os.environ.get("HOME")
    folder = tempfile.TemporaryDirectory(prefix="easydel-home-")
    atexit.register(folder.cleanup)
    os.environ["HOME"] = folder.name
    try:
        yield
    finally:
        if before is None:
            del os.environ["HOME"]
        else:
            os.environ["HOME"] = before


def _caches_can_be_made() -> bool:
    try:
        paths = [Path.home() / ".cache" / name for name in CACHES]
        for path in paths:
            path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: there is no home directory at all
        return False
    return all(os.access(path, os.W_OK) for path in paths)
