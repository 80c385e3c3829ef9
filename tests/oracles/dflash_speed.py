"""How fast the published package's `dflash_generate` decodes on this CPU: the peer of `stage=peer peer.draft=true`.

    dflash_speed.py IN OUT

With transformers' GPT-OSS and all threads of the machine; formats in pipeline/peer/decoding.py.
"""

import json
import sys
import time
from pathlib import Path

import dflash.model
import torch
from checkpoints import load_draft, load_target

dflash.model._cuda_time = time.perf_counter  # the package asks CUDA for the time
NO_STOP = [-1]  # no token's id


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    target, draft = load_target(Path(request["model"])), load_draft(Path(request["draft"]))
    timed(target, draft, request["prompts"][0], 2)  # the first calls of anything are slow
    outputs = []
    for prompt in request["prompts"]:
        first, _ = timed(target, draft, prompt, 1)
        seconds, tokens = timed(target, draft, prompt, request["max_new_tokens"])
        outputs.append({"tokens": tokens, "decode_seconds": seconds - first})
    Path(sys.argv[2]).write_text(json.dumps({"outputs": outputs}))


def timed(target: torch.nn.Module, draft: torch.nn.Module, prompt: list[int], count: int) -> tuple[float, list[int]]:
    """Seconds that greedy decoding of so many tokens takes, prefill included, and the tokens."""
    started = time.perf_counter()
    ids = dflash.model.dflash_generate(draft, target, torch.tensor([prompt]), count, NO_STOP)
    return time.perf_counter() - started, ids[0, len(prompt) :].tolist()[:count]


if __name__ == "__main__":
    main()
