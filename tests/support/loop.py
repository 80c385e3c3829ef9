"""The loop from a target to a trained draft at sizes that take a minute, for tests of what comes behind it.

Target, answers, features and draft are all made by the stages themselves, so that the draft is worth something in the
engine and loses it when one of its conventions is broken.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

from pipeline.config.schema import (
    ArchitectureConfig,
    DraftConfig,
    EngineSettings,
    ExportConfig,
    PipelineConfig,
    PretrainConfig,
    PromptsConfig,
    ServeConfig,
    TargetConfig,
    TeacherCacheConfig,
    TrainConfig,
)
from pipeline.tracking.run import SilentRun
from tests.support import once
from tests.support.compiled import QUICKLY
from tests.support.paths import ROOT

LIMIT_SECONDS = 500  # on a machine that does other things too
STEPS = 250
TAPPED_LAYERS = [1, 2]  # a layer more or less still exists
NUM_PROMPTS = 20


def configuration(root: Path) -> PipelineConfig:
    """Everything that is made goes to `root`."""
    return PipelineConfig(
        output_dir=str(root),
        target=TargetConfig(
            name="loop",
            architecture=ArchitectureConfig(
                vocab_size=384,
                hidden_size=72,
                intermediate_size=48,
                num_hidden_layers=5,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=20,
                num_local_experts=3,
                num_experts_per_tok=2,
                sliding_window=16,
                max_position_embeddings=512,
                rope_positions=128,
            ),
            pretrain=PretrainConfig(
                num_conversations=1200,
                steps=80,
                batch_tokens=1536,
                sequence_length=144,
                learning_rate=4e-3,
                checkpoint_steps=80,
            ),
        ),
        prompts=PromptsConfig(count=170, heldout_fraction=0.15),
        teacher_cache=TeacherCacheConfig(max_prompt_tokens=160, max_new_tokens=40, slots=32, shard_sequences=200),
        draft=DraftConfig(
            block_size=6,
            num_hidden_layers=1,
            tapped_layers=list(TAPPED_LAYERS),
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=14,
            intermediate_size=96,
        ),
        train=TrainConfig(
            steps=STEPS,
            anchors_per_sequence=16,
            learning_rate=6e-3,
            checkpoint_steps=STEPS,
            eval_steps=STEPS,
            log_steps=50,
        ),
        export=ExportConfig(num_prompts=NUM_PROMPTS),
        engine=EngineSettings(max_length=200, prefill_chunk=32),
        serve=ServeConfig(slots=NUM_PROMPTS),
    )


def trained() -> PipelineConfig:
    """A configuration whose target, teacher cache and draft are made; read only."""
    return configuration(once.directory("loop", _make))


def _make(root: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | QUICKLY
    made = subprocess.run(
        [sys.executable, "-m", "tests.support.loop", str(root)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert made.returncode == 0, made.stderr[-4000:]


def copy(config: PipelineConfig) -> PipelineConfig:
    """One that a test may change."""

    def copied(value: object) -> object:
        if not dataclasses.is_dataclass(value):
            return list(value) if isinstance(value, list) else value
        return type(value)(**{field.name: copied(getattr(value, field.name)) for field in dataclasses.fields(value)})

    return copied(config)


def main() -> None:
    """Make everything up to the trained draft: `python -m tests.support.loop ROOT`."""
    from pipeline.artifacts import provenance
    from pipeline.target import stage as target
    from pipeline.teacher_cache import stage as teacher_cache
    from pipeline.train import stage as train

    provenance.git_commit = lambda: "0" * 40
    target.QUESTIONS_PER_FAMILY = 1  # which it does not answer
    config = configuration(Path(sys.argv[1]))
    for stage in (target, teacher_cache, train):
        stage.run(config, SilentRun())


if __name__ == "__main__":
    main()
