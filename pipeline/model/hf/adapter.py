"""PEFT's LoRA adapters, merged into a model's tensors while they are read, part by part.

A linear layer's weight [out, in] becomes W + s B A, an expert's [in, out] becomes W + s (B A)^T. PEFT stacks the A
of all experts as [r E, in] and their B as [out, r E], with the experts along the last axis. Adapters that train
single experts' linear layers (Unsloth's) have a pair for each. A merged tensor has the precision of the model's.
Source: peft 0.21, `tuners/lora/layer.py` (`Linear.get_delta_weight`, `ParamWrapper`) and `utils/save_and_load.py`.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artifacts.hashing import fingerprint_of, remembered_sha256
from pipeline.errors import PipelineError
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.hf import layouts
from pipeline.model.hf.json_files import read_object
from pipeline.model.hf.layouts import EXPERTS, Tensors
from pipeline.model.hf.safetensors_files import Index, Tensor, stored, weight_files

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
ROWS = 512  # that are added at a time, in float64
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")  # the others change the model's own weights too
_PLAIN = {"use_dora": False, "fan_in_fan_out": False, "lora_bias": False, "trainable_token_indices": None}
_PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?")
_ONE_EXPERT = re.compile(
    r"(?P<layer>.+\.mlp\.experts\.)((?P<stem>\w+)_projs\.(?P<number>\d+)|(?P<index>\d+)\.(?P<part>\w+)_proj)"
)


@dataclasses.dataclass(frozen=True)
class _Model:
    """Holds what an adapter is merged into, and the adapter's settings.

    `is_swapped`: whether PEFT took an expert's axes for [out, in]; None where no shape tells.
    """

    tensors: Tensors
    config: GptOssConfig
    settings: dict[str, Any]
    is_swapped: bool | None

    def scale(self, module: str, rank: int) -> float:
        """Returns alpha / r, or alpha / sqrt(r); alpha may differ by module, and the rank is that of the matrices."""
        patterns = self.settings.get("alpha_pattern") or {}
        matching = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
        alpha = float(next(matching, self.settings.get("lora_alpha") or 0))
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def fitting(self, name: str, shape: tuple[int, ...]) -> str:
        """Returns a name if the model has a tensor of this name and shape; raises PipelineError when it has not."""
        found = self.tensors.get(name)
        if found is None or found.shape != shape:
            has = "has none" if found is None else f"has {list(found.shape)}"
            raise PipelineError(f"a change of {list(shape)} for {name}, of which the model {has}")
        return name


@dataclasses.dataclass(frozen=True)
class _Term:
    """Holds a part of what is added to a tensor: the product of two matrices, for one expert or for a whole matrix.

    `factors` reads them; the first has as many rows as the tensor, the second as many columns.
    """

    expert: int | None
    factors: Callable[[], tuple[np.ndarray, np.ndarray]]


def fingerprint(directory: Path, memory: Path | None) -> str:
    """Returns the sha256 of an adapter's config and weights; `memory` is as in `remembered_sha256`."""
    files = {file.name: remembered_sha256(file, memory) for file in weight_files(directory, WEIGHTS_FILE)}
    return fingerprint_of([read_object(directory / CONFIG_FILE, "give the directory of a PEFT adapter"), files])


def merged(tensors: Tensors, config: GptOssConfig, directory: Path) -> Tensors:
    """Returns a model's tensors, in HF's layout, with the adapter in `directory` merged.

    Where experts are adapted, packed ones are unpacked to bfloat16. Raises PipelineError that names everything in the
    adapter that is not known or does not fit.
    """
    settings = read_object(directory / CONFIG_FILE, "give the directory of a PEFT adapter as target.adapter")
    wrong = _unsupported(settings)
    pairs: dict[str, dict[str, Tensor]] = {}
    replaced: Tensors = {}
    for name, tensor in stored(directory, weight_files(directory, WEIGHTS_FILE)).items():
        plain = layouts.without_prefixes(name).replace(".default.", ".").replace(".modules_to_save.", ".")
        match = _PAIR.fullmatch(plain)
        if match is not None:
            side = (match["embedding"] or "") + match["side"]
            pairs.setdefault(match["module"].replace(".mlp.router.linear", ".mlp.router"), {})[side] = tensor
        else:
            replaced[plain.replace(".base_layer.", ".")] = tensor
    if any(EXPERTS in f"{module}." for module in pairs):
        tensors = layouts.unpacked(tensors)
    model = _Model(tensors, config, settings, _is_swapped(pairs, config))
    terms: dict[str, list[_Term]] = {}
    for module, pair in pairs.items():
        try:
            name, found = _terms(module, pair, model)
            terms.setdefault(name, []).extend(found)
        except PipelineError as error:
            wrong.append(f"{module}: {error}")
    wrong += [f"{name}: no tensor of the model" for name in replaced if name not in tensors]
    if wrong:
        raise PipelineError(f"{directory} is no adapter that can be merged:\n  " + "\n  ".join(wrong))
    tensors = {**tensors, **replaced}
    return {name: _added(tensor, terms[name]) if name in terms else tensor for name, tensor in tensors.items()}


def _unsupported(settings: dict[str, Any]) -> list[str]:
    """Returns what an adapter's settings ask for that is not a plain LoRA."""
    wrong = []
    if settings.get("peft_type") != "LORA":
        wrong.append(f"peft_type: found {settings.get('peft_type')!r}, wanted 'LORA'; merge it with PEFT")
    for key, plain in _PLAIN.items():
        if settings.get(key, plain) not in (plain, None, False):
            wrong.append(f"{key}: found {settings[key]!r}, wanted {plain!r}; merge it with PEFT")
    if settings.get("init_lora_weights", True) not in _PLAIN_INITS:
        wrong.append(
            f"init_lora_weights: found {settings['init_lora_weights']!r}, which changes the model's own weights too; "
            "merge it with PEFT"
        )
    for key in ("r", "lora_alpha"):
        value = settings.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            wrong.append(f"{key}: found {value!r}, wanted a number")
    return wrong


def _is_swapped(pairs: dict[str, dict[str, Tensor]], config: GptOssConfig) -> bool | None:
    """Returns which axes PEFT took for an expert's, as the shapes of a pair tell that fits in one way alone."""
    shapes = {
        (pair["A"].shape[1], pair["B"].shape[0]) for module, pair in pairs.items() if _is_of_experts(module, pair)
    }
    d, f = config.hidden_size, config.intermediate_size
    plain, swapped = {(d, 2 * f), (f, d)}, {(2 * f, d), (d, f)}
    directions = {shape in swapped for shape in shapes if (shape in plain) != (shape in swapped)}
    return directions.pop() if len(directions) == 1 else None


def _is_of_experts(module: str, pair: dict[str, Tensor]) -> bool:
    return pair.keys() == {"A", "B"} and f"{module}.".replace(".base_layer.", ".").endswith(f".{EXPERTS}")


def _terms(module: str, pair: dict[str, Tensor], model: _Model) -> tuple[str, list[_Term]]:
    """Returns the name of the tensor that a pair of matrices changes, and what it adds."""
    if pair.keys() == {"embedding_A", "embedding_B"}:  # of rows: A is [r, V], B [D, r]
        a, b = pair["embedding_A"], pair["embedding_B"]
        scale, name = model.scale(module, a.shape[0]), model.fitting(f"{module}.weight", (a.shape[1], b.shape[0]))
        return name, [_Term(None, lambda: (scale * _floats(a).T, _floats(b).T))]
    if pair.keys() != {"A", "B"}:
        raise PipelineError(f"found {' and '.join(sorted(pair))} of a pair, wanted lora_A and lora_B")
    a, b = pair["A"], pair["B"]
    one = _ONE_EXPERT.fullmatch(module)
    if one is not None:
        return _of_one_expert(one, a, b, model)
    if _is_of_experts(module, pair):
        return _of_experts(module, a, b, model)
    scale, name = model.scale(module, a.shape[0]), model.fitting(f"{module}.weight", (b.shape[0], a.shape[1]))
    return name, [_Term(None, lambda: (scale * _floats(b), _floats(a)))]


def _of_one_expert(match: re.Match[str], a: Tensor, b: Tensor, model: _Model) -> tuple[str, list[_Term]]:
    """Returns the term of one expert's linear layer; gate and up alone are every second column of both."""
    part, expert = match["stem"] or match["part"], int(match["number"] or match["index"])
    half = {"gate": 0, "up": 1}.get(part)
    width = b.shape[0] * (1 if half is None else 2)
    name = f"{match['layer']}{part if half is None else 'gate_up'}_proj"
    scale, found = model.scale(match[0], a.shape[0]), model.tensors.get(name)
    if found is None or found.shape[1:] != (a.shape[1], width) or expert >= found.shape[0]:
        raise PipelineError(f"a change of [{a.shape[1]}, {width}] for expert {expert}, which {name} does not have")

    def factors() -> tuple[np.ndarray, np.ndarray]:
        columns = _floats(b).T
        if half is not None:
            both = np.zeros((len(columns), width), np.float32)
            both[:, half::2] = columns
            columns = both
        return scale * _floats(a).T, columns

    return name, [_Term(expert, factors)]


def _of_experts(module: str, a: Tensor, b: Tensor, model: _Model) -> tuple[str, list[_Term]]:
    """Returns the terms of all experts of a layer; the shapes tell of which parameter.

    PEFT took an expert's axes for [in, out] or, in some versions with transformers 4, for [out, in].
    """
    config = model.config
    experts, d, f = config.num_local_experts, config.hidden_size, config.intermediate_size
    prefix, axes = module.replace(".base_layer", ""), (a.shape[1], b.shape[0])
    fits = [
        (name, is_swapped)
        for name, shape in (("gate_up_proj", (d, 2 * f)), ("down_proj", (f, d)))
        for is_swapped in (False, True)
        if axes == (shape[::-1] if is_swapped else shape) and model.is_swapped in (None, is_swapped)
    ]
    if len(fits) != 1 or a.shape[0] % experts or a.shape[0] != b.shape[1]:
        found = f"A {list(a.shape)} and B {list(b.shape)} fit {len(fits)} parameters of {experts} experts"
        raise PipelineError(f"{found}, wanted one; merge the adapter with PEFT")
    name, is_swapped = fits[0]
    rank = a.shape[0] // experts
    scale = model.scale(f"{prefix}.{name}", rank)

    def term(expert: int) -> _Term:
        def factors() -> tuple[np.ndarray, np.ndarray]:
            rows = a.read((slice(expert * rank, (expert + 1) * rank), a.whole[1])).astype(np.float32)
            columns = _floats(b).reshape(b.shape[0], rank, experts)[:, :, expert]
            return (scale * columns, rows) if is_swapped else (scale * rows.T, columns.T)

        return _Term(expert, factors)

    shape = (experts, d, 2 * f) if name == "gate_up_proj" else (experts, f, d)
    return model.fitting(f"{prefix}.{name}", shape), [term(expert) for expert in range(experts)]


def _floats(tensor: Tensor) -> np.ndarray:
    return tensor.read(tensor.whole).astype(np.float32)


def _added(base: Tensor, terms: Sequence[_Term]) -> Tensor:
    """Returns a tensor with products of matrices added, each expert on its own.

    Products are summed in float64, so that a part of a tensor is rounded to what the whole tensor has there: how
    a BLAS orders a float32 sum depends on the shapes that it gets.
    """

    def read(index: Index) -> np.ndarray:
        part = base.read(index)
        if not part.flags.writeable:
            part = part.copy()
        rows, columns = index[-2:]
        for term in terms:
            if term.expert is not None and not index[0].start <= term.expert < index[0].stop:
                continue
            changed = part if term.expert is None else part[term.expert - index[0].start]
            left, right = term.factors()
            left, right = left[rows].astype(np.float64), right[:, columns].astype(np.float64)
            for start in range(0, len(changed), ROWS):
                some = slice(start, start + ROWS)
                changed[some] = (changed[some] + left[some] @ right).astype(part.dtype)
        return part

    return Tensor(base.shape, base.kind, read)
