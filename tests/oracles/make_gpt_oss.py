"""Writes a GPT-OSS checkpoint with random weights, through transformers.

The config file is copied as it is, so that a test chooses between the published layout
(`rope_theta`, `rope_scaling`) and the one of transformers 5 (`rope_parameters`).
"""

import argparse
import shutil
from pathlib import Path

from checkpoints import DTYPES, read_config
from random_weights import redraw
from transformers import GptOssConfig, GptOssForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    arguments = parser.parse_args()

    config = GptOssConfig.from_dict(read_config(arguments.config, "gpt_oss"))
    model = GptOssForCausalLM(config).float()
    redraw(model, arguments.seed)
    model.to(DTYPES[arguments.dtype]).save_pretrained(arguments.out)
    shutil.copyfile(arguments.config, arguments.out / "config.json")


if __name__ == "__main__":
    main()
