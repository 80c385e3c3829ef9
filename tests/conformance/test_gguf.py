"""llama.cpp itself runs the GGUF files of the tests, and computes what the targets compute that are made of them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from pipeline.config.schema import PipelineConfig, TargetConfig
from pipeline.model.gpt_oss import forward as gpt_oss
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf.directory import read_target
from pipeline.prompts.tokenizer import load_tokenizer
from pipeline.target import stage
from pipeline.tracking.run import SilentRun
from pipeline.workspace.workspace import Workspace
from tests.support import gpt_oss_gguf as tiny
from tests.support.environments import told_by

pytestmark = [pytest.mark.conformance, pytest.mark.slow]  # in an environment of its own

CONFIG = {**tiny.CONFIG, "hidden_size": 256, "intermediate_size": 128, "num_attention_heads": 8, "head_dim": 64}
LENGTHS = (3, 20, 60)
TEXTS = (
    tiny.TEXT,
    "isn't it? I'LL say THEY'VE gone; camelCase HTTPServer",
    "1234567 and <|start|>assistant<|message|>a\r\n\r\n  b<|end|>",
)
TOLERANCE = 1e-3
ROUNDED = 0.15  # of the logits' standard deviation: on a CPU llama.cpp multiplies MXFP4 with inputs of eight bits


def next_tokens(directory, prompts):
    """The logarithms of probabilities behind prompts, with YaRN's range rounded as llama.cpp rounds it."""
    found = read_target(directory, WeightFormat())
    rope = dataclasses.replace(found.config.rope, truncate=True)
    target = TargetModel(dataclasses.replace(found.config, rope=rope), found.weights)
    for prompt in prompts:
        ids = np.array([prompt], np.int32)
        hidden = jax.jit(gpt_oss.forward)(target, ids, jnp.zeros(1, jnp.int32), None).hidden
        yield np.asarray(jax.nn.log_softmax(gpt_oss.logits(target.weights, hidden)[0, -1]))


@pytest.mark.parametrize(
    ("kinds", "bound"),
    [
        pytest.param((Kind.F32, Kind.F32), None, id="floats"),
        pytest.param((Kind.MXFP4, Kind.BF16), ROUNDED, id="MXFP4"),
    ],
)
def test_llama_cpp_computes_what_the_target_computes_and_finds_the_same_tokens(tmp_path, kinds, bound):
    file = tiny.write(tmp_path / "tiny.gguf", tiny.checkpoint(3, CONFIG), config=CONFIG, kinds=kinds)
    config = PipelineConfig(output_dir=str(tmp_path), target=TargetConfig(name="converted", gguf=str(file)))
    stage.run(config, SilentRun())
    directory = Workspace(config).target.path
    ids = np.random.default_rng(5).integers(0, tiny.TOKENS - len(tiny.CONTROL_TOKENS), max(LENGTHS)).tolist()
    request = {"prompts": [ids[:length] for length in LENGTHS], "texts": TEXTS, "vocabulary": CONFIG["vocab_size"]}
    request["chosen"] = load_tokenizer(directory).convert_tokens_to_ids("a")
    (tmp_path / "in.json").write_text(json.dumps(request))
    told = told_by("llama_cpp", "llama_cpp_logits", gguf=file, inputs=tmp_path / "in.json")
    assert told["tokens"] == [load_tokenizer(directory).encode(text) for text in TEXTS]
    for found, wanted in zip(next_tokens(directory, request["prompts"]), told["logprobs"], strict=True):
        theirs = np.array([wanted[str(token)] for token in range(CONFIG["vocab_size"])])
        assert theirs.std() > 1
        if bound is None:
            np.testing.assert_allclose(found, theirs, rtol=0, atol=TOLERANCE)
        else:
            assert np.sqrt(np.square(found - theirs).mean()) <= bound * theirs.std()
