"""Where images come from: a prepared TFDS data set or a pair of .npz files, read once into a host array.

A `Source` is then indexed by (seed, step) alone. Nothing is shuffled in place and no iterator has state, so a resumed
run and any number of processes see the same batches.
"""

import dataclasses
import functools
import os

import numpy as np

from jaxrd.data import tfds_reader
from jaxrd.errors import InputError

_VALIDATION_SEED = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Labelled images in host memory.

    Attributes:
      images: [n, height, width, channel], uint8, or float32 in [0, 1].
      labels: [n] int32, in [0, classes).
      classes: how many classes there are, present here or not.
      name: for messages, such as "jaxrd_digits/train".
    """

    images: np.ndarray
    labels: np.ndarray
    classes: int
    name: str

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channel)."""
        return self.images.shape[1:]

    def indices(self, seed: int, step: int, batch_size: int) -> np.ndarray:
        """Positions of the examples in batch `step`, a pure function of the arguments.

        Epoch e visits every example once, in the order `np.random.default_rng([seed, e]).permutation(n)`. The epochs
        follow each other without a gap; batch `step` takes places [step · batch_size, (step + 1) · batch_size) of
        that endless sequence.

        Args:
          seed: at least 0.
          step: at least 0.
          batch_size: at least 1; may exceed n.

        Returns:
          [batch_size] int64, in [0, n).

        Raises:
          InputError: if an argument is out of range.
        """
        _check_integer("seed", seed, 0)
        _check_integer("step", step, 0)
        _check_integer("batch_size", batch_size, 1)
        n = len(self)
        start, stop = int(step) * int(batch_size), (int(step) + 1) * int(batch_size)
        epochs = range(start // n, (stop - 1) // n + 1)
        parts = [_epoch_order(int(seed), e, n)[max(start - e * n, 0) : stop - e * n] for e in epochs]
        return np.concatenate(parts)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Gathers {"images": [batch, height, width, channel], "labels": [batch]} at `indices` [batch] in [0, n)."""
        return {"images": self.images[indices], "labels": self.labels[indices]}

    def subset(self, examples: int, seed: int) -> "Source":
        """Picks a random subset in which class counts differ by one at most, save for classes with too few examples.

        A pure function of (examples, seed). With the same seed a smaller subset is part of a larger one.

        Args:
          examples: size of the subset, from `classes` to n.
          seed: at least 0.

        Returns:
          A `Source` of `examples` images, in the order they have here.

        Raises:
          InputError: if an argument is out of range.
        """
        _check_integer("seed", seed, 0)
        _check_integer("examples", examples, 1)
        if not self.classes <= examples <= len(self):
            raise InputError(
                f"examples={examples}: {self.name} has {self.classes} classes and {len(self)} images; "
                f"pass a number from {self.classes} to {len(self)}"
            )
        shuffled = np.random.default_rng(seed).permutation(len(self))
        order = stratified_order(self.labels, shuffled, balanced=True)
        return self._part(np.sort(order[:examples]), f"{self.name}[{examples}]")

    def _part(self, indices: np.ndarray, name: str) -> "Source":
        return dataclasses.replace(self, images=self.images[indices], labels=self.labels[indices], name=name)


@dataclasses.dataclass(frozen=True, eq=False)
class DataSet:
    """The three parts of a data set, with the same image shape and number of classes."""

    train: Source
    validation: Source
    test: Source


def stratified_order(labels: np.ndarray, order: np.ndarray, *, balanced: bool = False) -> np.ndarray:
    """Rearranges examples so that every prefix is stratified by class.

    Args:
      labels: [n] int.
      order: [n], a permutation of range(n): who comes first within a class, and which class comes first in a tie.
      balanced: False gives each class its share of the whole, True the same number of each class while it lasts.

    Returns:
      [n], a permutation of range(n).
    """
    position = np.empty(len(labels))
    for label in np.unique(labels):
        (members,) = np.nonzero(labels[order] == label)
        position[members] = np.arange(len(members)) if balanced else (np.arange(len(members)) + 0.5) / len(members)
    return order[np.argsort(position, kind="stable")]


def from_arrays(images, labels, *, classes: int | None = None, name: str = "arrays") -> Source:
    """Checks a pair of arrays and makes a `Source` of them.

    Args:
      images: [n, height, width, channel], uint8 in [0, 255], or floating in [0, 1] (kept as float32).
      labels: [n] integers, in [0, classes).
      classes: at least 2; the largest label plus one, if that is more, by default.
      name: for messages.

    Returns:
      A `Source`.

    Raises:
      InputError: if a shape, dtype or range is another one.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    _check_images(images, name)
    if labels.ndim != 1:
        raise InputError(f"{name}: labels have shape {labels.shape}: pass one integer per image, [{len(images)}]")
    if labels.dtype.kind not in "iu":
        raise InputError(f"{name}: labels have dtype {labels.dtype}: convert them with .astype(np.int32)")
    if len(labels) != len(images):
        raise InputError(f"{name}: {len(images)} images but {len(labels)} labels: pass one label per image")
    if classes is None:
        classes = max(2, int(labels.max()) + 1)
    _check_integer("classes", classes, 2)
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(f"{name}: labels reach from {labels.min()} to {labels.max()}: they must lie in [0, {classes})")
    if images.dtype != np.uint8:
        images = images.astype(np.float32)
    return Source(images=images, labels=labels.astype(np.int32), classes=int(classes), name=name)


def open_dataset(
    name: str, *, arrays: str = "", directory: str | os.PathLike | None = None, validation_fraction: float = 0.1
) -> DataSet:
    """Opens the data set that a config names.

    Args:
      name: a TFDS name, see `open_tfds`; not looked at where `arrays` is given.
      arrays: "train.npz,test.npz", see `open_arrays`, or "".
      directory: where TFDS keeps its data sets; TFDS's own choice (~/tensorflow_datasets) by default.
      validation_fraction: in (0, 1), the part of train to validate on where the data set has no validation split.

    Returns:
      A `DataSet`.

    Raises:
      InputError: if it cannot be opened.
    """
    if not arrays:
        return open_tfds(name, directory=directory, validation_fraction=validation_fraction)
    paths = [path.strip() for path in arrays.split(",")]
    if len(paths) != 2 or not all(paths):
        raise InputError(f"arrays={arrays!r}: pass two files with a comma between them, as in 'train.npz,test.npz'")
    return open_arrays(*paths, validation_fraction=validation_fraction)


def open_arrays(
    train_path: str | os.PathLike, test_path: str | os.PathLike, *, validation_fraction: float = 0.1
) -> DataSet:
    """Opens two .npz files with the keys `images` and `labels`.

    A fixed part of train, stratified by class, becomes the validation part.

    Args:
      train_path: images and labels as `from_arrays` takes them.
      test_path: the same, with images of the same shape.
      validation_fraction: in (0, 1).

    Returns:
      A `DataSet`.

    Raises:
      InputError: if a file is missing, damaged or holds something else, train skips a class or test has one more.
    """
    _check_fraction(validation_fraction)
    train = from_arrays(*_read_npz(train_path), name=os.fspath(train_path))
    # The largest label decides how many classes there are, so a stray one must not pass for a class.
    missing = np.setdiff1d(np.arange(train.classes), train.labels)
    if len(missing):
        raise InputError(f"{train.name}: labels reach {train.labels.max()}, but no image has label {missing[0]}: "
                         "number the classes from 0 without gaps")
    test = from_arrays(*_read_npz(test_path), classes=train.classes, name=os.fspath(test_path))
    return _data_set("arrays", {"train": train, "test": test}, validation_fraction)


def open_tfds(name: str, *, directory: str | os.PathLike | None = None, validation_fraction: float = 0.1) -> DataSet:
    """Opens a TFDS data set prepared on this machine as array_record, without TensorFlow and without downloading.

    Args:
      name: "jaxrd_digits", which is prepared on first use, or the name of a prepared data set, with its config where
        it has some ("cifar10", "downsampled_imagenet/32x32"); its features must include `image` and `label`.
      directory: where TFDS keeps its data sets; TFDS's own choice (~/tensorflow_datasets) by default.
      validation_fraction: in (0, 1), the part of train to validate on where there is no split "validation".

    Returns:
      A `DataSet`.

    Raises:
      InputError: if the data set is unknown, not prepared, damaged, or holds something else than labelled images.
    """
    _check_fraction(validation_fraction)
    splits = {split: from_arrays(images, labels, classes=classes, name=f"{name}/{split}")
              for split, images, labels, classes in tfds_reader.read(name, directory)}
    return _data_set(name, splits, validation_fraction)


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    order = np.random.default_rng([seed, epoch]).permutation(n)
    order.setflags(write=False)
    return order


def _check_integer(field: str, value, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < minimum:
        raise InputError(f"{field}={value!r}: pass an integer of at least {minimum}")


def _check_fraction(validation_fraction: float) -> None:
    if not 0 < validation_fraction < 1:
        raise InputError(f"validation_fraction={validation_fraction}: pass a number between 0 and 1, as in 0.1")


def _check_images(images: np.ndarray, name: str) -> None:
    if images.ndim != 4 or 0 in images.shape:
        hint = "; add the channel axis with images[..., None]" if images.ndim == 3 else ""
        raise InputError(
            f"{name}: images have shape {images.shape}: pass them as [n, height, width, channel], none of them 0{hint}")
    if images.shape[1] in (1, 3) and images.shape[3] > 4:
        raise InputError(f"{name}: images {images.shape} have their channel first: use images.transpose(0, 2, 3, 1)")
    if images.dtype == np.uint8:
        return
    if images.dtype.kind != "f":
        raise InputError(f"{name}: images have dtype {images.dtype}: pass uint8 in [0, 255] or float32 in [0, 1]")
    low, high = images.min(), images.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError(f"{name}: images hold values that are not finite: remove NaN and infinity")
    if low < 0 or high > 1:
        if low < -0.01:
            hint = "they look normalised: undo that, for the model does it itself"
        elif high > 2:
            hint = "they look like 0..255: pass them as uint8 or divide by 255"
        else:
            hint = "clip them"
        raise InputError(f"{name}: float images reach from {low:.4g} to {high:.4g}, outside [0, 1]: {hint}")


def _data_set(name: str, splits: dict[str, Source], validation_fraction: float) -> DataSet:
    train, test, validation = splits["train"], splits["test"], splits.get("validation")
    if validation is None:
        # RandomState rather than default_rng: NumPy promises that its stream never changes.
        shuffled = np.random.RandomState(_VALIDATION_SEED).permutation(len(train))
        order = stratified_order(train.labels, shuffled)
        count = max(1, round(validation_fraction * len(train)))
        if count >= len(train):
            raise InputError(f"{train.name}: {len(train)} images leave none to train on: lower validation_fraction")
        validation, train = (train._part(np.sort(part), "") for part in (order[:count], order[count:]))
    classes = max(train.classes, validation.classes, test.classes)
    parts = {"train": train, "validation": validation, "test": test}
    for part, source in parts.items():
        if source.image_shape != train.image_shape:
            raise InputError(
                f"{name}: train images have shape {train.image_shape}, {part} images {source.image_shape}: resize one"
            )
    return DataSet(**{k: dataclasses.replace(v, classes=classes, name=f"{name}/{k}") for k, v in parts.items()})


def _read_npz(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    if not os.path.isfile(path):
        raise InputError(f"{os.fspath(path)}: no such file: pass an .npz file with the keys 'images' and 'labels'")
    try:
        # Opened here: np.load leaks the file that it opens when the archive is damaged.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            keys = list(archive)
            if "images" in keys and "labels" in keys:
                return archive["images"], archive["labels"]
    except Exception as error:  # zipfile, zlib and numpy raise a dozen unrelated types on damaged bytes
        reason = tfds_reader.one_line(error)
        message = f"{os.fspath(path)}: cannot be read as .npz ({reason}): write it again with np.savez"
        raise InputError(message) from error
    raise InputError(f"{os.fspath(path)}: holds the keys {keys}: write it with np.savez(path, images=..., labels=...)")
