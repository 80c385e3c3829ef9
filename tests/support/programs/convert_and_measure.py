"""Converts a GGUF file, and prints by how many bytes the memory of this process grew at the most."""

import sys
from pathlib import Path

from pipeline.config.schema import PipelineConfig, TargetConfig
from pipeline.target import stage
from pipeline.tracking.run import SilentRun


def main() -> None:
    file, outputs = Path(sys.argv[1]), sys.argv[2]
    config = PipelineConfig(output_dir=outputs, target=TargetConfig(name="converted", gguf=str(file)))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = kibibytes("VmRSS")
    stage.run(config, SilentRun())
    print((kibibytes("VmHWM") - before) * 1024)


def kibibytes(key: str) -> int:
    """A number of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


if __name__ == "__main__":
    main()
