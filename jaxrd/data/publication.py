"""Puts a prepared data set in its place: one process at a time, and whole or not at all.

    {root}/.{name}.lock         held by whoever prepares the data set
           .{name}.preparing/   where it does so; what it finds there of somebody who was killed it uses or removes
           {name}/{version}/    appears when everything is written, read again and compared:
               dataset_info.json, features.json, {name}-{split}.array_record-*    by TFDS
               arrays/          the images as they are trained on, see `array_cache`
               jaxrd.json       where the images come from and what they are
               checksums.json   SHA-256 of the record files
"""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import shutil
import socket
import threading
from collections.abc import Callable, Iterator

import numpy as np

import jaxrd
from jaxrd import files
from jaxrd.data import array_cache, tfds_reader
from jaxrd.data.array_builder import digest_and, digests, split_of
from jaxrd.errors import InputError, one_line

Say = Callable[[str], object]
_BUILD = "build"


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a data set is prepared from.

    Attributes:
      kind: "arrays", "folder", "tiny_imagenet", "catalogue" or "digits".
      identity: the same text for the same source, another one for any other.
      paths: where the source was.
    """

    kind: str
    identity: str
    paths: tuple[str, ...] = ()


def publish(
    name: str, version: str, root: pathlib.Path, origin: Origin,
    build: Callable[[pathlib.Path, pathlib.Path], tuple[pathlib.Path, dict[str, dict[str, str]]]], say: Say,
) -> pathlib.Path:
    """Prepares a data set unless it is there.

    Args:
      name: of the data set, with its config where it has some.
      version: of the data set.
      root: where data sets are; made where it does not exist.
      origin: what it is prepared from.
      build: is given two directories: an empty one to write the data set in, and one (which may not exist) of which the
        next attempt finds what an interrupted one left there. It returns the data set's directory in the first one and, for
        each split whose images it knows, their `digests`, with which what was written is compared.
      say: is given what happens, line by line.

    Returns:
      The directory of the prepared data set.

    Raises:
      InputError: the data set is there, from another source or damaged; or it cannot be written.
    """
    target = root.joinpath(*name.split("/"), version)
    key = name.replace("/", "-")
    workplace = root / f".{key}.preparing"
    if target.exists() and not workplace.exists():
        return _already_there(name, target, origin, say)
    try:
        with _directories(root), files.alone(
                root / f".{key}.lock",
                lambda holder: say(f"{name}: {holder} prepares it at this moment; waiting for it")) as alone:
            if not alone:  # then at least not in the same place
                own = f"{workplace.name}-{socket.gethostname()}-"
                files.remove_left(root, own)
                workplace = workplace.with_name(f"{own}{os.getpid()}-{threading.get_ident()}")
            if target.exists():
                _remove(workplace)
                return _already_there(name, target, origin, say)
            with files.termination_raised(), _directories(target.parent), _working(workplace) as kept:
                empty = workplace / _BUILD
                empty.mkdir(parents=True)
                built, expected = build(empty, kept)
                _complete(name, built, origin, expected)
                try:
                    os.replace(built, target)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                    return _already_there(name, target, origin, say)  # somebody was faster, where there are no locks
    except OSError as error:
        if target.exists():  # and something beside it that may not be removed
            return _already_there(name, target, origin, say)
        raise InputError(f"{root}: data set {name} cannot be written there ({error.strerror or error}); nothing of it is left; "
                         "make room, or pass another directory (--data_dir)") from error
    say(f"{name}: prepared in {target}")
    _summarise(name, target, root, say)
    return target


def need_space(root: pathlib.Path, size: int) -> None:
    """Raises InputError unless there is room for so many bytes; looked at before the work rather than after it."""
    while not root.exists() and root != root.parent:
        root = root.parent
    free = shutil.disk_usage(root).free
    if free < size:
        raise InputError(f"{root}: about {size / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free; make room, or pass "
                         "another directory (--data_dir)")


@contextlib.contextmanager
def _directories(directory: pathlib.Path) -> Iterator[None]:
    """Makes a directory, and in the end removes what it made of it and is empty."""
    made = [each for each in (directory, *directory.parents) if not each.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for each in made:
            with contextlib.suppress(OSError):
                each.rmdir()


@contextlib.contextmanager
def _working(workplace: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the directory that outlives an interruption; nothing outlives success or an error."""
    _remove(workplace / _BUILD)
    kept = workplace / "kept"
    try:
        yield kept
    except Exception:
        _remove(workplace)
        raise
    except BaseException:  # an interruption: the same command goes on
        _remove(workplace / _BUILD)
        with contextlib.suppress(OSError):
            workplace.rmdir()
        raise
    _remove(workplace)


def _remove(directory: pathlib.Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)


def _complete(name: str, built: pathlib.Path, origin: Origin, expected: dict[str, dict[str, str]]) -> None:
    """Reads a data set that was just written, compares it, and adds checksums.json, arrays and jaxrd.json."""
    prepared = tfds_reader.at(name, built)
    sums = {file.name: files.sha256(file) for file in sorted(built.glob("*.array_record*"))}
    (built / "checksums.json").write_text(json.dumps(sums, indent=1) + "\n")  # first: the arrays are known by them
    splits = {}
    for split, examples in prepared.splits.items():
        try:
            images, labels = prepared.read(split, must_keep=True)
        except InputError as error:  # whose way out is for data sets that are in their place
            raise OSError(errno.EIO, f"{split} cannot be read: {error.__cause__ or error}") from error
        except array_cache.NotKept as error:
            raise error.__cause__ from None
        totals = np.zeros(images.shape[-1])

        def add(chunk, totals=totals):
            totals += chunk.sum((0, 1, 2), dtype=np.float64)

        sha256 = digest_and(split_of(images, labels), add)
        if expected.get(split, sha256) != sha256:
            raise OSError(errno.EIO, f"{split} was not read as it was written")
        scale = 255 if images.dtype == np.uint8 else 1
        splits[split] = {
            "examples": examples,
            "label_histogram": {int(label): int(count) for label, count in zip(*np.unique(labels, return_counts=True))},
            "channel_means": (totals / (images[..., 0].size * scale)).tolist(),
            "sha256": sha256,
        }
    description = {"jaxrd": jaxrd.__version__, "origin": dataclasses.asdict(origin), "splits": splits}
    (built / "jaxrd.json").write_text(json.dumps(description, indent=1) + "\n")


def _already_there(name: str, target: pathlib.Path, origin: Origin, say: Say) -> pathlib.Path:
    """Says that a data set is there, if it is the one that was asked for and every byte of it is as it was prepared."""
    prepared = tfds_reader.at(name, target)
    prepared.check()
    try:
        description = json.loads((target / "jaxrd.json").read_text())
        there, sha256 = description["origin"], {split: each["sha256"] for split, each in description["splits"].items()}
        same, source = there["identity"] == origin.identity, ", ".join(there["paths"]) or there["kind"]
    except FileNotFoundError:  # TFDS's own work
        same, source, sha256 = origin.kind in ("catalogue", "digits"), "something else", {}
    except Exception as error:
        raise InputError(f"{target / 'jaxrd.json'}: cannot be read ({one_line(error)}): delete {target} and prepare the data "
                         "again") from error
    if not same:
        raise InputError(f"{target}: a data set of this name is there already, prepared from {source}; give this one another "
                         "--name (or --data_dir), or delete that directory")
    prepared.check(content=True)
    for split, expected in sha256.items():
        if digests(split_of(*prepared.read(split))) != expected:
            raise InputError(f"{target}: the arrays of {split} are damaged, they are not what was prepared: delete this "
                             "directory and prepare the data again")
    say(f"{name}: is prepared already, in {target}")
    _summarise(name, target, target.parents[len(name.split("/"))], say)
    return target


def _summarise(name: str, path: pathlib.Path, root: pathlib.Path, say: Say) -> None:
    prepared = tfds_reader.at(name, path)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    sizes = ", ".join(f"{split} {examples:,}" for split, examples in prepared.splits.items())
    shape = "x".join(map(str, prepared.image_shape))
    say(f"  {sizes}; images {shape}, {prepared.dtype}; {prepared.classes} classes; {size / 1e6:,.1f} MB")
    use = "extra" if list(prepared.splits) == ["train"] else "name"
    say(f"  use it with --config.data.{use}={name}{tfds_reader.data_dir_flag(root, 'config.data.directory')}")
