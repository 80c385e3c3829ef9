"""The target's embedding and head in training: split by vocabulary over the devices that hold one copy of the draft.

A table of GPT-OSS has 201,088 rows, 1.2 GB in bfloat16. Neither is ever gathered: hidden states of blocks are
sent to the vocabulary's devices instead, and the results are summed where the states came from. That exchanges less
than the table as long as a step drafts fewer tokens than the vocabulary has.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from pipeline.model.layers.linear import Matrix, TransposedMatrix
from pipeline.model.layers.pytree import pytree_dataclass
from pipeline.model.parallel.shards import AxisShards

ROW_AXES = ("dp", "fsdp")  # axes of EasyDeL's mesh that the rows of a batch are split over
VOCAB_AXES = ("fsdp", "ep", "tp", "sp")  # those that the vocabulary is split over: all but copies of the whole
SHARED_AXIS = "fsdp"  # over which both are
ROWS_SPEC = PartitionSpec(ROW_AXES)
EMBEDDING_SPEC = PartitionSpec(VOCAB_AXES, None)


@pytree_dataclass(static=("vocab_size", "mesh"))
class FrozenTables:
    """The target's embedding and head, which the draft borrows; with a `mesh`, as `shard_tables` sharded them."""

    embedding: Float[Array, "V D"]
    head: Matrix
    vocab_size: int
    mesh: Mesh | None = None

    @property
    def is_split(self) -> bool:
        """Returns whether there is more than one device to split the tables over."""
        return self.mesh is not None and self.mesh.size > 1


@dataclasses.dataclass(frozen=True)
class VocabShard:
    """One device's share of a vocabulary of `size` tokens, all of it when not `is_split`.

    Methods are called on one device's values (in `jax.shard_map`): those of tokens whose rows are where they came from
    ("rows"), or on every device that holds a share of one copy of the vocabulary ("tokens").
    """

    size: int
    is_split: bool = False

    @property
    def axis(self) -> AxisShards:
        """Returns the axes that the vocabulary is split over."""
        return AxisShards(VOCAB_AXES, self.is_split)

    def all_gather(self, rows: Shaped[Array, "rows ..."]) -> Shaped[Array, "tokens ..."]:
        """Returns the tokens of all devices that share out the vocabulary."""
        return jax.lax.all_gather(rows, SHARED_AXIS, tiled=True) if self.is_split else rows

    def reduce_scatter(self, partial: Float[Array, "tokens ..."]) -> Float[Array, "rows ..."]:
        """Returns the sum over the vocabulary's devices, each token's where it came from."""
        if not self.is_split:
            return partial
        rows = jax.lax.psum_scatter(partial, SHARED_AXIS, tiled=True)
        return jax.lax.psum(rows, [axis for axis in VOCAB_AXES if axis != SHARED_AXIS])

    def local_rows(self, tokens: Shaped[Array, "tokens ..."], num_rows: int) -> Shaped[Array, "rows ..."]:
        """Returns, of what every device has of all tokens, the part for those that came from this device."""
        if not self.is_split:
            return tokens
        return jax.lax.dynamic_slice_in_dim(tokens, jax.lax.axis_index(SHARED_AXIS) * num_rows, num_rows)

    def mask_padding(self, logits: Float[Array, "tokens local"]) -> Float[Array, "tokens local"]:
        """Returns logits with minus infinity for the rows that pad a table to equal shares."""
        num_local = logits.shape[-1]
        if not self.is_split or num_local * jax.lax.axis_size(VOCAB_AXES) == self.size:
            return logits
        return jnp.where(self.axis.offset(num_local) + jnp.arange(num_local) < self.size, logits, -jnp.inf)


def num_vocab_shards(mesh: Mesh) -> int:
    """Returns how many devices share out the vocabulary."""
    shares = 1
    for axis in VOCAB_AXES:
        shares *= mesh.shape[axis]
    return shares


def num_row_shards(mesh: Mesh | None) -> int:
    """Returns how many devices share out the rows of a batch."""
    return 1 if mesh is None else mesh.shape["dp"] * mesh.shape["fsdp"]


def table_spec(table: Matrix) -> PartitionSpec:
    """Returns the partition of an embedding or a head stored as [V, D], or of a head [D, V] that is not transposed."""
    return EMBEDDING_SPEC if isinstance(table, TransposedMatrix) else PartitionSpec(None, VOCAB_AXES)


def table_shardings(head: Matrix, mesh: Mesh) -> tuple[NamedSharding, NamedSharding]:
    """Returns the shardings of embedding and head."""
    return NamedSharding(mesh, EMBEDDING_SPEC), NamedSharding(mesh, table_spec(head))


def shard_tables(embedding: Float[Array, "V D"], head: Matrix, mesh: Mesh) -> FrozenTables:
    """Returns embedding and head on the devices of a mesh, padded with rows of zeros to equal shares."""
    vocab_size = embedding.shape[0]
    missing = -vocab_size % num_vocab_shards(mesh)
    shardings = table_shardings(head, mesh)

    def sharded(table: Array, axis: int, sharding: NamedSharding) -> Array:
        whole = np.asarray(table)  # every host has all of it, and gives its devices their parts
        padding = [(0, missing if axis == dimension else 0) for dimension in range(2)]
        return jax.device_put(np.pad(whole, padding) if missing else whole, sharding)

    first = sharded(embedding, 0, shardings[0])
    if isinstance(head, TransposedMatrix):
        last: Matrix = TransposedMatrix(sharded(head.array, 0, shardings[1]))
    else:
        last = sharded(head, 1, shardings[1])
    return FrozenTables(first, last, vocab_size, mesh)


def embed_tokens(tables: FrozenTables, token_ids: Int[Array, "B some"]) -> Float[Array, "B some D"]:
    """Returns the embedding's rows of tokens."""
    if not tables.is_split:
        return tables.embedding[token_ids]
    shard = VocabShard(tables.vocab_size, is_split=True)

    def local(table: Float[Array, "local D"], ids: Int[Array, "rows some"]) -> Float[Array, "rows some D"]:
        found = shard.axis.rows(table, shard.all_gather(ids))
        return shard.reduce_scatter(found)  # exact in any precision: one device has the row, the others zeros

    specs = (EMBEDDING_SPEC, ROWS_SPEC)
    spread = jax.shard_map(local, mesh=tables.mesh, in_specs=specs, out_specs=ROWS_SPEC, check_vma=False)
    return spread(tables.embedding, token_ids)
