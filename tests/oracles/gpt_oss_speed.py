"""How fast transformers' `generate` decodes a GPT-OSS checkpoint on this CPU: the peer of `stage=peer`.

    gpt_oss_speed.py IN OUT

Transformers' own choices of attention and experts, all threads of the machine; formats in pipeline/bench/peer.py.
"""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import GptOssForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    model = GptOssForCausalLM.from_pretrained(request["model"], dtype=getattr(torch, request["dtype"])).eval()
    if getattr(model.config, "swiglu_limit", None) is not None:  # this version has 7.0 in its code, later ones read it
        for layer in model.model.layers:
            layer.mlp.experts.limit = model.config.swiglu_limit
    model.generation_config.eos_token_id = None
    prompts = [torch.tensor([prompt]) for prompt in request["prompts"]]
    timed(model, prompts[0], 2)  # the first calls of anything are slow
    outputs = []
    for prompt in prompts:
        first, _ = timed(model, prompt, 1)
        seconds, tokens = timed(model, prompt, request["max_new_tokens"])
        outputs.append({"tokens": tokens, "decode_seconds": seconds - first})
    Path(sys.argv[2]).write_text(json.dumps({"outputs": outputs}))


@torch.inference_mode()
def timed(model: torch.nn.Module, prompt: torch.Tensor, num_tokens: int) -> tuple[float, list[int]]:
    """Seconds that greedy decoding of so many tokens takes, prefill included, and the tokens."""
    started = time.perf_counter()
    made = model.generate(prompt, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
    return time.perf_counter() - started, made[0, prompt.shape[1] :].tolist()


if __name__ == "__main__":
    main()
