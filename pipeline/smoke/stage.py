"""`stage=smoke`: takes a random draft of the right shape through export, serve and bench, and checks the results.

It shows in under two minutes that the program starts, commits, rolls back and changes no token; it says nothing
about a draft's quality. The target is random too, so that nothing has to be trained.
"""

import dataclasses
import json
import logging
import math
import shutil
import urllib.request
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pipeline.artifacts import artifact, provenance
from pipeline.artifacts.artifact import Parent
from pipeline.artifacts.files import disk_errors
from pipeline.bench import stage as bench_stage
from pipeline.config.fields import DRAFT, TARGET
from pipeline.config.schema import PipelineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.request import Request
from pipeline.errors import PipelineError
from pipeline.export.write import write_draft
from pipeline.model.dflash import weights as dflash_weights
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.gpt_oss.weights import WeightFormat, random_weights
from pipeline.model.hf.directory import read_draft, read_target, save_target
from pipeline.prompts import corpus, tokenizer
from pipeline.serve.background import served
from pipeline.serve.request_reader import ServedModel
from pipeline.tracking.run import Run
from pipeline.workspace import specs
from pipeline.workspace.workspace import Workspace

log = logging.getLogger("pipeline")

TOKENIZER_CONVERSATIONS = 1000
SECONDS_TO_ANSWER = 60
VERSION = 2  # of the settings in the key of a random draft


def run(config: PipelineConfig, tracker: Run) -> None:
    """Makes a random target and draft under `output_dir`/smoke, then benches and serves them."""
    target = config.target
    if target.path is not None or target.gguf is not None or target.architecture is None:
        raise PipelineError("stage=smoke makes a random target of target.architecture; run it with target=tiny")
    root = Path(config.output_dir) / "smoke"
    shutil.rmtree(root, ignore_errors=True)
    config = dataclasses.replace(
        config,
        output_dir=str(root),
        target=dataclasses.replace(config.target, path=str(root / "target")),
        export=dataclasses.replace(config.export, path=str(root / "draft-dflash")),
        prompts=dataclasses.replace(config.prompts, count=256),
        bench=dataclasses.replace(config.bench, num_prompts=8, max_new_tokens=24, slots=3, repeats=1),
        serve=dataclasses.replace(config.serve, slots=2),
        engine=dataclasses.replace(config.engine, max_length=192),
    )
    with disk_errors(root):
        _random_target(config)
        workspace = Workspace(config)
        _random_draft(workspace)
    measured = bench_stage.run(config, tracker)
    numbers = {name: value for name, value in measured.items() if isinstance(value, int | float)}
    infinite = [name for name, value in numbers.items() if not math.isfinite(value)]
    if infinite or measured["equal_answers"] != measured["num_prompts"] or not measured["num_rounds"]:
        raise PipelineError(
            f"smoke: {measured['equal_answers']} of {measured['num_prompts']} answers equal plain greedy's in "
            f"{measured['num_rounds']} rounds, not finite: {infinite or 'none'}; all must be equal and finite"
        )
    _serve(workspace)
    log.info("smoke: export, serve and bench work with a random draft; every token is plain greedy's")


def _random_target(config: PipelineConfig) -> None:
    directory, sizes = Path(str(config.target.path)), config.target.architecture
    assert sizes is not None, "checked at the start"
    directory.mkdir(parents=True)
    conversations = [corpus.conversation(config.seed, index) for index in range(TOKENIZER_CONVERSATIONS)]
    trained = tokenizer.train_tokenizer(corpus.texts(conversations), sizes.vocab_size)
    trained.save_pretrained(directory)
    model = specs.architecture(sizes)
    weights = random_weights(model, jax.random.key(config.seed))
    save_target(directory, TargetModel(model, weights), tokenizer.config_token_ids(trained))


def _random_draft(workspace: Workspace) -> None:
    config, sizes = workspace.config, workspace.draft_config
    path = Path(str(config.export.path))
    draft = DraftModel(sizes, dflash_weights.random_weights(sizes, jax.random.key(config.seed + 1)))
    write_draft(artifact.open_scratch(path, resume=False), draft, {})
    settings, target = {"random": config.seed}, workspace.target
    artifact.seal(
        path,
        kind=DRAFT,
        key=artifact.key_of(DRAFT, VERSION, settings, {TARGET: target.key}),
        settings=settings,
        parents={TARGET: Parent(key=target.key, fingerprint=target.fingerprint)},
        contract=workspace.contract(
            DRAFT, provenance.provenance("smoke", settings, {TARGET: target.fingerprint})
        ).to_json(),
    )


def _serve(workspace: Workspace) -> None:
    """Sends one request through HTTP, and compares its tokens with the plain engine's."""
    config = workspace.config
    target = read_target(workspace.target.path, WeightFormat())
    draft = read_draft(Path(str(workspace.open(DRAFT).path)), jnp.float32)
    engine = workspace.serving_engine
    prompt, length = [int(token) for token in np.arange(5, 45)], 32
    plain = Request(request_id="plain", prompt_ids=tuple(prompt), max_new_tokens=length)
    wanted = next(iter(Engine(target, None, engine).generate([plain]))).token_ids

    model = ServedModel(
        name=config.target.name, effort=config.serve.reasoning_effort.value, temperature=0.0, date=config.serve.date
    )
    drafted = Engine(target, draft, engine)
    with served(drafted, workspace.tokenizer, model) as address:
        body = {"model": model.name, "prompt": prompt, "max_tokens": length, "return_token_ids": True}
        answer = _post(f"{address}/v1/completions", body)
    found = tuple(answer["choices"][0]["token_ids"])
    if found != wanted:
        raise PipelineError(f"smoke: the server answered {found}, plain greedy decoding {wanted}")
    log.info("smoke: the server's %d tokens equal plain greedy's", len(found))


def _post(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=SECONDS_TO_ANSWER) as response:
        return json.load(response)
