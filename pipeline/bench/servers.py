"""Compares two running servers, each with its own program, weights and settings."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipeline.artifacts.artifact import Artifact
from pipeline.bench import losslessness
from pipeline.bench.arms import DFLASH, PLAIN, Arm, Comparison
from pipeline.bench.endpoint_arm import EndpointArm
from pipeline.bench.losslessness import Losslessness
from pipeline.engine.request import Request
from pipeline.external.token_endpoint import TokenEndpoint
from pipeline.workspace.loading import load_target, runtime_for
from pipeline.workspace.workspace import Workspace

KEY_VARIABLE = "BENCH_API_KEY"


@contextlib.contextmanager
def server_arms(workspace: Workspace, exported: Artifact) -> Iterator[Callable[[int], dict[str, Arm]]]:
    """Opens connections to both servers; gives a function from the number of requests at once to the arms."""
    wanted = workspace.config.bench
    log_file = None if wanted.dflash_log is None else Path(wanted.dflash_log)
    stops, key = workspace.stop_token_ids, os.environ.get(KEY_VARIABLE)
    with (
        contextlib.closing(TokenEndpoint(wanted.plain_url or "", api_key=key)) as plain_server,
        contextlib.closing(TokenEndpoint(wanted.dflash_url or "", api_key=key, log=log_file)) as dflash_server,
    ):
        block_size = exported.contract["draft"]["block_size"]
        yield lambda num_at_once: {
            PLAIN: EndpointArm(plain_server, num_at_once, stops, None),
            DFLASH: EndpointArm(dflash_server, num_at_once, stops, block_size),
        }


def judge(workspace: Workspace, comparison: Comparison, requests: Sequence[Request]) -> Losslessness:
    """Compares both servers' answers. The target is read only where they differ, to judge by how much."""
    slow, fast = comparison.plain[0].answers, comparison.dflash[0].answers
    if all(slow[one.request_id].token_ids == fast[one.request_id].token_ids for one in requests):
        return Losslessness(num_answers=len(requests), differences=(), tie_gap=0.0)
    config = workspace.config
    runtime = runtime_for(config.mesh, workspace.target.path)
    target = load_target(config.target, workspace.target.path, runtime)
    return losslessness.compare_answers(slow, fast, requests, target, runtime)
