"""Images picked from one or several arrays without copying them: a training part of a data set, or two data sets as one."""

from collections.abc import Sequence

import numpy as np


class Selection:
    """Rows of several arrays laid end to end, gathered when they are asked for.

    Like an array: it has shape, dtype and length, indexing it by an integer, a slice or an array gives an array, and
    `np.asarray` gathers it whole. Nothing else is copied, so memory maps stay on disk and processes share them.
    """

    def __init__(self, arrays: Sequence, positions: np.ndarray | None = None):
        """Selects rows.

        Args:
          arrays: at least one, of the same dtype and shape but for the first axis; selections among them.
          positions: [n] int, of rows in the arrays laid end to end; None for all of them.
        """
        self._arrays = list(arrays)
        self._starts = np.cumsum([0, *map(len, self._arrays)])
        self._positions = positions
        self.dtype = self._arrays[0].dtype
        self.shape = (int(self._starts[-1]) if positions is None else len(positions), *self._arrays[0].shape[1:])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of what is selected."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key) -> np.ndarray:
        if isinstance(key, tuple) or key is Ellipsis or key is None:  # of more than rows: NumPy's affair
            rows, *rest = key if isinstance(key, tuple) and key else (slice(None),)
            return self[rows][(slice(None), *rest)] if rest and isinstance(rows, slice) else self[:][key]
        positions = _places(key, len(self)) if self._positions is None else self._positions[key]
        if len(self._arrays) == 1:
            return np.asarray(self._arrays[0][positions])
        if np.ndim(positions) == 0:
            which = int(np.searchsorted(self._starts, positions, side="right")) - 1
            return np.asarray(self._arrays[which][positions - self._starts[which]])
        rows = np.empty((*np.shape(positions), *self.shape[1:]), self.dtype)
        for array, start, stop in zip(self._arrays, self._starts, self._starts[1:]):
            here = (start <= positions) & (positions < stop)
            rows[here] = array[positions[here] - start]
        return rows

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        rows = self[:]
        return rows if dtype is None else rows.astype(dtype, copy=False)


def _places(key, n: int) -> np.ndarray:
    """Returns the positions in [0, n) that an index means, as NumPy takes it."""
    if isinstance(key, slice):
        return np.arange(*key.indices(n))
    places = np.asarray(key)
    if places.dtype == bool:
        if places.shape != (n,):
            raise IndexError(f"a mask of shape {places.shape} does not select among {n} rows")
        (places,) = np.nonzero(places)
    if np.any(places < -n) or np.any(places >= n):
        raise IndexError(f"an index of {key} is out of range for {n} rows")
    return np.where(places < 0, places + n, places)
