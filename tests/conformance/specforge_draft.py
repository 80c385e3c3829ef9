"""What SpecForge's draft class makes of a draft, in float32.

    specforge_draft.py --draft DIRECTORY --inputs IN.npz --outputs OUT.npz

in:  features [T, L*D], noise_embedding [K, D]
out: hidden [K, D], the block at positions T..T+K-1 after the final norm

Prints one JSON line: missing and unexpected tensors, and the values that its trainer reads of the config.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from specforge.modeling.draft.dflash import DFlashDraftModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draft", type=Path, required=True)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--outputs", type=Path, required=True)
    arguments = parser.parse_args()

    model, report = DFlashDraftModel.from_pretrained(
        arguments.draft, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    inputs = np.load(arguments.inputs)
    features, embeddings = (torch.from_numpy(inputs[name])[None] for name in ("features", "noise_embedding"))
    positions = torch.arange(features.shape[1] + embeddings.shape[1])[None]
    with torch.inference_mode():
        hidden = model.eval()(position_ids=positions, noise_embedding=embeddings, target_hidden=features)
    np.savez(arguments.outputs, hidden=hidden[0].numpy())
    told = {
        "missing": sorted(map(str, report["missing_keys"])),
        "unexpected": sorted(map(str, report["unexpected_keys"])),
        "mismatched": sorted(map(str, report["mismatched_keys"])),
        "block_size": model.block_size,
        "target_layer_ids": list(model.target_layer_ids),
        "mask_token_id": model.mask_token_id,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
