"""What a killed cascade goes on from: one small file per finished batch, in a directory that belongs to one evaluation.

`run.json` says whose it is: fingerprints of the model (its arrays, and its logits for a few images), of the data and of the
configuration. A batch is known by its attack, its run and the points in it, so an evaluation may go on with another batch size.
It may go on in another number of processes too: all of them read the whole directory, each takes from it what its own points
came to, and each adds files under names of its own.
"""

import dataclasses
import hashlib
import json
import pathlib
import re

import jax
import numpy as np

from jaxrd.attacks.network import Network, logits_of
from jaxrd.errors import InputError
from jaxrd.files import read_arrays, replacing

Array = jax.Array

_FORMAT = 1
_LOGITS_OF = 16  # images whose logits tell one function from another of the same arrays
_TOLERANCE = 1e-3  # what rounding on other devices may do to them


@dataclasses.dataclass(frozen=True)
class Record:
    """What one batch of a cascade came to.

    Attributes:
      stage, run: the attack's name, and the number of its run.
      indices: [k] int, the points attacked.
      fooled: [k] bool.
      images: [fooled, h, w, c] float32, the adversarial images.
      forwards, backwards: passes, in images.
      zero_gradients: points with a gradient of 0 at the start.
      seconds: wall time.
    """

    stage: str
    run: int
    indices: np.ndarray
    fooled: np.ndarray
    images: np.ndarray
    forwards: int
    backwards: int
    zero_gradients: int
    seconds: float

    def of(self, mine: np.ndarray) -> "Record":
        """Returns what it says of the points that are `mine`, [n] bool; its costs are theirs who have its first point."""
        kept = mine[self.indices]
        if kept.all():
            return self
        costs = {} if kept[0] else {"forwards": 0, "backwards": 0, "zero_gradients": 0, "seconds": 0.0}
        return dataclasses.replace(
            self, indices=self.indices[kept], fooled=self.fooled[kept], images=self.images[kept[self.fooled]], **costs)


def fingerprint(network: Network, points: dict[str, np.ndarray], keys: Array, configuration: dict, batch: int) -> dict:
    """Returns what tells one evaluation from another, as JSON can hold it: "model", "logits", "data", "key", "configuration".

    Args:
      network: the function under attack.
      points: "images" and "labels".
      keys: [n] typed keys, in which the seed and the images' indices are.
      configuration: what else there is to tell.
      batch: how many images to forward at once; the logits of the first few are kept.
    """
    few = np.arange(min(_LOGITS_OF, len(points["labels"])))
    parts = [few[first:first + batch] for first in range(0, len(few), batch)]
    padded = [np.resize(part, batch) for part in parts]
    logits = np.concatenate([np.asarray(logits_of(network, points["images"][rows], keys[rows]))[:len(part)]
                             for part, rows in zip(parts, padded)])
    return {
        "model": _hash(network.leaves),
        "logits": np.asarray(logits, np.float64).tolist(),
        "data": _hash([points["images"], points["labels"]]),
        "key": _hash([keys]),
        "configuration": configuration}


class Records:
    """The finished batches of one evaluation; without a directory, none are kept."""

    def __init__(self, directory: pathlib.Path | None, kept: dict, writer: str = ""):
        self._directory, self._kept, self._writer, self._number = directory, kept, writer, 0
        if directory:
            own = (path.stem.removeprefix(writer) for path in _files(directory) if path.stem.startswith(writer))
            self._number = max((int(number) for number in own if number.isdigit()), default=0)

    @classmethod
    def open(cls, directory: str | pathlib.Path | None, identity: dict, n: int, shape: tuple[int, ...], *,
             rows: np.ndarray | None = None, writer: str = "") -> "Records":
        """Opens the records of an evaluation, or begins them.

        Args:
          directory: made where it does not exist; None: nothing is kept.
          identity: from `fingerprint`, with "jaxrd".
          n: number of points.
          shape: of an image.
          rows: [k] int, the points of which they are wanted; by default all.
          writer: what the names of new files begin with, where several processes write at once: "process-1-".

        Raises:
          InputError: the directory belongs to another evaluation, is no such directory, or is damaged.
        """
        if directory is None:
            return cls(None, {})
        directory = pathlib.Path(directory)
        header = directory / "run.json"
        if not header.is_file():
            # Unless another process of the same evaluation has begun it meanwhile.
            if _holds_other_things(directory) and not header.is_file():
                raise InputError(f'resume directory "{directory}" holds other things; name an empty or a new one')
            directory.mkdir(parents=True, exist_ok=True)
            with replacing(header, "w", encoding="utf-8") as file:
                json.dump({"format": _FORMAT} | identity, file, indent=1)
            return cls(directory, {}, writer)
        _check_identity(directory, header, identity)
        kept: dict = {}
        mine = np.isin(np.arange(n), np.arange(n) if rows is None else rows)
        for path in _files(directory):
            record = _read(path, n, shape).of(mine)
            if len(record.indices):
                kept.setdefault((record.stage, record.run), []).append(record)
        return cls(directory, kept, writer)

    @property
    def finished(self) -> int:
        """The number of batches found on record."""
        return sum(map(len, self._kept.values()))

    def of(self, stage: str, run: int, left: np.ndarray) -> list[Record]:
        """Returns the finished batches of a run that has the points `left` to attack."""
        found = self._kept.get((stage, run), [])
        seen = np.concatenate([left[:0], *(record.indices for record in found)])
        if len(np.unique(seen)) < len(seen) or not np.isin(seen, left).all():
            raise InputError(f'resume directory "{self._directory}": its batches of {stage}, run {run + 1}, do not fit the '
                             "points that are left there; delete the directory to start over")
        return found

    def add(self, record: Record) -> None:
        """Puts a batch on record; a kill leaves the file whole or absent."""
        if self._directory is None:
            return
        self._number += 1
        fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
        with replacing(self._directory / f"{self._writer}{self._number:06}.npz") as file:
            np.savez(file, **fields)


def _check_identity(directory, header, identity):
    try:
        found = json.loads(header.read_text(encoding="utf-8"))
        logits = np.array(found["logits"], np.float64)
        known = {name: found[name] for name in ("format", "jaxrd", "model", "data", "key", "configuration")}
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise InputError(f'{header} is damaged ({type(error).__name__}); delete "{directory}" to start over') from None
    wanted = {"format": _FORMAT} | {name: identity[name] for name in known if name != "format"}
    differing = [name for name in known if known[name] != wanted[name]]
    expected = np.array(identity["logits"])
    scale = float(np.abs(expected).max(initial=0.0))
    if "model" not in differing and (logits.shape != expected.shape or np.abs(logits - expected).max() > _TOLERANCE * scale):
        differing.append("model")
    if not differing:
        return
    details = [f"{name} is {known['configuration'].get(name)} there and {value} here"
               for name, value in wanted["configuration"].items()
               if isinstance(known["configuration"], dict) and known["configuration"].get(name) != value and name != "attacks"]
    raise InputError(
        f'resume directory "{directory}" belongs to an evaluation with another {" and another ".join(differing)}'
        + (f" ({'; '.join(details)})" if details else "") + "; name another directory, or delete it to start over")


def _read(path, n, shape) -> Record:
    try:
        values = read_arrays(path, (field.name for field in dataclasses.fields(Record)))
        record = Record(**{name: value.item() if value.ndim == 0 else value for name, value in values.items()})
        indices, fooled = record.indices, record.fooled
        if not (indices.ndim == 1 and np.issubdtype(indices.dtype, np.integer)
                and fooled.shape == indices.shape and fooled.dtype == bool
                and record.images.shape == (fooled.sum(), *shape) and (0 <= indices).all() and (indices < n).all()):
            raise ValueError("its arrays do not fit together")
        return record
    except Exception as error:  # whatever a damaged zip or array raises
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is damaged ({line}); delete this file, and its batch will be attacked again") from None


def _files(directory) -> list[pathlib.Path]:
    return sorted(path for path in directory.glob("*.npz") if re.fullmatch(r"(process-\d+-)?\d+", path.stem))


def _holds_other_things(directory) -> bool:
    if not directory.exists():
        return False
    return not directory.is_dir() or any(path.suffix != ".tmp" for path in directory.iterdir())


def _hash(arrays) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        if hasattr(array, "dtype") and jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
            array = jax.random.key_data(array)
        array = np.ascontiguousarray(array)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
