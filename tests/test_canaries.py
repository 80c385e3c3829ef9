"""Faults that the field knows, made on purpose: each costs tokens a round, and each is caught by what a user runs.

Where training and serving disagree, `stage=export` refuses to publish; where an exported file was changed, the server
and the benchmark refuse to start. The draft is worth its tokens without the fault, which the first test shows.
"""

import contextlib
import dataclasses
import itertools
import json
import re
import shutil
import time
from pathlib import Path

import jax.numpy as jnp
import pytest

from pipeline.artifacts import artifact
from pipeline.artifacts.files import write_json
from pipeline.bench import guards
from pipeline.bench import stage as bench
from pipeline.config.fields import CHECKPOINT, DRAFT
from pipeline.config.schema import BenchConfig
from pipeline.config.validation import validate
from pipeline.dflash import blocks
from pipeline.engine import compiled_steps
from pipeline.engine.engine import Engine
from pipeline.errors import PipelineError
from pipeline.export import stage as export
from pipeline.model.hf import safetensors_files
from pipeline.prompts.tokenizer import load_tokenizer
from pipeline.serve import stage as serve
from pipeline.store.checkpoint_files import EVALUATION
from pipeline.workspace.workspace import Workspace
from tests.support import faulty_training
from tests.support import loop as tiny_loop
from tests.support.faulty_training import Trained, patched, train
from tests.support.recorder import Recorder

pytestmark = pytest.mark.usefixtures("compiled_quickly")
COST = 0.05  # of accept_length; most faults cost more than twice what an export may differ by
TAPPED = tiny_loop.TAPPED_LAYERS


@pytest.fixture(scope="module")
def trained():
    return Trained.read()


@pytest.fixture(scope="module")
def published(trained, tmp_path_factory):
    """The right draft, exported."""
    config = tiny_loop.copy(trained.config)
    config.export.path = str(tmp_path_factory.mktemp("published") / "dflash")
    tracker = Recorder()
    export.run(config, tracker)
    return Workspace(config).open(DRAFT), tracker.metrics


@pytest.fixture
def config(trained, tmp_path):
    """Of the right draft; exports go to a directory of their own."""
    config = tiny_loop.copy(trained.config)
    config.export.path = str(tmp_path / "dflash")
    config.serve.port = 0
    return config


def refused(config):
    """accept_length in training and in the engine, as stage=export reports them when it refuses to publish."""
    with pytest.raises(PipelineError, match=r"the draft is not published: .*Training and serving disagree") as caught:
        export.run(config, Recorder())
    path = Workspace(config).address(DRAFT)
    assert not path.exists()
    assert not artifact.scratch_of(path).exists()
    found = re.search(
        r"accept_length is ([\d.]+) in the training evaluation and ([\d.]+) in the engine", str(caught.value)
    )
    before, after = float(found[1]), float(found[2])
    print(f"accept_length {before:.3f} in training, {after:.3f} in the engine")
    return before, after


def test_without_a_fault_the_draft_is_published_with_what_training_and_the_engine_said(published):
    made, metrics = published
    before, after = (metrics[f"export/accept_length_{name}"] for name in ("training", "engine"))
    assert before > 1.5
    assert after == pytest.approx(before, rel=0.005)
    engine = json.loads((made.path / EVALUATION).read_text())["engine"]
    assert (engine["accept_length"], engine["training_accept_length"]) == (after, before)
    assert engine["num_greedy"] == engine["num_sequences"] == tiny_loop.NUM_PROMPTS


# what a checkpoint says of itself, while its weights and its evaluation come from the right training: a training whose
# features, mask token or positions were not those that it wrote down
MISLABELLED = {
    "layer ids + 1": {"tapped_layers": [layer + 1 for layer in TAPPED]},
    "layer ids - 1": {"tapped_layers": [layer - 1 for layer in TAPPED]},
    "wrong mask id": {"mask_token": "<|endoftext|>"},
    "RoPE base changed": {"rope_theta": 1e4},
}


@pytest.mark.parametrize("says", MISLABELLED.values(), ids=MISLABELLED.keys())
def test_a_draft_trained_otherwise_than_it_says_is_not_published(trained, published, config, tmp_path, says):
    config.draft = dataclasses.replace(config.draft, **says)
    config = faulty_training.seal(trained, tmp_path / "checkpoint", config)
    before, after = refused(config)
    assert before == pytest.approx(published[1]["export/accept_length_training"], abs=1e-3)
    assert after < (1 - COST) * before


def test_a_draft_trained_on_swapped_taps_is_not_published(trained, config, tmp_path):
    trained_weights = trained.draft.weights
    fuse, half = trained_weights.fuse, len(trained_weights.fuse) // 2  # its rows are those of the features
    weights = dataclasses.replace(trained_weights, fuse=jnp.concatenate([fuse[half:], fuse[:half]]))
    before, after = refused(faulty_training.seal(trained, tmp_path / "checkpoint", config, weights=weights))
    assert after < (1 - COST) * before


def anchor_visible(anchors, num_positions, first=0):
    positions = jnp.arange(num_positions)
    return (positions <= anchors[..., None]) & (positions >= jnp.asarray(first)[..., None])


LATE = [2, 3]  # the last layers that can be tapped know best what the anchor is followed by
LITTLE_COST = 0.03  # of this small target they know little
TRAINED_WRONG = {
    "anchor feature visible": (lambda: patched(blocks, "context_visible", anchor_visible), LATE, {}, LITTLE_COST),
    "embedding used as head": (contextlib.nullcontext, TAPPED, {"embedding_is_head": True}, COST),
}


@pytest.mark.parametrize(("fault", "layers", "options", "cost"), TRAINED_WRONG.values(), ids=TRAINED_WRONG.keys())
def test_a_draft_trained_under_a_fault_is_not_published(trained, config, tmp_path, fault, layers, options, cost):
    config.draft.tapped_layers = layers
    weights, texts = train(trained, config, fault(), **options)
    config = faulty_training.seal(trained, tmp_path / "checkpoint", config, weights=weights, texts=texts)
    before, after = refused(config)
    assert after < (1 - cost) * before


def all_masked(anchor_ids, mask_token_id, block_size):
    return jnp.full((*anchor_ids.shape, block_size), mask_token_id, anchor_ids.dtype)


def test_an_engine_that_masks_slot_0_publishes_nothing(config):
    """The other way round a draft learns to do without its anchor, and loses nothing more in the engine."""
    compiled_steps.compile_single.cache_clear()
    with patched(blocks, "block_token_ids", all_masked):
        before, after = refused(config)
    compiled_steps.compile_single.cache_clear()
    assert after < (1 - COST) * before


@pytest.mark.slow  # the first test shows it of a draft that the stages trained
def test_the_same_training_without_a_fault_is_published(trained, config, tmp_path):
    weights, texts = train(trained, config, contextlib.nullcontext())
    config = faulty_training.seal(trained, tmp_path / "checkpoint", config, weights=weights, texts=texts)
    tracker = Recorder()
    export.run(config, tracker)
    assert abs(tracker.metrics["export/accept_length_difference"]) < 0.02
    assert tracker.metrics["export/accept_length_engine"] > 1.5


@pytest.mark.parametrize("says", MISLABELLED.values(), ids=MISLABELLED.keys())
def test_a_checkpoint_of_another_configuration_is_not_exported(trained, config, says):
    config.train.path = str(trained.checkpoint.path)
    Workspace(config).open(CHECKPOINT)
    config.draft = dataclasses.replace(config.draft, **says)
    with pytest.raises(PipelineError, match=r"checkpoint at .* does not fit: 1 field\(s\) of its contract differ"):
        export.run(config, Recorder())


def test_a_configuration_taps_layers_in_one_order(config):
    validate(config)
    config.draft.tapped_layers = TAPPED[::-1]
    with pytest.raises(PipelineError, match=r"draft.tapped_layers is \[2, 1\]; it must be layer ids that ascend"):
        validate(config)


def layer_ids(*ids):
    return lambda values: values["dflash_config"].update(target_layer_ids=list(ids))


def rope_base(values):
    values.update(rope_theta=1e4, rope_parameters={"rope_type": "default", "rope_theta": 1e4})


def no_mask_token(values):
    del values["dflash_config"]["mask_token_id"]


CHANGED_FILES = {
    "layer ids + 1": (layer_ids(2, 3), r"features.tapped_layers: found \[2, 3\], wanted \[1, 2\]"),
    "layer ids - 1": (layer_ids(0, 1), r"features.tapped_layers: found \[0, 1\], wanted \[1, 2\]"),
    "swapped tap order": (layer_ids(2, 1), r"target_layer_ids: found \[2, 1\], wanted ascending layers"),
    "wrong mask id": (lambda values: values["dflash_config"].update(mask_token_id=7), "draft.mask_token_id: found 7"),
    "no mask id": (no_mask_token, "mask_token_id: missing"),
    "RoPE base changed": (rope_base, "draft.rope.rope_theta: found 10000.0, wanted 1000000.0"),
}


def reseal(made, path, change):
    """A copy of an exported draft, changed, with checksums as if it had been made so."""
    scratch = artifact.scratch_of(path)
    shutil.copytree(made.path, scratch)
    (scratch / artifact.MANIFEST).unlink()
    change(scratch)
    artifact.seal(path, kind=DRAFT, key=made.key, settings=made.settings, parents=made.parents, contract=made.contract)


@pytest.mark.parametrize(("change", "problem"), CHANGED_FILES.values(), ids=CHANGED_FILES.keys())
def test_neither_server_nor_benchmark_runs_a_draft_whose_file_was_changed(published, config, tmp_path, change, problem):
    def rewrite(directory):
        values = json.loads((directory / "config.json").read_text())
        change(values)
        write_json(directory / "config.json", values)

    made, _ = published
    reseal(made, tmp_path / "same", lambda directory: None)
    config.export.path = str(tmp_path / "same")
    Workspace(config).open(DRAFT)
    reseal(made, tmp_path / "changed", rewrite)
    config.export.path = str(tmp_path / "changed")
    for stage in (serve, bench):
        with pytest.raises(PipelineError, match=problem):
            stage.run(config, Recorder())


def test_neither_server_nor_benchmark_runs_a_draft_that_lacks_a_tensor(published, config, tmp_path):
    def drop(directory):
        files = safetensors_files.TensorFiles(directory)
        safetensors_files.write(directory, {name: files.read(name) for name in files.names - {"fc.weight"}})

    reseal(published[0], tmp_path / "changed", drop)
    config.export.path = str(tmp_path / "changed")
    for stage in (serve, bench):
        with pytest.raises(PipelineError, match=r"1 tensor\(s\) wrong\n  fc.weight: missing"):
            stage.run(config, Recorder())


def test_a_checkpoint_whose_draft_is_not_the_one_of_its_contract_is_not_exported(trained, config, tmp_path):
    other = dataclasses.replace(trained.draft.config, mask_token_id=1)
    config = faulty_training.seal(trained, tmp_path / "checkpoint", config, sizes=other)
    with pytest.raises(PipelineError, match=r"draft_config.json does not fit.*\n  draft.mask_token_id: found 1"):
        export.run(config, Recorder())


def test_a_server_whose_target_has_another_chat_template_refuses_the_draft(trained, published, config, tmp_path):
    shutil.copytree(trained.target.path, tmp_path / "target")
    config.target = dataclasses.replace(config.target, path=str(tmp_path / "target"), pretrain=None)
    config.export.path = str(published[0].path)
    Workspace(config).open(DRAFT)
    template = tmp_path / "target" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|start|>user", "<|start|>developer"))
    for stage in (serve, bench):
        with pytest.raises(PipelineError, match=r"draft at .* does not fit.*\n  text.chat_template_fingerprint: found"):
            stage.run(config, Recorder())


def test_a_draft_trained_beside_prompts_that_serving_writes_otherwise_is_not_published(config, monkeypatch):
    def load_other(workspace):
        tokenizer = load_tokenizer(workspace.target.path)
        wanted = "<|start|>user<|message|>"
        tokenizer.chat_template = tokenizer.chat_template.replace(wanted, f"{wanted}\n")
        return tokenizer

    monkeypatch.setattr(Workspace, "tokenizer", property(load_other))
    with pytest.raises(
        PipelineError, match=r"20 of 20 held-out prompts .* are not what serving makes of them"
    ) as caught:
        export.run(config, Recorder())
    assert re.search(r"prompt [0-9a-f]{12}: from token \d+ on found '.+', wanted '\\n", str(caught.value))


def benched(published, config):
    """The record of a benchmark of the right draft, with a few prompts."""
    config.export.path = str(published[0].path)
    config.bench = BenchConfig(num_prompts=6, max_new_tokens=40, repeats=2)
    tracker = Recorder()
    return bench.run(config, tracker), tracker


@pytest.fixture
def records(config, tmp_path):
    """Where the records of benchmarks go: beside links to what other tests share, which must stay as it is."""
    own = tmp_path / "outputs"
    own.mkdir()
    for folder in Path(config.output_dir).iterdir():
        if folder.is_dir():
            (own / folder.name).symlink_to(folder)
    config.output_dir = str(own)
    return own / "bench"


def test_a_benchmark_has_one_set_of_numbers_in_its_record_its_page_and_mlflow(published, config, records):
    measured, tracker = benched(published, config)
    (record,) = records.glob("*/*/results.json")
    written = json.loads(record.read_text())
    page = (record.parent / "report.html").read_text()
    assert measured["speedup_low"] <= measured["speedup"] <= measured["speedup_high"]
    for name in ("accept_length", "speedup", "plain_tokens_per_second", "equal_answers"):
        assert measured[name] == written[name] == tracker.metrics[name] == tracker.documents["results.json"][name]
    assert f"{measured['speedup']:.3f}x" in page
    assert f"{measured['accept_length']:.3f}" in page
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert tracker.documents["acceptance_by_position_light.png"].startswith(b"\x89PNG")


@pytest.mark.usefixtures("records")
def test_prompts_that_the_draft_was_trained_on_are_refused(published, config):
    config.prompts.heldout_fraction = 0.9  # most of what is held out now was trained on
    with pytest.raises(PipelineError, match=r"of 6 prompts, [3-6] are among the draft's training texts .*prompt-"):
        benched(published, config)


@pytest.mark.usefixtures("records")
def test_a_slow_baseline_is_named(published, config, monkeypatch):
    step = Engine.step

    def slowed(engine):
        if engine.block_size is None and engine.has_work:
            time.sleep(0.05)
        return step(engine)

    monkeypatch.setattr(Engine, "step", slowed)
    measured, _ = benched(published, config)
    (said,) = [text for text in measured["warnings"] if "slow baseline" in text]
    assert "plain decoding reaches" in said


@pytest.mark.usefixtures("records")
def test_looping_answers_are_left_out_and_named(published, config, monkeypatch):
    asked = itertools.count()
    monkeypatch.setattr(guards, "is_looping", lambda token_ids: next(asked) < 2)
    measured, _ = benched(published, config)
    assert (measured["looping_answers"], measured["left_out_answers"], measured["num_prompts"]) == (2, 2, 6)
    assert "repeat themselves" in measured["warnings"][0]


@pytest.mark.usefixtures("records")
def test_a_draft_of_another_layer_is_named(published, config, tmp_path):
    def shift(directory):
        weights = safetensors_files.TensorFiles(directory)
        tensors = {name: weights.read(name) for name in weights.names}
        tensors["fc.weight"] = tensors["fc.weight"][:, ::-1].copy()  # what it sees is not what it was trained on
        safetensors_files.write(directory, tensors)

    made, _ = published
    reseal(made, tmp_path / "dflash", shift)
    measured, _ = benched((dataclasses.replace(made, path=tmp_path / "dflash"), None), config)
    assert measured["equal_answers"] == 6
    assert any("of what training measured" in text for text in measured["warnings"])
