"""Decoded splits of prepared data sets, kept as .npy files beside the records.

    {data set}/arrays/train_images.npy, train_labels.npy    the arrays, in the order of the records
                      train.json                            what they were decoded from, written last

They are made once, whole or not at all, by whichever process comes first. Everyone else opens the images as a memory map:
several processes of a machine share one copy in the page cache, and a start takes milliseconds. All of it is best effort: where
nothing can be written the arrays stay in memory, and stderr says so.
"""

import contextlib
import hashlib
import json
import math
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO

import numpy as np

from jaxrd import files

Chunks = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]

FOLDER = "arrays"
_told: set[pathlib.Path] = set()


class NotKept(Exception):
    """The arrays cannot be kept; `__cause__` is the OSError that says why."""


def fingerprint(path: pathlib.Path, records: Iterable[pathlib.Path], sums: Mapping[str, str]) -> str:
    """Identifies the content of a split by its record files, as they were prepared, and by the data set's metadata.

    Of a file it takes the name, the size, and the checksum where there is one, which a copy on another disk shares; else the
    time. A file that was changed since it was prepared is thus not noticed while what was decoded before is there.

    Args:
      path: directory of the data set, with dataset_info.json and features.json.
      records: the record files of the split, in it.
      sums: {name of a record file: SHA-256 when it was prepared}, as far as that was taken.

    Returns:
      64 hexadecimal digits.

    Raises:
      OSError: one of the files cannot be read.
    """
    parts = []
    for file in map(pathlib.Path, records):
        stat = file.stat()
        parts.append([file.name, stat.st_size, sums.get(file.name, stat.st_mtime_ns)])
    parts += [files.sha256(path / name) for name in ("dataset_info.json", "features.json")]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def kept(
    path: pathlib.Path, split: str, shape: tuple[int, ...], dtype: np.dtype, mark: str, decode: Chunks, *, must: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Opens the arrays of a split, or decodes them and keeps them for the next one.

    Args:
      path: directory of the data set.
      split: its name.
      shape: [n, height, width, channel] of the images.
      dtype: of the images.
      mark: `fingerprint` of what they are decoded from; arrays that were kept with another one are replaced.
      decode: returns the images and labels in order, a chunk at a time; may be called twice.
      must: raise an exception where they cannot be kept, rather than say so on stderr, once for each data set, and hold them
        in memory.

    Returns:
      images: `shape`, `dtype`, not writable where they are kept.
      labels: [n] int64.

    Raises:
      NotKept: with `must`.
      Exception: whatever `decode` raises.
    """
    folder = path / FOLDER
    arrays = _opened(folder, split, shape, dtype, mark)
    if arrays is None and shape[0]:  # a file of no bytes cannot be mapped
        try:
            folder.mkdir(exist_ok=True)
            with files.alone(folder / f".{split}.lock") as held:
                arrays = _opened(folder, split, shape, dtype, mark)
                if arrays is None:
                    _write(folder, split, shape, dtype, mark, _guarded(decode), clean=held)
                    arrays = _opened(folder, split, shape, dtype, mark)
                    if arrays is None:
                        raise OSError("they do not read as they were written")
        except _DecodingFailed as error:
            raise error.__cause__ from None
        except OSError as error:
            if must:
                raise NotKept from error
            _tell(path, error)
    return _in_memory(shape, dtype, decode) if arrays is None else arrays


def _tell(path: pathlib.Path, error: OSError) -> None:
    """Says it once for each data set: one start would not notice, but each of a thousand takes the minutes anew."""
    if path not in _told:
        _told.add(path)
        print(f"{path / FOLDER}: the decoded images cannot be kept there ({error.strerror or error}), so every start decodes "
              "them again; read the data set once where it can be written", file=sys.stderr, flush=True)


def _opened(
    folder: pathlib.Path, split: str, shape: tuple[int, ...], dtype: np.dtype, mark: str
) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns what was kept, if it is whole and was decoded from the same records."""
    try:
        if json.loads((folder / f"{split}.json").read_text())["fingerprint"] != mark:
            return None
        images = _array(folder / f"{split}_images.npy", shape, np.dtype(dtype))
        labels = _array(folder / f"{split}_labels.npy", shape[:1], np.dtype(np.int64))
    except Exception:  # NumPy and json answer damage with a dozen unrelated types
        return None
    return images, np.array(labels)


def _array(path: pathlib.Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Maps an array, or reads it where the file system knows no maps; ValueError where the file holds something else."""
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        found = np.lib.format.read_array_header_1_0(file) if version == (1, 0) else None
        start = file.tell()
        if found != (shape, False, dtype) or os.path.getsize(path) != start + math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path} is {found}")
        try:
            return np.memmap(file, dtype, "r", start, shape)
        except OSError:
            file.seek(start)
            array = np.fromfile(file, dtype, math.prod(shape)).reshape(shape)
            array.flags.writeable = False
            return array


def _write(
    folder: pathlib.Path, split: str, shape: tuple[int, ...], dtype: np.dtype, mark: str,
    chunks: Iterable[tuple[np.ndarray, np.ndarray]], clean: bool,
) -> None:
    temporary = f".{split}.unfinished-"
    if clean:  # nobody else is here, so they are those of killed processes
        for left in folder.glob(f"{temporary}*"):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=temporary, dir=folder, ignore_cleanup_errors=True) as place:
        names = [f"{split}_images.npy", f"{split}_labels.npy"]
        # Written, not mapped: on a full disk the one is an exception and the other the end of the process.
        with contextlib.ExitStack() as stack:
            images_file, labels_file = (stack.enter_context(open(os.path.join(place, name), "wb")) for name in names)
            _write_header(images_file, shape, dtype)
            _write_header(labels_file, shape[:1], np.dtype(np.int64))
            for images, labels in chunks:
                images_file.write(np.ascontiguousarray(images, dtype).data)
                labels_file.write(np.ascontiguousarray(labels, np.int64).data)
            for file in (images_file, labels_file):
                file.flush()
                os.fsync(file.fileno())
        (folder / f"{split}.json").unlink(missing_ok=True)
        for name in names:
            os.replace(os.path.join(place, name), folder / name)
        with files.replacing(folder / f"{split}.json", "w") as file:
            json.dump({"fingerprint": mark}, file)


def _write_header(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> None:
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})


def _in_memory(shape: tuple[int, ...], dtype: np.dtype, decode: Chunks) -> tuple[np.ndarray, np.ndarray]:
    images, labels, done = np.empty(shape, dtype), np.empty(shape[:1], np.int64), 0
    for some_images, some_labels in decode():
        images[done:done + len(some_images)], labels[done:done + len(some_labels)] = some_images, some_labels
        done += len(some_images)
    return images, labels


class _DecodingFailed(Exception):
    """Tells an error of the records from one of writing what was decoded."""


def _guarded(decode: Chunks) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    try:
        yield from decode()
    except Exception as error:
        raise _DecodingFailed from error
