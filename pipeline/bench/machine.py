"""What a benchmark ran on, for its record."""

import os
import platform
from pathlib import Path
from typing import Any

import jax

CPU_INFO = Path("/proc/cpuinfo")  # of Linux


def machine() -> dict[str, Any]:
    """Returns processor, cores and devices; nothing that names the machine or its user."""
    devices = jax.devices()
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": devices[0].device_kind,
        "num_devices": len(devices),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
