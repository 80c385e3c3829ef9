"""One of two hosts with four CPU devices each that train a draft together.

    training_on_two_hosts.py PROCESS PORT ROOT TRAIN_JSON

Prints what it tracked as JSON.
"""

import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

from pipeline import distributed
from pipeline.artifacts import provenance
from pipeline.train import stage
from tests.support import training as tiny_training
from tests.support.recorder import Recorder


def main() -> None:
    process, port, root, train = sys.argv[1:]
    distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
    provenance.git_commit = lambda: tiny_training.GIT_COMMIT
    tracker = Recorder()
    stage.run(tiny_training.configuration(Path(root), **json.loads(train)), tracker)
    print(json.dumps([[name, step, value] for (name, step), value in tracker.by_step.items()]))


if __name__ == "__main__":
    main()
