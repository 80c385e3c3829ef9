"""Logits of a Llama in a GGUF file, uncached, in float32.

in:  input_ids [B, T]
out: logits [B, T, V]
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from checkpoints import load_llama


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--outputs", type=Path, required=True)
    arguments = parser.parse_args()

    model = load_llama(arguments.gguf)
    input_ids = torch.from_numpy(np.load(arguments.inputs)["input_ids"]).long()
    with torch.inference_mode():
        logits = model(input_ids, use_cache=False).logits
    np.savez(arguments.outputs, logits=logits.numpy())


if __name__ == "__main__":
    main()
