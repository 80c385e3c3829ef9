"""Lists the values that settings choose from."""

import enum


class Stage(enum.Enum):
    """Lists the stages, in the order in which `all` runs its own."""

    target = "target"
    teacher_cache = "teacher_cache"
    train = "train"
    export = "export"
    serve = "serve"
    bench = "bench"
    plan = "plan"
    report = "report"
    promote = "promote"
    ask = "ask"
    compile = "compile"
    roofline = "roofline"
    feasibility = "feasibility"
    peer = "peer"
    train_peer = "train_peer"
    smoke = "smoke"
    all = "all"


class Precision(enum.Enum):
    """Names the compute and weight precision of a model."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class ExpertWeights(enum.Enum):
    """Says how experts are held: packed as published, or expanded to floats of `target.precision` when read."""

    mxfp4 = "mxfp4"
    bf16 = "bf16"


class Effort(enum.Enum):
    """Names a Harmony reasoning effort; `mixed` draws one for each prompt from `prompts.effort_mix`."""

    low = "low"
    medium = "medium"
    high = "high"
    mixed = "mixed"


class ReasoningEffort(enum.Enum):
    """Names the Harmony reasoning effort of one request."""

    low = "low"
    medium = "medium"
    high = "high"


class PromptSource(enum.Enum):
    """Says where prompts come from: `generated` is the tiny target's corpus, `everyday` is in plain English."""

    generated = "generated"
    everyday = "everyday"
    jsonl = "jsonl"
    dataset = "dataset"


class PromptShape(enum.Enum):
    """Says which fields of a row are read: docs/guide/data.md has the table."""

    prompt = "prompt"
    messages = "messages"
    sharegpt = "sharegpt"
    alpaca = "alpaca"


class OnBadRow(enum.Enum):
    """Says what becomes of a row that cannot be read: it is counted and left out, or nothing is read."""

    skip = "skip"
    error = "error"


class Generator(enum.Enum):
    """Says who answers for a teacher cache: our engine, an OpenAI-compatible endpoint with the target, or nobody.

    `given`: the rows of the prompts end with answers that the target wrote earlier.
    """

    engine = "engine"
    openai = "openai"
    given = "given"


class OpenAIApi(enum.Enum):
    """Says what an endpoint gets: `chat` sends messages for text, `completions` sends tokens for tokens."""

    chat = "chat"
    completions = "completions"


class FeatureStore(enum.Enum):
    """Says how a teacher cache stores features: as served, as int8 with a scale per token, or not at all."""

    bfloat16 = "bfloat16"
    int8 = "int8"
    none = "none"


class FeatureSource(enum.Enum):
    """Says where training takes features from: the teacher cache, or the frozen target inside the training job."""

    cached = "cached"
    live = "live"


class LossWeights(enum.Enum):
    """Says how block positions are weighted: `decay` by `train.loss_decay`, `dpace` by what the draft gets right."""

    decay = "decay"
    dpace = "dpace"


class Optimizer(enum.Enum):
    """Names the optimizer of the matrices: AdamW or Muon (AdamW updates norms and biases in any case)."""

    adamw = "adamw"
    muon = "muon"


class ServeMode(enum.Enum):
    """Names the decoding arm that a server runs."""

    dflash = "dflash"
    plain = "plain"


class EngineName(enum.Enum):
    """Names the program that serves: `own` is this pipeline's, the others run in environments of their own."""

    own = "own"
    sglang_jax = "sglang_jax"
    sglang = "sglang"
    vllm = "vllm"
    tpu_inference = "tpu_inference"
