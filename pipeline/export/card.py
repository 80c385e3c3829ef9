"""Writes the README.md of an exported draft: what it is, its scores and their measurement, and how it is served."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.artifacts.contract import Contract
from pipeline.dflash.acceptance import memorises
from pipeline.export.runtimes import RuntimeGuide, runtimes
from pipeline.export.tensor_layout import tensor_shapes
from pipeline.hub import card_metadata
from pipeline.model.dflash.config import DFlashConfig

TAGS = ("speculative-decoding", "dflash", "block-diffusion")
SPLIT_NAMES = {"heldout": "held out", "train": "trained on"}

CARD_TEMPLATE = """\
---
{front}
---
# DFlash draft for {target}

Proposes {drafted} tokens a round (block size {block_size}) for `{target}`; the target verifies each of them, so
that the text is the target's own. {layers} layers, {parameters} parameters, {tapped} tapped layers of the target
({layer_ids}: outputs of decoder layers, counted from 0), mask token {mask}, {rope}. Embedding and head are the
target's and are not in this directory.

## What it scores

{scores}

{at_k}

`accept_length` is the mean number of tokens a round yields, the target's own included (1 to {block_size});
`accept_rate` is the share of drafted tokens that were accepted, `accept_rate_at_k` the share of rounds whose first k
drafted tokens all were. Texts are the target's own answers; rounds are those of greedy decoding, counted over
{sequences} held-out texts and as many that the draft was trained on, in the precision it is served in. A prompt's
hash decides whether it is held out.{engine} `evaluation.json` has all numbers.

## How it was trained

{training}

## What it belongs to

{identity}

`contract.json` has these in full, with the settings, the commit and the package versions that made it.

## How to serve it
{served}
## Limits

{limits}
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """Records how a checkpoint was made: its recipe (`train` settings), the texts it saw, and fingerprints.

    `base_model` is the target's id on the hub, `choice` the overrides that select the target in this pipeline.
    """

    base_model: str | None
    choice: str
    recipe: Mapping[str, Any]
    data: Mapping[str, Any]
    teacher_cache: str
    fingerprint: str


def model_card(
    config: DFlashConfig, contract: Contract, evaluation: Mapping[str, Any], training: TrainingRecord
) -> str:
    """Returns the text of the card; equal drafts have equal cards."""
    target = training.base_model or contract.target.name
    return CARD_TEMPLATE.format(
        front=front_matter(config, evaluation, training),
        target=target,
        drafted=config.block_size - 1,
        block_size=config.block_size,
        layers=config.num_hidden_layers,
        parameters=_parameters(config),
        tapped=len(config.tapped_layers),
        layer_ids=", ".join(map(str, config.tapped_layers)),
        mask=config.mask_token_id,
        rope=_rope(config),
        scores=_scores(config, evaluation),
        at_k=_at_k(config, evaluation),
        sequences=evaluation["heldout"]["num_sequences"],
        engine=_engine(evaluation),
        training=_training(training),
        identity=_identity(contract, training),
        served="".join(map(_served, runtimes(config, training.base_model, training.choice))),
        limits=_limits(config, contract, evaluation, training),
    )


def front_matter(config: DFlashConfig, evaluation: Mapping[str, Any], training: TrainingRecord) -> str:
    """Returns the hub's metadata, as YAML. A target that is not on the hub is left out: the hub refuses other names."""
    heldout = evaluation["heldout"]
    measured = {name: heldout[name] for name in ("accept_length", "accept_rate") if math.isfinite(heldout[name])}
    return card_metadata(
        base_model=training.base_model,
        tags=TAGS,
        name=f"DFlash draft, block size {config.block_size}",
        measured={name: round(value, 4) for name, value in measured.items()},
    )


def _parameters(config: DFlashConfig) -> str:
    count = sum(math.prod(shape) for shape in tensor_shapes(config).values())
    return f"{count / 1e6:.1f} million" if count >= 1e6 else f"{count:,}"


def _rope(config: DFlashConfig) -> str:
    if config.rope.factor is None:
        return f"plain RoPE of base {config.rope.theta:g}"
    return f"RoPE of base {config.rope.theta:g} with YaRN (factor {config.rope.factor:g})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _scores(config: DFlashConfig, evaluation: Mapping[str, Any]) -> str:
    found = {name: evaluation[split] for split, name in SPLIT_NAMES.items()}
    for kind in ("effort", "channel"):
        parts = evaluation["heldout"].get(f"by_{kind}", {})
        if len(parts) > 1:
            found |= {f"held out, {kind} {name}": part for name, part in sorted(parts.items())}
    rows = [
        [
            f"{name} ({part['num_sequences']} texts)" if "num_sequences" in part else name,
            f"{part['accept_length']:.3f}",
            f"{part['accept_rate']:.3f}",
            str(sum(part["histogram"])),
        ]
        for name, part in found.items()
    ]
    return _table(
        ["texts that the target wrote", f"accept_length (of {config.block_size})", "accept_rate", "rounds"], rows
    )


def _at_k(config: DFlashConfig, evaluation: Mapping[str, Any]) -> str:
    ks = range(1, config.block_size)
    rows = [
        [name, *(f"{evaluation[split][f'accept_rate_at_{k}']:.3f}" for k in ks)] for split, name in SPLIT_NAMES.items()
    ]
    return _table(["accept_rate_at_k, k =", *map(str, ks)], rows)


def _engine(evaluation: Mapping[str, Any]) -> str:
    found = evaluation.get("engine")
    if found is None:
        return ""
    return (
        f" This directory, run by the serving engine on {found['num_sequences']} of the held-out texts, scores "
        f"{found['accept_length']:.3f} where the training evaluation counted {found['training_accept_length']:.3f}."
    )


def _training(training: TrainingRecord) -> str:
    recipe = {key: value for key, value in sorted(training.recipe.items()) if value is not None}
    rows = [[f"`{key}`", f"`{json.dumps(value)}`"] for key, value in recipe.items()]
    return "\n\n".join([_data(training.data), _table(["setting (`train.`)", "value"], rows)])


def _data(data: Mapping[str, Any]) -> str:
    purposes = {"train": "to train on", "heldout": "held out"}
    counts = " and ".join(
        f"{count['num_sequences']:,} texts {purposes[name]} ({count['num_tokens']:,} tokens, "
        f"{count['generated_tokens']:,} of them the target's)"
        for name, count in data["splits"].items()
    )
    origin = ", ".join(f"`{key}` {value}" for key, value in sorted(data["made"].items()) if value is not None)
    return f"Prompts answered by the target: {counts}. How they were made: {origin}."


def _identity(contract: Contract, training: TrainingRecord) -> str:
    target, text = contract.target, contract.text
    rows = {
        "target": f"{training.base_model or target.name}, revision {target.revision or 'none: a directory'}",
        "its config (sha256)": target.config_fingerprint,
        "its weights (sha256)": target.weights_fingerprint,
        "precision it was run in": target.weight_precision,
        "tokenizer (sha256)": text.tokenizer_fingerprint,
        "chat template (sha256)": text.chat_template_fingerprint,
        "teacher cache": training.teacher_cache,
        "checkpoint": training.fingerprint,
    }
    return _table(["what", "which"], [[name, f"`{value}`"] for name, value in rows.items()])


def _served(runtime: RuntimeGuide) -> str:
    code = "\n".join(f"    {line}" for line in runtime.command.splitlines())
    notes = "".join(f"- {note}\n" for note in runtime.notes)
    return f"\n**{runtime.name}** ({runtime.tried})\n\n{code}\n\n{notes}"


def _limits(config: DFlashConfig, contract: Contract, evaluation: Mapping[str, Any], training: TrainingRecord) -> str:
    efforts = contract.text.reasoning_efforts
    lines = [
        "It fits the target, tokenizer and chat template above and no others: with another one, or another revision, "
        "tokens stay right and acceptance falls.",
        f"It drafts {config.block_size - 1} tokens at most; asking for more gains nothing.",
        f"It saw texts of up to {training.data['longest_tokens']:,} tokens; further out its acceptance is not known.",
        "Prompts unlike those it was trained on (another language, task or format) are accepted less.",
    ]
    if efforts:
        lines.append(f"It was trained on reasoning effort {', '.join(efforts)}; at others expect less.")
    if config.attention_bias:
        lines.append("Its attention has biases, which tpu-inference cannot load.")
    heldout, trained = (evaluation[split]["accept_length"] for split in SPLIT_NAMES)
    if memorises(trained, heldout):
        lines.append(
            f"**It memorises**: {trained:.2f} tokens a round on texts it was trained on, {heldout:.2f} on held-out ones"
        )
    return "\n".join(f"- {line}" for line in lines)
