"""What a request costs the others and what earlier ones save it: `make latencies`.

    python -m tests.latencies --output-dir outputs

The demo's target and draft, which are given 8,192 positions: their words mean nothing there, and time is all that is
measured. Prints a table; nothing is asserted, for machines differ.
"""

import argparse
import dataclasses
import random
import statistics
import time
from pathlib import Path

import jax

from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.layout import ROW_COUNTS, cache_tokens
from pipeline.engine.request import Request
from pipeline.model.dflash.model import DraftModel
from pipeline.model.dflash.weights import random_weights
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf.directory import read_draft, read_target
from tests.soak import newest

POSITIONS, CHUNK = 8192, 64
TURN, SYSTEM, LONG = 4000, 2000, 7000  # tokens of a conversation, of a system prompt, of a long prompt


def request(name: str, prompt: list[int], count: int) -> Request:
    return Request(request_id=name, prompt_ids=tuple(prompt), max_new_tokens=count)


def words(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(5, 400) for _ in range(count)]


def run(engine: Engine, *requests: Request) -> dict[str, list[float]]:
    """The times at which each request got tokens, from the moment that all were added."""
    started = time.perf_counter()
    engine.add_all(requests)
    times: dict[str, list[float]] = {one.request_id: [] for one in requests}
    while engine.has_work:
        for update in engine.step():
            times[update.request_id].append(time.perf_counter() - started)
    return times


def second_turns(engine: Engine, draw: random.Random, repeats: int) -> tuple[float, float]:
    """Median seconds to the first token of conversations and of their second turns, without the first's answer."""
    found: list[tuple[float, float]] = []
    for index in range(repeats):
        prompt = words(draw, TURN)
        first = run(engine, request(f"first {index}", prompt, 32))
        second = run(engine, request(f"second {index}", prompt + words(draw, 48), 32))
        found.append(tuple(next(iter(times.values()))[0] for times in (first, second)))
    return tuple(statistics.median(times) for times in zip(*found, strict=True))


def shared_prompt(engine: Engine, draw: random.Random) -> tuple[int, int]:
    """Tokens that 64 requests with one system prompt compute, and have of each other."""
    system, before = words(draw, SYSTEM), engine.times
    run(engine, *(request(f"shared {index}", system + words(draw, 20), 4) for index in range(64)))
    after = engine.times
    return after.prefill_tokens - before.prefill_tokens, after.reused_tokens - before.reused_tokens


def gaps(engine: Engine, draw: random.Random, *, disturbed: bool) -> list[float]:
    """Seconds between the tokens of 7 streams, during which a long prompt is read where they are `disturbed`."""
    last: dict[str, float] = {}
    found = []
    engine.add_all([request(f"stream {index}", words(draw, 20), 1200) for index in range(7)])
    began = added = False
    while engine.has_work:
        updates = engine.step()
        now = time.perf_counter()
        began |= len(last) == 7
        if began and not added and disturbed:
            added = True
            engine.add(request("long", words(draw, LONG), 1))
        for update in updates:
            if began and update.request_id in last:
                found.append(now - last[update.request_id])
            last[update.request_id] = now
            if update.request_id == "long" or (began and not disturbed and len(found) > 1500):
                for index in range(7):
                    engine.cancel(f"stream {index}")
                engine.cancel("long")
    return found


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


def speed(engine: Engine, draw: random.Random, slots: int) -> float:
    """Tokens a second of decoding with every slot in use."""
    before = engine.times
    run(engine, *(request(f"fast {index}", words(draw, 30), 160) for index in range(2 * slots)))
    after = engine.times
    return (after.decode_tokens - before.decode_tokens) / (after.decode_seconds - before.decode_seconds)


def random_draft(draft: DraftModel) -> DraftModel:
    return DraftModel(draft.config, random_weights(draft.config, jax.random.key(0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    target = read_target(newest(arguments.output_dir, "target"), WeightFormat())
    target = TargetModel(dataclasses.replace(target.config, max_position_embeddings=POSITIONS), target.weights)
    draft, draw = read_draft(newest(arguments.output_dir, "draft"), "float32"), random.Random(0)
    config = EngineConfig(
        num_slots=8,
        max_length=POSITIONS,
        prefill_chunk=CHUNK,
        step_tokens=CHUNK,
        cache_tokens=4 * POSITIONS,
        reuse_prefixes=True,
        block_sizes=(1, 4, 8),
        row_counts=ROW_COUNTS,
        samples=True,
    )
    engine = Engine(target, draft, config)
    engine.warm_up()
    first, second = second_turns(engine, draw, arguments.repeats)
    shown = f"{first * 1e3:.0f} ms, of the second turn {second * 1e3:.0f} ms, {second / first:.3f} of it"
    print(f"first token of {TURN} tokens: {shown}")
    computed, reused = shared_prompt(engine, draw)
    print(f"64 requests with {SYSTEM} tokens in common: {computed} tokens computed, {reused} had")
    ratios = []
    for _ in range(3):
        calm, busy = (percentile(gaps(engine, draw, disturbed=one), 0.99) for one in (False, True))
        ratios.append(busy / calm)
        shown = f"{calm * 1e3:.1f} ms, beside {LONG} tokens {busy * 1e3:.1f} ms"
        print(f"99th percentile between tokens of 7 streams: {shown}")
    print(f"  ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    whole = EngineConfig(num_slots=64, max_length=16384, prefill_chunk=CHUNK)
    share = cache_tokens(whole) / (64 * 16384)
    print(f"positions held for 64 slots of 16,384: {cache_tokens(whole)}, {share:.3f} of slots x length")
    for slots in (1, 8, 32):
        sizes = dataclasses.replace(config, num_slots=slots, max_length=256, cache_tokens=None)
        arms = [Engine(target, None, sizes), Engine(target, random_draft(draft), sizes)]
        for arm in arms:
            arm.warm_up()
            speed(arm, draw, slots)
        pairs = [[speed(arms[index], draw, slots) for index in order] for order in ((0, 1), (1, 0)) * arguments.repeats]
        ratios = [pair[1] / pair[0] if index % 2 == 0 else pair[0] / pair[1] for index, pair in enumerate(pairs)]
        print(f"a random draft, {slots} slots: {statistics.median(ratios):.3f} of plain decoding's speed "
              f"({min(ratios):.3f} to {max(ratios):.3f})")  # fmt: skip


if __name__ == "__main__":
    main()
