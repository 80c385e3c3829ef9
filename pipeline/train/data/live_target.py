"""Computes features with the frozen target during training, so that the cache holds tokens alone.

`engine/capture.py` defines a token's features, for stored and for live ones.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding
from jaxtyping import Array

from pipeline.engine import capture
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.parallel.runtime import Runtime
from pipeline.model.placement import ROWS
from pipeline.store.layout import CachedSequence


@dataclasses.dataclass(frozen=True)
class LiveTarget:
    """Holds the frozen target on the devices of the training."""

    target: TargetModel
    tapped_layers: tuple[int, ...]
    runtime: Runtime
    distils: bool = False  # whether the loss needs the target's final hidden states

    def complete(self, batch: Mapping[str, Any]) -> dict[str, Array]:
        """Returns the fields of a `TrainBatch` that the target computes from its tokens."""
        token_ids = batch["token_ids"]
        if self.runtime.mesh is not None:  # the same devices in another order of axes
            token_ids = jax.device_put(token_ids, NamedSharding(self.runtime.mesh, ROWS))
        features, hidden = self._program(self.target, token_ids)
        return {"features": features} | ({"teacher_hidden": hidden} if self.distils else {})

    def with_features(self, sequences: Sequence[CachedSequence]) -> list[CachedSequence]:
        """Returns sequences that were stored without features, with theirs."""
        texts = [one.token_ids.tolist() for one in sequences]
        found = dict(capture.capture(self.target, self.tapped_layers, texts, runtime=self.runtime))
        return [dataclasses.replace(one, features=found[index].features) for index, one in enumerate(sequences)]

    @functools.cached_property
    def _program(self) -> Callable[..., tuple[Array, Array]]:
        return capture.feature_program(self.target, self.tapped_layers, runtime=self.runtime)
