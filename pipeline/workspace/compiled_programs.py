"""Stores compiled programs between starts, in JAX's persistent compilation cache."""

import hashlib
import os
import platform
from pathlib import Path

import jax

DIRECTORY = "compiled"  # under output_dir
CPU_DESCRIPTION = Path("/proc/cpuinfo")


def use_persistent_cache(output_dir: Path) -> Path | None:
    """Has JAX store what it compiles under `output_dir`, and read it there at the next start.

    Returns the directory; None where JAX_COMPILATION_CACHE_DIR names another, or nothing can be written.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return None
    directory = output_dir / DIRECTORY / _machine()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(directory, os.W_OK):  # a read-only mount: JAX would warn of each program
        return None
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a hundred small ones take seconds too
    return directory


def _machine() -> str:
    """Names the kind of processor: JAX tells accelerators apart itself, but not processors and what they can do."""
    flags = ""
    if CPU_DESCRIPTION.exists():
        lines = CPU_DESCRIPTION.read_text(errors="replace").splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:12]}"
