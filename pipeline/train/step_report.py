"""The report of a training step."""

import dataclasses
from collections.abc import Callable

from pipeline.model.dflash.weights import DFlashWeights


@dataclasses.dataclass(frozen=True)
class StepReport:
    """Holds a step's number (1 for the first), its metrics and a function that returns the weights after it.

    Metrics: loss, learning_rate, token_accuracy, anchor_accept_length, num_tokens (drafted tokens learned
    from) and seconds.
    """

    step: int
    metrics: dict[str, float]
    weights: Callable[[], DFlashWeights]
