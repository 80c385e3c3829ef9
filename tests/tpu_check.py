"""What only a TPU slice can show, on one page: `make tpu-check` on the first one.

    python -m tests.tpu_check --engine-python ENVIRONMENT/bin/python [overrides of the configuration]

Runs the same held-out prompts through four arms, one after another: this pipeline's engine and sglang-jax's server,
each with the target alone and with the draft. Prints the machine, each arm's tokens a second and accept length, and
how many answers equal the first arm's. A target and its exported draft must be there (`stage=export`). With
PROMPT_LEN, MAX_NEW_TOKENS and NUM_PROMPTS and `experiment=seed_regime` they are the seed's. Exits with 1 when an arm
does not come up.
"""

import argparse
import contextlib
import importlib.metadata
import platform
import tempfile
import time
from pathlib import Path

import jax

from pipeline.bench import loading
from pipeline.bench.endpoint_arm import EndpointArm
from pipeline.bench.engine_arm import EngineArm
from pipeline.config.choices import EngineName, ServeMode
from pipeline.config.fields import DRAFT
from pipeline.engine.engine import Engine
from pipeline.errors import PipelineError
from pipeline.external import launcher
from pipeline.external.token_endpoint import TokenEndpoint
from pipeline.serve import launched, server
from pipeline.workspace.workspace import Workspace
from tests.support.configuration import composed

PACKAGES = ("jax", "jaxlib", "libtpu", "gpt-oss-dflash")


def own_arms(workspace, requests):
    """Both arms of this pipeline's engine, one after another: their passes and acceptance."""
    target, draft, runtime = loading.Models(workspace, workspace.open(DRAFT)).loaded
    sizes = loading.engine_sizes(workspace, requests)
    for name, each in (("plain", None), ("DFLASH", draft)):
        arm = EngineArm(Engine(target, each, sizes, runtime))
        arm.warm_up()
        done = arm.run(requests)
        yield name, done, None if each is None else arm.acceptance([done])
        del arm


def launched_arms(workspace, requests):
    """Both arms of sglang-jax's server, one after another."""
    block_size = workspace.open(DRAFT).contract["draft"]["block_size"]
    for name, mode in (("plain", ServeMode.plain), ("DFLASH", ServeMode.dflash)):
        workspace.config.serve.mode = mode
        with tempfile.NamedTemporaryFile("w+") as log:
            port = server.free_port("127.0.0.1", 0)

            def keep(line, log=log):
                log.write(line + "\n")
                log.flush()

            started = launched.start(workspace, port, keep)
            try:
                path = Path(log.name) if mode is ServeMode.dflash else None
                with contextlib.closing(TokenEndpoint(started.url, log=path)) as endpoint:
                    arm = EndpointArm(endpoint, workspace.config.bench.slots, workspace.stop_token_ids, block_size)
                    arm.warm_up()
                    done = arm.run(requests)
                    seen = None if path is None else arm.acceptance([done])
                yield name, done, seen
            finally:
                started.stop()


def page(workspace, requests, engine_python):
    devices = jax.devices()
    print(f"{time.strftime('%Y-%m-%d %H:%M')}  {platform.node()}  {len(devices)} x {devices[0].device_kind}")
    versions = []
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    print(f"{', '.join(versions)}; sglang-jax {launcher.version_of(engine_python, 'sglang-jax')}")
    print(f"{workspace.config.target.name}, {len(requests)} prompts, at most {requests[0].max_new_tokens} tokens each")
    print(f"{'engine':<12}{'arm':<8}{'tokens/s':>10}{'accept_length':>15}{'equal answers':>15}")
    first = None
    for engine, arms in (("own", own_arms), ("sglang_jax", launched_arms)):
        for name, done, seen in arms(workspace, requests):
            first = first or done.answers
            equal = sum(first[key].token_ids == one.token_ids for key, one in done.answers.items())
            length = "" if seen is None else f"{seen.accept_length:.3f}"
            speed = done.tokens_per_second
            print(f"{engine:<12}{name:<8}{speed:>10.0f}{length:>15}{equal:>12}/{len(requests)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engine-python", required=True)
    arguments, overrides = parser.parse_known_args()
    config = composed(*overrides)
    config.serve.engine, config.serve.engine_python = EngineName.sglang_jax, arguments.engine_python
    workspace = Workspace(config)
    try:
        exported = workspace.open(DRAFT)
        prompts = loading.prompts(workspace, exported, loading.Models(workspace, exported))
        requests = loading.requests_for(workspace, loading.rendered(workspace, prompts))
        page(workspace, requests, arguments.engine_python)
    except PipelineError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
