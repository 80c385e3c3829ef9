"""`stage=ask`: asks the served model a few questions over HTTP, and shows its answers and what a round yielded."""

import logging

from pipeline.config.choices import Effort, ServeMode
from pipeline.config.schema import PipelineConfig
from pipeline.dflash.acceptance import accept_length_of
from pipeline.engine.engine import Engine
from pipeline.external.chat import ChatClient, Reply
from pipeline.serve.background import served
from pipeline.serve.loading import engine_of
from pipeline.serve.request_reader import ServedModel
from pipeline.tracking.run import Run
from pipeline.workspace.workspace import Workspace

log = logging.getLogger("pipeline")

SECONDS_TO_ANSWER = 600.0


def run(config: PipelineConfig, tracker: Run) -> None:
    """Serves the model on this machine, asks it `ask.questions` one after the other, and prints the replies."""
    workspace, wanted = Workspace(config), config.ask
    engine = engine_of(workspace, with_draft=config.serve.mode is ServeMode.dflash, adapts=False)
    engine.warm_up()
    model = ServedModel(name=config.target.name, effort=_effort(config), date=config.serve.date)
    with served(engine, workspace.tokenizer, model) as address:
        log.info("ask: %s answers on %s", model.name, address)
        client = ChatClient(f"{address}/v1", model=model.name, timeout_seconds=SECONDS_TO_ANSWER)
        replies = [(question, client.ask(question, wanted.max_new_tokens)) for question in wanted.questions]
    for question, reply in replies:
        print(_shown(question, reply, engine), flush=True)
    tracker.log_json("replies.json", {question: reply.text for question, reply in replies})


def _effort(config: PipelineConfig) -> str:
    """Returns the effort of the prompts that the draft was trained on, at which it is at its best."""
    trained = config.prompts.effort
    return config.serve.reasoning_effort.value if trained is Effort.mixed else trained.value


def _shown(question: str, reply: Reply, engine: Engine) -> str:
    parts = {"question": question, "thought": reply.analysis, "answer": reply.text, "tokens": _tokens(reply, engine)}
    width = max(map(len, parts)) + 2
    lines = []
    for name, text in parts.items():
        if text:
            first, *rest = text.splitlines()
            lines += [f"{name:<{width}}{first}", *(" " * width + line for line in rest)]
    return "\n".join([*lines, ""])


def _tokens(reply: Reply, engine: Engine) -> str:
    if engine.block_size is None:
        return f"{reply.num_tokens}, one a step"
    rounds = (reply.num_accepted + reply.num_rejected) // (engine.block_size - 1)
    if not rounds:
        return f"{reply.num_tokens}, without a round"
    mean = accept_length_of(reply.num_accepted, rounds)
    return f"{reply.num_tokens} in {rounds} rounds, {mean:.1f} a round of at most {engine.block_size}"
