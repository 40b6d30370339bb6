"""PyTorch's weight files, read and written without PyTorch.

What torch.save writes: since PyTorch 1.6 a zip archive of uncompressed members, `data.pkl` with the objects and `data/KEY`
with the values of each storage; before that, five pickles one after the other (magic number, protocol, system, objects,
storage keys) and the storages behind them. A tensor in either is a storage, an offset, a shape and strides.
"""

import functools
import io
import math
import mmap
import os
import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxrd.errors import InputError
from jaxrd.models.weights import unpickling
from jaxrd.models.weights.pickle_machine import Damaged, NotRead, Refused, StandIn
from jaxrd.models.weights.unpickling import EXTRA_DTYPES, Tensor

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_LARGEST_PICKLE = 1 << 28
_ALIGNMENT = 64  # of every storage, as torch.save has it: what maps the file reads aligned values
_WAY_OUT = "save model.state_dict() with torch.save where the class is defined, and give that file"

_STORAGES = {
    "DoubleStorage": np.dtype(np.float64), "FloatStorage": np.dtype(np.float32), "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": EXTRA_DTYPES["bfloat16"], "LongStorage": np.dtype(np.int64), "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16), "CharStorage": np.dtype(np.int8), "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_), "ComplexFloatStorage": np.dtype(np.complex64),
    "ComplexDoubleStorage": np.dtype(np.complex128), "UntypedStorage": np.dtype(np.uint8),
}
_STORAGE_OF_DTYPE = {dtype: name for name, dtype in _STORAGES.items() if name != "UntypedStorage"}
_DTYPES = {
    **{str(dtype): dtype for dtype in _STORAGE_OF_DTYPE},
    **{name: np.dtype(name) for name in ("uint16", "uint32", "uint64")}, **EXTRA_DTYPES,
}


class _Storage:
    """Bytes of the mapped file that one or more tensors share.

    Attributes:
      mapped, start, size: the file's memory map, and the bytes of it.
      dtype: of the elements.
      swapped: whether their byte order is not the machine's.
      check: raises InputError where the bytes do not match their checksum; None once that is certain, or where there is none.
    """

    def __init__(self, mapped, start: int | None, size: int, dtype: np.dtype, order: str, check: Callable | None = None):
        self.mapped, self.start, self.size = mapped, start, size
        self.dtype, self.swapped, self.check = dtype, order != sys.byteorder, check

    def read(self) -> np.ndarray:
        """Returns the bytes, as uint8."""
        if self.check:
            self.check()
            self.check = None
        return np.frombuffer(self.mapped, np.uint8, self.size, self.start)

    def is_alike(self, dtype: np.dtype, count: int) -> bool:
        """Returns whether it has as many elements of that type."""
        return self.dtype == dtype and self.size == count * dtype.itemsize


def read(path: str | os.PathLike) -> Any:
    """Returns what torch.save has put into a file, in either of its formats, with the tensors still in the file.

    Args:
      path: the file. It is mapped into memory, and must not change while its tensors are used.

    Returns:
      What the file holds: dicts (OrderedDicts become such), lists, tuples, numbers, strings, bytes and None, with Tensors
      as leaves. Parameters are Tensors.

    Raises:
      InputError: the file cannot be read, is damaged, or its pickle asks for more than tensors and containers; or its
        members are compressed.
    """
    with unpickling.reading(path):
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""
            if mapped[:2] == b"PK":
                return _read_zip(path, file, mapped)
        if not mapped:
            raise Damaged("it is empty")
        return _read_legacy(path, mapped)


def _read_zip(path, file, mapped) -> Any:
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise Damaged(f"the archive has {len(roots)} members DIRECTORY/data.pkl, and a torch file has one")
    root = roots[0]

    def locate(name):
        if root + name not in members:
            raise Damaged(f"its record {name} is missing")
        return _locate(path, mapped, members[root + name])

    def content(name) -> bytes:
        member = members.get(root + name)
        if member is not None and member.file_size > _LARGEST_PICKLE:
            raise Damaged(f"its record {name} has {member.file_size} bytes, where a few thousand are usual")
        start, size = locate(name)
        return _checked(memoryview(mapped)[start:start + size], members[root + name].CRC, name).tobytes()

    order = content("byteorder").decode("ascii").strip() if root + "byteorder" in members else "little"
    if order not in ("little", "big"):
        raise Damaged("its byteorder is neither little nor big")
    storages: dict[Any, _Storage] = {}

    def load_storage(identity):
        if module := _module(identity):
            return module
        dtype, key, _, count = _checked_identity(identity, fields=4)
        if key not in storages:
            name = f"data/{key}"
            start, size = locate(name)
            check = functools.partial(_check_storage, path, mapped, start, size, members[root + name].CRC, name)
            storages[key] = _Storage(mapped, start, size, dtype, order, check)
        if not storages[key].is_alike(dtype, count):
            raise Damaged(f"its pickle gives storage {key} of {storages[key].size} bytes another size, or two types")
        return storages[key]

    return unpickling.load(io.BytesIO(content("data.pkl")), path, _TABLE, _WAY_OUT, load_storage)


def _locate(path, mapped, member: zipfile.ZipInfo) -> tuple[int, int]:
    """Returns where a member's bytes start in the file, and their number."""
    name = unpickling.printable(member.filename)
    if member.compress_type != zipfile.ZIP_STORED:
        raise InputError(
            f"{path}: its record {name} is compressed, which torch.save never does; unpack the archive and pack it with "
            "zip -0, or save it again with torch.save")
    header = mapped[member.header_offset:member.header_offset + 30]
    if len(header) != 30 or header[:4] != b"PK\x03\x04" or member.flag_bits & 1:
        raise Damaged(f"its record {name} has no header")
    name_length, extra_length = struct.unpack_from("<HH", header, 26)
    start = member.header_offset + 30 + name_length + extra_length
    if member.file_size != member.compress_size or start + member.file_size > len(mapped):
        raise Damaged(f"its record {name} goes beyond the end of the file")
    return start, member.file_size


def _checked(content: memoryview, crc: int, name: str) -> memoryview:
    """Returns the bytes; raises Damaged where they have another CRC-32. PyTorch can leave them out, as 0."""
    if crc and zlib.crc32(content) != crc:
        raise Damaged(f"its record {name} does not match its checksum")
    return content


def _check_storage(path, mapped, start, size, crc, name) -> None:
    with unpickling.reading(path):
        _checked(memoryview(mapped)[start:start + size], crc, name)


def _read_legacy(path, mapped) -> Any:
    def load(persistent_load=None):
        return unpickling.load(mapped, path, _TABLE, _WAY_OUT, persistent_load)

    if load() != LEGACY_MAGIC or load() != _LEGACY_PROTOCOL:
        raise Damaged("it begins neither like a zip archive nor like a torch file from before PyTorch 1.6")
    if load().get("little_endian") is not True:
        raise InputError(f"{path}: it was written on a big-endian machine; save it again with PyTorch 1.6 or newer")
    storages: dict[Any, _Storage] = {}
    views: list[tuple[_Storage, _Storage, int]] = []

    def load_storage(identity):
        if module := _module(identity):
            return module
        dtype, key, _, count, view = _checked_identity(identity, fields=5)
        storage = storages.setdefault(key, _Storage(mapped, None, count * dtype.itemsize, dtype, "little"))
        if not storage.is_alike(dtype, count):
            raise Damaged(f"its pickle gives storage {key} two types or sizes")
        if view is None:
            return storage
        part, offset = _view(storage, view)
        views.append((part, storage, offset))
        return part

    objects, keys = load(load_storage), load()
    if not isinstance(keys, list) or set(keys) != set(storages):
        raise Damaged("its list of storages is not that of its tensors")
    position = mapped.tell()
    for key in keys:
        storage = storages[key]
        count = struct.unpack_from("<q", mapped, position)[0]
        storage.start = position + 8
        position = storage.start + storage.size
        if not storage.is_alike(storage.dtype, count) or position > len(mapped):
            raise Damaged(f"it ends before its storage {key} does, or that has another size than its pickle says")
    for part, storage, offset in views:
        part.start = storage.start + offset
    return objects


def _view(storage: _Storage, view) -> tuple[_Storage, int]:
    """Returns part of a storage and the byte where it begins, from PyTorch 0.3's (key, offset, length) in elements."""
    _, offset, count = view
    if type(offset) is not int or type(count) is not int or offset < 0 or count < 0:
        raise Damaged("its pickle has an impossible view of a storage")
    start, size = offset * storage.dtype.itemsize, count * storage.dtype.itemsize
    if start + size > storage.size:
        raise Damaged("its pickle has a view beyond the end of a storage")
    return _Storage(storage.mapped, None, size, storage.dtype, "little"), start


def _module(identity) -> Refused | None:
    """Returns the class that ("module", class, file, source) names: how PyTorch before 1.6 marked those of whole models."""
    if not isinstance(identity, tuple) or len(identity) != 4 or identity[0] != "module" or not isinstance(identity[1], Refused):
        return None
    identity[1].is_module = True
    return identity[1]


def _checked_identity(identity, fields: int) -> tuple:
    """Returns (dtype, key, device, number of elements, ...) of a persistent id ("storage", type, key, device, number, ...)."""
    if not isinstance(identity, tuple) or len(identity) != 1 + fields or identity[0] != "storage":
        raise Damaged("its pickle refers to what is no storage")
    kind, key, _, count = identity[1:5]
    dtype = _STORAGES.get(kind.name.rpartition(".")[2]) if isinstance(kind, StandIn) else None
    if dtype is None or not isinstance(key, (str, int)) or type(count) is not int or count < 0:
        raise Damaged("its pickle refers to a storage without a type, a key or a size")
    return dtype, *identity[2:]


def _tensor(storage, offset, shape, strides, dtype: np.dtype | None = None) -> Tensor:
    """Returns the tensor of a storage, once it is certain that no element lies outside the storage."""
    if not isinstance(storage, _Storage):
        raise Damaged("its pickle has a tensor without a storage")
    dtype = dtype or storage.dtype
    shape, count = unpickling.checked_shape(shape, dtype.itemsize), storage.size // dtype.itemsize
    if type(offset) is not int or offset < 0 or not isinstance(strides, (tuple, list)) or len(strides) != len(shape):
        raise Damaged("its pickle has a tensor without an offset, or without a stride for each dimension")
    if not all(type(stride) is int and stride >= 0 for stride in strides):
        raise Damaged("its pickle has a tensor whose strides are not whole numbers of at least 0")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    empty = 0 in shape
    if not empty and last >= count:
        raise Damaged(f"its pickle has a tensor that reaches to element {last} of a storage of {count}")

    def read():
        if empty:
            array = np.empty(shape, dtype)
        else:
            steps = [stride * dtype.itemsize if size > 1 else 0 for size, stride in zip(shape, strides, strict=True)]
            array = np.ndarray(shape, dtype, storage.read(), offset * dtype.itemsize, steps)
            array = array.byteswap() if storage.swapped else array
        array.flags.writeable = False
        return array

    return Tensor(shape, dtype, read)


def _rebuild_tensor_v1(storage, offset, shape, strides) -> Tensor:
    return _tensor(storage, offset, shape, strides)


def _rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks, metadata=None) -> Tensor:
    if metadata:  # conjugate or negated views of other values
        raise NotRead("its pickle has a tensor that is a conjugate or negative view, which is not read")
    return _tensor(storage, offset, shape, strides)


def _rebuild_tensor_v3(storage, offset, shape, strides, requires_grad, hooks, dtype, metadata=None) -> Tensor:
    """As version 2, for data types that have no storage type of their own."""
    found = _DTYPES.get(dtype.name.rpartition(".")[2]) if isinstance(dtype, StandIn) else None
    if metadata or found is None:
        raise Damaged("its pickle has a tensor of an unknown type")
    return _tensor(storage, offset, shape, strides, found)


def _rebuild_parameter(tensor, *_) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise Damaged("its pickle has a parameter that is no tensor")
    return tensor


def _rebuild_from_type(function, kind, arguments, state) -> Tensor:
    """A tensor with Python attributes, or of a class of PyTorch's own: the attributes are left out."""
    makes_tensors = isinstance(function, StandIn) and function.name.startswith("torch._utils._rebuild_")
    if not makes_tensors or not isinstance(kind, StandIn) or not isinstance(arguments, tuple):
        raise Damaged("its pickle has a tensor of a special class")
    return function.call(*arguments)


def _device(kind, index=None) -> str:
    if not isinstance(kind, str) or type(index) not in (int, type(None)):
        raise Damaged("its pickle has an impossible device")
    return kind if index is None else f"{kind}:{index}"


_TABLE = {
    **unpickling.CONTAINERS, **unpickling.NUMPY, **unpickling.make_table({
        "torch._utils._rebuild_tensor": _rebuild_tensor_v1,
        "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
        "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
        "torch._utils._rebuild_parameter": _rebuild_parameter,
        "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
        "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
        **{f"torch.{name}": None for name in ("Tensor", "nn.parameter.Parameter", "nn.parameter.Buffer")},
        "torch.Size": lambda sizes=(): tuple(sizes),
        "torch.device": _device,
        **{f"torch.{name}": None for name in _DTYPES},
        **{f"{module}.{name}": None for module in ("torch", "torch.cuda", "torch.storage") for name in _STORAGES},
    })}


def write(path: str | os.PathLike, entries: Mapping[str, np.ndarray]) -> None:
    """Writes a state_dict that torch.load reads, with weights_only=True and mmap=True too: the same bytes for the same entries.

    Args:
      path: the file.
      entries: the tensors by name, in the order in which they are to be; float16, float32, float64, bfloat16, signed integers,
        uint8, bool or complex. Each is written contiguous and owns its values.

    Raises:
      InputError: a key is no string, or a value no array of these types.
    """
    arrays = {}
    for key, value in entries.items():
        array = np.asarray(value)
        dtype = array.dtype.newbyteorder("=")
        if not isinstance(key, str):
            raise InputError(f"{path}: its entry {key!a} is named by a {type(key).__name__}; name it by a string")
        if dtype not in _STORAGE_OF_DTYPE:
            known = ", ".join(map(str, _STORAGE_OF_DTYPE))
            raise InputError(f"{path}: its entry {key} is {array.dtype}, for which PyTorch has no storage; give {known}")
        arrays[key] = array
    with open(path, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        _add(file, archive, "data.pkl", _pickled(arrays))
        _add(file, archive, "byteorder", b"little")
        for number, array in enumerate(arrays.values()):
            values = np.asarray(array, array.dtype.newbyteorder("<"), order="C").reshape(-1).view(np.uint8)
            _add(file, archive, f"data/{number}", memoryview(values))
        _add(file, archive, "version", b"3\n")


def _add(file, archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    """Adds a member whose content begins at a multiple of 64 bytes, by an extra field of as many bytes as that needs."""
    member = zipfile.ZipInfo(f"archive/{name}")  # dated 1980
    member.create_system = 0
    zip64_field = 20 if len(content) * 1.05 > zipfile.ZIP64_LIMIT else 0  # zipfile's own, for sizes of 2 GiB and more
    padding = -(file.tell() + 30 + len(member.filename) + zip64_field + 4) % _ALIGNMENT
    member.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    archive.writestr(member, content)


def _pickled(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Returns the pickle of an OrderedDict of tensors, protocol 2, opcode by opcode as torch.save makes it but for the memo."""
    ordered_dict = b"ccollections\nOrderedDict\n)R"
    parts = [b"\x80\x02", ordered_dict, b"("]
    for number, (key, array) in enumerate(arrays.items()):
        storage = f"ctorch\n{_STORAGE_OF_DTYPE[array.dtype.newbyteorder('=')]}\n".encode("ascii")
        strides = [math.prod(array.shape[axis + 1:]) for axis in range(array.ndim)]
        parts += [
            _text(key), b"ctorch._utils\n_rebuild_tensor_v2\n(",
            b"(", _text("storage"), storage, _text(str(number)), _text("cpu"), _integer(array.size), b"tQ",
            _integer(0), b"(", *map(_integer, array.shape), b"t(", *map(_integer, strides), b"t",
            b"\x89", ordered_dict, b"tR"]
    return b"".join([*parts, b"u."])


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    encoded = pickle.encode_long(value)
    return b"\x8a" + bytes([len(encoded)]) + encoded
