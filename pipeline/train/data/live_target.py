"""Features from the frozen target inside the training job: the cache then holds tokens alone.

What a token's features are is `teacher_cache.capture`'s to say, for stored and for live ones.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding
from jaxtyping import Array

from pipeline.machine import Machine
from pipeline.model.gpt_oss_config import GptOssConfig
from pipeline.model.gpt_oss_weights import GptOssWeights
from pipeline.model.placement import ROWS
from pipeline.teacher_cache import capture
from pipeline.teacher_cache.store import CachedSequence


@dataclasses.dataclass(frozen=True)
class LiveTarget:
    """The frozen target on the devices of the training."""

    weights: GptOssWeights
    config: GptOssConfig
    tapped_layers: tuple[int, ...]
    here: Machine
    distils: bool = False  # whether the loss asks for the target's final hidden states

    def complete(self, batch: Mapping[str, Any]) -> dict[str, Array]:
        """The fields of a `loss.Batch` that the target makes of its tokens."""
        token_ids = batch["token_ids"]
        if self.here.mesh is not None:  # the same devices in another order of axes
            token_ids = jax.device_put(token_ids, NamedSharding(self.here.mesh, ROWS))
        features, hidden = self._program(self.weights, token_ids)
        return {"features": features} | ({"teacher_hidden": hidden} if self.distils else {})

    def filled(self, sequences: Sequence[CachedSequence]) -> list[CachedSequence]:
        """Sequences that were stored without features, with theirs."""
        texts = [one.token_ids.tolist() for one in sequences]
        run, mesh = self.here.run, self.here.mesh
        found = dict(capture.capture(self.weights, self.config, self.tapped_layers, texts, run=run, mesh=mesh))
        return [dataclasses.replace(one, features=found[index].features) for index, one in enumerate(sequences)]

    @functools.cached_property
    def _program(self) -> Callable[..., tuple[Array, Array]]:
        run, mesh = self.here.run, self.here.mesh
        return capture.feature_program(self.weights, self.config, self.tapped_layers, run=run, mesh=mesh)
