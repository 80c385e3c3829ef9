"""A mesh with named axes, and what a program that runs on one shard of it must know.

`data` splits the rows of a batch, `expert` the experts, `tensor` the units inside an expert; attention heads and
the vocabulary are split over `expert` and `tensor` together. Programs are written for one shard (`jax.shard_map`)
and name every exchange between shards, so that nothing is gathered that they do not gather.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

DATA, EXPERT, TENSOR = "data", "expert", "tensor"
MODEL = (EXPERT, TENSOR)  # the axes that split one copy of the model


@dataclasses.dataclass(frozen=True)
class AxisShards:
    """Holds how a dimension is split over mesh axes, as one shard sees it; unless `is_split`, exchanges do nothing."""

    axes: tuple[str, ...]
    is_split: bool

    def offset(self, num_local: int) -> Int[Array, ""] | int:
        """Returns the index of this shard's first element where every shard has `num_local`."""
        return jax.lax.axis_index(self.axes) * num_local if self.is_split else 0

    def sum(self, partial: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Returns the sum over the shards."""
        return jax.lax.psum(partial, self.axes) if self.is_split else partial

    def max(self, values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Returns the largest over the shards."""
        return jax.lax.pmax(values, self.axes) if self.is_split else values

    def argmax(self, values: Float[Array, "*batch local"]) -> tuple[Float[Array, "*batch"], Int[Array, "*batch"]]:
        """Returns the largest value along the split last axis and its index, the first of equals."""
        indices = jnp.argmax(values, axis=-1).astype(jnp.int32)
        largest = jnp.take_along_axis(values, indices[..., None], axis=-1)[..., 0]
        if not self.is_split:
            return largest, indices
        largest, indices = jax.lax.all_gather((largest, indices + self.offset(values.shape[-1])), self.axes)
        best = jnp.argmax(largest, axis=0)[None]
        return largest.max(axis=0), jnp.take_along_axis(indices, best, axis=0)[0]

    def take_partial(
        self, values: Float[Array, "*batch local"], indices: Int[Array, "*batch"]
    ) -> Float[Array, "*batch"]:
        """Returns the values at indices of the split last axis on the shard that has them, zero on the others."""
        local = indices - self.offset(values.shape[-1])
        is_local = (local >= 0) & (local < values.shape[-1])
        taken = jnp.take_along_axis(values, jnp.where(is_local, local, 0)[..., None], axis=-1)[..., 0]
        return jnp.where(is_local, taken, 0)

    def take(self, values: Float[Array, "*batch local"], indices: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
        """Returns the values at indices of the split last axis, on every shard."""
        return self.sum(self.take_partial(values, indices))

    def rows(self, table: Float[Array, "local width"], indices: Int[Array, "*batch"]) -> Float[Array, "*batch width"]:
        """Returns the rows of a table split by rows on the shard that has them, zeros on the others."""
        local = indices - self.offset(table.shape[0])
        is_local = (local >= 0) & (local < table.shape[0])
        return jnp.where(is_local[..., None], table[jnp.where(is_local, local, 0)], 0)


@dataclasses.dataclass(frozen=True)
class Shards:
    """Holds the number of shards along each mesh axis; with one shard, every exchange is the identity."""

    data: int = 1
    expert: int = 1
    tensor: int = 1

    @property
    def model(self) -> int:
        """The number of shards that hold one copy of the model between them."""
        return self.expert * self.tensor

    @property
    def is_split(self) -> bool:
        """Whether there is more than one shard."""
        return self.data * self.model > 1

    def over(self, *axes: str) -> AxisShards:
        """Returns a dimension that is split over these axes, or over those of the model when none is named."""
        return AxisShards(axes or MODEL, self.is_split)

    def sum(self, partial: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Returns the sum over the shards of the model."""
        return self.over().sum(partial)

    def argmax(self, values: Float[Array, "*batch local"]) -> Int[Array, "*batch"]:
        """Returns the index of the largest value along a last axis split over the model, the first of equals."""
        return self.over().argmax(values)[1]

    def largest(
        self, values: Float[Array, "*batch local"], count: int
    ) -> tuple[Float[Array, "*batch count"], Int[Array, "*batch count"]]:
        """Returns the largest values along a last axis split over the model, in order, and their indices."""
        best, indices = jax.lax.top_k(values, count)
        indices = indices.astype(jnp.int32) + self.over().offset(values.shape[-1])
        if not self.is_split:
            return best, indices
        axis = values.ndim - 1
        best, indices = (jax.lax.all_gather(one, MODEL, axis=axis, tiled=True) for one in (best, indices))
        best, order = jax.lax.top_k(best, count)
        return best, jnp.take_along_axis(indices, order, axis=-1)

    def on_first_shard(self, axis: str | tuple[str, ...], values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Returns `values` on the first shard along axes and zeros on the others, for what a sum must count once."""
        return jnp.where(jax.lax.axis_index(axis) == 0, values, 0) if self.is_split else values

    def all_rows(self, rows: Array) -> Array:
        """Returns rows split over `data`, whole on every shard."""
        return jax.lax.all_gather(rows, DATA, tiled=True) if self.is_split else rows


UNSHARDED = Shards()
