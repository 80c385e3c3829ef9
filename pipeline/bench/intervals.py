"""95% intervals of a benchmark's headlines, by bootstrap: what other prompts and other passes might have given.

Prompts are drawn anew, with replacement, for both arms and all passes alike, because a prompt costs every pass much the
same; pairs of passes are drawn anew too. Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), ch. 13.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from pipeline.dflash.acceptance import accept_length_of

NUM_RESAMPLES = 2000
TAILS = (2.5, 97.5)


@dataclasses.dataclass(frozen=True)
class Interval:
    """Holds the ends of a 95% interval."""

    low: float
    high: float

    def relative_half_width(self, value: float) -> float:
        """Returns half of the width as a share of the value."""
        return (self.high - self.low) / 2 / value


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassTimes:
    """Holds decoded tokens and seconds of an arm's R passes over N prompts."""

    tokens: Float[np.ndarray, "R N"]
    seconds: Float[np.ndarray, "R N"]

    @property
    def speeds(self) -> Float[np.ndarray, " R"]:
        """The tokens per second of each pass."""
        return self.tokens.sum(1) / self.seconds.sum(1)


def speedup_of(plain: PassTimes, dflash: PassTimes) -> float:
    """Returns the median over pairs of passes of DFLASH speed over plain speed."""
    return float(np.median(dflash.speeds / plain.speeds))


def speedup_interval(plain: PassTimes, dflash: PassTimes, *, seed: int = 0, passes_vary: bool = True) -> Interval:
    """Returns the interval of `speedup_of`; without `passes_vary` only what the choice of prompts adds to it."""
    num_passes, num_prompts = plain.tokens.shape
    random = np.random.default_rng(seed)
    weights = _prompt_weights(random, num_prompts)
    ratios = ((dflash.tokens @ weights.T) / (dflash.seconds @ weights.T)) / (
        (plain.tokens @ weights.T) / (plain.seconds @ weights.T)
    )
    if passes_vary:
        chosen = random.integers(0, num_passes, (num_passes, NUM_RESAMPLES))
        ratios = np.take_along_axis(ratios, chosen, axis=0)
    return _interval(np.median(ratios, axis=0))


def accept_length_interval(
    num_accepted: Int[np.ndarray, " N"], num_rounds: Int[np.ndarray, " N"], *, seed: int = 0
) -> Interval:
    """Returns the interval of accept_length, from the accepted tokens and the rounds of each of N answers."""
    weights = _prompt_weights(np.random.default_rng(seed), len(num_rounds))
    lengths = [
        accept_length_of(int(a), int(r)) for a, r in zip(weights @ num_accepted, weights @ num_rounds, strict=True)
    ]
    return _interval(np.array([length for length in lengths if np.isfinite(length)]))


def share_intervals(
    counts: Int[np.ndarray, "N drafted"], num_rounds: Int[np.ndarray, " N"], *, seed: int = 0
) -> list[Interval]:
    """Returns the interval of accept_rate_at_k for each k: rounds of each answer that accepted k tokens, of all."""
    weights = _prompt_weights(np.random.default_rng(seed), len(num_rounds))
    totals = np.maximum(weights @ num_rounds, 1)
    return [_interval(shares) for shares in (weights @ counts).T / totals]


def _prompt_weights(random: np.random.Generator, num_prompts: int) -> Int[np.ndarray, "samples N"]:
    """Returns how often each prompt is drawn in each resample."""
    return random.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), NUM_RESAMPLES)


def _interval(values: Float[np.ndarray, " samples"]) -> Interval:
    if not len(values):
        return Interval(float("nan"), float("nan"))
    low, high = np.percentile(values, TAILS)
    return Interval(float(low), float(high))
