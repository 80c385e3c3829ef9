"""The rules that the values of a configuration must keep, and one error that lists all that break them."""

import dataclasses
import datetime
import math
import re
import urllib.parse
from pathlib import Path
from typing import Any

from pipeline.artifacts import PipelineError
from pipeline.config import (
    Effort,
    FeatureSource,
    FeatureStore,
    Generator,
    PipelineConfig,
    PromptsConfig,
    PromptSource,
    Stage,
    TeacherCacheConfig,
    uses_hosts,
)

ON_HOSTS = (Stage.train, Stage.serve, Stage.bench)


def validate(config: PipelineConfig) -> None:
    """Raise one PipelineError that lists every value breaking its rule, as `key is value; rule`."""
    broken = []
    for key, value in _leaves(config):
        name = key.rsplit(".", 1)[-1]
        if name in _POSITIVE and value is not None and not value > 0:
            broken.append(f"{key} is {value}; it must be positive")
    prompts, draft = config.prompts, config.draft
    if not 0 < prompts.heldout_fraction < 1:
        broken.append(f"prompts.heldout_fraction is {prompts.heldout_fraction}; it must be between 0 and 1")
    if prompts.source is PromptSource.jsonl and prompts.path is None:
        broken.append("prompts.path is null; prompts.source=jsonl needs a file")
    if prompts.source is PromptSource.dataset and prompts.dataset is None:
        broken.append("prompts.dataset is null; prompts.source=dataset needs a name")
    if draft.block_size < 2:
        broken.append(f"draft.block_size is {draft.block_size}; a block holds the anchor and at least one draft")
    if draft.num_attention_heads % draft.num_key_value_heads:
        broken.append(
            f"draft.num_attention_heads is {draft.num_attention_heads}; it must be a multiple of "
            f"draft.num_key_value_heads ({draft.num_key_value_heads})"
        )
    if draft.head_dim % 2:
        broken.append(f"draft.head_dim is {draft.head_dim}; rotary embedding needs an even one")
    target = config.target
    trained = target.pretrain is not None and target.architecture is not None
    if target.path is None and target.pretrained is None and not trained:
        broken.append("target.path is null; give a GPT-OSS model's directory or hub id, or choose target=tiny")
    if target.revision is not None and target.path is None:
        broken.append(f"target.revision is {target.revision}; it goes with a hub id in target.path")
    if target.gguf is not None and target.pretrained is None:
        broken.append(f"target.gguf is {target.gguf}; it needs target.pretrained: choose target=smollm2")
    if target.pretrained is not None and not re.fullmatch("[0-9a-f]{64}", target.pretrained.sha256):
        sha256 = target.pretrained.sha256
        broken.append(f"target.pretrained.sha256 is {sha256!r}; it must be 64 hex digits in lower case")
    sizes = target.architecture
    if sizes is not None:
        if sizes.head_dim % 2:
            broken.append(f"target.architecture.head_dim is {sizes.head_dim}; rotary embedding needs an even one")
        if sizes.num_attention_heads % sizes.num_key_value_heads:
            broken.append(
                f"target.architecture.num_attention_heads is {sizes.num_attention_heads}; it must be a multiple of "
                f"target.architecture.num_key_value_heads ({sizes.num_key_value_heads})"
            )
        if sizes.num_experts_per_tok > sizes.num_local_experts:
            broken.append(
                f"target.architecture.num_experts_per_tok is {sizes.num_experts_per_tok}; there are "
                f"{sizes.num_local_experts} experts (target.architecture.num_local_experts)"
            )
    if config.bench.max_new_tokens == 1:
        broken.append("bench.max_new_tokens is 1; the first token is prefill's: at least 2 are needed to time decoding")
    if config.train_peer.steps < 4:
        broken.append(f"train_peer.steps is {config.train_peer.steps}; the first three are not counted: at least 4")
    if not 0 <= config.train.warmup_ratio < 1:
        broken.append(f"train.warmup_ratio is {config.train.warmup_ratio}; it must be at least 0 and below 1")
    if config.train.weight_decay < 0:
        broken.append(f"train.weight_decay is {config.train.weight_decay}; it must not be negative")
    broken += _prompts(config.prompts, config.serve.date) + _teacher_cache(config.teacher_cache) + _train(config)
    exported = config.export.path
    if exported and "://" in exported:
        broken.append(f"export.path is {exported}; a draft is written to a disk and served from one: give a directory")
    if config.stage in (Stage.export, Stage.all) and exported and "dflash" not in Path(exported).name.lower():
        broken.append(f"export.path is {exported}; its last part must contain dflash, by which vLLM knows the method")
    if draft.tapped_layers is not None and sorted(set(draft.tapped_layers)) != draft.tapped_layers:
        broken.append(f"draft.tapped_layers is {draft.tapped_layers}; ids must ascend without repeats")
    if uses_hosts(config.mesh) and config.stage not in ON_HOSTS:
        stage, known = config.stage and config.stage.value, ", ".join(f"stage={one.value}" for one in ON_HOSTS)
        broken.append(f"stage is {stage}; several hosts (mesh.hosts, mesh.coordinator) run {known}")
    if not 0 <= config.serve.port < 65536:
        broken.append(f"serve.port is {config.serve.port}; it must be 0 to 65535")
    if broken:
        raise PipelineError("configuration: " + "\n  ".join(broken))


def _prompts(prompts: PromptsConfig, serve_date: str | None) -> list[str]:
    broken = []
    for key, day in (("prompts.date", prompts.date), ("serve.date", serve_date)):
        if day is not None and not _is_day(day):
            broken.append(f"{key} is {day!r}; it must be a day such as 2025-08-05")
    for name, value in (("dataset_subset", prompts.dataset_subset), ("dataset_revision", prompts.dataset_revision)):
        if value is not None and prompts.source is not PromptSource.dataset:
            broken.append(f"prompts.{name} is {value}; it goes with prompts.source=dataset")
    mix = prompts.effort_mix
    unknown = sorted(mix.keys() - {"low", "medium", "high"})
    if (
        unknown
        or not all(0 <= share < math.inf for share in mix.values())
        or (prompts.effort is Effort.mixed and not sum(mix.values()))
    ):
        broken.append(
            f"prompts.effort_mix is {mix}; it must give low, medium or high shares of at least 0, one above it"
        )
    return broken


def _is_day(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _is_plain_url(url: str) -> bool:
    parts = urllib.parse.urlsplit(url)
    secretive = parts.username is not None or parts.password is not None or parts.query or parts.fragment
    return parts.scheme in ("http", "https") and bool(parts.hostname) and not secretive


def _teacher_cache(cache: TeacherCacheConfig) -> list[str]:
    broken = []
    if cache.generator is Generator.openai and (cache.openai.url is None or cache.openai.model is None):
        given = f"url is {cache.openai.url}, model is {cache.openai.model}"
        broken.append(f"teacher_cache.openai: {given}; teacher_cache.generator=openai needs both")
    if cache.openai.url is not None and not _is_plain_url(cache.openai.url):
        broken.append(
            "teacher_cache.openai.url is no plain address; it must be such as http://localhost:8000/v1, without user, "
            "password or query: the key goes in the environment variable named by teacher_cache.openai.api_key_env"
        )
    if cache.temperature < 0:
        broken.append(f"teacher_cache.temperature is {cache.temperature}; it must not be negative")
    if not 0 < cache.top_p <= 1:
        broken.append(f"teacher_cache.top_p is {cache.top_p}; it must be above 0 and at most 1")
    if not 0 <= cache.verify <= 1:
        broken.append(f"teacher_cache.verify is {cache.verify}; it must be a share from 0 to 1")
    if cache.openai.retries < 0:
        broken.append(f"teacher_cache.openai.retries is {cache.openai.retries}; it must not be negative")
    if not 0 <= cache.writer < cache.num_writers:
        broken.append(f"teacher_cache.writer is {cache.writer}; it must be 0 to teacher_cache.num_writers - 1")
    return broken


def _train(config: PipelineConfig) -> list[str]:
    train, broken = config.train, []
    for name, value in (("beta1", train.beta1), ("beta2", train.beta2), ("ema_decay", train.ema_decay)):
        if value is not None and not 0 <= value < 1:
            broken.append(f"train.{name} is {value}; it must be at least 0 and below 1")
    for name, value in (("distillation", train.distillation), ("dpace_smoothing", train.dpace_smoothing)):
        if not 0 <= value <= 1:
            broken.append(f"train.{name} is {value}; it must be from 0 to 1")
    if not 0 <= train.final_learning_rate <= train.learning_rate:
        broken.append(
            f"train.final_learning_rate is {train.final_learning_rate}; it must be 0 to train.learning_rate "
            f"({train.learning_rate})"
        )
    if train.batch_sequences % train.accumulation:
        broken.append(
            f"train.accumulation is {train.accumulation}; it must divide train.batch_sequences "
            f"({train.batch_sequences})"
        )
    if train.init_revision is not None and train.init is None:
        broken.append(f"train.init_revision is {train.init_revision}; it goes with a hub id in train.init")
    if train.features is FeatureSource.cached and config.teacher_cache.features is FeatureStore.none:
        broken.append("teacher_cache.features is none; train.features=cached reads them: store them, or train live")
    if uses_hosts(config.mesh) and train.features is FeatureSource.live and config.stage is Stage.train:
        broken.append("train.features is live; several hosts train on cached features: make a cache, or use one host")
    if train.pack_tokens is not None and train.features is FeatureSource.live:
        broken.append(
            f"train.pack_tokens is {train.pack_tokens}; the target reads one sequence a row: leave it null with "
            "train.features=live"
        )
    if train.distillation and train.features is FeatureSource.cached:
        broken.append(
            f"train.distillation is {train.distillation}; the target's distribution is not stored: it needs "
            "train.features=live"
        )
    return broken


_POSITIVE = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "num_local_experts num_experts_per_tok sliding_window max_position_embeddings num_conversations steps "
    "batch_tokens sequence_length learning_rate checkpoint_steps eval_steps log_steps count max_prompt_tokens "
    "max_new_tokens batch_size shard_sequences num_tapped_layers rope_theta batch_sequences anchors_per_sequence "
    "clip_grad loss_decay slots max_length prefill_chunk num_prompts prompt_tokens repeats data expert tensor "
    "num_processes num_writers concurrency timeout_seconds pack_tokens accumulation fsdp tolerance rope_positions "
    "context prefill_tokens verify_tokens expert_tokens quality_steps".split()
)


def _leaves(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not dataclasses.is_dataclass(value):
        return [(prefix, value)]
    return [
        leaf
        for field in dataclasses.fields(value)
        for leaf in _leaves(getattr(value, field.name), f"{prefix}.{field.name}" if prefix else field.name)
    ]
