"""Addresses follow settings and parents, and a reader believes an artifact only after comparing contracts."""

import dataclasses
import json
from pathlib import Path

import pytest
import tiny_training
from tiny_training import MASK_TOKEN, NUM_TAPPED

from pipeline import artifacts, lineage
from pipeline.artifacts import MissingArtifact, PipelineError
from pipeline.config import (
    ArchitectureConfig,
    Effort,
    PipelineConfig,
    Precision,
    PretrainConfig,
    PromptSource,
    TargetConfig,
)
from pipeline.model import hf_draft


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A target and a teacher cache; read only."""
    return tiny_training.prepare(tmp_path_factory.mktemp("lineage"))


@pytest.fixture
def config(prepared):
    """A configuration of them that a test may change."""
    return tiny_training.configuration(tiny_training.root_of(prepared))


def cache_address(config):
    return lineage.teacher_cache_address(config, lineage.target(config))


def checkpoint_address(config, cache="cache fingerprint"):
    settings = lineage.checkpoint_settings(config, lineage.target(config), cache)
    return artifacts.address(Path(config.output_dir), lineage.CHECKPOINT, config.target.name, settings)


CACHE_CHANGES = {
    "seed": lambda config: setattr(config, "seed", 1),
    "number of prompts": lambda config: setattr(config.prompts, "count", 7),
    "effort": lambda config: setattr(config.prompts, "effort", Effort.high),
    "date": lambda config: setattr(config.prompts, "date", "2026-01-01"),
    "length of answers": lambda config: setattr(config.teacher_cache, "max_new_tokens", 31),
    "shard size": lambda config: setattr(config.teacher_cache, "shard_sequences", 3),
    "temperature": lambda config: setattr(config.teacher_cache, "temperature", 0.7),
    "nucleus": lambda config: setattr(config.teacher_cache, "top_p", 0.9),
    "layers": lambda config: setattr(config.draft, "tapped_layers", [0, 1]),
    "precision": lambda config: setattr(config.target, "precision", Precision.bfloat16),
}
OTHERS = {
    "steps of training": lambda config: setattr(config.train, "steps", 13),
    "learning rate": lambda config: setattr(config.train, "learning_rate", 1e-4),
    "block size": lambda config: setattr(config.draft, "block_size", 3),
    "draft's depth": lambda config: setattr(config.draft, "num_hidden_layers", 3),
    "RoPE of the draft": lambda config: setattr(config.draft, "rope_theta", 1e4),
}
NOWHERE = {
    "endpoint that is not asked": lambda config: setattr(config.teacher_cache.openai, "model", "other"),
    "log steps": lambda config: setattr(config.train, "log_steps", 3),
    "bench": lambda config: setattr(config.bench, "slots", 3),
    "port": lambda config: setattr(config.serve, "port", 1234),
    "date of the server": lambda config: setattr(config.serve, "date", "2026-01-01"),
    "mix without mixing": lambda config: config.prompts.effort_mix.update(low=2.0),
    "tracking": lambda config: setattr(config.tracking, "experiment", "other"),
}


@pytest.mark.parametrize("change", CACHE_CHANGES.values(), ids=CACHE_CHANGES.keys())
def test_what_decides_a_caches_bytes_decides_its_address(config, change):
    before = cache_address(config)
    change(config)
    assert cache_address(config) != before
    assert cache_address(config).parent == before.parent


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS.keys())
def test_what_decides_a_checkpoints_bytes_decides_its_address_and_not_the_caches(config, change):
    cache, checkpoint = cache_address(config), checkpoint_address(config)
    change(config)
    assert cache_address(config) == cache
    assert checkpoint_address(config) != checkpoint


@pytest.mark.parametrize("change", NOWHERE.values(), ids=NOWHERE.keys())
def test_what_decides_no_bytes_decides_no_address(config, change):
    cache, checkpoint = cache_address(config), checkpoint_address(config)
    change(config)
    assert (cache_address(config), checkpoint_address(config)) == (cache, checkpoint)


def test_an_address_follows_its_parents_fingerprint(config):
    assert checkpoint_address(config, "another cache") != checkpoint_address(config)
    target = lineage.target(config)
    other = dataclasses.replace(target, fingerprint="another target")
    assert lineage.teacher_cache_address(config, other) != lineage.teacher_cache_address(config, target)
    assert lineage.export_settings(config, "one") != lineage.export_settings(config, "other")


def test_other_weights_in_the_same_place_are_another_target(tmp_path):
    config = tiny_training.configuration(tmp_path)
    directory = tiny_training.make_target(tmp_path / "target")
    before, address = lineage.target(config), cache_address(config)
    data = bytearray((directory / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (directory / "model.safetensors").write_bytes(data)
    after = lineage.target(config)
    assert after.fingerprint != before.fingerprint
    assert after.contract.target.weights_fingerprint != before.contract.target.weights_fingerprint
    assert cache_address(config) != address


def test_a_prompt_file_counts_by_its_bytes_not_by_its_name(config, tmp_path):
    config.prompts.source = PromptSource.jsonl
    addresses = []
    for name, text in (("one", "a"), ("two", "a"), ("two", "b")):
        (tmp_path / name).write_text(text)
        config.prompts.path = str(tmp_path / name)
        addresses.append(cache_address(config))
    assert addresses[0] == addresses[1] != addresses[2]
    config.prompts.path = str(tmp_path / "three")
    with pytest.raises(PipelineError, match=r"prompts.path is .*three, which is no file"):
        cache_address(config)


def test_a_local_dataset_counts_by_its_files_not_by_where_it_is(config, tmp_path):
    config.prompts.source = PromptSource.dataset
    addresses = []
    for name, text in (("one", "a"), ("two", "a"), ("two", "b")):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "part.jsonl").write_text(text)
        for place in (tmp_path / name, tmp_path / name / "part.jsonl"):
            config.prompts.dataset = str(place)
            addresses.append(cache_address(config))
    assert addresses[:2] == addresses[2:4]
    assert len(set(addresses)) == 4


def test_a_trained_targets_address_follows_its_recipe_and_a_missing_one_names_its_command(tmp_path):
    sizes, recipe = (
        {field.name: field.type(8) for field in dataclasses.fields(kind)}
        for kind in (ArchitectureConfig, PretrainConfig)
    )
    target = TargetConfig(name="tiny", architecture=ArchitectureConfig(**sizes), pretrain=PretrainConfig(**recipe))
    config = PipelineConfig(output_dir=str(tmp_path), target=target)
    before = lineage.target_address(config)
    config.target.pretrain.steps = 9
    assert lineage.target_address(config) != before
    config.target.pretrain.steps, config.target.architecture.head_dim = 8, 10
    assert lineage.target_address(config) != before
    with pytest.raises(MissingArtifact, match=r"no complete target at .*make it with: python -m pipeline stage=target"):
        lineage.target(config)


def test_a_target_path_that_is_none_is_refused(config):
    config.target.path = "/nowhere"
    with pytest.raises(PipelineError, match="target.path is /nowhere, which is no directory"):
        lineage.target(config)


def test_a_cache_that_fits_is_opened(config):
    made = lineage.teacher_cache(config, lineage.target(config))
    assert made.kind == lineage.TEACHER_CACHE
    assert made.contract["features"]["tapped_layers"] == [0, 2]


def test_mixed_efforts_are_drawn_by_the_shares_and_the_seed(config):
    config.prompts.effort = Effort.mixed
    even = [prompt.effort for prompt in lineage.prompt_set(config).prompts]
    address = cache_address(config)
    assert len(set(even)) > 1
    config.prompts.effort_mix = {"high": 1.0}
    assert {prompt.effort for prompt in lineage.prompt_set(config).prompts} == {"high"}
    assert cache_address(config) != address


def test_a_request_has_the_effort_of_the_prompts_and_under_a_mix_the_templates_default(config):
    config.prompts.effort = Effort.high
    assert lineage.default_effort(config) == "high"
    config.prompts.effort = Effort.mixed
    assert lineage.default_effort(config) == "medium"


def test_a_contract_leaves_the_efforts_of_a_mix_to_the_cache(config, prepared):
    config.teacher_cache.path = str(cache_address(prepared))
    config.prompts.effort = Effort.mixed
    assert lineage.teacher_cache(config, lineage.target(config)).contract["text"]["reasoning_efforts"] == ["low"]


def test_a_cache_of_something_else_is_refused_with_every_field(config, prepared):
    config.teacher_cache.path = str(cache_address(prepared))  # by its path anything can be given
    config.prompts.effort = Effort.high
    config.draft.tapped_layers = [1, 2]
    config.target.precision = Precision.bfloat16
    with pytest.raises(PipelineError) as error:
        lineage.teacher_cache(config, lineage.target(config))
    lines = str(error.value).splitlines()
    assert lines[0].endswith("does not fit: 3 field(s) of its contract differ")
    assert [line.strip() for line in lines[1:4]] == [
        "features.tapped_layers: found [0, 2], wanted [1, 2]",
        "target.weight_precision: found 'float32', wanted 'bfloat16'",
        "text.reasoning_efforts: found ['low'], wanted ['high']",
    ]
    assert "python -m pipeline stage=teacher_cache" in lines[4]


def sealed_draft(config, path):
    """Weights do not matter here, only what is said of them."""
    scratch, target = artifacts.open_scratch(path, resume=False), lineage.target(config)
    sizes = lineage.draft_config(config, target)
    artifacts.write_json(scratch / "config.json", hf_draft.config_to_hf(sizes, "float32", {}))
    contract = lineage.draft_contract(config, target, {})
    artifacts.seal(path, kind=lineage.DRAFT, settings={}, contract=contract.to_json())
    return str(path)


def test_any_draft_given_by_path_is_served_that_shares_the_target(config, tmp_path):
    config.export.path = sealed_draft(config, tmp_path / "draft")
    config.draft.block_size, config.draft.tapped_layers = 3, [1, 2]  # this configuration's, not the given draft's
    assert lineage.exported_draft(config, lineage.target(config)).contract["draft"]["block_size"] == 4


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("mask_token_id", 5, "draft.mask_token_id: found 5, wanted 60"),
        ("target_layer_ids", [0, 1], r"features.tapped_layers: found \[0, 1\], wanted \[0, 2\]"),
    ],
)
def test_a_draft_whose_file_is_not_what_its_contract_says_is_refused(config, tmp_path, key, value, problem):
    config.export.path = sealed_draft(config, tmp_path / "draft")
    target, file = lineage.target(config), tmp_path / "draft" / "config.json"
    values = json.loads(file.read_text())
    values["dflash_config"][key] = value
    file.write_text(json.dumps(values, indent=2, sort_keys=True).ljust(file.stat().st_size))  # of the same size
    with pytest.raises(PipelineError, match=problem):
        lineage.exported_draft(config, target)


def test_a_draft_of_another_target_or_tokenizer_is_refused(config, tmp_path):
    config.export.path = sealed_draft(config, tmp_path / "draft")
    other = tiny_training.make_target(tmp_path / "target")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"0": 1, "1": 0}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    (other / "chat_template.jinja").write_text("other")
    config.target.path = str(other)
    with pytest.raises(PipelineError, match="2 field") as error:
        lineage.exported_draft(config, lineage.target(config))
    assert "text.chat_template_fingerprint: found" in str(error.value)
    assert "text.tokenizer_fingerprint: found" in str(error.value)


def test_an_artifact_of_another_kind_is_refused(config, prepared):
    config.export.path = str(cache_address(prepared))
    with pytest.raises(PipelineError, match="holds a teacher_cache, wanted a draft"):
        lineage.exported_draft(config, lineage.target(config))


def test_a_draft_takes_its_sizes_from_target_and_configuration(config):
    draft = lineage.draft_config(config, lineage.target(config))
    assert draft.tapped_layers == (0, 2)
    assert len(draft.tapped_layers) == NUM_TAPPED
    assert (draft.hidden_size, draft.vocab_size) == (tiny_training.TARGET.hidden_size, tiny_training.VOCAB_SIZE)
    assert draft.mask_token_id == tiny_training.VOCAB_SIZE - 1
    assert (draft.block_size, draft.head_dim, draft.num_target_layers) == (4, 6, 4)


def test_a_mask_token_that_the_tokenizer_lacks_is_refused(config):
    assert config.draft.mask_token == MASK_TOKEN
    config.draft.mask_token = "<|nobody|>"
    with pytest.raises(PipelineError, match=r"draft.mask_token '<\|nobody\|>' has id None .* vocabulary of 61"):
        lineage.draft_config(config, lineage.target(config))


def test_a_mask_token_past_the_targets_embedding_is_refused(config):
    with pytest.raises(PipelineError, match="has id 60 .* wanted a token below the target's vocabulary of 60"):
        lineage.mask_token_id(Path(config.target.path), config, 60)


@pytest.mark.parametrize(
    ("layers", "told"), [([0, 3], r"\[3\]"), ([-1, 1], r"\[-1\]"), ([2, 4, 9], r"\[4, 9\]")], ids=str
)
def test_layers_that_cannot_be_tapped_are_all_named(config, layers, told):
    config.draft.tapped_layers = layers
    with pytest.raises(PipelineError, match=rf"draft.tapped_layers has {told}; a target of 4 layers .* 0\.\.2"):
        lineage.draft_config(config, lineage.target(config))


def test_more_layers_than_there_are_is_refused(config):
    config.draft.num_tapped_layers = 4
    with pytest.raises(PipelineError, match="lower draft.num_tapped_layers"):
        lineage.draft_config(config, lineage.target(config))
