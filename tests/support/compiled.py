"""Pytest plugin: programs that XLA compiles in half the time, for it leaves LLVM's optimizations out.

For tests that compare such programs with each other, or with NumPy, or ask for a draft that is worth something. What is
compared with other programs' results, transformers' above all, is compiled as users have it.
"""

import contextlib
from collections.abc import Iterator

import jax
import pytest

QUICKLY = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # for the environment of a process


@contextlib.contextmanager
def quickly() -> Iterator[None]:
    """Of this process, what is compiled meanwhile; nothing of it is left for what comes after."""
    if jax.config.values["jax_disable_most_optimizations"]:
        yield
        return
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


@pytest.fixture(scope="module")
def compiled_quickly() -> Iterator[None]:
    """For all tests of a module: `pytestmark = pytest.mark.usefixtures("compiled_quickly")`."""
    with quickly():
        yield
