"""Tiny-ImageNet, from the official archive or the folder in it, as a TFDS data set that needs no TensorFlow.

Its test part is the official validation images: the labels of the official test images are not public. TFDS has no data set of
this name.
"""

import os
import pathlib
from collections.abc import Sequence

import numpy as np

from jaxrd.data import tfds_reader
from jaxrd.data.array_builder import ArrayBuilder
from jaxrd.data.image_files import FileSet, Labelled, in_archive, in_directory, publish_files
from jaxrd.data.publication import Origin, Say
from jaxrd.errors import InputError

NAME = "tiny_imagenet"
ARCHIVE = "tiny-imagenet-200.zip"
URL = f"http://cs231n.stanford.edu/{ARCHIVE}"
SIZES = {"classes": 200, "train": 100_000, "test": 10_000}
_FOLDER = "tiny-imagenet-200/"
_AGAIN = f"get {ARCHIVE} (again) from {URL}"


class TinyImagenet(ArrayBuilder):
    """200 classes of ImageNet as 64x64 images: 100,000 to train, and the official 10,000 validation images to test.

    Args:
      image_shape: (height, width, channel); another one than the official for resized images.
      labels: WordNet identifiers of the classes, in order; how many they are where they are not known.
      **options: as for every builder.
    """

    def __init__(
        self, image_shape: tuple[int, int, int] = (64, 64, 3), labels: Sequence[str] | int = SIZES["classes"], **options
    ):
        description = "Tiny-ImageNet-200; the split test holds the official validation images."
        super().__init__(NAME, image_shape, np.uint8, labels, description, **options)


def prepare_tiny_imagenet(
    source: str | os.PathLike, directory: str | os.PathLike | None = None, image_size: int | None = None, say: Say = print
) -> pathlib.Path:
    """Prepares Tiny-ImageNet under the name "tiny_imagenet".

    Class i is the i-th WordNet identifier in alphabetical order. Train images come in the order of their paths, test images in
    that of the annotations.

    Args:
      source: tiny-imagenet-200.zip, the folder in it, or a folder that holds either.
      directory: where TFDS keeps its data sets; TFDS's own choice (~/tensorflow_datasets) by default.
      image_size: side of the square that images are resized to; by default they keep their 64 pixels.
      say: is given what happens, line by line.

    Returns:
      The directory of the prepared data set.

    Raises:
      InputError: the source is missing, damaged or incomplete; there is another data set of this name; it cannot be written.
    """
    sources = _files(pathlib.Path(source).expanduser())
    splits, classes = _splits(sources)
    wanted = {path for labelled in splits.values() for path in labelled.paths}
    # By size only, so that the archive and the folder are one source.
    listing = {path: (size, 0) for path, (size, _) in sources.sizes.items() if path in wanted}
    identity = FileSet(sources.where, listing, sources.read).fingerprint(image_size)

    def make(shape, empty):
        return TinyImagenet(shape, classes, data_dir=empty, file_format="array_record")

    origin = Origin("tiny_imagenet", identity, (str(sources.where.resolve()),))
    return publish_files(NAME, tfds_reader.root_of(directory), origin, sources, splits, image_size, make, say)


def _files(source: pathlib.Path) -> FileSet:
    if source.is_dir() and not (source / "train").is_dir():
        inside = [source / _FOLDER, source / ARCHIVE]
        source = next((each for each in inside if each.exists()), source)
    if source.is_file():
        files = in_archive(source)
        prefixes = {path.partition("train/")[0] for path in files.sizes if "train/" in path}
        files = files.under(min(prefixes, key=len, default=""))
    elif source.is_dir():
        files = in_directory(source)
    else:
        raise InputError(f"{source}: no such file; give {ARCHIVE}, from {URL}, or the folder in it")
    if "val/val_annotations.txt" not in files.sizes:
        raise InputError(f"{source} holds no val/val_annotations.txt, so it is not Tiny-ImageNet or not all of it; {_AGAIN}")
    return files


def _splits(files: FileSet) -> tuple[dict[str, Labelled], list[str]]:
    """Returns the images of train and test with their labels, and the classes; InputError where some are missing."""
    train = sorted((path for path in files.sizes if path.startswith("train/") and path.endswith(".JPEG")),
                   key=lambda path: path.split("/"))
    classes = sorted({path.split("/")[1] for path in train})
    number = {each: index for index, each in enumerate(classes)}
    rows = [line.split("\t") for line in _text(files, "val/val_annotations.txt").splitlines() if line.strip()]
    for row in rows:
        if len(row) < 2 or row[1] not in number or f"val/images/{row[0]}" not in files.sizes:
            raise InputError(
                f"{files.where / 'val/val_annotations.txt'} names {' '.join(row[:2])}, which is not there; {_AGAIN}")
    found = {"classes": len(classes), "train": len(train), "test": len(rows)}
    if found != SIZES:
        raise InputError(
            f"{files.where} has {found['classes']} classes, {found['train']:,} train and {found['test']:,} validation images, "
            f"not {SIZES['classes']}, {SIZES['train']:,} and {SIZES['test']:,}; {_AGAIN}")
    return {"train": Labelled(train, [number[path.split("/")[1]] for path in train]),
            "test": Labelled([f"val/images/{row[0]}" for row in rows], [number[row[1]] for row in rows])}, classes


def _text(files: FileSet, path: str) -> str:
    try:
        return files.read(path).decode()
    except Exception as error:
        raise InputError(f"{files.where / path}: cannot be read ({type(error).__name__}); {_AGAIN}") from error
