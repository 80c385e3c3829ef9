"""Greedy continuations by a Llama in a GGUF file; in and out as in gpt_oss_generate."""

import argparse
import json
from pathlib import Path

from checkpoints import load_llama
from gpt_oss_generate import generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--outputs", type=Path, required=True)
    arguments = parser.parse_args()

    model = load_llama(arguments.gguf)
    request = json.loads(arguments.inputs.read_text())
    stop_token_ids = set(request["stop_token_ids"])
    outputs = [generate(model, prompt, request["max_new_tokens"], stop_token_ids) for prompt in request["prompts"]]
    arguments.outputs.write_text(json.dumps({"outputs": outputs}))


if __name__ == "__main__":
    main()
