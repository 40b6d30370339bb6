"""From a source in host memory to the devices: the batches of a run, each ready before the step that needs it.

Batches are functions of (seed, step), so nothing here has a state that a checkpoint would have to hold, and any number of
processes and devices see the same ones.
"""

import collections
import concurrent.futures
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxrd.data.source import Source
from jaxrd.training import parallel

Array = jax.Array

AHEAD = 2  # batches that are ready, or being made ready, while a step runs
RESIDENT_SHARE = 0.1  # of a device's memory, which the training images may take by default


class Feeder:
    """The batches of a run on its devices, in their order, made ready by a thread while the steps before them run.

    A batch is {"images": uint8 or float32 [batch, h, w, c], "labels": int32 [batch]}, split over "data"; with `accumulation`
    its micro-batches, [accumulation, batch / accumulation, ...], each split over "data". With `partners`
    it also has "partners" and "partner_labels" (`Source.partners`), with `negatives` "negatives" and "negative_labels"
    (`Source.negatives`), shaped likewise, with `teacher_clean` the rows of that table under this name. A process gathers the
    rows of its own devices only.

    With `resident` the whole source lies on every device, and a step's positions are all that travels; without, the rows
    are gathered on the host and travel while the step before runs. The batches are the same.

    Attributes:
      waited: seconds that iterating has waited for a batch since the start, or since `waited` was set.
    """

    def __init__(
        self, source: Source, mesh: jax.sharding.Mesh, *, seed: int, batch_size: int, first: int = 0, last: int | None = None,
        partners: bool = False, negatives: bool = False, resident: bool | None = None, accumulation: int = 1,
        teacher_clean: np.ndarray | None = None,
    ):
        """Starts with batch `first`.

        Args:
          source: labelled images.
          mesh: the devices that share a batch equally.
          seed, batch_size: see `Source.indices`.
          first: the first batch.
          last: the one after the last batch; None for batches without end.
          partners, negatives: what else a batch has.
          resident: keep the source on the devices; None where they are accelerators on which it takes at most a tenth of the
            memory (of this process's first one: on unlike machines say which).
          accumulation: micro-batches that a batch is cut into, in the order of its images.
          teacher_clean: [n, classes], a row for each image of the source: see `teacher_cache`.

        Raises:
          InputError: devices and micro-batches cannot share a batch equally.
        """
        parallel.check_batch_size("batch_size", batch_size, mesh, accumulation)
        self._accumulation = accumulation
        self._source, self._mesh, self._seed, self._batch_size = source, mesh, seed, batch_size
        self._next, self._last = first, last
        self._draws = {"image": source.indices, **({"partner": source.partners} if partners else {}),
                       **({"negative": source.negatives} if negatives else {})}
        if resident is None:
            resident = fits_on(mesh.local_devices[0], source)
        self._teacher_clean = teacher_clean
        further = () if teacher_clean is None else (teacher_clean,)
        self._gather = ResidentGather(source, mesh, accumulation, further) if resident else None
        self.resident = resident
        self.waited = 0.0
        self._pending: collections.deque[concurrent.futures.Future] = collections.deque()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "jaxrd-feeder")
        for _ in range(AHEAD):
            self._request()

    def __enter__(self) -> "Feeder":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread; batches that are ready are dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[dict[str, Array]]:
        return self

    def __next__(self) -> dict[str, Array]:
        if not self._pending:
            raise StopIteration
        self._request()
        future = self._pending.popleft()
        began = time.perf_counter()
        batch = future.result()
        self.waited += time.perf_counter() - began
        if self._gather:
            # Here and not in the thread: with several processes all must start their programs in one order.
            batch = {role: self._gather(positions) for role, positions in batch.items()}
        named = {name: value for role, (images, labels, *_) in batch.items()
                 for name, value in ((f"{role}s", images), ("labels" if role == "image" else f"{role}_labels", labels))}
        return named if self._teacher_clean is None else named | {"teacher_clean": batch["image"][2]}

    def _request(self) -> None:
        if self._last is None or self._next < self._last:
            self._pending.append(self._thread.submit(self._make, self._next))
            self._next += 1

    def _make(self, step: int) -> dict[str, Any]:
        """Returns the images and labels of each role, or where the source is resident their positions."""
        make = self._positions if self._gather else self._rows
        return {role: make(self._cut(draw(self._seed, step, self._batch_size))) for role, draw in self._draws.items()}

    def _cut(self, positions: np.ndarray) -> np.ndarray:
        return positions if self._accumulation == 1 else positions.reshape(self._accumulation, -1)

    def _positions(self, positions: np.ndarray) -> Array:
        return parallel.put_batch({"positions": positions.astype(np.int32)}, self._mesh, self._accumulation)["positions"]

    def _rows(self, positions: np.ndarray) -> tuple[Array, ...]:
        source, sharding = self._source, parallel.sharded(self._mesh, self._accumulation)

        def placed(rows):
            return jax.make_array_from_callback(
                (*positions.shape, *rows.shape[1:]), sharding,
                lambda part: np.asarray(rows[positions[part[:positions.ndim]]]))

        rows = placed(source.images), placed(source.labels)
        return rows if self._teacher_clean is None else (*rows, placed(self._teacher_clean))


def fits_on(device: jax.Device, source: Source) -> bool:
    """Returns whether a device is an accelerator of whose memory the source's images take a small part."""
    if device.platform == "cpu":
        return False  # its memory is the host's, where the images are already
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    return source.images.nbytes <= RESIDENT_SHARE * limit


class ResidentGather:
    """A copy of a source on every device, and the gathering of batches there."""

    def __init__(self, source: Source, mesh: jax.sharding.Mesh, accumulation: int = 1, further: tuple[np.ndarray, ...] = ()):
        everywhere, split = parallel.replicated(mesh), parallel.sharded(mesh, accumulation)
        whole = np.asarray(source.images)
        self._rows = tuple(
            jax.make_array_from_callback(rows.shape, everywhere, lambda part, rows=rows: rows[part])
            for rows in (whole, source.labels, *further))

        @jax.jit
        def gather(rows, positions):
            # Each device gathers what its own part of the positions names; they are all in range.
            return jax.tree.map(
                lambda array: jax.lax.with_sharding_constraint(
                    array.at[positions].get(mode="promise_in_bounds"), split), rows)

        self._gather = gather

    def __call__(self, positions: Array) -> tuple[Array, ...]:
        """Returns images, labels and rows of what else there is at `positions` int32, [batch] or cut into micro-batches, split
        over "data".
        """
        return self._gather(self._rows, positions)

    def lowered(self, positions: Array) -> jax.stages.Lowered:
        """Returns the program that gathers such a batch, for a look inside."""
        return self._gather.lower(self._rows, positions)
