"""Every runtime's own reader opens an exported draft, and none of these tests passes on a broken one."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.export.write import write_draft
from pipeline.model.dflash import forward as dflash
from pipeline.model.hf.directory import read_draft
from pipeline.model.layers import kv_pages
from pipeline.model.layers.rope import Rope
from tests.support import training as tiny_training
from tests.support.environments import told_by
from tests.support.oracles import run_oracle

pytestmark = [pytest.mark.conformance, pytest.mark.slow]  # each in an environment of its own

NUM_POSITIONS = 11
TOLERANCE = 1e-4  # of hidden states with deviation 1, in float32
TOKEN_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
PLAIN = dataclasses.replace(
    tiny_training.DRAFT,
    vocab_size=tiny_training.VOCAB_SIZE,
    mask_token_id=tiny_training.VOCAB_SIZE - 1,
    rope=Rope(theta=1e6),
    block_size=8,
)
YARN = Rope(theta=150000.0, factor=8.0, truncate=False, original_max_position_embeddings=32)
DRAFTS = {
    "plain": PLAIN,
    "biases": dataclasses.replace(PLAIN, attention_bias=True, block_size=10),
    "YaRN": dataclasses.replace(PLAIN, rope=YARN, max_position_embeddings=256),
}
RENAMED = "layers.1.self_attn.k_norm.weight"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Drafts as stage=export writes them, and the inputs of one block."""
    root = tmp_path_factory.mktemp("dflash")
    random = np.random.default_rng(7)
    for name, config in DRAFTS.items():
        directory = root / name
        directory.mkdir()
        write_draft(directory, tiny_training.draft_of(0, config), TOKEN_IDS)
        features = random.normal(size=(NUM_POSITIONS, config.feature_size)).astype(np.float32)
        embeddings = random.normal(size=(config.block_size, config.hidden_size)).astype(np.float32)
        np.savez(root / f"{name}.npz", features=features, noise_embedding=embeddings)
    return root


def ours(directory: Path, inputs: Path) -> np.ndarray:
    """Hidden states [K, D] of the block behind the features, by the engine's own functions."""
    draft = read_draft(directory, jnp.float32)
    given = np.load(inputs)
    context = dflash.context(draft, jnp.asarray(given["features"])[None], jnp.arange(NUM_POSITIONS)[None])
    table = kv_pages.consecutive_tables(1, 32, 16).whole
    cache = dflash.empty_cache(draft.config, table.size, 16, jnp.float32)
    cache = dflash.extend(cache, context, table, jnp.zeros(1, jnp.int32))
    start = jnp.full(1, NUM_POSITIONS)
    return np.asarray(dflash.denoise(draft, jnp.asarray(given["noise_embedding"])[None], start, cache, table)[0])


def furthest(directory: Path, inputs: Path, outputs: Path) -> float:
    """The largest difference of another program's hidden states from ours."""
    wanted = ours(directory, inputs)
    found = np.load(outputs)["hidden"].reshape(wanted.shape)
    assert wanted.std() > 0.5
    difference = float(np.abs(found - wanted).max())
    print(f"largest difference {difference:.1e} of hidden states with deviation {wanted.std():.2f}")
    return difference


def with_tensors(source: Path, directory: Path, rename) -> Path:
    """A copy whose tensors have other names."""
    shutil.copytree(source, directory)
    tensors = load_file(source / "model.safetensors")
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def with_config(source: Path, directory: Path, *without: str) -> Path:
    """A copy whose config lacks keys."""
    shutil.copytree(source, directory)
    config = json.loads((source / "config.json").read_text())
    left = {key: value for key, value in config.items() if key not in without}
    (directory / "config.json").write_text(json.dumps(left))
    return directory


def renamed(name: str) -> str:
    return name.replace("k_norm", "key_norm") if name == RENAMED else name


def prefixed(name: str) -> str:
    return f"model.{name}"


# --- z-lab dflash 0.1.0 ---


def z_lab(directory, inputs, tmp_path):
    """The package's own class; ValueError in the program when a tensor is missing or unexpected."""
    given = np.load(inputs)
    batch = {name: given[name][None] for name in ("features", "noise_embedding")}
    np.savez(tmp_path / "in.npz", **batch)
    run_oracle("dflash_forward", draft=directory, inputs=tmp_path / "in.npz", outputs=tmp_path / "out.npz")
    return tmp_path / "out.npz"


@pytest.mark.parametrize("name", DRAFTS)
def test_z_lab_opens_every_draft_and_computes_the_same(exported, tmp_path, name):
    directory, inputs = exported / name, exported / f"{name}.npz"
    assert furthest(directory, inputs, z_lab(directory, inputs, tmp_path)) < TOLERANCE


@pytest.mark.parametrize("rename", [renamed, prefixed])
def test_z_lab_is_told_of_a_tensor_with_another_name(exported, tmp_path, rename):
    broken = with_tensors(exported / "plain", tmp_path / "broken", rename)
    with pytest.raises(AssertionError, match="does not fit the model.*missing_keys"):
        z_lab(broken, exported / "plain.npz", tmp_path)


def test_z_lab_computes_otherwise_without_theta(exported, tmp_path):
    broken = with_config(exported / "plain", tmp_path / "broken", "rope_theta", "rope_parameters")
    outputs = z_lab(broken, exported / "plain.npz", tmp_path)
    assert furthest(exported / "plain", exported / "plain.npz", outputs) > 100 * TOLERANCE


# --- transformers, whose AutoConfig most runtimes read config.json with ---

TRANSFORMERS = {"transformers4": "4.57.6", "transformers5": "5.24.0", "speculators": "5.19.0"}


def read_by_transformers(environment, directory, tmp_path):
    told = told_by(environment, "transformers_config", draft=directory, saved=tmp_path / f"saved-{environment}")
    assert told["version"] == TRANSFORMERS[environment]
    return told


@pytest.mark.parametrize("environment", TRANSFORMERS)
@pytest.mark.parametrize("name", DRAFTS)
def test_transformers_reads_the_same_config_and_again_when_it_has_saved_it(exported, tmp_path, environment, name):
    config = DRAFTS[name]
    told = read_by_transformers(environment, exported / name, tmp_path)
    for found in (told["opened"], told["reopened"]):
        assert found["class"] == "Qwen3Config"
        assert found["rope"].items() >= config.rope.to_hf().items()
        assert found["dflash_config"] == {
            "block_size": config.block_size,
            "mask_token_id": config.mask_token_id,
            "target_layer_ids": list(config.tapped_layers),
            "causal": False,
        }
        assert found["block_size"] == config.block_size
        assert found["num_target_layers"] == config.num_target_layers
        assert found["target_hidden_size"] == config.hidden_size
        assert found["head_dim"] == config.head_dim
        assert found["is_causal"] is False
        assert found["layer_types"] == ["full_attention"] * config.num_hidden_layers
        assert found["attention_bias"] is config.attention_bias


def test_transformers_4_takes_another_theta_where_the_older_spelling_lacks(exported, tmp_path):
    broken = with_config(exported / "plain", tmp_path / "broken", "rope_theta")
    assert read_by_transformers("transformers4", broken, tmp_path)["opened"]["rope"]["rope_theta"] == 10000.0


def test_transformers_5_takes_the_older_spelling_where_the_newer_lacks(exported, tmp_path):
    legacy = with_config(exported / "YaRN", tmp_path / "legacy", "rope_parameters")
    found = read_by_transformers("transformers5", legacy, tmp_path)["opened"]["rope"]
    assert found.items() >= YARN.to_hf().items()


# --- sglang-jax 0.1.0rc0 ---


def sglang_jax(directory, inputs, tmp_path):
    return told_by("sglang_jax", "sglang_jax_draft", draft=directory, inputs=inputs, outputs=tmp_path / "out.npz")


@pytest.mark.parametrize("name", ["plain", "biases"])
def test_sglang_jax_finds_every_tensor_and_computes_the_same(exported, tmp_path, name):
    directory, inputs, config = exported / name, exported / f"{name}.npz", DRAFTS[name]
    told = sglang_jax(directory, inputs, tmp_path)
    assert told["no_file_found"] == []
    assert told["untouched"] == []
    assert told["num_tensors"] == told["num_parameters"] == len(load_file(directory / "model.safetensors"))
    assert told["block_size"] == config.block_size
    assert told["target_layer_ids"] == list(config.tapped_layers)
    assert told["mask_token_id"] == config.mask_token_id
    assert told["rope_theta"] == config.rope.theta
    assert furthest(directory, inputs, tmp_path / "out.npz") < TOLERANCE


@pytest.mark.parametrize(("rename", "lost"), [(renamed, [RENAMED]), (prefixed, None)])
def test_sglang_jax_goes_on_without_a_tensor_that_has_another_name(exported, tmp_path, rename, lost):
    broken = with_tensors(exported / "plain", tmp_path / "broken", rename)
    told = sglang_jax(broken, exported / "plain.npz", tmp_path)
    lost = lost or sorted(load_file(exported / "plain" / "model.safetensors"))
    assert sorted(told["no_file_found"]) == sorted(f"No file found for weight: {name}" for name in lost)
    assert len(told["untouched"]) == len(lost)


def test_sglang_jax_takes_another_theta_without_the_older_spelling(exported, tmp_path):
    broken = with_config(exported / "plain", tmp_path / "broken", "rope_theta")
    assert sglang_jax(broken, exported / "plain.npz", tmp_path)["rope_theta"] == 10000.0
    assert furthest(exported / "plain", exported / "plain.npz", tmp_path / "out.npz") > 100 * TOLERANCE


def test_sglang_jax_does_not_know_yarn_as_the_card_says(exported, tmp_path):
    told = sglang_jax(exported / "YaRN", exported / "YaRN.npz", tmp_path)
    assert told["rope_theta"] == 150000.0
    assert furthest(exported / "YaRN", exported / "YaRN.npz", tmp_path / "out.npz") > 100 * TOLERANCE


# --- speculators 0.9.0: its converter to its own layout ---


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return tiny_training.make_target(tmp_path_factory.mktemp("targets") / "target")


def converted(directory, target, tmp_path):
    return told_by(
        "speculators", "speculators_convert", draft=directory, target=target, converted=tmp_path / "converted"
    )


@pytest.mark.parametrize("name", DRAFTS)
def test_speculators_converts_every_draft(exported, target, tmp_path, name):
    config = DRAFTS[name]
    told = converted(exported / name, target, tmp_path)
    assert told["aux_hidden_state_layer_ids"] == [layer + 1 for layer in config.tapped_layers]  # counted from 1 there
    assert told["block_size"] == config.block_size
    assert told["speculative_tokens"] == config.block_size - 1
    assert told["mask_token_id"] == config.mask_token_id
    assert told["draft_vocab_size"] == config.vocab_size
    assert told["rope"].items() >= config.rope.to_hf().items()
    assert len(told["equal"]) == told["num_tensors"] == len(load_file(exported / name / "model.safetensors"))


@pytest.mark.parametrize("rename", [renamed, prefixed])
def test_speculators_refuses_a_tensor_with_another_name(exported, target, tmp_path, rename):
    broken = with_tensors(exported / "plain", tmp_path / "broken", rename)
    with pytest.raises(AssertionError, match="Unexpected keys in checkpoint"):
        converted(broken, target, tmp_path)


# --- SpecForge 0.2.0: the draft class of its trainer ---


def specforge(directory, inputs, tmp_path):
    return told_by("speculators", "specforge_draft", draft=directory, inputs=inputs, outputs=tmp_path / "out.npz")


@pytest.mark.parametrize("name", DRAFTS)
def test_specforge_opens_every_draft_and_computes_the_same(exported, tmp_path, name):
    directory, inputs, config = exported / name, exported / f"{name}.npz", DRAFTS[name]
    told = specforge(directory, inputs, tmp_path)
    assert told["missing"] == told["unexpected"] == told["mismatched"] == []
    assert told["block_size"] == config.block_size
    assert told["target_layer_ids"] == list(config.tapped_layers)
    assert told["mask_token_id"] == config.mask_token_id
    assert furthest(directory, inputs, tmp_path / "out.npz") < TOLERANCE


def test_specforge_misses_a_tensor_with_another_name(exported, tmp_path):
    broken = with_tensors(exported / "plain", tmp_path / "broken", renamed)
    told = specforge(broken, exported / "plain.npz", tmp_path)
    assert told["missing"] == [RENAMED]
    assert told["unexpected"] == [renamed(RENAMED)]
