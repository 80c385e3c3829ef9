"""Writes a DFlash draft checkpoint with random weights, names as the published package has them.

The config file is copied as it is: transformers would rewrite its RoPE entries.
"""

import argparse
import shutil
from pathlib import Path

from checkpoints import DTYPES, read_config
from dflash.model import DFlashDraftModel
from random_weights import redraw
from safetensors.torch import save_file
from transformers import Qwen3Config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    arguments = parser.parse_args()

    model = DFlashDraftModel(Qwen3Config.from_dict(read_config(arguments.config, "qwen3"))).float()
    redraw(model, arguments.seed)
    tensors = model.to(DTYPES[arguments.dtype]).state_dict()
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, arguments.out / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(arguments.config, arguments.out / "config.json")


if __name__ == "__main__":
    main()
