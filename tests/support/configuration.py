"""The configuration that a command line gives, without a command."""

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from pipeline.config.schema import PipelineConfig
from tests.support.paths import ROOT


def composed(*overrides: str) -> PipelineConfig:
    """The typed configuration of conf/ with these overrides; rules are not checked."""
    ConfigStore.instance().store(name="schema", node=PipelineConfig)
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        values = OmegaConf.to_container(hydra.compose("config", list(overrides)), resolve=True)
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PipelineConfig), values))
