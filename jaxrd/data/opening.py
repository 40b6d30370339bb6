"""Opens what a config names: a prepared TFDS data set or .npz files, as sources of labelled images.

What training has no use for is not read: the images of the test split wait until they are asked for.
"""

import dataclasses
import functools
import os
from collections.abc import Callable

import numpy as np

from jaxrd import files
from jaxrd.data import tfds_reader
from jaxrd.data.source import Source, check_every_class, check_labels, from_arrays, stratified_order
from jaxrd.errors import InputError, choose, one_line

SELECTIONS = ("validation", "last", "test")
_VALIDATION_SEED = 0
_A_FILE = "a file such as images.npz"
_NPZ_KEYS = (("images", "labels"), ("image", "label"))  # the second as published sets of generated images have them


@dataclasses.dataclass(frozen=True, eq=False)
class DataSet:
    """The parts of a data set, with the same image shape and number of classes.

    Attributes:
      train: what is trained on.
      validation: what chooses the best checkpoint; None where nothing does.
      read_test: returns the test split, which it reads when it is first called.
    """

    train: Source
    validation: Source | None
    read_test: Callable[[], Source]

    @property
    def test(self) -> Source:
        """The test split, read when it is first asked for: training does without."""
        return self.read_test()


def open_dataset(
    name: str, *, arrays: str = "", directory: str | os.PathLike | None = None, validation_fraction: float = 0.1,
    selection: str = "validation",
) -> DataSet:
    """Opens the data set that a config names.

    Args:
      name: a TFDS name, see `open_tfds`; not looked at where `arrays` is given.
      arrays: "train.npz,test.npz", see `open_arrays`, or "".
      directory: where TFDS keeps its data sets; TFDS's own choice (~/tensorflow_datasets) by default.
      validation_fraction: in (0, 1), the part of train to validate on where the data set has no validation split.
      selection: what chooses the best checkpoint: "validation", images held out of training; "last", nothing, so that no
        images are held out; "test", the test images, none held out, as in some published code.

    Returns:
      A `DataSet`.

    Raises:
      InputError: if it cannot be opened.
    """
    if not arrays:
        return open_tfds(name, directory=directory, validation_fraction=validation_fraction, selection=selection)
    paths = [path.strip() for path in arrays.split(",")]
    if len(paths) != 2 or not all(paths):
        raise InputError(f"arrays={arrays!r}: pass two files with a comma between them, as in 'train.npz,test.npz'")
    return open_arrays(*paths, validation_fraction=validation_fraction, selection=selection)


def open_arrays(
    train_path: str | os.PathLike, test_path: str | os.PathLike, *, validation_fraction: float = 0.1,
    selection: str = "validation",
) -> DataSet:
    """Opens two .npz files with the keys `images` and `labels` (or `image` and `label`).

    A fixed part of train, stratified by class, becomes the validation part.

    Args:
      train_path: images and labels as `from_arrays` takes them.
      test_path: the same, with images of the same shape, which are read when they are asked for.
      validation_fraction: in (0, 1).
      selection: see `open_dataset`.

    Returns:
      A `DataSet`.

    Raises:
      InputError: if a file is missing, damaged or holds something else, train skips a class or test has one more.
    """
    shape, test_labels = _outline(test_path)
    train = from_arrays(*_read_npz(train_path), name=os.fspath(train_path))
    check_every_class(train.labels, train.classes, train.name)
    if shape[1:] != train.image_shape:
        raise InputError(f"{train.name} has images {train.image_shape}, {os.fspath(test_path)} {shape[1:]}: resize one")
    check_labels(test_labels, shape[0], train.classes, os.fspath(test_path))

    def read_test():
        test = from_arrays(*_read_npz(test_path), classes=train.classes, name=os.fspath(test_path))
        return dataclasses.replace(test, name="arrays/test")

    return _data_set("arrays", train, None, read_test, validation_fraction, selection)


def open_tfds(
    name: str, *, directory: str | os.PathLike | None = None, validation_fraction: float = 0.1,
    selection: str = "validation",
) -> DataSet:
    """Opens a TFDS data set prepared on this machine as array_record, without TensorFlow and without downloading.

    Args:
      name: "jaxrd_digits", which is prepared on first use, or the name of a prepared data set, with its config where
        it has some ("cifar10", "downsampled_imagenet/32x32"); its features must include `image` and `label`, its splits
        "train" and "test".
      directory: where TFDS keeps its data sets; TFDS's own choice (~/tensorflow_datasets) by default.
      validation_fraction: in (0, 1), the part of train to validate on where there is no split "validation".
      selection: see `open_dataset`.

    Returns:
      A `DataSet`.

    Raises:
      InputError: if the data set is unknown, not prepared, damaged, or holds something else than labelled images.
    """
    prepared = tfds_reader.find(name, directory)
    prepared.check()
    if not {"train", "test"} <= set(prepared.splits):
        raise InputError(
            f"data set {name!r} has the splits {list(prepared.splits)}, not 'train' and 'test': train on another one, and "
            f"evaluate on this one with --data={name}")

    def read(split, classes):
        return from_arrays(*prepared.read(split), classes=classes, name=f"{name}/{split}")

    train = read("train", prepared.classes)
    validation = read("validation", train.classes) if selection == "validation" and "validation" in prepared.splits else None

    return _data_set(
        name, train, validation, lambda: read("test", train.classes), validation_fraction, selection)


def open_test(spec: str, *, classes: int, directory: str | os.PathLike | None = None) -> list[Source]:
    """Opens the test images of other data than a model was trained on.

    Args:
      spec: the name of a prepared TFDS data set with a split "test" ("cifar10_1", "cifar10_corrupted/fog_3"), a pattern for
        several ("cifar10_corrupted/*"), or a file such as "images.npz" with `images` and `labels`.
      classes: how many classes the model has.
      directory: where TFDS keeps its data sets; TFDS's own choice (~/tensorflow_datasets) by default.

    Returns:
      A `Source` for each data set, "name/test", or the file's path.

    Raises:
      InputError: if a data set is unknown, not prepared or damaged, has no test split, or labels beyond the classes.
    """
    if spec.endswith(".npz"):
        return [from_arrays(*_read_npz(spec), classes=classes, name=spec)]
    return [open_split(name, "test", classes=classes, directory=directory)
            for name in tfds_reader.names(spec, directory, instead=_A_FILE)]


def open_split(
    name: str, split: str, *, classes: int | None = None, directory: str | os.PathLike | None = None
) -> Source:
    """Opens one split of a prepared TFDS data set, or an .npz file, which has no splits.

    Args:
      name: a TFDS name, see `open_tfds`, or a path that ends in ".npz".
      split: such as "train".
      classes: number of classes that its labels must lie in; None as the data set says.
      directory: where TFDS keeps its data sets; TFDS's own choice (~/tensorflow_datasets) by default.

    Raises:
      InputError: as `open_tfds`, or there is no such split.
    """
    if name.endswith(".npz"):
        return from_arrays(*_read_npz(name), classes=classes, name=name)
    prepared = tfds_reader.find(name, directory, instead=_A_FILE)
    choose(f"split of {name}", split, prepared.splits)
    if None not in (classes, prepared.classes) and prepared.classes != classes:
        raise InputError(f"data set {name!r} has {prepared.classes} classes, not {classes}: pass another one")
    return from_arrays(*prepared.read(split), classes=classes or prepared.classes, name=f"{name}/{split}")


def _data_set(name, train: Source, validation: Source | None, read_test, validation_fraction, selection) -> DataSet:
    choose("selection", selection, SELECTIONS)
    _check_fraction(validation_fraction)
    if selection == "validation" and validation is None:
        # RandomState rather than default_rng: NumPy promises that its stream never changes.
        shuffled = np.random.RandomState(_VALIDATION_SEED).permutation(len(train))
        order = stratified_order(train.labels, shuffled)
        count = max(1, round(validation_fraction * len(train)))
        if count >= len(train):
            raise InputError(f"{train.name}: {len(train)} images leave none to train on: lower validation_fraction")
        validation, train = (train.part(np.sort(part), "") for part in (order[:count], order[count:]))
    read_test = functools.cache(read_test)
    if selection == "test":
        validation = read_test()
    elif validation is not None:
        validation = dataclasses.replace(validation, name=f"{name}/validation")
    return DataSet(dataclasses.replace(train, name=f"{name}/train"), validation, read_test)


def _read_npz(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    keys = _npz_keys(path)
    try:
        arrays = files.read_arrays(path, keys)
    except Exception as error:  # zipfile, zlib and numpy raise a dozen unrelated types on damaged bytes
        raise _unreadable(path, error) from error
    return arrays[keys[0]], arrays[keys[1]]


def _outline(path: str | os.PathLike) -> tuple[tuple[int, ...], np.ndarray]:
    """Returns the images' shape and the labels of an .npz file whose images are not read: training leaves them alone."""
    images, labels = _npz_keys(path)
    try:
        return files.array_shapes(path)[images], files.read_arrays(path, [labels])[labels]
    except Exception as error:
        raise _unreadable(path, error) from error


def _npz_keys(path: str | os.PathLike) -> tuple[str, str]:
    if not os.path.isfile(path):
        raise InputError(f"{os.fspath(path)}: no such file: pass an .npz file with the keys 'images' and 'labels'")
    try:
        there = list(files.array_shapes(path))
    except Exception as error:
        raise _unreadable(path, error) from error
    for keys in _NPZ_KEYS:
        if {*keys} <= {*there}:
            return keys
    raise InputError(f"{os.fspath(path)}: holds the keys {there}: write it with np.savez(path, images=..., labels=...)")


def _unreadable(path, error: Exception) -> InputError:
    return InputError(f"{os.fspath(path)}: cannot be read as .npz ({one_line(error)}): write it again with np.savez")


def _check_fraction(validation_fraction: float) -> None:
    if not 0 < validation_fraction < 1:
        raise InputError(f"validation_fraction={validation_fraction}: pass a number between 0 and 1, as in 0.1")
