"""README.md of an exported draft."""

from typing import Any

from pipeline.dflash.contract import Contract
from pipeline.model.draft import DraftConfig

CARD = """\
---
base_model: {target}
library_name: transformers
tags: [speculative-decoding, dflash, block-diffusion]
---
# DFlash draft for {target}

Proposes {drafted} tokens a round (block size {block_size}) for `{target}`; the target verifies each of them, so
that the text is the target's own. {layers} layers, {tapped} tapped layers of the target ({layer_ids}: outputs of
decoder layers, counted from 0). Embedding and head are the target's and are not in this directory.

| texts that the target wrote | accept_length (of {block_size}) | accept_rate |
| --- | --- | --- |
{rows}

`accept_length` is the mean number of tokens a round yields, the target's own included. `contract.json` tells
which target, tokenizer and settings this draft belongs to; `evaluation.json` has all numbers.

Serve it beside its target with this pipeline:

    python -m pipeline stage=serve target={target_choice} export.path=<this directory>

Runtimes that read DFlash drafts in z-lab's layout (SGLang, vLLM) take the directory as it is.
"""


def model_card(config: DraftConfig, contract: Contract, evaluation: dict[str, Any]) -> str:
    """What a person who finds the directory must know."""
    rows = [
        f"| {name} ({found['num_sequences']}) | {found['accept_length']:.3f} | {found['accept_rate']:.3f} |"
        for name, found in (("held out", evaluation["heldout"]), ("trained on", evaluation["train"]))
    ]
    return CARD.format(
        target=contract.target.name,
        target_choice="tiny" if contract.target.name == "tiny" else "local target.path=<its directory>",
        drafted=config.block_size - 1,
        block_size=config.block_size,
        layers=config.num_hidden_layers,
        tapped=len(config.tapped_layers),
        layer_ids=", ".join(map(str, config.tapped_layers)),
        rows="\n".join(rows),
    )
