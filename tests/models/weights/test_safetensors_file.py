"""Safetensors files are those of the public library, in both directions, and damaged ones are refused."""

import json
import mmap
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxrd.errors import InputError
from jaxrd.models.weights import safetensors_file
from tests.support import assert_input_error, changed_copies

ENTRIES = {
    "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2), "double": np.arange(3.0),
    "half": np.arange(3, dtype=np.float16),
    "batches": np.asarray(7, np.int64), "empty": np.zeros((0, 3), np.float32), "int": np.arange(3, dtype=np.int32),
    "short": np.arange(3, dtype=np.int16), "char": np.arange(3, dtype=np.int8), "byte": np.arange(3, dtype=np.uint8),
    "ushort": np.arange(3, dtype=np.uint16), "uint": np.arange(3, dtype=np.uint32), "ulong": np.arange(3, dtype=np.uint64),
    "bool": np.array([True, False]), "complex": np.array([1j, 2], np.complex64), "schlüssel ☃": np.float32([1])}
EXTRA = {
    "brain": np.arange(5).astype(ml_dtypes.bfloat16), "brain scalar": np.asarray(2.5).astype(ml_dtypes.bfloat16),
    "eight": np.arange(5).astype(ml_dtypes.float8_e4m3fn), "eight bits": np.arange(5).astype(ml_dtypes.float8_e5m2)}
METADATA = {"format": "pt", "architecture": "wrn28_10 ☃"}


def assert_same(read, expected):
    assert sorted(read) == sorted(expected)
    for name, array in read.items():
        assert type(array) is np.ndarray and array.dtype == expected[name].dtype and array.shape == expected[name].shape
        assert array.tobytes() == expected[name].tobytes() and not array.flags.writeable


def test_what_the_library_writes_is_read_bit_for_bit(tmp_path):
    safetensors.numpy.save_file(ENTRIES, tmp_path / "a", METADATA)
    read, metadata = safetensors_file.read(tmp_path / "a")
    assert_same(read, ENTRIES)
    assert metadata == METADATA
    safetensors.numpy.save_file(ENTRIES, tmp_path / "b")
    assert safetensors_file.read(str(tmp_path / "b"))[1] == {}


def test_the_library_reads_what_is_written(tmp_path):
    safetensors_file.write(tmp_path / "a", ENTRIES, METADATA)
    found = safetensors.numpy.load_file(tmp_path / "a")
    assert sorted(found) == sorted(ENTRIES)
    for name, array in found.items():
        np.testing.assert_array_equal(array, ENTRIES[name], strict=True)
    with safetensors.safe_open(tmp_path / "a", framework="numpy") as file:
        assert file.metadata() == METADATA


def test_bfloat16_and_float8_survive(tmp_path):
    safetensors_file.write(tmp_path / "a", {**EXTRA, **ENTRIES}, {})
    read, metadata = safetensors_file.read(tmp_path / "a")
    assert_same(read, {**EXTRA, **ENTRIES})
    assert metadata == {}


def hand_made(path, header, data, length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def test_a_file_put_together_by_hand_is_read(tmp_path):
    header = {
        "__metadata__": {"a": "b"}, "second": {"dtype": "BF16", "shape": [2], "data_offsets": [12, 16]},
        "first": {"dtype": "F32", "shape": [3, 1], "data_offsets": [0, 12]}}
    first, second = np.float32([[1], [2], [3]]), np.asarray([1.5, -2]).astype(ml_dtypes.bfloat16)
    read, metadata = safetensors_file.read(hand_made(tmp_path / "a", header, first.tobytes() + second.tobytes()))
    assert_same(read, {"first": first, "second": second})
    assert metadata == {"a": "b"}


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


@pytest.mark.parametrize("header, length", [
    (entry(shape=[3]), None), (entry(offsets=[0, 9]), None), (entry(offsets=[4, 12]), None), (entry(offsets=[8, 0]), None),
    (entry(shape=[-2]), None), (entry(shape=[2**40, 2**40]), None), (entry(dtype="F31"), None), (entry(dtype="F64"), None),
    ({"a": 3}, None), ([], None), (b"{", None), (b"{}", 2**62), (b"{}", 2**64 - 1), (b"", 0), (entry(), 5),
    ({**entry(), "b": entry()["a"]}, None), ({"__metadata__": {"a": 1}, **entry()}, None),
])
def test_headers_that_do_not_describe_the_data_are_refused(tmp_path, header, length):
    path = hand_made(tmp_path / "a", header, bytes(8), length)
    assert_input_error(lambda: safetensors_file.read(path), f"{path}: damaged")
    assert list(safetensors_file.read(hand_made(path, entry(), bytes(8)))[0]) == ["a"]


def test_a_type_that_numpy_does_not_have_is_refused_by_name(tmp_path):
    path = hand_made(tmp_path / "a", entry("F4", [16], [0, 8]), bytes(8))
    assert_input_error(lambda: safetensors_file.read(path), f"{path}: its entry a is of type F4, which is not read", "F32")


def test_other_files_are_refused(tmp_path):
    assert_input_error(lambda: safetensors_file.read(tmp_path / "nowhere"), "nowhere: cannot be read: No such file")
    assert_input_error(lambda: safetensors_file.read(tmp_path), f"{tmp_path}: cannot be read: Is a directory")
    (tmp_path / "empty").touch()
    assert_input_error(lambda: safetensors_file.read(tmp_path / "empty"), "it is empty")
    (tmp_path / "text").write_text("some text that is longer than a header")
    assert_input_error(lambda: safetensors_file.read(tmp_path / "text"), "text: damaged (SafetensorError")


@pytest.mark.parametrize("entries, metadata, mention", [
    ({"a": np.zeros(2, object)}, {}, "its entry a is object"), ({"a": np.array(["text"])}, {}, "its entry a is <U4"),
    ({3: np.zeros(2)}, {}, "its entry 3 is named by a int"), ({"a": np.zeros(2)}, {"epoch": 3}, "its metadata"),
    ({"a": np.zeros(2, np.complex128)}, {}, "its entry a is complex128"),
])
def test_what_cannot_be_written_is_refused_before_the_file_is_touched(tmp_path, entries, metadata, mention):
    path = tmp_path / "a"
    assert_input_error(lambda: safetensors_file.write(path, entries, metadata), f"{path}: ", mention)
    assert not path.exists()


def test_views_and_foreign_byte_orders_are_written_by_value(tmp_path):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    entries = {"transposed": base.T, "steps": base[::2, 1::2], "swapped": np.arange(3, dtype=">f4"), "scalar": np.float32(3)}
    safetensors_file.write(tmp_path / "a", entries, {})
    for read in (safetensors_file.read(tmp_path / "a")[0], safetensors.numpy.load_file(tmp_path / "a")):
        for name, array in entries.items():
            assert read[name].dtype == np.float32 and read[name].shape == np.shape(array)
            np.testing.assert_array_equal(read[name], array)


def test_every_truncation_is_refused(tmp_path):
    safetensors_file.write(tmp_path / "a", {"a": np.arange(4.0), "b": EXTRA["brain"]}, METADATA)
    content = (tmp_path / "a").read_bytes()
    for length in range(len(content)):
        cut = tmp_path / f"cut{length % 2}"
        cut.unlink(missing_ok=True)
        cut.write_bytes(content[:length])
        assert_input_error(lambda: safetensors_file.read(cut), f"{cut}: ")  # noqa: B023


def test_changed_bytes_give_arrays_or_one_line(tmp_path):
    safetensors_file.write(tmp_path / "a", {"a": np.arange(4.0), "b": EXTRA["brain"]}, METADATA)
    content = (tmp_path / "a").read_bytes()
    refused = 0
    for other in changed_copies(tmp_path, content):
        try:
            found, _ = safetensors_file.read(other)
        except InputError as error:
            assert str(error).startswith(f"{other}: ") and "\n" not in str(error)
            refused += 1
        else:
            assert all(isinstance(array, np.ndarray) for array in found.values())
    assert refused > 300


def test_arrays_are_views_of_one_memory_map(tmp_path):
    safetensors_file.write(tmp_path / "a", {"large": np.zeros(1_000_000, np.float32), "b": np.ones(2, np.float32)}, {})
    read, _ = safetensors_file.read(tmp_path / "a")
    maps = []
    for array in read.values():
        while isinstance(array, np.ndarray):
            array = array.base
        maps.append(array.obj if isinstance(array, memoryview) else array)
    assert maps[0] is maps[1] and isinstance(maps[0], mmap.mmap)
