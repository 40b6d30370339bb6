"""What numbers per example come to class by class: on the host, in float64 and whole numbers, whatever their count."""

import numpy as np

from jaxrd.errors import InputError


def per_class(values: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Returns the mean of the values in each class, [classes] float64; NaN for a class without examples.

    Accuracy per class of bools "classified correctly", clean or under attack; gradient cosine per class of cosines.

    Args:
      values: [n], numbers or bools.
      labels: [n] int, in [0, classes).
      classes: their number.

    Raises:
      InputError: values and labels of different lengths; labels out of range.
    """
    values, labels = np.asarray(values, np.float64), _checked("labels", labels, classes)
    if values.shape != labels.shape:
        raise InputError(f"values have shape {list(values.shape)}, labels {list(labels.shape)}; give one value for each label")
    counts = np.bincount(labels, minlength=classes)
    sums = np.bincount(labels, weights=values, minlength=classes)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def confusion(rows: np.ndarray, columns: np.ndarray, classes: int) -> np.ndarray:
    """Returns how many examples are of each pair of classes, [classes, classes] int64: [i, j] counts those of row i, column j.

    With the true classes and the predictions under attack, what each class is mistaken for; with the clean predictions and
    those under attack, where the attack moves them: its diagonal are the predictions that it leaves alone.

    Args:
      rows, columns: [n] int each, in [0, classes).
      classes: their number.

    Raises:
      InputError: different lengths; classes out of range.
    """
    rows, columns = _checked("rows", rows, classes), _checked("columns", columns, classes)
    if rows.shape != columns.shape:
        raise InputError(f"rows have shape {list(rows.shape)}, columns {list(columns.shape)}; give a pair for each example")
    return np.bincount(rows.astype(np.int64) * classes + columns, minlength=classes**2).reshape(classes, classes)


def _checked(field, labels, classes):
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"{field} are {labels.dtype}{list(labels.shape)}; give int [n], in [0, {classes})")
    if labels.size and not 0 <= labels.min() <= labels.max() < classes:
        raise InputError(f"{field} reach from {labels.min()} to {labels.max()}; give classes from 0 to {classes - 1}")
    return labels
