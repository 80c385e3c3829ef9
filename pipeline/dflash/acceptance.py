"""The acceptance rule and every metric that follows from it; no other module defines one.

A round drafts K-1 tokens behind an anchor and accepts the leading ones that the target would have produced itself; it
yields one token more, the target's own. A round that a stop token or the length limit cuts short counts with
what it yielded, so that the sum of accepted + 1 over the rounds is the number of tokens generated after the first (the
count of `dflash_generate` and of SGLang). Source: docs/dflash.md#metrics; DFlash paper, tau.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

MEMORISED = 1.3  # accept_length on train texts over that on held-out ones


def count_accepted(drafted: Int[Array, "*batch drafted"], chosen: Int[Array, "*batch drafted"]) -> Int[Array, "*batch"]:
    """Returns how many leading drafted tokens equal the target's own at the same positions (0..K-1)."""
    return jnp.cumprod((drafted == chosen).astype(jnp.int32), axis=-1).sum(axis=-1)


def cut_at_stop(
    tokens: Int[Array, "B K"], num_tokens: Int[Array, " B"], stop_ids: Int[Array, "B stops"]
) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    """Shortens what rounds yield so that it ends at the first stop token.

    `tokens` [B, K] are the rounds' tokens, of which the first `num_tokens` [B] count, and `stop_ids` [B, S] the rows'
    stop tokens. Returns the shortened counts [B] and whether a stop token was met [B].
    """
    index = jnp.arange(tokens.shape[-1])
    is_stop = (tokens[..., None] == stop_ids[:, None]).any(-1) & (index < num_tokens[:, None])
    stopped = is_stop.any(-1)
    first = jnp.argmax(is_stop, axis=-1)
    return jnp.where(stopped, first + 1, num_tokens), stopped


def rounds_over_text(accepted_at: Int[np.ndarray, " positions"], first_anchor: int, num_tokens: int) -> list[int]:
    """Returns the rounds that an engine would run over a greedy text: the accepted tokens of each.

    `accepted_at[a]` counts the accepted tokens of a block anchored at position a; the text has `num_tokens` tokens and
    its first generated one is at `first_anchor`. The last round is cut at the text's end.
    """
    rounds = []
    anchor = first_anchor
    while anchor < num_tokens - 1:
        count = min(int(accepted_at[anchor]), num_tokens - anchor - 2)
        rounds.append(count)
        anchor += count + 1
    return rounds


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """Counts rounds by their accepted tokens. Counts are added with `+`, and the metrics are read off the sum.

    `histogram[k]` is the number of rounds that accepted exactly k tokens, k = 0..K-1.
    """

    histogram: tuple[int, ...]

    @classmethod
    def of(cls, accepted: Sequence[int], block_size: int) -> "Acceptance":
        """Counts rounds from the accepted tokens of each, 0..K-1; raises ValueError for more than that."""
        counts = np.bincount(np.asarray(accepted, dtype=np.int64), minlength=block_size)
        if len(counts) != block_size:
            raise ValueError(
                f"{max(accepted)} tokens accepted in a block of {block_size}, which drafts {block_size - 1}"
            )
        return cls(tuple(int(count) for count in counts))

    def __add__(self, other: "Acceptance") -> "Acceptance":
        return Acceptance(tuple(a + b for a, b in zip(self.histogram, other.histogram, strict=True)))

    @property
    def block_size(self) -> int:
        """K: the anchor and K-1 drafted tokens."""
        return len(self.histogram)

    @property
    def num_rounds(self) -> int:
        """The number of rounds."""
        return sum(self.histogram)

    @property
    def num_accepted(self) -> int:
        """The number of accepted drafted tokens, over all rounds."""
        return sum(accepted * count for accepted, count in enumerate(self.histogram))

    @property
    def accept_length(self) -> float:
        """The mean number of tokens that a round yields, the target's own included (1..K); nan without rounds."""
        return accept_length_of(self.num_accepted, self.num_rounds)

    @property
    def accept_rate(self) -> float:
        """The accepted share of the drafted tokens (0..1); nan without rounds."""
        drafted = self.num_rounds * (self.block_size - 1)
        return self.num_accepted / drafted if drafted else float("nan")

    @property
    def num_accepted_at_k(self) -> tuple[int, ...]:
        """The number of rounds whose first k drafted tokens were all accepted, for k = 1..K-1."""
        return tuple(sum(self.histogram[k:]) for k in range(1, self.block_size))

    @property
    def accept_rate_at_k(self) -> tuple[float, ...]:
        """The share of rounds whose first k drafted tokens were all accepted, for k = 1..K-1; nan without rounds."""
        if not self.num_rounds:
            return (float("nan"),) * (self.block_size - 1)
        return tuple(count / self.num_rounds for count in self.num_accepted_at_k)

    def metrics(self) -> dict[str, float]:
        """Returns the metrics under the names that every stage logs."""
        at_k = {f"accept_rate_at_{k}": rate for k, rate in enumerate(self.accept_rate_at_k, start=1)}
        return {"accept_length": self.accept_length, "accept_rate": self.accept_rate, **at_k}


def accept_length_of(num_accepted: int, num_rounds: int) -> float:
    """Returns the mean number of tokens that a round yields, from what a server's usage tells; nan without rounds."""
    return 1 + num_accepted / num_rounds if num_rounds else float("nan")


def break_even(accept_length: float, speedup: float) -> float:
    """Returns the accept_length with which DFLASH would be as fast as plain decoding: a round's time in plain steps."""
    return accept_length / speedup


def empty(block_size: int) -> Acceptance:
    """Returns the acceptance of no rounds."""
    return Acceptance((0,) * block_size)


def memorises(trained: float, heldout: float) -> bool:
    """Returns whether a draft memorises: accept_length on train texts is more than MEMORISED times the held-out one."""
    return trained > MEMORISED * heldout


def speedup(dflash_tokens_per_second: float, plain_tokens_per_second: float) -> float:
    """Returns DFLASH decode speed over plain decode speed; nan when the latter is 0.

    Both are measured with the same prompts and lengths, on the same machine and in the same run.
    """
    return dflash_tokens_per_second / plain_tokens_per_second if plain_tokens_per_second else float("nan")
