"""GPT-OSS out of llama.cpp's GGUF: every number is the one that the gguf package reads."""

import json
import math
import os
import subprocess
import sys

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from safetensors.numpy import load_file

from pipeline.artifacts import artifact, files
from pipeline.config.fields import TARGET
from pipeline.config.schema import ArchitectureConfig, PipelineConfig, TargetConfig
from pipeline.errors import PipelineError
from pipeline.model.gpt_oss import forward as gpt_oss_forward
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf.directory import open_target, read_config, read_target
from pipeline.model.layers import mxfp4
from pipeline.prompts.tokenizer import load_tokenizer
from pipeline.target import gpt_oss, stage
from pipeline.target.gguf_file import GgufFile
from pipeline.tracking.run import SilentRun
from pipeline.workspace.workspace import Workspace
from tests.support import gpt_oss_gguf as tiny
from tests.support.killed import kill_when_stopped
from tests.support.oracles import run_oracle
from tests.support.paths import PROGRAMS, ROOT

TOLERANCE = 1e-4
LAYERS = tiny.CONFIG["num_hidden_layers"]
STOPPING_PROCESS = """
import pickle, sys, time
from pipeline.model.hf import streamed_files
from pipeline.target import stage
from pipeline.tracking.run import SilentRun
write = streamed_files.write
def stopping(file, *rest):
    if "00003" in file.name:
        file.with_name(file.name + ".tmp").write_bytes(b"half")
        print("stopped", flush=True)
        time.sleep(3600)
    write(file, *rest)
streamed_files.write = stopping
stage.run(pickle.load(open(sys.argv[1], "rb")), SilentRun())
"""


@pytest.fixture(scope="module")
def tensors():
    return tiny.checkpoint()


@pytest.fixture(scope="module")
def file(tmp_path_factory, tensors):
    """Experts MXFP4 and the rest bfloat16, as llama.cpp converts openai/gpt-oss-20b."""
    return tiny.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tensors)


def configuration(root, made_from, **target):
    return PipelineConfig(output_dir=str(root), target=TargetConfig(name="converted", gguf=str(made_from), **target))


def converted(root, made_from):
    config = configuration(root, made_from)
    stage.run(config, SilentRun())
    return Workspace(config).target.path


@pytest.fixture(scope="module")
def directory(tmp_path_factory, file):
    return converted(tmp_path_factory.mktemp("outputs"), file)


def stored(directory):
    """All tensors of the directory's files."""
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    found = {name: array for path in set(weight_map.values()) for name, array in load_file(directory / path).items()}
    assert found.keys() == weight_map.keys()
    return found


def logits_of(directory, token_ids, packed=False):
    target = read_target(directory, WeightFormat(packed=packed))
    start = jnp.zeros(len(token_ids), jnp.int32)
    hidden = jax.jit(gpt_oss_forward.forward)(target, token_ids, start, None).hidden
    return np.asarray(gpt_oss_forward.logits(target.weights, hidden))


def some_tokens(seed, length=41):
    return np.random.default_rng(seed).integers(0, tiny.TOKENS, (2, length)).astype(np.int32)


def values_of(reader, name):
    (tensor,) = [tensor for tensor in reader.tensors if tensor.name == name]
    return dequantize(tensor.data, tensor.tensor_type)


def test_mxfp4_experts_keep_every_value_and_every_bit_of_their_scales(file, directory):
    reader, found = gguf.GGUFReader(file), stored(directory)
    for index in range(LAYERS):
        gate, up, down = (values_of(reader, f"blk.{index}.ffn_{name}_exps.weight") for name in ("gate", "up", "down"))
        stem = f"model.layers.{index}.mlp.experts"
        both = np.stack([gate, up], axis=2).reshape(len(gate), -1, gate.shape[-1])
        for name, wanted in (("gate_up_proj", both), ("down_proj", down)):
            blocks, scales = found[f"{stem}.{name}_blocks"], found[f"{stem}.{name}_scales"]
            np.testing.assert_array_equal(mxfp4.dequantised(blocks, scales, np.float32), wanted)
            assert len(np.unique(blocks)) > 200
        (raw,) = [tensor.data for tensor in reader.tensors if tensor.name == f"blk.{index}.ffn_down_exps.weight"]
        np.testing.assert_array_equal(found[f"{stem}.down_proj_scales"], raw[..., ::17])


def test_what_is_no_expert_is_the_bfloat16_that_the_file_was_made_of(tensors, directory):
    found = stored(directory)
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith(tiny.EXPERTS)}
    assert found.keys() - plain.keys() == {
        f"model.layers.{index}.mlp.experts.{name}_{part}"
        for index in range(LAYERS)
        for name in tiny.EXPERTS
        for part in ("blocks", "scales")
    }
    for name, wanted in plain.items():
        assert found[name].dtype == ml_dtypes.bfloat16, name
        np.testing.assert_array_equal(found[name], wanted, err_msg=name)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "expanded"])
def test_the_target_computes_what_the_same_model_in_floats_computes(tmp_path, tensors, directory, packed):
    floats = tiny.save(tmp_path / "floats", tiny.quantised(tensors, Kind.MXFP4, Kind.BF16))
    token_ids = some_tokens(0)
    wanted = logits_of(floats, token_ids)
    assert wanted.std() > 1
    np.testing.assert_allclose(logits_of(directory, token_ids, packed), wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.conformance
def test_the_target_computes_what_transformers_computes_with_the_same_model(tmp_path, tensors, directory):
    floats = tiny.save(tmp_path / "floats", tiny.quantised(tensors, Kind.MXFP4, Kind.BF16))
    token_ids = some_tokens(1)
    np.savez(tmp_path / "in.npz", input_ids=token_ids)
    run_oracle("gpt_oss_forward", model=floats, inputs=tmp_path / "in.npz", outputs=tmp_path / "out.npz")
    wanted = np.load(tmp_path / "out.npz")["logits"]
    np.testing.assert_allclose(logits_of(directory, token_ids), wanted, rtol=0, atol=TOLERANCE)


KINDS = {
    "MXFP4 and Q8_0": (Kind.MXFP4, Kind.Q8_0, {"BF16", "F32", "U8"}),
    "MXFP4 and F16": (Kind.MXFP4, Kind.F16, {"BF16", "F16", "U8"}),
    "all BF16": (Kind.BF16, Kind.BF16, {"BF16"}),
    "all F16": (Kind.F16, Kind.F16, {"BF16", "F16"}),
    "all F32": (Kind.F32, Kind.F32, {"BF16"}),  # they were bfloat16 before
    "all Q8_0": (Kind.Q8_0, Kind.Q8_0, {"BF16", "F32"}),
}


@pytest.mark.parametrize(("experts", "others", "kinds"), KINDS.values(), ids=KINDS.keys())
def test_other_kinds_of_numbers_are_kept_and_quantised_experts_rounded_once(
    tmp_path, tensors, caplog, experts, others, kinds
):
    file = tiny.write(tmp_path / "tiny.gguf", tensors, kinds=(experts, others))
    with caplog.at_level("INFO"):
        found = converted(tmp_path / "outputs", file)
    opened = open_target(found)
    assert {tensor.kind for tensor in opened.files.tensors.values()} == kinds
    assert opened.is_packed == (experts is Kind.MXFP4) == ("quantization_config" in read_config(found))
    assert ("the experts are Q8_0 in the file; they are rounded to bfloat16" in caplog.text) == (experts is Kind.Q8_0)
    wanted = tiny.quantised(tensors, experts, others)
    for name, array in wanted.items():
        if not (opened.is_packed and name.endswith(tiny.EXPERTS)):
            exact = array.astype(ml_dtypes.bfloat16) if experts is Kind.Q8_0 and name.endswith(tiny.EXPERTS) else array
            np.testing.assert_array_equal(opened.files.read(name).astype(np.float32), exact.astype(np.float32), name)
    token_ids = some_tokens(2, length=20)
    floats = tiny.save(tmp_path / "floats", wanted)
    tolerance = 0.05 * logits_of(floats, token_ids).std() if experts is Kind.Q8_0 else TOLERANCE
    np.testing.assert_allclose(logits_of(found, token_ids), logits_of(floats, token_ids), rtol=0, atol=tolerance)


def test_experts_that_are_mxfp4_in_some_layers_alone_become_floats(tmp_path, tensors):
    name = "blk.1.ffn_up_exps.weight"
    rows = np.swapaxes(tensors["model.layers.1.mlp.experts.gate_up_proj"], 1, 2)[:, 1::2].astype(np.float32)
    whole = tiny.write(tmp_path / "whole.gguf", tensors)
    file = tiny.write(tmp_path / "tiny.gguf", tensors, replaced={name: rows})
    found, reader = stored(converted(tmp_path / "outputs", file)), gguf.GGUFReader(whole)
    both = found["model.layers.1.mlp.experts.gate_up_proj"]
    assert both.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(both[..., 1::2].astype(np.float32), np.swapaxes(rows, 1, 2))
    gate = values_of(reader, "blk.1.ffn_gate_exps.weight")
    np.testing.assert_array_equal(both[..., 0::2].astype(np.float32), np.swapaxes(gate, 1, 2))


def test_the_config_is_the_one_that_the_file_was_made_of_in_both_spellings_of_rope(directory):
    found, wanted = read_config(directory), tiny.CONFIG
    assert {key: found[key] for key in wanted} == wanted
    assert found["rope_parameters"] == {**wanted["rope_scaling"], "rope_theta": wanted["rope_theta"]}
    assert found["quantization_config"]["quant_method"] == "mxfp4"
    assert (found["bos_token_id"], found["eos_token_id"], found["pad_token_id"]) == (320, 323, 321)
    generation = json.loads((directory / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 320, "eos_token_id": [323], "pad_token_id": 321}


def test_it_is_an_ordinary_artifact_that_other_stages_find_by_the_files_content(tmp_path, file):
    config = configuration(tmp_path / "outputs", file)
    stage.run(config, SilentRun())
    found = artifact.read(Workspace(config).address(TARGET), TARGET, make_with="the test", verify=True)
    moved = tmp_path / "moved.gguf"
    moved.write_bytes(file.read_bytes())
    again = Workspace(configuration(tmp_path / "outputs", moved))
    assert again.target.path == found.path
    assert again.tokenizer.eos_token == "<|return|>"
    assert set(again.stop_token_ids) == {again.tokenizer.convert_tokens_to_ids(t) for t in tiny.ENDS}
    moved.write_bytes(file.read_bytes() + b"\0")
    assert Workspace(configuration(tmp_path / "outputs", moved)).address(TARGET) != found.path
    stage.run(config, SilentRun())  # finds it complete
    assert artifact.read(found.path, TARGET, make_with="the test").fingerprint == found.fingerprint


def test_a_split_file_makes_the_same_target_whichever_part_is_named(tmp_path, tensors, directory):
    first = tiny.write(tmp_path / "tiny.gguf", tensors, split_tensors=20)
    parts = sorted(tmp_path.glob("tiny-*.gguf"))
    assert first == parts[0]
    assert len(parts) == math.ceil(len(GgufFile(first).tensor_names) / 20) > 2
    found = converted(tmp_path / "outputs", first)
    for name, wanted in stored(directory).items():
        np.testing.assert_array_equal(stored(found)[name], wanted, err_msg=name)
    by_last = Workspace(configuration(tmp_path / "outputs", parts[-1]))
    assert by_last.target.path == found
    parts[1].rename(tmp_path / "elsewhere")
    with pytest.raises(PipelineError, match=rf"target.gguf is .*; {parts[1].name} of its {len(parts)} parts is not"):
        Workspace(configuration(tmp_path / "outputs", first)).address(TARGET)
    parts[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(PipelineError, match=rf"alone.gguf is one of {len(parts)} parts, and its name does not say"):
        GgufFile(tmp_path / "alone.gguf")
    parts[2].rename(parts[0])
    (tmp_path / "elsewhere").rename(parts[1])
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(PipelineError, match=r"00001-of-0000\d.gguf: found split.no 2 and split.count \d, wanted 0"):
        GgufFile(parts[1])


def test_killed_and_begun_again_it_goes_on_and_makes_the_same_bytes(tmp_path, file):
    undisturbed, config = (configuration(tmp_path / name, file) for name in ("undisturbed", "killed"))
    stage.run(undisturbed, SilentRun())
    kill_when_stopped(STOPPING_PROCESS, config, tmp_path)
    path = Workspace(config).address(TARGET)
    assert not artifact.exists(path)
    before = (artifact.scratch_of(path) / "model-00002-of-00004.safetensors").stat()
    stage.run(config, SilentRun())
    resumed, wanted = (
        artifact.read(Workspace(each).address(TARGET), TARGET, make_with="the test", verify=True)
        for each in (config, undisturbed)
    )
    assert resumed.fingerprint == wanted.fingerprint
    assert resumed.files.keys() == wanted.files.keys()
    after = (path / "model-00002-of-00004.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_full_disk_is_reported_before_anything_is_written(tmp_path, file, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda path: 100_000)
    config = configuration(tmp_path, file)
    with pytest.raises(PipelineError, match=r"the target needs \d MiB at .*, 0 MiB are free; free some space"):
        stage.run(config, SilentRun())
    assert not list(artifact.scratch_of(Workspace(config).address(TARGET)).iterdir())


def test_a_file_that_changes_while_it_is_read_makes_no_target(tmp_path, tensors, monkeypatch):
    file = tiny.write(tmp_path / "tiny.gguf", tensors)
    config = configuration(tmp_path / "outputs", file)

    def changing(opened, *rest):
        file.write_bytes(file.read_bytes() + b"\0")
        return shards_of(opened, *rest)

    shards_of = gpt_oss.shards_of
    monkeypatch.setattr(gpt_oss, "shards_of", changing)
    with pytest.raises(PipelineError, match=r"tiny.gguf \(target.gguf\) was changed while it was read"):
        stage.run(config, SilentRun())
    assert not artifact.exists(Workspace(config).address(TARGET))


def test_a_choice_of_architecture_is_compared_with_the_file(tmp_path, file):
    sizes = ArchitectureConfig(
        **{name: tiny.CONFIG[name] for name in gpt_oss_sizes()}, rope_positions=32, max_position_embeddings=256
    )
    stage.run(configuration(tmp_path, file, architecture=sizes), SilentRun())
    sizes.num_local_experts = 8
    with pytest.raises(PipelineError, match=r"is not the model of target.architecture.*\n  num_local_experts: found 5"):
        stage.run(configuration(tmp_path / "other", file, architecture=sizes), SilentRun())
    with pytest.raises(PipelineError, match="is not the model of target.architecture"):
        _ = Workspace(configuration(tmp_path, file, architecture=sizes)).target


def gpt_oss_sizes():
    return [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "num_local_experts",
        "num_experts_per_tok",
        "sliding_window",
    ]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    wide = {**tiny.CONFIG, "hidden_size": 1024, "intermediate_size": 1024, "num_local_experts": 32}
    grew, sizes = [], []
    for layers in (1, 4):
        kinds = (["sliding_attention", "full_attention"] * layers)[:layers]
        config = {**wide, "num_hidden_layers": layers, "layer_types": kinds}
        file = tiny.write(tmp_path / f"{layers}.gguf", tiny.checkpoint(0, config), config=config)
        command = [sys.executable, str(PROGRAMS / "convert_and_measure.py"), str(file), str(tmp_path / "outputs")]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        made = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        grew.append(int(made.stdout.splitlines()[-1]))
        sizes.append(file.stat().st_size)
    print(f"files of {sizes} bytes, {grew} bytes of memory")
    assert sizes[1] > 2e8 > 3 * sizes[0]
    assert max(grew) < 1e8
    assert abs(grew[1] - grew[0]) < 2e7


REFUSED = {
    "another architecture": (
        {"changes": {"general.architecture": "qwen3moe"}},
        "general.architecture: found 'qwen3moe', wanted 'gpt-oss'",
    ),
    "no window": ({"changes": {"gpt-oss.attention.sliding_window": None}}, "has no gpt-oss.attention.sliding_window;"),
    "sizes that are text": (
        {"changes": {"gpt-oss.block_count": "three"}},
        "gpt-oss.block_count: found 'three', wanted a positive number",
    ),
    "an unknown key": (
        {"changes": {"gpt-oss.attention.scale": 0.5}},
        "gpt-oss.attention.scale: found 0.5, wanted no such key, whose meaning is not known here",
    ),
    "another kind of RoPE": (
        {"changes": {"gpt-oss.rope.scaling.type": "longrope"}},
        "gpt-oss.rope.scaling.type: found 'longrope', wanted 'yarn' or 'none'",
    ),
    "heads of two widths": (
        {"changes": {"gpt-oss.attention.value_length": 8}},
        "gpt-oss.attention.value_length: found 8, wanted 16 as gpt-oss.attention.key_length",
    ),
    "a missing tensor": ({"replaced": {"blk.1.attn_sinks.weight": None}}, "blk.1.attn_sinks.weight: missing"),
    "no embedding": ({"replaced": {"token_embd.weight": None}}, "token_embd.weight: missing"),
    "a tensor too many": (
        {"replaced": {"blk.0.ffn_norm.weight": np.zeros(128, np.float32)}},
        "1 tensor(s) wrong\n  blk.0.ffn_norm.weight: unexpected",
    ),
    "a misshapen tensor": (
        {"replaced": {"blk.2.attn_q.bias": np.zeros(95, np.float32)}},
        "blk.2.attn_q.bias: shape [95], wanted [96]",
    ),
    "experts of another width": (
        {"replaced": {"blk.0.ffn_gate_exps.weight": np.zeros((5, 96, 64), np.float32)}},
        "blk.0.ffn_gate_exps.weight: shape [5, 96, 64], wanted [5, 96, 128]",
    ),
    "a number that is none": (
        {"replaced": {"blk.0.attn_norm.weight": np.full(128, np.nan, np.float32)}},
        "blk.0.attn_norm.weight is not finite",
    ),
    "another tokenizer": (
        {"changes": {"tokenizer.ggml.pre": "qwen2"}},
        "a tokenizer that cannot be rebuilt exactly:\n  tokenizer.ggml.pre: found 'qwen2', wanted 'gpt-4o'",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_converted_is_refused(tmp_path, tensors, options, message):
    file = tiny.write(tmp_path / "tiny.gguf", tensors, **options)
    config = configuration(tmp_path / "outputs", file)
    with pytest.raises(PipelineError) as error:
        stage.run(config, SilentRun())
    assert message in str(error.value)
    assert not artifact.exists(Workspace(config).address(TARGET))


def test_a_scale_that_stands_for_no_number_is_refused(tmp_path, file):
    raw = bytearray(file.read_bytes())
    (tensor,) = [each for each in gguf.GGUFReader(file).tensors if each.name == "blk.1.ffn_up_exps.weight"]
    raw[int(tensor.data_offset) + 17 * 5] = 255
    (tmp_path / "bad.gguf").write_bytes(bytes(raw))
    with pytest.raises(PipelineError, match=r"blk.1.ffn_up_exps.weight is not finite"):
        converted(tmp_path / "outputs", tmp_path / "bad.gguf")


def test_a_quantisation_that_the_gguf_package_does_not_read_is_named(tmp_path, file):
    raw = file.read_bytes()
    name = b"blk.0.attn_k.weight"
    at = raw.index(name) + len(name) + 4 + 2 * 8  # behind the number of axes and their sizes: the kind
    assert int.from_bytes(raw[at : at + 4], "little") == Kind.BF16
    for kind, message in ((Kind.I16, "is quantised as I16, which the gguf package does not"), (777, "is of kind 777")):
        (tmp_path / "bad.gguf").write_bytes(raw[:at] + int(kind).to_bytes(4, "little") + raw[at + 4 :])
        with pytest.raises(PipelineError, match=f"blk.0.attn_k.weight {message}"):
            converted(tmp_path / "outputs", tmp_path / "bad.gguf")


@pytest.mark.parametrize("share", [0.5, 0.9, 0.9999], ids=str)
def test_a_file_without_its_end_is_refused(tmp_path, file, share):
    raw = file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(PipelineError, match=r"cut.gguf cannot be read as GGUF \(it ends before .*; give a whole GGUF"):
        converted(tmp_path / "outputs", tmp_path / "cut.gguf")


def test_a_target_path_that_holds_a_gguf_file_alone_says_what_to_write(tmp_path, file):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/model.gguf").write_bytes(file.read_bytes())
    config = PipelineConfig(target=TargetConfig(name="folder", path=str(tmp_path / "folder")))
    with pytest.raises(PipelineError, match=r"it holds model.gguf: write target.gguf=.*model.gguf instead of target.p"):
        _ = Workspace(config).target


def test_the_tokenizer_beside_the_model_opens_as_any_other(directory):
    tokenizer = load_tokenizer(directory)
    fast = tiny.tokenizer()
    assert tokenizer.encode(tiny.TEXT) == fast.encode(tiny.TEXT).ids
    assert tokenizer.chat_template == tiny.TEMPLATE
