"""Another trainer beside ours: what it is given, what is made of its answer, and the stage from end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from pipeline.config.schema import PipelineConfig, TrainPeerConfig
from pipeline.errors import PipelineError
from pipeline.store.reader import open_split
from pipeline.tracking.run import SilentRun
from pipeline.train.data.padded import PaddedBatches
from pipeline.train_peer import protocol, stage
from pipeline.train_peer.protocol import PeerData, TrainingComparison
from tests.support import training as tiny_training
from tests.support.compiled import QUICKLY
from tests.support.oracles import oracle_python
from tests.support.paths import ROOT, TESTS

IDLE = """
import json, shutil, sys
given = json.load(open(sys.argv[1]))
shutil.copy(given["draft"] + "/model.safetensors", given["draft_out"])
seconds = [1e6] * len(given["order"])
json.dump({"step_seconds": seconds, "losses": [], "attention": given["attention"] or "none"}, open(sys.argv[2], "w"))
"""


def test_every_sequence_is_written_once_and_batches_name_them(tmp_path):
    store = tiny_training.write_store(tmp_path / "store", 12, num_train=7)
    batches = PaddedBatches(open_split(store, "train"), num_sequences=3, num_anchors=4, seed=0)
    made = [batches.at(step) for step in range(5)]  # more than an epoch
    keys = jax.random.split(jax.random.key(0), 2)
    embedding, head = jax.random.normal(keys[0], (9, 6)), jax.random.normal(keys[1], (6, 9))
    data = PeerData.write(tmp_path / "data.npz", iter(made), embedding, head)
    arrays = np.load(data.file)
    assert len(arrays["offsets"]) == 7 + 1
    np.testing.assert_array_equal(arrays["head"], np.asarray(head).T)
    np.testing.assert_array_equal(arrays["embedding"], embedding)
    for batch, order, num_tokens in zip(made, data.order, data.num_tokens, strict=True):
        total = 0
        for row, index in enumerate(order):
            span = slice(arrays["offsets"][index], arrays["offsets"][index + 1])
            length = span.stop - span.start
            np.testing.assert_array_equal(arrays["token_ids"][span], batch["token_ids"][row, :length])
            np.testing.assert_array_equal(arrays["features"][span], batch["features"][row, :length].view(np.int16))
            np.testing.assert_array_equal(arrays["generated"][span], batch["generated"][row, :length])
            assert not batch["generated"][row, length:].any()
            total += length
        assert num_tokens == total


def test_the_ratio_is_the_median_over_steps_with_the_same_batch_behind_the_first_ones():
    warm = (9.0,) * protocol.WARM_UP_STEPS
    found = TrainingComparison(
        ours=((*warm, 1.0, 2.0, 4.0), (*warm, 1.0, 1.0, 1.0)),
        theirs=((*warm, 2.0, 6.0, 16.0), (*warm, 5.0, 5.0, 7.0)),
        num_tokens=(0, 0, 0, 12, 12, 12),
    ).metrics()
    assert [found[f"train_peer/ratio{name}"] for name in ("", "_min", "_max")] == [4.0, 3.0, 5.0]
    assert found["train_peer/ours_tokens_per_second"] == 12.0
    assert found["train_peer/theirs_tokens_per_second"] == (12 / 5 + 12 / 6) / 2


def test_the_stage_needs_a_command():
    with pytest.raises(PipelineError, match=r"train_peer\.command is empty"):
        stage.run(PipelineConfig(train_peer=TrainPeerConfig(command=[])), SilentRun())


def run_stage(root: Path, command: list[str], quality_steps: int) -> tuple[dict[str, float], str]:
    """What the stage measured and printed, in a process of its own, for EasyDeL changes the one it is imported in."""
    tiny_training.prepare(root, longest=tiny_training.ONE_LENGTH)
    wanted = {"command": command, "steps": 5, "repeats": 1, "quality_steps": quality_steps}
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | QUICKLY
    process = subprocess.run(
        [sys.executable, "-c", STAGE, str(root), json.dumps(wanted)], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    *printed, measured = process.stdout.splitlines()
    return json.loads(measured), "\n".join(printed)


STAGE = """
import dataclasses, json, sys
from pathlib import Path
from tests.support import training as tiny_training
from pipeline.config.schema import TrainPeerConfig
from pipeline.tracking.run import SilentRun
from pipeline.train_peer import stage
config = tiny_training.configuration(Path(sys.argv[1]), steps=4, batch_sequences=4)
config = dataclasses.replace(config, train_peer=TrainPeerConfig(**json.loads(sys.argv[2])))
print(json.dumps(stage.run(config, SilentRun())))
"""


def test_a_trainer_that_learns_nothing_in_long_steps_is_slower_and_worse(tmp_path):
    measured, printed = run_stage(tmp_path, [sys.executable, "-c", IDLE], quality_steps=400)
    assert measured["train_peer/ratio"] > 1000
    assert measured["train_peer/ours_tokens_per_second"] > measured["train_peer/theirs_tokens_per_second"] > 0
    accept_lengths = {name: measured[f"train_peer/{name}_accept_length"] for name in ("ours", "theirs_as_published")}
    assert accept_lengths["ours"] > 1.3 * accept_lengths["theirs_as_published"] >= 1.3
    assert measured["train_peer/theirs_with_our_recipe_accept_length"] == accept_lengths["theirs_as_published"]
    assert "batches of 4 sequences" in printed


@pytest.mark.slow
def test_speculators_own_trainer_learns_what_ours_does(tmp_path):
    command = [str(oracle_python()), str(TESTS / "oracles" / "speculators_train.py")]
    measured, _ = run_stage(tmp_path, command, quality_steps=600)
    ours, theirs = (measured[f"train_peer/{name}_accept_length"] for name in ("ours", "theirs_with_our_recipe"))
    assert min(ours, theirs) > 1.3
    assert measured["train_peer/theirs_as_published_accept_length"] >= 1
