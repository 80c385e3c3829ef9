"""Trains the tiny target in a loop with checkpoints."""

import dataclasses
import itertools
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array, Float

from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.progress import Progress
from pipeline.prompts import corpus
from pipeline.prompts.tokenizer import Tokenizer, train_tokenizer
from pipeline.target import batches, pretrain, questions
from pipeline.tracking.run import Run

log = logging.getLogger("pipeline")

TOKENIZER_CONVERSATIONS = 3000
HELD_OUT_PER_FAMILY = 6
CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainPlan:
    """Holds how a target is trained from scratch, as `target.pretrain` sets it."""

    num_conversations: int
    steps: int
    batch_tokens: int
    sequence_length: int
    learning_rate: float
    checkpoint_steps: int
    seed: int


def train(scratch: Path, model: GptOssConfig, plan: PretrainPlan, tracker: Run) -> tuple[TargetModel, Tokenizer]:
    """Trains the target and its tokenizer from the last checkpoint in `scratch`, if any; removes all checkpoints."""
    conversations = list(questions.training_conversations(plan.seed, plan.num_conversations))
    tokenizer = train_tokenizer(corpus.texts(conversations[:TOKENIZER_CONVERSATIONS]), model.vocab_size)
    examples = batches.tokenize(tokenizer, conversations)
    lengths = batches.bucket_lengths(plan.sequence_length)
    held_out = _held_out(tokenizer, plan.seed, plan.sequence_length)

    optimizer = pretrain.pretrain_optimizer(plan.learning_rate, plan.steps)
    state = pretrain.start(model, optimizer, jax.random.key(plan.seed))
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    with ocp.CheckpointManager((scratch / CHECKPOINTS).absolute(), options=options) as manager:
        done = manager.latest_step() or 0
        if done:
            state = manager.restore(done, args=ocp.args.StandardRestore(state))
            log.info("target: going on from step %d", done)
        step = pretrain.step_of(model, optimizer)
        schedule = batches.batch_schedule(examples, lengths, plan.batch_tokens, plan.seed)
        metrics: dict[str, Any] = {}
        with Progress("target", plan.steps, "step", done=done) as progress:
            for index, batch in enumerate(itertools.islice(schedule, done, plan.steps), start=done + 1):
                state, metrics = step(state, batch)
                if index % 10 == 0 or index == plan.steps:
                    shown = {f"target/{name}": float(value) for name, value in metrics.items()}
                    tracker.log_metrics(shown, step=index)
                progress.advance(1, note=f"loss {float(metrics['loss']):.3f}")
                if index % plan.checkpoint_steps == 0 and index < plan.steps:
                    manager.save(index, args=ocp.args.StandardSave(state))
    accuracy = pretrain.accuracy_on(state.weights, model, held_out)
    log.info("target: next-token accuracy on unseen conversations %.3f", accuracy)
    tracker.log_metrics({"target/heldout_accuracy": accuracy})
    shutil.rmtree(scratch / CHECKPOINTS)
    return TargetModel(model, jax.tree.map(_in_bfloat16, state.weights)), tokenizer


def _in_bfloat16(array: Float[Array, "..."]) -> Float[np.ndarray, "..."]:
    """Returns float32 values that bfloat16 has too, as GPT-OSS's are: both precisions then run the same weights."""
    return np.asarray(array.astype(jnp.bfloat16).astype(jnp.float32))


def _held_out(tokenizer: Tokenizer, seed: int, length: int) -> batches.TokenBatch:
    conversations = questions.held_out_conversations(seed, HELD_OUT_PER_FAMILY)
    examples = [each for each in batches.tokenize(tokenizer, conversations) if len(each.token_ids) <= length]
    return batches.pad(examples, length)
