"""Weights in the safetensors format: names, types and shapes as JSON, then the values. Nothing in it can be executed."""

import json
import math
import mmap
import os
from collections.abc import Mapping

import numpy as np
import safetensors
import safetensors.numpy

from jaxrd.errors import InputError
from jaxrd.models.weights import unpickling
from jaxrd.models.weights.pickle_machine import Damaged
from jaxrd.models.weights.unpickling import EXTRA_DTYPES

_DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": EXTRA_DTYPES["bfloat16"],
    "F8_E4M3": EXTRA_DTYPES["float8_e4m3fn"], "F8_E5M2": EXTRA_DTYPES["float8_e5m2"],
    "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16), "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64), "U32": np.dtype(np.uint32), "U16": np.dtype(np.uint16), "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_), "C64": np.dtype(np.complex64),
}


def read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the arrays of a file by name, and its metadata.

    The library checks the header; the arrays are read-only views of the file's memory map, bfloat16 by ml_dtypes, for which
    the library's NumPy interface has no type.

    Args:
      path: the file, which must not change while its arrays are used.

    Raises:
      InputError: the file cannot be read, is damaged or no safetensors file, or holds a type that NumPy has not.
    """
    with unpickling.reading(path):
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise Damaged("it is empty")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with safetensors.safe_open(path, framework="numpy") as checked:
            names, metadata = list(checked.keys()), dict(checked.metadata() or {})
        start = 8 + int.from_bytes(mapped[:8], "little")
        header = json.loads(mapped[8:start])
        return {name: _array(path, mapped, start, name, **header[name]) for name in names}, metadata


def _array(path, mapped, start: int, name: str, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    if dtype not in _DTYPES:
        raise InputError(
            f"{path}: its entry {unpickling.printable(name)} is of type {dtype}, which is not read; "
            f"save it as one of {', '.join(_DTYPES)}")
    little_endian = _DTYPES[dtype].newbyteorder("<")
    array = np.frombuffer(mapped, little_endian, math.prod(shape), start + data_offsets[0]).reshape(shape)
    return array.astype(_DTYPES[dtype], copy=False)


def write(path: str | os.PathLike, entries: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes arrays by name, and metadata.

    Args:
      path: the file.
      entries: arrays of numbers or bool.
      metadata: strings by name.

    Raises:
      InputError: an entry or the metadata are of a type that the format has not.
      OSError: the file cannot be written.
    """
    arrays = {}
    for name, value in entries.items():
        dtype = np.asarray(value).dtype.newbyteorder("=")
        if not isinstance(name, str):
            raise InputError(f"{path}: its entry {name!a} is named by a {type(name).__name__}; name it by a string")
        if dtype not in _DTYPES.values():
            known = ", ".join(map(str, _DTYPES.values()))
            raise InputError(f"{path}: its entry {name} is {dtype}, which is no type of safetensors; give {known}")
        arrays[name] = np.asarray(value, dtype, order="C")
    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise InputError(f"{path}: its metadata hold what is no string; give strings by name")
    try:
        safetensors.numpy.save_file(arrays, path, dict(metadata))
    except safetensors.SafetensorError as error:
        raise OSError(f"is the disk full? {error}") from None
