"""What `make demo` made, in the hands of the programs that it is made for: run `make demo`, then `make parity`.

The default configuration's artifacts are looked for under $PIPELINE_OUTPUT_DIR, else under outputs/.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.config.choices import Precision
from pipeline.dflash import blocks
from pipeline.dflash.acceptance import Acceptance
from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.layout import BLOCK_SIZES, ROW_COUNTS
from pipeline.engine.request import Request
from pipeline.model.dflash import forward as dflash
from pipeline.model.gpt_oss import forward as gpt_oss
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf.directory import read_draft, read_target
from pipeline.store.checkpoint_files import EVALUATION
from tests.support import fitted as fitted_draft
from tests.support.demo import Demo
from tests.support.oracles import run_oracle

pytestmark = [pytest.mark.slow, pytest.mark.conformance]
NUM_PROMPTS = 32
TOLERANCE = 1e-4


class Float32Demo(Demo):
    """The demo's target and draft in float32, and their engine."""

    def __init__(self):
        super().__init__()
        assert self.config.target.precision is Precision.float32
        self.target = read_target(self.target_path, WeightFormat())
        self.draft = read_draft(self.draft_path, jnp.float32)
        self.max_new_tokens = self.config.bench.max_new_tokens

    def engine(self, draft, **sizes):
        """Our engine at the demo's sizes, or at others."""
        config = EngineConfig(
            num_slots=8,
            max_length=max(map(len, self.prompts)) + self.max_new_tokens,
            prefill_chunk=self.config.engine.prefill_chunk,
            stop_token_ids=tuple(self.stop_token_ids),
        )
        return Engine(self.target, draft, dataclasses.replace(config, **sizes))

    def answers(self, engine, prompts=None):
        """An engine's answer to every held-out prompt, or to some."""
        requests = [
            Request(request_id=str(index), prompt_ids=tuple(prompt), max_new_tokens=self.max_new_tokens)
            for index, prompt in enumerate(prompts or self.prompts)
        ]
        answers = {answer.request_id: answer for answer in engine.generate(requests)}
        return [answers[request.request_id] for request in requests]


@pytest.fixture(scope="module")
def demo():
    return Float32Demo()


@pytest.fixture(scope="module")
def ours(demo):
    return demo.answers(demo.engine(demo.draft))


@pytest.fixture(scope="module")
def published(demo):
    """What the published package makes of the first held-out prompts, with transformers' target and our draft."""
    request = {
        "prompts": demo.prompts[:NUM_PROMPTS],
        "max_new_tokens": demo.max_new_tokens,
        "stop_token_ids": demo.stop_token_ids,
    }
    return fitted_draft.ask("dflash_generate", request, target=demo.target_path, draft=demo.draft_path)


def accept_length(answers, block_size):
    return Acceptance.of([count for answer in answers for count in answer.accepted_per_round], block_size).accept_length


def test_dflash_gives_plain_greedys_tokens_on_every_held_out_prompt(demo, ours):
    plain = demo.answers(demo.engine(None))
    assert len(plain) == len(demo.prompts) > NUM_PROMPTS
    assert [answer.token_ids for answer in ours] == [answer.token_ids for answer in plain]


def test_the_tokens_are_the_same_with_everything_that_a_server_does(demo, ours):
    """Small pages, of which there are too few, prompts in small chunks, prefixes reused, block sizes that adapt."""
    longest = max(map(len, demo.prompts)) + demo.max_new_tokens
    engine = demo.engine(
        demo.draft,
        num_slots=10,
        page_size=16,
        prefill_chunk=16,
        cache_tokens=5 * longest // 2,
        reuse_prefixes=True,
        block_sizes=BLOCK_SIZES,
        row_counts=ROW_COUNTS,
    )
    engine.warm_up()
    assert [answer.token_ids for answer in demo.answers(engine)] == [answer.token_ids for answer in ours]
    for prompt, answer in zip(demo.prompts, ours, strict=True):
        for _ in range(2):  # the second time with the pages of the first
            assert demo.answers(engine, [prompt])[0].token_ids == answer.token_ids
    assert engine.num_preempted > 0
    assert engine.times.reused_tokens > 0
    assert engine.block_estimates.keys() >= {1, demo.draft.config.block_size}


def test_the_published_package_gives_the_same_tokens_and_accept_length(demo, published, ours, capsys):
    assert len(published) == NUM_PROMPTS
    assert [one["tokens"] for one in published] == [list(answer.token_ids) for answer in ours[:NUM_PROMPTS]]
    rounds = [length for one in published for length in one["acceptance_lengths"]]
    theirs, mine = sum(rounds) / len(rounds), accept_length(ours[:NUM_PROMPTS], demo.draft.config.block_size)
    with capsys.disabled():
        print(f"\naccept_length on {NUM_PROMPTS} held-out prompts: dflash package {theirs:.4f}, engine {mine:.4f}")
    assert mine == pytest.approx(theirs, rel=0.02)


def test_accept_length_is_at_least_four_and_that_of_the_training_evaluation(demo, ours, capsys):
    heldout = json.loads((demo.draft_path / EVALUATION).read_text())["heldout"]
    found = accept_length(ours, demo.draft.config.block_size)
    with capsys.disabled():
        trained = heldout["accept_length"]
        print(f"\naccept_length on {len(ours)} held-out prompts: training {trained:.4f}, engine {found:.4f}")
    assert found >= 4.0
    assert found == pytest.approx(heldout["accept_length"], rel=0.05)


def test_the_published_draft_model_computes_what_ours_computes(demo, ours, tmp_path, capsys):
    prompt, answer = demo.prompts[0], ours[0].token_ids
    sequence = jnp.asarray([[*prompt, *answer]], jnp.int32)
    tapped = demo.draft.config.tapped_layers
    features = gpt_oss.forward(demo.target, sequence, jnp.zeros(1, jnp.int32), None, tapped).features
    wanted, found = [], []
    for anchor in (len(prompt), len(prompt) + len(answer) // 2):
        embeddings, hidden = block_at(demo, sequence, features, anchor)
        np.savez(tmp_path / "in.npz", features=features[:, :anchor], noise_embedding=embeddings)
        run_oracle("dflash_forward", draft=demo.draft_path, inputs=tmp_path / "in.npz", outputs=tmp_path / "out.npz")
        wanted.append(np.load(tmp_path / "out.npz")["hidden"])
        found.append(np.asarray(hidden))
    difference = np.abs(np.array(found) - np.array(wanted)).max()
    with capsys.disabled():
        print(f"\nexported draft against DFlashDraftModel: outputs differ by at most {difference:.1e}")
    assert np.std(wanted) > 0.5
    assert difference <= TOLERANCE


def block_at(demo, sequence, features, anchor):
    """Our draft's hidden states [1, K, D] for the block at `anchor`, and what entered it."""
    sizes, anchors = demo.draft.config, jnp.array([[anchor]])
    ids = blocks.block_token_ids(sequence[:, anchor], sizes.mask_token_id, sizes.block_size)
    embeddings = demo.target.weights.embedding[ids]
    num_positions = features.shape[1]
    context = jax.jit(dflash.context)(demo.draft, features, jnp.arange(num_positions)[None])
    hidden = jax.jit(dflash.denoise_blocks)(
        demo.draft,
        embeddings[:, None],
        blocks.block_positions(anchors, sizes.block_size),
        context,
        blocks.context_visible(anchors, num_positions),
    )
    return embeddings, hidden[:, 0]
