"""GPT-OSS's mixture of experts: router, clamped SwiGLU, and a grouped product over the experts that tokens chose.

D is the model's width, F an expert's, E the number of experts; F is split over the mesh's axis "tensor".
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt_oss_sglang_jax.checkpoint import Checkpoint, bias_reader, expert_reader, placed

SWIGLU_ALPHA = 1.702
SPECS = {  # of each parameter, in the order in which `_mixture` takes them
    "router": P(None, None),
    "router_bias": P(None),
    "gate": P(None, None, "tensor"),
    "gate_bias": P(None, "tensor"),
    "up": P(None, None, "tensor"),
    "up_bias": P(None, "tensor"),
    "down": P(None, "tensor", None),
    "down_bias": P(None, None),
}
TOKENS = P("data", None)
Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class GptOssExperts(nnx.Module):
    """Holds the router and the experts of one layer."""

    def __init__(self, config, mesh: Mesh, dtype: jnp.dtype) -> None:
        width, inner, count = config.hidden_size, config.intermediate_size, config.num_local_experts
        if inner % mesh.shape["tensor"]:
            raise ValueError(f"intermediate_size {inner} cannot be split over {mesh.shape['tensor']} devices")
        shapes = {
            "router": (width, count),
            "router_bias": (count,),
            "gate": (count, width, inner),
            "gate_bias": (count, inner),
            "up": (count, width, inner),
            "up_bias": (count, inner),
            "down": (count, inner, width),
            "down_bias": (count, width),
        }
        for name, shape in shapes.items():
            setattr(self, name, nnx.Param(jnp.zeros(shape, dtype, out_sharding=SPECS[name])))
        self._mesh, self._dtype = mesh, dtype
        self._top = config.num_experts_per_tok
        self._limit = float(getattr(config, "swiglu_limit", 7.0))
        on_tpu = mesh.devices.flat[0].platform == "tpu"
        self._product: Product = _engines_product if on_tpu else jax.lax.ragged_dot

    def load(self, checkpoint: Checkpoint, prefix: str) -> None:
        """Reads the layer `prefix` (model.layers.N.mlp); packed experts are unpacked."""
        router = checkpoint.tensor(f"{prefix}.router.weight")
        router_bias = checkpoint.tensor(f"{prefix}.router.bias")
        readers = {"router": lambda index: router.T[index], "router_bias": lambda index: router_bias[index]}
        for part, width in (("gate", self.gate.shape[1]), ("up", self.up.shape[1]), ("down", self.down.shape[1])):
            readers[part] = expert_reader(checkpoint, f"{prefix}.experts", part, width)
            readers[f"{part}_bias"] = bias_reader(checkpoint, f"{prefix}.experts", part)
        for name, read in readers.items():
            parameter = getattr(self, name)
            sharding = NamedSharding(self._mesh, SPECS[name])
            parameter.value = placed(parameter.shape, np.dtype(self._dtype), sharding, read)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Returns the sum [tokens, D] of each token's experts by their shares."""
        mixture = functools.partial(_mixture, product=self._product, top=self._top, limit=self._limit)
        run = jax.shard_map(mixture, in_specs=(TOKENS, *SPECS.values()), out_specs=TOKENS, check_vma=False)
        return run(hidden, *(getattr(self, name).value for name in SPECS))


def _mixture(hidden: jax.Array, *parameters: jax.Array, product: Product, top: int, limit: float) -> jax.Array:
    """Runs one device's tokens through its part of every expert, and sums the parts."""
    router, router_bias, gate, gate_bias, up, up_bias, down, down_bias = parameters
    logits = jnp.dot(hidden, router, preferred_element_type=jnp.float32) + router_bias
    best, chosen = jax.lax.top_k(logits, top)
    shares = jax.nn.softmax(best, axis=-1)
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    expert, rows = flat[order], hidden[order // top]
    sizes = jnp.bincount(flat, length=router.shape[1]).astype(jnp.int32)
    gated = jnp.minimum(product(rows, gate, sizes) + gate_bias[expert], limit)
    raised = jnp.clip(product(rows, up, sizes) + up_bias[expert], -limit, limit)
    inner = (raised + 1) * gated * jax.nn.sigmoid(SWIGLU_ALPHA * gated)
    outputs = product(inner.astype(hidden.dtype), down, sizes)
    is_first = jax.lax.axis_index("tensor") == 0  # the others would add the bias again
    outputs += jnp.where(is_first, down_bias[expert], 0)
    back = outputs[jnp.argsort(order, stable=True)].reshape(*chosen.shape, -1)
    summed = jnp.einsum("mkd,mk->md", back.astype(jnp.float32), shares)
    return jax.lax.psum(summed, "tensor").astype(hidden.dtype)


def _engines_product(rows: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    """Multiplies groups of rows with the engine's own kernel for TPUs."""
    from sgl_jax.srt.kernels.gmm.megablox_gmm_backend import gmm

    return gmm(rows, matrices, sizes, preferred_element_type=rows.dtype, interpret=False, acc_dtype=jnp.float32)
