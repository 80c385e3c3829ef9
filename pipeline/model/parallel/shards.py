"""One mesh with named axes, and what a program must know that runs on one shard of it.

`data` splits the rows of a batch, `expert` the experts, `tensor` the units inside an expert; attention heads and
the vocabulary are split over `expert` and `tensor` together. Programs are written for one shard (`jax.shard_map`)
and say themselves where shards exchange something, so that nothing is gathered that they do not gather.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

DATA, EXPERT, TENSOR = "data", "expert", "tensor"
MODEL = (EXPERT, TENSOR)  # the shards that hold one copy of the model between them


@dataclasses.dataclass(frozen=True)
class Shards:
    """How many shards a program is split into along each axis; alone, every exchange is the identity."""

    data: int = 1
    expert: int = 1
    tensor: int = 1

    @property
    def model(self) -> int:
        """Shards that hold one copy of the model between them."""
        return self.expert * self.tensor

    @property
    def split(self) -> bool:
        """Whether there is more than one shard."""
        return self.data * self.model > 1

    def sum(self, partial: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The sum over the shards of the model."""
        return jax.lax.psum(partial, MODEL) if self.split else partial

    def first(self, axes: str | tuple[str, ...], size: int) -> Int[Array, ""] | int:
        """The number of this shard's first part where `axes` split something into parts of `size`."""
        return jax.lax.axis_index(axes) * size if self.split else 0

    def once(self, axes: str | tuple[str, ...], values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """`values` on the first shard along `axes`, zeros on the others: what a sum must count once."""
        return jnp.where(jax.lax.axis_index(axes) == 0, values, 0) if self.split else values

    def argmax(self, values: Float[Array, "*batch local"]) -> Int[Array, "*batch"]:
        """Where the largest value is when the last axis is split over the shards of the model; the first if equal."""
        local = jnp.argmax(values, axis=-1).astype(jnp.int32)
        if not self.split:
            return local
        largest = jnp.take_along_axis(values, local[..., None], axis=-1)[..., 0]
        largest, places = jax.lax.all_gather((largest, local + self.first(MODEL, values.shape[-1])), MODEL)
        return jnp.take_along_axis(places, jnp.argmax(largest, axis=0)[None], axis=0)[0]

    def max(self, values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The largest over the shards of the model."""
        return jax.lax.pmax(values, MODEL) if self.split else values

    def two_best(self, values: Float[Array, "*batch local"]) -> Float[Array, "*batch two"]:
        """The two largest values when the last axis is split over the shards of the model."""
        best, _ = jax.lax.top_k(values, 2)
        if not self.split:
            return best
        everyones = jax.lax.all_gather(best, MODEL, axis=best.ndim - 1, tiled=True)
        return jax.lax.top_k(everyones, 2)[0]

    def at(self, values: Float[Array, "*batch local"], places: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
        """The values at places of the last axis, which is split over the shards of the model."""
        num_local = values.shape[-1]
        local = places - self.first(MODEL, num_local)
        here = (local >= 0) & (local < num_local)
        found = jnp.take_along_axis(values, jnp.where(here, local, 0)[..., None], axis=-1)[..., 0]
        return self.sum(jnp.where(here, found, 0))

    def all_rows(self, rows: Array) -> Array:
        """Rows split over `data`, whole on every shard."""
        return jax.lax.all_gather(rows, DATA, tiled=True) if self.split else rows


ALONE = Shards()
