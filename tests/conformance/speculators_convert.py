"""What speculators' converter makes of a draft, opened again by speculators.

    speculators_convert.py --draft DIRECTORY --target DIRECTORY --converted DIRECTORY

Prints one JSON line: the converted config, and which of the draft's tensors the converted model has bit for bit.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from speculators.convert.dflash.converter import DFlashConverter
from speculators.models.dflash import DFlashDraftModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draft", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--converted", type=Path, required=True)
    arguments = parser.parse_args()

    DFlashConverter().convert(arguments.draft, arguments.converted, base_model=str(arguments.target))
    model = DFlashDraftModel.from_pretrained(str(arguments.converted))
    config, state = model.config, model.state_dict()
    given = load_file(arguments.draft / "model.safetensors")
    equal = [name for name, tensor in given.items() if torch.equal(state[name].to(tensor.dtype), tensor)]
    layers = config.transformer_layer_config
    told = {
        "aux_hidden_state_layer_ids": config.aux_hidden_state_layer_ids,
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "speculative_tokens": config.speculators_config.proposal_methods[0].speculative_tokens,
        "rope": layers.rope_parameters,
        "draft_vocab_size": config.draft_vocab_size,
        "num_tensors": len(given),
        "equal": equal,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
