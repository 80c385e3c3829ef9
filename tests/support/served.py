"""A small random target and draft on disk, complete as export leaves them, and the configuration that serves them."""

from pathlib import Path

import jax

from pipeline.artifacts import artifact
from pipeline.artifacts.artifact import Parent
from pipeline.config.fields import CHECKPOINT, DRAFT
from pipeline.config.schema import DraftConfig, EngineSettings, PipelineConfig, ServeConfig, TargetConfig
from pipeline.model.dflash import weights as dflash_weights
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss import weights as gpt_oss_weights
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.hf.directory import save_draft, save_target
from pipeline.prompts.tokenizer import Tokenizer
from pipeline.workspace.workspace import Workspace
from tests.support.models import TARGET


def random_pair(root: Path, tokenizer: Tokenizer) -> PipelineConfig:
    """Writes the pair under `root`; the tokenizer has 512 tokens."""
    target_path, draft_path = root / "target", root / "draft"
    target_path.mkdir()
    sizes = GptOssConfig.from_hf({**TARGET, "vocab_size": 512})
    save_target(target_path, TargetModel(sizes, gpt_oss_weights.random_weights(sizes, jax.random.key(0))), {})
    tokenizer.save_pretrained(target_path)
    config = PipelineConfig(
        output_dir=str(root),
        target=TargetConfig(name="random", path=str(target_path)),
        draft=DraftConfig(
            block_size=5,
            num_hidden_layers=2,
            num_tapped_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
        ),
        engine=EngineSettings(max_length=96, prefill_chunk=16),
        serve=ServeConfig(slots=3, port=0),
    )
    config.export.path = str(draft_path)
    seal_random_draft(config)
    return config


def seal_random_draft(config: PipelineConfig) -> None:
    """Writes a draft of the configuration's sizes to `export.path`, complete as export leaves one."""
    draft_path, workspace = Path(str(config.export.path)), Workspace(config)
    shape = workspace.draft_config
    draft = DraftModel(shape, dflash_weights.random_weights(shape, jax.random.key(1)))
    save_draft(artifact.open_scratch(draft_path, resume=False), draft, {})
    artifact.seal(
        draft_path,
        kind=DRAFT,
        key=workspace.key(DRAFT),
        settings=workspace.settings(DRAFT),
        parents={CHECKPOINT: Parent(key="0123456789ab", fingerprint="f" * 64)},
        contract=workspace.contract(DRAFT).to_json(),
    )
