"""The score of an evaluation: acceptance over a split's texts, in total and by effort and channel."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from pipeline.dflash import acceptance
from pipeline.dflash.acceptance import Acceptance
from pipeline.store.heldout_rounds import HeldoutText


@dataclasses.dataclass(frozen=True)
class Score:
    """Holds the acceptance over `num_sequences` texts.

    `by_effort` divides it by the reasoning effort of a text, `by_channel` by the channel that a round begins in.
    `texts` are the texts themselves, in the split's order; `best.py` writes them to a file of their own.
    """

    num_sequences: int
    total: Acceptance
    by_effort: Mapping[str, Acceptance] = dataclasses.field(default_factory=dict)
    by_channel: Mapping[str, Acceptance] = dataclasses.field(default_factory=dict)
    texts: tuple[HeldoutText, ...] = dataclasses.field(default=(), compare=False, repr=False)

    def metrics(self) -> dict[str, float]:
        """Returns the metrics of the total, and accept_length of every part where there are several."""
        parts = [part for part in (self.by_effort, self.by_channel) if len(part) > 1]
        return self.total.metrics() | {
            f"accept_length_{name}": found.accept_length for part in parts for name, found in part.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Returns the score as evaluation.json has it: histograms, the metrics computed from them, and no texts."""
        return {
            "num_sequences": self.num_sequences,
            **_values(self.total),
            "by_effort": {name: _values(part) for name, part in sorted(self.by_effort.items())},
            "by_channel": {name: _values(part) for name, part in sorted(self.by_channel.items())},
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Score":
        """Reads the value that `to_json` returns."""
        return cls(
            found["num_sequences"],
            _read(found),
            {name: _read(part) for name, part in found["by_effort"].items()},
            {name: _read(part) for name, part in found["by_channel"].items()},
        )


class Tally:
    """Sums rounds up to a `Score`."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._num_sequences = 0
        self._total = acceptance.empty(block_size)
        self._by_effort: dict[str, Acceptance] = defaultdict(lambda: acceptance.empty(block_size))
        self._by_channel: dict[str, Acceptance] = defaultdict(lambda: acceptance.empty(block_size))

    def add(self, rounds: list[int], channels: list[str], effort: str) -> None:
        """Adds the rounds of one text: how many tokens each accepted, and the channel it began in."""
        self._num_sequences += 1
        acceptance_of_text = Acceptance.of(rounds, self._block_size)
        self._total += acceptance_of_text
        self._by_effort[effort] += acceptance_of_text
        for channel in sorted(set(channels)):
            in_channel = [count for count, begun_in in zip(rounds, channels, strict=True) if begun_in == channel]
            self._by_channel[channel] += Acceptance.of(in_channel, self._block_size)

    def score(self) -> Score:
        """Returns the score of all rounds added so far."""
        return Score(self._num_sequences, self._total, dict(self._by_effort), dict(self._by_channel))


def _values(found: Acceptance) -> dict[str, Any]:
    return {"histogram": list(found.histogram), **found.metrics()}


def _read(found: Mapping[str, Any]) -> Acceptance:
    return Acceptance(tuple(found["histogram"]))
