"""Reading EasyDeL's run directories without EasyDeL: zarr arrays under the paths of `DraftWeights`.

However many devices wrote an array, in however many chunks, it is read whole; from a disk or from a bucket.
"""

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore

from pipeline.artifacts import storage
from pipeline.artifacts.storage import StoragePath
from pipeline.errors import PipelineError
from pipeline.model.dflash import weights as dflash_weights
from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.dflash.weights import DFlashWeights
from pipeline.model.hf.directory import weight_paths

INDEX = "tensorstore_index.json"
WEIGHTS = re.compile("(model/)()")
AVERAGE = re.compile(r"(tx/\d+/average/).*(/value)$")  # train/optimizer.py keeps it, in a place of the chain
MEND = "delete the checkpoint and run stage=train again"


def read_checkpoint(run: StoragePath, config: DFlashConfig) -> DFlashWeights:
    """The float32 weights that a run directory (`run-<step>`) stands for: the average of them, where one is kept.

    Raises PipelineError naming every array that is missing, wholly or in part, unexpected, misshapen or not finite.
    """
    stored, (head, tail) = _stored(run)
    shapes = dflash_weights.weight_shapes(config)
    wanted = {f"{head}{path.replace('.', '/')}{tail}": shape for path, shape in weight_paths(shapes)}
    found = _read_all(run, wanted.keys() & stored)
    problems = [f"{path}: unexpected" for path in sorted(stored - wanted.keys())]
    problems += [
        f"{path}: {problem}"
        for path, shape in wanted.items()
        if (problem := _problem(found.get(path, "missing"), shape)) is not None
    ]
    if problems:
        raise PipelineError(f"{run}: {len(problems)} array(s) wrong; {MEND}\n  " + "\n  ".join(problems))
    return jax.tree.unflatten(jax.tree.structure(shapes), [jnp.asarray(found[path]) for path in wanted])


def holds_weights(name: str) -> bool:
    """Whether a file of a run directory is a part of what `read_checkpoint` reads, or may be."""
    return name == INDEX or name.startswith("model/") or "/average/" in name


def _stored(run: StoragePath) -> tuple[set[str], tuple[str, str]]:
    """The weights' arrays that EasyDeL says it wrote, and how their paths begin and end."""
    try:
        index = json.loads((run / INDEX).read_text())
        paths = [entry["path"] for entries in index["prefixes"].values() for entry in entries]
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise PipelineError(f"{run} is no run directory of EasyDeL's ({INDEX}: {error!r}); {MEND}") from error
    for kind in (AVERAGE, WEIGHTS):
        found = {path: match.groups() for path in paths if (match := kind.match(path))}
        if len(set(found.values())) == 1:
            return set(found), next(iter(found.values()))
    raise PipelineError(f"{run} holds no weights ({INDEX} names {len(paths)} other arrays); {MEND}")


def _problem(array: np.ndarray | str, shape: jax.ShapeDtypeStruct) -> str | None:
    if isinstance(array, str):
        return array
    if array.shape != shape.shape or array.dtype != np.float32:
        return f"{array.dtype} {list(array.shape)}, wanted float32 {list(shape.shape)}"
    return None if np.isfinite(array).all() else "not finite"


def _read_all(run: StoragePath, paths: set[str]) -> dict[str, np.ndarray | str]:
    """Arrays, or what they lack, by path; all are on their way at once, which a bucket needs to be quick."""
    opened = {path: tensorstore.open(_spec(run, path), context=storage.tensorstore_context()) for path in sorted(paths)}
    arrays = {path: _result(run, path, future) for path, future in opened.items()}
    reading = {path: array if isinstance(array, str) else array.read() for path, array in arrays.items()}
    return {path: one if isinstance(one, str) else _result(run, path, one) for path, one in reading.items()}


def _spec(run: StoragePath, path: str) -> dict[str, Any]:
    # a chunk that is not there would be read as zeros
    lies = storage.kvstore(run / path)
    return {"driver": "zarr", "kvstore": lies, "open": True, "fill_missing_data_reads": False}


def _result(run: StoragePath, path: str, future: Any) -> Any:
    """What a future holds; a text when the array or a chunk of it is not there."""
    try:
        return future.result()
    except ValueError as error:
        told = str(error).splitlines()[0]
        if "NOT_FOUND" not in told:
            raise PipelineError(f"{run / path} cannot be read ({told}); {MEND}") from error
        return f"missing ({told})" if "chunk" in told else "missing"
