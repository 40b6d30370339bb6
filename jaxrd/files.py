"""Files that a kill leaves either old or new, never half, and arrays read from .npz files of anybody's."""

import contextlib
import os
import pathlib
import zipfile
from collections.abc import Iterable, Iterator
from typing import IO

import numpy as np


@contextlib.contextmanager
def replacing(path: pathlib.Path, mode: str = "wb", **options) -> Iterator[IO]:
    """Opens a temporary file beside `path`, which takes its place once the block has ended without an exception.

    Args:
      path: the file; its directory exists.
      mode, **options: as for `open`.
    """
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, mode, **options) as file:
        yield file
    os.replace(temporary, path)


def read_arrays(path: str | pathlib.Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Returns the named arrays of an .npz file; never unpickles.

    Raises:
      FileNotFoundError: no such file.
      Exception: whatever zip and NumPy raise where it is damaged.
    """
    with open(path, "rb") as opened:
        if not zipfile.is_zipfile(opened):  # NumPy would take it for a pickle, and advise to load it unsafely
            raise ValueError("it is no .npz file")
        opened.seek(0)
        with np.load(opened, allow_pickle=False) as file:
            return {name: file[name] for name in names}
