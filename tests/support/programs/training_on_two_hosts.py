"""One of two hosts with four CPU devices each that train a draft together: `two_hosts.py PROCESS PORT ROOT TRAIN_JSON`.

Prints what it tracked as JSON.
"""

import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import tiny_training

from pipeline import artifacts, hosts
from pipeline.train import stage


def main() -> None:
    process, port, root, train = sys.argv[1:]
    hosts.join(f"127.0.0.1:{port}", 2, int(process))
    artifacts.git_commit = lambda: tiny_training.GIT_COMMIT
    tracker = tiny_training.Recorder()
    stage.run(tiny_training.configuration(Path(root), **json.loads(train)), tracker)
    print(json.dumps([[name, step, value] for (name, step), value in tracker.metrics.items()]))


if __name__ == "__main__":
    main()
