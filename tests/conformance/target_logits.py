"""What transformers makes of a target's directory: its RoPE, and the logits of a batch, in float32.

    target_logits.py --target DIRECTORY --inputs FILE --outputs FILE

in:  input_ids [B, T]
out: logits [B, T, V]

Prints one JSON line: the version, and the RoPE under the names that version 5 gives it.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import GptOssForCausalLM
from transformers_config import rope_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--outputs", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    older = transformers.__version__.startswith("4.")
    eager = {} if older else {"experts_implementation": "eager"}
    model, report = GptOssForCausalLM.from_pretrained(
        arguments.target, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **eager
    )
    if any(report.values()):
        raise ValueError(f"{arguments.target}: {report}")
    for layer in model.model.layers:  # both versions have 7.0 in their code
        layer.mlp.experts.limit = getattr(model.config, "swiglu_limit", None) or layer.mlp.experts.limit
    with torch.inference_mode():
        logits = model.float().eval()(torch.from_numpy(np.load(arguments.inputs)["input_ids"]).long()).logits
    np.savez(arguments.outputs, logits=logits.numpy())
    print(json.dumps({"version": transformers.__version__, "rope": rope_of(model.config)}))


if __name__ == "__main__":
    main()
