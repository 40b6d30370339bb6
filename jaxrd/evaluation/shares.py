"""The points of an evaluation divided among the processes of a run, and what they found put together again.

Every process attacks its share, each P-th point, on devices of its own: attacks hold no collective, so a process whose points
take longer keeps nobody waiting before the end. Every random number follows the index of its image, so what is put together
is what one process finds.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrd.attacks.outcome import Outcome, Tally
from jaxrd.errors import InputError
from jaxrd.evaluation.alignment.batching import equal_batches, in_batches
from jaxrd.training import parallel, processes

_AT_ONCE = 64 << 20  # bytes of a process in one collective, for all processes' arrive on every device


def rows(n: int) -> np.ndarray:
    """Returns the points of this process, [k] int: as many as any other's, but for one; none if there are too few.

    Neighbours are in different shares: in data sets sorted by class they are alike, and robust images take longest.
    """
    return np.arange(jax.process_index(), n, jax.process_count())


def largest(n: int) -> int:
    """Returns the number of points of the largest share, which sets the size of the batches of all."""
    return math.ceil(n / jax.process_count())


def local_mesh(mesh: Mesh) -> Mesh:
    """Returns the devices of a mesh that are this process's own; raises InputError where none is."""
    own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    if not own:
        raise InputError(f"devices: none of the {mesh.size} is of process {jax.process_index()}; name some of every process")
    return mesh if len(own) == mesh.size else parallel.data_mesh(own)


def local(variables: Any) -> Any:
    """Returns a pytree of arrays as it is, or each as the whole array on a device of this process.

    Arrays over devices of several processes have a copy there where they are replicated. Those that are divided are brought
    together first, by all processes at once.
    """
    divided = [leaf for leaf in jax.tree.leaves(variables) if _abroad(leaf) and not leaf.is_fully_replicated]
    if divided:
        whole = dict(zip(map(id, divided), _brought_together(divided[0].sharding.mesh)(divided)))
        variables = jax.tree.map(lambda leaf: whole.get(id(leaf), leaf), variables)
    return jax.tree.map(lambda leaf: leaf.addressable_data(0) if _abroad(leaf) else leaf, variables)


def _abroad(leaf) -> bool:
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


@functools.cache
def _brought_together(mesh: Mesh):
    return jax.jit(lambda leaves: leaves, out_shardings=parallel.replicated(mesh))


def complete(values: np.ndarray) -> np.ndarray:
    """Returns [n, ...] values to which every process gave those of its own `rows`; the others' are not read."""
    if jax.process_count() == 1:
        return values
    own, count = np.ascontiguousarray(values[rows(len(values))]), largest(len(values))
    result = np.empty_like(values)
    block = max(1, min(count, _AT_ONCE // max(1, values[:1].nbytes)))
    for first in range(0, count, block):
        padded = np.zeros((block, *values.shape[1:]), values.dtype)  # shares are alike but for one
        part = own[first:first + block]
        padded[:len(part)] = part
        for process, found in enumerate(_gather_exactly(padded)):
            there = result[process::jax.process_count()][first:first + block]
            there[:] = found[:len(there)]
    return result


def per_example(function: Callable[..., Any], *arrays: Any, batch_size: int, mesh: Mesh) -> Any:
    """Returns function(*arrays) as `alignment.in_batches`, of which every process computes its `rows`, and all return all.

    Args:
      function, batch_size: see `alignment.in_batches`.
      *arrays: [n, ...] each, the same in every process; n at least 1.
      mesh: from `local_mesh`.

    Raises:
      InputError: see `alignment.in_batches`; where one process meets it, all raise.
    """
    n = len(arrays[0])
    own = rows(n)
    with processes.together():
        found = in_batches(
            function, *(array[own] for array in arrays), batch_size=equal_batches(largest(n), batch_size), mesh=mesh)

    def whole(values):
        result = np.zeros((n, *values.shape[1:]), values.dtype)
        result[own] = values
        return complete(result)

    return jax.tree.map(whole, found)


def complete_outcome(outcome: Outcome) -> Outcome:
    """Returns the outcome of a cascade on all points, of which every process has attacked its `rows`."""
    if jax.process_count() == 1:
        return outcome
    names = ("points", "forwards", "backwards", "zero_gradients")
    counts = _gather_exactly(np.array([[getattr(tally, name) for name in names] for tally in outcome.tallies.values()]))
    seconds = _gather_exactly(np.array([tally.seconds for tally in outcome.tallies.values()]))
    tallies = {
        stage: Tally.of_all([Tally(*map(int, count), float(time)) for count, time in zip(counts[:, at], seconds[:, at])])
        for at, stage in enumerate(outcome.tallies)}
    arrays = {name: complete(getattr(outcome, name)) for name in ("images", "clean_correct", "attack_index", "rescored")}
    return Outcome(np.arange(len(outcome.images)), **arrays, tallies=tallies, flags=outcome.flags, metadata=outcome.metadata)


def longest(seconds: float) -> float:
    """Returns the longest of the times that the processes took."""
    return float(_gather_exactly(np.array([seconds])).max())


def _gather_exactly(values: np.ndarray) -> np.ndarray:
    """`processes.gather` byte by byte, as JAX would make 32 bits of 64."""
    flat = np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint8)
    gathered = np.ascontiguousarray(processes.gather(flat))
    return gathered.view(values.dtype).reshape(gathered.shape[0], *values.shape)
