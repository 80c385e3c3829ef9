"""How an exported draft is served in each runtime that reads z-lab's layout, and what was tried in it.

Source: docs/runtimes.md and pipeline/external/serving_engines.py.
"""

import dataclasses
import re
import shlex

from pipeline.external.serving_engines import ENGINES, Service
from pipeline.model.dflash.config import DFlashConfig

LINE_COLUMNS = 100
DRAFT_DIRECTORY, TARGET_DIRECTORY = "<this directory>", "<the target's directory>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeGuide:
    """Describes a program that serves the draft: its command, what was tried in it, and notes for its user."""

    name: str
    command: str
    tried: str
    notes: tuple[str, ...] = ()


def runtimes(config: DFlashConfig, target: str | None, target_choice: str) -> list[RuntimeGuide]:
    """Returns the guides. `target` is the target's hub id, `target_choice` the overrides that select it here."""
    path = target or TARGET_DIRECTORY
    return [
        _pipeline(target_choice),
        _sglang(config, path),
        _vllm(config, path),
        _sglang_jax(config, path),
        _z_lab(config),
    ]


def _pipeline(target_choice: str) -> RuntimeGuide:
    return RuntimeGuide(
        name="this pipeline",
        command=f"python -m pipeline stage=serve {target_choice} export.path={DRAFT_DIRECTORY}",
        tried="measured the numbers above",
    )


def _sglang(config: DFlashConfig, target: str) -> RuntimeGuide:
    return RuntimeGuide(
        name="SGLang",
        command=_command("sglang", config, target),
        tried="not run: names, shapes and config keys were checked against the rules of its reader (0.5.23)",
        notes=(
            f"its number of draft tokens counts the anchor: it is the block size, {config.block_size}",
            "it reports no missing tensor: do not edit the weights' names",
        ),
    )


def _vllm(config: DFlashConfig, target: str) -> RuntimeGuide:
    return RuntimeGuide(
        name="vLLM",
        command=_command("vllm", config, target),
        tried="not run: names, shapes and config keys were checked against the rules of its reader (0.33)",
        notes=(
            f"its number of tokens leaves the anchor out: {config.block_size - 1}, and never more",
            "blocks are not causal, which not every attention backend can do",
        ),
    )


def _sglang_jax(config: DFlashConfig, target: str) -> RuntimeGuide:
    notes = [
        "it decodes greedily and refuses requests with a temperature; in 0.1.0rc0 a request for logprobs ends the "
        "server, and answers may be longer than max_tokens; serve.gateway=true of this pipeline mends all three",
        "it has no GPT-OSS model of its own (0.1.0rc0): the package external/sglang_jax of this pipeline adds it",
        "without that package it warns of a missing tensor and goes on with random weights",
    ]
    if config.rope.factor is not None:
        notes.append("without that package it does not know YaRN, which this draft has: acceptance falls there")
    return RuntimeGuide(
        name="sglang-jax",
        command=_command("sglang_jax", config, target),
        tried=(
            "its server (0.1.0rc0) with a target and draft of this layout gives this pipeline's tokens and accepts as "
            "many, in float32 on a CPU, in this pipeline's tests; its kernels were compiled for a TPU and not run"
        ),
        notes=tuple(notes),
    )


def _command(name: str, config: DFlashConfig, target: str) -> str:
    """Returns an engine's command, a few arguments on each line."""
    service = Service(target=target, draft=DRAFT_DIRECTORY, block_size=config.block_size, slots=None)
    words = [word if word.startswith("<") else shlex.quote(word) for word in ENGINES[name].command("python", service)]
    lines = [""]
    for part in re.split(r" (?=--)", " ".join(words)):  # a flag and its value stay together
        if len(lines[-1]) + len(part) > LINE_COLUMNS:
            lines.append("   ")
        lines[-1] += f" {part}"
    return " \\\n".join(lines).strip()


def _z_lab(config: DFlashConfig) -> RuntimeGuide:
    return RuntimeGuide(
        name="z-lab's dflash",
        command=(
            "from dflash.model import DFlashDraftModel\n"
            f'draft = DFlashDraftModel.from_pretrained("{DRAFT_DIRECTORY}", dtype="bfloat16")'
        ),
        tried=(
            "dflash 0.1.0 opens drafts of this layout in this pipeline's tests, no tensor missing or unexpected, "
            "hidden states equal in float32"
        ),
        notes=("its own generation loop knows Qwen3 and LLaMA targets; for GPT-OSS call dflash_generate",),
    )
