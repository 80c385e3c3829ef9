"""Lets EasyDeL's model classes be imported where torch is not installed.

EasyDeL patches the torch code of a few transformers models when its model classes are imported. Without
torch these modules raise; empty ones installed in their place take the patches and are never used.
Source: docs/easydel.md#torch.
"""

import importlib
import importlib.util
import sys
import types

PATCHED_MODELS = ("dbrx", "glm4v_moe", "llama4", "phimoe", "qwen3_5_moe", "qwen3_next")


def install() -> None:
    """Installs the empty modules; does nothing where torch is installed."""
    if importlib.util.find_spec("torch") is not None:
        return
    for model in PATCHED_MODELS:
        package = importlib.import_module(f"transformers.models.{model}")
        name = f"{package.__name__}.modeling_{model}"
        if name not in sys.modules:
            sys.modules[name] = types.ModuleType(name)
            setattr(package, f"modeling_{model}", sys.modules[name])
