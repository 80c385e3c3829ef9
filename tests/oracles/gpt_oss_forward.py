"""Logits and layer outputs of a GPT-OSS checkpoint, uncached, in float32.

in:  input_ids [B, T]
out: logits [B, T, V]; features [layers, B, T, D], entry i the output of decoder layer i, the last
     one too before the final norm; experts [layers, B, T, k], those that each layer's router chooses
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from checkpoints import load_target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--outputs", type=Path, required=True)
    arguments = parser.parse_args()

    model = load_target(arguments.model)
    input_ids = torch.from_numpy(np.load(arguments.inputs)["input_ids"]).long()
    logits, features, experts = forward(model, input_ids)
    np.savez(arguments.outputs, logits=logits.numpy(), features=features.numpy(), experts=experts.numpy())


@torch.inference_mode()
def forward(model: torch.nn.Module, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, features and experts, the features checked against transformers' `hidden_states[i + 1]`."""
    captured: list[torch.Tensor] = []
    experts: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _layer, _inputs, out: captured.append(out.clone()))
        router = getattr(layer.mlp, "router", None)  # a dense model has none
        if router is not None:
            router.register_forward_hook(lambda _router, _inputs, out: experts.append(out[2].clone()))
    output = model(input_ids, use_cache=False, output_hidden_states=True)

    # The last entry transformers reports is the one after the final norm.
    expected = [*captured[:-1], model.model.norm(captured[-1])]
    for i, (ours, theirs) in enumerate(zip(expected, output.hidden_states[1:], strict=True)):
        if not torch.equal(ours, theirs):
            raise RuntimeError(f"the hook on layer {i} differs from hidden_states[{i + 1}]")
    chosen = torch.stack([one.reshape(*input_ids.shape, -1) for one in experts]) if experts else torch.zeros(0)
    return output.logits, torch.stack(captured), chosen


if __name__ == "__main__":
    main()
