"""The acceptance rule and every metric made from it; no other module spells one out.

A round proposes B-1 tokens behind an anchor. `kept` is how many of them the target would have produced
itself; the round yields `kept + 1` tokens, the target's own token included. A round that a stop token or
the length limit cuts short counts with what it yielded, so that the sum of `kept + 1` over the rounds is
the number of tokens generated after the first (the count of `dflash_generate` and of SGLang).
Source: ../shared/design/architecture.md, "Metrics"; DFlash paper, tau.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

MEMORISED = 1.3  # accept_length on train texts over that on held-out ones


def count_kept(proposed: Int[Array, "*batch drafted"], verified: Int[Array, "*batch drafted"]) -> Int[Array, "*batch"]:
    """How many leading proposed tokens equal the target's own tokens at the same positions (0..B-1)."""
    return jnp.cumprod((proposed == verified).astype(jnp.int32), axis=-1).sum(axis=-1)


def cut_at_stop(
    tokens: Int[Array, "B K"], num_tokens: Int[Array, " B"], stop_ids: Int[Array, " stops"]
) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    """Shorten a round's yield to end at its first stop token.

    `tokens` [B, K] are a round's tokens, of which the first `num_tokens` [B] count. Returns the shortened
    counts [B] and whether a stop token was met [B].
    """
    index = jnp.arange(tokens.shape[-1])
    is_stop = (tokens[..., None] == stop_ids).any(-1) & (index < num_tokens[:, None])
    stopped = is_stop.any(-1)
    first = jnp.argmax(is_stop, axis=-1)
    return jnp.where(stopped, first + 1, num_tokens), stopped


def walk(kept_at: Int[np.ndarray, " positions"], first_anchor: int, num_tokens: int) -> list[int]:
    """The rounds an engine would run over a known greedy text, given what a draft keeps at every anchor.

    `kept_at[a]` is the kept count of a block anchored at position a; the text has `num_tokens` tokens and
    its first generated token is at `first_anchor`. Returns kept per round, the last one cut at the end.
    """
    rounds = []
    anchor = first_anchor
    while anchor < num_tokens - 1:
        kept = min(int(kept_at[anchor]), num_tokens - anchor - 2)
        rounds.append(kept)
        anchor += kept + 1
    return rounds


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """Counts over rounds; add them up with `+`, read the metrics off the sum.

    `histogram[k]` is the number of rounds that kept exactly k tokens, k = 0..B-1.
    """

    histogram: tuple[int, ...]

    @classmethod
    def of(cls, kept: Sequence[int], block_size: int) -> "Acceptance":
        """Count rounds from their kept values (each 0..B-1)."""
        counts = np.bincount(np.asarray(kept, dtype=np.int64), minlength=block_size)
        if len(counts) != block_size:
            raise ValueError(f"kept {max(kept)} tokens in a block of {block_size}, which drafts {block_size - 1}")
        return cls(tuple(int(count) for count in counts))

    def __add__(self, other: "Acceptance") -> "Acceptance":
        return Acceptance(tuple(a + b for a, b in zip(self.histogram, other.histogram, strict=True)))

    @property
    def block_size(self) -> int:
        """B: the anchor and B-1 drafted tokens."""
        return len(self.histogram)

    @property
    def num_rounds(self) -> int:
        """Rounds counted."""
        return sum(self.histogram)

    @property
    def num_kept(self) -> int:
        """Drafted tokens accepted, over all rounds."""
        return sum(kept * count for kept, count in enumerate(self.histogram))

    @property
    def accept_length(self) -> float:
        """Mean tokens a round yields, the target's own included (1..B); nan without rounds."""
        return 1 + self.num_kept / self.num_rounds if self.num_rounds else float("nan")

    @property
    def accept_rate(self) -> float:
        """Accepted share of the drafted tokens (0..1); nan without rounds."""
        drafted = self.num_rounds * (self.block_size - 1)
        return self.num_kept / drafted if drafted else float("nan")

    @property
    def accept_rate_at_k(self) -> tuple[float, ...]:
        """For k = 1..B-1: the share of rounds whose first k drafted tokens were all kept."""
        if not self.num_rounds:
            return (float("nan"),) * (self.block_size - 1)
        return tuple(sum(self.histogram[k:]) / self.num_rounds for k in range(1, self.block_size))

    def metrics(self) -> dict[str, float]:
        """The metrics under the names that every stage logs."""
        at_k = {f"accept_rate_at_{k}": rate for k, rate in enumerate(self.accept_rate_at_k, start=1)}
        return {"accept_length": self.accept_length, "accept_rate": self.accept_rate, **at_k}


def empty(block_size: int) -> Acceptance:
    """No rounds yet."""
    return Acceptance((0,) * block_size)


def memorises(trained: float, heldout: float) -> bool:
    """Whether accept_length on train texts lies so far above that on held-out ones that a draft knows them by heart."""
    return trained > MEMORISED * heldout


def speedup(dflash_tokens_per_second: float, plain_tokens_per_second: float) -> float:
    """DFLASH decode speed over plain decode speed: same prompts, lengths, machine and run; nan without any."""
    return dflash_tokens_per_second / plain_tokens_per_second if plain_tokens_per_second else float("nan")
