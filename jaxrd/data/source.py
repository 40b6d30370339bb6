"""Labelled images in host memory, and which of them make up a batch.

A `Source` is indexed by (seed, step) alone. Nothing is shuffled in place and no iterator has state, so a resumed run and any
number of processes see the same batches. A `Mixture` is a source with a second one beside it. `opening` makes sources of
files and prepared data sets.
"""

import dataclasses
import functools
import hashlib

import numpy as np

from jaxrd.data.selection import Selection
from jaxrd.errors import InputError

# What a generator is seeded with after [seed, epoch or step], so that no two draws share a stream. The order of an epoch has
# nothing there; as NumPy fills a seed up with zeros, the others end in something else.
_EXTRA, _PARTNERS, _NEGATIVES = (0, 1), (0, 2), (0, 3)


_MOST_CLASSES = 10_000_000  # more are a stray label, and beyond 2**31 would not fit into int32


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
        return _places(len(self), seed, step, batch_size)

    def partners(self, seed: int, step: int, batch_size: int) -> np.ndarray:
        """Positions of the images that those of `indices` are mixed with: the same ones, in a random order.

        Returns:
          [batch_size] int64, in [0, n); an image may be its own partner.
        """
        indices = self.indices(seed, step, batch_size)
        return np.random.default_rng([seed, step, *_PARTNERS]).permutation(indices)

    def negatives(self, seed: int, step: int, batch_size: int) -> np.ndarray:
        """Positions of an image of another class for each of `indices`: the negatives of the path method.

        The class is uniform over the others that have images here, the image uniform over that class (in a `Mixture` over
        the images of both sources). Nothing is searched for: the positions are sorted by class once.

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
        generator = np.random.default_rng([seed, step, *_NEGATIVES])
        other = generator.integers(len(counts) - 1, size=batch_size)
        other += other >= own
        return order[starts[other] + generator.integers(counts[other])]

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits of the shape, all labels and 64 images: other data have others, nearly always."""
        digest = hashlib.sha256(repr((self.images.shape, str(self.images.dtype), self.classes)).encode())
        digest.update(self.labels.tobytes())
        digest.update(np.ascontiguousarray(self.images[np.linspace(0, len(self) - 1, 64).astype(int)]).tobytes())
        return digest.hexdigest()

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
        return self.part(np.sort(order[:examples]), f"{self.name}[{examples}]")

    @functools.cached_property
    def _by_class(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Positions sorted by class, where each class that is present begins there, its size, and class -> its rank."""
        present, counts = np.unique(self.labels, return_counts=True)
        rank = np.zeros(self.classes, np.int64)
        rank[present] = np.arange(len(present))
        return np.argsort(self.labels, kind="stable"), np.cumsum(counts) - counts, counts, rank

    def part(self, indices: np.ndarray, name: str) -> "Source":
        """Returns the images at `indices` [n] int, in that order, as a source of their own."""
        # What is on disk stays there, for all processes of this host; what is in memory is not kept whole for a part of it.
        in_memory = not isinstance(self.images, Selection) and getattr(self.images, "_mmap", None) is None
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
        indices[~is_extra] = _places(self.sizes[0], seed, step, batch_size - share)
        indices[is_extra] = _places(self.sizes[1], seed, step, share, _EXTRA) + self.sizes[0]
        return indices

    def part(self, indices: np.ndarray, name: str) -> Source:
        """Raises InputError: its batches would no longer have their shares."""
        raise InputError(f"{self.name} is a mixture; take {name} of its first source, and mix after that")


def mixture(main: Source, extra: Source, fraction: float) -> Mixture:
    """Returns two sources as one, see `Mixture`.

    Args:
      main: the training images.
      extra: further images of the same shape and dtype, labelled in [0, main.classes).
      fraction: share of every batch that comes from `extra`, in (0, 1).

    Raises:
      InputError: the fraction is out of range, the images differ in shape or dtype, or a label is beyond the classes.
    """
    if not 0 < fraction < 1:
        raise InputError(f"extra_fraction={fraction}: pass a share of the batch between 0 and 1, as in 0.7")
    if extra.image_shape != main.image_shape or extra.images.dtype != main.images.dtype:
        raise InputError(
            f"{extra.name} has images {extra.image_shape} of {extra.images.dtype}, {main.name} {main.image_shape} of "
            f"{main.images.dtype}; bring them to one shape and dtype")
    if extra.labels.max() >= main.classes:
        raise InputError(f"{extra.name}: labels reach {extra.labels.max()}, and {main.name} has {main.classes} classes; pass "
                         f"images with labels in [0, {main.classes})")
    labels = np.concatenate([main.labels, extra.labels])
    return Mixture(Selection([main.images, extra.images]), labels, main.classes, f"{main.name}+{extra.name}",
                   (len(main), len(extra)), fraction)


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
    classes = check_labels(labels, len(images), classes, name)
    if images.dtype != np.uint8:
        images = images.astype(np.float32, copy=False)
    return Source(images=images, labels=labels.astype(np.int32), classes=classes, name=name)


def _places(n: int, seed: int, step: int, batch_size: int, stream: tuple[int, ...] = ()) -> np.ndarray:
    """Returns what is at the places of batch `step` in the endless sequence of permutations, see `Source.indices`."""
    _check_integer("seed", seed, 0)
    _check_integer("step", step, 0)
    _check_integer("batch_size", batch_size, 1)
    start, stop = int(step) * int(batch_size), (int(step) + 1) * int(batch_size)
    epochs = range(start // n, (stop - 1) // n + 1)
    parts = [_epoch_order((int(seed), e, *stream), n)[max(start - e * n, 0) : stop - e * n] for e in epochs]
    return np.concatenate(parts)


@functools.lru_cache(maxsize=8)
def _epoch_order(seed: tuple[int, ...], n: int) -> np.ndarray:
    order = np.random.default_rng(seed).permutation(n)
    order.setflags(write=False)
    return order


def _check_integer(field: str, value, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < minimum:
        raise InputError(f"{field}={value!r}: pass an integer of at least {minimum}")


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


def check_every_class(labels: np.ndarray, classes: int, name: str) -> None:
    """Raises InputError where a class has no images: the largest label says how many there are, and may be a stray one."""
    present = np.unique(labels)
    if len(present) < 2:
        raise InputError(f"{name}: all images have label {present[0]}: pass images of two classes or more")
    if len(present) < classes:  # the first place at which the classes that are there are not 0, 1, 2, ...
        missing = int(np.argmax(np.append(present, -1) != np.arange(len(present) + 1)))
        raise InputError(f"{name}: labels reach {np.max(labels)}, but no image has label {missing}: "
                         "number the classes from 0 without gaps")


def check_labels(labels: np.ndarray, images: int, classes: int | None, name: str) -> int:
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
    if classes > _MOST_CLASSES:
        raise InputError(f"{name}: labels reach {labels.max()}: number the classes from 0 without gaps")
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(f"{name}: labels reach from {labels.min()} to {labels.max()}: they must lie in [0, {classes})")
    return int(classes)
