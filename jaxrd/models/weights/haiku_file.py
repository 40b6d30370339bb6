"""DeepMind's weight files: `np.save(path, (params, state))` of Haiku's nested dictionaries, read without Haiku and JAX.

Such a file is an array of Python objects, so its content is a pickle; `np.load(allow_pickle=True)` would execute it.
"""

import mmap
import os

import numpy as np

from jaxrd.errors import InputError
from jaxrd.models.weights import unpickling
from jaxrd.models.weights.pickle_machine import Damaged, StandIn
from jaxrd.models.weights.unpickling import Tensor

_WAY_OUT = "save the tuple (params, state) as dictionaries of NumPy arrays with np.save, and give that file"


def read(path: str | os.PathLike) -> tuple[dict, dict]:
    """Returns (params, state) of a Haiku model, as nested dictionaries of NumPy arrays.

    Args:
      path: an .npy file of the pair. Dictionaries may be Haiku's own mappings, arrays may be JAX's.

    Raises:
      InputError: the file cannot be read, is damaged, holds something else, or its pickle asks for more than that.
    """
    with unpickling.reading(path):
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""
        if not mapped:
            raise Damaged("it is empty")
        if header(mapped)[1] != np.dtype(object):
            raise InputError(f"{path}: it holds a plain array, not the parameters and the state of a Haiku model; {_WAY_OUT}")
        content = unpickling.load(mapped, path, _TABLE, _WAY_OUT)
        if isinstance(content, list) and len(content) == 1:  # an array without dimensions around the pair
            content = content[0]
        if not isinstance(content, (list, tuple)) or len(content) != 2 or not all(isinstance(part, dict) for part in content):
            raise InputError(f"{path}: its pickle holds a {_described(content)}, not a pair of dictionaries; {_WAY_OUT}")
        arrays: dict[int, np.ndarray] = {}
        return tuple(_arrays(path, part, (), arrays) for part in content)


def header(file) -> tuple[tuple[int, ...], np.dtype]:
    """Returns shape and dtype that the header of an .npy file gives, and leaves the file at its content.

    Raises:
      Exception: whatever NumPy raises where it is damaged.
    """
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    return shape, dtype


def _described(content) -> str:
    names = {Tensor: "single array", dict: "dictionary"}
    kind = names.get(type(content), type(content).__name__)
    return f"{kind} of {len(content)}" if isinstance(content, (list, tuple)) else kind


def _arrays(path, value, keys: tuple[str, ...], arrays: dict[int, np.ndarray]) -> dict | np.ndarray:
    """Returns nested dictionaries with each leaf as an array; `arrays` has those that were made, by the id of their tensor."""
    where = unpickling.printable(" ".join(keys)) or "its outermost dictionary"
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise InputError(f"{path}: {where} has keys that are no strings; {_WAY_OUT}")
        return {key: _arrays(path, item, (*keys, key), arrays) for key, item in value.items()}
    if isinstance(value, Tensor):
        if id(value) not in arrays:
            arrays[id(value)] = value.array()
        return arrays[id(value)]
    if isinstance(value, (bool, int, float, complex)):
        return np.asarray(value)
    raise InputError(f"{path}: {where} is a {type(value).__name__} rather than an array; {_WAY_OUT}")


def _jax_array(function, arguments, state, _) -> unpickling.Array:
    """A JAX array's pickle is that of a NumPy array: its function, arguments and state, and what JAX adds about its type."""
    if not isinstance(function, StandIn) or not function.name.endswith(".multiarray._reconstruct"):
        raise Damaged("its pickle has a JAX array that is not made of a NumPy array")
    array = function.call(*arguments)
    array.build(state)
    return array


def _mapping(items) -> dict:
    if not isinstance(items, dict):
        raise Damaged("its pickle has a Haiku mapping that is not made of a dictionary")
    return items


_TABLE = {
    **unpickling.CONTAINERS, **unpickling.NUMPY, **unpickling.make_table({
        **{f"haiku._src.data_structures.{name}": _mapping for name in ("FlatMapping", "FlatMap", "frozendict")},
        "jax._src.array._reconstruct_array": _jax_array,  # since JAX 0.4
        "jax._src.device_array.reconstruct_device_array": _jax_array,
        "jax.interpreters.xla.reconstruct_device_array": _jax_array,
    })}
