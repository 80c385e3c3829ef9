"""The sizes of a draft: from the configuration, and from the target where the configuration leaves them open."""

from pathlib import Path

import pytest

from pipeline.config.choices import Effort
from pipeline.config.schema import DraftConfig
from pipeline.errors import PipelineError
from pipeline.workspace import specs
from pipeline.workspace.workspace import Workspace
from tests.support import training as tiny_training
from tests.support.training import MASK_TOKEN, NUM_TAPPED


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A target; read only."""
    root = tmp_path_factory.mktemp("specs")
    tiny_training.make_target(root / "target")
    return root


@pytest.fixture
def config(prepared):
    """A configuration of it that a test may change."""
    return tiny_training.configuration(prepared)


def test_a_draft_takes_its_sizes_from_target_and_configuration(config):
    draft = Workspace(config).draft_config
    assert draft.tapped_layers == (0, 2)
    assert len(draft.tapped_layers) == NUM_TAPPED
    assert (draft.hidden_size, draft.vocab_size) == (tiny_training.TARGET.hidden_size, tiny_training.VOCAB_SIZE)
    assert draft.mask_token_id == tiny_training.VOCAB_SIZE - 1
    assert (draft.block_size, draft.head_dim, draft.num_target_layers) == (4, 6, 4)


def test_what_a_configuration_leaves_open_follows_from_the_target():
    model = tiny_training.TARGET
    draft = specs.draft_sizes(DraftConfig(), model, 60)
    assert draft.tapped_layers == (0, 1, 2)  # of four layers at most three can be tapped
    heads = (draft.num_attention_heads, draft.num_key_value_heads, draft.head_dim)
    assert heads == (model.num_attention_heads, model.num_key_value_heads, model.head_dim)
    assert draft.intermediate_size == 128  # 8/3 of 20, up to a multiple of 128


def test_a_mask_token_that_the_tokenizer_lacks_is_refused(config):
    assert config.draft.mask_token == MASK_TOKEN
    config.draft.mask_token = "<|nobody|>"
    with pytest.raises(PipelineError, match=r"draft.mask_token '<\|nobody\|>' has id None .* vocabulary of 61"):
        _ = Workspace(config).draft_config


def test_a_mask_token_past_the_targets_embedding_is_refused(config):
    with pytest.raises(PipelineError, match="has id 60 .* wanted a token below the target's vocabulary of 60"):
        specs.mask_token_id(Path(config.target.path), MASK_TOKEN, 60)


@pytest.mark.parametrize(
    ("layers", "named"), [([0, 3], r"\[3\]"), ([-1, 1], r"\[-1\]"), ([2, 4, 9], r"\[4, 9\]")], ids=str
)
def test_layers_that_cannot_be_tapped_are_all_named(config, layers, named):
    config.draft.tapped_layers = layers
    with pytest.raises(PipelineError, match=rf"draft.tapped_layers has {named}; a target of 4 layers .* 0\.\.2"):
        _ = Workspace(config).draft_config


def test_more_layers_than_there_are_is_refused(config):
    config.draft.num_tapped_layers = 4
    with pytest.raises(PipelineError, match="lower draft.num_tapped_layers"):
        _ = Workspace(config).draft_config


def test_mixed_efforts_are_drawn_by_the_shares_and_the_seed(config):
    config.prompts.effort = Effort.mixed
    assert len({prompt.effort for prompt in Workspace(config).prompts.prompts}) == 3
    config.prompts.effort_mix = {"high": 1.0}
    assert {prompt.effort for prompt in Workspace(config).prompts.prompts} == {"high"}


@pytest.mark.parametrize(
    ("text", "temperature"),
    [
        (None, 1.0),
        ("{}", 1.0),
        ('{"do_sample": true}', 1.0),
        ('{"do_sample": false}', 0.0),
        ('{"temperature": 0.6, "do_sample": true}', 0.6),
    ],
)
def test_a_request_without_a_temperature_gets_the_models_or_one(tmp_path, text, temperature):
    if text is not None:
        (tmp_path / "generation_config.json").write_text(text)
    assert specs.default_temperature(tmp_path) == temperature


def test_a_temperature_that_is_none_is_refused(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"temperature": "hot"}')
    with pytest.raises(PipelineError, match=r"generation_config\.json: temperature: found 'hot', wanted a number"):
        specs.default_temperature(tmp_path)
