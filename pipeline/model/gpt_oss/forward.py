"""GPT-OSS: one forward function for prefill, decode, verify, capture and training.

Shape letters, those of docs/conventions.md: B rows, T positions, R cache rows, S entries, N query heads, G key/value
heads, H head width, D model width, L tapped layers, V vocabulary, and W the part of it that a shard has.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.experts import mixture, route
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.gpt_oss.weights import GptOssWeights, LayerWeights
from pipeline.model.layers import attention, kv_pages
from pipeline.model.layers.kv_pages import PagedCache, PagedLayer, PageTables
from pipeline.model.layers.linear import linear, linear_over_shards, product, rms_norm
from pipeline.model.layers.pytree import pytree_dataclass
from pipeline.model.layers.rope import angles, rotate
from pipeline.model.parallel.execution import DEFAULT_EXECUTION, Execution
from pipeline.model.parallel.shards import Shards


@pytree_dataclass()
class Output:
    """Holds the results of one pass: normed final hidden states, L tapped features side by side, the written cache."""

    hidden: Float[Array, "B T D"]
    features: Float[Array, "B T LD"]
    cache: PagedCache | None


def empty_cache(
    config: GptOssConfig, num_pages: int, num_sliding_pages: int, page_size: int, dtype: DTypeLike
) -> PagedCache:
    """Returns an empty cache: every layer has pages of its own, and sliding ones as many as `num_sliding_pages`."""
    counts = [num_sliding_pages if sliding else num_pages for sliding in config.sliding]
    heads, width = config.num_key_value_heads, config.head_dim
    return PagedCache(tuple(kv_pages.empty(count, heads, page_size, width, dtype) for count in counts))


def forward(
    target: TargetModel,
    token_ids: Int[Array, "B T"],
    start: Int[Array, " B"],
    cache: PagedCache | None,
    tapped_layers: Sequence[int] = (),
    *,
    tables: PageTables | None = None,
    num_tokens: Int[Array, " B"] | None = None,
    execution: Execution = DEFAULT_EXECUTION,
) -> Output:
    """Runs T tokens of each of B rows, the first one at position `start`, over what the cache holds before them.

    Prefill, single steps, blocks to verify and full sequences are all this call. Without a cache `start` must be 0;
    with one, `tables` has the pages of the rows, also of the positions that the tokens are written to. Features are
    the outputs of `tapped_layers` before the final norm (`hidden_states[i + 1]` in transformers), concatenated in
    that order. `num_tokens` are the tokens of each row that are not padding on the right, None for all.
    """
    passed = list(_layers(target, token_ids, start, cache, tables, num_tokens, execution))
    hidden = passed[-1].hidden
    taps = [passed[index].hidden for index in tapped_layers]
    features = jnp.concatenate(taps, axis=-1) if taps else hidden[..., :0]
    normed = rms_norm(hidden, target.weights.norm, target.config.rms_norm_eps)
    written = tuple(one.written for one in passed if one.written is not None)
    return Output(normed, features, None if cache is None else PagedCache(written))


def chosen_experts(
    target: TargetModel, token_ids: Int[Array, "B T"], *, execution: Execution = DEFAULT_EXECUTION
) -> Int[Array, "B T L k"]:
    """Returns which experts each of the L layers chooses for each token of full sequences, the best one first."""
    start, k = jnp.zeros(token_ids.shape[0], jnp.int32), target.config.num_experts_per_tok
    passed = _layers(target, token_ids, start, None, None, None, execution)
    pairs = zip(passed, target.weights.layers, strict=True)
    found = [route(one.experts_inputs, layer.experts, k)[1] for one, layer in pairs]
    return jnp.stack(found, axis=1).reshape(*token_ids.shape, len(found), k)


def embed(weights: GptOssWeights, token_ids: Int[Array, "*batch"], shards: Shards) -> Float[Array, "*batch D"]:
    """Returns the tokens' rows [*batch, D] of the embedding, which may be split over the vocabulary."""
    if not shards.is_split:
        return weights.embedding[token_ids]
    return shards.sum(shards.over().rows(weights.embedding, token_ids))


def logits(weights: GptOssWeights, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
    """Returns next-token logits of normed final hidden states, float32 [*batch, V]; on a shard, [*batch, W]."""
    return product(hidden, weights.head)


def next_tokens(weights: GptOssWeights, hidden: Float[Array, "*batch D"], shards: Shards) -> Int[Array, "*batch"]:
    """Returns the most likely next token [*batch] of each position."""
    return shards.argmax(logits(weights, hidden))


class _Call(NamedTuple):
    """Holds where the tokens of one call to `forward` are in the cache, and their rotary angles."""

    start: Int[Array, " B"]
    tables: PageTables | None
    num_tokens: Int[Array, " B"] | None
    cos_sin: tuple[Array, Array]


class _Passed(NamedTuple):
    """Holds what a layer gives: hidden states, what its experts were fed, and the part of the cache that it wrote."""

    hidden: Float[Array, "B T D"]
    experts_inputs: Float[Array, "M D"]
    written: PagedLayer | None


def _layers(
    target: TargetModel,
    token_ids: Int[Array, "B T"],
    start: Int[Array, " B"],
    cache: PagedCache | None,
    tables: PageTables | None,
    num_tokens: Int[Array, " B"] | None,
    execution: Execution,
) -> Iterator[_Passed]:
    """Yields what each layer gives, in order; arguments are those of `forward`."""
    config, weights = target.config, target.weights
    positions = start[:, None] + jnp.arange(token_ids.shape[1])
    call = _Call(start, tables, num_tokens, angles(config.rope, config.head_dim, positions))
    hidden = embed(weights, token_ids, execution.shards)
    for index, layer in enumerate(weights.layers):
        window = config.sliding_window if config.sliding[index] else None
        cached = None if cache is None else cache.layers[index]
        attended, written = _attention(hidden, layer, config, window, call, cached, execution)
        hidden = hidden + attended
        flat = rms_norm(hidden, layer.experts_norm, config.rms_norm_eps).reshape(-1, config.hidden_size)
        mixed = mixture(flat, layer.experts, config.num_experts_per_tok, config.swiglu_limit, execution)
        hidden = hidden + mixed.reshape(hidden.shape)
        yield _Passed(hidden, flat, written)


def _attention(
    hidden: Float[Array, "B T D"],
    layer: LayerWeights,
    config: GptOssConfig,
    window: int | None,
    call: _Call,
    cached: PagedLayer | None,
    execution: Execution,
) -> tuple[Float[Array, "B T D"], PagedLayer | None]:
    start, tables, num_tokens, cos_sin = call
    split = (*hidden.shape[:2], -1, config.head_dim)  # on a shard: its heads
    normed = rms_norm(hidden, layer.input_norm, config.rms_norm_eps)
    queries = rotate(linear(normed, layer.query, layer.query_bias).reshape(split), *cos_sin)
    keys = rotate(linear(normed, layer.key, layer.key_bias).reshape(split), *cos_sin)
    values = linear(normed, layer.value, layer.value_bias).reshape(split)
    parts = [attention.over_own(queries, keys, values, window, execution=execution)]
    if cached is not None:
        assert tables is not None, "a cache has tables"
        table = tables.whole if window is None else tables.sliding
        # read after it is written, a cache is written in place: XLA would copy one that it must keep for reading
        cached = kv_pages.write(cached, keys, values, table, start, num_tokens, execution=execution)
        parts.append(attention.over_cache(queries, cached, table, start, window, execution=execution))
    attended = attention.union(parts, layer.sinks).astype(hidden.dtype).reshape(*hidden.shape[:2], -1)
    return linear_over_shards(attended, layer.output, layer.output_bias, execution.shards), cached
