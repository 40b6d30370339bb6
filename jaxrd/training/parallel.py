"""Devices: one mesh with the single axis "data", and how arrays lie on it."""

import ctypes
import math
import os
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxrd.errors import InputError, nearest_multiples


def data_mesh(devices: list | None = None) -> Mesh:
    """Returns the mesh over `devices` (all of them by default).

    Auto axes: the compiler shards the program. Explicit axes, the default of `jax.make_mesh`, refuse per-example random
    augmentation.
    """
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device: parameters, optimiser state, metrics."""
    return NamedSharding(mesh, PartitionSpec())


def sharded(mesh: Mesh, accumulation: int = 1) -> NamedSharding:
    """Batches: the first axis split over the devices, or the second where the first numbers micro-batches."""
    return NamedSharding(mesh, PartitionSpec("data") if accumulation == 1 else PartitionSpec(None, "data"))


def state_shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns shardings that split kernels over the devices, along their longest axis that can be; vectors stay whole.

    For the optimiser's state and the weight average, of which a device then holds its part alone (stage 1 of ZeRO, Rajbhandari
    et al. 2020): the compiler has each device update its part and brings the new weights together.

    Args:
      tree: arrays or their shapes.
      mesh: the devices.
    """
    def sharding(leaf):
        axes = [axis for axis, size in enumerate(leaf.shape) if size and size % mesh.size == 0]
        if not axes or leaf.ndim < 2 or mesh.size == 1:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "data"))

    return jax.tree.map(sharding, tree)


def check_batch_size(name: str, batch_size: int, mesh: Mesh, accumulation: int = 1, bn_groups: int | None = None) -> None:
    """Raises InputError where devices, micro-batches and BatchNorm groups cannot share a batch equally.

    Args:
      name: of the field.
      batch_size: images of a batch.
      mesh: the devices, which share each micro-batch.
      accumulation: micro-batches of a batch.
      bn_groups: BatchNorm groups of a batch; None for none.
    """
    unit = math.lcm(mesh.size * accumulation, bn_groups or 1)
    if batch_size % unit:
        shares = [f"{mesh.size} devices"] if mesh.size > 1 else []
        shares += [f"{accumulation} micro-batches"] if accumulation > 1 else []
        shares += [f"{bn_groups} BatchNorm groups"] if bn_groups else []
        raise InputError(
            f"{name} is {batch_size}, which {' and '.join(shares)} cannot share equally; "
            f"use a multiple of {unit}, such as {nearest_multiples(batch_size, unit)}")


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh, accumulation: int = 1) -> dict[str, jax.Array]:
    """Returns a global batch, whole on the host, split over "data": each process puts the rows of its own devices there.

    With `accumulation` above 1 each array has an axis of micro-batches in front, see `sharded`.
    """
    split = sharded(mesh, accumulation)
    return {name: jax.make_array_from_callback(value.shape, split, lambda part, value=value: value[part])
            for name, value in batch.items()}


def replicate(tree: Any, mesh: Mesh, shardings: Any = None) -> Any:
    """Returns a tree of host values or arrays of this process on the devices of the mesh, without asking other processes.

    Args:
      tree: the same in every process, which is not checked: `jax.device_put` would, by a collective, for which a process that
        has refused its input would not be there.
      mesh: the devices.
      shardings: a tree of shardings; None for a copy on every device.
    """
    if shardings is None:
        shardings = jax.tree.map(lambda _: replicated(mesh), tree)
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put(leaf, sharding):
        if jnp.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda part: leaf[part])

    return jax.tree.map(put, tree, shardings)


def enable_compilation_cache() -> None:
    """Keeps compiled programs on disk between runs, under ~/.cache/jaxrd unless JAX_COMPILATION_CACHE_DIR says otherwise."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "jaxrd" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of mallopt, in <malloc.h>


def prepare_process() -> None:
    """Sets what a process needs to be fed at full speed; for command lines, as the settings are the whole process's.

    The C library keeps memory that batches and activations have freed, for the next ones. glibc gives blocks of their size
    back to the system and asks for them again in every step, which costs a page fault for each 4 KiB: on CPU a third of the
    time that input takes. A process still holds no more than at its peak. The user's own MALLOC_MMAP_THRESHOLD_ and
    MALLOC_TRIM_THRESHOLD_ stand; elsewhere than on glibc nothing is set.

    And the thread that feeds and the loop that it feeds wait 0.1 ms for each other at most, not Python's 5 ms, in which a
    small batch would be augmented ten times.
    """
    sys.setswitchinterval(1e-4)
    if not sys.platform.startswith("linux") or {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & set(os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc takes
        mallopt(_TRIM_THRESHOLD, 1 << 30)
