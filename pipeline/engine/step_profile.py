"""What a decoding step costs: on the devices alone, with the host around it, and of a DFLASH round each part."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pipeline.engine import steps
from pipeline.engine.engine import Engine
from pipeline.engine.request import Request
from pipeline.engine.step_rows import StepRows, rows_for
from pipeline.model import placement
from pipeline.model.gpt_oss import forward as gpt_oss
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.layers.kv_pages import PagedCache, PageTables

PROMPT_TOKENS, NUM_STEPS, REPEATS = 16, 20, 3
WALL_STEPS = 60  # in a row: some of an engine's steps take longer than most, and requests wait for those too


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepProfile:
    """Holds the seconds of a step over all slots.

    `wall` is what the engine takes, on average, `device` what the devices take, in the median, when steps follow each
    other without being read. `draft` and `verify` are parts of a DFLASH round, and `commit` what is left of it; None
    of a plain step.
    """

    wall: float
    device: float
    draft: float | None
    verify: float | None

    @property
    def commit(self) -> float | None:
        """The rest of a round: the draft's context, acceptance, bookkeeping; an estimate, at least 0."""
        if self.draft is None or self.verify is None:
            return None
        return max(self.device - self.draft - self.verify, 0.0)

    @property
    def parts(self) -> tuple[float, float, float | None, float | None, float | None]:
        """Device, engine, draft, verify, commit."""
        return self.device, self.wall, self.draft, self.verify, self.commit

    @property
    def host_share(self) -> float:
        """The share of the engine's time in which no device computes."""
        return max(1 - self.device / self.wall, 0.0)


def profile(make: Callable[[], Engine]) -> StepProfile:
    """Measures an engine in which every slot decodes; `make` gives a new one, which is of no use afterwards.

    Its `max_length` must have room for about 100 rounds.
    """
    engine = _decoding(make())
    started = time.perf_counter()
    for _ in range(WALL_STEPS):
        engine.step()
    wall = (time.perf_counter() - started) / WALL_STEPS
    engine._read(0)
    rows = _all_rows(engine)
    size = engine.block_size or 1
    device = _median(lambda: engine._dispatch_round(rows, size))
    if engine._draft is None or engine._runtime.mesh is not None:
        return StepProfile(wall=wall, device=device, draft=None, verify=None)
    return StepProfile(wall=wall, device=device, draft=_draft_seconds(engine), verify=_verify_seconds(engine))


def _all_rows(engine: Engine) -> StepRows:
    return rows_for({}, (), engine._slots_of_shard, engine._num_shards)


def _decoding(engine: Engine) -> Engine:
    """Returns a warm engine in which every slot has begun to decode."""
    engine.warm_up()
    count, longest = engine.config.num_slots, engine.config.max_length - PROMPT_TOKENS
    for index in range(count):
        prompt = tuple((index + token) % 50 for token in range(PROMPT_TOKENS))
        engine.add(Request(request_id=str(index), prompt_ids=prompt, max_new_tokens=longest))
    begun: set[str] = set()
    while len(begun) < count:
        begun |= {update.request_id for update in engine.step()}
    return engine


def _median(dispatch: Callable[[], Any]) -> float:
    """Returns the median seconds of a step when several are dispatched one after another."""
    jax.block_until_ready(dispatch())
    found = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        outputs = [dispatch() for _ in range(NUM_STEPS // 2)]
        jax.block_until_ready(outputs)
        found.append((time.perf_counter() - started) / len(outputs))
    return statistics.median(found)


def _draft_seconds(engine: Engine) -> float:
    execution = engine._runtime.execution
    program = jax.jit(functools.partial(steps.draft_block, execution=execution))
    table = engine._pages.tables(_all_rows(engine)).whole
    return _median(lambda: program(engine._target, engine._draft, engine._state, table))


def _verify_seconds(engine: Engine) -> float:
    execution, state, draft = engine._runtime.execution, engine._state, engine._draft
    assert draft is not None
    taps = draft.config.tapped_layers

    def verify(target: TargetModel, cache: PagedCache, block: Any, start: Any, tables: PageTables) -> Any:
        out = gpt_oss.forward(target, block, start, cache, taps, tables=tables, execution=execution)
        return out.cache, gpt_oss.next_tokens(target.weights, out.hidden, execution.shards)

    program = placement.jit_sharded(verify, None, None, None, donated=(1,))
    block = jnp.broadcast_to(state.anchor[:, None], (len(state.anchor), draft.config.block_size))
    start, tables, cache = state.length + 0, engine._pages.tables(_all_rows(engine)), state.cache

    def dispatch() -> Any:
        nonlocal cache
        cache, tokens = program(engine._target, cache, block, start, tables)
        return tokens

    return _median(dispatch)
