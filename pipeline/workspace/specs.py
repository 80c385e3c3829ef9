"""Turns a configuration into model sizes, a draft and a prompt set."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from pipeline.config.choices import Effort, OnBadRow, PromptSource
from pipeline.config.schema import ArchitectureConfig, DraftConfig, EngineSettings, PromptsConfig
from pipeline.dflash.blocks import default_tapped_layers
from pipeline.engine.config import EngineConfig
from pipeline.engine.layout import BLOCK_SIZES, ROW_COUNTS
from pipeline.errors import PipelineError
from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.hf.json_files import read_object
from pipeline.model.layers.config_values import is_whole
from pipeline.model.layers.rope import Rope
from pipeline.prompts import chat_format, files, sources, tokenizer
from pipeline.prompts.efforts import EffortMix
from pipeline.prompts.sources import PromptSet, Reading
from pipeline.prompts.tokenizer import Tokenizer

GENERATED_PROMPTS = 1536  # of sources without an end
TAPPED_LAYERS = 5  # of a derived draft, where the target has as many
GENERATION = "generation_config.json"
WIDTH_STEP = 128  # a derived intermediate size is a multiple of it


def architecture(sizes: ArchitectureConfig) -> GptOssConfig:
    """Returns the model of these sizes: sliding and full layers in turn, YaRN as GPT-OSS has it."""
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


def require_architecture(found: GptOssConfig, sizes: ArchitectureConfig | None, origin: Path) -> None:
    """Raises PipelineError naming every size in which the model of `origin` is not the one that was chosen."""
    if sizes is None:
        return
    wanted = architecture(sizes)
    wrong = [
        f"{field.name}: found {getattr(found, field.name)}, wanted {getattr(wanted, field.name)}"
        for field in dataclasses.fields(wanted)
        if getattr(found, field.name) != getattr(wanted, field.name)
    ]
    if wrong:
        listed = "\n  ".join(wrong)
        raise PipelineError(
            f"{origin} is not the model of target.architecture; choose target=local for another one\n  {listed}"
        )


def mask_token_id(directory: Path, mask_token: str, vocab_size: int) -> int:
    """Returns the id of `draft.mask_token`, which must be an existing row of the target's embedding."""
    file = directory / "tokenizer.json"
    found = tokenizer.token_id(file, file.stat().st_mtime_ns, mask_token)
    if found is None or found >= vocab_size:
        raise PipelineError(
            f"draft.mask_token {mask_token!r} has id {found} in {directory}/tokenizer.json; wanted a "
            f"token below the target's vocabulary of {vocab_size}; set draft.mask_token to a reserved token"
        )
    return found


def stop_token_ids(directory: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the tokens that end an answer: the chat format's, then others that `generation_config.json` names.

    Raises PipelineError when that file names something else than tokens.
    """
    found = _generation_config(directory).get("eos_token_id")
    file = directory / GENERATION
    named = found if isinstance(found, list) else [] if found is None else [found]
    if any(not is_whole(token) or token < 0 for token in named):
        raise PipelineError(f"{file}: eos_token_id: found {found!r}, wanted a token's id or a list of them")
    return tuple(dict.fromkeys([*chat_format.stop_token_ids(tokenizer), *named]))


def default_temperature(directory: Path) -> float:
    """Returns the temperature of requests that name none: `generation_config.json`'s, 0 where it says not to sample.

    Without either it is 1. Raises PipelineError when that file names something else than a temperature.
    """
    values = _generation_config(directory)
    found = values.get("temperature")
    if found is None:
        return 0.0 if values.get("do_sample") is False else 1.0
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found < math.inf:
        raise PipelineError(f"{directory / GENERATION}: temperature: found {found!r}, wanted a number of at least 0")
    return float(found)


def _generation_config(directory: Path) -> dict[str, Any]:
    file = directory / GENERATION
    return read_object(file, "") if file.is_file() else {}


def require_fitting(draft: DFlashConfig, model: GptOssConfig, directory: Path, *, key: str) -> DFlashConfig:
    """Returns the draft in `directory`, which the setting `key` names, if it is one for this model.

    PipelineError lists what does not fit.
    """
    pairs = {
        "hidden_size": (draft.hidden_size, model.hidden_size),
        "vocab_size": (draft.vocab_size, model.vocab_size),
        "num_target_layers": (draft.num_target_layers, model.num_hidden_layers),
    }
    wrong = [f"{name}: found {found}, wanted {wanted}" for name, (found, wanted) in pairs.items() if found != wanted]
    if wrong:
        listed = "\n  ".join(wrong)
        raise PipelineError(
            f"{key} {directory} is not a draft for this target; give one that was trained for it\n  {listed}"
        )
    return draft


def draft_sizes(wanted: DraftConfig, model: GptOssConfig, mask_token_id: int) -> DFlashConfig:
    """Returns the draft of `draft` for a model; what is null there follows from the model's sizes.

    Raises PipelineError on layers that cannot be tapped.
    """
    num_tapped = wanted.num_tapped_layers or min(TAPPED_LAYERS, model.num_hidden_layers - 1)
    tapped = wanted.tapped_layers or default_tapped_layers(model.num_hidden_layers, num_tapped)
    outside = [layer for layer in tapped if not 0 <= layer < model.num_hidden_layers - 1]
    if outside:
        raise PipelineError(
            f"draft.tapped_layers has {outside}; a target of {model.num_hidden_layers} layers can be tapped at "
            f"0..{model.num_hidden_layers - 2} (the last layer's output never leaves other runtimes un-normalised)"
        )
    derived_width = -(-8 * model.hidden_size // (3 * WIDTH_STEP)) * WIDTH_STEP
    return DFlashConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=wanted.intermediate_size or derived_width,
        num_hidden_layers=wanted.num_hidden_layers,
        num_attention_heads=wanted.num_attention_heads or model.num_attention_heads,
        num_key_value_heads=wanted.num_key_value_heads or model.num_key_value_heads,
        head_dim=wanted.head_dim or model.head_dim,
        rope=Rope(theta=wanted.rope_theta),
        tapped_layers=tuple(tapped),
        num_target_layers=model.num_hidden_layers,
        block_size=wanted.block_size,
        mask_token_id=mask_token_id,
        rms_norm_eps=model.rms_norm_eps,
        max_position_embeddings=model.max_position_embeddings,
    )


def prompt_set(prompts: PromptsConfig, seed: int, *, takes_answers: bool = False) -> PromptSet:
    """Returns the prompts of this configuration; with `takes_answers`, those whose rows hold an answer, and these."""
    effort = effort_of(prompts, seed)
    reading = Reading(
        shape=prompts.shape and prompts.shape.value,
        skips=prompts.on_bad_row is OnBadRow.skip,
        takes_answers=takes_answers,
    )
    if prompts.source is PromptSource.jsonl:
        assert prompts.path is not None, "a rule of the configuration"
        return sources.limited(sources.from_files(files.prompt_files(prompts.path), effort, reading), prompts.count)
    if prompts.source is PromptSource.dataset:
        assert prompts.dataset is not None, "a rule of the configuration"
        found = sources.from_dataset(
            prompts.dataset,
            prompts.dataset_split,
            prompts.column,
            effort,
            reading,
            subset=prompts.dataset_subset,
            revision=prompts.dataset_revision,
        )
        return sources.limited(found, prompts.count)
    generate = sources.everyday if prompts.source is PromptSource.everyday else sources.generated
    return generate(seed, prompts.count or GENERATED_PROMPTS, effort)


def effort_of(prompts: PromptsConfig, seed: int) -> str | EffortMix:
    """Returns the effort of prompts that name none, or the mix that it is drawn from."""
    return EffortMix(seed, prompts.effort_mix) if prompts.effort is Effort.mixed else prompts.effort.value


def bench_engine(sizes: EngineSettings) -> EngineConfig:
    """Returns the engine that steps are timed in: greedy, with these settings' sizes."""
    return EngineConfig(
        num_slots=1, max_length=sizes.max_length, prefill_chunk=sizes.prefill_chunk, page_size=sizes.page_size
    )


def serving_engine(sizes: EngineSettings, num_slots: int, stop_token_ids: tuple[int, ...] = ()) -> EngineConfig:
    """Returns the engine of a server with these settings: its requests may sample, and its block sizes adapt."""
    return EngineConfig(
        num_slots=num_slots,
        max_length=sizes.max_length,
        prefill_chunk=sizes.prefill_chunk,
        page_size=sizes.page_size,
        cache_tokens=sizes.cache_tokens,
        step_tokens=sizes.step_tokens,
        reuse_prefixes=sizes.reuse_prefixes,
        block_sizes=BLOCK_SIZES if sizes.block_size is None else (sizes.block_size,),
        row_counts=ROW_COUNTS,
        samples=True,
        stop_token_ids=stop_token_ids,
    )
