"""Collects the settings that decide the bytes of each artifact, from which its key is computed.

Every field of the schema names the artifacts that it decides. What comes from outside is replaced by its content
(a prompt file by its sha256, a hub's data set by its commit), and what follows from several fields by what it comes to.
"""

import dataclasses
import hashlib
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import hub
from pipeline.artifacts import storage
from pipeline.artifacts.contract import DraftIdentity
from pipeline.artifacts.hashing import fingerprint_of, remembered_sha256
from pipeline.config import fields
from pipeline.config.choices import Effort, FeatureSource, FeatureStore, Generator, PromptSource
from pipeline.config.fields import CHECKPOINT, DRAFT, TARGET, TEACHER_CACHE
from pipeline.config.schema import PipelineConfig, PromptsConfig, TargetConfig, plain
from pipeline.prompts import files
from pipeline.workspace import gguf_parts

# raised when the program makes other bytes of equal settings, or keys are computed otherwise
VERSIONS = {TARGET: 3, TEACHER_CACHE: 2, CHECKPOINT: 2, DRAFT: 2}  # target 3: config.json has both spellings of RoPE
PRETRAIN_RECIPE = 2  # raised when a target is trained otherwise; 2: Muon, steps written out, letters as tokens
GIVEN_TARGET_VERSION = 2  # of a target from outside, whose bytes are nobody's here: only how its key is computed
PARENT = {TEACHER_CACHE: TARGET, CHECKPOINT: TEACHER_CACHE, DRAFT: CHECKPOINT}


def declared(config: Any, kind: str) -> dict[str, Any]:
    """Returns every field that decides the bytes of `kind`, by dotted name, except those with their `unset` value."""
    return {
        leaf.name: plain(leaf.value)
        for leaf in fields.leaves(config)
        if kind in leaf.declaration.kinds and plain(leaf.value) != plain(leaf.declaration.unset)
    }


def target_settings(config: PipelineConfig, memory: Path | None = None) -> dict[str, Any]:
    """Returns what decides the bytes of a target that `stage=target` trains or converts."""
    target = config.target
    if target.pretrained is not None:
        found = declared(config, TARGET)
        return {name: value for name, value in found.items() if name.startswith("target.pretrained.")}
    if target.gguf is not None:
        return {"target.gguf": gguf_parts.content_sha256(Path(target.gguf), memory)}
    if is_shipped(target):
        assert target.pretrain is not None, "is_shipped has looked"
        return {"target.pretrain.sha256": target.pretrain.sha256}
    return pretrain_settings(config)


def pretrain_settings(config: PipelineConfig) -> dict[str, Any]:
    """Returns what decides the bytes of a target that is trained from scratch."""
    return declared(config, TARGET) | {"target.pretrain.recipe": PRETRAIN_RECIPE}


def pretrain_recipe(config: PipelineConfig) -> dict[str, Any]:
    """Returns how a target is trained from scratch, whatever the seed."""
    return {name: value for name, value in pretrain_settings(config).items() if name != "seed"}


def is_shipped(target: TargetConfig) -> bool:
    """Returns whether the package's trained target is taken and nothing trained."""
    pretrain = target.pretrain
    return target.path is None and pretrain is not None and pretrain.sha256 is not None and not pretrain.from_scratch


def teacher_cache_settings(
    config: PipelineConfig, tapped_layers: tuple[int, ...], prompts: Mapping[str, Any], draft: str | None
) -> dict[str, Any]:
    """Returns what decides the bytes of a teacher cache; `prompts` is `prompt_content`.

    `draft` is the sha256 of the weights that decode with the target, if any do: in bfloat16 they may settle a tie.
    """
    found = declared(config, TEACHER_CACHE)
    del found["teacher_cache.draft"]
    if draft is not None:
        found["teacher_cache.draft"] = draft
    del found["draft.num_tapped_layers"]
    found |= {"draft.tapped_layers": list(tapped_layers), "teacher_cache.features": feature_store(config).value}
    endpoint = {name: found.pop(name) for name in list(found) if name.startswith("teacher_cache.openai.")}
    if config.teacher_cache.generator is Generator.openai:
        endpoint["teacher_cache.openai.url"] = host_of(endpoint["teacher_cache.openai.url"])
        found |= endpoint
    if config.prompts.effort is not Effort.mixed:
        del found["prompts.effort_mix"]
    return {**found, **prompts}


def prompt_content(prompts: PromptsConfig, memory: Path | None) -> dict[str, Any]:
    """Returns what identifies prompts that come from outside: a file's sha256, a data set's sha256s or commit."""
    if prompts.source is PromptSource.jsonl:
        assert prompts.path is not None, "a rule of the configuration"
        sha256s = [_file_sha256(file, memory) for file in files.prompt_files(prompts.path)]
        return {"prompts.path": sha256s[0] if len(sha256s) == 1 else fingerprint_of(sha256s)}
    if prompts.source is PromptSource.dataset:
        assert prompts.dataset is not None, "a rule of the configuration"
        path = Path(prompts.dataset)
        if path.exists():
            return {"prompts.dataset": content_sha256(path, memory)}
        return {"prompts.dataset_revision": hub.dataset_commit(prompts.dataset, prompts.dataset_revision)}
    return {}


def _file_sha256(file: Path, memory: Path | None) -> str:
    if file == files.STANDARD_INPUT:
        return hashlib.sha256(files.standard_input()).hexdigest()
    return remembered_sha256(file, memory)


def content_sha256(path: Path, memory: Path | None) -> str:
    """Returns the sha256 of a file, or of the names and sha256s of a directory's files."""
    if path.is_file():
        return remembered_sha256(path, memory)
    return fingerprint_of({name: remembered_sha256(path / name, memory) for name in storage.list_files(path)})


def checkpoint_settings(config: PipelineConfig, draft: DraftIdentity, initial: str | None) -> dict[str, Any]:
    """Returns what decides the bytes of a checkpoint; `initial` is the sha256 of the weights of `train.init`."""
    found = {name: value for name, value in declared(config, CHECKPOINT).items() if not name.startswith("draft.")}
    identity = {f"draft.{name}": value for name, value in dataclasses.asdict(draft).items()}
    return found | {"train.init": initial} | identity


def draft_settings(config: PipelineConfig) -> dict[str, Any]:
    """Returns what decides the bytes of an exported draft."""
    return declared(config, DRAFT)


def feature_store(config: PipelineConfig) -> FeatureStore:
    """Returns how this configuration's teacher cache keeps features."""
    is_live = config.train.features is FeatureSource.live
    return config.teacher_cache.features or (FeatureStore.none if is_live else FeatureStore.bfloat16)


def endpoint_host(config: PipelineConfig) -> str | None:
    """Returns the host of the endpoint that answers; None where our engine does."""
    cache = config.teacher_cache
    return host_of(str(cache.openai.url)) if cache.generator is Generator.openai else None


def answer_rows(config: PipelineConfig) -> str | None:
    """Returns the name of the file or dataset whose rows hold the answers; None where somebody else answers."""
    if config.teacher_cache.generator is not Generator.given:
        return None
    prompts = config.prompts
    if prompts.source is PromptSource.dataset:
        return f"dataset {prompts.dataset}"
    return "the standard input" if prompts.path == str(files.STANDARD_INPUT) else str(prompts.path)


def host_of(url: str) -> str:
    """Returns the host of a URL and its port, where one is given."""
    parts = urllib.parse.urlsplit(url)
    return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)
