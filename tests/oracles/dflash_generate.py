"""Greedy speculative decoding by the published package, with transformers' GPT-OSS, in float32.

in:  {"prompts": [[id, ...], ...], "max_new_tokens": n, "stop_token_ids": [id, ...]}
out: {"outputs": [{"tokens": [id, ...], "acceptance_lengths": [n, ...]}, ...]}; a stop token ends
     the tokens and is among them. Each round's length counts the bonus token and is cut at a stop
     token or the limit; the prefill gives the first token, so the lengths sum to len(tokens) - 1.
"""

import argparse
import json
import time
from pathlib import Path

import dflash.model
import torch
from checkpoints import load_draft, load_target
from torch.nn.attention import SDPBackend, sdpa_kernel

# The package asks CUDA for the time whenever it returns statistics.
dflash.model._cuda_time = time.perf_counter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--draft", type=Path, required=True)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--outputs", type=Path, required=True)
    arguments = parser.parse_args()

    target, draft = load_target(arguments.target), load_draft(arguments.draft)
    request = json.loads(arguments.inputs.read_text())
    outputs = [
        generate(target, draft, prompt, request["max_new_tokens"], request["stop_token_ids"])
        for prompt in request["prompts"]
    ]
    arguments.outputs.write_text(json.dumps({"outputs": outputs}))


def generate(
    target: torch.nn.Module,
    draft: torch.nn.Module,
    prompt: list[int],
    max_new_tokens: int,
    stop_token_ids: list[int],
) -> dict[str, list[int]]:
    """Generated ids alone, with the length of each round."""
    with sdpa_kernel(SDPBackend.MATH):
        result = dflash.model.dflash_generate(
            draft, target, torch.tensor([prompt]), max_new_tokens, stop_token_ids, return_stats=True
        )
    return {
        "tokens": result.output_ids[0, len(prompt) :].tolist(),
        "acceptance_lengths": result.acceptance_lengths,
    }


if __name__ == "__main__":
    main()
