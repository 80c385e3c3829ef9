"""Runs `stage=teacher_cache` and `stage=bench` over the mesh that is given.

    stages_on_a_mesh.py OUTPUT_DIR TARGET DRAFT DATAxEXPERTxTENSOR

Prints one JSON line: the answers that were cached, what their features sum to, and what the benchmark measured.
"""

import json
import sys

import numpy as np

from pipeline.bench import stage as bench_stage
from pipeline.config.fields import TEACHER_CACHE
from pipeline.config.schema import (
    BenchConfig,
    DraftConfig,
    EngineSettings,
    ExportConfig,
    MeshConfig,
    PipelineConfig,
    PromptsConfig,
    TargetConfig,
    TeacherCacheConfig,
)
from pipeline.store.reader import open_split
from pipeline.teacher_cache import stage as teacher_cache_stage
from pipeline.tracking.run import SilentRun
from pipeline.workspace.workspace import Workspace

DRAFT = DraftConfig(
    block_size=5,
    num_hidden_layers=2,
    num_tapped_layers=1,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=12,
    intermediate_size=48,
)


def configuration(output_dir, target, draft, mesh="1x1x1"):
    data, expert, tensor = map(int, mesh.split("x"))
    return PipelineConfig(
        output_dir=output_dir,
        target=TargetConfig(name="random", path=target),
        mesh=MeshConfig(data=data, expert=expert, tensor=tensor),
        prompts=PromptsConfig(count=24, heldout_fraction=0.4),
        teacher_cache=TeacherCacheConfig(  # sampled: bench.stage decodes greedily
            max_prompt_tokens=160, max_new_tokens=16, slots=4, shard_sequences=16, temperature=0.8, top_p=0.95
        ),
        draft=DRAFT,
        export=ExportConfig(path=draft),
        engine=EngineSettings(prefill_chunk=16),
        bench=BenchConfig(num_prompts=4, max_new_tokens=12, slots=4, repeats=1),
    )


def main() -> None:
    config = configuration(*sys.argv[1:])
    teacher_cache_stage.run(config, SilentRun())
    cache = Workspace(config).open(TEACHER_CACHE)
    split = open_split(cache.path, "heldout")
    rows = split.read(range(split.num_sequences))
    measured = bench_stage.run(config, SilentRun())
    found = {
        "answers": [[int(token) for token in row.token_ids] for row in rows],
        "features": [np.asarray(row.features, np.float32).sum(axis=0).tolist() for row in rows],
        "measured": {name: measured[name] for name in ("accept_length", "num_rounds", "equal_answers")},
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
