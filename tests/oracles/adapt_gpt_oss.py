"""Writes a PEFT adapter with random matrices for a GPT-OSS checkpoint, and the logits of the adapted model, in float32.

    adapt_gpt_oss.py --model DIRECTORY --settings FILE --seed N --out DIRECTORY --inputs FILE --outputs FILE

`settings` are the arguments of peft's LoraConfig. The adapter is not merged for the logits.

in:  input_ids [B, T]
out: logits [B, T, V]
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from checkpoints import load_target
from peft import LoraConfig, get_peft_model

DEVIATION = 0.12  # of both matrices: far beyond rounding, and no larger than what it changes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "settings", "out", "inputs", "outputs"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    arguments = parser.parse_args()
    model = get_peft_model(load_target(arguments.model), LoraConfig(**json.loads(arguments.settings.read_text())))
    generator = torch.Generator().manual_seed(arguments.seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                noise = DEVIATION * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise if "lora_" in name else parameter + noise)
    model.eval().save_pretrained(arguments.out)
    input_ids = torch.from_numpy(np.load(arguments.inputs)["input_ids"]).long()
    with torch.inference_mode():
        logits = model(input_ids=input_ids, use_cache=False).logits
    np.savez(arguments.outputs, logits=logits.numpy())


if __name__ == "__main__":
    main()
