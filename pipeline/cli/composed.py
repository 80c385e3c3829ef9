"""Types what Hydra composed."""

from omegaconf import DictConfig, OmegaConf

from pipeline.config.fields import expand_paths
from pipeline.config.schema import PipelineConfig
from pipeline.errors import PipelineError


def typed(composed: DictConfig) -> PipelineConfig:
    """Returns the configuration as dataclasses; keys that the schema lacks (`+key=`) and values still missing raise."""
    values = OmegaConf.to_container(composed, resolve=True)
    config = OmegaConf.merge(OmegaConf.structured(PipelineConfig), values)
    missing = sorted(OmegaConf.missing_keys(config))
    if missing and config.stage is not None:
        raise PipelineError(
            f"no value for {', '.join(missing)}; add to the command: {' '.join(f'{key}=...' for key in missing)}"
        )
    if missing:
        return PipelineConfig()
    typed = OmegaConf.to_object(config)
    assert isinstance(typed, PipelineConfig)
    return expand_paths(typed)
