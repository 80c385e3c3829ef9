"""The target over finished texts: the features of its tapped layers, and its own choice at every position."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from pipeline.engine import token_choice
from pipeline.model import placement
from pipeline.model.gpt_oss import forward as gpt_oss
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.layers.sampling import Sampling
from pipeline.model.parallel.execution import Execution
from pipeline.model.parallel.runtime import SINGLE_DEVICE, Runtime

BATCH_SEQUENCES = 8
LOGITS_TOKENS = 512  # logits are computed for this many tokens at a time: all at once outgrow the features


@dataclasses.dataclass(frozen=True)
class Captured:
    """Holds the results of one pass over a text.

    `features` are bfloat16 [T, LD]. `next_ids[p]` is the target's own choice for position p + 1, and `shortfall[p]`
    how far the logit of the text's token there lies below it (0: they agree; the last one has no meaning). For a text
    drawn with a known key, the choice is that of the same noise, and logits include the noise. For a text drawn with an
    unknown key, `shortfall` is the token's surprise (-log p) less the mean surprise of what the target draws, in nats:
    its mean over a text is about 0 where the target drew it, and higher where another model did.
    """

    features: np.ndarray
    next_ids: Int[np.ndarray, " T"]
    shortfall: Float[np.ndarray, " T"]


@dataclasses.dataclass(frozen=True)
class Disagreement:
    """Holds a generated token that the teacher-forced pass would not have chosen, and its shortfall."""

    position: int
    found_id: int
    wanted_id: int
    gap: float


def capture(
    target: TargetModel,
    tapped_layers: tuple[int, ...],
    texts: Sequence[Sequence[int]],
    *,
    sampling: Sampling | None = None,
    keys: Sequence[tuple[int, int]] | None = None,
    runtime: Runtime = SINGLE_DEVICE,
) -> Iterator[tuple[int, Captured]]:
    """Runs texts through the target in a few fixed shapes; yields the index and the result of each text, once.

    Texts are grouped by padded length; the order and every batch follow from the lengths alone. `sampling` tells how
    the texts were drawn (None: greedily), `keys` with which noise, where that is known. With a mesh, weights must be
    sharded as `placement.target_shardings` says.
    """
    specs = None if runtime.mesh is None else placement.target_specs(target)
    program = _program(tapped_layers, sampling, keys is not None, runtime, specs)
    running: tuple[list[int], tuple[Array, Array, Array]] | None = None
    for indices, length in batches([len(text) for text in texts]):
        token_ids = np.zeros((BATCH_SEQUENCES, length), np.int32)
        for row, index in enumerate(indices):
            token_ids[row, : len(texts[index])] = texts[index]
        batch_keys = None if keys is None else _key_rows(keys, indices)
        started = program(target, token_ids, batch_keys)
        if running is not None:  # the device works on the next batch while the host takes this one
            yield from _unpack(*running, texts)
        running = (indices, started)
    if running is not None:
        yield from _unpack(*running, texts)


def feature_program(
    target: TargetModel, tapped_layers: tuple[int, ...], *, runtime: Runtime = SINGLE_DEVICE
) -> Callable[[TargetModel, Int[np.ndarray, "B T"]], tuple[Array, Array]]:
    """Returns `features_of` as a program for a runtime, which training with the live target runs.

    It takes token ids [B, T] and returns features, bfloat16 [B, T, LD], and the normed final hidden states [B, T, D].
    """
    step = functools.partial(features_of, tapped_layers=tapped_layers, execution=runtime.execution)
    specs = None if runtime.mesh is None else placement.target_specs(target)
    return placement.jit_sharded(step, runtime.mesh, (specs, placement.ROWS), placement.ROWS)


def features_of(
    target: TargetModel,
    token_ids: Int[Array, "B T"],
    *,
    tapped_layers: tuple[int, ...],
    execution: Execution,
) -> tuple[Array, Float[Array, "B T D"]]:
    """Returns the features of rows of tokens, bfloat16 [B, T, LD], and the normed final hidden states [B, T, D]."""
    start = jnp.zeros(token_ids.shape[0], jnp.int32)
    out = gpt_oss.forward(target, token_ids, start, None, tapped_layers, execution=execution)
    return out.features.astype(jnp.bfloat16), out.hidden


def disagreements(captured: Captured, token_ids: Sequence[int], prompt_tokens: int) -> list[Disagreement]:
    """Returns every generated token that is not the pass's own choice; equal logits are no disagreement."""
    generated = np.arange(prompt_tokens, len(token_ids))
    positions = generated[captured.shortfall[generated - 1] > 0]
    return [
        Disagreement(int(p), int(token_ids[p]), int(captured.next_ids[p - 1]), float(captured.shortfall[p - 1]))
        for p in positions
    ]


def padded_text_length(num_tokens: int) -> int:
    """Returns the length that a text is padded to, a multiple of 64, or of 512 above 512, so that programs are few."""
    step = 64 if num_tokens <= 512 else 512
    return -(-num_tokens // step) * step


def batches(num_tokens: Sequence[int]) -> Iterator[tuple[list[int], int]]:
    """Yields the indices of the texts of each batch, and the length that they are padded to."""
    groups: dict[int, list[int]] = collections.defaultdict(list)
    for index, count in enumerate(num_tokens):
        groups[padded_text_length(count)].append(index)
    for length, indices in sorted(groups.items()):
        for first in range(0, len(indices), BATCH_SEQUENCES):
            yield indices[first : first + BATCH_SEQUENCES], length


def _unpack(
    indices: list[int], outputs: tuple[Array, Array, Array], texts: Sequence[Sequence[int]]
) -> Iterator[tuple[int, Captured]]:
    features, next_ids, shortfall = jax.device_get(outputs)
    for row, index in enumerate(indices):
        count = len(texts[index])
        yield index, Captured(features[row, :count], next_ids[row, :count], shortfall[row, :count])


def _key_rows(keys: Sequence[tuple[int, int]], indices: Sequence[int]) -> UInt32[np.ndarray, "B two"]:
    rows = np.zeros((BATCH_SEQUENCES, 2), np.uint32)
    rows[: len(indices)] = [keys[index] for index in indices]
    return rows


@functools.cache
def _program(
    tapped_layers: tuple[int, ...],
    sampling: Sampling | None,
    has_keys: bool,
    runtime: Runtime,
    specs: TargetModel | None,
) -> Callable[..., tuple[Array, Array, Array]]:
    step = functools.partial(_pass, tapped_layers=tapped_layers, sampling=sampling, execution=runtime.execution)
    in_specs = (specs, placement.ROWS, placement.ROWS if has_keys else None)
    return placement.jit_sharded(step, runtime.mesh, in_specs, placement.ROWS)


def _pass(
    target: TargetModel,
    token_ids: Int[Array, "B T"],
    keys: UInt32[Array, "B two"] | None,
    *,
    tapped_layers: tuple[int, ...],
    sampling: Sampling | None,
    execution: Execution,
) -> tuple[Float[Array, "B T LD"], Int[Array, "B T"], Float[Array, "B T"]]:
    features, final = features_of(target, token_ids, tapped_layers=tapped_layers, execution=execution)
    weights = target.weights

    def choose(part: tuple[Array, Array, Array | None, Array]) -> tuple[Array, Array]:
        hidden, following, keys, positions = part
        logits = gpt_oss.logits(weights, hidden)
        precision = weights.embedding.dtype.name
        return token_choice.choice(logits, following, keys, positions, sampling, precision, execution.shards)

    size = math.gcd(LOGITS_TOKENS, token_ids.size)
    following = jnp.roll(token_ids, -1, axis=1).reshape(-1, size)
    hidden = final.reshape(*following.shape, target.config.hidden_size)
    positions = jnp.broadcast_to(jnp.arange(1, token_ids.shape[1] + 1), token_ids.shape).reshape(following.shape)
    if keys is not None:
        keys = jnp.repeat(keys, token_ids.shape[1], axis=0).reshape(*following.shape, 2)
    next_ids, shortfall = jax.lax.map(choose, (hidden, following, keys, positions))
    return features, next_ids.reshape(token_ids.shape), shortfall.reshape(token_ids.shape)
