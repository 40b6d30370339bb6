"""A function of a batch taken over any number of examples, in the memory of one batch."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial

from jaxrd.attacks.network import traced
from jaxrd.attacks.search import check_count
from jaxrd.errors import InputError
from jaxrd.training import parallel


def in_batches(function: Callable[..., Any], *arrays: Any, batch_size: int = 256, mesh: Mesh | None = None) -> Any:
    """Returns function(*arrays), computed in equal batches, the last one padded: one compilation, results on the host.

    A device holds one batch and what the function needs for it, however many examples there are. Results depend on neither
    the batch size nor the padding, as long as the function treats examples independently of each other: for random numbers
    give it keys, `jaxrd.threat.example_keys(key, n)`, as one of the arrays.

    Args:
      function: maps one batch of each array to a pytree of arrays, each [batch, ...]. It is compiled here. Of a
        `jax.tree_util.Partial`, such as `Partial(taylor_remainder, models.logits_fn(model, variables))`, all calls share one
        compilation, whatever its weights; any other function is compiled anew by each call. Either way the weights that it
        closes over are arguments of what is compiled, and not copied into it.
      *arrays: [n, ...] each, on the host or on a device; typed keys too.
      batch_size: examples per batch, at most (with a mesh, rounded up to a multiple of its devices).
      mesh: devices that share each batch; the function's arrays lie on all of them. None for where JAX puts them.

    Returns:
      The pytree with numpy arrays [n, ...].

    Raises:
      InputError: arrays of different lengths, or none; a function with a result that has no row per example.
    """
    check_count("batch_size", batch_size)
    arrays = [array if _is_key(array) else np.asarray(array) for array in arrays]
    n = _common_length(arrays)
    devices = mesh.size if mesh is not None else 1
    size = math.ceil(equal_batches(n, batch_size) / devices) * devices
    example = [jax.ShapeDtypeStruct((size, *array.shape[1:]), _dtype(array)) for array in arrays]
    shapes = jax.eval_shape(function, *example)
    for shape in jax.tree.leaves(shapes):
        if shape.shape[:1] != (size,):
            raise InputError(f"function returns {list(shape.shape)} for a batch of {size}; return one row per example, "
                             f"[{size}, ...], and take sums and means of what in_batches returns")
    found = jax.tree.map(lambda shape: np.empty((n, *shape.shape[1:]), shape.dtype), shapes)
    compiled = _compiled(function, example) if n else None
    for first in range(0, n, size):
        rows = np.arange(first, min(first + size, n))
        batch = [array[np.resize(rows, size)] for array in arrays]
        if mesh is not None:
            batch = jax.device_put(batch, parallel.sharded(mesh))
        # Waited for, so that no second batch begins while one is in memory.
        for whole, part in zip(jax.tree.leaves(found), jax.tree.leaves(compiled(*batch))):
            whole[rows] = np.asarray(part)[:len(rows)]
    return found


def equal_batches(n: int, batch_size: int) -> int:
    """Returns the size of the fewest equal batches of at most `batch_size` that hold n examples; 1 for none."""
    return math.ceil(n / math.ceil(n / batch_size)) if n else 1


def _common_length(arrays) -> int:
    lengths = [len(array) if array.ndim else None for array in arrays]
    if not arrays or None in lengths or len(set(lengths)) > 1:
        raise InputError(f"arrays have lengths {lengths}; give at least one, and the same number of examples in each")
    return lengths[0]


def _is_key(array) -> bool:
    return isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def _dtype(array):
    return array.dtype if _is_key(array) else jax.dtypes.canonicalize_dtype(array.dtype)


def _compiled(function, example) -> Callable[..., Any]:
    if isinstance(function, Partial):
        return functools.partial(_apply, function)
    # The arrays that it closes over would be constants of the compiled program: a second copy of a model's weights.
    closed, structure = traced(function, example), jax.tree.structure(jax.eval_shape(function, *example))

    @jax.jit
    def apply(constants, *arrays):
        with_constants = jax.extend.core.ClosedJaxpr(closed.jaxpr, constants)
        return jax.tree.unflatten(structure, jax.extend.core.jaxpr_as_fun(with_constants)(*arrays))

    return functools.partial(apply, closed.consts)


@jax.jit
def _apply(function: Partial, *arrays):
    return function(*arrays)
