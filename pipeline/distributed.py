"""Several hosts that run one program: how they find each other, which of them speaks, and how it tells the others."""

import functools
import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from pipeline.artifacts import PipelineError

SIZE_STEP = 2**12  # bytes; messages are padded to a multiple, so that few programs are compiled to carry them


@functools.cache  # JAX joins once
def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Meet the other hosts; must come before anything else asks JAX for devices.

    What is None JAX finds out where it can, as on a TPU slice or under SLURM. Raises PipelineError when it cannot.
    """
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        raise PipelineError(
            f"the hosts did not find each other ({str(error).splitlines()[0]}); start the same command on every host, "
            "with mesh.coordinator, mesh.num_processes and mesh.process_id where the machine does not know them"
        ) from error


def is_first() -> bool:
    """Whether this is the host that answers, writes and logs; alone it is."""
    return jax.process_index() == 0


def are_several() -> bool:
    """Whether there are others."""
    return jax.process_count() > 1


def meet(where: str) -> None:
    """Go on when all hosts are here; alone at once."""
    if are_several():
        multihost_utils.sync_global_devices(where)


def whole(array: Any) -> np.ndarray:
    """An array that lies on the devices of all hosts, whole on each of them."""
    if are_several() and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def spread(rows: np.ndarray, place: jax.sharding.Sharding) -> jax.Array:
    """The array of which every host has its own part of the rows; `place` splits rows evenly over the hosts."""
    if are_several():
        return jax.make_array_from_process_local_data(place, rows)
    return jax.device_put(rows, place)


def told_by_first(message: Any) -> Any:
    """What the first host gives here, on every host; JSON values. All hosts must call this equally often."""
    text = json.dumps(message).encode() if is_first() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(-(-size // SIZE_STEP) * SIZE_STEP, np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))[:size]))
