"""Selections: what NumPy gives for the same rows of the same arrays laid end to end, without their copies."""

import numpy as np
import pytest

from jaxrd.data.selection import Selection

GENERATOR = np.random.default_rng(0)
PARTS = [GENERATOR.integers(0, 256, (n, 3, 2, 1), dtype=np.uint8) for n in (5, 1, 7)]
WHOLE = np.concatenate(PARTS)
POSITIONS = np.array([12, 0, 5, 5, 7, 3, 11])
KEYS = [
    slice(None), slice(2, 5), slice(None, None, -2), slice(5, 2), 0, -1, np.int64(3), np.array([4, 0, 4]), np.array([-1, -7]),
    [1, 2], np.array([[0, 1], [2, 3]]), np.arange(0), np.array([True, False, True, True, False, False, True])]


@pytest.mark.parametrize("key", KEYS, ids=str)
@pytest.mark.parametrize("parts", [PARTS, [WHOLE]], ids=["three arrays", "one array"])
def test_indexing_is_numpys(parts, key):
    selection, expected = Selection(parts, POSITIONS), WHOLE[POSITIONS]
    assert selection.shape == expected.shape and selection.dtype == expected.dtype and selection.ndim == 4
    assert len(selection) == 7 and selection.nbytes == expected.nbytes
    found = selection[key]
    assert type(found) is np.ndarray and found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected[key])


@pytest.mark.parametrize(
    "key", [slice(None), slice(3, None, 2), 0, -1, -13, np.array([[6, -1], [5, 0]]), WHOLE[:, 0, 0, 0] > 99], ids=str)
@pytest.mark.parametrize("parts", [PARTS, [WHOLE]], ids=["three arrays", "one array"])
def test_without_positions_it_is_all_of_the_arrays(parts, key):
    np.testing.assert_array_equal(Selection(parts)[key], WHOLE[key])
    np.testing.assert_array_equal(np.asarray(Selection(parts)), WHOLE)
    assert np.asarray(Selection(parts), dtype=np.float32).dtype == np.float32


@pytest.mark.parametrize(
    "key", [..., (..., 0), (slice(None), 0), (slice(1, 4), 0, slice(None)), (2, 1), (None,), None, (), (np.array([0, 2]), 1)], 
    ids=str)
@pytest.mark.parametrize("positions", [POSITIONS, None], ids=["positions", "all"])
@pytest.mark.parametrize("parts", [PARTS, [WHOLE]], ids=["three arrays", "one array"])
def test_indices_of_more_than_rows_are_numpys_too(parts, positions, key):
    expected = WHOLE if positions is None else WHOLE[positions]
    np.testing.assert_array_equal(Selection(parts, positions)[key], expected[key])


@pytest.mark.parametrize("key", [13, -14, np.array([0, 13]), np.ones(12, bool)])
def test_rows_that_are_not_there_are_refused(key):
    with pytest.raises(IndexError):
        Selection(PARTS)[key]
    with pytest.raises(IndexError):
        Selection([WHOLE], POSITIONS)[key]


def test_selections_of_selections():
    inner = Selection(PARTS, POSITIONS)
    outer = Selection([inner, PARTS[1]], np.array([7, 2, 0]))
    np.testing.assert_array_equal(outer[:], np.concatenate([WHOLE[POSITIONS], PARTS[1]])[[7, 2, 0]])


def test_a_memory_map_stays_on_disk(tmp_path):
    np.save(tmp_path / "images.npy", WHOLE)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    selection = Selection([mapped], POSITIONS)
    assert selection._arrays[0] is mapped
    found = selection[:2]
    found[:] = 0  # one's own copy
    np.testing.assert_array_equal(np.load(tmp_path / "images.npy"), WHOLE)
