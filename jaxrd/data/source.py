"""Where images come from: a prepared TFDS data set or .npz files, read once into a host array.

A `Source` is then indexed by (seed, step) alone. Nothing is shuffled in place and no iterator has state, so a resumed
run and any number of processes see the same batches. A `Mixture` is a source with a second one beside it.
"""

import dataclasses
import functools
import os
from collections.abc import Callable

import numpy as np

from jaxrd import files
from jaxrd.data import tfds_reader
from jaxrd.data.selection import Selection
from jaxrd.errors import InputError, choose, one_line

SELECTIONS = ("validation", "last", "test")
_VALIDATION_SEED = 0
# What a generator is seeded with besides (seed, step), so that no two draws share a stream.
_EXTRA, _PARTNERS, _NEGATIVES = 1, 2, 3


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Labelled images in host memory.

    Attributes:
      images: [n, height, width, channel], uint8, or float32 in [0, 1]: an array, a read-only memory map, or a `Selection` of
        either, of which indexing and `np.asarray` give arrays.
      labels: [n] int32, in [0, classes).
      classes: how many classes there are, present here or not.
      name: for messages, such as "jaxrd_digits/train".
    """

    images: np.ndarray | Selection
    labels: np.ndarray
    classes: int
    name: str

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channel)."""
        return self.images.shape[1:]

    @property
    def epoch(self) -> int:
        """How many images an epoch has."""
        return len(self)

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
        return _places(len(self), (seed,), step, batch_size)

    def partners(self, seed: int, step: int, batch_size: int) -> np.ndarray:
        """Positions of the images that those of `indices` are mixed with: the same ones, in a random order.

        Returns:
          [batch_size] int64, in [0, n); an image may be its own partner.
        """
        order = np.random.default_rng([seed, step, _PARTNERS]).permutation(batch_size)
        return self.indices(seed, step, batch_size)[order]

    def negatives(self, seed: int, step: int, batch_size: int) -> np.ndarray:
        """Positions of an image of another class for each of `indices`: the negatives of the path method.

        The class is uniform over the others that have images here, the image uniform over that class. Nothing is searched
        for: the positions are sorted by class once.

        Returns:
          [batch_size] int64, in [0, n).

        Raises:
          InputError: if there is one class only.
        """
        order, starts, counts, rank = self._by_class
        if len(counts) < 2:
            raise InputError(
                f"{self.name}: all {len(self)} images are of class {self.labels[0]}, and negatives are of another class; "
                "use data with two classes or more")
        own = rank[self.labels[self.indices(seed, step, batch_size)]]
        generator = np.random.default_rng([seed, step, _NEGATIVES])
        other = generator.integers(len(counts) - 1, size=batch_size)
        other += other >= own
        return order[starts[other] + generator.integers(counts[other])]

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

    @functools.cached_property
    def _by_class(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Positions sorted by class, where each class that is present begins there, its size, and class -> its rank."""
        present, counts = np.unique(self.labels, return_counts=True)
        rank = np.zeros(self.classes, np.int64)
        rank[present] = np.arange(len(present))
        return np.argsort(self.labels, kind="stable"), np.cumsum(counts) - counts, counts, rank

    def _part(self, indices: np.ndarray, name: str) -> "Source":
        # What is on disk stays there, for all processes of this host; what is in memory is not kept whole for a part of it.
        in_memory = type(self.images) is np.ndarray
        images = self.images[indices] if in_memory else Selection([self.images], indices)
        return dataclasses.replace(self, images=images, labels=self.labels[indices], name=name)


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture(Source):
    """Two sources as one, whose batches hold the same share of each: real images, and generated ones with pseudo-labels.

    Of a batch of b images round(fraction · b) come from the second source, spread evenly over the batch, so that parts of it
    (BatchNorm groups, devices) hold nearly the same share. Either source runs through its own permutations. An epoch has as
    many images as the first source.

    Build it by `mixture`.

    Attributes:
      sizes: how many images come from each source; positions are those of the first, then those of the second.
      fraction: see above, in (0, 1).
    """

    sizes: tuple[int, int]
    fraction: float

    @property
    def epoch(self) -> int:
        return self.sizes[0]

    def indices(self, seed: int, step: int, batch_size: int) -> np.ndarray:
        """As of `Source`; raises InputError too where one source would have no place in the batch."""
        _check_integer("batch_size", batch_size, 1)
        share = round(self.fraction * batch_size)
        if not 0 < share < batch_size:
            raise InputError(
                f"extra_fraction={self.fraction}: of a batch of {batch_size} images that is {share}; "
                "pass a fraction that leaves images of both data sets in it, or a larger batch size")
        is_extra = np.diff(np.arange(batch_size + 1) * share // batch_size).astype(bool)
        indices = np.empty(batch_size, np.int64)
        indices[~is_extra] = _places(self.sizes[0], (seed,), step, batch_size - share)
        indices[is_extra] = _places(self.sizes[1], (seed, _EXTRA), step, share) + self.sizes[0]
        return indices


def mixture(main: Source, extra: Source, fraction: float) -> Mixture:
    """Returns two sources as one, see `Mixture`.

    Args:
      main: the training images.
      extra: further images of the same shape and dtype, labelled in [0, main.classes).
      fraction: share of every batch that comes from `extra`, in (0, 1).

    Raises:
      InputError: the fraction is out of range, or the images differ in shape or dtype.
    """
    if not 0 < fraction < 1:
        raise InputError(f"extra_fraction={fraction}: pass a share of the batch between 0 and 1, as in 0.7")
    if extra.image_shape != main.image_shape or extra.images.dtype != main.images.dtype:
        raise InputError(
            f"{extra.name} has images {extra.image_shape} of {extra.images.dtype}, {main.name} {main.image_shape} of "
            f"{main.images.dtype}; bring them to one shape and dtype")
    labels = np.concatenate([main.labels, extra.labels])
    return Mixture(Selection([main.images, extra.images]), labels, main.classes, f"{main.name}+{extra.name}",
                   (len(main), len(extra)), fraction)


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
    images = images if isinstance(images, np.memmap) else np.asarray(images)
    labels = np.asarray(labels)
    _check_images(images, name)
    classes = _check_labels(labels, len(images), classes, name)
    if images.dtype != np.uint8:
        images = images.astype(np.float32)
    return Source(images=images, labels=labels.astype(np.int32), classes=classes, name=name)


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
    # The largest label decides how many classes there are, so a stray one must not pass for a class.
    missing = np.setdiff1d(np.arange(train.classes), train.labels)
    if len(missing):
        raise InputError(f"{train.name}: labels reach {train.labels.max()}, but no image has label {missing[0]}: "
                         "number the classes from 0 without gaps")
    if shape[1:] != train.image_shape:
        raise InputError(f"{train.name} has images {train.image_shape}, {os.fspath(test_path)} {shape[1:]}: resize one")
    _check_labels(test_labels, shape[0], train.classes, os.fspath(test_path))

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
    if not {"train", "test"} <= set(prepared.splits):
        raise InputError(
            f"data set {name!r} has the splits {list(prepared.splits)}, not 'train' and 'test': train on another one, and "
            f"evaluate on this one with --data={name}")

    def read(split):
        return from_arrays(*prepared.read(split), classes=prepared.classes, name=f"{name}/{split}")

    train = read("train")
    validation = read("validation") if selection == "validation" and "validation" in prepared.splits else None

    def read_test():
        return dataclasses.replace(read("test"), classes=train.classes)

    return _data_set(name, train, validation, read_test, validation_fraction, selection)


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
    return [open_split(name, "test", classes=classes, directory=directory) for name in tfds_reader.names(spec, directory)]


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
    prepared = tfds_reader.find(name, directory)
    choose(f"split of {name}", split, prepared.splits)
    if None not in (classes, prepared.classes) and prepared.classes != classes:
        raise InputError(f"data set {name!r} has {prepared.classes} classes, not {classes}: pass another one")
    return from_arrays(*prepared.read(split), classes=classes or prepared.classes, name=f"{name}/{split}")


def _places(n: int, seed: tuple[int, ...], step: int, batch_size: int) -> np.ndarray:
    """Returns what is at the places of batch `step` in the endless sequence of permutations, see `Source.indices`."""
    _check_integer("seed", seed[0], 0)
    _check_integer("step", step, 0)
    _check_integer("batch_size", batch_size, 1)
    start, stop = int(step) * int(batch_size), (int(step) + 1) * int(batch_size)
    epochs = range(start // n, (stop - 1) // n + 1)
    parts = [_epoch_order((*map(int, seed), e), n)[max(start - e * n, 0) : stop - e * n] for e in epochs]
    return np.concatenate(parts)


@functools.lru_cache(maxsize=8)
def _epoch_order(seed: tuple[int, ...], n: int) -> np.ndarray:
    order = np.random.default_rng(seed).permutation(n)
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


def _check_labels(labels: np.ndarray, images: int, classes: int | None, name: str) -> int:
    """Returns the number of classes; InputError where labels are not one class in [0, classes) per image."""
    if labels.ndim != 1:
        raise InputError(f"{name}: labels have shape {labels.shape}: pass one integer per image, [{images}]")
    if labels.dtype.kind not in "iu":
        raise InputError(f"{name}: labels have dtype {labels.dtype}: convert them with .astype(np.int32)")
    if len(labels) != images:
        raise InputError(f"{name}: {images} images but {len(labels)} labels: pass one label per image")
    if not images:
        raise InputError(f"{name}: no images: pass at least one")
    if classes is None:
        classes = max(2, int(labels.max()) + 1)
    _check_integer("classes", classes, 2)
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(f"{name}: labels reach from {labels.min()} to {labels.max()}: they must lie in [0, {classes})")
    return int(classes)


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
        validation, train = (train._part(np.sort(part), "") for part in (order[:count], order[count:]))
    read_test = functools.cache(read_test)
    if selection == "test":
        validation = read_test()
    elif validation is not None:
        validation = dataclasses.replace(validation, name=f"{name}/validation", classes=train.classes)
    return DataSet(dataclasses.replace(train, name=f"{name}/train"), validation, read_test)


_NPZ_KEYS = (("images", "labels"), ("image", "label"))  # the second as published sets of generated images have them


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
