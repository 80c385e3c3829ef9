"""Reading EasyDeL's run directories without EasyDeL: zarr arrays under the paths of `DraftWeights`."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore

from pipeline.artifacts import PipelineError
from pipeline.model import draft
from pipeline.model.checkpoints import weight_paths
from pipeline.model.draft import DraftConfig, DraftWeights

INDEX, PREFIX = "tensorstore_index.json", "model"
MEND = "delete the checkpoint and run stage=train again"


def read_checkpoint(run: Path, config: DraftConfig) -> DraftWeights:
    """The float32 weights of a run directory (`run-<step>`).

    Raises PipelineError naming every array that is missing, unexpected, misshapen or not finite.
    """
    index = json.loads((run / INDEX).read_text())
    stored = {entry["path"] for entry in index["prefixes"][PREFIX]}
    shapes = draft.weight_shapes(config)
    wanted = {f"{PREFIX}/{path.replace('.', '/')}": shape for path, shape in weight_paths(shapes)}
    problems = [f"{path}: unexpected" for path in sorted(stored - wanted.keys())]
    leaves = []
    for path, shape in wanted.items():
        array = _read(run / path) if path in stored else None
        if array is None:
            problems.append(f"{path}: missing")
        elif array.shape != shape.shape or array.dtype != np.float32:
            problems.append(f"{path}: {array.dtype} {list(array.shape)}, wanted float32 {list(shape.shape)}")
        elif not np.isfinite(array).all():
            problems.append(f"{path}: not finite")
        else:
            leaves.append(jnp.asarray(array))
    if problems:
        raise PipelineError(f"{run}: {len(problems)} array(s) wrong; {MEND}\n  " + "\n  ".join(problems))
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _read(path: Path) -> np.ndarray | None:
    store: dict[str, Any] = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(path)}}
    try:
        return np.asarray(tensorstore.open(store, open=True, read=True).result().read().result())
    except ValueError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise PipelineError(f"{path} cannot be read ({error}); {MEND}") from error
