"""How many different experts blocks of real text choose, counted; what a roofline otherwise models.

Verifying reads every expert that any token of any block chooses. The blocks counted are stretches of the target's own
answers, as a draft that is right proposes them; tokens that a draft gets wrong choose others.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from pipeline.errors import PipelineError
from pipeline.model.gpt_oss.config import GptOssConfig

NUM_DRAWS = 200  # of blocks at once; the mean's error is then below a hundredth of an expert's standard deviation


@dataclasses.dataclass(frozen=True)
class ExpertTraffic:
    """Holds the experts that each layer chose for each token of some answers, and a seed to draw blocks of them by.

    What was counted is remembered, for it is asked for again and again.
    """

    model: GptOssConfig
    answers: tuple[Int[np.ndarray, "_ L k"], ...]
    seed: int = 0
    _counted: dict[tuple[int, int], float] = dataclasses.field(default_factory=dict, init=False)

    def distinct(self, concurrency: int, block: int) -> float:
        """Returns how many experts of a layer `concurrency` blocks of `block` tokens choose, on average.

        Each block is drawn from all of that length, of another answer as far as there are enough. Raises PipelineError
        when no answer is so long.
        """
        long = [index for index, one in enumerate(self.answers) if len(one) >= block]
        if not long:
            longest = max(map(len, self.answers), default=0)
            raise PipelineError(
                f"the longest answer of the teacher cache has {longest} tokens, and a block {block}: lower "
                "feasibility.block_sizes, or make a cache of longer answers"
            )
        if (concurrency, block) not in self._counted:
            random = np.random.default_rng([self.seed, concurrency, block])
            counts = [self._drawn(random, long, concurrency, block) for _ in range(NUM_DRAWS)]
            self._counted[concurrency, block] = float(np.mean(counts))
        return self._counted[concurrency, block]

    def agreement(self, block: int) -> float:
        """Returns the share of a block's tokens that add no expert, if the others choose at random."""
        share = self.model.num_experts_per_tok / self.model.num_local_experts
        if share == 1:  # each token chooses all
            return 1.0
        missed = max(1 - self.distinct(1, block) / self.model.num_local_experts, 1e-9)
        tokens = math.log(missed) / math.log1p(-share)
        return 1 - (tokens - 1) / (block - 1)

    def _drawn(self, random: np.random.Generator, long: Sequence[int], concurrency: int, block: int) -> float:
        chosen = random.choice(long, concurrency, replace=concurrency > len(long))
        blocks = []
        for index in chosen:
            first = random.integers(len(self.answers[index]) - block + 1)
            blocks.append(self.answers[index][first : first + block])
        tokens = np.concatenate(blocks)
        hit = np.zeros((tokens.shape[1], self.model.num_local_experts), bool)
        for layer in range(tokens.shape[1]):
            hit[layer, tokens[:, layer].ravel()] = True
        return float(hit.sum(axis=1).mean())
