"""How the weights of a GPT-OSS checkpoint are quantised: MXFP4 is read, anything else is named and refused."""

import re
from collections.abc import Mapping
from typing import Any

_METHODS = {
    "bitsandbytes": "bitsandbytes (NF4, FP4 or INT8)",
    "awq": "AWQ (4 bits)",
    "gptq": "GPTQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8 (FBGEMM)",
    "modelopt": "NVIDIA Model Optimizer (NVFP4 or FP8)",
    "nvfp4": "NVFP4",
    "compressed-tensors": "compressed-tensors (llm-compressor)",
    "quark": "AMD Quark",
    "torchao": "torchao",
    "hqq": "HQQ",
}
_TENSORS = {  # what the names of tensors tell; the first one counts
    r"\.(absmax|nested_absmax|quant_map|SCB|quant_state\..*)$": "bitsandbytes",
    r"\.g_idx$": "gptq",
    r"\.qweight$": "awq",
    r"\.weight_packed$": "compressed-tensors",
    r"weight_scale_2$": "nvfp4",
    r"(weight|proj)_scale(_inv)?$": "fp8",
}
MEND = (
    "only float32, bfloat16, float16 and MXFP4 experts are read: give the checkpoint that it was made from, or let "
    "transformers dequantise it and save it in bfloat16"
)


def method_of(config: dict[str, Any]) -> str | None:
    """Returns the `quant_method` of a `config.json`; None where it says that nothing is quantised."""
    found = config.get("quantization_config")
    if not isinstance(found, dict):
        return None
    is_bitsandbytes = found.get("load_in_4bit") or found.get("load_in_8bit")
    return found.get("quant_method") or ("bitsandbytes" if is_bitsandbytes else None)


def problems(config: dict[str, Any]) -> list[str]:
    """Returns what `quantization_config` has that cannot be read."""
    found, method = config.get("quantization_config"), method_of(config)
    if found is None or (isinstance(found, dict) and method in (None, "mxfp4")):
        return []
    named = f"; these weights are {_METHODS[method]}: {MEND}" if isinstance(method, str) and method in _METHODS else ""
    return [f"quantization_config: found {found}, wanted quant_method mxfp4 or none{named}"]


def named_by_tensors(kinds: Mapping[str, str]) -> str | None:
    """Returns what these weights are where their names or kinds, by name, tell of a quantisation that is not read."""
    for pattern, method in _TENSORS.items():
        if any(re.search(pattern, name) for name in kinds):
            return _METHODS[method]
    return _METHODS["fp8"] if any(kind.startswith("F8_") for kind in kinds.values()) else None
