"""The models that SpecForge and speculators train, around a draft in HF layout and a target's two ends, in float32.

Importing speculators' trainer imports its clients of vLLM and of datasets too. Empty modules stand in for the two
packages they need; nothing of them is called.
"""

import sys
import types
import warnings
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Qwen3Config
from transformers.utils import logging

warnings.filterwarnings("ignore", message="flash_attn is not found")
warnings.filterwarnings("ignore", message=".*CUDA is not available.*")
logging.set_verbosity_error()
PUSHES = 1000
NEVER_CALLED = ("openai", "openai.types", "openai.types.chat", "openai.types.completion", "datasets")


def _stand_in(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__path__ = []
    module.__spec__ = ModuleSpec(name, None)
    module.__getattr__ = _kind
    return module


def _kind(name: str) -> type:
    """Anything that a stand-in is asked for: a class, for it may be inherited from or caught."""
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (Exception,), {})


sys.modules.update({name: _stand_in(name) for name in NEVER_CALLED})

from specforge.algorithms.common.dflash_family_model import OnlineDFlashModel  # noqa: E402
from specforge.modeling.draft.dflash import DFlashDraftModel as SpecForgeDraft  # noqa: E402
from speculators.config import SpeculatorsConfig, VerifierConfig  # noqa: E402
from speculators.models.dflash import DFlashDraftModel as SpeculatorsDraft  # noqa: E402
from speculators.models.dflash import DFlashSpeculatorConfig  # noqa: E402
from speculators.proposals.greedy import GreedyTokenProposalConfig  # noqa: E402


def specforge(
    directory: Path, embedding: torch.Tensor, head: torch.Tensor, attention: str, **options: object
) -> OnlineDFlashModel:
    """SpecForge's training model; `embedding` and `head` are [V, D], `options` those of OnlineDFlashModel."""
    config = Qwen3Config.from_pretrained(directory)
    config._attn_implementation = attention
    draft = SpecForgeDraft(config)
    draft.load_state_dict(load_file(directory / "model.safetensors"))
    ends = nn.Linear(*head.shape[::-1], bias=False), nn.Embedding(*embedding.shape)
    for module, weight in zip(ends, (head, embedding), strict=True):
        module.weight = nn.Parameter(weight, requires_grad=False)
    return OnlineDFlashModel(
        draft.float(),
        *ends,
        mask_token_id=config.dflash_config["mask_token_id"],
        block_size=config.block_size,
        attention_backend=attention,
        **options,
    )


def speculators(directory: Path, embedding: torch.Tensor, head: torch.Tensor, attention: str) -> SpeculatorsDraft:
    """Speculators' training model; `embedding` and `head` are [V, D]. The target's final norm is one of weight one."""
    layers = Qwen3Config.from_pretrained(directory)
    layers._attn_implementation = attention
    inner = layers.dflash_config
    config = DFlashSpeculatorConfig(
        transformer_layer_config=layers,
        draft_vocab_size=layers.vocab_size,
        block_size=layers.block_size,
        aux_hidden_state_layer_ids=[layer + 1 for layer in inner["target_layer_ids"]],  # its convention: inputs' ids
        mask_token_id=inner["mask_token_id"],
        speculators_config=SpeculatorsConfig(
            algorithm="dflash",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=layers.block_size - 1)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=None, architectures=[]),
        ),
    )
    model = SpeculatorsDraft(config)
    weights = load_file(directory / "model.safetensors")
    missing, unexpected = model.load_state_dict(weights, strict=False)
    ends = {"embed_tokens.weight", "lm_head.weight", "verifier_lm_head.weight", "verifier_norm.weight"}
    if set(missing) != ends or unexpected:
        raise ValueError(f"{directory} does not fit: missing {sorted(set(missing) - ends)}, unexpected {unexpected}")
    for module, weight in ((model.embed_tokens, embedding), (model.lm_head, head), (model.verifier_lm_head, head)):
        module.weight.data = weight
    model.verifier_norm.weight.data.fill_(1.0)
    return model.float()


def verifier_states(token_ids: torch.Tensor, counts: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Last hidden states [T, D] of a target that says these tokens [T] greedily: speculators reads its labels there.

    Only tokens that count [T] are said. A token's state is its own row of the head, pushed away from rows that would
    win over it. ValueError where none is found: then no target with this head says the token.
    """
    said = torch.unique(token_ids[counts])
    states = head[said] / head[said].norm(dim=-1, keepdim=True)
    lost = torch.arange(len(said))
    for _ in range(PUSHES):
        winners = (states[lost] @ head.T).argmax(-1)
        lost, winners = lost[winners != said[lost]], winners[winners != said[lost]]
        if not len(lost):
            break
        states[lost] += head[said[lost]] - head[winners]
    else:
        raise ValueError(f"no state says the tokens {said[lost].tolist()}")
    of_token = torch.zeros_like(head)
    of_token[said] = states
    return of_token[torch.roll(token_ids, -1)]
