"""Image files in class folders or in an archive, decoded into arrays of one size; what is decoded survives an interruption."""

import concurrent.futures
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from PIL import Image

from jaxrd import files
from jaxrd.data.array_builder import CHUNK, VERSION, ArrayBuilder, Split, digests
from jaxrd.data.progress import Progress
from jaxrd.data.publication import Origin, Say, need_space, publish
from jaxrd.errors import InputError, one_line

_REFUSED_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow cuts them off at 255 instead of scaling them


@dataclasses.dataclass(frozen=True)
class FileSet:
    """Files in a directory or a zip archive.

    Attributes:
      where: the directory or archive.
      sizes: {path in it, with "/": (bytes, time or checksum)}.
      read: returns the bytes of one of them.
    """

    where: pathlib.Path
    sizes: Mapping[str, tuple[int, int]]
    read: Callable[[str], bytes]

    def under(self, prefix: str) -> "FileSet":
        """Returns those whose path begins with `prefix`, without it."""
        sizes = {path.removeprefix(prefix): size for path, size in self.sizes.items() if path.startswith(prefix)}
        return dataclasses.replace(self, sizes=sizes, read=lambda path: self.read(prefix + path))

    def fingerprint(self, *more) -> str:
        """Identifies the files by their paths, sizes and times, and by what else is passed."""
        return hashlib.sha256(json.dumps([sorted(self.sizes.items()), more]).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Labelled:
    """The image files of one split and their labels, in order."""

    paths: Sequence[str]
    labels: Sequence[int]


def in_directory(directory: pathlib.Path) -> FileSet:
    """Lists the files below a directory, save hidden ones; links are followed.

    Raises:
      InputError: there is no such directory, or it cannot be read.
    """
    def refuse(error):
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}); correct the path or its rights") from error

    sizes = {}
    for folder, folders, names in os.walk(directory, followlinks=True, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith("."):
                path = pathlib.Path(folder, name)
                try:
                    stat = path.stat()
                except OSError as error:
                    refuse(error)
                sizes[path.relative_to(directory).as_posix()] = (stat.st_size, stat.st_mtime_ns)
    return FileSet(directory, sizes, lambda path: (directory / path).read_bytes())


def in_archive(path: pathlib.Path) -> FileSet:
    """Lists the files in a zip archive; it stays open.

    Raises:
      InputError: it is missing, cut off, or no zip archive.
    """
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:
        raise InputError(f"{path}: cannot be read as .zip ({one_line(error)}); download it again") from error
    return FileSet(path, {each.filename: (each.file_size, each.CRC) for each in archive.infolist() if not each.is_dir()},
                   archive.read)


def decoded(
    sources: FileSet, splits: Mapping[str, Labelled], image_size: int | None, kept: pathlib.Path, say, name: str
) -> tuple[dict[str, Split], tuple[int, int, int]]:
    """Decodes the images of all splits as RGB, chunk by chunk into files that the next attempt finds.

    Args:
      sources: where the images are.
      splits: {name of the split: its images}.
      image_size: side of the square that they are resized to (bicubic, antialiased); None takes them as they are, all of
        one size.
      kept: directory for what is decoded; what an attempt on another source left there is removed.
      say, name: for the progress.

    Returns:
      The splits, to be read from `kept`, and the shape of an image.

    Raises:
      InputError: an image cannot be decoded, or has another size than the first.
    """
    first = next(iter(splits.values())).paths[0]
    size = (image_size, image_size) if image_size else _opened(sources, first).size
    listing = [[split, list(each.paths), list(each.labels)] for split, each in splits.items()]
    mark = sources.fingerprint(image_size, CHUNK, listing)
    if not (kept / mark).exists():
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        (kept / mark).touch()
    starts = {split: range(0, len(each.paths), CHUNK) for split, each in splits.items()}
    pending = [(split, start) for split, each in splits.items() for start in starts[split] if not _is_whole(
        _chunk(kept, split, start), (len(each.paths[start:start + CHUNK]), size[1], size[0], 3))]
    total = sum(len(each.paths) for each in splits.values())
    done = total - sum(len(splits[split].paths[start:start + CHUNK]) for split, start in pending)
    # What is decoded is written three times: here, as records, and as arrays.
    need_space(kept, (3.1 * total - done) * size[0] * size[1] * 3)
    if done:
        say(f"{name}: goes on after {done:,} of {total:,} images, which an interrupted attempt has decoded")

    def decode(path):
        return _decode(sources, path, size, first, resize=image_size is not None)

    # Pillow decodes without the lock of the interpreter: threads are as fast as processes here.
    with Progress(say, f"{name}: decoding", total, done) as progress, \
            concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for split, start in pending:
            paths = splits[split].paths[start:start + CHUNK]
            images = np.stack(list(pool.map(decode, paths)))
            with files.replacing(_chunk(kept, split, start)) as file:
                np.save(file, images)
                file.flush()
                os.fsync(file.fileno())  # or after a power cut the name is there, perhaps, and the content is not
            progress.add(len(paths))
    parts = {split: Split(len(each.paths), _reader(kept, split, each)) for split, each in splits.items()}
    return parts, (size[1], size[0], 3)


def _chunk(kept: pathlib.Path, split: str, start: int) -> pathlib.Path:
    return kept / f"{split}-{start:08}.npy"


def _is_whole(file: pathlib.Path, shape: tuple[int, ...]) -> bool:
    try:
        images = np.load(file, mmap_mode="r")
        return images.shape == shape and images.dtype == np.uint8
    except Exception:  # NumPy answers damage with a dozen unrelated types
        return False


def _reader(kept: pathlib.Path, split: str, labelled: Labelled):
    def chunks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(labelled.paths), CHUNK):
            yield np.load(_chunk(kept, split, start)), np.array(labelled.labels[start:start + CHUNK], np.int64)

    return chunks


def _opened(sources: FileSet, path: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(sources.read(path)))
    except Exception as error:  # zipfile, zlib and a dozen decoders of Pillow
        raise _unreadable(sources, path, error) from error


def _decode(sources: FileSet, path: str, size: tuple[int, int], first: str, resize: bool) -> np.ndarray:
    image = _opened(sources, path)
    if image.mode in _REFUSED_MODES:
        raise InputError(f"{sources.where / path}: its pixels have more than 8 bits ({image.mode}); convert it to 8 bits")
    if not resize and image.size != size:
        raise InputError(
            f"{sources.where / path} is {image.width}x{image.height} and {sources.where / first} {size[0]}x{size[1]}; images "
            "must have one size: bring them to it, or have them resized with --image_size")
    try:
        image = image.convert("RGB")
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        return np.asarray(image)
    except Exception as error:
        raise _unreadable(sources, path, error) from error


def _unreadable(sources: FileSet, path: str, error: Exception) -> InputError:
    if isinstance(error, OSError) and error.errno:
        reason = error.strerror
    else:  # Pillow's text names a buffer
        reason = one_line(error).partition(" <")[0]
    return InputError(f"{sources.where / path}: cannot be read as an image ({reason}); replace it or remove it")


def publish_files(
    name: str, root: pathlib.Path, origin: Origin, sources: FileSet, splits: Mapping[str, Labelled], image_size: int | None,
    make: Callable[[tuple[int, int, int], pathlib.Path], ArrayBuilder], say: Say,
) -> pathlib.Path:
    """Prepares the data set of the given image files; `make` returns its builder, for a shape and a data directory."""
    def build(empty, kept):
        parts, shape = decoded(sources, splits, image_size, kept, say, name)
        with Progress(say, f"{name}: writing", sum(part.examples for part in parts.values())) as progress:
            path = make(shape, empty).write(parts, progress.add)
        return path, {split: digests(part) for split, part in parts.items()}

    return publish(name, VERSION, root, origin, build, say)
