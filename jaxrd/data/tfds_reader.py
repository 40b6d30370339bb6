"""Reads TFDS data sets prepared on this machine as array_record, without TensorFlow and without a network.

`find` looks at the metadata only, and answers at once what it cannot read with an `InputError` that says how to prepare the
data, or what to delete; `Prepared.read` decodes a split, once for all processes and starts (`array_cache`). Inside
`tfds.testing.mock_data` every data set of the catalogue is there, with random images.

`tensorflow_datasets` is imported when a data set is opened, so that a run on .npz files does without it.
"""

import dataclasses
import difflib
import fnmatch
import json
import os
import pathlib
import re
import shlex
from collections.abc import Iterator

import numpy as np

from jaxrd import files
from jaxrd.data import array_cache
from jaxrd.errors import InputError, choose, one_line

DIGITS = "jaxrd_digits"
TINY_IMAGENET = "tiny_imagenet"
_READ_CHUNK = 1000
_INSTEAD = "--config.data.arrays=train.npz,test.npz"
_NAME = r"[a-zA-Z]\w*(/[\w.-]+)?(:[\w.*]+)?"
_WITHOUT_TRAIN = ("cifar10_1", "cifar10_corrupted")  # for mocked ones, whose splits nobody knows


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared data set of labelled images, of which nothing has been read yet.

    Attributes:
      name: "cifar10", "cifar10_corrupted/fog_3".
      path: its directory.
      image_shape: (height, width, channel).
      classes: how many there are; None where the data set does not say.
      splits: {name of the split: number of examples}.
    """

    name: str
    path: pathlib.Path
    image_shape: tuple[int, int, int]
    classes: int | None
    splits: dict[str, int]
    _builder: object = dataclasses.field(repr=False, compare=False)  # tfds.core.DatasetBuilder
    _mocked: bool = dataclasses.field(repr=False, compare=False)

    @property
    def dtype(self) -> np.dtype:
        """That of the images."""
        return np.dtype(self._builder.info.features["image"].np_dtype)

    def check(self, *, content: bool = False) -> None:
        """Raises InputError where a record file is missing; with `content` also where one is not what was prepared."""
        for split in () if self._mocked else self.splits:
            records = self._builder.info.splits[split].filepaths
            for file in records:
                if not os.path.isfile(file):
                    raise _damaged(self.path, FileNotFoundError(f"{file.name} is missing"))
            if content:
                _check_sums(records, _sums(self.path))

    def read(self, split: str, *, must_keep: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Reads one split, in the order of the data set.

        Args:
          split: one of `splits`.
          must_keep: raise an exception where the arrays cannot be kept for the next one.

        Returns:
          images: [n, height, width, channel] in the dtype of the data set; as a rule a memory map that cannot be written to.
          labels: [n] int64.

        Raises:
          InputError: there is no such split, or its files are missing, damaged or not those that were prepared.
          array_cache.NotKept: with `must_keep`.
        """
        choose(f"split of data set {self.name}", split, self.splits)
        shape = (self.splits[split], *self.image_shape)
        try:
            if self._mocked:
                images, labels = zip(*self._chunks(split), strict=True)
                return np.concatenate(images), np.concatenate(labels)
            mark = array_cache.fingerprint(self.path, self._builder.info.splits[split].filepaths, _sums(self.path))
            return array_cache.kept(
                self.path, split, shape, self.dtype, mark, lambda: self._chunks(split), must=must_keep)
        except (InputError, array_cache.NotKept):
            raise
        except Exception as error:
            raise _damaged(self.path, error) from error

    def _chunks(self, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        size = self.splits[split]
        if not self._mocked:
            _check_sums(self._builder.info.splits[split].filepaths, _sums(self.path))
        records = self._builder.as_data_source(split)
        # A file cut in the right place looks like a shorter one.
        if len(records) != size:
            raise EOFError(f"{len(records)} of {size} examples are there")
        for start in range(0, size, _READ_CHUNK):
            places = list(range(start, min(start + _READ_CHUNK, size)))
            # Of a mocked data set TFDS 4.9 has no working __getitems__.
            chunk = [records[place] for place in places] if self._mocked else records.__getitems__(places)
            images = np.stack([record["image"] for record in chunk])
            yield images, np.array([record["label"] for record in chunk]).astype(np.int64)


def find(name: str, directory: str | os.PathLike | None = None, *, instead: str = _INSTEAD) -> Prepared:
    """Finds a prepared data set and reads what it says about itself.

    Args:
      name: "jaxrd_digits", which is prepared on first use, or the name of a prepared data set, with its config where
        it has some ("cifar10", "downsampled_imagenet/32x32"); its features must include `image` and `label`.
      directory: where TFDS keeps its data sets; TFDS's own choice (~/tensorflow_datasets) by default.
      instead: what a message may name to pass instead of a data set.

    Returns:
      The data set; none of its images are in memory.

    Raises:
      InputError: if the data set is unknown, not prepared, damaged, or holds something else than labelled images.
    """
    root = root_of(directory)
    if not re.fullmatch(_NAME, name):
        raise InputError(f"data set {name!r} is no TFDS name: pass one such as 'cifar10' or 'imagenet_resized/32x32'")
    if _is_mocked():
        return _mocked(name, root, instead)
    if name == DIGITS:
        from jaxrd.data import digits

        path = root / DIGITS / digits.VERSION
        if not path.exists():
            digits.prepare(root)
    else:
        path = _find_files(name, root, instead)
    return at(name, path)


def at(name: str, path: pathlib.Path) -> Prepared:
    """Reads what the data set in a directory, such as ~/tensorflow_datasets/cifar10/3.0.2, says about itself.

    Raises:
      InputError: as `find`.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(path)
        formats = [file_format.value for file_format in builder.info.available_file_formats()]
        sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
        prepared = described(name, path, builder, sizes, mocked=False)
    except InputError:
        raise
    except Exception as error:
        raise _damaged(path, error) from error
    if "array_record" not in formats:
        raise InputError(f"data set {name!r} in {path} is stored as {formats}: prepare it as array_record elsewhere, with "
                         f"python -m launch.prepare --dataset={name} --data_dir=DIRECTORY")
    return prepared


def names(pattern: str, directory: str | os.PathLike | None = None, *, instead: str = _INSTEAD) -> list[str]:
    """Lists the prepared data sets that a pattern stands for.

    Args:
      pattern: the name of a data set, or one in which *, ? and [...] stand for parts of it, as in "cifar10_corrupted/*";
        none of them stands for a "/".
      directory, instead: as for `find`.

    Returns:
      Names for `find`, in alphabetical order; at least one.

    Raises:
      InputError: none is prepared.
    """
    if not set("*?[") & set(pattern):
        return [find(pattern, directory, instead=instead).name]
    root = root_of(directory)
    there = _mocked_names(pattern) if _is_mocked() else _prepared_names(root)
    parts = pattern.split("/")
    found = [name for name in there if len(each := name.split("/")) == len(parts)
             and all(fnmatch.fnmatchcase(*pair) for pair in zip(each, parts))]
    if not found:
        raise not_prepared(pattern, root, instead)
    return sorted(found)


def root_of(directory: str | os.PathLike | None) -> pathlib.Path:
    """Returns where data sets are: `directory`, or where TFDS keeps them if that is None."""
    import tensorflow_datasets as tfds

    return pathlib.Path(directory if directory is not None else tfds.core.constants.DATA_DIR).expanduser()


def data_dir_flag(directory: str | os.PathLike | None, flag: str = "data_dir") -> str:
    """Returns " --data_dir=..." for a command that shall look there, or "" where it looks anyway."""
    root = root_of(directory)
    return "" if root == root_of(None) else f" --{flag}={shlex.quote(os.fspath(root))}"


def catalogue() -> list[str]:
    """Returns the names of the data sets that can be prepared without arrays or images of one's own."""
    import tensorflow_datasets as tfds

    own = [DIGITS, TINY_IMAGENET]
    return own + [name for name in tfds.list_builders(with_community_datasets=False) if name not in own]


def _find_files(name: str, root: pathlib.Path, instead: str) -> pathlib.Path:
    """Finds a prepared data set by its files alone: the code of its builder might ask the network."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    try:
        return pathlib.Path(read_only_builder.builder_from_files(name, data_dir=os.fspath(root)).data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise not_prepared(name, root, instead) from error
    except Exception as error:
        raise _damaged(root / re.split("[/:]", name)[0], error) from error


def described(name: str, path: pathlib.Path, builder, sizes: dict[str, int], *, mocked: bool) -> Prepared:
    """Describes what a builder reads, or raises InputError where that is not labelled images of one size."""
    features = dict(builder.info.features)
    if not {"image", "label"} <= set(features):
        raise InputError(f"data set {name!r} has the features {list(features)}, not 'image' and 'label': pass another")
    image_shape, label_shape = features["image"].shape, features["label"].shape
    if len(image_shape) != 3 or None in image_shape or label_shape != ():
        raise InputError(
            f"data set {name!r} has images {image_shape} and labels {label_shape}: bring them to one image size and "
            f"one label each, and pass {_INSTEAD}"
        )
    classes = getattr(features["label"], "num_classes", None)
    return Prepared(name, path, tuple(image_shape), classes, sizes, _builder=builder, _mocked=mocked)


def _sums(path: pathlib.Path) -> dict[str, str]:
    """Returns the checksums of record files that were taken when they were prepared; none where that was not done."""
    try:
        return dict(json.loads((path / "checksums.json").read_text()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(path, error) from error


def _check_sums(records: list[pathlib.Path], sums: dict[str, str]) -> None:
    for file in records:
        if file.name in sums and files.sha256(file) != sums[file.name]:
            raise InputError(f"{file}: its SHA-256 is not the one in checksums.json, so it has changed since it was prepared: "
                             f"delete this directory and prepare the data again")


def not_prepared(name: str, root: pathlib.Path, instead: str = _INSTEAD) -> InputError:
    """Says how to prepare a data set of the catalogue, or what the user may have meant."""
    known, base = catalogue(), re.split("[/:]", name)[0]
    where = data_dir_flag(root)
    if base in known:
        source = " --source=tiny-imagenet-200.zip" if base == TINY_IMAGENET else ""
        command = f"python -m launch.prepare --dataset={shlex.quote(name)}{source}{where}"
        return InputError(f"data set {name!r} is not prepared in {root}: prepare it with {command}, or pass {instead}")
    own_names = _prepared_names(root) if root.is_dir() else []
    guess = difflib.get_close_matches(name, own_names, n=1) or difflib.get_close_matches(base, known, n=1)
    hint = f"did you mean {guess[0]!r}? Otherwise pass" if guess else "pass a TFDS name or"
    own = base if re.fullmatch(_NAME, base) else "NAME"
    command = f"python -m launch.prepare --npz=train.npz,test.npz --name={own}{where}"
    place = f"in {root}" if root.is_dir() else f"in {root}, which is no directory"
    return InputError(f"data set {name!r} is unknown to TFDS and not prepared {place}: {hint} {instead}, or prepare images of "
                      f"your own with {command}")


def _damaged(path: pathlib.Path, error: Exception) -> InputError:
    return InputError(f"{path}: cannot be read ({one_line(error)}): delete this directory and prepare the data again")


def _prepared_names(root: pathlib.Path) -> list[str]:
    found = {file.parent.parent.relative_to(root).as_posix() for depth in ("*/*", "*/*/*")
             for file in root.glob(f"{depth}/features.json")}
    return [name for name in found if re.fullmatch(_NAME, name)]


def _is_mocked() -> bool:
    """Returns whether this is inside `tfds.testing.mock_data`, which replaces the method that opens records."""
    import tensorflow_datasets as tfds

    return tfds.core.DatasetBuilder.as_data_source.__module__ != tfds.core.DatasetBuilder.__module__


def _mocked(name: str, root: pathlib.Path, instead: str) -> Prepared:
    """Asks the builder's code, as `mock_data` does; it has no files, and would otherwise look for them."""
    import tensorflow_datasets as tfds

    _register()
    try:
        builder = tfds.builder(name, data_dir=os.fspath(root), file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise not_prepared(name, root, instead) from error
    splits = builder.info.splits or (["test"] if re.split("[/:]", name)[0] in _WITHOUT_TRAIN else ["train", "test"])
    sizes = {split: len(builder.as_data_source(split)) for split in splits}
    return described(name, root, builder, sizes, mocked=True)


def _mocked_names(pattern: str) -> list[str]:
    import tensorflow_datasets as tfds

    _register()
    base = pattern.split("/")[0]
    if base not in catalogue():
        return []
    return [f"{base}/{config}" for config in tfds.builder_cls(base).builder_configs] or [base]


def _register() -> None:
    """Imports the builders of this library: TFDS knows a builder once its class is there."""
    from jaxrd.data import digits, tiny_imagenet  # noqa: F401
