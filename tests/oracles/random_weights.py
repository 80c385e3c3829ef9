"""Random weights large enough that an error in any tensor moves outputs far beyond rounding."""

import math

import torch
from torch import nn

LINEAR_GAIN = 1.0
ROUTER_GAIN = 4.0  # decisive: at a near tie between experts the output would jump with rounding
HEAD_GAIN = 2.0  # the head follows a norm, so this is the standard deviation of the logits
BIAS_DEVIATION = 0.3


def redraw(model: nn.Module, seed: int) -> None:
    """Overwrites every parameter, in the order of names; ValueError on a name without a rule."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        mean, deviation = _distribution(name, parameter)
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        with torch.no_grad():
            parameter.copy_(mean + deviation * noise)


def _distribution(name: str, parameter: nn.Parameter) -> tuple[float, float]:
    """Mean and standard deviation of one parameter."""
    leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if name.endswith(".bias") or leaf.endswith("_proj_bias"):
        return 0.0, BIAS_DEVIATION
    if leaf.endswith("norm"):
        return 1.0, 0.2
    if leaf in ("sinks", "embed_tokens"):
        return 0.0, 1.0
    if parameter.ndim == 3:  # experts are [expert, in, out]
        return 0.0, LINEAR_GAIN / math.sqrt(parameter.shape[1])
    if parameter.ndim == 2:  # linear layers are [out, in]
        gain = {"router": ROUTER_GAIN, "lm_head": HEAD_GAIN}.get(leaf, LINEAR_GAIN)
        return 0.0, gain / math.sqrt(parameter.shape[1])
    raise ValueError(f"no rule to draw {name} of shape {tuple(parameter.shape)}")
