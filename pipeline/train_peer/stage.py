"""`stage=train_peer`: compares training steps with another trainer's, and both drafts after as many steps."""

import dataclasses
import functools
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pipeline.config.choices import LossWeights
from pipeline.config.fields import TEACHER_CACHE
from pipeline.config.schema import PipelineConfig, TrainConfig
from pipeline.dflash.blocks import default_decay
from pipeline.errors import PipelineError
from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.dflash.model import DraftModel
from pipeline.model.dflash.weights import DFlashWeights, random_weights
from pipeline.model.hf import safetensors_files
from pipeline.model.hf.directory import read_draft, read_embedding_and_head, save_draft
from pipeline.model.layers.linear import Matrix
from pipeline.store.reader import CacheSplit, open_split
from pipeline.tracking.run import Run
from pipeline.train.data.padded import PaddedBatches
from pipeline.train.easydel import environment
from pipeline.train.evaluation.evaluate import EVALUATED_SEQUENCES, evaluate
from pipeline.train.loss import vocab_shard
from pipeline.train.loss.vocab_shard import FrozenTables
from pipeline.train.recipe import recipe_of
from pipeline.train.step_report import StepReport
from pipeline.train_peer import protocol
from pipeline.train_peer.protocol import PUBLISHED, PeerData, PeerRecipe, TrainingComparison
from pipeline.workspace.loading import adapter_of
from pipeline.workspace.workspace import Workspace

log = logging.getLogger("pipeline")


def run(config: PipelineConfig, tracker: Run) -> dict[str, float]:
    """Compares, prints the lines and logs them. Raises PipelineError without a command, or with too few steps."""
    wanted = config.train_peer
    if not wanted.command:
        raise PipelineError(
            f"{protocol.KEY} is empty; give the trainer to compare with, as in "
            f"'{protocol.KEY}=[.venv-oracle/bin/python,tests/oracles/speculators_train.py]'"
        )
    if wanted.steps <= protocol.WARM_UP_STEPS:
        raise PipelineError(
            f"train_peer.steps is {wanted.steps}; the first {protocol.WARM_UP_STEPS} are not counted: at least "
            f"{protocol.WARM_UP_STEPS + 1}"
        )
    workspace = Workspace(config)
    cache = workspace.open(TEACHER_CACHE)
    with tempfile.TemporaryDirectory() as folder:
        pair = _Pair(
            folder=Path(folder),
            command=wanted.command,
            draft_config=workspace.draft_config,
            train=config.train,
            seed=config.seed,
            tables=read_embedding_and_head(workspace.target.path, jnp.float32, adapter_of(config.target)),
            split=open_split(cache.path, "train"),
        )
        measured = _speeds(pair, wanted.steps, wanted.repeats)
        if wanted.quality_steps is not None:
            measured |= _qualities(pair, wanted.quality_steps, open_split(cache.path, "heldout"))
    tracker.log_metrics(measured)
    return measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pair:
    """Holds the inputs of both trainers, in float32."""

    folder: Path
    command: Sequence[str]
    draft_config: DFlashConfig
    train: TrainConfig
    seed: int
    tables: tuple[Array, Matrix]
    split: CacheSplit

    def batches(self) -> PaddedBatches:
        return PaddedBatches(
            self.split,
            num_sequences=self.train.batch_sequences,
            num_anchors=self.train.anchors_per_sequence,
            seed=self.seed,
        )

    def first(self) -> DraftModel:
        """Returns the draft that both begin with."""
        return DraftModel(self.draft_config, random_weights(self.draft_config, jax.random.key(self.seed)))

    def prepare(self, num_steps: int) -> PeerData:
        """Writes the batches and the first weights for the other trainer."""
        save_draft(_fresh(self.folder / "draft"), self.first(), {})
        batches = self.batches()
        return PeerData.write(self.folder / "data.npz", (batches.at(step) for step in range(num_steps)), *self.tables)

    def ours(self, num_steps: int) -> tuple[DFlashWeights, list[float]]:
        """Returns our trained weights and the seconds of each step, the whole loop's."""
        environment.prepare()
        from pipeline.train.easydel import trainer  # imports EasyDeL, which only now can be

        train = dataclasses.replace(self.train, steps=num_steps, checkpoint_steps=num_steps, eval_steps=num_steps)
        trained: list[DFlashWeights] = []
        stamps: list[float] = []

        def on_step(report: StepReport) -> None:
            stamps.append(time.perf_counter())
            if report.step == num_steps:
                trained.append(report.weights())

        trainer.fit(
            _fresh(self.folder / "ours"),
            trainer.TrainingSetup(
                draft=self.draft_config,
                recipe=recipe_of(train, self.draft_config, self.seed, jnp.dtype(jnp.float32)),
                tables=functools.partial(vocab_shard.shard_tables, *self.tables),
                batch_at=self.batches().at,
                initial=self.first().weights,
            ),
            on_start=lambda _report: stamps.append(time.perf_counter()),
            on_step=on_step,
        )
        return trained[0], np.diff(stamps).tolist()

    def theirs(
        self, data: PeerData, recipe: PeerRecipe, attention: str | None
    ) -> tuple[DFlashWeights, list[float], str]:
        """Returns the other trainer's weights, the seconds of each step and the attention it took."""
        out = _fresh(self.folder / "theirs")
        answer = protocol.run_peer_trainer(
            self.command,
            self.folder / "draft",
            data,
            recipe,
            num_anchors=self.train.batch_sequences * self.train.anchors_per_sequence,
            seed=self.seed,
            attention=attention,
            draft_out=out / safetensors_files.WEIGHTS_FILE,
        )
        shutil.copy(self.folder / "draft" / "config.json", out)
        return read_draft(out, jnp.float32).weights, answer["step_seconds"], answer["attention"]

    def alike(self) -> PeerRecipe:
        """Returns our recipe in the other trainer's terms."""
        train = self.train
        dpace = train.loss_weights is LossWeights.dpace
        return PeerRecipe(
            weights="dpace" if dpace else "fixed-exp-decay",
            decay=train.loss_decay or default_decay(self.draft_config.block_size),
            smoothing=train.dpace_smoothing,
            trainer={
                "optimizer": train.optimizer.value,
                "lr": train.learning_rate,
                "muon_lr": train.learning_rate,
                "weight_decay": train.weight_decay,
                "muon_weight_decay": train.weight_decay,
                "scheduler_type": "cosine",
                "scheduler_warmup_ratio": train.warmup_ratio,
            },
        )


def _fresh(directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    return directory


def _speeds(pair: _Pair, num_steps: int, repeats: int) -> dict[str, float]:
    """Times passes of `num_steps`, ours and theirs in turn; the other trainer chooses its attention in its first."""
    data = pair.prepare(num_steps)
    attention: str | None = None
    ours, theirs = [], []
    for index in range(repeats):
        ours.append(tuple(pair.ours(num_steps)[1]))
        _, seconds, attention = pair.theirs(data, pair.alike(), attention)
        theirs.append(tuple(seconds))
        log.info("train_peer: pass %d of %d done", index + 1, repeats)
    found = TrainingComparison(ours=tuple(ours), theirs=tuple(theirs), num_tokens=tuple(data.num_tokens))
    measured = found.metrics()
    train, speed = pair.train, {name.removeprefix("train_peer/"): value for name, value in measured.items()}
    print(
        f"batches of {train.batch_sequences} sequences, {statistics.fmean(data.num_tokens):.0f} tokens on average, and "
        f"{train.batch_sequences * train.anchors_per_sequence} blocks of {pair.draft_config.block_size}, float32\n"
        f"ours    {speed['ours_tokens_per_second']:8.0f} tokens/s\n"
        f"theirs  {speed['theirs_tokens_per_second']:8.0f} tokens/s ({pair.command[-1]}, {attention})\n"
        f"ratio   {speed['ratio']:8.2f} ({speed['ratio_min']:.2f} to {speed['ratio_max']:.2f})",
        flush=True,
    )
    return measured


def _qualities(pair: _Pair, num_steps: int, heldout: CacheSplit) -> dict[str, float]:
    """Returns accept lengths on held-out texts of what each trained from the same weights on the same batches."""
    data = pair.prepare(num_steps)
    trained = {
        "ours": pair.ours(num_steps)[0],
        "theirs_as_published": pair.theirs(data, PUBLISHED, None)[0],
        "theirs_with_our_recipe": pair.theirs(data, pair.alike(), None)[0],
    }
    tables = FrozenTables(*pair.tables, pair.draft_config.vocab_size)
    measured = {}
    for name, weights in trained.items():
        draft = DraftModel(pair.draft_config, weights)
        score = evaluate(draft, tables, heldout, num_sequences=EVALUATED_SEQUENCES).total
        measured[f"train_peer/{name}_accept_length"] = score.accept_length
        print(f"{name:24} {score.accept_length:.3f} accept_length after {num_steps} steps", flush=True)
    return measured
