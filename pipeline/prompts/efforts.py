"""Mixes reasoning efforts: each prompt's effort is drawn once, from its id."""

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping

from pipeline.prompts.messages import EFFORTS

DIGEST_BITS = 64


@dataclasses.dataclass(frozen=True)
class EffortMix:
    """Holds the shares of the efforts; at least one is positive, and their sum may be any number."""

    seed: int
    shares: Mapping[str, float]

    def of(self, prompt_id: str) -> str:
        """Returns the effort of a prompt, which depends on the seed and the prompt's id alone."""
        digest = hashlib.sha256(f"effort/{self.seed}/{prompt_id}".encode()).digest()
        point = int.from_bytes(digest[: DIGEST_BITS // 8]) / 2**DIGEST_BITS * sum(self.shares.values())
        known = [effort for effort in EFFORTS if self.shares.get(effort)]
        ends = itertools.accumulate(self.shares[effort] for effort in known)
        return next((effort for effort, end in zip(known, ends, strict=True) if point < end), known[-1])
