"""Lets several hosts run one program: they find each other, and the primary host broadcasts to the others."""

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
    """Connects to the other hosts; must come before anything else asks JAX for devices.

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
    """Returns whether this is the host that answers, writes and logs; a host alone is."""
    return jax.process_index() == 0


def is_multihost() -> bool:
    """Returns whether there are other hosts."""
    return jax.process_count() > 1


def barrier(name: str) -> None:
    """Waits until all hosts have reached the barrier of this name; a host alone goes on at once."""
    if is_multihost():
        multihost_utils.sync_global_devices(name)


def gather_to_host(array: Any) -> np.ndarray:
    """Returns, on every host, the whole of an array that lies on the devices of all hosts."""
    if is_multihost() and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def shard_rows(rows: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Returns the array whose rows the hosts hold in parts; `sharding` splits rows evenly over the hosts."""
    if is_multihost():
        return jax.make_array_from_process_local_data(sharding, rows)
    return jax.device_put(rows, sharding)


def broadcast_from_primary(message: Any) -> Any:
    """Returns the primary's message, a JSON value, on every host. All hosts must call this equally often."""
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
