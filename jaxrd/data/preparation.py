"""Prepares data sets so that training reads them at once, everywhere: arrays, class folders, Tiny-ImageNet, TFDS's catalogue.

Each function writes one TFDS data set as array_record, its decoded arrays, checksums and a description (`publication`): by one
process at a time, whole or not at all. What is there already, from the same source, is left as it is. Only data sets of the
catalogue need TensorFlow.
"""

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping

import numpy as np

from jaxrd.data import image_files, tfds_reader
from jaxrd.data.array_builder import VERSION, ArrayBuilder, digests, split_of
from jaxrd.data.catalogue import prepare_catalogue
from jaxrd.data.progress import Progress
from jaxrd.data.publication import Origin, Say, need_space, publish
from jaxrd.data.source import check_every_class, from_arrays
from jaxrd.data.tiny_imagenet import prepare_tiny_imagenet
from jaxrd.errors import InputError

__all__ = ["prepare_arrays", "prepare_catalogue", "prepare_folder", "prepare_tiny_imagenet"]

_SPLITS = ("train", "validation", "test")
_RESERVED = ("downloads", "extracted", "manual")


def prepare_arrays(
    name: str, splits: Mapping[str, tuple[np.ndarray, np.ndarray]], directory: str | os.PathLike | None = None,
    say: Say = print, *, paths: tuple[str, ...] = (),
) -> pathlib.Path:
    """Prepares images and labels in memory as a TFDS data set; they come back in the order they have.

    Args:
      name: for the data set: small letters, digits and "_"; none of TFDS's own.
      splits: {"train": (images, labels), "test": ..., optionally "validation"}, or train alone, for images that others are
        mixed with (`data.extra`): images [n, height, width, channel], uint8 or floating in [0, 1] (kept as float32), of one
        shape and dtype; labels [n] integers. Train has every class 0..classes - 1; the others have no further one.
      directory: where TFDS keeps its data sets; TFDS's own choice (~/tensorflow_datasets) by default.
      say: is given what happens, line by line.
      paths: where the arrays come from, for the description.

    Returns:
      The directory of the prepared data set.

    Raises:
      InputError: an argument is something else; there is another data set of this name; it cannot be written.
    """
    check_name(name)
    if set(splits) != {"train"} and not {"train", "test"} <= set(splits):
        raise InputError(f"splits of {name} are {list(splits)}; pass train and test, and validation where there is one, or "
                         "train alone, to mix it with other images")
    for split in splits:
        if split not in _SPLITS:
            raise InputError(f'split is "{split}"; known: {", ".join(_SPLITS)}')
    sources = {}
    for split in (split for split in _SPLITS if split in splits):
        classes = sources["train"].classes if sources else None
        sources[split] = from_arrays(*splits[split], classes=classes, name=f"{name}/{split}")
    train = sources["train"]
    check_every_class(train.labels, train.classes, train.name)
    for source in sources.values():
        for field, value, wanted in (("shape", source.image_shape, train.image_shape),
                                     ("dtype", source.images.dtype, train.images.dtype)):
            if value != wanted:
                raise InputError(f"{train.name} has images of {field} {wanted}, {source.name} of {value}: convert one of them")

    parts = {split: split_of(source.images, source.labels.astype(np.int64)) for split, source in sources.items()}
    expected = {split: digests(part) for split, part in parts.items()}
    identity = hashlib.sha256(json.dumps([expected, train.image_shape, str(train.images.dtype)]).encode()).hexdigest()
    root = tfds_reader.root_of(directory)

    def build(empty, kept):
        del kept
        # Records and arrays, neither of which is compressed by much.
        need_space(root, 2.1 * sum(source.images.nbytes for source in sources.values()))
        builder = ArrayBuilder(name, train.image_shape, train.images.dtype, train.classes, "Arrays of a user's own.",
                               data_dir=empty, file_format="array_record")
        with Progress(say, f"{name}: writing", sum(map(len, sources.values()))) as progress:
            return builder.write(parts, progress.add), expected

    return publish(name, VERSION, root, Origin("arrays", identity, paths), build, say)


def prepare_folder(
    name: str, folder: str | os.PathLike, directory: str | os.PathLike | None = None, image_size: int | None = None,
    say: Say = print,
) -> pathlib.Path:
    """Prepares class folders of image files as a TFDS data set.

    Classes are numbered in the order of their folders' names in train; the names are kept. Images are decoded as RGB, like
    torchvision's ImageFolder does, and come in the order of their paths.

    Args:
      name: for the data set, as in `prepare_arrays`.
      folder: holds train/ and test/, and validation/ or val/ where there is one; in each a folder for each class.
      directory: where TFDS keeps its data sets; TFDS's own choice (~/tensorflow_datasets) by default.
      image_size: side of the square that images are resized to; by default all must have one size.
      say: is given what happens, line by line.

    Returns:
      The directory of the prepared data set.

    Raises:
      InputError: the folder holds something else, or an image that cannot be decoded; or as `prepare_arrays`.
    """
    check_name(name)
    folder = pathlib.Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give one that holds train/ and test/, each with a folder for each class")
    places = _places(folder)
    classes = _classes(folder / "train")
    if len(classes) < 2:
        raise InputError(f"{folder / 'train'} holds {len(classes)} class folders; it must hold at least two")
    splits, sizes = {}, {}
    for split, place in places.items():
        found = image_files.in_directory(folder / place).sizes
        splits[split] = _labelled(folder, place, classes, sorted(found, key=lambda path: path.split("/")))
        sizes.update({f"{place}/{path}": size for path, size in found.items()})
    sources = image_files.FileSet(folder, sizes, lambda path: (folder / path).read_bytes())

    def make(shape, empty):
        return ArrayBuilder(name, shape, np.uint8, classes, "Images of a user's own.", data_dir=empty,
                            file_format="array_record")

    origin = Origin("folder", sources.fingerprint(image_size), (str(folder.resolve()),))
    return image_files.publish_files(
        name, tfds_reader.root_of(directory), origin, sources, splits, image_size, make, say)


def check_name(name: str) -> None:
    """Raises InputError where a data set of a user's own cannot have this name."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise InputError(f'name is "{name}"; it must consist of small letters, digits and single "_" between them, as in '
                         '"my_images"')
    if name in tfds_reader.catalogue() or name in _RESERVED:
        raise InputError(f'name is "{name}", which TFDS uses itself; give another one, such as "my_{name}"')


def _places(folder: pathlib.Path) -> dict[str, str]:
    """Returns which folder holds which split."""
    there = sorted(each.name for each in folder.iterdir() if each.is_dir())
    if {"val", "validation"} <= set(there):
        raise InputError(f"{folder} holds both val and validation; remove one of them")
    places = {"train": "train", "validation": "validation" if "validation" in there else "val", "test": "test"}
    places = {split: place for split, place in places.items() if place in there}
    for needed in ("train", "test"):
        if needed not in places:
            raise InputError(f"{folder} holds the folders {', '.join(there) or '(none)'}; it must hold train and test")
    return places


def _labelled(folder: pathlib.Path, place: str, classes: list[str], paths: list[str]) -> image_files.Labelled:
    """Numbers the images of a split by the folders that they lie in."""
    number = {each: index for index, each in enumerate(classes)}
    for path in paths:
        if "/" not in path:
            raise InputError(f"{folder / place / path} lies in no class folder; move it into one, or remove it")
    full = {path.split("/")[0] for path in paths}
    for each in _classes(folder / place):
        if each not in number:
            raise InputError(f"{folder / place / each}: train has no class {each}; add images of it there, or remove it here")
        if each not in full:
            raise InputError(f"{folder / place / each} holds no images; add some, or remove the folder")
    if not paths:
        raise InputError(f"{folder / place} holds no class folders; add them, or remove it")
    return image_files.Labelled([f"{place}/{path}" for path in paths], [number[path.split("/")[0]] for path in paths])


def _classes(folder: pathlib.Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
