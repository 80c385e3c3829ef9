"""The values that a setting chooses from."""

import enum


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


class ReasoningEffort(enum.Enum):
    """Harmony reasoning effort of one request."""

    low = "low"
    medium = "medium"
    high = "high"


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
    """How block positions are weighted: `decay` by `train.loss_decay`, `dpace` by what the draft gets right itself."""

    decay = "decay"
    dpace = "dpace"


class Optimizer(enum.Enum):
    """Which optimizer updates the matrices: AdamW, or Muon (norms and biases are AdamW's in any case)."""

    adamw = "adamw"
    muon = "muon"


class ServeMode(enum.Enum):
    """Which decoding arm a server runs."""

    dflash = "dflash"
    plain = "plain"
