"""The unpickler builds what Python's own would build of plain objects, and executes nothing of anything else."""

import io
import os
import pickle
import subprocess

from hypothesis import given, settings
from hypothesis import strategies as st
import ml_dtypes
import numpy as np
import pytest

from jaxrd.errors import InputError
from jaxrd.models.weights import pickle_machine, unpickling
from jaxrd.models.weights.unpickling import CONTAINERS, NUMPY, Tensor
from tests.support import assert_input_error

PROTOCOLS = range(6)


def read(content, persistent_load=None):
    with unpickling.reading("a.file"):
        return unpickling.load(io.BytesIO(content), "a.file", {**CONTAINERS, **NUMPY}, "save it otherwise", persistent_load)


def assert_equal(read, expected):
    """Compares nested containers, whose Tensors must be the expected arrays bit for bit."""
    if isinstance(read, Tensor):
        array = read.array()
        assert array.dtype == expected.dtype == read.dtype and array.shape == expected.shape == read.shape
        assert array.tobytes() == expected.tobytes() and not array.flags.writeable
    elif isinstance(read, dict):
        assert list(read) == list(expected)
        for key in read:
            assert_equal(read[key], expected[key])
    elif isinstance(read, (list, tuple)):
        assert type(read) is type(expected) and len(read) == len(expected)
        for one, other in zip(read, expected, strict=True):
            assert_equal(one, other)
    else:
        assert type(read) is type(expected) and read == expected


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=30)


@settings(max_examples=150, deadline=None)
@given(value=PLAIN, protocol=st.sampled_from(PROTOCOLS), old_names=st.booleans())
def test_plain_objects_are_what_python_makes_of_them(value, protocol, old_names):
    assert_equal(read(pickle.dumps(value, protocol, fix_imports=old_names)), value)


@pytest.mark.parametrize("content, expected", [
    (b"K\x01K\x020.", 1), (b"K\x01(K\x02K\x031.", 1), (b"K\x01(0.", 1), (b"K\x012\x86.", (1, 1)),
    (b"(K\x01K\x02lp5\n0g5\n.", [1, 2]),
    (b"(X\x01\x00\x00\x00aK\x01d.", {"a": 1}), (b"\x80\x04\x8f(K\x01K\x02\x90.", [1, 2]), (b"(K\x01\x91.", [1]),
    (b"U\x03abc.", "abc"), (b"T\x03\x00\x00\x00abc.", "abc"), (b"S'abc'\n.", "abc"),
])
def test_opcodes_that_python_seldom_writes_mean_what_they_mean_to_python(content, expected):
    found = pickle.loads(content)
    assert (sorted(found) if isinstance(found, (set, frozenset)) else found) == expected
    assert_equal(read(content), expected)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_objects_that_occur_twice_and_long_strings_are_read(protocol):
    shared = ["x" * 300, b"y" * 70_000, 2**70, -2**31, {}, [], ()]
    value = {"first": shared, "second": shared, ("key", 1): 3.5, None: True}
    assert_equal(read(pickle.dumps(value, protocol)), value)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ordered_dictionaries_and_counters_and_sets_become_plain(protocol):
    import collections

    ordered = collections.OrderedDict(b=1, a=2)
    ordered._metadata = {"": {"version": 2}}
    value = {"ordered": ordered, "counter": collections.Counter([5, 5, 7]), "set": {9}}
    found = read(pickle.dumps(value, protocol))
    assert found == {"ordered": {"b": 1, "a": 2}, "counter": {5: 2, 7: 1}, "set": [9]}
    assert list(found["ordered"]) == ["b", "a"] and type(found["ordered"]) is dict


ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3), np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.arange(24).reshape(2, 3, 4).transpose(1, 2, 0), np.arange(24).reshape(4, 6)[::2, 1::2], np.zeros((0, 3)),
    np.asarray(2.5, np.float16), np.array([True, False]), np.arange(3, dtype=np.complex64),
    np.arange(5).astype(ml_dtypes.bfloat16), np.asarray(3.0).astype(ml_dtypes.float8_e4m3fn), np.arange(300, dtype=np.uint8),
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numpy_arrays_are_read_bit_for_bit(protocol):
    assert_equal(read(pickle.dumps(ARRAYS, protocol)), ARRAYS)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_in_the_other_byte_order_come_in_the_machines(protocol):
    swapped = np.arange(5, dtype=">f4")
    assert_equal(read(pickle.dumps([swapped], protocol)), [swapped.astype(np.float32)])


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numpy_scalars_are_python_numbers(protocol, old):
    values = [np.float64(0.1), np.float32(0.5), np.int64(-3), np.bool_(True), np.uint8(200), np.complex128(1j), np.float16(2)]
    content = pickle.dumps([*values, ml_dtypes.bfloat16(1.5)], protocol)
    if old and protocol < 4:  # the module's name until NumPy 2; lengths do not matter where names end with the line
        content = content.replace(b"numpy._core", b"numpy.core")
    assert_equal(read(content), [0.1, 0.5, -3, True, 200, 1j, 2.0, 1.5])


class Executed:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def dangerous(marker):
    """Objects whose pickles make a file when Python's unpickler reads them, by part of a name that they ask for."""
    system = Executed(os.system, f"touch {marker}")
    code = f"open({str(marker)!r}, 'w').close()"
    return {
        "posix.system": system, "builtins.eval": Executed(eval, code), "builtins.exec": Executed(exec, code),
        "subprocess.call": Executed(subprocess.call, ["touch", str(marker)]),
        "io.open": Executed(open, str(marker), "w"), "builtins.getattr": Executed(getattr, system, "real"),
        "pathlib": Executed(type(marker).touch, marker), "pickle.loads": Executed(pickle.loads, pickle.dumps(system)),
        "builtins.map": Executed(list, Executed(map, os.system, [f"touch {marker}"])),
    }


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", [
    "posix.system", "builtins.eval", "builtins.exec", "subprocess.call", "io.open", "builtins.getattr", "pathlib",
    "pickle.loads", "builtins.map"])
@pytest.mark.filterwarnings("ignore:unclosed file")
def test_nothing_is_executed(tmp_path, name, protocol):
    marker = tmp_path / "executed"
    value = {"state_dict": {"weight": 1.0}, "hook": dangerous(marker)[name]}
    content = pickle.dumps(value, protocol, fix_imports=False)
    pickle.loads(content)
    assert marker.exists(), "this pickle would prove nothing"
    marker.unlink()
    with pytest.raises(InputError) as refused:
        read(content)
    message = str(refused.value)
    assert message.startswith("a.file: its pickle asks for ") and "\n" not in message
    assert name in message and "nothing of it was executed; save it otherwise" in message
    assert not marker.exists()


SYSTEM = b"cposix\nsystem\n"


@pytest.mark.parametrize("form", ["instance", "object", "new object", "new object with keywords", "stack", "build", "append"])
def test_no_opcode_executes_anything(tmp_path, form):
    marker = tmp_path / "executed"
    command = f"touch {marker}".encode()
    text = b"X" + len(command).to_bytes(4, "little") + command
    content = {
        "instance": b"(" + text + b"iposix\nsystem\n.",
        "object": b"(" + SYSTEM + text + b"o.",
        "new object": b"\x80\x02" + SYSTEM + text + b"\x85\x81.",
        "new object with keywords": b"\x80\x04" + SYSTEM + text + b"\x85}\x92.",
        "stack": b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + text + b"\x85R.",
        "build": b"\x80\x02" + SYSTEM + b")R}X\x0c\x00\x00\x00__setstate__" + SYSTEM + b"sb" + text + b"b.",
        "append": b"\x80\x02" + SYSTEM + b")R" + text + b"a.",
    }[form]
    assert_input_error(lambda: read(content), "a.file: its pickle asks for posix.system")
    assert not marker.exists()


def test_a_scalar_of_objects_does_not_unpickle_what_is_inside_it(tmp_path):
    marker = tmp_path / "executed"
    inner = pickle.dumps(Executed(os.system, f"touch {marker}"), 2)
    data_type = b"cnumpy\ndtype\nX\x02\x00\x00\x00O8\x89\x88\x87R(K\x03X\x01\x00\x00\x00|NNNK\x08K\x08K?tb"
    for module in (b"numpy.core", b"numpy._core"):
        content = (
            b"\x80\x03c" + module + b".multiarray\nscalar\n" + data_type
            + b"B" + len(inner).to_bytes(4, "little") + inner + b"\x86R.")
        assert_input_error(lambda: read(content), "a.file: damaged")  # noqa: B023
        with_a_list = b"\x80\x03c" + module + b".multiarray\nscalar\n" + data_type + b"]K\x01a\x86R."
        assert_input_error(lambda: read(with_a_list), "a NumPy scalar that is no number")  # noqa: B023
        assert not marker.exists()


def test_a_stand_in_cannot_be_changed_by_a_file():
    harmless = pickle.dumps([np.arange(3)], 2)
    for name in (b"cnumpy\ndtype\n", b"ccollections\nOrderedDict\n", b"c_codecs\nencode\n"):
        changing = b"\x80\x02" + name + b"}X\x04\x00\x00\x00callX\x01\x00\x00\x00xsb."
        assert_input_error(lambda: read(changing), "a.file: damaged: its pickle changes what cannot be changed")  # noqa: B023
    assert_equal(read(harmless), [np.arange(3)])


def test_a_refusal_lists_several_names_on_one_line_and_counts_the_others():
    names = b"".join(b"cmodule\nclass%d\n" % number for number in range(7))
    assert_input_error(
        lambda: read(b"(" + names + b"t."), "module.class0, module.class1, module.class2, module.class3 and 3 more;")
    strange = b"\x80\x04\x8c\x05a\nb\x1b[\x8c\x01c\x93."
    assert_input_error(lambda: read(strange), r"asks for a\nb\x1b[.c;")


def module_pickle(name, state):
    return b"\x80\x02c" + name + b"\n)\x81" + state + b"."


def test_a_whole_model_is_called_one_and_its_outermost_class_named():
    inner = b"ctorch.nn.modules.conv\nConv2d\n)\x81}(X\x0b\x00\x00\x00_parameters}X\x08\x00\x00\x00_modules}ub"
    state = b"}(X\x0b\x00\x00\x00_parameters}X\x08\x00\x00\x00_modules}X\x05\x00\x00\x00conv1" + inner + b"sub"
    outer = module_pickle(b"robust.zoo\nStudent", state)
    assert_input_error(
        lambda: read(outer), "asks for robust.zoo.Student, torch.nn.modules.conv.Conv2d",
        "a whole pickled model of class robust.zoo.Student rather than its weights")
    # Without a state to know it by, its name has to do; and what is no model is not called one.
    assert_input_error(
        lambda: read(module_pickle(b"models.wide_resnet\nWideResNet", b"")), "model of class models.wide_resnet.WideResNet")
    with pytest.raises(InputError) as refused:
        read(module_pickle(b"logging\nFilter", b"}X\x05\x00\x00\x00depthK\x22sb"))
    assert "asks for logging.Filter;" in str(refused.value) and "model" not in str(refused.value)


@pytest.mark.parametrize("content, mention", [
    (b"", "damaged"), (b".", "damaged"), (b"\x80\x02", "damaged"), (b"(.", "damaged"),
    (b"K\x01K\x02R.", "calls what is no function"),
    (b"cnumpy\nndarray\n)R.", "calls what is no function"), (b"K\x01K\x02a.", "no list"), (b"NK\x01K\x02s.", "no dictionary"),
    (b"}(K\x01u.", "no dictionary"), (b"}]K\x01s.", "key of type list"), (b"}))\x86)\x86K\x01s.", "key of type tuple"),
    (b"h\x07.", "damaged"), (b"B\xff\xff\xff\x7fabc.", "damaged"), (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "damaged"),
    (b"\x8e\xff\xff\xff\xff\xff\xff\xff\xffabc.", "damaged"), (b"\x82\x01.", "damaged"), (b"\x97.", "damaged"),
    (b"K\x00Q.", "outside it"), (b"P1\n.", "damaged"), (b"K\x01\x93.", "damaged"), (b"K\x01K\x02\x93.", "no text"),
    (b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00utf16\x86R.", "unknown encoding"),
    (b"c_codecs\nencode\nC\x01aX\x06\x00\x00\x00latin1\x86R.", "unknown encoding"),
    (b"ccollections\nOrderedDict\nK\x05\x85R.", "damaged"), (b"\xff.", "damaged"), (b"I" + b"9" * 5000 + b"\n.", "damaged"),
])
def test_nonsense_is_damage(content, mention):
    assert_input_error(lambda: read(content), "a.file: damaged", mention)


def array_pickle(shape, code, data, order=b"\x89"):
    data_type = b"cnumpy\ndtype\nX" + len(code).to_bytes(4, "little") + code + b"\x89\x88\x87R"
    return (
        b"\x80\x03cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01" + shape + data_type + order
        + b"B" + len(data).to_bytes(4, "little") + data + b"tb.")


@pytest.mark.parametrize("shape, code, data, mention", [
    (b"K\x03\x85", b"f4", bytes(8), "too few or too many bytes"), (b"K\x02\x85", b"f4", bytes(12), "too few or too many bytes"),
    (b"J\xff\xff\xff\xff\x85", b"f4", b"", "whole numbers"), (b"\x88\x85", b"f4", bytes(4), "whole numbers"),
    (b"G" + bytes(8) + b"\x85", b"f4", b"", "whole numbers"), (b"K\x01", b"f4", bytes(4), "whole numbers"),
    (b"(" + b"K\x01" * 65 + b"t", b"f4", bytes(4), "65 dimensions"),
    (b"K\x00\x8a\x08" + b"\xff" * 7 + b"\x7fK\x09\x87", b"f4", b"", "more elements than can exist"),
    (b"K\x02\x85", b"O8", bytes(16), "objects"),
    (b"K\x02\x85", b"f3", b"", "damaged"),
])
def test_arrays_that_cannot_be_are_damage(shape, code, data, mention):
    assert_input_error(lambda: read(array_pickle(shape, code, data)), "a.file: damaged", mention)


@pytest.mark.parametrize("code", [b"S4", b"V4", b"f4,f4", b"M8"])
def test_arrays_of_something_else_than_numbers_are_not_called_damage(code):
    assert_input_error(lambda: read(array_pickle(b"K\x02\x85", code, bytes(16))), "a.file: its pickle has an array of NumPy's",
                       code.decode(), "the weights alone")


def test_the_array_pickle_of_these_tests_is_read_where_it_is_sound():
    assert_equal(read(array_pickle(b"K\x03\x85", b"f4", b"\x00\x00\x80?" * 3)), np.ones(3, np.float32))


def test_what_contains_itself_or_grows_without_bound_is_refused():
    cycle = []
    cycle.append(cycle)
    assert_input_error(lambda: read(pickle.dumps(cycle)), "nests deeper than 100")
    deep = ()
    for _ in range(200):
        deep = (deep,)
    assert_input_error(lambda: read(pickle.dumps(deep)), "nests deeper than 100")
    assert_input_error(lambda: read(b"]" + b"\x85" * 1_000_000 + b"."), "nests deeper than 100")


def test_a_few_bytes_do_not_make_an_exponential_number_of_objects(monkeypatch):
    monkeypatch.setattr(unpickling, "_MOST_OBJECTS", 10_000)
    doubled = []
    for _ in range(60):
        doubled = [doubled, doubled]
    assert_input_error(lambda: read(pickle.dumps(doubled)), "holds more than 10000 objects")


def test_a_huge_index_into_the_memo_costs_nothing():
    assert read(b"]r\xff\xff\xff\xff0j\xff\xff\xff\xff.") == []  # Python's own asks for 64 GB of memory here


def test_an_endless_pickle_is_refused(monkeypatch):
    monkeypatch.setattr(pickle_machine, "_MOST_OPCODES", 1000)
    assert read(b"N0" * 400 + b"N.") is None
    assert_input_error(lambda: read(b"N0" * 600 + b"N."), "more than 1000 instructions")


def test_an_exception_of_any_type_is_one_line():
    def fail(_):
        raise BufferError("two\nlines")

    assert_input_error(lambda: read(b"K\x00Q.", fail), r"a.file: damaged (BufferError: two\nlines)")


CHUNKS = [
    b"N", b"\x88", b"K\x02", b"J\xff\xff\xff\xff", b"X\x01\x00\x00\x00a", b"X\x02\x00\x00\x00f4", b"C\x04abcd", b"]", b"}",
    b")", b"(", b"t", b"l", b"d", b"a", b"e", b"s", b"u", b"0", b"1", b"2", b"\x85", b"\x86", b"\x87", b"R", b"b", b"\x81",
    b"o", b"Q", b"q\x00", b"q\x01", b"h\x00", b"h\x01", b"\x94", b"X\x06\x00\x00\x00latin1", b"ccollections\nOrderedDict\n",
    b"cnumpy\ndtype\n", b"cnumpy\nndarray\n", b"c_codecs\nencode\n", b"cnumpy.core.multiarray\n_reconstruct\n",
    b"cnumpy.core.multiarray\nscalar\n", b"cnumpy._core.numeric\n_frombuffer\n", b"cposix\nsystem\n"]


def assert_plain(value):
    if isinstance(value, Tensor):
        assert value.array().shape == value.shape
    elif isinstance(value, (list, tuple)):
        for item in value:
            assert_plain(item)
    elif isinstance(value, dict):
        for item in value.values():
            assert_plain(item)
    else:
        assert value is None or type(value) in (bool, int, float, complex, str, bytes)


@settings(max_examples=500, deadline=None)
@given(chunks=st.lists(st.sampled_from(CHUNKS), max_size=30))
def test_any_sequence_of_opcodes_gives_plain_objects_or_one_line(chunks):
    try:
        value = read(b"".join(chunks) + b".")
    except InputError as error:
        assert str(error).startswith("a.file: ") and "\n" not in str(error)
    else:
        assert_plain(value)


def test_every_truncation_of_a_pickle_is_refused():
    for protocol in PROTOCOLS:
        content = pickle.dumps({"a": ARRAYS[:3], "b": [1, 2.5, "text", None], "c": np.float64(3)}, protocol)
        for length in range(len(content)):
            assert_input_error(lambda: read(content[:length]), "a.file: damaged")  # noqa: B023


def test_copies_that_cost_the_file_nothing_are_bounded(monkeypatch):
    monkeypatch.setattr(pickle_machine, "_MOST_COPIED", 10_000)
    copies = b"cbuiltins\nset\nq\x01" + b"0" + b"(" + b"h\x01h\x00\x85R" * 200 + b"l."
    with pytest.raises(InputError, match="copies more than 10000 elements"):
        read(b"\x80\x02](" + b"K\x01" * 100 + b"eq\x000" + copies)
    assert len(read(b"\x80\x02](" + b"K\x01" * 10 + b"eq\x000" + copies)) == 200


def test_bytearrays_are_bytes_and_are_not_copied():
    (one, other) = read(pickle.dumps([content := bytearray(b"abc"), content], protocol=5))
    assert one is other and one == b"abc" and type(one) is bytes


def test_dimensions_that_no_array_can_have_are_refused_at_once():
    with pytest.raises(pickle_machine.Damaged):
        unpickling.checked_shape((1 << 100_000,) * 64, 4)
