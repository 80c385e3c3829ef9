"""What decides the bytes of an artifact decides its key, and nothing else does."""

import dataclasses

import pytest

from pipeline.config import fields
from pipeline.config.choices import Effort, Precision, PromptSource
from pipeline.config.fields import CHECKPOINT, DRAFT, TARGET, TEACHER_CACHE, setting
from pipeline.config.schema import ArchitectureConfig, PipelineConfig, PretrainConfig, PretrainedConfig
from pipeline.errors import PipelineError
from pipeline.workspace import settings
from pipeline.workspace.workspace import Workspace
from tests.support import training as tiny_training

KINDS = (TARGET, TEACHER_CACHE, CHECKPOINT, DRAFT)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A target; read only."""
    root = tmp_path_factory.mktemp("settings")
    tiny_training.make_target(root / "target")
    return root


@pytest.fixture
def config(prepared):
    """A configuration of it that a test may change."""
    return tiny_training.configuration(prepared)


def keys_of(config):
    """The keys of all that is made from the target, and the target's own."""
    workspace = Workspace(config)
    return {kind: workspace.key(kind) for kind in KINDS}


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
CHECKPOINT_CHANGES = {
    "steps of training": lambda config: setattr(config.train, "steps", 13),
    "learning rate": lambda config: setattr(config.train, "learning_rate", 1e-4),
    "block size": lambda config: setattr(config.draft, "block_size", 3),
    "draft's depth": lambda config: setattr(config.draft, "num_hidden_layers", 3),
    "RoPE of the draft": lambda config: setattr(config.draft, "rope_theta", 1e4),
    "mesh": lambda config: setattr(config.train.mesh, "tensor", 2),
}
DRAFT_CHANGES = {"prompts of the check": lambda config: setattr(config.export, "num_prompts", 3)}
UNCOUNTED = {
    "endpoint that is not asked": lambda config: setattr(config.teacher_cache.openai, "model", "other"),
    "log steps": lambda config: setattr(config.train, "log_steps", 3),
    "bench": lambda config: setattr(config.bench, "slots", 3),
    "port": lambda config: setattr(config.serve, "port", 1234),
    "date of the server": lambda config: setattr(config.serve, "date", "2026-01-01"),
    "effort of the server": lambda config: setattr(config.serve, "slots", 3),
    "engine": lambda config: setattr(config.engine, "prefill_chunk", 8),
    "mix without mixing": lambda config: config.prompts.effort_mix.update(low=2.0),
    "tracking": lambda config: setattr(config.tracking, "experiment", "other"),
    "verification": lambda config: setattr(config, "verify", True),
    "the target's name": lambda config: setattr(config.target, "name", "other"),
}


def changed_by(config, change):
    before = keys_of(config)
    change(config)
    after = keys_of(config)
    return {kind for kind in KINDS if before[kind] != after[kind]}


@pytest.mark.parametrize("change", CACHE_CHANGES.values(), ids=CACHE_CHANGES.keys())
def test_what_decides_a_caches_bytes_decides_the_keys_of_it_and_of_all_that_is_made_from_it(config, change):
    assert changed_by(config, change) == {TEACHER_CACHE, CHECKPOINT, DRAFT}


@pytest.mark.parametrize("change", CHECKPOINT_CHANGES.values(), ids=CHECKPOINT_CHANGES.keys())
def test_what_decides_a_checkpoints_bytes_decides_its_key_and_not_the_caches(config, change):
    assert changed_by(config, change) == {CHECKPOINT, DRAFT}


@pytest.mark.parametrize("change", DRAFT_CHANGES.values(), ids=DRAFT_CHANGES.keys())
def test_what_decides_a_drafts_bytes_decides_its_key_alone(config, change):
    assert changed_by(config, change) == {DRAFT}


@pytest.mark.parametrize("change", UNCOUNTED.values(), ids=UNCOUNTED.keys())
def test_what_decides_no_bytes_decides_no_key(config, change):
    assert changed_by(config, change) == set()


def whole():
    """A configuration in which no group is null."""
    config = PipelineConfig()
    config.target.architecture, config.target.pretrain = ArchitectureConfig(), PretrainConfig()
    config.target.pretrained = PretrainedConfig()
    return config


def fields_of(config, prefix=""):
    """The dotted names of all values of a configuration, by their dataclasses alone."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def test_every_field_of_the_schema_says_which_artifacts_it_decides():
    declared = {leaf.name: leaf.declaration for leaf in fields.leaves(whole())}
    assert declared.keys() == set(fields_of(whole()))
    assert all(set(declaration.kinds) <= set(KINDS) for declaration in declared.values())
    assert {kind for declaration in declared.values() for kind in declaration.kinds} == set(KINDS)


@dataclasses.dataclass(kw_only=True)
class Old:
    """A schema of two fields."""

    steps: int = setting(3, key=CHECKPOINT)
    port: int = setting(1, key=None)


@dataclasses.dataclass(kw_only=True)
class Grown(Old):
    """A later one: a field that did nothing before, and one whose default is another way."""

    share: float = setting(0.0, unset=0.0, key=CHECKPOINT)
    method: str = setting("new", unset="old", key=CHECKPOINT)


def test_a_new_field_leaves_every_key_as_it_was_at_the_value_that_reproduces_what_was_done_before():
    before = settings.declared(Old(), CHECKPOINT)
    assert before == {"steps": 3}
    assert settings.declared(Grown(method="old"), CHECKPOINT) == before


def test_a_new_default_that_does_something_else_gives_other_keys():
    assert settings.declared(Grown(), CHECKPOINT) == {"steps": 3, "method": "new"}
    assert settings.declared(Grown(share=0.5, method="old"), CHECKPOINT) == {"steps": 3, "share": 0.5}


def test_a_changed_default_gives_other_keys():
    @dataclasses.dataclass(kw_only=True)
    class Changed(Old):
        steps: int = setting(4, key=CHECKPOINT)

    assert settings.declared(Changed(), CHECKPOINT) != settings.declared(Old(), CHECKPOINT)
    assert settings.declared(Changed(steps=3), CHECKPOINT) == settings.declared(Old(), CHECKPOINT)


def test_a_prompt_file_counts_by_its_bytes_not_by_its_name(config, tmp_path):
    config.prompts.source = PromptSource.jsonl
    keys = []
    for name, text in (("one", "a"), ("two", "a"), ("two", "b")):
        (tmp_path / name).write_text(text)
        config.prompts.path = str(tmp_path / name)
        keys.append(Workspace(config).key(TEACHER_CACHE))
    assert keys[0] == keys[1] != keys[2]
    config.prompts.path = str(tmp_path / "three")
    with pytest.raises(PipelineError, match=r"prompts.path is .*three, which is no file"):
        Workspace(config).key(TEACHER_CACHE)


def test_a_local_dataset_counts_by_its_files_not_by_where_it_is(config, tmp_path):
    config.prompts.source = PromptSource.dataset
    keys = []
    for name, text in (("one", "a"), ("two", "a"), ("two", "b")):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "part.jsonl").write_text(text)
        for path in (tmp_path / name, tmp_path / name / "part.jsonl"):
            config.prompts.dataset = str(path)
            keys.append(Workspace(config).key(TEACHER_CACHE))
    assert keys[:2] == keys[2:4]
    assert len(set(keys)) == 4


def test_a_dataset_of_the_hub_counts_by_the_commit_that_its_revision_names(config, monkeypatch):
    config.prompts.source, config.prompts.dataset = PromptSource.dataset, "owner/prompts"
    commits = {None: "a" * 40, "v1": "a" * 40, "v2": "b" * 40}
    monkeypatch.setattr("pipeline.hub.dataset_commit", lambda name, revision: commits[revision])
    keys = []
    for config.prompts.dataset_revision in commits:
        keys.append(Workspace(config).key(TEACHER_CACHE))
    assert keys[0] == keys[1] != keys[2]
    commits["v1"] = "c" * 40  # the branch moved on
    config.prompts.dataset_revision = "v1"
    assert Workspace(config).key(TEACHER_CACHE) not in keys


def test_derived_sizes_of_a_draft_count_as_the_same_sizes_written_out(config):
    derived = dataclasses.replace(
        config.draft,
        num_tapped_layers=None,
        num_attention_heads=None,
        num_key_value_heads=None,
        head_dim=None,
        intermediate_size=None,
    )
    config.draft = derived
    before = Workspace(config).key(CHECKPOINT)
    config.draft = dataclasses.replace(
        derived,
        num_tapped_layers=3,
        num_attention_heads=tiny_training.TARGET.num_attention_heads,
        num_key_value_heads=tiny_training.TARGET.num_key_value_heads,
        head_dim=tiny_training.TARGET.head_dim,
        intermediate_size=128,
    )
    assert Workspace(config).key(CHECKPOINT) == before


def test_a_url_is_an_endpoint_by_its_host_alone():
    assert settings.host_of("https://here:8000/v1") == "here:8000"
    assert settings.host_of("https://there/v1") == "there"
