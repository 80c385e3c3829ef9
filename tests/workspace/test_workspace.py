"""Artifacts are found by their keys, and a reader believes one only after comparing its contract."""

import dataclasses
import json
import shutil

import pytest

from pipeline.artifacts import artifact
from pipeline.artifacts.artifact import Parent
from pipeline.artifacts.files import write_json
from pipeline.artifacts.hashing import fingerprint_of
from pipeline.config.choices import Effort, Precision
from pipeline.config.fields import CHECKPOINT, DRAFT, TARGET, TEACHER_CACHE
from pipeline.config.schema import ArchitectureConfig, PipelineConfig, PretrainConfig, TargetConfig
from pipeline.errors import MissingArtifact, PipelineError
from pipeline.model.hf import dflash as hf_dflash
from pipeline.store.checkpoint_files import DRAFT_CONFIG
from pipeline.workspace import contracts
from pipeline.workspace.workspace import Workspace
from tests.support import training as tiny_training
from tests.support.damage import flip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A target and a teacher cache; read only."""
    return tiny_training.prepare(tmp_path_factory.mktemp("workspace"))


@pytest.fixture
def config(prepared):
    """A configuration of them that a test may change."""
    return tiny_training.configuration(tiny_training.root_of(prepared))


def cache_address(config):
    return Workspace(config).address(TEACHER_CACHE)


def test_other_weights_at_the_same_path_are_another_target(tmp_path):
    config = tiny_training.configuration(tmp_path)
    directory = tiny_training.make_target(tmp_path / "target")
    before, address = Workspace(config).target, cache_address(config)
    flip(directory / "model.safetensors", -1)
    after = Workspace(config).target
    assert after.fingerprint != before.fingerprint
    assert after.contract.target.weights_fingerprint != before.contract.target.weights_fingerprint
    assert cache_address(config) != address


def test_a_trained_targets_address_follows_its_recipe_and_a_missing_one_names_its_command(tmp_path):
    sizes, recipe = (
        {field.name: field.type(8) for field in dataclasses.fields(kind) if field.type in (int, float)}
        for kind in (ArchitectureConfig, PretrainConfig)
    )
    target = TargetConfig(name="tiny", architecture=ArchitectureConfig(**sizes), pretrain=PretrainConfig(**recipe))
    config = PipelineConfig(output_dir=str(tmp_path), target=target)
    before = Workspace(config).address(TARGET)
    config.target.pretrain.steps = 9
    assert Workspace(config).address(TARGET) != before
    config.target.pretrain.steps, config.target.architecture.head_dim = 8, 10
    assert Workspace(config).address(TARGET) != before
    with pytest.raises(MissingArtifact, match=r"no complete target at .*make it with: python -m pipeline stage=target"):
        _ = Workspace(config).target


def test_a_target_path_that_is_none_is_refused(config):
    config.target.path = "/nowhere"
    with pytest.raises(PipelineError, match="target.path is /nowhere, which is no directory"):
        _ = Workspace(config).target


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"hidden_size": "144"}, "hidden_size: found '144', wanted a positive whole number"),
        ({"layer_types": ["full_attention"] * 9}, "layer_types: found 9 kinds, wanted one for each of "),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types: found chunked_attention, wanted sliding_attention"),
    ],
)
def test_what_is_wrong_with_a_model_is_said_in_our_words_before_its_tokenizer_is_opened(
    config, tmp_path, change, problem
):
    target = tiny_training.make_target(tmp_path / "target")
    settings = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(settings | change))
    config.target.path = str(target)
    with pytest.raises(PipelineError, match=problem):
        _ = Workspace(config).target


def test_a_model_whose_config_has_a_byte_order_mark_is_the_same_model(config, tmp_path):
    before = Workspace(config).target
    target = tiny_training.make_target(tmp_path / "target")
    (target / "config.json").write_bytes(b"\xef\xbb\xbf" + (target / "config.json").read_bytes())
    config.target.path = str(target)
    assert Workspace(config).target.key == before.key
    assert Workspace(config).tokenizer.get_vocab()


def test_a_cache_that_fits_is_opened(config):
    made = Workspace(config).open(TEACHER_CACHE)
    assert made.kind == TEACHER_CACHE
    assert made.contract["features"]["tapped_layers"] == [0, 2]


def test_a_contract_leaves_the_efforts_of_a_mix_to_the_cache(config, prepared):
    config.teacher_cache.path = str(cache_address(prepared))
    config.prompts.effort = Effort.mixed
    assert Workspace(config).open(TEACHER_CACHE).contract["text"]["reasoning_efforts"] == ["low"]


def test_a_cache_of_something_else_is_refused_with_every_field(config, prepared):
    config.teacher_cache.path = str(cache_address(prepared))  # by its path anything can be given
    config.prompts.effort = Effort.high
    config.draft.tapped_layers = [1, 2]
    config.target.precision = Precision.bfloat16
    with pytest.raises(PipelineError) as error:
        Workspace(config).open(TEACHER_CACHE)
    lines = str(error.value).splitlines()
    assert lines[0].endswith("does not fit: 3 field(s) of its contract differ")
    assert [line.strip() for line in lines[1:4]] == [
        "features.tapped_layers: found [0, 2], wanted [1, 2]",
        "target.weight_precision: found 'float32', wanted 'bfloat16'",
        "text.reasoning_efforts: found ['low'], wanted ['high']",
    ]
    assert "python -m pipeline stage=teacher_cache" in lines[4]


def sealed_draft(config, path, **written):
    """A draft without weights, whose config file says `written` in its dflash_config."""
    scratch, workspace = artifact.open_scratch(path, resume=False), Workspace(config)
    values = hf_dflash.config_to_hf(workspace.draft_config, "float32", {})
    values["dflash_config"] |= written
    write_json(scratch / "config.json", values)
    artifact.seal(
        path,
        kind=DRAFT,
        key=workspace.key(DRAFT),
        settings=workspace.settings(DRAFT),
        parents={CHECKPOINT: Parent(key=workspace.key(CHECKPOINT), fingerprint="f" * 64)},
        contract=workspace.contract(DRAFT).to_json(),
    )
    return str(path)


def test_any_draft_given_by_path_is_served_that_shares_the_target(config, tmp_path):
    config.export.path = sealed_draft(config, tmp_path / "draft")
    config.draft.block_size, config.draft.tapped_layers = 3, [1, 2]  # this configuration's, not the given draft's
    assert Workspace(config).open(DRAFT).contract["draft"]["block_size"] == 4


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("mask_token_id", 5, "draft.mask_token_id: found 5, wanted 60"),
        ("target_layer_ids", [0, 1], r"features.tapped_layers: found \[0, 1\], wanted \[0, 2\]"),
    ],
)
def test_a_draft_whose_file_is_not_what_its_contract_says_is_refused(config, tmp_path, key, value, problem):
    config.export.path = sealed_draft(config, tmp_path / "draft", **{key: value})
    with pytest.raises(PipelineError, match=problem):
        Workspace(config).open(DRAFT)


def test_a_draft_of_another_target_or_tokenizer_is_refused(config, tmp_path):
    config.export.path = sealed_draft(config, tmp_path / "draft")
    other = tiny_training.make_target(tmp_path / "target")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"2": 3, "3": 2}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    (other / "chat_template.jinja").write_text("other")
    config.target.path = str(other)
    with pytest.raises(PipelineError, match="2 field") as error:
        Workspace(config).open(DRAFT)
    assert "text.chat_template_fingerprint: found" in str(error.value)
    assert "text.tokenizer_fingerprint: found" in str(error.value)


def test_an_artifact_of_another_kind_is_refused(config, prepared):
    config.export.path = str(cache_address(prepared))
    with pytest.raises(PipelineError, match="holds a teacher_cache, wanted a draft"):
        Workspace(config).open(DRAFT)


def test_a_draft_whose_file_was_changed_after_it_was_made_is_refused_by_its_sha256(config, tmp_path):
    config.export.path = sealed_draft(config, tmp_path / "draft")
    file = tmp_path / "draft" / "config.json"
    file.write_text(file.read_text().replace('"mask_token_id": 60', '"mask_token_id": 50'))  # of the same size
    with pytest.raises(PipelineError, match=r"damaged.*\n  config.json: sha256 differs"):
        Workspace(config).open(DRAFT)


def test_a_target_whose_tokens_end_an_answer_otherwise_is_another_target(config, tmp_path):
    config.export.path = sealed_draft(config, tmp_path / "draft")
    other = tiny_training.make_target(tmp_path / "target")
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "3"}))
    config.target.path = str(other)
    with pytest.raises(PipelineError, match=r"text.stop_token_ids: found \[1\], wanted \[3\]"):
        Workspace(config).open(DRAFT)


def test_the_end_tokens_of_generation_config_end_answers_too(config, tmp_path):
    target = tiny_training.make_target(tmp_path / "target")
    config.target.path = str(target)
    before = Workspace(config)
    assert before.stop_token_ids == (1,)
    for eos, stops in ((1, (1,)), (7, (1, 7)), ([5, 1, 3], (1, 5, 3))):
        (target / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        after = Workspace(config)
        assert after.stop_token_ids == stops
        assert after.target.contract.text.stop_token_ids == sorted(stops)
        assert (after.target.key == before.target.key) == (stops == (1,))
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": ["<end>"]}))
    with pytest.raises(PipelineError, match=r"generation_config\.json: eos_token_id: found \['<end>'\], wanted"):
        _ = Workspace(config).target


def test_an_adapter_makes_another_target(config, tmp_path):
    before, adapter = Workspace(config).target, tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    (adapter / "adapter_model.safetensors").write_bytes(b"hashed, not read")
    config.target.adapter = str(adapter)
    after = Workspace(config).target
    assert after.key != before.key
    assert after.contract.target.weights_fingerprint != before.contract.target.weights_fingerprint
    (adapter / "adapter_model.safetensors").write_bytes(b"others")
    assert Workspace(config).target.key != after.key


def made(config):
    """Checkpoint and exported draft at the addresses of a configuration, without their weights."""
    workspace = Workspace(config)
    for kind, parent in ((CHECKPOINT, TEACHER_CACHE), (DRAFT, CHECKPOINT)):
        scratch = artifact.open_scratch(workspace.address(kind), resume=False)
        name = DRAFT_CONFIG if kind == CHECKPOINT else "config.json"
        write_json(scratch / name, hf_dflash.config_to_hf(workspace.draft_config, "float32", {}))
        parents = {parent: artifact.read(workspace.address(parent), parent, make_with="the test")}
        if kind == CHECKPOINT:
            parents[TARGET] = workspace.target
        workspace.seal(kind, workspace.contract(kind), parents)
    return workspace


@pytest.fixture
def own(tmp_path):
    """A configuration with target, cache, checkpoint and draft of its own."""
    config = tiny_training.prepare(tmp_path)
    made(config)
    return config


def test_a_draft_and_a_checkpoint_are_opened_after_what_they_were_made_from_is_deleted(own):
    wanted = {kind: Workspace(own).address(kind) for kind in (CHECKPOINT, DRAFT)}
    shutil.rmtree(Workspace(own).address(TEACHER_CACHE))
    assert Workspace(own).open(CHECKPOINT).path == wanted[CHECKPOINT]
    shutil.rmtree(wanted[CHECKPOINT])
    draft = Workspace(own).open(DRAFT)
    assert draft.path == wanted[DRAFT]
    assert draft.parents[CHECKPOINT].key == Workspace(own).key(CHECKPOINT)
    with pytest.raises(MissingArtifact, match="stage=train"):
        Workspace(own).open(CHECKPOINT)


def test_a_child_of_another_making_of_its_parent_is_refused_unless_it_is_given_by_its_path(own):
    address = Workspace(own).address(CHECKPOINT)
    manifest = json.loads((address / artifact.MANIFEST).read_text())
    del manifest["sha256"]
    manifest["fingerprint"] = "e" * 64
    write_json(address / artifact.MANIFEST, manifest | {"sha256": fingerprint_of(manifest)})
    with pytest.raises(PipelineError, match=r"made from another making of the same checkpoint: .* give export.path"):
        Workspace(own).open(DRAFT)
    own.export.path = str(Workspace(own).address(DRAFT))
    assert Workspace(own).open(DRAFT).kind == DRAFT


def test_a_renamed_artifact_is_not_taken_for_another(own):
    wrong = tiny_training.configuration(tiny_training.root_of(own), steps=99)
    Workspace(own).address(CHECKPOINT).rename(Workspace(wrong).address(CHECKPOINT))
    with pytest.raises(PipelineError, match="was renamed: its manifest has the key"):
        Workspace(wrong).open(CHECKPOINT)


def test_what_a_command_looks_up_is_looked_up_once(own, monkeypatch):
    calls = []
    fingerprint = contracts.weights_fingerprint
    monkeypatch.setattr(contracts, "weights_fingerprint", lambda *arguments: calls.append(1) or fingerprint(*arguments))
    workspace = Workspace(own)
    for kind in (TEACHER_CACHE, CHECKPOINT, DRAFT):
        workspace.open(kind)
        workspace.address(kind)
    assert len(calls) == 1
