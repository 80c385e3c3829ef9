"""What the devices at hand reach: the bandwidth of a copy, and the arithmetic of a large product."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pipeline.model.parallel.runtime import Runtime

COPY_BYTES = 2**28  # read, and as many written
PRODUCT_SIZE = {"cpu": 1024}  # rows and columns
LARGE_PRODUCT_SIZE = 8192  # of other devices


def copy_bandwidth(runtime: Runtime, repeats: int = 20) -> float:
    """Returns the bytes per second, read and written, of all devices together when each updates an array in place."""
    devices = 1 if runtime.mesh is None else runtime.mesh.devices.size
    shape = (devices, COPY_BYTES // 4)
    if runtime.mesh is None:
        array = jnp.ones(shape, jnp.float32)
    else:
        rows = jax.sharding.NamedSharding(runtime.mesh, jax.sharding.PartitionSpec(runtime.mesh.axis_names))
        array = jax.jit(lambda: jnp.ones(shape, jnp.float32), out_shardings=rows)()
    # in place: on a CPU, memory that is new to the process costs more than writing to it
    update = jax.jit(lambda values: values + 1.0, donate_argnums=0)

    def run() -> Array:
        nonlocal array
        array = update(array)
        return array

    return devices * 2 * COPY_BYTES / median_seconds(run, repeats)


def product_flops(runtime: Runtime, dtype: str, repeats: int = 5) -> float:
    """Returns the operations per second of all devices together, by the product of two square matrices on one."""
    size = PRODUCT_SIZE.get(jax.default_backend(), LARGE_PRODUCT_SIZE)
    devices = 1 if runtime.mesh is None else runtime.mesh.devices.size
    left, right = (jax.random.normal(jax.random.key(seed), (size, size)).astype(dtype) for seed in (0, 1))
    product = jax.jit(lambda a, b: a @ b)
    return devices * 2 * size**3 / median_seconds(lambda: product(left, right), repeats)


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Returns the median time of a call whose result is waited for; the first one, which compiles, is left out."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
