"""`stage=smoke`: a random draft of the right shape through export, serve and bench, with everything asserted.

It shows in under two minutes that the machinery starts, commits, rolls back and changes no token; it says
nothing about a draft's worth. The target is random too, so that nothing has to be trained.
"""

import dataclasses
import json
import logging
import math
import shutil
import threading
import urllib.request
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pipeline import artifacts, lineage
from pipeline.artifacts import PipelineError
from pipeline.bench import stage as bench
from pipeline.config import PipelineConfig
from pipeline.export.write import write_draft
from pipeline.model import checkpoints, draft
from pipeline.model.gpt_oss_config import GptOssConfig
from pipeline.model.gpt_oss_weights import GptOssWeights, WeightsForm, random_weights
from pipeline.prompts import corpus, tokenizer
from pipeline.prompts.chat_format import stop_token_ids
from pipeline.serve import server
from pipeline.serve.api import Api, create_app
from pipeline.serve.engine import Draft, Engine
from pipeline.serve.scheduler import Request
from pipeline.serve.worker import Worker
from pipeline.tracking import Run

log = logging.getLogger("pipeline")

TOKENIZER_CONVERSATIONS = 1000
SECONDS_TO_ANSWER = 60


def run(config: PipelineConfig, tracker: Run) -> None:
    """Make a random target and draft under `output_dir`/smoke, then bench and serve them."""
    if config.target.path is not None or config.target.architecture is None:
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
        serve=dataclasses.replace(config.serve, slots=2, max_length=192),
    )
    with artifacts.disk_errors(root):
        _random_target(config)
        _random_draft(config)
    target = lineage.target(config)
    model, weights = checkpoints.load_target(target.path, WeightsForm())
    sizes, draft_weights = checkpoints.load_draft(lineage.exported_draft(config, target).path, jnp.float32)
    measured = bench.run(config, tracker)
    infinite = [name for name, value in measured.items() if not math.isfinite(value)]
    if infinite or measured["equal_answers"] != measured["num_prompts"] or not measured["num_rounds"]:
        raise PipelineError(
            f"smoke: {measured['equal_answers']} of {measured['num_prompts']} answers equal plain greedy's in "
            f"{measured['num_rounds']} rounds, not finite: {infinite or 'none'}; all must be equal and finite"
        )
    _serve(config, weights, model, Draft(draft_weights, sizes))
    log.info("smoke: export, serve and bench work with a random draft; every token is plain greedy's")


def _random_target(config: PipelineConfig) -> None:
    directory = Path(config.target.path)
    directory.mkdir(parents=True)
    conversations = [corpus.conversation(config.seed, index) for index in range(TOKENIZER_CONVERSATIONS)]
    words = tokenizer.train_tokenizer(corpus.texts(conversations), config.target.architecture.vocab_size)
    words.save_pretrained(directory)
    model = lineage.architecture(config.target.architecture)
    weights = random_weights(model, jax.random.key(config.seed))
    checkpoints.save_target(directory, model, weights, tokenizer.config_token_ids(words))


def _random_draft(config: PipelineConfig) -> None:
    target, path = lineage.target(config), Path(config.export.path)
    sizes = lineage.draft_config(config, target)
    weights = draft.random_weights(sizes, jax.random.key(config.seed + 1))
    scratch = artifacts.open_scratch(path, resume=False)
    write_draft(scratch, sizes, weights, {})
    settings = {"random": config.seed}
    provenance = artifacts.provenance("smoke", settings, {lineage.TARGET: target.fingerprint})
    contract = lineage.draft_contract(config, target, provenance)
    artifacts.seal(path, kind=lineage.DRAFT, settings=settings, contract=contract.to_json())


def _serve(config: PipelineConfig, weights: GptOssWeights, model: GptOssConfig, drafting: Draft) -> None:
    """One request through HTTP, its tokens compared with the plain engine's."""
    words = tokenizer.load_tokenizer(Path(config.target.path))

    def engine(given: Draft | None) -> Engine:
        return Engine(
            weights,
            model,
            stop_token_ids=stop_token_ids(words),
            slots=config.serve.slots,
            max_length=config.serve.max_length,
            prefill_chunk=config.serve.prefill_chunk,
            draft=given,
        )

    prompt, length = [int(token) for token in np.arange(5, 45)], 32
    plain = Request(request_id="plain", prompt_ids=tuple(prompt), max_new_tokens=length)
    wanted = next(iter(engine(None).generate([plain]))).token_ids

    drafted = engine(drafting)
    worker = Worker(drafted)
    listener = server.bind(config.serve.host, 0)
    effort = lineage.default_effort(config)
    api = Api(worker, drafted, words, model=config.target.name, effort=effort, date=config.serve.date)
    serving = server.create_server(create_app(api), listener, cut=worker.end)
    thread = threading.Thread(target=server.serve, args=(serving, listener), name="smoke-server")
    worker.start()
    thread.start()
    try:
        body = {"model": config.target.name, "prompt": prompt, "max_tokens": length, "return_token_ids": True}
        answer = _post(f"{server.url(listener)}/v1/completions", body)
    finally:
        serving.should_exit = True
        thread.join()
        worker.stop()
        listener.close()
    found = tuple(answer["choices"][0]["token_ids"])
    if found != wanted:
        raise PipelineError(f"smoke: the server answered {found}, plain greedy decoding {wanted}")
    log.info("smoke: the server's %d tokens equal plain greedy's", len(found))


def _post(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=SECONDS_TO_ANSWER) as response:
        return json.load(response)
