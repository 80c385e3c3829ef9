"""The times of steps on the machine at hand, with random weights of the right shapes: no target, no draft is needed.

A round takes as long whatever it accepts, so that the speedup at any accept_length follows from two times.
"""

import dataclasses
import functools
import statistics
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pipeline.engine import step_profile
from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.step_profile import StepProfile
from pipeline.feasibility.step_times import StepTimes
from pipeline.model import placement
from pipeline.model.dflash import weights as dflash_weights
from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.parallel.runtime import Runtime
from pipeline.roofline.passes import random_target

REPEATS = 5


def measure(
    target: GptOssConfig,
    drafts: Sequence[DFlashConfig],
    weight_format: WeightFormat,
    engine: EngineConfig,
    runtime: Runtime,
    *,
    concurrencies: Sequence[int],
    seed: int,
) -> list[StepTimes]:
    """Returns the times of a plain step and of a round of each draft at each number of requests at once.

    What the host adds is in the times of the whole steps: engines are timed as requests see them, on average, for a
    step that the host delays delays a request too.
    """
    model = random_target(target, weight_format, runtime, seed)
    networks = [_random_draft(draft, weight_format, runtime, seed) for draft in drafts]
    found = []
    for slots in concurrencies:
        sizes = dataclasses.replace(engine, num_slots=slots, cache_tokens=None, block_sizes=(), stop_token_ids=())
        profiles: dict[int | None, list[StepProfile]] = {}
        for repeat in range(REPEATS):  # in turn, so that a machine that slows down slows all of them
            for network in [None, *networks][:: 1 if repeat % 2 == 0 else -1]:
                one = step_profile.profile(functools.partial(Engine, model, network, sizes, runtime))
                profiles.setdefault(None if network is None else network.config.block_size, []).append(one)
        plain = statistics.fmean(one.wall for one in profiles[None])
        for network in networks:
            some = profiles[network.config.block_size]
            whole = statistics.fmean(one.wall for one in some)
            drafted = min(statistics.median(one.draft or 0.0 for one in some), whole)
            found.append(
                StepTimes(
                    concurrency=slots,
                    block_size=network.config.block_size,
                    plain=plain,
                    draft=drafted,
                    verify=whole - drafted,
                )
            )
    return found


def _random_draft(config: DFlashConfig, weight_format: WeightFormat, runtime: Runtime, seed: int) -> DraftModel:
    def make() -> DraftModel:
        dtype = jnp.dtype(weight_format.dtype)
        return DraftModel(config, dflash_weights.random_weights(config, jax.random.key(seed + 1), dtype))

    if runtime.mesh is None:
        return jax.jit(make)()
    shardings = placement.draft_shardings(config, jnp.dtype(weight_format.dtype), runtime.mesh)
    return jax.jit(make, out_shardings=shardings)()
