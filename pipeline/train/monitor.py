"""Shows a training run to a person while it goes: progress, metrics and the acceptance on text."""

import contextlib
import dataclasses
import logging
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping
from types import TracebackType

from pipeline.model.dflash.weights import DFlashWeights
from pipeline.progress import Progress
from pipeline.tracking.run import Run
from pipeline.train.evaluation.best import Evaluation
from pipeline.train.evaluation.score import Score
from pipeline.train.step_report import StepReport

log = logging.getLogger("pipeline")

WINDOW_MEANS = ("loss", "token_accuracy", "anchor_accept_length")
PREFIXES = {"heldout": "eval", "train": "eval_train"}


@dataclasses.dataclass(frozen=True)
class DeviceCapacity:
    """Holds the operations that a step needs, and those that all devices do in a second (None: unknown)."""

    step_flops: float
    flops_per_second: float | None


class TrainMonitor:
    """Receives every step, logs every `log_steps`, and evaluates where the recipe says so.

    `evaluate(step, weights)` scores a draft and records the evaluation.
    """

    def __init__(
        self,
        tracker: Run,
        *,
        steps: int,
        log_steps: int,
        capacity: DeviceCapacity,
        evaluates_at: Callable[[int], bool],
        evaluate: Callable[[int, DFlashWeights], Evaluation],
        last_evaluated: int,
    ) -> None:
        self._tracker = tracker
        self._steps = steps
        self._log_steps = log_steps
        self._capacity = capacity
        self._evaluates_at = evaluates_at
        self._evaluate = evaluate
        self._last_evaluated = last_evaluated
        self._window: dict[str, list[float]] = defaultdict(list)
        self._note = ""
        self._compiling = True
        self._open = contextlib.ExitStack()
        self._progress: Progress | None = None

    def __enter__(self) -> "TrainMonitor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, traceback)

    def begin(self, report: StepReport) -> None:
        """Begins after a step of an earlier run (0: none), and evaluates it where that run ended before it could."""
        if report.step:
            log.info("train: going on; %d of %d steps are made", report.step, self._steps)
        if report.step and self._evaluates_at(report.step) and report.step > self._last_evaluated:
            self._score(report)
        self._progress = self._open.enter_context(Progress("train", self._steps, "steps", done=report.step))

    def step(self, report: StepReport) -> None:
        """Counts a finished step, and logs and evaluates when it is time.

        Used between `begin` and the end of the `with` block.
        """
        assert self._progress is not None, "`begin` opens it"
        for name, value in report.metrics.items():
            self._window[name].append(value)
        if self._compiling:  # the first step's time is the compiler's
            self._compiling = False
            del self._window["seconds"][-1], self._window["num_tokens"][-1]
        if report.step % self._log_steps == 0 or report.step == self._steps:
            self._log(report.step)
        if self._evaluates_at(report.step):
            self._score(report)
        self._progress.advance(1, f"loss {report.metrics['loss']:.3f}{self._note}")

    def _score(self, report: StepReport) -> None:
        found = self._evaluate(report.step, report.weights())
        heldout, train = found.heldout.total.accept_length, found.train.total.accept_length
        self._note = f", accept_length {heldout:.2f} held out, {train:.2f} train"
        log_scores(self._tracker, {"heldout": found.heldout, "train": found.train}, report.step)

    def _log(self, step: int) -> None:
        window = self._window
        metrics = {f"train/{name}": statistics.fmean(window[name]) for name in WINDOW_MEANS}
        metrics["train/learning_rate"] = window["learning_rate"][-1]
        if window["seconds"]:
            seconds = sum(window["seconds"])
            metrics["train/tokens_per_second"] = sum(window["num_tokens"]) / seconds
            metrics["train/steps_per_second"] = len(window["seconds"]) / seconds
            flops = self._capacity.step_flops * len(window["seconds"]) / seconds
            metrics["train/flops_per_second"] = flops
            if self._capacity.flops_per_second is not None:
                metrics["train/mfu"] = flops / self._capacity.flops_per_second
        self._tracker.log_metrics(metrics, step=step)
        window.clear()


def log_scores(tracker: Run, scores: Mapping[str, Score], step: int | None) -> None:
    """Logs scores by split: `eval/accept_length` held out, `eval_train/...`, and the ratio of the two."""
    metrics = {
        f"{PREFIXES[split]}/{name}": value for split, score in scores.items() for name, value in score.metrics().items()
    }
    heldout, train = scores["heldout"].total.accept_length, scores["train"].total.accept_length
    tracker.log_metrics(metrics | {"eval/train_to_heldout_ratio": train / heldout}, step=step)
