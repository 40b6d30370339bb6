"""Class by class: what counting by hand gives."""

import numpy as np

from jaxrd.evaluation import alignment
from tests.support import assert_input_error

LABELS = np.array([0, 2, 2, 0, 2])


def test_means_per_class():
    got = alignment.per_class(np.array([True, False, True, True, True]), LABELS, 4)
    np.testing.assert_allclose(got, [1, np.nan, 2 / 3, np.nan])
    np.testing.assert_allclose(alignment.per_class([1.0, 2, 3, 5, 4], LABELS, 3), [3, np.nan, 3])
    assert np.isnan(alignment.per_class([], np.zeros(0, int), 2)).all()


def test_means_do_not_lose_small_numbers_among_many():
    values = np.full(3_000_000, 0.1, np.float32)  # whose running sum in float32 is off by a tenth of a percent and more
    np.testing.assert_allclose(alignment.per_class(values, np.zeros(len(values), int), 1), np.float32(0.1), rtol=1e-12)


def test_confusion_counts_pairs():
    predicted = np.array([0, 1, 1, 2, 2])
    got = alignment.confusion(LABELS, predicted, 3)
    np.testing.assert_array_equal(got, [[1, 0, 1], [0, 0, 0], [0, 2, 1]])
    np.testing.assert_array_equal(alignment.confusion(predicted, LABELS, 3), got.T)
    np.testing.assert_array_equal(got.sum(axis=1), np.bincount(LABELS, minlength=3))
    assert np.trace(got) == np.sum(predicted == LABELS)
    many = alignment.confusion(np.full(9, 255, np.uint8), np.full(9, 3, np.uint8), 256)  # a pair's number is beyond 8 bits
    assert many[255, 3] == 9 and many.sum() == 9


def test_bad_labels_are_one_line():
    assert_input_error(lambda: alignment.per_class([1, 2], LABELS, 3), "values", "[2]", "[5]")
    assert_input_error(lambda: alignment.confusion(LABELS, LABELS, 2), "rows", "2", "from 0 to 1")
    assert_input_error(lambda: alignment.confusion(LABELS, LABELS.astype(float), 3), "columns", "float64", "int [n]")
    assert_input_error(lambda: alignment.confusion(LABELS, LABELS[:2], 3), "[5]", "[2]", "pair")
