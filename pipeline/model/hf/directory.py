"""HF directories of the target and the draft: read, each part for the devices that need it, and written."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pipeline.artifacts.files import write_json
from pipeline.artifacts.hashing import fingerprint_of, remembered_sha256
from pipeline.errors import PipelineError
from pipeline.model.dflash import weights as dflash_weights
from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss import quantization
from pipeline.model.gpt_oss import weights as gpt_oss_weights
from pipeline.model.gpt_oss.config import GptOssConfig, is_packed, is_tied
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf import adapter as adapter_files
from pipeline.model.hf import dflash as hf_dflash
from pipeline.model.hf import gpt_oss as hf_gpt_oss
from pipeline.model.hf import layouts, safetensors_files
from pipeline.model.hf.json_files import read_object
from pipeline.model.hf.safetensors_files import Index, TensorFiles
from pipeline.model.hf.tensor_source import Source
from pipeline.model.layers.linear import Matrix, is_stored_transposed
from pipeline.model.layers.mxfp4 import LARGEST_SCALE
from pipeline.progress import Progress

log = logging.getLogger("pipeline")

Weights = TypeVar("Weights")
ArraySharding = Sharding | Format
CHECKED_ELEMENTS = 2**22  # at a time, for NumPy converts bfloat16 to float32 to see whether numbers are finite
_TRANSPOSED = ".array"  # the last part of the path of a TransposedMatrix's array
SHOWN_BYTES = 2**28  # reading more than this takes long enough to show progress


def weight_paths(weights: Any) -> list[tuple[str, Any]]:
    """Returns every leaf of a weights tree with its dotted path, such as `layers.0.experts.router`."""
    return [(path.removesuffix(_TRANSPOSED), leaf) for path, leaf in _raw_paths(weights)]


def read_config(directory: Path) -> dict[str, Any]:
    """Returns the HF `config.json` of a directory; raises PipelineError when there is none or it is no object."""
    if not (directory / "config.json").is_file() and (directory / adapter_files.CONFIG_FILE).is_file():
        raise PipelineError(
            f"{directory} is a PEFT adapter and no model; set target.path to the model that it was trained on and "
            f"target.adapter to {directory}"
        )
    files = sorted(directory.glob("*.gguf"))
    advice = f"it holds {files[0].name}: write target.gguf={files[0]} instead of target.path" if files else None
    return read_object(directory / "config.json", advice or "give the directory of an HF checkpoint")


def read_target_config(directory: Path) -> GptOssConfig:
    """Returns the sizes of a target; raises PipelineError that names everything in its `config.json` that is wrong."""
    return GptOssConfig.from_hf(read_config(directory), directory / "config.json")


@dataclasses.dataclass(frozen=True)
class OpenedTarget:
    """Holds the sizes of a GPT-OSS checkpoint and its tensors, none of them read yet, in HF's layout."""

    config: GptOssConfig
    is_packed: bool  # the experts, as MXFP4
    files: TensorFiles


def open_target(directory: Path, adapter: Path | None = None) -> OpenedTarget:
    """Opens a GPT-OSS checkpoint in any layout that is known, with a PEFT adapter merged; logs what was mapped.

    Raises PipelineError for weights that are quantised otherwise than as MXFP4, and for an adapter that does not fit.
    """
    found = read_config(directory)
    config, files = GptOssConfig.from_hf(found, directory / "config.json"), TensorFiles(directory)
    named = quantization.named_by_tensors({name: tensor.kind for name, tensor in files.tensors.items()})
    if named is not None:
        raise PipelineError(f"{directory}: these weights are {named}; {quantization.MEND}")
    tensors, notes = layouts.as_hf(files.tensors, config, tied=is_tied(found))
    packed = layouts.is_packed(tensors)
    if packed != is_packed(found):
        holds, says = ("MXFP4", "does not say so") if packed else ("floats", "says mxfp4")
        notes.append(f"the experts are read as the {holds} that they are, though config.json {says}")
    if adapter is not None:
        tensors = adapter_files.merged(tensors, config, adapter)
        notes.append(f"the adapter {adapter} is merged")
    if notes:
        log.info("%s: %s", directory, "; ".join(notes))
    return OpenedTarget(config, layouts.is_packed(tensors), TensorFiles(directory, tensors))


def read_target(
    target: Path | OpenedTarget, weight_format: WeightFormat, shardings: TargetModel | None = None
) -> TargetModel:
    """Reads a GPT-OSS model, float or MXFP4, in one file or many, into weights of this format.

    `shardings` has the sharding of each array; None: all on the first device. Each device's parts are read for it
    alone. Raises PipelineError that names every tensor that is missing, unexpected, misshapen or not finite.
    """
    opened = open_target(target) if isinstance(target, Path) else target
    shapes = gpt_oss_weights.weight_shapes(opened.config, weight_format)
    weights = _load_target(opened, shapes, weight_format, None if shardings is None else shardings.weights)
    return TargetModel(opened.config, weights)


def read_embedding_and_head(
    directory: Path, dtype: DTypeLike, adapter: Path | None = None
) -> tuple[Float[Array, "V D"], Matrix]:
    """Reads the embedding and the head [D, V] of a GPT-OSS model alone, which a draft borrows."""
    opened, weight_format = open_target(directory, adapter), WeightFormat(dtype=jnp.dtype(dtype).name)
    shapes = gpt_oss_weights.weight_shapes(opened.config, weight_format)
    wanted: dict[str, Any] = {"embedding": shapes.embedding, "head": shapes.head}
    weights = _load_target(opened, wanted, weight_format, None)
    return weights["embedding"], weights["head"]


def _load_target(
    opened: OpenedTarget, shapes: Weights, weight_format: WeightFormat, shardings: Weights | None
) -> Weights:
    def source_of(path: str) -> Source:
        return hf_gpt_oss.source_of(path, opened.config, weight_format, packed_files=opened.is_packed)

    wrong = opened.files.differences(hf_gpt_oss.expected_target_tensors(opened.config, packed=opened.is_packed))
    return _load(opened.files, wrong, shapes, source_of, shardings)


def save_target(directory: Path, target: TargetModel, token_ids: dict[str, int]) -> None:
    """Writes unpacked weights that transformers opens unmodified; `token_ids` holds bos, eos and pad."""
    safetensors_files.write(directory, hf_gpt_oss.to_files(_on_host(target.weights), target.config))
    dtype = target.weights.embedding.dtype.name
    write_json(directory / "config.json", {**target.config.to_hf(), **token_ids, "dtype": dtype})


def read_draft_config(directory: Path) -> DFlashConfig:
    """Reads a draft's `config.json`; raises PipelineError when this program cannot run such a draft."""
    return hf_dflash.config_from_hf(read_config(directory), directory / "config.json")


def read_draft(directory: Path, dtype: DTypeLike, shardings: DraftModel | None = None) -> DraftModel:
    """Reads a draft in z-lab's HF layout; `shardings` and errors are as in `read_target`."""
    config = read_draft_config(directory)
    shapes = dflash_weights.weight_shapes(config, dtype)
    is_transposed = is_stored_transposed(dtype)
    files = TensorFiles(directory)
    by_path = {path: leaf.shape for path, leaf in weight_paths(shapes)}
    expected = hf_dflash.expected_draft_tensors(by_path, is_transposed=is_transposed)
    if {f"model.{name}" for name in expected} == files.names:
        raise PipelineError(
            f"{directory}: every tensor's name begins with 'model.', which vLLM cannot open and sglang-jax does not "
            "find; write the draft again with names as z-lab has them, without it"
        )
    wrong = files.differences(expected)

    def source_of(path: str) -> Source:
        return hf_dflash.source_of(path, is_transposed=is_transposed)

    weights = _load(files, wrong, shapes, source_of, None if shardings is None else shardings.weights)
    return DraftModel(config, weights)


def save_draft(directory: Path, draft: DraftModel, token_ids: dict[str, int]) -> None:
    """Writes a draft in z-lab's HF layout, in the precision of its weights."""
    dtype = draft.weights.norm.dtype.name
    safetensors_files.write(directory, hf_dflash.to_files(_on_host(draft.weights)))
    write_json(directory / "config.json", hf_dflash.config_to_hf(draft.config, dtype, token_ids))


def weights_fingerprint(directory: Path, memory: Path | None = None, adapter: Path | None = None) -> str:
    """Returns the sha256 over the names and bytes of a directory's weights, and of an adapter that is merged.

    `memory` is as in `remembered_sha256`.
    """
    files = safetensors_files.weight_files(directory)
    content = {file.name: remembered_sha256(file, memory) for file in files}
    if adapter is not None:
        content["adapter"] = adapter_files.fingerprint(adapter, memory)
    return fingerprint_of(content)


def config_fingerprint(directory: Path) -> str:
    """Returns the sha256 of a directory's config.json, whatever its formatting."""
    return fingerprint_of(read_config(directory))


def _raw_paths(weights: Any) -> list[tuple[str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(weights)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


def _on_host(weights: Any) -> dict[str, np.ndarray]:
    """Returns every array by path, matrices [in, out]."""
    arrays = {}
    for path, leaf in _raw_paths(weights):
        array = np.asarray(leaf)
        arrays[path.removesuffix(_TRANSPOSED)] = array.T if path.endswith(_TRANSPOSED) else array
    return arrays


def _load(
    files: TensorFiles,
    wrong: dict[str, str],
    shapes: Weights,
    source_of: Callable[[str], Source],
    shardings: Weights | None,
) -> Weights:
    """Reads every array of a weights tree, one after the other.

    Raises one PipelineError that names every tensor that is missing, unexpected, misshapen or not finite.
    """
    wanted = weight_paths(shapes)
    placed = [None] * len(wanted) if shardings is None else jax.tree.leaves(shardings, is_leaf=_is_sharding)
    reader = _Reader(files, wrong)
    arrays: dict[str, Array | None] = {}
    order = sorted(range(len(wanted)), key=lambda index: source_of(wanted[index][0]).names)
    total = sum(leaf.size * leaf.dtype.itemsize for _, leaf in wanted)
    with Progress(f"reading {files.directory.name}", total, "B", is_shown=total >= SHOWN_BYTES) as progress:
        for index in order:  # arrays of the same tensor one behind the other
            path, shape = wanted[index]
            arrays[path] = reader.array(shape, source_of(path), placed[index] or _first_device())
            progress.advance(shape.size * shape.dtype.itemsize)
    if wrong:
        listed = "\n  ".join(f"{name}: {problem}" for name, problem in wrong.items())
        raise PipelineError(f"{files.directory}: {len(wrong)} tensor(s) wrong\n  {listed}")
    return jax.tree.unflatten(jax.tree.structure(shapes), [arrays[path] for path, _ in wanted])


class _Reader:
    """Reads arrays from a directory's tensors, and adds to `wrong` the tensors that are not finite."""

    def __init__(self, files: TensorFiles, wrong: dict[str, str]) -> None:
        self._files = files
        self._wrong = wrong
        self._last: tuple[Any, list[np.ndarray]] | None = None  # gate and up come from the same tensor

    def array(self, shape: jax.ShapeDtypeStruct, source: Source, sharding: ArraySharding) -> Array | None:
        """Returns the array, each device's part read for it alone; None when a tensor that it needs is wrong."""
        if any(name in self._wrong for name in source.names):
            return None
        parts: dict[Any, np.ndarray] = {}  # several devices may hold the same part

        def part(index: Index | None) -> np.ndarray:
            assert index is not None
            bounds = tuple(edges.indices(size)[:2] for edges, size in zip(index, shape.shape, strict=True))
            if bounds not in parts:
                array = self._read(source, tuple(slice(*edges) for edges in bounds))
                assert array.shape == tuple(stop - start for start, stop in bounds), (source.names, array.shape, bounds)
                parts[bounds] = np.ascontiguousarray(array.astype(shape.dtype, copy=False))
            return parts[bounds]

        array = jax.make_array_from_callback(shape.shape, sharding, part)
        return None if any(name in self._wrong for name in source.names) else array

    def _read(self, source: Source, index: Index) -> np.ndarray:
        picked = None if source.pick is None else source.pick(index)
        key = source.names, None if picked is None else tuple((edges.start, edges.stop) for edges in picked)
        if self._last is None or self._last[0] != key:
            self._last = None
            self._last = key, [self._files.read(name, picked) for name in source.names]
            for name, tensor in zip(source.names, self._last[1], strict=True):
                if not _is_finite(tensor, name):
                    self._wrong[name] = "not finite"
        arranged = source.arrange(*self._last[1], index)
        return arranged if source.pick is not None else arranged[index]


def _is_finite(tensor: np.ndarray, name: str) -> bool:
    if tensor.dtype == np.uint8:
        return not (name.endswith("_scales") and (tensor > LARGEST_SCALE).any())
    flat = tensor.reshape(-1)
    parts = (flat[start : start + CHECKED_ELEMENTS] for start in range(0, flat.size, CHECKED_ELEMENTS))
    return all(np.isfinite(part.astype(np.float32)).all() for part in parts)


def _is_sharding(value: Any) -> bool:
    return isinstance(value, (Sharding, Format))


def _first_device() -> Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
