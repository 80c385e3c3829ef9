"""A Llama out of a GGUF file as a target: transformers' own arithmetic, and a stage that can be killed."""

import os
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from pipeline.artifacts import artifact, files
from pipeline.artifacts.hashing import file_sha256
from pipeline.config.fields import TARGET
from pipeline.config.schema import PipelineConfig, PretrainedConfig, TargetConfig
from pipeline.errors import PipelineError
from pipeline.model.gpt_oss import forward as gpt_oss
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf.directory import read_config, read_target
from pipeline.prompts.tokenizer import load_tokenizer
from pipeline.target import llama, stage
from pipeline.target.gguf_file import GgufFile
from pipeline.tracking.run import SilentRun
from pipeline.workspace.workspace import Workspace
from tests.support import gguf as tiny_gguf
from tests.support.killed import kill_when_stopped
from tests.support.oracles import run_oracle

TOLERANCE = 1e-4
MEMBER = "tiny_llama/tiny.gguf"
STOPPING_PROCESS = """
import pickle, sys, time
from pipeline.target import stage
from pipeline.tracking.run import SilentRun
def stopping(directory, *rest):
    (directory / "model.safetensors").write_bytes(b"half")
    print("stopped", flush=True)
    time.sleep(3600)
stage.save_target = stopping
stage.run(pickle.load(open(sys.argv[1], "rb")), SilentRun())
"""


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """A tiny Llama with tied embeddings, as SmolLM2 has them."""
    return tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def configuration(root, made_from, **changes):
    """Of a target made from a file, which is given by its path unless `gguf` says otherwise."""
    pretrained = PretrainedConfig(wheel="tiny-llama==1.0", file=MEMBER, sha256=file_sha256(made_from))
    target = TargetConfig(name="converted", pretrained=pretrained, gguf=str(made_from))
    for key, value in changes.items():
        setattr(target if key == "gguf" else pretrained, key, value)
    return PipelineConfig(output_dir=str(root), target=target)


def logits_of(directory, token_ids):
    target = read_target(directory, WeightFormat())
    hidden = jax.jit(gpt_oss.forward)(target, token_ids, jnp.zeros(len(token_ids), jnp.int32), None).hidden
    return np.asarray(gpt_oss.logits(target.weights, hidden))


@pytest.mark.conformance
@pytest.mark.parametrize(
    ("tied", "kernels"), [(True, Kind.Q4_1), (False, Kind.Q8_0)], ids=["tied, Q4_1", "untied, Q8_0"]
)
def test_the_target_computes_what_transformers_llama_computes(tmp_path, tied, kernels):
    file = tiny_gguf.write(tmp_path / "tiny.gguf", seed=1, tied=tied, kernels=kernels)
    config = configuration(tmp_path / "outputs", file)
    stage.run(config, SilentRun())
    token_ids = np.random.default_rng(0).integers(0, tiny_gguf.VOCABULARY, (2, 70)).astype(np.int32)
    np.savez(tmp_path / "in.npz", input_ids=token_ids)
    run_oracle("llama_forward", gguf=file, inputs=tmp_path / "in.npz", outputs=tmp_path / "out.npz")
    wanted = np.load(tmp_path / "out.npz")["logits"]
    found = logits_of(Workspace(config).target.path, token_ids)
    assert wanted.std() > 1  # weights so small that errors hide would prove nothing
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


def test_transformers_opens_the_target_as_gpt_oss_and_computes_the_same(gguf, tmp_path):
    config = configuration(tmp_path / "outputs", gguf)
    stage.run(config, SilentRun())
    path = Workspace(config).target.path
    token_ids = np.random.default_rng(1).integers(0, tiny_gguf.VOCABULARY, (2, 33)).astype(np.int32)
    np.savez(tmp_path / "in.npz", input_ids=token_ids)
    run_oracle("gpt_oss_forward", model=path, inputs=tmp_path / "in.npz", outputs=tmp_path / "out.npz")
    wanted = np.load(tmp_path / "out.npz")["logits"]
    np.testing.assert_allclose(logits_of(path, token_ids), wanted, rtol=0, atol=TOLERANCE)


def test_the_target_is_an_ordinary_artifact_of_full_attention_layers_in_float32(gguf, tmp_path):
    config = configuration(tmp_path, gguf)
    stage.run(config, SilentRun())
    target = artifact.read(Workspace(config).address(TARGET), TARGET, make_with="the test", verify=True)
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= target.files.keys()
    assert not [name for name in target.files if name.endswith(".gguf")]
    written = read_config(target.path)
    assert written["layer_types"] == ["full_attention"] * tiny_gguf.LAYERS
    assert (written["dtype"], written["swiglu_limit"], written["rms_norm_eps"]) == ("float32", 1000.0, 1e-5)
    assert (written["bos_token_id"], written["eos_token_id"], written["pad_token_id"]) == (1, 2, 2)
    assert load_tokenizer(target.path).eos_token == "<|im_end|>"
    stage.run(config, SilentRun())  # finds it complete
    assert artifact.read(target.path, TARGET, make_with="the test").fingerprint == target.fingerprint


def test_the_address_follows_the_files_sha256_and_neither_its_path_nor_its_wheel(gguf, tmp_path):
    address = Workspace(configuration(tmp_path, gguf)).address(TARGET)
    assert Workspace(configuration(tmp_path, gguf, gguf=None, wheel="other==2.0")).address(TARGET) == address
    assert Workspace(configuration(tmp_path, gguf, sha256="0" * 64)).address(TARGET) != address


def wheel_of(directory, content):
    """A wheel that pip accepts, with one file in it."""
    directory.mkdir(parents=True)
    with zipfile.ZipFile(directory / "tiny_llama-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(MEMBER, content)
        info = "tiny_llama-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-llama\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return directory


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A directory that is all that pip sees: there is no network in tests."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    for name in ("PIP_CONSTRAINT", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "index"


def test_a_file_out_of_a_wheel_makes_the_same_target_as_the_file_itself(gguf, tmp_path, index):
    wheel_of(index, gguf.read_bytes())
    by_wheel, by_file = configuration(tmp_path / "a", gguf, gguf=None), configuration(tmp_path / "b", gguf)
    for config in (by_wheel, by_file):
        stage.run(config, SilentRun())
    first, second = (
        artifact.read(Workspace(config).address(TARGET), TARGET, make_with="the test", verify=True)
        for config in (by_wheel, by_file)
    )
    assert first.fingerprint == second.fingerprint
    assert first.files.keys() == second.files.keys()


def test_without_the_package_one_error_says_where_to_get_it(gguf, tmp_path, index):
    index.mkdir()
    with pytest.raises(PipelineError) as error:
        stage.run(configuration(tmp_path, gguf, gguf=None), SilentRun())
    message = str(error.value)
    assert message.startswith("pip cannot download tiny-llama==1.0: ERROR: Could not find a version")
    assert "check the network and pip's index (pip config list), or take the wheel" in message
    assert f"set target.gguf to its {MEMBER}" in message
    assert not artifact.exists(Workspace(configuration(tmp_path, gguf)).address(TARGET))


def test_a_wheel_without_the_file_is_refused(gguf, tmp_path, index):
    wheel_of(index, gguf.read_bytes())
    with pytest.raises(PipelineError, match=r"tiny_llama-1.0-py3-none-any.whl holds no other.gguf .*set target.pretr"):
        stage.run(configuration(tmp_path, gguf, gguf=None, file="other.gguf"), SilentRun())


def test_another_file_than_was_meant_is_refused_wherever_it_comes_from(gguf, tmp_path, index):
    wheel_of(index, b"other" + gguf.read_bytes())
    with pytest.raises(
        PipelineError, match=r"\(from tiny-llama==1.0\) has sha256 \w{64}, wanted \w{64}: it is damaged"
    ):
        stage.run(configuration(tmp_path / "a", gguf, gguf=None), SilentRun())
    wrong = configuration(tmp_path / "b", gguf, sha256="0" * 64)
    with pytest.raises(PipelineError, match=rf"tiny.gguf \(target.gguf\) has sha256 \w{{64}}, wanted {'0' * 64}"):
        stage.run(wrong, SilentRun())


def test_a_file_that_is_not_there_is_refused(gguf, tmp_path):
    with pytest.raises(PipelineError, match=r"target.gguf is /nowhere/x.gguf, which is no file"):
        stage.run(configuration(tmp_path, gguf, gguf="/nowhere/x.gguf"), SilentRun())


def test_killed_and_begun_again_it_makes_the_same_bytes_without_downloading_again(gguf, tmp_path, index):
    undisturbed = configuration(tmp_path / "undisturbed", gguf)
    stage.run(undisturbed, SilentRun())
    config = configuration(tmp_path / "killed", gguf, gguf=None)
    wheel_of(index, gguf.read_bytes())
    kill_when_stopped(STOPPING_PROCESS, config, tmp_path)
    path = Workspace(config).address(TARGET)
    assert not artifact.exists(path)
    torn = artifact.scratch_of(path) / "download-abc"  # as a kill while pip works leaves it
    torn.mkdir()
    (torn / "some.whl").write_text("half")
    next(index.iterdir()).unlink()
    stage.run(config, SilentRun())
    resumed, wanted = (
        artifact.read(Workspace(each).address(TARGET), TARGET, make_with="the test", verify=True)
        for each in (config, undisturbed)
    )
    assert resumed.fingerprint == wanted.fingerprint
    assert resumed.files.keys() == wanted.files.keys()
    assert not artifact.scratch_of(path).exists()


def test_a_full_disk_is_reported_before_anything_is_converted(gguf, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda path: 100_000)
    with pytest.raises(PipelineError, match=r"the target needs 1 MiB at .*, 0 MiB are free; free some space"):
        stage.run(configuration(tmp_path, gguf), SilentRun())


REFUSED = {
    "another architecture": (
        {"metadata": {"general.architecture": "qwen2"}},
        "holds a model of architecture 'qwen2'; wanted a 'llama'",
    ),
    "a tensor that Llamas lack": (
        {"tensors": {"blk.0.attn_q.bias": np.zeros(96, np.float32)}},
        "has 1 tensor(s) that a plain Llama lacks: blk.0.attn_q.bias",
    ),
    "another tokenizer": (
        {"metadata": {"tokenizer.ggml.pre": "qwen2"}},
        "another tokenizer than SmolLM2:\n  tokenizer.ggml.pre: found 'qwen2', wanted 'smollm'",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_converted_is_refused(tmp_path, options, message):
    file = tiny_gguf.write(tmp_path / "tiny.gguf", **options)
    with pytest.raises(PipelineError) as error:
        stage.run(configuration(tmp_path / "outputs", file), SilentRun())
    assert message in str(error.value)


@pytest.mark.parametrize("size", [0, 100, 20_000], ids=["empty", "cut in the header", "cut in the metadata"])
def test_a_file_that_is_cut_off_is_refused(gguf, tmp_path, size):
    (tmp_path / "cut.gguf").write_bytes(gguf.read_bytes()[:size])
    with pytest.raises(PipelineError, match=r"cut.gguf cannot be read as GGUF .*give a whole GGUF file"):
        GgufFile(tmp_path / "cut.gguf")


def test_missing_metadata_and_tensors_are_named(gguf):
    file = GgufFile(gguf)
    with pytest.raises(PipelineError, match=r"has no a.b, c.d; give a GGUF that names them"):
        file.values(["a.b", "general.architecture", "c.d"])
    with pytest.raises(PipelineError, match=r"has no tensor blk.9.attn_q.weight"):
        file.tensor("blk.9.attn_q.weight", (1,))
    with pytest.raises(PipelineError, match=r"output_norm.weight has shape \(96,\), wanted \(7,\)"):
        file.tensor("output_norm.weight", (7,))


def test_a_quantisation_that_cannot_be_read_is_named(tmp_path):
    file = tiny_gguf.write(tmp_path / "tiny.gguf", tensors={"counts": np.arange(32, dtype=np.int32)})
    with pytest.raises(PipelineError, match=r"counts is quantised as I32, which the gguf package does not read"):
        GgufFile(file).tensor("counts", (32,))


def test_rows_of_rotated_pairs_are_put_half_a_head_apart():
    heads, width = 2, 6  # llama.cpp: pair by pair; here: all first rows of a head, then all second ones
    kernel = np.arange(heads * width, dtype=np.float32)[:, None]
    assert llama.halves_apart(kernel, heads)[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
