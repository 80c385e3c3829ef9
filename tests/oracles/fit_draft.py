"""Fits a draft to the target's greedy continuations of some prompts, so that rounds keep tokens.

A random draft is almost always rejected, which leaves partial and full acceptance, and the
roll-back after them, untested. All anchors of a continuation are trained at once, through the
package's own attention mask argument. Few --steps give a mixture of lengths, many give full blocks.

in:  {"prompts": [[id, ...], ...], "max_new_tokens": n, "stop_token_ids": [id, ...]}
out: a checkpoint in the layout of make_draft, same config
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from checkpoints import load_draft, load_target
from gpt_oss_generate import generate
from safetensors.torch import save_file
from torch.nn import functional


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--draft", type=Path, required=True)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    target, draft = load_target(arguments.target).requires_grad_(False), load_draft(arguments.draft)
    request = json.loads(arguments.inputs.read_text())
    stop_token_ids = set(request["stop_token_ids"])
    examples = []
    for prompt in request["prompts"]:
        tokens = generate(target, prompt, request["max_new_tokens"], stop_token_ids)["tokens"]
        if len(tokens) > 1:
            examples.append(example(target, draft, prompt, tokens))
    fit(target, draft, examples, arguments.steps)

    arguments.out.mkdir(parents=True, exist_ok=True)
    save_file(draft.state_dict(), arguments.out / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(arguments.draft / "config.json", arguments.out / "config.json")


def example(target: torch.nn.Module, draft: torch.nn.Module, prompt: list[int], tokens: list[int]) -> dict:
    """Inputs and labels for A blocks, one at every generated token but the last."""
    block_size, sequence = draft.block_size, torch.tensor(prompt + tokens)
    anchors = torch.arange(len(prompt), len(sequence) - 1)
    slots = anchors[:, None] + torch.arange(block_size)  # [A, K]
    block_ids = torch.full_like(slots, draft.mask_token_id)
    block_ids[:, 0] = sequence[anchors]
    labels = functional.pad(sequence, (0, block_size), value=-100)[slots]
    labels[:, 0] = -100

    hidden_states = target(sequence[None], use_cache=False, output_hidden_states=True).hidden_states
    positions = torch.arange(len(sequence))
    context = positions < anchors.repeat_interleave(block_size)[:, None]  # [A*K, T]
    own_block = torch.block_diag(*[torch.ones(block_size, block_size)] * len(anchors)).bool()
    return {
        "labels": labels.flatten(),
        "inputs": {
            "target_hidden": torch.cat([hidden_states[i + 1] for i in draft.target_layer_ids], dim=-1),
            "noise_embedding": target.get_input_embeddings()(block_ids.flatten())[None],
            "position_ids": torch.cat([positions, slots.flatten()])[None],
            "attention_mask": torch.cat([context, own_block], dim=1)[None, None],
        },
    }


def fit(target: torch.nn.Module, draft: torch.nn.Module, examples: list[dict], steps: int) -> None:
    """Adam on the mean cross entropy of every drafted slot."""
    optimizer = torch.optim.Adam(draft.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        for part in examples:
            logits = target.lm_head(draft(**part["inputs"]))[0]
            loss = functional.cross_entropy(logits, part["labels"], ignore_index=-100)
            (loss / len(examples)).backward()
        optimizer.step()


if __name__ == "__main__":
    main()
