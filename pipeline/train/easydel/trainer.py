"""Trains the draft in EasyDeL's loop, with our step, our batches, our checkpoints and our checks.

EasyDeL's loop ends quietly on a TypeError and begins anew when a checkpoint cannot be read. This module makes every
such end an error, and compares the step at which training began with the one at which it had to.
Source: docs/easydel.md#the-trainer.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import easydel as ed
import jax
import jax.numpy as jnp
import numpy as np
from easydel.infra.base_state import EasyDeLState
from easydel.infra.loss_utils import LossMetrics
from easydel.trainers.trainer_protocol import TrainerConfigureDataloaderOutput, TrainerConfigureFunctionOutput
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from pipeline import distributed
from pipeline.errors import PipelineError
from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.dflash.weights import DFlashWeights
from pipeline.model.hf import dflash as hf_dflash
from pipeline.train.data.prefetch import prefetch
from pipeline.train.easydel import run_directories, shared_disk
from pipeline.train.easydel.draft_module import DraftModule, DraftModuleConfig
from pipeline.train.easydel.interrupt import between_steps
from pipeline.train.easydel.step import jitted_step
from pipeline.train.loss import vocab_shard
from pipeline.train.loss.vocab_shard import FrozenTables
from pipeline.train.optimizer import average_in, optimizer_of, schedule_of
from pipeline.train.recipe import Recipe
from pipeline.train.step_report import StepReport


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """Holds the inputs of a training.

    `tables` returns the target's embedding and head on the devices of a mesh. `batch_at(step)` returns this host's rows
    of the fields of a `TrainBatch`, without those that `complete` adds just before the step. Training begins with
    `initial` (float32), or with random weights.
    """

    draft: DFlashConfig
    recipe: Recipe
    tables: Callable[[Mesh], FrozenTables]
    batch_at: Callable[[int], dict[str, np.ndarray]]
    initial: DFlashWeights | None = None
    complete: Callable[[dict[str, Array]], dict[str, Array]] | None = None


def fit(
    directory: Path,
    setup: TrainingSetup,
    on_start: Callable[[StepReport], None],
    on_step: Callable[[StepReport], None],
) -> None:
    """Trains to `recipe.steps`, beginning at the last complete run directory under `directory`.

    `on_start` is called with the last step of an earlier run (0 without one) and its weights. Leaves exactly one run
    directory, that of the last step. Raises PipelineError when EasyDeL did not do what it should, and whatever the
    callbacks raise.
    """
    recipe = setup.recipe
    done = run_directories.latest(directory)
    distributed.barrier("every host knows how far training is")
    if distributed.is_primary():
        run_directories.keep_only(directory, run_directories.path_of(directory, done) if done else None)
    distributed.barrier("unfinished checkpoints are gone")
    arguments = arguments_of(directory, recipe)
    split = recipe.split
    module = DraftModule(
        config=DraftModuleConfig(
            draft=hf_dflash.config_to_hf(setup.draft, "float32", {}),
            sharding_axis_dims=(split.data, split.fsdp, 1, split.tensor, 1),
        ),
        dtype=recipe.dtype,
        param_dtype=jnp.float32,  # EasyDeL casts the optimizer's state to this when it saves
        rngs=nnx.Rngs(recipe.seed),
    )
    if setup.initial is not None:
        module.begin_with(setup.initial)
    create_trainer: Any = DraftTrainer  # Any: without a cache mypy takes the setter of EasyDeL's `mesh` for abstract
    with between_steps() as check_interrupt:

        def on_step_or_interrupt(report: StepReport) -> None:
            on_step(report)
            check_interrupt()

        trainer: DraftTrainer = create_trainer(
            arguments, module, setup, setup.tables(module.mesh), on_step_or_interrupt
        )
        began = trainer.began_at()
        if began != done:
            raise PipelineError(
                f"{directory} holds a checkpoint of step {done}, EasyDeL began at {began}; "
                f"delete {directory} to begin anew"
            )
        on_start(StepReport(done, {}, lambda: weights_in(trainer.model_state)))
        state = trainer.train().state
        if trainer.failure is not None:
            raise trainer.failure
    left = run_directories.latest(directory)
    if int(state.step) != recipe.steps or left != recipe.steps:
        raise PipelineError(
            f"training ended at step {int(state.step)} with a checkpoint of step {left}, wanted "
            f"{recipe.steps}; the same command goes on from there"
        )


def weights_in(state: EasyDeLState) -> DFlashWeights:
    """Returns the weights of a state: their average, where the optimizer computes one."""
    average = average_in(state.opt_state)
    module = state.model if average is None else state.merge(average)
    assert isinstance(module, DraftModule), "the state is that of a draft"
    return module.weights()


class Arguments(ed.TrainingArguments):
    """EasyDeL's arguments, with our optimizer."""

    recipe: Recipe  # set by `arguments_of`; no field of the dataclass, or EasyDeL would write it to a file

    def get_optimizer_and_scheduler(self, steps: int | None = None) -> tuple[Any, Any]:
        """Returns ours, whatever number of steps EasyDeL asks for: it asks for 2^63 when it reads a checkpoint."""
        return optimizer_of(self.recipe), schedule_of(self.recipe)


def arguments_of(directory: Path, recipe: Recipe) -> Arguments:
    """Returns EasyDeL's arguments for a training that writes to `directory`."""
    arguments = Arguments(
        save_directory=str(directory.parent),
        model_name=directory.name,
        max_training_steps=recipe.steps,
        num_train_epochs=1,
        total_batch_size=recipe.batch_sequences,
        do_eval=False,
        save_steps=None,  # DraftTrainer decides when
        save_total_limit=None,
        save_optimizer_state=True,
        do_last_save=False,
        resume_if_possible=True,
        use_wandb=False,
        report_metrics=False,
        progress_bar_type="json",
        track_memory=False,
        weight_distribution_log_steps=0,
        log_grad_norms=False,
        use_data_collator=False,
        step_partition_spec=vocab_shard.ROWS_SPEC,
    )
    arguments.recipe = recipe
    return arguments


class DraftTrainer(ed.Trainer):
    """EasyDeL's Trainer with our step, batches and checkpoints."""

    arguments: Arguments  # EasyDeL's own may be None
    model_state: EasyDeLState

    def __init__(
        self,
        arguments: Arguments,
        module: DraftModule,
        setup: TrainingSetup,
        tables: FrozenTables,
        on_step: Callable[[StepReport], None],
    ) -> None:
        self.failure: BaseException | None = None
        self._setup, self._recipe = setup, setup.recipe
        self._tables = tables
        self._on_step = on_step
        super().__init__(arguments=arguments, model_state=_state_of(module), data_collator=lambda batch: batch)

    def began_at(self) -> int:
        """Returns the step that state and optimizer agree on; -1 when they do not agree."""
        step = int(self.model_state.step)
        leaves = jax.tree_util.tree_leaves_with_path(self.model_state.opt_state)
        counts = {int(leaf) for path, leaf in leaves if jax.tree_util.keystr(path).endswith(".count")}
        return step if counts == {step} else -1

    def configure_dataloaders(self) -> TrainerConfigureDataloaderOutput:
        """Returns batches from the state's step on: EasyDeL would read all that were used before once more."""
        loader: Any = _Loader(lambda: prefetch(self._setup.batch_at, int(self.model_state.step)))
        return TrainerConfigureDataloaderOutput(
            dataloader_train=loader,
            max_training_steps=self._recipe.steps,
            dataloader_eval=None,
            max_evaluation_steps=0,
        )

    def _fast_forward_batches(self, data_iter: Iterator, dataloader: Any, num_batches: int) -> Iterator:
        return data_iter  # it begins at the right step already

    def _preprocess_batch_input(self, state: EasyDeLState, batch: dict, is_train: bool) -> tuple[dict, dict]:
        """Returns the batch on the devices; EasyDeL's own drops bfloat16 arrays, which are no numbers to NumPy.

        The target of a live training runs in this method, on the thread that runs the step: devices of several hosts
        must get their programs in one order.
        """
        rows = NamedSharding(self.model.mesh, vocab_shard.ROWS_SPEC)
        batch = {name: distributed.shard_rows(array, rows) for name, array in batch.items()}
        complete = self._setup.complete
        completed = {} if complete is None else complete(batch)
        return batch | {name: jax.device_put(array, rows) for name, array in completed.items()}, {}

    def configure_functions(self) -> TrainerConfigureFunctionOutput:
        """Returns the jitted step, which donates its state."""
        compiled = jitted_step(self._setup.draft, self._recipe, self.scheduler, self.state_shardings, self._tables)
        self._train_shared_fn_extra_args_ = (self._tables,)  # what EasyDeL's setter of the name without _ assigns
        self.arguments.ensure_checkpoint_path()
        return TrainerConfigureFunctionOutput(
            sharded_training_step_function=compiled,
            sharded_evaluation_step_function=None,
            mesh=self.model.mesh,
            checkpoint_manager=self.arguments.get_streaming_checkpointer(),
        )

    def _execute_train_step(self, state: EasyDeLState, batch: dict) -> tuple[EasyDeLState, LossMetrics, Any]:
        state, metrics, self.failure = super()._execute_train_step(state, batch)
        return state, metrics, self.failure

    def on_step_end(self, state: EasyDeLState, metrics: Any, step: int) -> tuple[EasyDeLState, Any]:
        """Refuses a loss that is not finite, saves where the recipe does, and reports the step.

        `metrics` are `LossMetrics`, whatever EasyDeL's annotation says.
        """
        with self._failure_recorded():
            values = {"loss": float(metrics.loss), "learning_rate": float(metrics.learning_rate)}
            values |= {name: float(value) for name, value in metrics.other_metrics.items()}
            values["seconds"] = float(metrics.execution_time)
            if not np.isfinite(values["loss"]):
                raise PipelineError(f"the loss is {values['loss']} at step {step}; lower train.learning_rate")
            if self._recipe.saves_at(step):
                self._save(state, step)
            self._on_step(StepReport(step, values, lambda: weights_in(state)))
        return state, metrics

    def _save_checkpoint_for_step(self, state: EasyDeLState, *, step: int, **options: Any) -> None:
        return None  # on_step_end saves

    def _save_readme(self, save_directory: Any) -> None:
        """Writes nothing: the file would hold the time and the names of devices."""

    def _save(self, state: EasyDeLState, step: int) -> None:
        root = Path(str(self.arguments._get_save_directory()))
        run = run_directories.path_of(root, step)
        with shared_disk.one_writer():
            self._save_state(state=state, save_directory=str(run))
        distributed.barrier(f"step {step} is written")
        if distributed.is_primary():
            run_directories.settle(run, step)
            run_directories.keep_only(root, run)
        distributed.barrier(f"step {step} is complete")

    @contextlib.contextmanager
    def _failure_recorded(self) -> Iterator[None]:
        """Records what our own code raises: EasyDeL's loop swallows some kinds."""
        try:
            yield
        except BaseException as error:
            self.failure = error
            raise


def _state_of(module: DraftModule) -> EasyDeLState:
    """Returns the state to begin with. Each host has all of it in its own memory and sends its devices their parts.

    EasyDeL distributes it with `device_put`, which cannot move an array from one host's devices to those of others: so
    weights come as arrays of NumPy, and what is small is on all devices already.
    """
    state = module.to_state()
    if not distributed.is_multihost():
        return state
    replicated = NamedSharding(module.mesh, PartitionSpec())

    def on_all(leaf: Array) -> Array:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            key = np.asarray(jax.random.key_data(leaf))
            return jax.jit(jax.random.wrap_key_data, out_shardings=replicated)(key)
        return jax.device_put(np.asarray(leaf), replicated)

    return state.replace(
        step=on_all(jnp.int32(state.step)),
        graphstate=jax.tree.map(np.asarray, state.graphstate),
        graphother=jax.tree.map(on_all, state.graphother),
    )


@dataclasses.dataclass(frozen=True)
class _Loader:
    """A data loader as EasyDeL wants it: an object that can be iterated over."""

    iterate: Callable[[], Iterator[dict[str, np.ndarray]]]

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self.iterate()
