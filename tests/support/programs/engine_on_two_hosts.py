"""One of two hosts with four CPU devices each: decodes the fitted draft's prompts over a mesh of all eight devices.

    engine_on_two_hosts.py PROCESS PORT TARGET DRAFT PROMPTS DATAxEXPERTxTENSOR

Prints one JSON line: the answers of an engine that both drive alike, and from the primary those of one whose calls
it broadcasts.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax

from pipeline import distributed
from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.multihost import PrimaryEngine, follow_primary
from pipeline.engine.request import Request
from pipeline.model import placement
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf.directory import read_config, read_draft, read_draft_config, read_target
from pipeline.model.parallel.execution import Execution
from pipeline.model.parallel.runtime import Runtime
from pipeline.model.parallel.shards import Shards
from tests.support.grammars import Multiples, constrained


def requests(prompts):
    return [
        Request(request_id=str(number), prompt_ids=tuple(prompt), max_new_tokens=24)
        for number, prompt in enumerate(prompts)
    ]


def main() -> None:
    process, port, target, drafted, prompts, mesh_size = sys.argv[1:]
    distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
    assert jax.device_count() == 8
    assert distributed.is_primary() == (process == "0")
    shards = Shards(*map(int, mesh_size.split("x")))
    mesh = placement.make_mesh(shards)
    sizes, weight_format = GptOssConfig.from_hf(read_config(Path(target))), WeightFormat(shards=shards)
    models = (
        read_target(Path(target), weight_format, placement.target_shardings(sizes, weight_format, mesh)),
        read_draft(
            Path(drafted), "float32", placement.draft_shardings(read_draft_config(Path(drafted)), "float32", mesh)
        ),
    )
    config = EngineConfig(
        num_slots=8, row_counts=(1,), max_length=80, prefill_chunk=16, stop_token_ids=(5, 71), samples=True
    )
    runtime = Runtime(Execution(shards), mesh)
    asked = requests(json.loads(Path(prompts).read_text()))
    alike = Engine(*models, config, runtime)
    answers = {one.request_id: list(one.token_ids) for one in alike.generate(asked)}
    if not distributed.is_primary():
        engine = Engine(*models, config, runtime)
        engine.warm_up()
        follow_primary(engine, Multiples)
        print(json.dumps({"alike": answers, "followed_rounds": engine.acceptance.num_rounds}))
        return
    engine = PrimaryEngine(*models, config, runtime)
    engine.warm_up()
    engine.start_broadcasting()
    engine.broadcast_idle()
    extra = dataclasses.replace(asked[0], request_id="given up")
    engine.add(extra)
    engine.step()
    engine.cancel("given up")
    broadcast = {one.request_id: list(one.token_ids) for one in engine.generate(asked)}
    masked = {one.request_id: list(one.token_ids) for one in engine.generate(constrained(asked))}
    engine.shut_down_followers()
    rounds = engine.acceptance.num_rounds
    print(json.dumps({"alike": answers, "broadcast": broadcast, "constrained": masked, "followed_rounds": rounds}))


if __name__ == "__main__":
    main()
