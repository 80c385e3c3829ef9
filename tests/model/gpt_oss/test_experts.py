"""Every way to run the experts, against a loop over tokens and experts in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.model.gpt_oss import experts
from pipeline.model.gpt_oss.experts import ExpertsWeights, FusedExpertWeights
from pipeline.model.layers import mxfp4
from pipeline.model.layers.linear import TransposedMatrix
from pipeline.model.layers.mxfp4 import Packed
from pipeline.model.parallel.execution import Execution, KernelBackend

pytestmark = pytest.mark.usefixtures("compiled_quickly")

LIMIT = 2.0  # low, so that both clamps are at work
WIDTH, ROWS = 96, 64  # multiples of 32, which packed ones are padded from
PADDED_WIDTH, PADDED_ROWS = 128, 128
CASES = {"7 experts, 2 a token": (7, 2), "9 experts, 4 a token": (9, 4)}
INTERPRETED = Execution(backend=KernelBackend.pallas_interpreted)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer in NumPy: gate, up and down [E, F, D], and what packs to just these values."""

    router: np.ndarray
    router_bias: np.ndarray
    gate: np.ndarray
    gate_bias: np.ndarray
    up: np.ndarray
    up_bias: np.ndarray
    down: np.ndarray
    down_bias: np.ndarray
    packed: dict[str, Packed]
    per_token: int

    def __getitem__(self, name):
        return getattr(self, name)


def codes_and_scales(random, shape, axis):
    """Random codes, one a value, and scales, one for 32 along `axis`."""
    groups = list(shape)
    groups[axis] //= 32
    return random.integers(0, 16, shape, dtype=np.uint8), random.integers(122, 126, tuple(groups), dtype=np.uint8)


def values_of(codes, scales, axis):
    """The formats' definitions, one sign, exponent and mantissa at a time (OCP Microscaling 1.0, 5.3.3 and 5.4.1)."""
    sign, exponent, mantissa = 1 - 2.0 * (codes >> 3), (codes >> 1) & 3, codes & 1
    magnitude = np.where(exponent == 0, mantissa * 0.5, 2.0 ** (exponent - 1.0) * (1 + mantissa / 2))
    return (sign * magnitude * 2.0 ** (np.repeat(scales, 32, axis=axis) - 127.0)).astype(np.float32)


def packed_of(codes, scales, rows, width):
    """Codes [E, N, K] as files have them, a byte for two, in our words and scales."""
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).reshape(*scales.shape, 16)
    made = mxfp4.words_of(blocks, scales, rows, width), mxfp4.scales_of(scales, rows, width)
    return Packed(*map(jnp.asarray, made))


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def layer(request):
    num_experts, per_token = request.param
    random = np.random.default_rng(0)
    found, packed = {}, {}
    for name, axis in (("gate", 2), ("up", 2), ("down", 1)):
        codes, scales = codes_and_scales(random, (num_experts, ROWS, WIDTH), axis)
        found[name] = values_of(codes, scales, axis)
        if name == "down":
            files = np.swapaxes(codes, 1, 2), np.swapaxes(scales, 1, 2)
            packed[name] = packed_of(*files, PADDED_ROWS, WIDTH)
        else:
            packed[name] = packed_of(codes, scales, PADDED_WIDTH, PADDED_ROWS)
    shapes = {
        "router": (WIDTH, num_experts),
        "router_bias": (num_experts,),
        "gate_bias": (num_experts, ROWS),
        "up_bias": (num_experts, ROWS),
        "down_bias": (num_experts, WIDTH),
    }
    # coarse numbers, which bfloat16 holds exactly
    drawn = {name: (random.integers(-8, 9, shape) / 4).astype(np.float32) for name, shape in shapes.items()}
    return Layer(**found, **drawn, packed=packed, per_token=per_token)


def apart(layer, dtype):
    names = ("router", "router_bias", "gate", "gate_bias", "up", "up_bias", "down", "down_bias")
    return ExpertsWeights(**{name: jnp.asarray(layer[name], dtype) for name in names})


def packed(layer, dtype):
    unused = [(0, 0), (0, PADDED_ROWS - ROWS)]
    biases = {name: jnp.asarray(np.pad(layer[name], unused), dtype) for name in ("gate_bias", "up_bias")}
    return dataclasses.replace(apart(layer, dtype), **layer.packed, **biases)


def wide(layer, dtype):
    kernels = {"gate": rows(layer.gate).T, "up": rows(layer.up).T, "down": rows(layer.down), "router": layer.router}
    lying = {name: jnp.asarray(kernel, dtype) for name, kernel in kernels.items()}
    if dtype == jnp.bfloat16:
        lying = {name: TransposedMatrix(kernel.T) for name, kernel in lying.items()}
    flat = {name: layer[name].reshape(-1) for name in ("gate_bias", "up_bias")}
    biases = {name: layer[name] for name in ("router_bias", "down_bias")} | flat
    return FusedExpertWeights(**lying, **{name: jnp.asarray(bias, dtype) for name, bias in biases.items()})


def rows(matrices):
    return matrices.reshape(-1, matrices.shape[-1])


def inputs_of(num_tokens, seed):
    random = np.random.default_rng(seed)
    return (random.integers(-16, 17, (num_tokens, WIDTH)) / 8).astype(np.float32)


def loop(inputs, layer):
    """One token and one expert at a time, from the formulas of the model card."""
    outputs = np.zeros_like(inputs)
    for token, output in zip(inputs, outputs, strict=True):
        logits = token @ layer.router + layer.router_bias
        chosen = np.argsort(-logits, kind="stable")[: layer.per_token]
        share = np.exp(logits[chosen] - logits[chosen].max())
        for expert, weight in zip(chosen, share / share.sum(), strict=True):
            gate = np.minimum(layer.gate[expert] @ token + layer.gate_bias[expert], LIMIT)
            up = np.clip(layer.up[expert] @ token + layer.up_bias[expert], -LIMIT, LIMIT)
            hidden = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
            output += weight * (hidden @ layer.down[expert] + layer.down_bias[expert])
    return outputs


WAYS = {
    "wide": (wide, jnp.float32, Execution()),
    "wide, transposed": (wide, jnp.bfloat16, Execution()),
    "apart, few": (apart, jnp.float32, Execution(max_per_expert_tokens=99)),
    "apart, grouped": (apart, jnp.float32, Execution(max_per_expert_tokens=0)),
    "packed, few": (packed, jnp.float32, Execution(max_per_expert_tokens=99)),
    "packed, grouped": (packed, jnp.float32, Execution(max_per_expert_tokens=0)),
    "apart, few, Pallas": (apart, jnp.bfloat16, dataclasses.replace(INTERPRETED, max_per_expert_tokens=99)),
    "apart, grouped, Pallas": (apart, jnp.bfloat16, dataclasses.replace(INTERPRETED, max_per_expert_tokens=0)),
    "packed, few, Pallas": (packed, jnp.bfloat16, dataclasses.replace(INTERPRETED, max_per_expert_tokens=99)),
    "packed, grouped, Pallas": (packed, jnp.bfloat16, dataclasses.replace(INTERPRETED, max_per_expert_tokens=0)),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_every_way_equals_a_loop_over_tokens_and_experts(layer, way):
    held, dtype, execution = way
    for num_tokens in (1, 23):
        inputs = inputs_of(num_tokens, seed=num_tokens)
        mixture = jax.jit(experts.mixture, static_argnums=(2, 3, 4))
        outputs = mixture(jnp.asarray(inputs, dtype), held(layer, dtype), layer.per_token, LIMIT, execution)
        expected = loop(inputs, layer)
        assert outputs.dtype == dtype
        # bfloat16 keeps 8 bits of the hidden values and of the outputs
        bound = 1e-4 if dtype == jnp.float32 else 2**-6 * np.abs(expected).max()
        np.testing.assert_allclose(outputs.astype(jnp.float32), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("held", [apart, packed])
@pytest.mark.parametrize("execution", [Execution(max_per_expert_tokens=99), INTERPRETED], ids=["XLA", "Pallas"])
def test_an_expert_that_no_token_chose_is_not_read(layer, held, execution):
    """What is read, even to be multiplied by zero, would carry its nan into the sum."""
    inputs = jnp.asarray(inputs_of(2, seed=1), jnp.bfloat16)
    whole = held(layer, jnp.bfloat16)
    _, indices = experts.route(inputs, whole, layer.per_token)
    others = np.setdiff1d(np.arange(len(layer.down)), np.asarray(indices))
    assert len(others)

    def poisoned(array):
        if array.dtype == jnp.int32:
            return array.at[others].set(-1)  # any codes: no word is not a number
        return array.at[others].set(255 if array.dtype == jnp.uint8 else jnp.nan)  # a scale that makes one

    names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
    bad = {name: jax.tree.map(poisoned, getattr(whole, name)) for name in names}
    outputs = [
        experts.mixture(inputs, weights, layer.per_token, LIMIT, execution)
        for weights in (whole, dataclasses.replace(whole, **bad))
    ]
    np.testing.assert_array_equal(*outputs)


def test_hits_are_the_chosen_experts_once_each():
    indices = jnp.asarray([[4, 1], [1, 6], [9, 4]])
    found = experts.hits(indices, 0, 10)
    assert found.num_hit == 4
    assert found.experts.tolist() == [1, 4, 6, 9, 9, 9]
    of_second_shard = experts.hits(indices, 5, 5)
    assert of_second_shard.num_hit == 2
    assert of_second_shard.experts.tolist() == [1, 4, 4, 4, 4]


def test_shares_are_what_tokens_take_of_each_expert():
    indices = jnp.asarray([[4, 1], [1, 6], [9, 4]])
    shares = jnp.asarray([[0.75, 0.25], [0.5, 0.5], [0.125, 0.875]])
    np.testing.assert_array_equal(
        experts.share_of_experts(shares, indices, 4, 6),
        [[0.75, 0, 0, 0, 0, 0], [0, 0, 0.5, 0, 0, 0], [0.875, 0, 0, 0, 0, 0.125]],
    )


def every_code_and_scale(num_groups):
    """Codes [1, 3, 32 * num_groups] in which every byte is, and scales of every size."""
    codes = np.random.default_rng(2).integers(0, 16, (1, 3, 32 * num_groups), dtype=np.uint8)
    codes[0, 0, :512] = np.arange(256).repeat(2)
    codes[0, 0, :512:2] &= 15
    codes[0, 0, 1:512:2] >>= 4
    scales = np.random.default_rng(3).integers(2, 253, (1, 3, num_groups), dtype=np.uint8)
    scales[0, 1, :2] = 2, 252
    return codes, scales


@pytest.mark.parametrize("num_groups", [16, 17])
def test_unpacked_values_are_those_of_the_format(num_groups):
    codes, scales = every_code_and_scale(num_groups)
    rows = mxfp4.padded(32 * num_groups)
    found = mxfp4.unpack(packed_of(codes, scales, rows, 5), jnp.float32)
    assert found.shape == (1, rows, 5)
    wanted = np.zeros(found.shape, np.float32)
    wanted[:, : 32 * num_groups, :3] = np.swapaxes(values_of(codes, scales, 2), 1, 2)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(mxfp4.unpack(packed_of(codes, scales, rows, 5), jnp.bfloat16), wanted)


def test_values_of_the_smallest_scale_become_zero():
    codes, scales = np.full((1, 2, 64), 7, np.uint8), np.array([[[0, 127], [127, 0]]], np.uint8)
    found = mxfp4.unpack(packed_of(codes, scales, 64, 2), jnp.float32)
    np.testing.assert_array_equal(found[0, :, 0], [0] * 32 + [6] * 32)
    np.testing.assert_array_equal(found[0, :, 1], [6] * 32 + [0] * 32)


def test_expanding_on_the_host_gives_the_same_values():
    codes, scales = every_code_and_scale(16)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).reshape(*scales.shape, 16)
    found = mxfp4.dequantised(blocks, scales, np.float32)
    np.testing.assert_array_equal(found, values_of(codes, scales, 2))
