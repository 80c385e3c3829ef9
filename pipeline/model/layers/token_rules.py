"""How each row of a batch chooses its tokens: the most likely one or a drawn one, with penalties, biases and filters.

All rows are computed by one program, whatever they ask for; what no row asks for is skipped when it runs. Logits are
float32 [B, T, W], of T positions that follow each other in each of B rows, and of this shard's part of the vocabulary.

A drawn token is argmax(logits / temperature + noise), and the noise depends on the row's key, the position and the
token alone. So a token that a draft proposes is accepted where it equals the one that the target draws, and the text is
exactly the one that the target writes alone (Daliri et al. 2024, "Coupling without Communication and Drafter-Invariant
Speculative Decoding", where the draft draws with the same noise; here it proposes its most likely token, see
docs/dflash.md#inference-loop).
"""

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from pipeline.model.layers import sampling
from pipeline.model.layers.pytree import pytree_dataclass
from pipeline.model.parallel.shards import Shards

MAX_STOPS = 16  # stop tokens of a row
MAX_BIASES = 300  # tokens with a bias of a row, as many as OpenAI takes
SCORED_AT_ONCE = 16  # positions of a text whose logits are held together
MAX_LOGPROBS = 20  # most likely tokens that are reported with a token
NO_TOKEN = -1  # fills rows of tokens
WORD_BITS = 32  # tokens of a word of a mask, the lowest bit first
Tree = TypeVar("Tree")


@pytree_dataclass()
class TokenRules:
    """Holds how B rows choose their tokens.

    `temperature` 0 takes the most likely token, and `top_k` 0, `top_p` 1 and `min_p` 0 keep all of them. Tokens of
    `stop_ids` end a text, and none is chosen for a position before `least_length`. `num_logprobs` is how many of the
    most likely tokens are reported with each chosen one, -1 for nothing at all.
    """

    temperature: Float[Array, " B"]
    top_p: Float[Array, " B"]
    top_k: Int[Array, " B"]
    min_p: Float[Array, " B"]
    frequency: Float[Array, " B"]
    presence: Float[Array, " B"]
    repetition: Float[Array, " B"]
    keys: UInt32[Array, "B two"]
    stop_ids: Int[Array, "B stops"]
    least_length: Int[Array, " B"]
    bias_ids: Int[Array, "B biases"]
    biases: Float[Array, "B biases"]
    num_logprobs: Int[Array, " B"]

    @property
    def are_penalised(self) -> Bool[Array, " B"]:
        """Which rows have a penalty."""
        return (self.frequency != 0) | (self.presence != 0) | (self.repetition != 1)


@pytree_dataclass()
class TokenHistory:
    """Holds how often each token was generated and which ones the prompt has, right where a row has penalties."""

    generated: Int[Array, "B local"]
    in_prompt: Bool[Array, "B local"]


@pytree_dataclass()
class TokenMasks:
    """Holds which tokens may follow each of T positions, as bits, right where a row is masked; else all may."""

    words: UInt32[Array, "B T words"]
    is_masked: Bool[Array, " B"]


@pytree_dataclass()
class LogProbs:
    """Holds the logarithms of chosen tokens' probabilities, and of the most likely tokens', before any rule."""

    chosen: Float[Array, "B T"]
    top_ids: Int[Array, "B T top"]
    top: Float[Array, "B T top"]


def greedy_rules(num_rows: int) -> TokenRules:
    """Returns rules that take the most likely token and know no stop token."""
    zeros, ones = jnp.zeros(num_rows, jnp.float32), jnp.ones(num_rows, jnp.float32)
    counts = jnp.zeros(num_rows, jnp.int32)
    return TokenRules(
        temperature=zeros,
        top_p=ones,
        top_k=counts,
        min_p=zeros,
        frequency=zeros,
        presence=zeros,
        repetition=ones,
        keys=jnp.zeros((num_rows, 2), jnp.uint32),
        stop_ids=jnp.full((num_rows, MAX_STOPS), NO_TOKEN, jnp.int32),
        least_length=counts,
        bias_ids=jnp.full((num_rows, MAX_BIASES), NO_TOKEN, jnp.int32),
        biases=jnp.zeros((num_rows, MAX_BIASES), jnp.float32),
        num_logprobs=jnp.full(num_rows, -1, jnp.int32),
    )


def num_words(vocab_size: int) -> int:
    """Returns the words of a mask over a vocabulary."""
    return -(-vocab_size // WORD_BITS)


def no_masks(num_rows: int, length: int, vocab_size: int) -> TokenMasks:
    """Returns masks that no row has."""
    return TokenMasks(jnp.zeros((num_rows, length, num_words(vocab_size)), jnp.uint32), jnp.zeros(num_rows, bool))


def rows_of(of_all: Tree, rows: Int[Array, " R"]) -> Tree:
    """Returns some rows of every array of a tree, a history for one; of a row past the last one, any."""
    return jax.tree.map(lambda one: jnp.take(one, rows, axis=0, mode="clip"), of_all)


def choose(
    logits: Float[Array, "B T local"],
    rules: TokenRules,
    history: TokenHistory,
    block: Int[Array, "B T"],
    start: Int[Array, " B"],
    shards: Shards,
    masks: TokenMasks | None = None,
) -> Int[Array, "B T"]:
    """Returns the token behind each of T tokens of a row, `block`, of which the first is at position `start`.

    The first token of a block is in the history already; the others count in what follows them. Masks may be longer
    than the block.
    """
    positions = start[:, None] + 1 + jnp.arange(block.shape[1])
    logits = _adjusted(logits, rules, history, block, positions, shards)
    if masks is not None:
        logits = _changed(logits, [(masks.is_masked.any(), lambda values: _masked(values, masks, shards))])
    return _drawn(logits, rules, positions, shards)


def with_tokens(
    history: TokenHistory,
    rules: TokenRules,
    tokens: Int[Array, "R T"],
    num_tokens: Int[Array, " R"],
    shards: Shards,
    rows: Int[Array, " R"] | None = None,
) -> TokenHistory:
    """Returns the history with the first `num_tokens` of tokens of some rows (None: all), if any has a penalty.

    `rules` are those of the same rows.
    """

    def counted() -> Int[Array, "B local"]:
        local = _local(tokens, history.generated.shape[1], shards)
        local = jnp.where(jnp.arange(tokens.shape[1]) < num_tokens[:, None], local, history.generated.shape[1])
        at = jnp.arange(len(tokens)) if rows is None else rows
        return history.generated.at[at[:, None], local].add(1, mode="drop")

    generated = jax.lax.cond(rules.are_penalised.any(), counted, lambda: history.generated)
    return TokenHistory(generated, history.in_prompt)


def log_probs(
    logits: Float[Array, "B T local"], tokens: Int[Array, "B T"], rules: TokenRules, shards: Shards
) -> LogProbs:
    """Returns the log probabilities of chosen tokens and of the likeliest ones, zeros where no row wants any.

    `logits` are the target's own, to which no rule was applied.
    """
    nothing = _no_log_probs(tokens.shape, logits.shape[-1])
    wanted = (rules.num_logprobs >= 0).any()
    return jax.lax.cond(wanted, lambda: _log_probs(logits, tokens, shards), lambda: nothing)


def text_log_probs(
    logits_of: Callable[[Float[Array, "B T D"]], Float[Array, "B T local"]],
    hidden: Float[Array, "B T D"],
    following: Int[Array, "B T"],
    scored: Bool[Array, " B"],
    shards: Shards,
) -> LogProbs:
    """Returns the log probabilities of the tokens `following` each of T hidden states, zeros where no row is scored.

    Logits are computed for a few positions at a time, because those of a whole text need too much memory.
    """
    num_rows, length, width = hidden.shape
    size = math.gcd(length, SCORED_AT_ONCE)
    num_local = jax.eval_shape(logits_of, hidden[:, :size]).shape[-1]

    def computed() -> LogProbs:
        parts = hidden.reshape(num_rows, -1, size, width), following.reshape(num_rows, -1, size)
        found = jax.lax.map(
            lambda part: _log_probs(logits_of(part[0]), part[1], shards),
            jax.tree.map(lambda one: jnp.moveaxis(one, 1, 0), parts),
        )
        return jax.tree.map(lambda one: jnp.moveaxis(one, 0, 1).reshape(num_rows, length, *one.shape[3:]), found)

    return jax.lax.cond(scored.any(), computed, lambda: _no_log_probs(following.shape, num_local))


def _log_probs(logits: Float[Array, "B T local"], tokens: Int[Array, "B T"], shards: Shards) -> LogProbs:
    peak = shards.over().max(logits.max(axis=-1))
    total = peak + jnp.log(shards.sum(jnp.exp(logits - peak[..., None]).sum(axis=-1)))
    values, ids = shards.largest(logits, min(MAX_LOGPROBS, logits.shape[-1]))
    return LogProbs(shards.over().take(logits, tokens) - total, ids, values - total[..., None])


def _no_log_probs(shape: tuple[int, ...], num_local: int) -> LogProbs:
    several = (*shape, min(MAX_LOGPROBS, num_local))
    return LogProbs(jnp.zeros(shape, jnp.float32), jnp.zeros(several, jnp.int32), jnp.zeros(several, jnp.float32))


def _drawn(
    logits: Float[Array, "B T local"], rules: TokenRules, positions: Int[Array, "B T"], shards: Shards
) -> Int[Array, "B T"]:
    """Returns each row's token: the most likely one, or one that is drawn among those that its filters keep."""
    likeliest = shards.argmax(logits)
    num_positions = logits.shape[1]

    def drawn() -> Int[Array, "B T"]:
        is_drawn = rules.temperature > 0
        temperature, top_p, top_k, min_p, keys = (
            jnp.repeat(one, num_positions, axis=0)
            for one in (rules.temperature, rules.top_p, rules.top_k, rules.min_p, rules.keys)
        )
        flat = logits.reshape(-1, logits.shape[-1])
        scaled = flat / jnp.where(temperature > 0, temperature, 1)[:, None]
        allowed = _allowed(scaled, top_p, top_k, min_p, shards)
        noisy = scaled + sampling.noise(keys, positions.reshape(-1), flat.shape[-1], shards)
        found = shards.argmax(jnp.where(allowed, noisy, -jnp.inf)).reshape(positions.shape)
        return jnp.where(is_drawn[:, None], found, likeliest)

    return jax.lax.cond((rules.temperature > 0).any(), drawn, lambda: likeliest)


def _allowed(
    scaled: Float[Array, "M local"],
    top_p: Float[Array, " M"],
    top_k: Int[Array, " M"],
    min_p: Float[Array, " M"],
    shards: Shards,
) -> Bool[Array, "M local"]:
    """Returns which tokens may be drawn: by `min_p` first, then the `top_k` likeliest, then `top_p` of these."""

    def least_likely(allowed: Bool[Array, "M local"]) -> Bool[Array, "M local"]:
        best = shards.over().max(scaled.max(axis=-1))
        return allowed & (scaled >= (best + jnp.log(min_p))[:, None])  # log(0) keeps all

    def most_likely(allowed: Bool[Array, "M local"]) -> Bool[Array, "M local"]:
        found = sampling.likeliest(jnp.where(allowed, scaled, -jnp.inf), top_k, shards)
        return allowed & (found | (top_k <= 0)[:, None])

    def in_nucleus(allowed: Bool[Array, "M local"]) -> Bool[Array, "M local"]:
        return allowed & sampling.nucleus(jnp.where(allowed, scaled, -jnp.inf), top_p, shards)

    wanted = ((min_p > 0).any(), least_likely), ((top_k > 0).any(), most_likely), ((top_p < 1).any(), in_nucleus)
    return _changed(jnp.ones(scaled.shape, bool), wanted)


def _adjusted(
    logits: Float[Array, "B T local"],
    rules: TokenRules,
    history: TokenHistory,
    block: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    shards: Shards,
) -> Float[Array, "B T local"]:
    """Returns the logits with penalties, biases, and without stop tokens where these are too early."""
    num_local = logits.shape[-1]
    rows = jnp.arange(len(block))[:, None]

    def penalised(values: Float[Array, "B T local"]) -> Float[Array, "B T local"]:
        local = _local(block, num_local, shards)
        in_block = (local[..., None] == jnp.arange(num_local)) & (jnp.arange(block.shape[1]) > 0)[:, None]
        counts = history.generated[:, None] + jnp.cumsum(in_block, axis=1)
        is_seen = history.in_prompt[:, None] | (counts > 0)
        repetition, frequency, presence = (
            one[:, None, None] for one in (rules.repetition, rules.frequency, rules.presence)
        )
        repeated = jnp.where(values > 0, values / repetition, values * repetition)
        values = jnp.where(is_seen, repeated, values)
        return values - frequency * counts - presence * (counts > 0)

    def biased(values: Float[Array, "B T local"]) -> Float[Array, "B T local"]:
        local = _local(rules.bias_ids, num_local, shards)
        return values + jnp.zeros_like(values[:, 0]).at[rows, local].add(rules.biases, mode="drop")[:, None]

    def unfinished(values: Float[Array, "B T local"]) -> Float[Array, "B T local"]:
        local = _local(rules.stop_ids, num_local, shards)
        is_stop = jnp.zeros(values[:, 0].shape, bool).at[rows, local].set(True, mode="drop")
        is_early = positions < rules.least_length[:, None]
        return jnp.where(is_stop[:, None] & is_early[..., None], -jnp.inf, values)

    wanted = (
        (rules.are_penalised.any(), penalised),
        ((rules.bias_ids != NO_TOKEN).any(), biased),
        ((positions < rules.least_length[:, None]).any(), unfinished),
    )
    return _changed(logits, wanted)


def _masked(values: Float[Array, "B T local"], masks: TokenMasks, shards: Shards) -> Float[Array, "B T local"]:
    """Returns the logits without the tokens that the rows' masks rule out."""
    num_rows, length, num_local = values.shape
    bits = (masks.words[:, :length, :, None] >> jnp.arange(WORD_BITS, dtype=jnp.uint32)) & 1
    bits = bits.reshape(num_rows, length, -1)
    local = jax.lax.dynamic_slice_in_dim(bits, shards.over().offset(num_local), num_local, axis=-1)
    return jnp.where((local == 1) | ~masks.is_masked[:, None, None], values, -jnp.inf)


def _changed(values: Array, changes: Iterable[tuple[Bool[Array, ""], Callable[[Array], Array]]]) -> Array:
    """Returns the values after those changes that any row asks for, one after another; the others are skipped."""
    for is_wanted, change in changes:
        values = jax.lax.cond(is_wanted, change, lambda same: same, values)
    return values


def _local(token_ids: Int[Array, "*shape"], num_local: int, shards: Shards) -> Int[Array, "*shape"]:
    """Returns the indices of tokens in this shard's part of the vocabulary, `num_local` for tokens elsewhere."""
    local = token_ids - shards.over().offset(num_local)
    return jnp.where((token_ids >= 0) & (local >= 0) & (local < num_local), local, num_local)
