"""Many requests of mixed lengths through one engine, a third of them broken off: `make soak`.

    python -m tests.soak --seconds 120 --requests 256 --fitting 40

Decodes the demo's target and draft, first with pages for all requests, then for `fitting` of them. Every token must be
the one that plain decoding gives, prefixes must be shared, no page may be lost, and the memory must stay. Prints a
table; exits with 1 otherwise.
"""

import argparse
import dataclasses
import gc
import random
import time
from pathlib import Path

from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.layout import ROW_COUNTS
from pipeline.engine.request import Request
from pipeline.engine.sampling_params import SamplingParams
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf.directory import read_draft, read_target

NUM_PROMPTS, LONGEST, MOST_TOKENS = 24, 120, 96


def newest(directory: Path, kind: str) -> Path:
    """The artifact that was made last."""
    return max((directory / kind).iterdir(), key=lambda path: path.stat().st_mtime)


def memory_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def prompts(draw: random.Random) -> list[tuple[int, ...]]:
    """Of many lengths; half of them begin alike."""
    common = tuple(draw.randrange(5, 400) for _ in range(64))
    found = []
    for index in range(NUM_PROMPTS):
        own = tuple(draw.randrange(5, 400) for _ in range(draw.randrange(4, LONGEST - 64)))
        found.append(common + own if index % 2 else own)
    return found


def sampling_of(index: int) -> SamplingParams:
    """Greedy, or sampled with a key of the prompt's."""
    return SamplingParams() if index % 3 else SamplingParams(temperature=0.8, top_p=0.9, key=(index, 1))


def soak(engine: Engine, texts, wanted, seconds: float, count: int, draw: random.Random) -> dict[str, float]:
    """Keeps `count` requests in the engine for some seconds; returns what happened."""
    tokens: dict[str, list[int]] = {}
    about: dict[str, tuple[int, int]] = {}  # prompt, and tokens after which it is broken off
    started, serial, done, broken, wrong = time.monotonic(), 0, 0, 0, 0
    first = None
    while engine.has_work or time.monotonic() < started + seconds:
        while len(about) < count and time.monotonic() < started + seconds:
            index, name = draw.randrange(NUM_PROMPTS), str(serial)
            serial += 1
            length = draw.randrange(8, MOST_TOKENS)
            end = draw.randrange(1, length) if draw.random() < 1 / 3 else length + 1
            request = Request(
                request_id=name, prompt_ids=texts[index], max_new_tokens=length, sampling=sampling_of(index)
            )
            engine.add(request)
            about[name], tokens[name] = (index, end), []
        for update in engine.step():
            name = update.request_id
            if name not in about:
                continue  # broken off in this very step
            index, end = about[name]
            tokens[name] += update.token_ids
            finished = update.finish_reason is not None
            if finished or len(tokens[name]) >= end:
                wrong += tokens[name] != list(wanted[index][: len(tokens[name])])
                done, broken = done + finished, broken + (not finished)
                if not finished:
                    engine.cancel(name)
                del about[name], tokens[name]
        if first is None and time.monotonic() > started + seconds / 4:
            first = memory_mib()
    gc.collect()
    return {
        "finished": done,
        "broken off": broken,
        "wrong": wrong,
        "preempted": engine.num_preempted,
        "prompt tokens reused": engine.times.reused_tokens,
        "pages lost": engine.num_pages - engine.num_free_pages,
        "MiB after a quarter": first or 0.0,
        "MiB at the end": memory_mib(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--fitting", type=int, default=40)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    arguments = parser.parse_args()
    target = read_target(newest(arguments.output_dir, "target"), WeightFormat())
    draft = read_draft(newest(arguments.output_dir, "draft"), "float32")
    draw = random.Random(0)
    texts = prompts(draw)
    config = EngineConfig(
        num_slots=arguments.requests,
        max_length=256,
        prefill_chunk=64,
        stop_token_ids=(),
        samples=True,
        reuse_prefixes=True,
    )
    alone = dataclasses.replace(config, num_slots=1, reuse_prefixes=False)
    requests = [
        Request(request_id=str(index), prompt_ids=text, max_new_tokens=MOST_TOKENS, sampling=sampling_of(index))
        for index, text in enumerate(texts)
    ]
    wanted = {int(one.request_id): one.token_ids for one in Engine(target, None, alone).generate(requests)}
    holds = True
    for fitting in (arguments.requests, arguments.fitting):
        sizes = dataclasses.replace(config, cache_tokens=fitting * 224, block_sizes=(1, 4, 8), row_counts=ROW_COUNTS)
        engine = Engine(target, draft, sizes)
        engine.warm_up()
        found = soak(engine, texts, wanted, arguments.seconds, arguments.requests, draw)
        print(f"{arguments.requests} requests at a time, pages for {fitting}:")
        print("\n".join(f"  {name:<22}{value:.0f}" for name, value in found.items()), flush=True)
        grown = found["MiB at the end"] / max(found["MiB after a quarter"], 1.0)
        holds &= found["wrong"] == found["pages lost"] == 0 < found["prompt tokens reused"] and grown < 1.1
    raise SystemExit(0 if holds else 1)


if __name__ == "__main__":
    main()
