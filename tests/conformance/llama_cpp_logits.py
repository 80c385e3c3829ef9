"""What llama.cpp makes of a GGUF file: the probabilities of the tokens behind prompts, and the tokens of texts.

    llama_cpp_logits.py --gguf FILE --inputs FILE

in: {"prompts": [[token, ..], ..], "texts": [text, ..], "vocabulary": V, "chosen": token}

Prints one JSON line: for each prompt the logarithm of each token's probability by id, and for each text its tokens. The
server tells probabilities beside a token that is a whole letter alone: `chosen` is one, and it is made to choose it.
"""

import argparse
import json
import urllib.request
from pathlib import Path

import xllamacpp as llama


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--inputs", type=Path, required=True)
    arguments = parser.parse_args()
    wanted = json.loads(arguments.inputs.read_text())
    server = llama.Server(parameters(arguments.gguf))
    logprobs = [next_token(server, prompt, wanted["vocabulary"], wanted["chosen"]) for prompt in wanted["prompts"]]
    tokens = [tokens_of(server, text) for text in wanted["texts"]]
    print(json.dumps({"logprobs": logprobs, "tokens": tokens}), flush=True)


def parameters(file: Path) -> llama.CommonParams:
    """One slot on one thread, with keys and values in float32 and plain attention."""
    found = llama.CommonParams()
    found.model.path = str(file)
    found.n_ctx, found.n_parallel, found.n_gpu_layers, found.warmup, found.port = 256, 1, 0, False, 0
    found.cpuparams.n_threads = found.cpuparams_batch.n_threads = 1
    found.cache_type_k = found.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    found.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return found


def next_token(server: llama.Server, prompt: list[int], vocabulary: int, chosen: int) -> dict[int, float]:
    """The logarithms of the probabilities of the token behind a prompt."""
    asked = {"prompt": prompt, "n_predict": 1, "n_probs": vocabulary, "temperature": 0.0, "cache_prompt": False}
    answer = server.handle_completions({**asked, "logit_bias": [[chosen, 1000.0]], "post_sampling_probs": False})
    (behind,) = answer["choices"][0]["logprobs"]["content"]
    return {each["id"]: each["logprob"] for each in behind["top_logprobs"]}


def tokens_of(server: llama.Server, text: str) -> list[int]:
    """The tokens of a text, which may spell control tokens."""
    body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)["tokens"]


if __name__ == "__main__":
    main()
