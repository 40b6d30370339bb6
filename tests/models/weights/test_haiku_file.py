"""Pairs of Haiku's dictionaries are read from .npy files as NumPy would read them, and nothing of them is executed."""

import os
import pickle
import struct
import sys
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxrd.errors import InputError
from jaxrd.models.weights import haiku_file
from tests.support import assert_input_error, changed_copies

PROTOCOLS = range(6)


def trees(array=np.asarray):
    """(params, state) named, shaped and typed as DeepMind's wide residual networks are."""
    generator = np.random.default_rng(0)
    block = "wide_res_net/~/resnet_lay_0_block_0/~/"
    params = {
        "wide_res_net/~/init_conv": {"w": array(generator.random((3, 3, 3, 4), np.float32))},
        block + "batchnorm_0": {
            "scale": array(np.ones((1, 1, 1, 4), np.float32)), "offset": array(np.zeros((1, 1, 1, 4), np.float32))},
        "wide_res_net/~/logits": {"w": array(generator.random((4, 10), np.float32)), "b": array(np.zeros(10, np.float32))},
    }
    state = {block + "batchnorm_0/~/mean_ema": {
        "counter": array(np.int32(7)), "hidden": array(generator.random((1, 1, 1, 4), np.float32)),
        "average": array(generator.random((1, 1, 1, 4)).astype(ml_dtypes.bfloat16))}}
    return params, state


def assert_trees(read, expected):
    assert type(read) is tuple and len(read) == 2
    for one, other in zip(read, expected, strict=True):
        assert jax.tree.structure(one) == jax.tree.structure(other)
        for found, wanted in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            assert type(found) is np.ndarray and found.dtype == wanted.dtype and found.shape == wanted.shape
            assert found.tobytes() == np.asarray(wanted).tobytes()


def npy(path, value, protocol=4, shape=(2,)):
    """As np.save writes an array of objects, of any protocol."""
    return pickled(path, pickle.dumps(value, protocol), shape)


def pickled(path, content, shape=(2,)):
    """An .npy file around a pickle."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": shape})
        file.write(content)
    return path


def objects(*values):
    array = np.empty(len(values), object)
    array[:] = values
    return array


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_what_numpy_saves_is_read_bit_for_bit(tmp_path, array):
    expected = trees(array)
    with open(tmp_path / "weights", "wb") as file:
        np.save(file, expected)
    assert_trees(haiku_file.read(tmp_path / "weights"), expected)
    by_numpy = np.load(tmp_path / "weights", allow_pickle=True)
    assert_trees(jax.tree.map(np.asarray, tuple(by_numpy)), expected)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_every_protocol_is_read(tmp_path, array, protocol):
    expected = trees(array)
    assert_trees(haiku_file.read(npy(tmp_path / "pair", objects(*expected), protocol)), expected)
    tuple_of_it = np.empty((), object)
    tuple_of_it[()] = expected
    assert_trees(haiku_file.read(npy(tmp_path / "tuple", tuple_of_it, protocol, shape=())), expected)
    assert_trees(haiku_file.read(npy(tmp_path / "bare", expected, protocol)), expected)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_files_of_older_numpy_and_jax_are_read(tmp_path, monkeypatch, protocol):
    expected = trees()

    class OldArray:
        """Pickles itself as JAX's device arrays did."""

        def __init__(self, value):
            self.value = value

        def __reduce__(self):
            function, arguments, state = self.value.__reduce__()
            return reconstruct, (function, arguments, state, {"weak_type": False, "named_shape": {}})

    def reconstruct():
        raise AssertionError

    for module in ("jax._src.device_array", "jax.interpreters.xla"):
        reconstruct.__module__, reconstruct.__qualname__ = module, "reconstruct_device_array"
        stand_in = types.ModuleType(module)
        stand_in.reconstruct_device_array = reconstruct
        monkeypatch.setitem(sys.modules, module, stand_in)
        content = pickle.dumps(jax.tree.map(OldArray, expected), protocol)
        if protocol < 4:  # names end with the line there, and may have another length
            content = content.replace(b"numpy._core", b"numpy.core")
        assert_trees(haiku_file.read(pickled(tmp_path / "old", content)), expected)


@pytest.mark.parametrize("name", ["FlatMapping", "FlatMap", "frozendict"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_haikus_own_mappings_are_read_as_dictionaries(tmp_path, monkeypatch, name, protocol):
    class Mapping:
        """Pickles itself as Haiku's mappings do."""

        def __init__(self, items):
            self.items = items

        def __reduce__(self):
            return Mapping, (self.items,)

    Mapping.__module__, Mapping.__qualname__ = "haiku._src.data_structures", name
    stand_in = types.ModuleType("haiku._src.data_structures")
    setattr(stand_in, name, Mapping)
    for module in ("haiku", "haiku._src", "haiku._src.data_structures"):
        monkeypatch.setitem(sys.modules, module, stand_in)
    expected = trees()
    flat = [Mapping({module: Mapping(leaves) for module, leaves in tree.items()}) for tree in expected]
    assert_trees(haiku_file.read(npy(tmp_path / "a", objects(*flat), protocol)), expected)


def test_python_numbers_are_arrays_and_a_model_may_have_no_state(tmp_path):
    params, state = haiku_file.read(npy(tmp_path / "a", objects({"a": {"scale": 2.5, "count": np.int64(3)}}, {})))
    assert state == {} and params["a"]["scale"].shape == () and params["a"]["scale"] == 2.5 and params["a"]["count"] == 3


class Executed:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("function, name", [(os.system, "posix.system"), (pickle.loads, "loads")])
def test_nothing_is_executed(tmp_path, protocol, function, name):
    marker = tmp_path / "executed"
    argument = f"touch {marker}"
    evil = Executed(function, argument if function is os.system else pickle.dumps(Executed(os.system, argument)))
    params, state = trees()
    path = npy(tmp_path / "a", objects({**params, "hook": {"w": evil}}, state), protocol)
    np.load(path, allow_pickle=True)
    assert marker.exists(), "this file would prove nothing"
    marker.unlink()
    assert_input_error(
        lambda: haiku_file.read(path), f"{path}: its pickle asks for ", name, "nothing of it was executed",
        "save the tuple (params, state) as dictionaries of NumPy arrays with np.save")
    assert not marker.exists()


def test_a_jax_array_is_made_of_a_numpy_array_and_of_nothing_else(tmp_path):
    for function, mention in (
            (b"c_codecs\nencode\n", "not made of a NumPy array"), (b"cnumpy\ndtype\n", "not made of a NumPy array"),
            (b"cnumpy\nndarray\n", "not made of a NumPy array"), (b"N", "not made of a NumPy array"),
            (b"cposix\nsystem\n", "asks for posix.system")):
        pickled(tmp_path / "a", b"\x80\x02cjax._src.array\n_reconstruct_array\n(" + function + b")N}tR.")
        assert_input_error(lambda: haiku_file.read(tmp_path / "a"), mention)


@pytest.mark.parametrize("value, mention", [
    (objects({}, {}, {}), "holds a list of 3, not a pair of dictionaries"), (objects(1, {}), "holds a list of 2, not a pair"),
    (objects({}), "holds a dictionary, not a pair"), (np.zeros(3), "holds a single array, not a pair"),
    (objects({"a": {"w": None}}, {}), "a w is a NoneType rather than an array"),
    (objects({"a": {"w": "text"}}, {}), "a w is a str rather than an array"),
    (objects({"a": {"w": [1, 2]}}, {}), "a w is a list rather than an array"),
    (objects({"a": {3: np.zeros(2)}}, {}), "a has keys that are no strings"),
    (objects({3: np.zeros(2)}, {}), "its outermost dictionary has keys that are no strings"),
    (objects({"a": {"w": np.array(["text"])}}, {}), "array of NumPy's type U4, and only numbers are read"),
    (objects({"a": {"w": objects(np.zeros(2))}}, {}), "a w is a list rather than an array"),
    (objects({"a": {"w": np.zeros(2, "f4,f4")}}, {}), "only numbers are read"),
])
def test_what_is_no_pair_of_arrays_by_name_is_refused(tmp_path, value, mention):
    path = npy(tmp_path / "a", value)
    assert_input_error(lambda: haiku_file.read(path), f"{path}: ", mention)


def test_other_files_are_refused(tmp_path):
    np.save(tmp_path / "plain.npy", np.zeros(3))
    assert_input_error(lambda: haiku_file.read(tmp_path / "plain.npy"), "it holds a plain array, not the parameters")
    assert_input_error(lambda: haiku_file.read(tmp_path / "nowhere"), "nowhere: cannot be read: No such file")
    assert_input_error(lambda: haiku_file.read(tmp_path), "cannot be read: Is a directory")
    (tmp_path / "empty").touch()
    assert_input_error(lambda: haiku_file.read(tmp_path / "empty"), "it is empty")


def small_pair():
    return {"a": {"w": np.arange(4, dtype=np.float32)}}, {"b": {"c": np.int32(3)}}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_truncation_is_refused(tmp_path, protocol):
    content = npy(tmp_path / "a", objects(*small_pair()), protocol).read_bytes()
    for length in range(len(content)):
        cut = tmp_path / f"cut{length % 2}"
        cut.unlink(missing_ok=True)
        cut.write_bytes(content[:length])
        assert_input_error(lambda: haiku_file.read(cut), f"{cut}: ")  # noqa: B023


@pytest.mark.filterwarnings("ignore")  # NumPy's, about headers that Python 2 might have written
@pytest.mark.parametrize("protocol", [2, 4])
def test_changed_bytes_give_arrays_or_one_line(tmp_path, protocol):
    content = npy(tmp_path / "a", objects(*small_pair()), protocol).read_bytes()
    refused = 0
    for other in changed_copies(tmp_path, content):
        try:
            found = haiku_file.read(other)
        except InputError as error:
            assert str(error).startswith(f"{other}: ") and "\n" not in str(error)
            refused += 1
        else:
            assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))
    assert refused > 500


def test_a_length_that_the_file_does_not_have_is_not_allocated(tmp_path):
    pickled(tmp_path / "a", b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"abc.")
    assert_input_error(lambda: haiku_file.read(tmp_path / "a"), "damaged")
