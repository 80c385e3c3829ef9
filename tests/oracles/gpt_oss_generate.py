"""Greedy continuations by a GPT-OSS checkpoint, one prompt at a time, with transformers' cache.

in:  {"prompts": [[id, ...], ...], "max_new_tokens": n, "stop_token_ids": [id, ...]}
out: {"outputs": [{"tokens": [id, ...], "gaps": [float, ...]}, ...]}; a stop token ends the tokens
     and is among them; gap = best minus second-best logit, which tells a tie from an error
"""

import argparse
import json
from pathlib import Path

import torch
from checkpoints import load_target
from transformers import DynamicCache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--outputs", type=Path, required=True)
    arguments = parser.parse_args()

    model = load_target(arguments.model)
    request = json.loads(arguments.inputs.read_text())
    stop_token_ids = set(request["stop_token_ids"])
    outputs = [generate(model, prompt, request["max_new_tokens"], stop_token_ids) for prompt in request["prompts"]]
    arguments.outputs.write_text(json.dumps({"outputs": outputs}))


@torch.inference_mode()
def generate(
    model: torch.nn.Module, prompt: list[int], max_new_tokens: int, stop_token_ids: set[int]
) -> dict[str, list]:
    """Generated ids alone, with the gap of each."""
    cache = DynamicCache(config=model.config)
    tokens: list[int] = []
    gaps: list[float] = []
    pending = prompt
    while len(tokens) < max_new_tokens and not (tokens and tokens[-1] in stop_token_ids):
        output = model(torch.tensor([pending]), past_key_values=cache, use_cache=True)
        logits = output.logits[0, -1]
        best = logits.topk(2).values
        tokens.append(int(logits.argmax()))
        gaps.append(float(best[0] - best[1]))
        pending = tokens[-1:]
    return {"tokens": tokens, "gaps": gaps}


if __name__ == "__main__":
    main()
