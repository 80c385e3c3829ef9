"""One of two hosts with four CPU devices each: decodes the fitted draft's prompts over a mesh of all eight devices.

    two_hosts.py PROCESS PORT TARGET DRAFT PROMPTS DATAxEXPERTxTENSOR

Prints one JSON line: the answers of an engine that both drive alike, and (the first host) of one that it leads.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax

from pipeline import hosts
from pipeline.model import checkpoints, draft, placement
from pipeline.model.execution import Execution
from pipeline.model.gpt_oss_config import GptOssConfig
from pipeline.model.gpt_oss_weights import WeightsForm, weight_shapes
from pipeline.model.sharding import Shards
from pipeline.serve.engine import Draft, Engine
from pipeline.serve.leading import LeadingEngine, follow
from pipeline.serve.scheduler import Request


def requests(prompts):
    return [
        Request(request_id=str(number), prompt_ids=tuple(prompt), max_new_tokens=24)
        for number, prompt in enumerate(prompts)
    ]


def main() -> None:
    process, port, target, drafted, prompts, mesh_size = sys.argv[1:]
    hosts.join(f"127.0.0.1:{port}", 2, int(process))
    assert jax.device_count() == 8
    assert hosts.is_first() == (process == "0")
    shards = Shards(*map(int, mesh_size.split("x")))
    mesh = placement.make_mesh(shards)
    config = GptOssConfig.from_hf(checkpoints.read_config(Path(target)))
    form = WeightsForm(shards=shards)
    shapes = weight_shapes(config, form)
    _, weights = checkpoints.load_target(
        Path(target), form, placement.places(shapes, placement.target_specs(shapes), mesh)
    )
    sizes = checkpoints.read_draft_config(Path(drafted))
    shapes = draft.weight_shapes(sizes)
    _, draft_weights = checkpoints.load_draft(
        Path(drafted), "float32", placement.places(shapes, placement.draft_specs(shapes), mesh)
    )
    given = {
        "stop_token_ids": [5, 71],
        "slots": 4,
        "max_length": 80,
        "prefill_chunk": 16,
        "draft": Draft(draft_weights, sizes),
        "run": Execution(shards),
        "mesh": mesh,
    }
    asked = requests(json.loads(Path(prompts).read_text()))
    alike = Engine(weights, config, **given)
    answers = {one.request_id: list(one.token_ids) for one in alike.generate(asked)}
    if not hosts.is_first():
        engine = Engine(weights, config, **given)
        engine.warm_up()
        follow(engine)
        print(json.dumps({"alike": answers, "followed_rounds": engine.acceptance.num_rounds}))
        return
    engine = LeadingEngine(weights, config, **given)
    engine.warm_up()
    engine.lead()
    engine.keep_waiting()
    extra = dataclasses.replace(asked[0], request_id="given up")
    engine.add(extra)
    engine.step()
    engine.cancel("given up")
    led = {one.request_id: list(one.token_ids) for one in engine.generate(asked)}
    engine.end()
    print(json.dumps({"alike": answers, "led": led, "followed_rounds": engine.acceptance.num_rounds}))


if __name__ == "__main__":
    main()
