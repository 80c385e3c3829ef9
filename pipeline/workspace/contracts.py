"""Says what the contracts of a configuration's artifacts must hold."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.artifacts.contract import Contract, DraftIdentity, FeatureIdentity, TargetIdentity, TextIdentity
from pipeline.config.choices import Effort, PromptSource
from pipeline.config.schema import PromptsConfig, TargetConfig
from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.hf.directory import config_fingerprint, weights_fingerprint
from pipeline.prompts.tokenizer import Tokenizer, chat_template_fingerprint, tokenizer_fingerprint
from pipeline.workspace import specs
from pipeline.workspace.loading import adapter_of


def target_contract(
    directory: Path,
    target: TargetConfig,
    tokenizer: Tokenizer,
    *,
    revision: str | None,
    memory: Path | None,
    provenance: Mapping[str, Any] | None = None,
) -> Contract:
    """Returns the contract of the HF directory of a target: everything fingerprinted, features and draft open."""
    return Contract(
        target=TargetIdentity(
            name=target.name,
            revision=revision,
            config_fingerprint=config_fingerprint(directory),
            weights_fingerprint=weights_fingerprint(directory, memory, adapter_of(target)),
            weight_precision=target.precision.value,
        ),
        text=TextIdentity(
            tokenizer_fingerprint=tokenizer_fingerprint(directory),
            chat_template_fingerprint=chat_template_fingerprint(directory),
            stop_token_ids=sorted(specs.stop_token_ids(directory, tokenizer)),
        ),
        provenance=dict(provenance or {}),
    )


def cache_contract(target: Contract, prompts: PromptsConfig, tapped_layers: tuple[int, ...]) -> Contract:
    """Returns the contract of a teacher cache: the target's, the efforts rendered and the layers tapped.

    Which efforts a mix has drawn, or rows of a file or dataset have brought, only the prompts themselves say.
    """
    is_generated = prompts.source in (PromptSource.generated, PromptSource.everyday)
    efforts = [prompts.effort.value] if is_generated and prompts.effort is not Effort.mixed else None
    return dataclasses.replace(
        target,
        text=dataclasses.replace(target.text, reasoning_efforts=efforts),
        features=FeatureIdentity(tapped_layers=list(tapped_layers)),
    )


def draft_contract(cache: Contract, draft: DFlashConfig) -> Contract:
    """Returns the contract of a checkpoint or an exported draft: the cache's and the draft's own part."""
    return dataclasses.replace(cache, draft=draft_identity(draft))


def draft_identity(draft: DFlashConfig) -> DraftIdentity:
    """Returns the draft's part of a contract."""
    return DraftIdentity(
        block_size=draft.block_size,
        mask_token_id=draft.mask_token_id,
        architecture=json.loads(json.dumps(draft.architecture())),
        rope=draft.rope.to_hf(),
    )
