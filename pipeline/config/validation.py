"""Checks the rules of a configuration; one error lists every rule that is broken."""

import math
import urllib.parse
from pathlib import Path

from pipeline.config import fields
from pipeline.config.choices import (
    Effort,
    EngineName,
    FeatureSource,
    FeatureStore,
    Generator,
    LossWeights,
    PromptSource,
    ServeMode,
    Stage,
)
from pipeline.config.schema import (
    ArchitectureConfig,
    BenchConfig,
    DraftConfig,
    PipelineConfig,
    PromptsConfig,
    ServeConfig,
    TargetConfig,
    TeacherCacheConfig,
    TrainConfig,
    uses_hosts,
)
from pipeline.errors import PipelineError

GGUF = ".gguf"
ON_HOSTS = (Stage.train, Stage.serve, Stage.bench)
MIXED_EFFORTS = {"low", "medium", "high"}


def validate(config: PipelineConfig) -> None:
    """Raises one PipelineError that lists every value breaking a rule, as `key is value; it must be ...`."""
    broken = [
        *_field_rules(config),
        *_target(config.target),
        *_prompts(config.prompts),
        *_teacher_cache(config.teacher_cache),
        *_answer_rows(config),
        *_draft(config.draft),
        *_train(config.train),
        *_features(config),
        *_export(config),
        *_serve(config.serve),
        *_registered_draft(config.serve, config.export.path),
        *_bench(config.bench, is_on_hosts=uses_hosts(config.mesh)),
        *_hosts(config),
    ]
    if broken:
        raise PipelineError("configuration: " + "\n  ".join(broken))


def _field_rules(config: PipelineConfig) -> list[str]:
    """Returns the broken rules that fields declare themselves; a value that is None breaks none."""
    return [
        f"{leaf.name} is {_shown(leaf.value)}; it must be {leaf.declaration.rule.text}"
        for leaf in fields.leaves(config)
        if leaf.declaration.rule and leaf.value is not None and not leaf.declaration.rule.holds(leaf.value)
    ]


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, str) else str(value)


def _target(target: TargetConfig) -> list[str]:
    broken = []
    is_trained = target.pretrain is not None and target.architecture is not None
    if target.path is None and target.pretrained is None and target.gguf is None and not is_trained:
        broken.append(
            "target.path is null; give a GPT-OSS model's directory or hub id, or a GGUF file as target.gguf, or choose "
            "target=tiny"
        )
    if target.path is not None and target.path.lower().endswith(GGUF) and not Path(target.path).is_dir():
        broken.append(f"target.path is {target.path}, a GGUF file; write target.gguf={target.path}")
    if target.revision is not None and target.path is None:
        broken.append(f"target.revision is {target.revision}; it goes with a hub id in target.path")
    if target.adapter is not None and target.path is None:
        broken.append(f"target.adapter is {target.adapter}; it goes with the model in target.path")
    if target.gguf is not None and target.path is not None:
        broken.append(f"target.gguf is {target.gguf} and target.path is {target.path}; give one: target.path=null")
    if target.gguf is not None and target.pretrain is not None:
        broken.append(
            f"target.gguf is {target.gguf}, and target.pretrain trains a model; choose target=local for a file of "
            "GPT-OSS, or target=smollm2 for SmolLM2's"
        )
    return broken + (_architecture(target.architecture) if target.architecture is not None else [])


def _architecture(sizes: ArchitectureConfig) -> list[str]:
    broken = []
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
    return broken


def _prompts(prompts: PromptsConfig) -> list[str]:
    broken = []
    if prompts.source is PromptSource.jsonl and prompts.path is None:
        broken.append("prompts.path is null; prompts.source=jsonl needs a file")
    if prompts.source is PromptSource.dataset and prompts.dataset is None:
        broken.append("prompts.dataset is null; prompts.source=dataset needs a name")
    fields_of = {
        PromptSource.jsonl: ("path",),
        PromptSource.dataset: ("dataset", "dataset_subset", "dataset_revision"),
    }
    for source, names in fields_of.items():
        for name in names if prompts.source is not source else ():
            if (value := getattr(prompts, name)) is not None:
                broken.append(
                    f"prompts.{name} is {value}, but prompts.source is {prompts.source.value}, which does not read it; "
                    f"set prompts.source={source.value}"
                )
    mix = prompts.effort_mix
    is_mix = mix.keys() <= MIXED_EFFORTS and all(0 <= part < math.inf for part in mix.values())
    if not is_mix or (prompts.effort is Effort.mixed and not sum(mix.values())):
        broken.append(
            f"prompts.effort_mix is {mix}; it must give low, medium or high shares of at least 0, one above it"
        )
    return broken


def _teacher_cache(cache: TeacherCacheConfig) -> list[str]:
    broken = []
    if cache.generator is Generator.openai and (cache.openai.url is None or cache.openai.model is None):
        values = f"url is {cache.openai.url}, model is {cache.openai.model}"
        broken.append(f"teacher_cache.openai: {values}; teacher_cache.generator=openai needs both")
    if cache.generator is not Generator.openai and (cache.openai.url or cache.openai.model):
        broken.append(
            f"teacher_cache.openai names an endpoint, but teacher_cache.generator is {cache.generator.value}, which "
            "asks none; set teacher_cache.generator=openai"
        )
    if cache.openai.url is not None and not _is_plain_url(cache.openai.url):
        broken.append(
            "teacher_cache.openai.url is no plain address; it must be such as http://localhost:8000/v1, without user, "
            "password or query: the key goes in the environment variable named by teacher_cache.openai.api_key_env"
        )
    if cache.draft is not None and cache.generator is not Generator.engine:
        broken.append(
            f"teacher_cache.draft is {cache.draft}; it is for answers of our engine: teacher_cache.generator is "
            f"{cache.generator.value}"
        )
    if cache.writer >= cache.num_writers:
        broken.append(f"teacher_cache.writer is {cache.writer}; it must be 0 to teacher_cache.num_writers - 1")
    return broken


def _answer_rows(config: PipelineConfig) -> list[str]:
    source = config.prompts.source
    if config.teacher_cache.generator is not Generator.given or source in (PromptSource.jsonl, PromptSource.dataset):
        return []
    return [
        f"prompts.source is {source.value}; teacher_cache.generator=given takes the answers at the end of rows: choose "
        "prompts.source=jsonl or prompts.source=dataset"
    ]


def _is_plain_url(url: str) -> bool:
    parts = urllib.parse.urlsplit(url)
    is_secretive = parts.username is not None or parts.password is not None or parts.query or parts.fragment
    return parts.scheme in ("http", "https") and bool(parts.hostname) and not is_secretive


def _draft(draft: DraftConfig) -> list[str]:
    heads, groups = draft.num_attention_heads, draft.num_key_value_heads
    if heads is not None and groups is not None and heads % groups:
        return [f"draft.num_attention_heads is {heads}; it must be a multiple of draft.num_key_value_heads ({groups})"]
    return []


def _train(train: TrainConfig) -> list[str]:
    broken = []
    if train.final_learning_rate > train.learning_rate:
        broken.append(
            f"train.final_learning_rate is {train.final_learning_rate}; it must be 0 to train.learning_rate "
            f"({train.learning_rate})"
        )
    if train.batch_sequences % train.accumulation:
        broken.append(
            f"train.accumulation is {train.accumulation}; it must divide train.batch_sequences "
            f"({train.batch_sequences})"
        )
    if train.loss_decay is not None and train.loss_weights is not LossWeights.decay:
        broken.append(
            f"train.loss_decay is {train.loss_decay}; train.loss_weights={train.loss_weights.value} does not read it: "
            "choose train.loss_weights=decay, or set it to null"
        )
    if train.init_revision is not None and train.init is None:
        broken.append(f"train.init_revision is {train.init_revision}; it goes with a hub id in train.init")
    return broken


def _features(config: PipelineConfig) -> list[str]:
    """Returns the broken rules that depend on whether features come from the cache or from the live target."""
    train, broken = config.train, []
    if train.features is FeatureSource.cached:
        if config.teacher_cache.features is FeatureStore.none:
            broken.append("teacher_cache.features is none; train.features=cached reads them: store them, or train live")
        if train.distillation:
            broken.append(
                f"train.distillation is {train.distillation}; the target's distribution is not stored: it needs "
                "train.features=live"
            )
        return broken
    if uses_hosts(config.mesh) and config.stage is Stage.train:
        broken.append("train.features is live; several hosts train on cached features: make a cache, or use one host")
    if train.pack_tokens is not None:
        broken.append(
            f"train.pack_tokens is {train.pack_tokens}; the target reads one sequence a row: leave it null with "
            "train.features=live"
        )
    return broken


def _export(config: PipelineConfig) -> list[str]:
    exported, broken = config.export.path, []
    if exported and "://" in exported:
        broken.append(f"export.path is {exported}; a draft is written to a disk and served from one: give a directory")
    if config.stage in (Stage.export, Stage.all) and exported and "dflash" not in Path(exported).name.lower():
        broken.append(f"export.path is {exported}; its last part must contain dflash, by which vLLM knows the method")
    return broken


def _serve(serve: ServeConfig) -> list[str]:
    broken = []
    if (serve.tls_certificate is None) != (serve.tls_key is None):
        broken.append(
            "serve.tls_certificate and serve.tls_key name the two files of a certificate; set both or neither"
        )
    others = [f"serve.{name}" for name in ("gateway", "engine_args", "dry_run") if getattr(serve, name)]
    if serve.engine is EngineName.own and others:
        broken.append(
            f"{', '.join(others)} is set, but serve.engine is own, which starts no other program; choose serve.engine"
        )
    if serve.plain_url is not None and not serve.gateway:
        broken.append(f"serve.plain_url is {serve.plain_url}; only serve.gateway=true sends requests there: set it too")
    return broken


def _registered_draft(serve: ServeConfig, export_path: str | None) -> list[str]:
    if serve.draft is None:
        return []
    broken = []
    if serve.engine is not EngineName.own or serve.mode is ServeMode.plain or serve.compare:
        broken.append(f"serve.draft is {serve.draft}; it is for this project's own engine, with its draft, alone")
    if export_path is not None:
        broken.append(f"serve.draft is {serve.draft} and export.path is {export_path}; give one")
    return broken


def _bench(bench: BenchConfig, *, is_on_hosts: bool) -> list[str]:
    broken = []
    if (bench.plain_url is None) != (bench.dflash_url is None):
        found = "bench.plain_url" if bench.dflash_url is None else "bench.dflash_url"
        return [f"{found} is set alone; it must come with the other arm's address"]
    own = ("temperature", "profile_slots", "block_sizes", "adaptive")
    used = [f"bench.{name}" for name in own if getattr(bench, name)]
    if bench.plain_url is not None and used:
        broken.append(f"bench.plain_url is set; {', '.join(used)} is for this process's own engines: leave it out")
    if bench.dflash_log is not None and bench.dflash_url is None:
        broken.append(
            f"bench.dflash_log is {bench.dflash_log}; it is the log of the server at bench.dflash_url: set both"
        )
    if is_on_hosts and (bench.interval is not None or bench.request_rates):
        broken.append(
            "bench.interval and bench.request_rates follow the clock; several hosts run the same steps: leave them out"
        )
    if bench.max_repeats < bench.repeats:
        broken.append(f"bench.max_repeats is {bench.max_repeats}; it must be at least bench.repeats ({bench.repeats})")
    return broken


def _hosts(config: PipelineConfig) -> list[str]:
    if not uses_hosts(config.mesh) or config.stage in ON_HOSTS:
        return []
    stage, allowed = config.stage and config.stage.value, ", ".join(f"stage={stage.value}" for stage in ON_HOSTS)
    return [f"stage is {stage}; several hosts (mesh.hosts, mesh.coordinator) run {allowed}"]
