"""What transformers makes of a draft's config.json, before and after it saves it itself.

    transformers_config.py --draft DIRECTORY --saved DIRECTORY

Prints one JSON line: the version, and for both the values under the names that this version gives them.
"""

import argparse
import json
from pathlib import Path

import transformers
from transformers import AutoConfig

KEPT = (
    "block_size num_target_layers target_hidden_size is_causal dflash_config layer_types head_dim attention_bias"
).split()


def rope_of(config) -> dict:
    """theta and scaling: `rope_parameters` from version 5 on, two attributes before."""
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None or transformers.__version__.startswith("4."):
        parameters = {**(config.rope_scaling or {"rope_type": "default"}), "rope_theta": config.rope_theta}
    return parameters


def told(directory: Path) -> dict:
    """What a reader of this version sees."""
    config = AutoConfig.from_pretrained(directory)
    kept = {name: getattr(config, name) for name in KEPT}
    return {"class": type(config).__name__, "rope": rope_of(config), **kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draft", type=Path, required=True)
    parser.add_argument("--saved", type=Path, required=True)
    arguments = parser.parse_args()
    AutoConfig.from_pretrained(arguments.draft).save_pretrained(arguments.saved)
    found = {"opened": told(arguments.draft), "reopened": told(arguments.saved)}
    print(json.dumps({"version": transformers.__version__, **found}))


if __name__ == "__main__":
    main()
