"""Runs `dflash benchmark openai` with a few prompts of its own, for its data sets are on the hub.

dflash_benchmark.py URL MODEL
"""

import sys

from dflash import benchmark, cli

PROMPTS = ["What is 17 + 25?", "What is 1 + 2?"]


def main() -> None:
    url, model = sys.argv[1:]
    benchmark.load_and_process_dataset = lambda name: [{"turns": [prompt]} for prompt in PROMPTS]
    sys.argv = [
        "dflash", "benchmark", "openai", "--model", model, "--base-url", url, "--dataset", "gsm8k",
        "--num-prompts", "4", "--concurrency", "2", "--reasoning", "low",
    ]  # fmt: skip
    cli.main()


if __name__ == "__main__":
    main()
