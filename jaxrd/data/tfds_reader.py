"""Reads TFDS data sets prepared on this machine as array_record, without TensorFlow and without a network.

What it cannot read it answers with an `InputError` that says how to prepare the data, or what to delete.
`tensorflow_datasets` is imported when a data set is opened, so that a run on .npz files does without it.
"""

import difflib
import os
import pathlib
import re
from collections.abc import Iterator

import numpy as np

from jaxrd.errors import InputError

DIGITS = "jaxrd_digits"
_READ_CHUNK = 1000
_INSTEAD = "--config.data.arrays=train.npz,test.npz"


def read(
    name: str, directory: str | os.PathLike | None = None
) -> Iterator[tuple[str, np.ndarray, np.ndarray, int | None]]:
    """Reads the splits "train", "validation" (where there is one) and "test" of a prepared data set.

    Args:
      name: "jaxrd_digits", which is prepared on first use, or the name of a prepared data set, with its config where
        it has some ("cifar10", "downsampled_imagenet/32x32"); its features must include `image` and `label`.
      directory: where TFDS keeps its data sets; TFDS's own choice (~/tensorflow_datasets) by default.

    Yields:
      (split, images [n, height, width, channel] in the dtype of the data set, labels [n] int64, number of classes or
      None where the data set does not say), one split at a time.

    Raises:
      InputError: if the data set is unknown, not prepared, damaged, or holds something else than labelled images.
    """
    import tensorflow_datasets as tfds

    root = pathlib.Path(directory if directory is not None else tfds.core.constants.DATA_DIR).expanduser()
    if name == DIGITS:
        from jaxrd.data import digits

        path = digits.prepare(root)
    else:
        path = _find_prepared(name, root)
    yield from _read_splits(name, path)


def one_line(error: Exception) -> str:
    """Returns an error's type and message on one line of 200 characters at most, for a message of our own."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _find_prepared(name: str, root: pathlib.Path) -> pathlib.Path:
    """Finds a prepared data set by its files alone: the code of its builder might ask the network."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    if not re.fullmatch(r"[a-zA-Z]\w*(/[\w.-]+)?(:[\w.*]+)?", name):
        raise InputError(f"data set {name!r} is no TFDS name: pass one such as 'cifar10' or 'imagenet_resized/32x32'")
    try:
        return pathlib.Path(read_only_builder.builder_from_files(name, data_dir=os.fspath(root)).data_dir)
    except tfds.core.DatasetNotFoundError as error:
        known = [DIGITS, *tfds.list_builders(with_community_datasets=False)]
        base = re.split("[/:]", name)[0]
        if base in known or (root / base).is_dir():
            call = f'tfds.builder("{name}", data_dir="{root}", file_format="array_record").download_and_prepare()'
            message = f"data set {name!r} is not prepared in {root}: prepare it with {call}, or pass {_INSTEAD}"
        else:
            guess = difflib.get_close_matches(base, known, n=1)
            hint = f"did you mean {guess[0]!r}? Otherwise pass" if guess else "pass a TFDS name or"
            message = f"data set {name!r} is unknown to TFDS and not prepared in {root}: {hint} {_INSTEAD}"
        raise InputError(message) from error
    except Exception as error:
        raise _damaged(root / re.split("[/:]", name)[0], error) from error


def _read_splits(name: str, path: pathlib.Path) -> Iterator[tuple[str, np.ndarray, np.ndarray, int | None]]:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(path)
        features = dict(builder.info.features)
        sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
        formats = [file_format.value for file_format in builder.info.available_file_formats()]
    except Exception as error:
        raise _damaged(path, error) from error
    if "array_record" not in formats:
        raise InputError(f"data set {name!r} in {path} is stored as {formats}: prepare it as array_record elsewhere")
    if not {"train", "test"} <= set(sizes):
        raise InputError(f"data set {name!r} has the splits {list(sizes)}, not 'train' and 'test': pass another one")
    if not {"image", "label"} <= set(features):
        raise InputError(f"data set {name!r} has the features {list(features)}, not 'image' and 'label': pass another")
    image_shape, label_shape = features["image"].shape, features["label"].shape
    if len(image_shape) != 3 or None in image_shape or label_shape != ():
        raise InputError(
            f"data set {name!r} has images {image_shape} and labels {label_shape}: bring them to one image size and "
            f"one label each, and pass {_INSTEAD}"
        )
    classes = getattr(features["label"], "num_classes", None)
    for split in [split for split in ("train", "validation", "test") if split in sizes]:
        try:
            images, labels = _read_records(builder.as_data_source(split), sizes[split], image_shape)
        except Exception as error:
            raise _damaged(path, error) from error
        yield split, images, labels, classes


def _read_records(records, size: int, image_shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    # A file cut in the right place looks like a shorter one.
    if len(records) != size:
        raise EOFError(f"{len(records)} of {size} examples are there")
    images, labels = np.empty((size, *image_shape), records[0]["image"].dtype), np.empty(size, np.int64)
    for start in range(0, size, _READ_CHUNK):
        chunk = records.__getitems__(list(range(start, min(start + _READ_CHUNK, size))))
        for index, record in enumerate(chunk, start):
            images[index], labels[index] = record["image"], record["label"]
    return images, labels


def _damaged(path: pathlib.Path, error: Exception) -> InputError:
    return InputError(f"{path}: cannot be read ({one_line(error)}): delete this directory and prepare the data again")
