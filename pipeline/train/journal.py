"""What a person sees of a training run while it goes: progress, metrics and the acceptance on held-out text."""

import contextlib
import statistics
from collections import defaultdict
from collections.abc import Callable
from types import TracebackType

from pipeline.dflash.acceptance import Acceptance
from pipeline.model.draft import DraftWeights
from pipeline.progress import Progress
from pipeline.tracking import Run
from pipeline.train.report import StepReport

WINDOW_MEANS = ("loss", "token_accuracy", "anchor_accept_length")


class Journal:
    """Told of every step; speaks every `log_steps` and evaluates every `eval_steps` but at the last step."""

    def __init__(
        self,
        tracker: Run,
        *,
        steps: int,
        log_steps: int,
        eval_steps: int,
        evaluate: Callable[[DraftWeights], Acceptance],
    ) -> None:
        self._tracker = tracker
        self._steps = steps
        self._log_steps = log_steps
        self._eval_steps = eval_steps
        self._evaluate = evaluate
        self._window: dict[str, list[float]] = defaultdict(list)
        self._note = ""
        self._compiling = True
        self._open = contextlib.ExitStack()
        self._progress: Progress | None = None

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, traceback)

    def begin(self, done: int) -> None:
        """Training begins behind `done` steps of an earlier run."""
        self._progress = self._open.enter_context(Progress("train", self._steps, "steps", done=done))

    def step(self, report: StepReport) -> None:
        """A step is done."""
        for name, value in report.metrics.items():
            self._window[name].append(value)
        if self._compiling:  # the first step says nothing of the rate
            self._compiling = False
            del self._window["seconds"][-1], self._window["num_tokens"][-1]
        if report.step % self._log_steps == 0 or report.step == self._steps:
            self._tell(report.step)
        if report.step % self._eval_steps == 0 and report.step < self._steps:
            found = self._evaluate(report.weights())
            self._note = f", held-out accept_length {found.accept_length:.2f}"
            log_acceptance(self._tracker, "eval", found, report.step)
        self._progress.advance(1, f"loss {report.metrics['loss']:.3f}{self._note}")

    def _tell(self, step: int) -> None:
        window = self._window
        metrics = {f"train/{name}": statistics.fmean(window[name]) for name in WINDOW_MEANS}
        metrics["train/learning_rate"] = window["learning_rate"][-1]
        if window["seconds"]:
            metrics["train/tokens_per_second"] = sum(window["num_tokens"]) / sum(window["seconds"])
        self._tracker.log_metrics(metrics, step=step)
        window.clear()


def log_acceptance(tracker: Run, prefix: str, found: Acceptance, step: int | None) -> None:
    """Record the acceptance metrics as `<prefix>/accept_length` and so on."""
    tracker.log_metrics({f"{prefix}/{name}": value for name, value in found.metrics().items()}, step=step)
