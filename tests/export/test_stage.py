"""From EasyDeL's run directory to the exported draft, on a draft that stage=train has trained."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.artifacts import artifact, storage
from pipeline.artifacts.files import write_json
from pipeline.config.fields import CHECKPOINT, DRAFT, TEACHER_CACHE
from pipeline.errors import PipelineError
from pipeline.export import stage
from pipeline.export.easydel_checkpoint import read_checkpoint
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf import dflash as hf_dflash
from pipeline.model.hf.directory import read_config, read_draft, read_target
from pipeline.store.reader import open_split
from pipeline.train.evaluation.evaluate import evaluate
from pipeline.train.loss.vocab_shard import FrozenTables
from pipeline.workspace.workspace import Workspace
from tests.support import loop as tiny_loop
from tests.support import training as tiny_training
from tests.support.buckets import EMULATORS
from tests.support.damage import flip
from tests.support.recorder import Recorder

pytestmark = pytest.mark.usefixtures("compiled_quickly")

RUN = f"run-{tiny_loop.STEPS}"


@pytest.fixture(scope="module")
def trained():
    config = tiny_loop.trained()
    return Workspace(config).open(CHECKPOINT)


def run_of(trained):
    """The directory of the best step, whichever that was."""
    (found,) = trained.path.glob("run-*")
    return found


@pytest.fixture(scope="module")
def draft_config(trained):
    return hf_dflash.config_from_hf(json.loads((trained.path / "draft_config.json").read_text()))


@pytest.fixture(scope="module")
def weights(trained, draft_config):
    return read_checkpoint(run_of(trained), draft_config)


@pytest.fixture
def config(tmp_path):
    """The trained configuration, with an output of its own for the exported draft."""
    config = tiny_loop.copy(tiny_loop.trained())
    config.export.path = str(tmp_path / "dflash-mine")
    return config


def test_weights_read_without_easydel_score_what_the_trainer_scored(trained, draft_config, weights):
    workspace = Workspace(tiny_loop.trained())
    target = read_target(workspace.target.path, WeightFormat())
    tables = FrozenTables(target.weights.embedding, target.weights.head, target.config.vocab_size)
    split = open_split(workspace.open(TEACHER_CACHE).path, "heldout")
    found = evaluate(DraftModel(draft_config, weights), tables, split)
    assert json.loads((trained.path / "evaluation.json").read_text())["heldout"]["histogram"] == list(
        found.total.histogram
    )


def test_the_exported_draft_is_the_trained_one_in_bfloat16(config, weights):
    tracker = Recorder()
    stage.run(config, tracker)
    made = Workspace(config).open(DRAFT)
    exported = read_draft(made.path, jnp.float32)
    for left, right in zip(jax.tree.leaves(weights), jax.tree.leaves(exported), strict=True):
        np.testing.assert_array_equal(np.asarray(left.astype(jnp.bfloat16).astype(jnp.float32)), right)
    assert set(made.files) == {"README.md", "config.json", "contract.json", "evaluation.json", "model.safetensors"}
    written = json.loads((made.path / "config.json").read_text())
    ids = read_config(Workspace(config).target.path)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert written[key] == ids[key]
    assert 0 < tracker.by_step["export/relative_error", None] < 1e-2
    assert "accept_length" in (made.path / "README.md").read_text()


def test_exporting_twice_gives_the_same_bytes_and_does_nothing_the_second_time(config, tmp_path):
    stage.run(config, Recorder())
    first = artifact.read(tmp_path / "dflash-mine", DRAFT, make_with="the test")
    stage.run(config, Recorder())
    assert artifact.read(first.path, DRAFT, make_with="the test") == first
    config.export.path = str(tmp_path / "dflash-again")
    stage.run(config, Recorder())
    again = artifact.read(tmp_path / "dflash-again", DRAFT, make_with="the test", verify=True)
    assert again.fingerprint == first.fingerprint


def test_before_training_it_says_which_stage_to_run(tmp_path):
    config = tiny_training.prepare(tmp_path)
    with pytest.raises(PipelineError, match="stage=train"):
        stage.run(config, Recorder())


def test_a_run_directory_that_does_not_fit_is_refused_with_every_fault(trained, draft_config, tmp_path):
    run = tmp_path / "run-12"
    shutil.copytree(run_of(trained), run)
    shutil.rmtree(run / "model" / "layers" / "0" / "key")
    index = json.loads((run / "tensorstore_index.json").read_text())
    entries = [one for one in index["prefixes"]["model"] if one["path"] != "model/norm"]
    index["prefixes"]["model"] = [*entries, {"path": "model/extra", "shape": [1], "dtype": "float32"}]
    write_json(run / "tensorstore_index.json", index)
    shutil.rmtree(run / "model" / "fuse")
    shutil.copytree(run / "model" / "layers" / "0" / "query", run / "model" / "fuse")
    with pytest.raises(PipelineError) as caught:
        read_checkpoint(run, draft_config)
    message = str(caught.value)
    assert "4 array(s) wrong" in message
    for fault in (
        "model/extra: unexpected",
        "model/norm: missing",
        "model/layers/0/key: missing",
        "model/fuse: float32",
    ):
        assert fault in message


def test_a_flipped_byte_of_the_weights_is_found_before_they_are_read(config, trained, tmp_path):
    copied = tmp_path / "checkpoint"
    shutil.copytree(trained.path, copied)
    chunk = next(path for path in sorted((copied / run_of(trained).name / "model").rglob("*")) if path.name == "0.0")
    flip(chunk, -1)
    config.train.path = str(copied)
    with pytest.raises(PipelineError, match=f"{chunk.parent.name}/0.0: sha256 differs"):
        stage.run(config, Recorder())


@pytest.mark.buckets
def test_a_checkpoint_in_a_bucket_is_exported_as_one_on_a_disk(config, trained, tmp_path, monkeypatch):
    stage.run(config, Recorder())
    with EMULATORS["gs"]() as (bucket, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        prefix = storage.parse_path(f"{bucket}/checkpoints/mine")
        for name in storage.list_files(trained.path):
            (prefix / name).write_bytes((trained.path / name).read_bytes())
        config.train.path = str(prefix)
        config.export.path = str(tmp_path / "dflash-from-the-bucket")
        stage.run(config, Recorder())
    for name in ("config.json", "model.safetensors", "README.md", "evaluation.json"):
        one, other = (tmp_path / directory / name for directory in ("dflash-mine", "dflash-from-the-bucket"))
        assert one.read_bytes() == other.read_bytes()
