"""Other programs that serve a target with a draft: their commands, and what they can and cannot do.

What is said of a program was tried here ("ran") or is from its source ("read"), in the version that is named. The
table of docs/runtimes.md, the model card of an exported draft and `serve.engine` all come from this file.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

READ_ON = "2026-11-23"  # when sources were read; what was tried is tried again by `make conformance`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Service:
    """Describes what is to be served, and how large. Without a draft the target decodes alone.

    `block_size` counts the anchor, `max_length` bounds prompt plus answer, and `extra` are arguments of the engine that
    come last, so that they count. What is None is the engine's own choice.
    """

    target: str
    draft: str | None = None
    block_size: int | None = None
    precision: str = "bfloat16"
    slots: int | None = 8
    max_length: int | None = None
    page_size: int | None = None
    prefill_chunk: int | None = None
    host: str | None = None
    port: int | None = None
    extra: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Finding:
    """Holds what a program does about something, in a few words, and how that is known: "ran" or "read"."""

    text: str
    basis: str
    works: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingEngine:
    """Describes a program: the package and version that was read, its command, and findings by `ASPECTS`.

    `notes` are said before it is started with a draft, and `why_not` says why it cannot serve one at all. `help_flag`
    behind the first `program_words` of its command makes it list all of its flags.
    """

    title: str
    package: str
    version: str
    command: Callable[[str, Service], list[str]]
    findings: dict[str, Finding]
    source: str
    help_flag: str = "--help"
    program_words: int = 3  # python -m MODULE
    notes: tuple[str, ...] = ()
    why_not: str | None = None


ASPECTS = (
    "GPT-OSS",
    "GPT-OSS with DFLASH",
    "sampling with DFLASH",
    "prefix cache",
    "concurrency",
    "MXFP4",
    "acceptance",
)


def sglang_jax_command(python: str, service: Service) -> list[str]:
    """Returns the command of sglang-jax with this project's GPT-OSS (external/sglang_jax)."""
    command = [python, "-m", "gpt_oss_sglang_jax", "--model-path", service.target, "--dtype", service.precision]
    command += ["--grammar-backend", "none", "--disable-hybrid-swa-memory"]
    command += _given("--max-running-requests", service.slots)
    command += _given("--context-length", _one_more(service.max_length))
    command += _given("--page-size", service.page_size)
    command += _given("--chunked-prefill-size", service.prefill_chunk)
    command += _given("--max-prefill-tokens", service.prefill_chunk)
    command += _address(service)
    if service.draft is not None:
        command += ["--speculative-algorithm", "DFLASH", "--speculative-draft-model-path", service.draft]
        command += ["--speculative-num-draft-tokens", str(service.block_size)]
        command += ["--speculative-eagle-topk", "1", "--speculative-num-steps", "1"]
    # without it a request that samples ends the server; the plain arm has it too, to be compared fairly
    return [*command, "--disable-overlap-schedule", "--decode-log-interval", "1", *service.extra]


def sglang_command(python: str, service: Service) -> list[str]:
    """Returns SGLang's command, which z-lab's cards have."""
    command = [python, "-m", "sglang.launch_server", "--model-path", service.target, "--dtype", service.precision]
    command += ["--attention-backend", "fa3", "--enable-metrics"]
    command += _given("--max-running-requests", service.slots)
    command += _given("--context-length", _one_more(service.max_length))
    command += _address(service)
    if service.draft is not None:
        command += ["--speculative-algorithm", "DFLASH", "--speculative-draft-model-path", service.draft]
        command += ["--speculative-num-draft-tokens", str(service.block_size)]
    return [*command, *service.extra]


def vllm_command(python: str, service: Service) -> list[str]:
    """Returns vLLM's command, which z-lab's cards have. Its number of drafted tokens leaves the anchor out."""
    command = [str(Path(python).parent / "vllm") if "/" in python else "vllm", "serve", service.target]
    command += ["--dtype", service.precision]
    command += _given("--max-num-seqs", service.slots)
    command += _given("--max-model-len", service.max_length)
    command += _address(service)
    if service.draft is not None and service.block_size is not None:
        drafted = {"method": "dflash", "model": service.draft, "num_speculative_tokens": service.block_size - 1}
        command += ["--attention-backend", "flash_attn", "--max-num-batched-tokens", "32768"]
        command += ["--speculative-config", json.dumps(drafted)]
    return [*command, *service.extra]


def _given(flag: str, value: object) -> list[str]:
    return [] if value is None else [flag, str(value)]


def _one_more(length: int | None) -> int | None:
    """Returns the context of SGLang for requests of a length, which must be shorter than it."""
    return None if length is None else length + 1


def _address(service: Service) -> list[str]:
    return _given("--host", service.host) + _given("--port", service.port)


ENGINES = {
    "sglang_jax": ServingEngine(
        title="sglang-jax, with `external/sglang_jax`",
        package="sglang-jax",
        version="0.1.0rc0",
        command=sglang_jax_command,
        findings={
            "GPT-OSS": Finding("this project's model; the engine has none", "ran"),
            "GPT-OSS with DFLASH": Finding("yes", "ran"),
            "sampling with DFLASH": Finding("no: 400, or the gateway's plain arm", "ran", works=False),
            "prefix cache": Finding("yes, target and draft", "read"),
            "concurrency": Finding("yes", "ran"),
            "MXFP4": Finding("read, and unpacked to bfloat16", "ran"),
            "acceptance": Finding("in its log alone", "ran"),
        },
        source="the wheel sglang-jax 0.1.0rc0; tests/conformance/test_sglang_jax_server.py",
        notes=(
            "it decodes greedily: a request with a temperature gets a 400 (serve.gateway=true refuses it by name)",
            "a request for log probabilities ends it; the gateway refuses those",
            "an answer may be up to a block longer than was asked for; the gateway cuts it",
            "the draft's cache follows --mem-fraction-static and not --max-total-tokens",
        ),
    ),
    "sglang": ServingEngine(
        title="SGLang",
        package="sglang",
        version="0.5.23",
        command=sglang_command,
        findings={
            "GPT-OSS": Finding("yes", "read"),
            "GPT-OSS with DFLASH": Finding("yes, on NVIDIA GPUs", "read"),
            "sampling with DFLASH": Finding("yes, lossless", "read"),
            "prefix cache": Finding("yes, target and draft", "read"),
            "concurrency": Finding("yes, 48 by default", "read"),
            "MXFP4": Finding("yes", "read"),
            "acceptance": Finding("log and `meta_info`", "read"),
        },
        source="the wheel sglang 0.5.23 (models/dflash.py, speculative/dflash_worker_v2.py)",
        notes=("it reports no tensor that the draft's file lacks: do not rename any",),
    ),
    "vllm": ServingEngine(
        title="vLLM",
        package="vllm",
        version="0.33.0",
        command=vllm_command,
        findings={
            "GPT-OSS": Finding("yes", "read"),
            "GPT-OSS with DFLASH": Finding("yes, on NVIDIA GPUs", "read"),
            "sampling with DFLASH": Finding("yes, lossless", "read"),
            "prefix cache": Finding("yes", "read"),
            "concurrency": Finding("yes", "read"),
            "MXFP4": Finding("yes", "read"),
            "acceptance": Finding("`/metrics`", "read"),
        },
        source="the wheel vllm 0.33.0 (models/qwen3_dflash.py, config/speculative.py)",
        help_flag="--help=all",
        program_words=2,
        notes=("the attention backend must do blocks that are not causal",),
    ),
    "tpu_inference": ServingEngine(
        title="tpu-inference (vllm-tpu)",
        package="vllm-tpu",
        version="0.32.0",
        command=vllm_command,
        findings={
            "GPT-OSS": Finding("yes, torchax", "read"),
            "GPT-OSS with DFLASH": Finding("no: ends at start", "ran", works=False),
            "sampling with DFLASH": Finding("yes (Qwen3, Llama)", "read"),
            "prefix cache": Finding("vLLM's", "read"),
            "concurrency": Finding("yes", "read"),
            "MXFP4": Finding("yes, torchax", "read"),
            "acceptance": Finding("`/metrics`", "ran"),
        },
        source="the wheels vllm-tpu 0.32.0 and tpu-inference 0.32.0",
        help_flag="--help=all",
        program_words=2,
        why_not=(
            "GPT-OSS runs through torchax there and DFlash through JAX: it ends with 'Draft model implementation must "
            "match target model'; use serve.mode=plain with it, or serve.engine=sglang_jax"
        ),
    ),
}


def table() -> str:
    """Returns the table of docs/runtimes.md, in Markdown."""
    rows = [("engine", "version", *ASPECTS), ("---",) * (2 + len(ASPECTS))]
    for engine in ENGINES.values():
        found = (engine.findings[aspect] for aspect in ASPECTS)
        rows.append((engine.title, engine.version, *(f"{one.text} ({one.basis})" for one in found)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
