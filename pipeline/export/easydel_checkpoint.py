"""Reads EasyDeL's run directories without EasyDeL: zarr arrays under the paths of `DFlashWeights`.

An array is read whole, however many devices wrote it in however many chunks, from a disk or from a bucket.
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
AVERAGE = re.compile(r"(tx/\d+/average/).*(/value)$")  # the state of train/optimizer.py, at an index of its chain
TRAIN_AGAIN = "delete the checkpoint and run stage=train again"


def read_checkpoint(run: StoragePath, config: DFlashConfig) -> DFlashWeights:
    """Returns the float32 weights of a run directory (`run-<step>`): their average, where training computed one.

    Raises PipelineError naming every array that is missing, wholly or in part, unexpected, of another shape or not
    finite.
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
        raise PipelineError(f"{run}: {len(problems)} array(s) wrong; {TRAIN_AGAIN}\n  " + "\n  ".join(problems))
    return jax.tree.unflatten(jax.tree.structure(shapes), [jnp.asarray(found[path]) for path in wanted])


def holds_weights(name: str) -> bool:
    """Returns whether `read_checkpoint` may read this file of a run directory."""
    return name == INDEX or name.startswith("model/") or "/average/" in name


def _stored(run: StoragePath) -> tuple[set[str], tuple[str, str]]:
    """Returns the paths of the weights' arrays in EasyDeL's index, and how these paths begin and end."""
    try:
        index = json.loads((run / INDEX).read_text())
        paths = [entry["path"] for entries in index["prefixes"].values() for entry in entries]
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise PipelineError(f"{run} is no run directory of EasyDeL's ({INDEX}: {error!r}); {TRAIN_AGAIN}") from error
    for kind in (AVERAGE, WEIGHTS):
        found = {path: (match[1], match[2]) for path in paths if (match := kind.match(path))}
        if len(set(found.values())) == 1:
            return set(found), next(iter(found.values()))
    raise PipelineError(f"{run} holds no weights ({INDEX} names {len(paths)} other arrays); {TRAIN_AGAIN}")


def _problem(array: np.ndarray | str, shape: jax.ShapeDtypeStruct) -> str | None:
    if isinstance(array, str):
        return array
    if array.shape != shape.shape or array.dtype != np.float32:
        return f"{array.dtype} {list(array.shape)}, wanted float32 {list(shape.shape)}"
    return None if np.isfinite(array).all() else "not finite"


def _read_all(run: StoragePath, paths: set[str]) -> dict[str, np.ndarray | str]:
    """Returns arrays, or what is missing of them, by path; all reads run at once, which makes buckets quick."""
    opened = {path: tensorstore.open(_spec(run, path), context=storage.tensorstore_context()) for path in sorted(paths)}
    arrays = {path: _result(run, path, future) for path, future in opened.items()}
    reading = {path: array if isinstance(array, str) else array.read() for path, array in arrays.items()}
    return {path: read if isinstance(read, str) else _result(run, path, read) for path, read in reading.items()}


def _spec(run: StoragePath, path: str) -> dict[str, Any]:
    # a missing chunk would otherwise be read as zeros
    kvstore = storage.kvstore(run / path)
    return {"driver": "zarr", "kvstore": kvstore, "open": True, "fill_missing_data_reads": False}


def _result(run: StoragePath, path: str, future: Any) -> Any:
    """Returns a future's result; a text when the array or a chunk of it is missing."""
    try:
        return future.result()
    except ValueError as error:
        reason = str(error).splitlines()[0]
        if "NOT_FOUND" not in reason:
            raise PipelineError(f"{run / path} cannot be read ({reason}); {TRAIN_AGAIN}") from error
        return f"missing ({reason})" if "chunk" in reason else "missing"
