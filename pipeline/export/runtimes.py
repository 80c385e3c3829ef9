"""How an exported draft is served in each runtime that reads z-lab's layout, and what was tried in it.

Source: docs/runtimes.md; the commands of SGLang and vLLM are those on z-lab's cards of its gpt-oss drafts.
"""

import dataclasses

from pipeline.model.dflash.config import DFlashConfig

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
        command=(
            f"python -m sglang.launch_server --model-path {target} --dtype bfloat16 \\\n"
            f"    --speculative-algorithm DFLASH --speculative-draft-model-path {DRAFT_DIRECTORY} \\\n"
            f"    --speculative-num-draft-tokens {config.block_size} --attention-backend fa3"
        ),
        tried="not run: names, shapes and config keys were checked against the rules of its reader (0.5.23)",
        notes=(
            f"its number of draft tokens counts the anchor: it is the block size, {config.block_size}",
            "it reports no missing tensor: do not edit the weights' names",
        ),
    )


def _vllm(config: DFlashConfig, target: str) -> RuntimeGuide:
    drafted = f'{{"method": "dflash", "model": "{DRAFT_DIRECTORY}", "num_speculative_tokens": {config.block_size - 1}}}'
    return RuntimeGuide(
        name="vLLM",
        command=(
            f"vllm serve {target} --attention-backend flash_attn --max-num-batched-tokens 32768 \\\n"
            f"    --speculative-config '{drafted}'"
        ),
        tried="not run: names, shapes and config keys were checked against the rules of its reader (0.33)",
        notes=(
            f"its number of tokens leaves the anchor out: {config.block_size - 1}, and never more",
            "blocks are not causal, which not every attention backend can do",
        ),
    )


def _sglang_jax(config: DFlashConfig, target: str) -> RuntimeGuide:
    notes = [
        "it decodes greedily and refuses requests with a temperature; in 0.1.0rc0 a request for logprobs ends the "
        "server, and answers may be longer than max_tokens",
        "it has no GPT-OSS model of its own (0.1.0rc0): one must be registered before its server is started",
        "it warns of a missing tensor and goes on with random weights: look for 'No file found' in its log",
    ]
    if config.rope.factor is not None:
        notes.append("it does not know YaRN, which this draft has: acceptance falls there")
    return RuntimeGuide(
        name="sglang-jax",
        command=(
            f"python -m sgl_jax.launch_server --model-path {target} --dtype bfloat16 --grammar-backend none \\\n"
            f"    --speculative-algorithm DFLASH --speculative-draft-model-path {DRAFT_DIRECTORY} \\\n"
            "    --speculative-eagle-topk 1 --speculative-num-steps 1 --disable-overlap-schedule"
        ),
        tried=(
            "its reader, loader and model (0.1.0rc0) open drafts of this layout in this pipeline's tests, every tensor "
            "found, hidden states equal in float32; its server and its kernels were not run"
        ),
        notes=tuple(notes),
    )


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
