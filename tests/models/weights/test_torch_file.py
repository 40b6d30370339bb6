"""Files of torch.save put together by hand are read, damaged ones are refused, and what is written is read again."""

import io
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest

from jaxrd.errors import InputError
from jaxrd.models.weights import torch_file
from jaxrd.models.weights.unpickling import Tensor
from tests.support import assert_input_error, changed_copies

# The opcodes of these tests' own pickles, in protocol 0 but for the persistent ids.


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def item(value):
    """Pickles a plain object without the end of a pickle; bytes are opcodes already."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, tuple):
        return b"(" + b"".join(map(item, value)) + b"t"
    if isinstance(value, list):
        return b"(" + b"".join(map(item, value)) + b"l"
    if isinstance(value, dict):
        return b"(" + b"".join(item(part) for pair in value.items() for part in pair) + b"d"
    return pickle.dumps(value, 0)[:-1]


def call(function, *arguments):
    return function + item(arguments) + b"R"


ORDERED_DICT, FLOATS = name("collections", "OrderedDict"), name("torch", "FloatStorage")
REBUILD_2, REBUILD_3 = name("torch._utils", "_rebuild_tensor_v2"), name("torch._utils", "_rebuild_tensor_v3")


def state_dict(entries):
    """As torch makes them: an OrderedDict that is filled, and then given attributes."""
    entries = b"".join(item(part) for pair in entries.items() for part in pair)
    return ORDERED_DICT + b")R(" + entries + b"u" + item({"_metadata": ORDERED_DICT + b")R"}) + b"b"


def storage(key, count, kind="FloatStorage", module="torch", view=()):
    return item(("storage", name(module, kind), key, "cpu", count, *view)) + b"Q"


def tensor(key, count, offset=0, shape=None, strides=(1,), **options):
    shape = (count,) if shape is None else shape
    return call(REBUILD_2, storage(key, count, **options), offset, shape, strides, False, ORDERED_DICT + b")R")


def zip_file(path, pickled, storages, *, root="archive", records=(("version", b"3\n"),), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", pickled + b".")
        for key, content in storages.items():
            archive.writestr(f"{root}/data/{key}", content)
        for record, content in records:
            archive.writestr(f"{root}/{record}", content)
    return path


def legacy_file(path, pickled, storages, *, keys=None, system=None):
    system = {"protocol_version": 1001, "little_endian": True} if system is None else system
    heads = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, system)]
    contents = b"".join(struct.pack("<q", count) + content for count, content in storages.values())
    path.write_bytes(b"".join([*heads, pickled + b".", pickle.dumps(list(storages) if keys is None else keys, 2), contents]))
    return path


SIX = np.arange(6, dtype=np.float32)


def six_zip(path, pickled=None, **options):
    return zip_file(path, tensor("0", 6) if pickled is None else pickled, {"0": SIX.tobytes()}, **options)


def six_legacy(path, pickled=None, **options):
    pickled = tensor("0", 6, view=(None,)) if pickled is None else pickled
    return legacy_file(path, pickled, {"0": (6, SIX.tobytes())}, **options)


def assert_same(read, expected):
    if isinstance(expected, np.ndarray):
        assert isinstance(read, Tensor)
        array = read.array()
        assert array.dtype == read.dtype == expected.dtype and array.shape == read.shape == expected.shape
        assert array.tobytes() == expected.tobytes() and not array.flags.writeable
    elif isinstance(expected, dict):
        assert list(read) == list(expected)
        for key in expected:
            assert_same(read[key], expected[key])
    else:
        assert read == expected and type(read) is type(expected)


@pytest.mark.parametrize("file, view", [(six_zip, ()), (six_legacy, (None,))])
def test_state_dicts_and_nested_checkpoints_are_read(tmp_path, file, view):
    model = {
        "module.weight": tensor("0", 6, shape=(2, 3), strides=(3, 1), view=view),
        "module.transposed": tensor("0", 6, shape=(3, 2), strides=(1, 3), view=view),
        "module.part": tensor("0", 6, 4, shape=(2,), view=view),
        "module.scalar": tensor("0", 6, 5, shape=(), strides=(), view=view),
        "module.empty": tensor("0", 6, shape=(0, 3), strides=(3, 1), view=view),
        "module.repeated": tensor("0", 6, 2, shape=(4, 2), strides=(0, 1), view=view),
    }
    parameter = call(name("torch._utils", "_rebuild_parameter"), model["module.part"], True, ORDERED_DICT + b")R")
    optimizer = item({"state": {0: {"step": 7, "buffer": parameter}}, "param_groups": [{"lr": 0.1, "params": [0]}]})
    size = call(name("torch", "Size"), [2, 3])
    value = {"epoch": 3, "net": state_dict(model), "optimizer": optimizer, "size": size, "none": None}
    path = file(tmp_path / "a", item(value))
    assert_same(torch_file.read(path), {
        "epoch": 3,
        "net": {
            "module.weight": SIX.reshape(2, 3), "module.transposed": SIX.reshape(2, 3).T, "module.part": SIX[4:],
            "module.scalar": np.asarray(SIX[5]), "module.empty": np.zeros((0, 3), np.float32),
            "module.repeated": np.tile(SIX[2:4], (4, 1))},
        "optimizer": {"state": {0: {"step": 7, "buffer": SIX[4:]}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "size": (2, 3), "none": None})


@pytest.mark.parametrize("module", ["torch", "torch.cuda", "torch.storage"])
def test_storages_of_every_module_are_read(tmp_path, module):
    path = zip_file(tmp_path / "a", tensor("0", 6, module=module, kind="LongStorage"), {"0": np.arange(6).tobytes()})
    assert_same(torch_file.read(path), np.arange(6))


def test_numpy_scalars_beside_the_tensors_are_numbers(tmp_path):
    scalar = pickle.dumps(np.float64(0.25), 2)[2:-1]
    path = six_zip(tmp_path / "a", item({"accuracy": scalar, "weight": tensor("0", 6)}))
    assert_same(torch_file.read(path), {"accuracy": 0.25, "weight": SIX})


def test_a_storage_view_of_an_old_file_is_part_of_its_storage(tmp_path):
    part = tensor("0", 6, shape=(2,), view=(("view", 3, 2),))
    assert_same(torch_file.read(six_legacy(tmp_path / "a", part)), SIX[3:5])
    for view in (("view", 5, 2), ("view", -1, 2), ("view", 0, -1), ("view", 0.0, 2), 3):
        path = six_legacy(tmp_path / "a", tensor("0", 6, shape=(2,), view=(view,)))
        assert_input_error(lambda: torch_file.read(path), f"{path}: damaged")  # noqa: B023
    path = six_legacy(tmp_path / "a", tensor("0", 6, 1, shape=(2,), view=(("view", 4, 2),)))
    assert_input_error(lambda: torch_file.read(path), "reaches to element 2 of a storage of 2")


def test_a_big_endian_archive_is_swapped_and_a_big_endian_legacy_file_refused(tmp_path):
    swapped = zip_file(tmp_path / "a", tensor("0", 6), {"0": SIX.astype(">f4").tobytes()}, records=[("byteorder", b"big")])
    assert_same(torch_file.read(swapped), SIX)
    for dtype, kind in ((ml_dtypes.bfloat16, "BFloat16Storage"), (np.complex64, "ComplexFloatStorage")):
        values = SIX.astype(dtype)
        path = zip_file(
            tmp_path / "b", tensor("0", 6, kind=kind), {"0": values.byteswap().tobytes()}, records=[("byteorder", b"big")])
        assert_same(torch_file.read(path), values)
    strange = six_zip(tmp_path / "c", records=[("byteorder", b"middle")])
    assert_input_error(lambda: torch_file.read(strange), f"{strange}: damaged", "neither little nor big")
    legacy = six_legacy(tmp_path / "d", system={"little_endian": False})
    assert_input_error(lambda: torch_file.read(legacy), f"{legacy}: it was written on a big-endian machine; save it again")


@pytest.mark.parametrize("offset, shape, strides", [
    (0, (7,), (1,)), (1, (6,), (1,)), (6, (1,), (1,)), (6, (), ()), (0, (2, 3), (4, 1)), (0, (2,), (6,)), (0, (2,), (2**61,)),
    (2**64, (1,), (1,)), (-1, (1,), (1,)), (0, (-1,), (1,)), (5, (2,), (-1,)), (0, (2, 3), (1,)), (0, (2,), (1, 1)),
    (0.0, (1,), (1,)), (0, (1.0,), (1,)), (0, (1,), (1.0,)), (True, (1,), (1,)), (0, (True,), (1,)), (0, (1,), (False,)),
    (None, (1,), (1,)), (0, 1, (1,)), (0, (1,), 1), (0, "1", (1,)),
    (0, (2**40, 2**40), (0, 0)), (0, (0, 2**40, 2**40), (1, 1, 1)), (0, (1,) * 65, (1,) * 65),
])
@pytest.mark.parametrize("file, view", [(six_zip, ()), (six_legacy, (None,))])
def test_tensors_that_leave_their_storage_or_cannot_be_are_refused(tmp_path, offset, shape, strides, file, view):
    path = file(tmp_path / "a", tensor("0", 6, offset, shape, strides, view=view))
    assert_input_error(lambda: torch_file.read(path), f"{path}: damaged: ")


@pytest.mark.parametrize("offset, shape, strides, expected", [
    (5, (1,), (2**61,), SIX[5:]), (6, (0,), (1,), SIX[6:]), (99, (0, 2), (1, 1), np.zeros((0, 2), np.float32)),
    (0, (2,), (5,), SIX[::5]), (0, [2], [5], SIX[::5]), (0, (1,) * 64, (1,) * 64, SIX[0].reshape((1,) * 64)),
])
def test_tensors_at_the_edge_of_their_storage_are_read(tmp_path, offset, shape, strides, expected):
    assert_same(torch_file.read(six_zip(tmp_path / "a", tensor("0", 6, offset, shape, strides))), expected)


IDENTITIES = [
    5, "0", (), ("storage",), ("tensor", FLOATS, "0", "cpu", 6), ("storage", "FloatStorage", "0", "cpu", 6),
    ("storage", name("torch", "QInt8Storage"), "0", "cpu", 6), ("storage", name("torch", "Size"), "0", "cpu", 6),
    ("storage", FLOATS, ("0",), "cpu", 6), ("storage", FLOATS, "0", "cpu", -1), ("storage", FLOATS, "0", "cpu", 6.0),
    ("storage", FLOATS, "0", "cpu", 2**70), ("storage", FLOATS, "0", "cpu", 6, None, None), ("storage", FLOATS, "0", "cpu", 7),
    ("storage", name("torch", "DoubleStorage"), "0", "cpu", 6), ("storage", FLOATS, "missing", "cpu", 6),
    ("storage", FLOATS, "../data.pkl", "cpu", 6), ("module", 1, "a.py", "code"),
]


@pytest.mark.parametrize("identity", IDENTITIES)
@pytest.mark.parametrize("file", [six_zip, six_legacy])
def test_persistent_ids_of_any_other_shape_are_refused(tmp_path, identity, file):
    if file is six_legacy and isinstance(identity, tuple) and len(identity) == 5:
        identity = (*identity, None)
    path = file(tmp_path / "a", item(identity) + b"Q")
    with pytest.raises(InputError) as refused:
        torch_file.read(path)
    assert str(refused.value).startswith(f"{path}: ") and "\n" not in str(refused.value)


def test_one_storage_of_two_types_is_refused(tmp_path):
    for file, view in ((six_zip, ()), (six_legacy, (None,))):
        path = file(tmp_path / "a", item((tensor("0", 6, view=view), tensor("0", 6, kind="IntStorage", view=view))))
        assert_input_error(lambda: torch_file.read(path), f"{path}: damaged: its pickle gives storage 0")  # noqa: B023


BYTES = storage("0", 24, "UntypedStorage")


@pytest.mark.parametrize("pickled", [
    call(REBUILD_2, 5, 0, (1,), (1,), False, {}), call(REBUILD_2, storage("0", 6)),
    call(name("torch._tensor", "_rebuild_from_type_v2"), name("torch", "Size"), name("torch", "Tensor"), ((1,),), {}),
    call(name("torch._tensor", "_rebuild_from_type_v2"), 5, name("torch", "Tensor"), (), {}),
    call(REBUILD_3, BYTES, 0, (1,), (1,), False, {}, "float32"),
    call(REBUILD_3, BYTES, 0, (1,), (1,), False, {}, name("torch", "Size")),
    call(REBUILD_3, BYTES, 0, (4,), (1,), False, {}, name("torch", "uint64")),
    call(name("torch._utils", "_rebuild_parameter"), 5, True, {}), call(name("torch", "device"), [[]]),
])
def test_tensors_that_are_made_of_something_else_are_damage(tmp_path, pickled):
    path = six_zip(tmp_path / "a", pickled)
    assert_input_error(lambda: torch_file.read(path), f"{path}: damaged")


@pytest.mark.parametrize("pickled", [
    call(REBUILD_2, storage("0", 6), 0, (6,), (1,), False, {}, {"conj": True}), storage("0", 6)])
def test_what_is_sound_and_not_read_is_not_called_damage(tmp_path, pickled):
    path = six_zip(tmp_path / "a", pickled)
    assert_input_error(lambda: torch_file.read(path), f"{path}: its pickle", "which is not read", "the weights alone")


def test_a_type_without_storage_type_is_read_from_bytes(tmp_path):
    for code in ("uint64", "uint16", "float8_e5m2"):
        dtype = np.dtype(getattr(ml_dtypes, code, code))
        data = np.arange(24, dtype=np.uint8)
        count = 24 // dtype.itemsize
        pickled = call(REBUILD_3, BYTES, 1, (count - 1,), (1,), False, {}, name("torch", code))
        assert_same(torch_file.read(zip_file(tmp_path / "a", pickled, {"0": data.tobytes()})), data.view(dtype)[1:])


class Executed:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("file, view", [(six_zip, ()), (six_legacy, (None,))])
@pytest.mark.parametrize(
    "form", ["system", "eval", "Popen", "torch.load", "_load_from_bytes", "in place of a storage", "in its id"])
def test_nothing_that_a_file_asks_for_is_executed(tmp_path, file, view, form):
    marker = tmp_path / "executed"
    inner = pickle.dumps(Executed(os.system, f"touch {marker}"), 2)
    system, nested = inner[2:-1], pickle.dumps(inner, 2)[2:-1]
    expected, pickled = {
        "system": ("posix.system", item({"weight": tensor("0", 6, view=view), "hook": system})),
        "eval": ("__builtin__.eval", pickle.dumps(Executed(eval, f"open({str(marker)!r}, 'w').close()"), 2)[2:-1]),
        "Popen": ("subprocess.Popen", call(name("subprocess", "Popen"), ["touch", str(marker)])),
        "torch.load": ("torch.load", call(name("torch", "load"), call(name("_io", "BytesIO"), nested))),
        "_load_from_bytes": ("torch.storage._load_from_bytes", call(name("torch.storage", "_load_from_bytes"), nested)),
        "in place of a storage": ("posix.system", call(REBUILD_2, system, 0, (1,), (1,), False, {})),
        "in its id": ("posix.system", item(("storage", system, "0", "cpu", 6)) + b"Q"),
    }[form]
    path = file(tmp_path / "a", pickled)
    assert_input_error(
        lambda: torch_file.read(path), f"{path}: its pickle asks for {expected}", "nothing of it was executed",
        "save model.state_dict() with torch.save where the class is defined")
    assert not marker.exists()


def test_code_in_the_other_pickles_of_a_legacy_file_is_not_executed(tmp_path):
    marker = tmp_path / "executed"
    system = Executed(os.system, f"touch {marker}")
    path = tmp_path / "a"
    path.write_bytes(pickle.dumps(system, 2))
    assert_input_error(lambda: torch_file.read(path), "asks for posix.system")
    assert_input_error(lambda: torch_file.read(six_legacy(path, system=system)), "asks for posix.system")
    assert_input_error(lambda: torch_file.read(six_legacy(path, keys=[system])), "asks for posix.system")
    assert not marker.exists()


def test_a_whole_model_of_the_legacy_format_is_named(tmp_path):
    identity = item(("module", name("robust.zoo", "Student"), "zoo.py", "class Student: pass")) + b"Q"
    path = six_legacy(tmp_path / "a", identity + b")\x81" + item({"training": False}) + b"b")
    assert_input_error(
        lambda: torch_file.read(path),
        f"{path}: its pickle asks for robust.zoo.Student and holds a whole pickled model of class robust.zoo.Student rather")


def test_archives_without_what_belongs_to_them_are_refused(tmp_path):
    compressed = six_zip(tmp_path / "compressed", compression=zipfile.ZIP_DEFLATED)
    assert_input_error(
        lambda: torch_file.read(compressed), f"{compressed}: its record archive/data.pkl is compressed", "zip -0")
    missing = zip_file(tmp_path / "missing", tensor("0", 6), {})
    assert_input_error(lambda: torch_file.read(missing), f"{missing}: damaged: its record data/0 is missing")
    short = zip_file(tmp_path / "short", tensor("0", 6), {"0": SIX[:5].tobytes()})
    assert_input_error(lambda: torch_file.read(short), f"{short}: damaged: its pickle gives storage 0 of 20 bytes another size")
    with zipfile.ZipFile(tmp_path / "two", "w") as archive:
        archive.writestr("a/data.pkl", b"N.")
        archive.writestr("b/data.pkl", b"N.")
    assert_input_error(lambda: torch_file.read(tmp_path / "two"), "has 2 members DIRECTORY/data.pkl")
    strange = zip_file(tmp_path / "strange", tensor("0\n1", 6), {})
    assert_input_error(lambda: torch_file.read(strange), r"its record data/0\n1 is missing")
    nowhere = tmp_path / "nowhere"
    assert_input_error(lambda: torch_file.read(nowhere), f"{nowhere}: cannot be read: No such file")
    assert_input_error(lambda: torch_file.read(tmp_path), f"{tmp_path}: cannot be read: Is a directory")
    (tmp_path / "empty").touch()
    assert_input_error(lambda: torch_file.read(tmp_path / "empty"), "it is empty")


def test_a_directory_that_claims_more_bytes_than_the_file_has_is_refused(tmp_path):
    path = six_zip(tmp_path / "a", tensor("0", 1000))
    content = path.read_bytes()
    entry = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 1)  # of data/0: CRC-32 at 16, then both sizes
    for compressed in (24, 4000):
        path.unlink()
        path.write_bytes(content[:entry + 16] + struct.pack("<III", 0, compressed, 4000) + content[entry + 28:])
        assert_input_error(lambda: torch_file.read(path), "its record archive/data/0 goes beyond the end of the file")


def test_a_pickle_of_absurd_size_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "_LARGEST_PICKLE", 1000)
    path = six_zip(tmp_path / "a", item({"text": "x" * 1000, "weight": tensor("0", 6)}))
    assert_input_error(lambda: torch_file.read(path), f"{path}: damaged: its record data.pkl has", "a few thousand are usual")


def test_legacy_files_with_a_storage_that_is_not_there_or_moves_backwards_are_refused(tmp_path):
    both = item((tensor("0", 6, view=(None,)), tensor("1", 6, view=(None,))))
    twice = legacy_file(tmp_path / "a", both, {"0": (6, SIX.tobytes()), "1": (6, SIX.tobytes())}, keys=["0", "0"])
    assert_input_error(lambda: torch_file.read(twice), "its list of storages is not that of its tensors")
    unused = storage("1", -600, view=(None,)) + b"0" + tensor("0", 6, view=(None,))
    backwards = legacy_file(tmp_path / "b", unused, {"1": (-600, b""), "0": (6, SIX.tobytes())})
    assert_input_error(lambda: torch_file.read(backwards), "a storage without a type, a key or a size")
    assert_input_error(
        lambda: torch_file.read(six_zip(tmp_path / "c", tensor(("0",), 6))), "a storage without a type, a key or a size")


@pytest.mark.parametrize("storages, keys", [
    ({}, ["0"]), ({"0": (6, SIX.tobytes())}, []), ({"0": (6, SIX.tobytes())}, ["1"]), ({"0": (6, SIX.tobytes())}, ["0", "0"]),
    ({"0": (6, SIX.tobytes())}, {"0": 1}), ({"0": (5, SIX.tobytes())}, None), ({"0": (-6, SIX.tobytes())}, None),
    ({"0": (2**62, SIX.tobytes())}, None), ({"0": (6, SIX[:5].tobytes())}, None),
])
def test_legacy_files_whose_storages_are_not_as_the_pickle_says_are_refused(tmp_path, storages, keys):
    path = legacy_file(tmp_path / "a", tensor("0", 6, view=(None,)), storages, keys=keys)
    assert_input_error(lambda: torch_file.read(path), f"{path}: damaged")


def test_a_storage_whose_checksum_does_not_match_is_damaged_once_it_is_read(tmp_path):
    pickled = item({"first": tensor("0", 6), "second": tensor("1", 6)})
    path = zip_file(tmp_path / "a", pickled, {"0": SIX.tobytes(), "1": (-SIX).tobytes()})
    content = path.read_bytes()
    position = content.index((-SIX).tobytes()) + 9
    path.write_bytes(content[:position] + b"\x55" + content[position + 1:])
    read = torch_file.read(path)
    assert_same(read["first"], SIX)
    for _ in range(2):
        assert_input_error(read["second"].array, f"{path}: damaged: its record data/1 does not match its checksum")


def test_a_checksum_that_was_left_out_is_not_missed(tmp_path):
    path = six_zip(tmp_path / "a")
    with zipfile.ZipFile(path) as archive:
        checksums = {struct.pack("<I", member.CRC) for member in archive.infolist()}
    content = path.read_bytes()
    for checksum in checksums:
        content = content.replace(checksum, bytes(4))
    path.write_bytes(content)
    assert_same(torch_file.read(path), SIX)


ENTRIES = {
    "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2), "conv.transposed": np.arange(6.0).reshape(2, 3).T,
    "batches": np.asarray(7, np.int64), "half": np.arange(3, dtype=np.float16),
    "brain": np.arange(5).astype(ml_dtypes.bfloat16),
    "empty": np.zeros((0, 4), np.float32), "scalar": np.float32(2.5), "swapped": np.arange(3, dtype=">i4"),
    "complex": np.array([1j, 2], np.complex64), "bool": np.array([True, False]), "byte": np.arange(200, dtype=np.uint8),
    "short": np.int16([-1]), "strided": np.arange(20, dtype=np.int8)[::3], "schlüssel ☃": np.ones(1),
}


def test_what_is_written_is_read_bit_for_bit(tmp_path):
    torch_file.write(tmp_path / "a", ENTRIES)
    expected = {key: np.asarray(value).astype(np.asarray(value).dtype.newbyteorder("=")) for key, value in ENTRIES.items()}
    assert_same(torch_file.read(tmp_path / "a"), expected)
    torch_file.write(tmp_path / "b", {})
    assert torch_file.read(tmp_path / "b") == {}


def test_the_same_entries_are_the_same_bytes_under_any_name(tmp_path):
    torch_file.write(tmp_path / "one.pt", ENTRIES)
    torch_file.write(tmp_path / "another.tmp", dict(ENTRIES))
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "another.tmp").read_bytes()


def test_a_written_archive_is_laid_out_as_torch_save_does(tmp_path):
    torch_file.write(tmp_path / "a", ENTRIES)
    content = (tmp_path / "a").read_bytes()
    with zipfile.ZipFile(tmp_path / "a") as archive:
        assert archive.testzip() is None
        members = archive.infolist()
        assert archive.read("archive/version") == b"3\n" and archive.read("archive/byteorder") == b"little"
        pickled = archive.read("archive/data.pkl")
    assert members[0].filename == "archive/data.pkl"
    for member in members:
        assert member.compress_type == zipfile.ZIP_STORED and member.date_time == (1980, 1, 1, 0, 0, 0)
        name_length, extra_length = struct.unpack_from("<HH", content, member.header_offset + 26)
        assert (member.header_offset + 30 + name_length + extra_length) % 64 == 0
    pickletools.dis(pickled, out=io.StringIO())  # raises where the pickle is not sound
    names = {argument for opcode, argument, _ in pickletools.genops(pickled) if opcode.name == "GLOBAL"}
    assert {part for part in names if "Storage" not in part} == {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}
    assert max(opcode.proto for opcode, _, _ in pickletools.genops(pickled)) == 2


@pytest.mark.parametrize("entries, mentions", [
    ({"a": np.zeros(2, np.uint16)}, ["its entry a is uint16, for which PyTorch has no storage", "float32"]),
    ({"a": np.zeros(2, object)}, ["its entry a is object"]), ({"a": "text"}, ["its entry a is <U4"]),
    ({3: np.zeros(2)}, ["its entry 3 is named by a int"]),
])
def test_what_cannot_be_written_is_refused_before_the_file_is_touched(tmp_path, entries, mentions):
    path = tmp_path / "a"
    assert_input_error(lambda: torch_file.write(path, {"good": SIX, **entries}), f"{path}: ", *mentions)
    assert not path.exists()


def arrays(value):
    """Every Tensor as its bytes, to compare."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.array().tobytes()
    if isinstance(value, dict):
        return {key: arrays(part) for key, part in value.items()}
    return value


def small_archive(path):
    return zip_file(
        path, state_dict({"weight": tensor("0", 6), "bias": tensor("1", 2)}),
        {"0": SIX.tobytes(), "1": SIX[:2].tobytes()}, records=[("byteorder", b"little"), ("version", b"3\n")])


def small_legacy(path):
    pickled = state_dict({"weight": tensor("0", 6, view=(None,)), "bias": tensor("1", 2, view=(None,))})
    return legacy_file(path, pickled, {"0": (6, SIX.tobytes()), "1": (2, SIX[:2].tobytes())})


def written(path):
    torch_file.write(path, {"weight": SIX, "bias": SIX[:2]})
    return path


@pytest.mark.parametrize("file", [small_archive, small_legacy, written])
def test_every_truncation_is_refused(tmp_path, file):
    path = file(tmp_path / "a")
    content = path.read_bytes()
    assert_same(torch_file.read(path), {"weight": SIX, "bias": SIX[:2]})
    for length in range(len(content)):
        cut = tmp_path / f"cut{length % 2}"
        cut.unlink(missing_ok=True)  # the file before may still be mapped
        cut.write_bytes(content[:length])
        assert_input_error(lambda: torch_file.read(cut), f"{cut}: ")  # noqa: B023


@pytest.mark.parametrize("file", [small_archive, small_legacy, written])
def test_changed_bytes_are_refused_or_change_nothing_that_a_checksum_covers(tmp_path, file):
    path = file(tmp_path / "a")
    content, expected = path.read_bytes(), arrays(torch_file.read(path))
    refused = 0
    for other in changed_copies(tmp_path, content):
        try:
            found = arrays(torch_file.read(other))
        except InputError as error:
            assert str(error).startswith(f"{other}: ") and "\n" not in str(error)
            refused += 1
        else:
            assert file is small_legacy or found == expected
    assert refused > 300


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_file_is_read_only_where_an_array_is_asked_for(tmp_path):
    size = 150_000_000
    torch_file.write(tmp_path / "large", {"first": np.zeros(size // 4, np.float32), "second": SIX})
    script = (
        "import os, sys; from jaxrd.models.weights import torch_file\n"
        "def resident(): return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE')\n"
        "before = resident(); read = torch_file.read(sys.argv[1]); read['second'].array(); print(resident() - before)\n"
        "read['first'].array(); print(resident() - before)\n")
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "large"], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()})
    lazy, complete = map(int, done.stdout.split())
    assert lazy < 5_000_000 < size <= complete * 1.05
