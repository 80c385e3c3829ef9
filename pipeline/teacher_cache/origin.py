"""Records who wrote the answers of a teacher cache and how, and measures whether the target agrees with them."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from pipeline.model.layers.sampling import Sampling, sampling_key

STANDARD_ERRORS = 3
WARNED_SHARE, REFUSED_SHARE = 0.01, 0.05  # of greedy tokens: kernels and precisions differ in one of a hundred
WARNED_NATS, REFUSED_NATS = 0.05, 0.25  # a token: a quantised server is 0.01 away, another size of a model about 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerOrigin:
    """Holds who answers: our engine, unless there is an `endpoint` (a model and a host) or `rows` hold the answers.

    `rows` is the name of the file or dataset. `sampling` is None for greedy tokens.
    """

    endpoint: str | None = None
    rows: str | None = None
    sampling: Sampling | None = None
    seed: int = 0

    def keys(self, names: Sequence[str]) -> list[tuple[int, int]] | None:
        """Returns the keys with which our engine samples the answers to these prompts; None without sampling."""
        if self.sampling is None or not self.is_engine:
            return None
        return [sampling_key(self.seed, name) for name in names]

    @property
    def is_engine(self) -> bool:
        """Returns whether our engine answers, so that the noise behind a sampled text is known."""
        return self.endpoint is None and self.rows is None

    @property
    def causes(self) -> str:
        """Returns why texts from outside may not be the target's."""
        if self.rows is None:
            return "it serves another model, another precision or another prompt template"
        return (
            "another model or another precision of it wrote them, behind another template, effort or date "
            "(prompts.date), or sampled them otherwise (teacher_cache.temperature, teacher_cache.top_p)"
        )

    @property
    def mend(self) -> str:
        """Returns what to do about texts from outside that are not the target's."""
        if self.rows is None:
            return "let it serve the target of this configuration, and run the same command again"
        return (
            "set these to what the answers were written with, or let the target answer: teacher_cache.generator=engine"
        )


ENGINE = AnswerOrigin()


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Measures how far tokens from outside are from the target: sums of 0 or 1 (greedy) or of nats (sampled)."""

    num_tokens: int = 0
    total: float = 0.0
    total_squares: float = 0.0

    @classmethod
    def of(cls, shortfall: Float[np.ndarray, " tokens"], origin: AnswerOrigin, tie_gap: float) -> "Divergence":
        """Returns the divergence of generated tokens from their shortfalls (`capture.Captured`)."""
        values = (shortfall > tie_gap) if origin.sampling is None else shortfall
        values = values.astype(np.float64)
        return cls(len(values), float(values.sum()), float((values**2).sum()))

    def __add__(self, other: "Divergence") -> "Divergence":
        return Divergence(
            self.num_tokens + other.num_tokens, self.total + other.total, self.total_squares + other.total_squares
        )

    @property
    def mean(self) -> float:
        """Returns the mean per token: the share that the target would not have chosen, or nats."""
        return self.total / self.num_tokens if self.num_tokens else 0.0

    @property
    def least(self) -> float:
        """Returns a lower bound of the mean: STANDARD_ERRORS below it."""
        if not self.num_tokens:
            return 0.0
        variance = max(self.total_squares / self.num_tokens - self.mean**2, 1 / self.num_tokens)
        return self.mean - STANDARD_ERRORS * math.sqrt(variance / self.num_tokens)

    def problem(self, origin: AnswerOrigin) -> tuple[str, bool] | None:
        """Returns what is wrong with texts from outside and whether to refuse them; None when nothing is."""
        greedy = origin.sampling is None
        warned, refused = (WARNED_SHARE, REFUSED_SHARE) if greedy else (WARNED_NATS, REFUSED_NATS)
        if self.least <= warned:
            return None
        found = (
            f"{self.mean:.1%} of {self.num_tokens} generated tokens are not the target's choice, {refused:.0%} may be"
            if greedy
            else f"{self.num_tokens} generated tokens surprise the target by {self.mean:.3f} nats each more than its "
            f"own would, {refused} may be"
        )
        whose = f"the text of {origin.endpoint} is" if origin.rows is None else f"the answers in {origin.rows} are"
        return f"{whose} not the target's: {found}; {origin.causes}", self.least > refused
