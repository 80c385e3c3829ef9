"""A mix of reasoning efforts: each prompt's own is drawn once and for all."""

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping

from pipeline.prompts.messages import EFFORTS

DIGEST_BITS = 64


@dataclasses.dataclass(frozen=True)
class EffortMix:
    """Shares of the efforts, at least one of them positive; their sum may be any number."""

    seed: int
    shares: Mapping[str, float]

    def of(self, prompt_id: str) -> str:
        """The effort of a prompt: a function of the seed and its id, whatever the other prompts are."""
        digest = hashlib.sha256(f"effort/{self.seed}/{prompt_id}".encode()).digest()
        place = int.from_bytes(digest[: DIGEST_BITS // 8]) / 2**DIGEST_BITS * sum(self.shares.values())
        known = [effort for effort in EFFORTS if self.shares.get(effort)]
        ends = itertools.accumulate(self.shares[effort] for effort in known)
        return next((effort for effort, end in zip(known, ends, strict=True) if place < end), known[-1])
