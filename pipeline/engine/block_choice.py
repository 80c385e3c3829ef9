"""How many tokens to draft next: as many as pay, by what rounds took and what they accepted."""

import collections
import dataclasses
from collections.abc import Sequence

MEMORY = 0.98  # weight of what was known before, at every round that adds to it
TIMES = 9  # of a size's last rounds, of which the shortest counts: what else a machine does only adds to them
MIN_GAIN = 1.02  # of another size over the present one, before it is taken
PROBE_EVERY = 400  # rounds after which a size is tried again that was not used
FIRST_ROUNDS = 16  # of the largest size, before anything is known of the draft


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Holds what a round of a size is expected to yield, in tokens a request, and to take, in seconds."""

    accept_length: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Returns the speed of each request."""
        return self.accept_length / self.seconds


class BlockChoice:
    """Chooses the block size of the next round among a few compiled ones, of which 1 is plain decoding.

    What a smaller block would accept follows from what larger ones accepted: of a round that accepted k tokens, a block
    of size K would have accepted min(k, K - 1). Raises ValueError without a size.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        if not sizes:
            raise ValueError("there is no block size to choose from")
        self.sizes = tuple(sorted(sizes))
        self._present = self.sizes[-1]
        self._seconds: dict[int, collections.deque[float]] = {}
        self._counted = [0.0] * (self.sizes[-1] - 1)  # rounds that drafted at least 1, 2, ... tokens, older ones less
        self._confirmed = [0.0] * (self.sizes[-1] - 1)  # and those that accepted as many
        self._num_chosen = 0
        self._last_used = dict.fromkeys(self.sizes, 0)

    def choose(self) -> int:
        """Returns the size of the next round.

        Sizes that were not used for long are tried again, for requests change, and so does what a round takes.
        """
        self._num_chosen += 1
        if len(self.sizes) > 1:
            self._present = self._best()
            overdue = [size for size in self.sizes if self._num_chosen - self._last_used[size] > PROBE_EVERY]
            chosen = max(overdue, default=self._present)
        else:
            chosen = self._present
        self._last_used[chosen] = self._num_chosen
        return chosen

    def took(self, size: int, seconds: float) -> None:
        """Adds the time of a round with nothing beside it."""
        self._seconds.setdefault(size, collections.deque(maxlen=TIMES)).append(seconds)

    def accepted(self, size: int, counts: Sequence[int]) -> None:
        """Adds the accepted tokens of the requests of one round."""
        if size < 2 or not counts:
            return
        for index in range(size - 1):
            self._counted[index] = MEMORY * self._counted[index] + len(counts)
            self._confirmed[index] = MEMORY * self._confirmed[index] + sum(count > index for count in counts)

    def estimates(self) -> dict[int, Estimate]:
        """Returns what is expected of every size whose time is known; empty before anything was accepted or not."""
        if not any(self._counted):
            return {}
        shares = [
            confirmed / counted if counted else 0.0
            for confirmed, counted in zip(self._confirmed, self._counted, strict=True)
        ]
        return {size: Estimate(1.0 + sum(shares[: size - 1]), min(times)) for size, times in self._seconds.items()}

    def _best(self) -> int:
        found = self.estimates()
        if self._num_chosen <= FIRST_ROUNDS or self._present not in found:
            return self.sizes[-1]
        best = max(found, key=lambda size: found[size].tokens_per_second)
        gain = found[best].tokens_per_second / found[self._present].tokens_per_second
        return best if gain >= MIN_GAIN else self._present
