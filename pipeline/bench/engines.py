"""Compares engines of this process: plain, with the draft, and with other block sizes, at several loads."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.bench.arms import DFLASH, PLAIN, Arm
from pipeline.bench.engine_arm import EngineArm
from pipeline.cost import machine_speed, memory_traffic
from pipeline.engine import step_profile
from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.layout import BLOCK_SIZES
from pipeline.engine.step_profile import StepProfile
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.layers.mxfp4 import Packed
from pipeline.model.parallel.runtime import Runtime

ADAPTIVE = "adaptive"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Networks:
    """Holds what the arms of one process share: the models on their devices, and the engine's sizes."""

    target: TargetModel
    draft: DraftModel
    runtime: Runtime
    sizes: EngineConfig

    def arm(self, *, has_draft: bool, block_sizes: tuple[int, ...] = (), num_slots: int | None = None) -> EngineArm:
        """Returns an arm with an engine of its own."""
        sizes = dataclasses.replace(
            self.sizes, num_slots=num_slots or self.sizes.num_slots, block_sizes=block_sizes, cache_tokens=None
        )
        return EngineArm(Engine(self.target, self.draft if has_draft else None, sizes, self.runtime))


def engine_arms(networks: Networks, block_sizes: Sequence[int], *, is_adaptive: bool) -> dict[str, Arm]:
    """Returns plain decoding, the draft at its own block size, at others, and at those that a server chooses."""
    found: dict[str, Arm] = {PLAIN: networks.arm(has_draft=False), DFLASH: networks.arm(has_draft=True)}
    own = networks.draft.config.block_size
    for size in block_sizes:
        if size != own:
            found[f"block size {size}"] = networks.arm(has_draft=True, block_sizes=(size,))
    if is_adaptive:
        found[ADAPTIVE] = networks.arm(has_draft=True, block_sizes=BLOCK_SIZES)
    return found


def profiles(
    networks: Networks, slot_counts: Sequence[int], max_length: int
) -> dict[int, tuple[StepProfile, StepProfile]]:
    """Returns what single steps cost, plain and DFLASH, for the numbers of slots that are asked for."""
    found = {}
    for slots in slot_counts:
        each = dataclasses.replace(
            networks.sizes, num_slots=slots, max_length=max_length, stop_token_ids=(), cache_tokens=None
        )
        plain, dflash = (
            functools.partial(Engine, networks.target, draft, each, networks.runtime)
            for draft in (None, networks.draft)
        )
        found[slots] = (step_profile.profile(plain), step_profile.profile(dflash))
    return found


def profile_values(found: Mapping[int, tuple[StepProfile, StepProfile]]) -> dict[str, dict[str, Any]]:
    """Returns profiles as values of a record, by the number of slots; times are milliseconds."""
    values: dict[str, dict[str, Any]] = {}
    for slots, (slow, fast) in sorted(found.items()):
        one: dict[str, Any] = {}
        for arm, profile in ((PLAIN, slow), (DFLASH, fast)):
            one |= {f"{arm}_device_ms": profile.device * 1e3, f"{arm}_engine_ms": profile.wall * 1e3}
            one[f"{arm}_host_share"] = profile.host_share
        for part in ("draft", "verify", "commit"):
            seconds = getattr(fast, part)
            one[f"dflash_{part}_ms"] = None if seconds is None else seconds * 1e3
        values[str(slots)] = one
    return values


def plain_share_of_machine(networks: Networks, tokens_per_second: float, context: int) -> float:
    """Returns which share of what the devices reach plain decoding reaches: least time of a step over its time.

    The least time is that of reading what a step needs at the bandwidth of a copy, or of its products at the speed of
    a large product, whichever is longer. In a processor's cache it may be more than 1.
    """
    target, slots = networks.target, networks.sizes.num_slots
    embedding = target.weights.embedding.dtype
    packed = isinstance(target.weights.layers[0].experts.gate, Packed)
    value_bytes = float(embedding.itemsize)
    read = memory_traffic.target_bytes(target.config, slots, 1, context, packed=packed, value_bytes=value_bytes)
    flops = memory_traffic.target_flops(target.config, slots, context)
    bandwidth = machine_speed.copy_bandwidth(networks.runtime, repeats=5)
    least = max(read / bandwidth, flops / machine_speed.product_flops(networks.runtime, embedding.name))
    return least / (slots / tokens_per_second)
