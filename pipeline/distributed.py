"""Several hosts that run one program: how they find each other, which of them speaks, and how it tells the others."""

import functools
import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from pipeline.errors import PipelineError

# a message goes out with its size in front, and what is longer in a second exchange, padded to a multiple: so few
# programs are compiled to carry messages
FIRST_BYTES, SIZE_BYTES = 2**12, 8


@functools.cache  # JAX joins once
def initialize(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
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


def is_primary() -> bool:
    """Whether this is the host that answers, writes and logs; alone it is."""
    return jax.process_index() == 0


def is_multihost() -> bool:
    """Whether there are others."""
    return jax.process_count() > 1


def barrier(where: str) -> None:
    """Go on when all hosts are here; alone at once."""
    if is_multihost():
        multihost_utils.sync_global_devices(where)


def gather_to_host(array: Any) -> np.ndarray:
    """An array that lies on the devices of all hosts, whole on each of them."""
    if is_multihost() and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def shard_rows(rows: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """The array of which every host has its own part of the rows; `sharding` splits rows evenly over the hosts."""
    if is_multihost():
        return jax.make_array_from_process_local_data(sharding, rows)
    return jax.device_put(rows, sharding)


def broadcast_from_primary(message: Any) -> Any:
    """What the first host gives here, on every host; JSON values. All hosts must call this equally often."""
    text = json.dumps(message).encode() if is_primary() else b""
    first = _broadcast(len(text).to_bytes(SIZE_BYTES, "little") + text[: FIRST_BYTES - SIZE_BYTES], FIRST_BYTES)
    size, begun = int.from_bytes(first[:SIZE_BYTES], "little"), first[SIZE_BYTES:]
    left = size - len(begun)
    if left > 0:
        begun += _broadcast(text[len(begun) :], -(-left // FIRST_BYTES) * FIRST_BYTES)
    return json.loads(begun[:size])


def _broadcast(data: bytes, num_bytes: int) -> bytes:
    padded = np.zeros(num_bytes, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded)))
