"""What must be set before EasyDeL is imported, for it reads the environment then and rewrites much of it.

Source: docs/easydel.md#what-importing-it-does.
"""

import os

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


def prepare() -> None:
    """Make EasyDeL importable, quiet, and without a say in how JAX was started."""
    os.environ |= VARIABLES
    absl.logging.set_verbosity(absl.logging.ERROR)  # grain warns of a profiler that nobody asked for
    device = jax.devices()[0]  # started now, under our own XLA_FLAGS and share of memory
    torch_free.install()
    import easydel.trainers  # noqa: F401 (late: it costs seconds, and only a stage that trains pays them)

    if device.platform == "cpu":  # EasyDeL points the cache at its own directory; on CPU that only warns
        jax.config.update("jax_enable_compilation_cache", False)
