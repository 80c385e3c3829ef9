"""`stage=train_peer`: training steps beside another trainer's, and what both drafts are worth after as many steps."""

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

from pipeline import lineage
from pipeline.artifacts import PipelineError
from pipeline.config import LossWeights, PipelineConfig, TrainConfig
from pipeline.model import checkpoints, tensor_files
from pipeline.model.draft import DraftConfig, DraftWeights, random_weights
from pipeline.model.linear import Kernel
from pipeline.teacher_cache.store import CacheSplit, open_split
from pipeline.tracking import Run
from pipeline.train import environment, peer, vocabulary
from pipeline.train.batches import Batches
from pipeline.train.evaluate import evaluate
from pipeline.train.peer import PUBLISHED, Against, Data, PeerRecipe
from pipeline.train.report import StepReport
from pipeline.train.stage import EVALUATED_SEQUENCES, recipe_of

log = logging.getLogger("pipeline")


def run(config: PipelineConfig, tracker: Run) -> dict[str, float]:
    """Compare, print the lines, log them."""
    wanted = config.train_peer
    if not wanted.command:
        raise PipelineError(
            f"{peer.KEY} is empty; give the trainer to compare with, as in "
            f"'{peer.KEY}=[.venv-oracle/bin/python,tests/oracles/speculators_train.py]'"
        )
    target = lineage.target(config)
    cache = lineage.teacher_cache(config, target)
    with tempfile.TemporaryDirectory() as folder:
        pair = _Pair(
            folder=Path(folder),
            command=wanted.command,
            draft=lineage.draft_config(config, target),
            train=config.train,
            seed=config.seed,
            ends=checkpoints.load_ends(target.path, jnp.float32),
            split=open_split(cache.path, "train"),
        )
        measured = _speeds(pair, wanted.steps, wanted.repeats)
        if wanted.quality_steps is not None:
            measured |= _qualities(pair, wanted.quality_steps, open_split(cache.path, "heldout"))
    tracker.log_metrics(measured)
    return measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pair:
    """What both trainers are given, in float32."""

    folder: Path
    command: Sequence[str]
    draft: DraftConfig
    train: TrainConfig
    seed: int
    ends: tuple[Array, Kernel]
    split: CacheSplit

    def batches(self) -> Batches:
        return Batches(
            self.split,
            num_sequences=self.train.batch_sequences,
            num_anchors=self.train.anchors_per_sequence,
            seed=self.seed,
        )

    def first(self) -> DraftWeights:
        """The weights that both begin with."""
        return random_weights(self.draft, jax.random.key(self.seed))

    def prepare(self, num_steps: int) -> Data:
        """Write the batches and the first weights for the other trainer."""
        checkpoints.save_draft(_fresh(self.folder / "draft"), self.draft, self.first(), {})
        batches = self.batches()
        return Data.write(self.folder / "data.npz", (batches.at(step) for step in range(num_steps)), *self.ends)

    def ours(self, num_steps: int) -> tuple[DraftWeights, list[float]]:
        """Our trained weights and the seconds of each step, the whole loop's."""
        environment.prepare()
        from pipeline.train import trainer  # imports EasyDeL, which only now can be

        train = dataclasses.replace(self.train, steps=num_steps, checkpoint_steps=num_steps, eval_steps=num_steps)
        trained: list[DraftWeights] = []
        stamps: list[float] = []

        def on_step(report: StepReport) -> None:
            stamps.append(time.perf_counter())
            if report.step == num_steps:
                trained.append(report.weights())

        trainer.fit(
            _fresh(self.folder / "ours"),
            self.draft,
            recipe_of(train, self.draft, self.seed, jnp.float32),
            functools.partial(vocabulary.share_out, *self.ends),
            self.batches().at,
            on_start=lambda _report: stamps.append(time.perf_counter()),
            on_step=on_step,
            initial=self.first(),
        )
        return trained[0], np.diff(stamps).tolist()

    def theirs(self, data: Data, recipe: PeerRecipe, attention: str | None) -> tuple[DraftWeights, list[float], str]:
        """The other trainer's weights, the seconds of each step and the attention it took."""
        out = _fresh(self.folder / "theirs")
        answer = peer.run_peer(
            self.command,
            self.folder / "draft",
            data,
            recipe,
            num_anchors=self.train.batch_sequences * self.train.anchors_per_sequence,
            seed=self.seed,
            attention=attention,
            draft_out=out / tensor_files.WEIGHTS_FILE,
        )
        shutil.copy(self.folder / "draft" / "config.json", out)
        _, weights = checkpoints.load_draft(out, jnp.float32)
        return weights, answer["step_seconds"], answer["attention"]

    def alike(self) -> PeerRecipe:
        """Our recipe in the other trainer's words."""
        train = self.train
        own = recipe_of(train, self.draft, self.seed, jnp.float32)
        dpace = train.loss_weights is LossWeights.dpace
        return PeerRecipe(
            weights="dpace" if dpace else "fixed-exp-decay",
            decay=own.loss_decay,
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
    """Passes of so many steps, ours and theirs in turn; the other trainer's attention is chosen in its first."""
    data = pair.prepare(num_steps)
    attention: str | None = None
    ours, theirs = [], []
    for index in range(repeats):
        ours.append(tuple(pair.ours(num_steps)[1]))
        _, seconds, attention = pair.theirs(data, pair.alike(), attention)
        theirs.append(tuple(seconds))
        log.info("train_peer: pass %d of %d done", index + 1, repeats)
    found = Against(ours=tuple(ours), theirs=tuple(theirs), num_tokens=tuple(data.num_tokens))
    measured = found.metrics()
    train, speed = pair.train, {name.removeprefix("train_peer/"): value for name, value in measured.items()}
    print(
        f"batches of {train.batch_sequences} sequences, {statistics.fmean(data.num_tokens):.0f} tokens on average, and "
        f"{train.batch_sequences * train.anchors_per_sequence} blocks of {pair.draft.block_size}, float32\n"
        f"ours    {speed['ours_tokens_per_second']:8.0f} tokens/s\n"
        f"theirs  {speed['theirs_tokens_per_second']:8.0f} tokens/s ({pair.command[-1]}, {attention})\n"
        f"ratio   {speed['ratio']:8.2f} ({speed['ratio_min']:.2f} to {speed['ratio_max']:.2f})",
        flush=True,
    )
    return measured


def _qualities(pair: _Pair, num_steps: int, heldout: CacheSplit) -> dict[str, float]:
    """Accept lengths on held-out texts of what each made of the same batches, from the same weights."""
    data = pair.prepare(num_steps)
    made = {
        "ours": pair.ours(num_steps)[0],
        "theirs_as_published": pair.theirs(data, PUBLISHED, None)[0],
        "theirs_with_our_recipe": pair.theirs(data, pair.alike(), None)[0],
    }
    measured = {}
    for name, weights in made.items():
        found = evaluate(weights, pair.draft, *pair.ends, heldout, num_sequences=EVALUATED_SEQUENCES)
        measured[f"train_peer/{name}_accept_length"] = found.total.accept_length
        print(f"{name:24} {found.total.accept_length:.3f} accept_length after {num_steps} steps", flush=True)
    return measured
