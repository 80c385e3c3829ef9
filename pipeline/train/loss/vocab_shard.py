"""The target's two ends in training: tables split by words over the devices that hold one copy of the draft.

A table of GPT-OSS has 201,088 rows, 1.2 GB in bfloat16. Neither is ever gathered: tokens travel to the words instead,
in blocks' hidden states, and what all devices found for them is summed where the tokens came from. That exchanges
less than the table as long as a step has fewer drafted slots than the vocabulary has words.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from pipeline.model.linear import Kernel, Transposed

ROWS = ("dp", "fsdp")  # axes of EasyDeL's mesh that the rows of a batch are split over
WORDS = ("fsdp", "ep", "tp", "sp")  # those that the vocabulary is split over: all but copies of the whole
BOTH = "fsdp"
ROWS_SPEC = PartitionSpec(ROWS)


@dataclasses.dataclass(frozen=True)
class Words:
    """The share of the vocabulary's `size` words that one device has; when not `split`, all of them.

    Methods are called on one device's values (in `jax.shard_map`), those of tokens whose rows lie where they came
    from ("rows") or everywhere that words of one copy do ("tokens").
    """

    size: int
    split: bool = False

    def gathered(self, rows: Shaped[Array, "rows ..."]) -> Shaped[Array, "tokens ..."]:
        """The tokens of all devices that share out the words."""
        return jax.lax.all_gather(rows, BOTH, tiled=True) if self.split else rows

    def returned(self, partial: Float[Array, "tokens ..."]) -> Float[Array, "rows ..."]:
        """The sum over the words' devices, each token's where it came from."""
        if not self.split:
            return partial
        rows = jax.lax.psum_scatter(partial, BOTH, tiled=True)
        return jax.lax.psum(rows, [axis for axis in WORDS if axis != BOTH])

    def own(self, tokens: Shaped[Array, "tokens ..."], num_rows: int) -> Shaped[Array, "rows ..."]:
        """Of what every device knows of all tokens, the part for those that came from here."""
        if not self.split:
            return tokens
        return jax.lax.dynamic_slice_in_dim(tokens, jax.lax.axis_index(BOTH) * num_rows, num_rows)

    def sum(self, partial: Float[Array, "..."]) -> Float[Array, "..."]:
        """The sum over the words' devices."""
        return jax.lax.psum(partial, WORDS) if self.split else partial

    def first(self, num_local: int) -> Int[Array, ""] | int:
        """The first of this device's `num_local` words."""
        return jax.lax.axis_index(WORDS) * num_local if self.split else 0

    def real(self, logits: Float[Array, "tokens local"]) -> Float[Array, "tokens local"]:
        """Logits of words that there are; a table is padded so that devices have equal shares."""
        num_local = logits.shape[-1]
        if not self.split or num_local * jax.lax.axis_size(WORDS) == self.size:
            return logits
        return jnp.where(self.first(num_local) + jnp.arange(num_local) < self.size, logits, -jnp.inf)

    def best(self, logits: Float[Array, "tokens local"]) -> tuple[Float[Array, " tokens"], Int[Array, " tokens"]]:
        """The largest logit of each token, and its word; the first if equal."""
        words = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        largest = jnp.take_along_axis(logits, words[:, None], axis=-1)[:, 0]
        if not self.split:
            return largest, words
        largest, words = jax.lax.all_gather((largest, words + self.first(logits.shape[-1])), WORDS)
        best = jnp.argmax(largest, axis=0)[None]
        return largest.max(axis=0), jnp.take_along_axis(words, best, axis=0)[0]

    def at(self, values: Float[Array, "tokens local"], words: Int[Array, " tokens"]) -> Float[Array, " tokens"]:
        """This device's part of the values at a word of each token: zero on those that do not have it."""
        local = words - self.first(values.shape[-1])
        here = (local >= 0) & (local < values.shape[-1])
        found = jnp.take_along_axis(values, jnp.where(here, local, 0)[:, None], axis=-1)[:, 0]
        return jnp.where(here, found, 0)


def is_split(mesh: Mesh | None) -> bool:
    """Whether there is more than one device to share something out to."""
    return mesh is not None and mesh.size > 1


def num_shares(mesh: Mesh) -> int:
    """How many devices share out the words."""
    shares = 1
    for axis in WORDS:
        shares *= mesh.shape[axis]
    return shares


def num_row_shares(mesh: Mesh | None) -> int:
    """How many devices share out the rows of a batch."""
    return 1 if mesh is None else mesh.shape["dp"] * mesh.shape["fsdp"]


def table_spec(table: Kernel) -> PartitionSpec:
    """How an embedding or a head that lies [V, D] is split, or a head [D, V] that is no `Transposed`."""
    return PartitionSpec(WORDS, None) if isinstance(table, Transposed) else PartitionSpec(None, WORDS)


def places(head: Kernel, mesh: Mesh) -> tuple[NamedSharding, NamedSharding]:
    """Where embedding and head lie."""
    return NamedSharding(mesh, PartitionSpec(WORDS, None)), NamedSharding(mesh, table_spec(head))


def share_out(embedding: Float[Array, "V D"], head: Kernel, mesh: Mesh) -> tuple[Float[Array, "W D"], Kernel]:
    """Embedding and head on the devices of a mesh, padded with words of zeros to equal shares."""
    missing = -embedding.shape[0] % num_shares(mesh)
    at = places(head, mesh)

    def placed(table: Array, words: int, place: NamedSharding) -> Array:
        whole = np.asarray(table)  # every host has all of it, and gives its devices their parts
        padding = [(0, missing if axis == words else 0) for axis in range(2)]
        return jax.device_put(np.pad(whole, padding) if missing else whole, place)

    if isinstance(head, Transposed):
        return placed(embedding, 0, at[0]), Transposed(placed(head.array, 0, at[1]))
    return placed(embedding, 0, at[0]), placed(head, 1, at[1])


def embed(
    embedding: Float[Array, "V D"], token_ids: Int[Array, "B some"], mesh: Mesh | None = None
) -> Float[Array, "B some D"]:
    """The rows of tokens; with a mesh, of an embedding that `share_out` placed."""
    if not is_split(mesh):
        return embedding[token_ids]
    words = Words(embedding.shape[0], split=True)

    def local(table: Float[Array, "local D"], ids: Int[Array, "rows some"]) -> Float[Array, "rows some D"]:
        places = words.gathered(ids) - words.first(len(table))
        here = (places >= 0) & (places < len(table))
        found = jnp.where(here[..., None], table[jnp.where(here, places, 0)], 0)
        return words.returned(found)  # exact in any precision: one device has the row, the others zeros

    specs = (PartitionSpec(WORDS, None), ROWS_SPEC)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=ROWS_SPEC, check_vma=False)(embedding, token_ids)
