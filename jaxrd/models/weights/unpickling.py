"""Pickles of other people's weights, read without executing anything of them.

Python's own unpickler calls whatever a file names. `pickle_machine` knows names only as keys of a table, and the tables here
hold functions of this package that build numbers, containers and tensors. What a file asks for besides is refused, in one line
that lists it.
"""

import contextlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from jaxrd.errors import InputError
from jaxrd.models.weights.pickle_machine import (
    Buildable, Damaged, Machine, NotRead, Refused, StandIn, Table, checked_key)

_MOST_OBJECTS = 10_000_000
_DEEPEST = 100
_MOST_DIMENSIONS = 64  # as NumPy and PyTorch have it

# What neither NumPy's type codes nor PyTorch's names say alike.
EXTRA_DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")}


class Tensor:
    """A tensor of a file, which is read from there when `array` is called.

    Attributes:
      shape: tuple of ints.
      dtype: np.dtype in the machine's byte order; bfloat16 is that of ml_dtypes.
    """

    __slots__ = ("shape", "dtype", "_read")

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, read: Callable[[], np.ndarray]):
        self.shape, self.dtype, self._read = shape, dtype, read

    def array(self) -> np.ndarray:
        """Returns the values, read-only: a view of the file's memory map where the format allows one.

        Raises:
          InputError: the values do not match the checksum that the file gives for them.
        """
        return self._read()

    def __repr__(self):
        return f"Tensor(shape={self.shape}, dtype={self.dtype})"


@contextlib.contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """Makes one line of InputError of every exception in the block, InputError excepted."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}; give a file that you can read") from None
    except MemoryError:
        raise InputError(f"{path}: it needs more memory than there is; read it on a larger machine") from None
    except Damaged as error:
        raise InputError(f"{path}: damaged: {printable(str(error))}; download or save it again") from None
    except NotRead as error:
        raise InputError(f"{path}: {printable(str(error))}; give a file of the weights alone, such as a state_dict") from None
    except Exception as error:  # a pickle or an archive of random bytes can end in any of them
        text = printable(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
        raise InputError(f"{path}: damaged ({text}); download or save it again") from None


def load(
        file: BinaryIO,
        path: str | os.PathLike,
        table: Table,
        way_out: str,
        persistent_load: Callable[[Any], Any] | None = None,
) -> Any:
    """Returns the object that the pickle at the file's position describes; the position is then behind the pickle.

    Args:
      file: with `read`, `readline` and `tell`.
      path: for messages.
      table: (module, name) -> stand-in; `NUMPY` and `CONTAINERS` are two.
      way_out: how to make a file that can be read; ends the line of a refusal.
      persistent_load: takes a persistent id, and returns an object or raises.

    Returns:
      None, bool, int, float, complex, str, bytes, Tensor, and tuples, lists and dicts of them. Mappings of every kind are
      plain dicts, sets are lists, NumPy's scalars are Python's numbers, and its arrays are Tensors.

    Raises:
      InputError: the pickle asks for names outside the table.
      Exception: any, where it is damaged; to be called within `reading`.
    """
    machine, value = Machine(table, persistent_load), None
    try:
        value = machine.run(file)
    except Exception:
        if not machine.refused:
            raise
    if machine.refused:
        raise InputError(f"{path}: {_refusal(machine, value)}; {way_out}")
    return _Plain().plain(value)


def _refusal(machine: Machine, value: Any) -> str:
    """Returns what a pickle asks for, and which model it holds where it holds a whole one."""
    names = list(dict.fromkeys(refused.name for refused in machine.refused))
    listed = ", ".join(map(printable, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    models = [instance.name for instance in machine.instances if instance.is_module][:1]  # the outermost is made first
    if isinstance(value, Refused) and re.search("net|model", value.name, re.IGNORECASE):
        models.append(value.name)
    models += [name for name in names if name.startswith("torch.nn.")]
    whole = f" and holds a whole pickled model of class {printable(models[0])} rather than its weights" if models else ""
    return f"its pickle asks for {listed}{whole}; only tensors and containers are read and nothing of it was executed"


def printable(text: str) -> str:
    """Returns text of a file or an exception fit for one line of a terminal."""
    text = text.encode("unicode_escape", "backslashreplace").decode("ascii")
    return text if len(text) <= 200 else text[:197] + "..."


class _Plain:
    """Makes plain objects of what the machine built, within a bound: a few bytes can describe 2^1000 nested lists."""

    def __init__(self):
        self.objects = 0

    def plain(self, value, depth: int = 0) -> Any:
        """Returns the value in plain types; raises Damaged where it is too large, nested too deep, or contains itself."""
        self.objects += 1
        if self.objects > _MOST_OBJECTS or depth > _DEEPEST:
            raise Damaged(f"its pickle nests deeper than {_DEEPEST} or holds more than {_MOST_OBJECTS} objects")
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, Tensor)):
            return value
        if isinstance(value, dict):
            return {key: self.plain(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)([self.plain(item, depth + 1) for item in value])
        if isinstance(value, StandIn):
            return value.name
        if isinstance(value, Array):
            content = value.content()
            return self.plain(content, depth + 1) if isinstance(content, list) else content
        raise NotRead("its pickle holds a data type without data, which is not read")


class _Dtype(Buildable):
    """Stands in for np.dtype while its pickle is read: a plain number type, or object where only Python objects follow."""

    __slots__ = ("dtype",)

    def __init__(self, code, *_):
        if isinstance(code, StandIn):  # ml_dtypes' types are pickled by their class
            code = code.name.rpartition(".")[2]
        if not isinstance(code, str):
            raise Damaged("its pickle has a data type without a name")
        if code in EXTRA_DTYPES:
            self.dtype = EXTRA_DTYPES[code]
        elif re.fullmatch(r"[biufc]\d{1,2}|O8?", code):
            self.dtype = np.dtype(code)
        else:
            raise NotRead(f"its pickle has an array of NumPy's type {printable(code)}, and only numbers are read")

    def build(self, state):
        """Takes the byte order; fields and subarrays belong to types that are refused by their code."""
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise Damaged("its pickle has a data type with an unknown byte order")
        if self.dtype.kind != "O":
            self.dtype = self.dtype.newbyteorder(state[1])


class Array(Buildable):
    """Stands in for np.ndarray while its pickle is read."""

    __slots__ = ("_content",)

    def __init__(self):
        self._content = None

    def build(self, state):
        """Takes ndarray.__setstate__'s (version, shape, dtype, whether Fortran, bytes or list of objects)."""
        _, shape, dtype, fortran, data = state
        self._content = _array(data, dtype, shape, "F" if fortran else "C")

    def content(self) -> Any:
        """Returns a Tensor, or a list of the elements of an array of objects."""
        if self._content is None:
            raise Damaged("its pickle has an array without content")
        return self._content


def checked_shape(shape, itemsize: int) -> tuple[int, ...]:
    """Returns a shape from a file; raises Damaged unless an array of it can exist."""
    if not isinstance(shape, (tuple, list)) or not all(type(size) is int and 0 <= size <= sys.maxsize for size in shape):
        raise Damaged("a tensor's shape is not made of whole numbers of at least 0 that an array can have")
    # NumPy counts the elements without the empty dimensions.
    if len(shape) > _MOST_DIMENSIONS or math.prod(size for size in shape if size) > sys.maxsize // itemsize:
        raise Damaged(f"a tensor has {len(shape)} dimensions and claims more elements than can exist")
    return tuple(shape)


def _array(data, dtype, shape, order: str) -> Tensor | list:
    if not isinstance(dtype, _Dtype):
        raise Damaged("its pickle has an array without a data type")
    dtype, shape = dtype.dtype, checked_shape(shape, dtype.dtype.itemsize)
    count = math.prod(shape)
    if dtype.kind == "O":
        if not isinstance(data, list) or len(data) != count:
            raise Damaged("its pickle has an array of objects without its objects")
        return data
    if isinstance(data, str):  # the bytes of Python 2
        data = data.encode("latin1")
    if not isinstance(data, bytes) or len(data) != count * dtype.itemsize:
        raise Damaged("its pickle has an array with too few or too many bytes")
    native = dtype.newbyteorder("=")

    def read():
        array = np.frombuffer(data, dtype).reshape(shape, order=order).astype(native, copy=False)
        array.flags.writeable = False
        return array

    return Tensor(shape, native, read)


def _reconstruct(subtype, *_) -> Array:
    if not isinstance(subtype, StandIn) or subtype.name != "numpy.ndarray":
        raise Damaged("its pickle has an array of a special class")
    return Array()


def _from_buffer(data, dtype, shape, order, axes=None) -> Tensor | list:
    if order not in ("C", "F", "K"):
        raise Damaged("its pickle has an array in an unknown order")
    array = _array(data, dtype, shape, "F" if order == "F" else "C")
    if axes is None or isinstance(array, list):
        return array
    is_permutation = isinstance(axes, tuple) and all(type(axis) is int for axis in axes) and (
        sorted(axes) == list(range(len(array.shape))))
    if not is_permutation:
        raise Damaged("its pickle has an array with an impossible order of axes")
    return Tensor(tuple(array.shape[axis] for axis in axes), array.dtype, lambda: array.array().transpose(axes))


def _scalar(dtype, data=None) -> Any:
    content = _array(data, dtype, (), "C")
    if isinstance(content, list):
        raise Damaged("its pickle has a NumPy scalar that is no number")
    return content.array().item()


def _encode(text, encoding) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Damaged("its pickle has bytes in an unknown encoding")
    return text.encode("latin1")


def _mapping(items=()) -> dict:
    result = {}
    pairs = items.items() if isinstance(items, dict) else items
    for key, value in pairs:
        result[checked_key(key)] = value
    return result


def _path(*parts) -> str:
    if not all(isinstance(part, str) for part in parts):
        raise Damaged("its pickle has a path that is not made of text")
    return "/".join(parts)


def make_table(entries: Mapping[str, Callable | None]) -> dict[tuple[str, str], StandIn]:
    """Returns the table of stand-ins for `load` from {"module.name": function of this package, or None for the name}."""
    return {tuple(name.rsplit(".", 1)): StandIn(name, call) for name, call in entries.items()}


CONTAINERS = make_table({
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "collections.defaultdict": lambda factory=None, items=(): _mapping(items),
    "collections.deque": lambda items=(), length=None: list(items),
    "builtins.frozenset": lambda items=(): list(items),
    "__builtin__.frozenset": lambda items=(): list(items),
    # What a defaultdict makes: names, which are not called.
    **{f"{module}.{name}": None for module in ("builtins", "__builtin__") for name in ("list", "dict", "int", "long", "float")},
    # The options of many training scripts. Their attributes are left out, as those of a state_dict are.
    "argparse.Namespace": lambda: {},
    "types.SimpleNamespace": lambda: {},
    **{f"{module}.{name}": _path for module in ("pathlib", "pathlib._local") for name in (
        "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")},
    "builtins.set": lambda items=(): list(items),
    "__builtin__.set": lambda items=(): list(items),
    "_codecs.encode": _encode,
    "builtins.bytes": lambda: b"",  # what protocols 0 to 2 make of no bytes at all
    "__builtin__.bytes": lambda: b"",
})

NUMPY = make_table({
    "numpy.ndarray": None,
    "numpy.dtype": _Dtype,
    **{f"ml_dtypes.{name}": None for name in EXTRA_DTYPES},
    **{f"{core}.multiarray._reconstruct": _reconstruct for core in ("numpy.core", "numpy._core")},
    **{f"{core}.multiarray.scalar": _scalar for core in ("numpy.core", "numpy._core")},
    **{f"{core}.numeric._frombuffer": _from_buffer for core in ("numpy.core", "numpy._core")},
})
