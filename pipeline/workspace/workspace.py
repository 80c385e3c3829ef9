"""Where the artifacts of a configuration live, what made them, and what their contracts must say.

An artifact's address is computed from the settings that decide its bytes and from its parents'
fingerprints, so each stage finds what the stage before it made under the same overrides.
"""

import dataclasses
import functools
import json
import urllib.parse
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pipeline import artifacts, hub, places
from pipeline.artifacts import Artifact, PipelineError
from pipeline.config import (
    ArchitectureConfig,
    Effort,
    FeatureSource,
    FeatureStore,
    Generator,
    PipelineConfig,
    PromptSource,
    plain,
)
from pipeline.dflash.blocks import default_tapped_layers
from pipeline.dflash.contract import (
    Contract,
    DraftIdentity,
    FeatureIdentity,
    TargetIdentity,
    TextIdentity,
    require_match,
)
from pipeline.model import checkpoints, hf_draft
from pipeline.model.draft import DraftConfig
from pipeline.model.gpt_oss_config import GptOssConfig
from pipeline.model.rope import Rope
from pipeline.places import Place
from pipeline.prompts import sources
from pipeline.prompts import tokenizer as tokenizers_of_ours
from pipeline.prompts.efforts import EffortMix

GENERATED_PROMPTS = 3072  # of sources without an end
REMEMBERED = "sha256.json"  # of large files, under output_dir
TARGET, TEACHER_CACHE, CHECKPOINT, DRAFT = "target", "teacher_cache", "checkpoint", "draft"
DRAFT_CONFIG, DATA = "draft_config.json", "data.json"  # in a checkpoint
EVALUATION = "evaluation.json"  # in a checkpoint and in a draft


@dataclasses.dataclass(frozen=True)
class Target:
    """A target on disk: its HF directory, its contract and the fingerprint its children carry."""

    path: Path
    contract: Contract
    fingerprint: str


def architecture(sizes: ArchitectureConfig) -> GptOssConfig:
    """The model of these sizes: sliding and full layers in turn, YaRN as GPT-OSS has it."""
    return GptOssConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_key_value_heads,
        head_dim=sizes.head_dim,
        num_local_experts=sizes.num_local_experts,
        num_experts_per_tok=sizes.num_experts_per_tok,
        sliding_window=sizes.sliding_window,
        sliding=tuple(index % 2 == 0 for index in range(sizes.num_hidden_layers)),
        rope=Rope(
            theta=sizes.rope_theta,
            factor=sizes.max_position_embeddings / sizes.rope_positions,
            original_max_position_embeddings=sizes.rope_positions,
            truncate=False,
        ),
        max_position_embeddings=sizes.max_position_embeddings,
    )


def target_settings(config: PipelineConfig) -> dict[str, Any]:
    """What decides the bytes of a target that `stage=target` trains or converts."""
    if config.target.pretrained is not None:
        return {"gguf_sha256": config.target.pretrained.sha256, "precision": "float32"}
    made = {name: plain(getattr(config.target, name)) for name in ("architecture", "pretrain")}
    return {**made, "seed": config.seed, "precision": "float32"}


def target_address(config: PipelineConfig) -> Path:
    """Where `stage=target` puts the target it makes."""
    return artifacts.address(Path(config.output_dir), TARGET, config.target.name, target_settings(config))


def target_contract(
    directory: Path, config: PipelineConfig, provenance: dict[str, Any], revision: str | None = None
) -> Contract:
    """The contract of the HF directory of a target: everything fingerprinted, features and draft open."""
    return Contract(
        target=TargetIdentity(
            name=config.target.name,
            revision=revision,
            config_fingerprint=checkpoints.config_fingerprint(directory),
            weights_fingerprint=checkpoints.weights_fingerprint(directory, _memory(config)),
            weight_precision=config.target.precision.value,
        ),
        text=TextIdentity(
            tokenizer_fingerprint=tokenizers_of_ours.fingerprint(directory),
            chat_template_fingerprint=tokenizers_of_ours.chat_template_fingerprint(directory),
        ),
        provenance=provenance,
    )


def target(config: PipelineConfig) -> Target:
    """The target of this configuration: the directory given by `target.path`, or the one made here."""
    if config.target.path is not None:
        directory, revision = hub.directory_of(config.target.path, config.target.revision, key="target.path")
        _require_architecture(directory, config.target.architecture)
        contract = target_contract(directory, config, {}, revision)
        return Target(directory, contract, artifacts.fingerprint_of(contract.to_json()))
    made = artifacts.read(target_address(config), TARGET, make_with=command("target"))
    contract = Contract.from_json(made.contract)
    served = dataclasses.replace(contract.target, weight_precision=config.target.precision.value)
    return Target(made.path, dataclasses.replace(contract, target=served), made.fingerprint)


def _require_architecture(directory: Path, sizes: ArchitectureConfig | None) -> None:
    """Raise PipelineError naming every size in which a checkpoint is not the model that was chosen."""
    if sizes is None:
        return
    values = checkpoints.read_config(directory)
    found, wanted = GptOssConfig.from_hf(values), architecture(sizes)
    wrong = [
        f"{field.name}: found {getattr(found, field.name)}, wanted {getattr(wanted, field.name)}"
        for field in dataclasses.fields(wanted)
        if getattr(found, field.name) != getattr(wanted, field.name)
    ]
    if wrong:
        listed = "\n  ".join(wrong)
        raise PipelineError(
            f"{directory} is not the model of target.architecture; choose target=local for another one\n  {listed}"
        )


def mask_token_id(directory: Path, config: PipelineConfig, vocab_size: int) -> int:
    """The id of `draft.mask_token`, which must be an existing row of the target's embedding."""
    file = directory / "tokenizer.json"
    found = _token_id(file, file.stat().st_mtime_ns, config.draft.mask_token)
    if found is None or found >= vocab_size:
        raise PipelineError(
            f"draft.mask_token {config.draft.mask_token!r} has id {found} in {directory}/tokenizer.json; wanted a "
            f"token below the target's vocabulary of {vocab_size}; set draft.mask_token to a reserved token"
        )
    return found


@functools.cache  # every address and contract downstream asks, and GPT-OSS's tokenizer takes seconds to read
def _token_id(tokenizer: Path, changed_ns: int, token: str) -> int | None:
    return Tokenizer.from_file(str(tokenizer)).token_to_id(token)


def draft_config(config: PipelineConfig, target: Target) -> DraftConfig:
    """The draft of this configuration for this target; raises PipelineError as `draft_sizes` does.

    With `train.init` it is that draft, whatever `draft` says: biases, RoPE and block size belong to its weights.
    """
    model = GptOssConfig.from_hf(checkpoints.read_config(target.path))
    begun_with = initial_draft(config)
    if begun_with is not None:
        return _fitting(checkpoints.read_draft_config(begun_with), model, begun_with)
    return draft_sizes(config, model, mask_token_id(target.path, config, model.vocab_size))


def initial_draft(config: PipelineConfig) -> Path | None:
    """The directory of the draft that `train.init` names."""
    if config.train.init is None:
        return None
    return _directory_of_draft(config.train.init, config.train.init_revision)


@functools.cache  # as above; and the hub is asked once a command
def _directory_of_draft(name: str, revision: str | None) -> Path:
    return hub.directory_of(name, revision, key="train.init")[0]


def _fitting(draft: DraftConfig, model: GptOssConfig, directory: Path) -> DraftConfig:
    """The draft in `directory` if it is one for this model; PipelineError listing what does not fit."""
    pairs = {
        "hidden_size": (draft.hidden_size, model.hidden_size),
        "vocab_size": (draft.vocab_size, model.vocab_size),
        "num_target_layers": (draft.num_target_layers, model.num_hidden_layers),
    }
    wrong = [f"{name}: found {found}, wanted {wanted}" for name, (found, wanted) in pairs.items() if found != wanted]
    if wrong:
        listed = "\n  ".join(wrong)
        raise PipelineError(
            f"train.init {directory} is not a draft for this target; give one that was trained for it\n  {listed}"
        )
    return draft


def draft_sizes(config: PipelineConfig, model: GptOssConfig, mask_token_id: int) -> DraftConfig:
    """The draft of this configuration for a model. Raises PipelineError on layers that cannot be tapped."""
    wanted = config.draft
    tapped = wanted.tapped_layers or default_tapped_layers(model.num_hidden_layers, wanted.num_tapped_layers)
    outside = [layer for layer in tapped if not 0 <= layer < model.num_hidden_layers - 1]
    if outside:
        raise PipelineError(
            f"draft.tapped_layers has {outside}; a target of {model.num_hidden_layers} layers can be tapped at "
            f"0..{model.num_hidden_layers - 2} (the last layer's output never leaves other runtimes un-normalised)"
        )
    return DraftConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=wanted.intermediate_size,
        num_hidden_layers=wanted.num_hidden_layers,
        num_attention_heads=wanted.num_attention_heads,
        num_key_value_heads=wanted.num_key_value_heads,
        head_dim=wanted.head_dim,
        rope=Rope(theta=wanted.rope_theta),
        tapped_layers=tuple(tapped),
        num_target_layers=model.num_hidden_layers,
        block_size=wanted.block_size,
        mask_token_id=mask_token_id,
        rms_norm_eps=model.rms_norm_eps,
        max_position_embeddings=model.max_position_embeddings,
    )


def prompt_set(config: PipelineConfig) -> sources.PromptSet:
    """The prompts of this configuration."""
    prompts, effort = config.prompts, _effort(config)
    if prompts.source is PromptSource.jsonl:
        return sources.limited(sources.from_jsonl(Path(prompts.path), effort), prompts.count)
    if prompts.source is PromptSource.dataset:
        found = sources.from_dataset(
            prompts.dataset,
            prompts.dataset_split,
            prompts.column,
            effort,
            subset=prompts.dataset_subset,
            revision=prompts.dataset_revision,
        )
        return sources.limited(found, prompts.count)
    generate = sources.everyday if prompts.source is PromptSource.everyday else sources.generated
    return generate(config.seed, prompts.count or GENERATED_PROMPTS, effort)


def _effort(config: PipelineConfig) -> str | EffortMix:
    prompts = config.prompts
    return EffortMix(config.seed, prompts.effort_mix) if prompts.effort is Effort.mixed else prompts.effort.value


def default_effort(config: PipelineConfig) -> str:
    """The effort of a request that names none: the one of the prompts, or under a mix the template's own default."""
    return Effort.medium.value if config.prompts.effort is Effort.mixed else config.prompts.effort.value


def cache_contract(config: PipelineConfig, target: Target, provenance: dict[str, Any]) -> Contract:
    """The contract of a teacher cache: the target's, the efforts rendered and the layers tapped.

    Which efforts a mix has drawn, or rows of a file or dataset have brought, only the prompts themselves tell.
    """
    generated = config.prompts.source in (PromptSource.generated, PromptSource.everyday)
    efforts = [config.prompts.effort.value] if generated and config.prompts.effort is not Effort.mixed else None
    tapped = list(draft_config(config, target).tapped_layers)
    return dataclasses.replace(
        target.contract,
        text=dataclasses.replace(target.contract.text, reasoning_efforts=efforts),
        features=FeatureIdentity(tapped_layers=tapped),
        provenance=provenance,
    )


def draft_contract(config: PipelineConfig, target: Target, provenance: dict[str, Any]) -> Contract:
    """The contract of a draft of this configuration: the cache's and the draft's own part."""
    draft = draft_config(config, target)
    identity = draft_identity(draft)
    return dataclasses.replace(cache_contract(config, target, provenance), draft=identity)


def draft_identity(draft: DraftConfig) -> DraftIdentity:
    """The draft's part of a contract."""
    return DraftIdentity(
        block_size=draft.block_size,
        mask_token_id=draft.mask_token_id,
        architecture=json.loads(json.dumps(draft.architecture())),
        rope=draft.rope.to_hf(),
    )


def teacher_cache_settings(config: PipelineConfig, target: Target) -> dict[str, Any]:
    """What decides the bytes of a teacher cache."""
    prompts, memory = plain(config.prompts), _memory(config)
    if config.prompts.path is not None:
        file = Path(config.prompts.path)
        if not file.is_file():
            raise PipelineError(f"prompts.path is {file}, which is no file; give a JSONL file of prompts")
        prompts["path"] = artifacts.remembered_sha256(file, memory)
    if config.prompts.dataset is not None and Path(config.prompts.dataset).exists():
        prompts["dataset"] = _content(Path(config.prompts.dataset), memory)
    if config.prompts.effort is not Effort.mixed:
        del prompts["effort_mix"]
    cache = plain(config.teacher_cache) | {"features": feature_store(config).value}
    for key in ("path", "verify", "writer", "num_writers", "openai"):  # where, by whom, how thoroughly checked
        del cache[key]
    if config.teacher_cache.generator is Generator.openai:
        asked = plain(config.teacher_cache.openai)
        cache["openai"] = {"host": host_of(asked["url"]), **{key: asked[key] for key in ("model", "api", "extra")}}
    return {
        "target": target.fingerprint,
        "precision": config.target.precision.value,
        "prompts": prompts,
        "teacher_cache": cache,
        "tapped_layers": list(draft_config(config, target).tapped_layers),
        "seed": config.seed,
    }


def _memory(config: PipelineConfig) -> Path:
    return Path(config.output_dir) / REMEMBERED


def _content(path: Path, memory: Path) -> str:
    """sha256 of a file, or of the names and sha256s of a directory's files; `memory` as in `remembered_sha256`."""
    if path.is_file():
        return artifacts.remembered_sha256(path, memory)
    return artifacts.fingerprint_of(
        {name: artifacts.remembered_sha256(path / name, memory) for name in places.files(path)}
    )


def host_of(url: str) -> str:
    """The host of a URL and its port, where one is given."""
    parts = urllib.parse.urlsplit(url)
    return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)


def feature_store(config: PipelineConfig) -> FeatureStore:
    """How this configuration's teacher cache keeps features."""
    given = config.teacher_cache.features
    is_live = config.train.features is FeatureSource.live
    return given or (FeatureStore.none if is_live else FeatureStore.bfloat16)


def teacher_cache_address(config: PipelineConfig, target: Target) -> Place:
    """Where the teacher cache of this configuration lives: a directory, or a place in a bucket."""
    if config.teacher_cache.path is not None:
        return places.place_of(config.teacher_cache.path)
    settings = teacher_cache_settings(config, target)
    return artifacts.address(Path(config.output_dir), TEACHER_CACHE, config.target.name, settings)


def teacher_cache(config: PipelineConfig, target: Target) -> Artifact:
    """The complete teacher cache of this configuration, its contract compared with what is wanted."""
    made = artifacts.read(teacher_cache_address(config, target), TEACHER_CACHE, make_with=command("teacher_cache"))
    _require(made, cache_contract(config, target, {}), "teacher_cache")
    return made


def checkpoint_settings(config: PipelineConfig, target: Target, cache_fingerprint: str) -> dict[str, Any]:
    """What decides the bytes of a trained checkpoint."""
    train = plain(config.train)
    del train["path"], train["log_steps"], train["init_revision"]
    begun_with = initial_draft(config)
    if begun_with is not None:
        train["init"] = checkpoints.weights_fingerprint(begun_with, _memory(config))
    draft = dataclasses.asdict(draft_identity(draft_config(config, target)))
    return {"teacher_cache": cache_fingerprint, "draft": draft, "train": train, "seed": config.seed}


def checkpoint_address(config: PipelineConfig, target: Target) -> Place:
    """Where the trained checkpoint of this configuration lives; one that was copied to a bucket is read from there."""
    if config.train.path is not None:
        return places.place_of(config.train.path)
    settings = checkpoint_settings(config, target, teacher_cache(config, target).fingerprint)
    return artifacts.address(Path(config.output_dir), CHECKPOINT, config.target.name, settings)


def checkpoint(config: PipelineConfig, target: Target) -> Artifact:
    """The trained checkpoint of this configuration, its contract compared with what is wanted."""
    made = artifacts.read(checkpoint_address(config, target), CHECKPOINT, make_with=command("train"))
    _require(made, draft_contract(config, target, {}), "train")
    return made


def export_settings(config: PipelineConfig, checkpoint_fingerprint: str) -> dict[str, Any]:
    """What decides the bytes of an exported draft; its tolerance decides whether there is one."""
    return {"checkpoint": checkpoint_fingerprint, "dtype": "bfloat16", "num_prompts": config.export.num_prompts}


def export_address(config: PipelineConfig, target: Target) -> Path:
    """Where the exported draft of this configuration lives; `dflash` in the name is how vLLM knows it."""
    if config.export.path is not None:
        return Path(config.export.path)
    settings = export_settings(config, checkpoint(config, target).fingerprint)
    return artifacts.address(Path(config.output_dir), DRAFT, f"{config.target.name}-dflash", settings)


def exported_draft(config: PipelineConfig, target: Target) -> Artifact:
    """The exported draft of this configuration, its contract compared with the target's.

    With `export.path` any exported draft may be served: what the draft is comes from its own contract, and
    only what it shares with the target (weights, tokenizer, template) is compared.
    """
    made = artifacts.read(export_address(config, target), DRAFT, make_with=command("export"))
    given = config.export.path is not None
    wanted = target.contract if given else draft_contract(config, target, {})
    _require(made, wanted, "export")
    own_draft_config(made)
    return made


def own_draft_config(made: Artifact) -> DraftConfig:
    """The draft of a checkpoint or of an exported draft, as the artifact's own config file describes it.

    Raises PipelineError when the artifact's contract describes another one: runtimes read the file alone.
    """
    name, stage = (DRAFT_CONFIG, "train") if made.kind == CHECKPOINT else ("config.json", "export")
    if name not in made.files:
        raise PipelineError(f"{made.path} holds no {name}; delete it and run: {command(stage)}")
    draft = hf_draft.config_from_hf(json.loads((made.path / name).read_text()))
    contract = Contract.from_json(made.contract)
    features = FeatureIdentity(tapped_layers=list(draft.tapped_layers))
    require_match(
        dataclasses.replace(contract, features=features, draft=draft_identity(draft)),
        contract,
        what=f"{made.path / name}",
        mend=f"the file was changed after it was made; delete {made.path} and run: {command(stage)}",
    )
    return draft


def command(stage: str) -> str:
    """The command that makes a stage's artifact."""
    return f"python -m pipeline stage={stage} (with the same overrides)"


def _require(made: Artifact, wanted: Contract, stage: str) -> None:
    require_match(
        Contract.from_json(made.contract),
        wanted,
        what=f"{made.kind} at {made.path}",
        mend=f"use the settings it was made with, or make one that fits: {command(stage)}",
    )
