"""PyTorch itself is the judge: of what it saves every bit is read, and what is written it loads."""

import argparse
import collections
import fractions
import io
import pathlib

import ml_dtypes
import numpy as np
import pytest

from jaxrd.errors import InputError
from jaxrd.models.weights import recognition, torch_file
from jaxrd.models.weights.unpickling import Tensor

torch = pytest.importorskip("torch", reason="parity with PyTorch needs torch, which jaxrd does not")

FORMATS = [True, False]
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    torch.bool, torch.complex64, torch.complex128, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn,
    torch.float8_e5m2]


def content(tensor):
    """The bytes of a tensor of any type, in row-major order."""
    tensor = tensor.detach().contiguous().reshape(-1)
    return b"" if not tensor.numel() else tensor.view(torch.uint8).numpy().tobytes()


def assert_equal(read, saved):
    if isinstance(saved, torch.Tensor):
        assert isinstance(read, Tensor)
        array = read.array()
        assert str(saved.dtype) == f"torch.{array.dtype}" and array.dtype == read.dtype and array.dtype.isnative
        assert array.shape == read.shape == tuple(saved.shape) and array.tobytes() == content(saved)
        assert not array.flags.writeable
    elif isinstance(saved, dict):
        assert isinstance(read, dict) and list(read) == list(saved)
        for key in saved:
            assert_equal(read[key], saved[key])
    elif isinstance(saved, (list, tuple)):
        assert len(read) == len(saved) and isinstance(read, tuple) == isinstance(saved, tuple)
        for one, other in zip(read, saved, strict=True):
            assert_equal(one, other)
    else:
        assert read == saved


def saved_and_read(path, value, zip_format, **options):
    torch.save(value, path, _use_new_zipfile_serialization=zip_format, **options)
    assert recognition.kind(path) == ("torch" if zip_format else "torch_legacy")
    return torch_file.read(path)


@pytest.mark.parametrize("zip_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_is_read_bit_for_bit(tmp_path, dtype, zip_format):
    raw = torch.from_numpy(np.random.default_rng(0).integers(0, 2 if dtype == torch.bool else 256, 96).astype(np.uint8))
    tensor = raw.view(dtype)
    value = {"all": tensor, "matrix": tensor.clone().reshape(2, -1), "empty": torch.zeros(0, 3, dtype=dtype),
             "scalar": tensor[1].clone(), "part": tensor[1:3]}
    assert_equal(saved_and_read(tmp_path / "a", value, zip_format), value)


@pytest.mark.parametrize("zip_format", FORMATS)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_views_of_one_storage_are_read_whatever_their_strides(tmp_path, zip_format, protocol):
    base = torch.arange(24, dtype=torch.float32)
    value = {
        "base": base, "matrix": base.reshape(4, 6), "transposed": base.reshape(4, 6).T, "steps": base[1::3],
        "columns": base.reshape(4, 6)[1:, ::2], "permuted": base.reshape(2, 3, 4).permute(2, 0, 1), "scalar": base[23],
        "expanded": base[:3].expand(5, 3), "diagonal": base[:16].reshape(4, 4).diagonal(), "none": base[5:5],
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)}
    assert_equal(saved_and_read(tmp_path / "a", value, zip_format, pickle_protocol=protocol), value)


class Net(torch.nn.Module):
    """Parameters, buffers and a counter, as the networks of the papers have them."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, bias=False)
        self.bn = torch.nn.BatchNorm2d(4)
        self.fc = torch.nn.Linear(4, 2)

    def forward(self, images):
        return self.fc(torch.relu(self.bn(self.conv(images))).mean((2, 3)))


def trained(optimizer_class=torch.optim.SGD, **options):
    torch.manual_seed(0)
    net = Net()
    optimizer = optimizer_class(net.parameters(), lr=0.1, **options)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(5, 3, 6, 6)).square().sum().backward()
        optimizer.step()
    return net, optimizer


@pytest.mark.parametrize("zip_format", FORMATS)
@pytest.mark.parametrize("optimizer_class, options", [
    (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adam, {}), (torch.optim.AdamW, {"amsgrad": True})])
def test_checkpoints_with_optimizer_and_schedule_are_read(tmp_path, zip_format, optimizer_class, options):
    net, optimizer = trained(optimizer_class, **options)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [75, 90])
    value = {
        "state_dict": torch.nn.DataParallel(net).state_dict(), "optimizer": optimizer.state_dict(), "epoch": 76,
        "scheduler": schedule.state_dict(), "best": np.float64(0.57), "count": np.int64(3), "history": [0.1, 0.2],
        "rng": torch.get_rng_state(), "size": torch.Size([3, 4]), "parameter": torch.nn.Parameter(torch.randn(3)),
        "buffer": torch.nn.Parameter(torch.ones(2), requires_grad=False), "ema": collections.OrderedDict(net.state_dict()),
        "numpy": np.random.default_rng(0).random(4)}
    read = saved_and_read(tmp_path / "a", value, zip_format)
    assert list(read["state_dict"])[0] == "module.conv.weight"
    assert type(read["best"]) is float and type(read["count"]) is int
    numpy = value.pop("numpy")
    assert read.pop("numpy").array().tobytes() == numpy.tobytes()
    assert_equal(read, value)


@pytest.mark.parametrize("zip_format", FORMATS)
def test_a_parameter_with_attributes_is_its_values(tmp_path, zip_format):
    parameter = torch.nn.Parameter(torch.randn(3))
    parameter.note = "kept by torch"
    assert_equal(saved_and_read(tmp_path / "a", [parameter], zip_format), [parameter])


def test_numbers_and_devices_and_types_beside_tensors_are_read(tmp_path):
    value = {"device": torch.device("cuda", 1), "cpu": torch.device("cpu"), "dtype": torch.float32, "flag": np.bool_(True)}
    read = saved_and_read(tmp_path / "a", value, True)
    assert read == {"device": "cuda:1", "cpu": "cpu", "dtype": "torch.float32", "flag": True}


def test_a_file_saved_without_checksums_is_read(tmp_path):
    value = {"weight": torch.randn(5)}
    torch.serialization.set_crc32_options(False)
    try:
        read = saved_and_read(tmp_path / "a", value, True)
    finally:
        torch.serialization.set_crc32_options(True)
    assert_equal(read, value)


@pytest.mark.parametrize("zip_format", FORMATS)
@pytest.mark.parametrize("wrap", [lambda net: net, torch.nn.DataParallel, torch.nn.Sequential])
def test_a_whole_model_is_refused_with_its_class(tmp_path, zip_format, wrap):
    net = wrap(Net())
    name = f"{type(net).__module__}.{type(net).__name__}"
    for value in (net, {"epoch": 3, "net": net}):
        with pytest.raises(InputError) as refused:
            saved_and_read(tmp_path / "a", value, zip_format)
        message = str(refused.value)
        assert message.startswith(f"{tmp_path / 'a'}: its pickle asks for {name}") and "\n" not in message
        assert f"a whole pickled model of class {name} rather than its weights" in message


@pytest.mark.parametrize("zip_format", FORMATS)
def test_options_of_a_script_are_left_out_and_other_objects_refused_by_their_class(tmp_path, zip_format):
    weights = Net().state_dict()
    content = saved_and_read(tmp_path / "a", {"state_dict": weights, "args": argparse.Namespace(depth=34)}, zip_format)
    assert content["args"] == {} and list(content["state_dict"]) == list(weights)
    tensor = torch.arange(3.0)
    tensor.note = "an attribute"
    more = {"net": torch.nn.Linear(2, 2).state_dict(), "note": tensor, "where": pathlib.PurePosixPath("/a/b"),
            "counts": collections.defaultdict(int, a=1), "last": collections.deque([1, 2], 3), "seen": frozenset([4])}
    found = saved_and_read(tmp_path / "b", more, zip_format)
    assert found["where"].replace("//", "/") == "/a/b" and found["counts"] == {"a": 1} and found["last"] == [1, 2]
    assert found["seen"] == [4] and found["note"].array().tolist() == [0, 1, 2]
    with pytest.raises(InputError, match=r"asks for fractions\.Fraction; only tensors and containers are read"):
        saved_and_read(tmp_path / "a", {"state_dict": weights, "rate": fractions.Fraction(1, 3)}, zip_format)


def test_torchscript_programs_and_quantised_tensors_are_refused(tmp_path):
    with pytest.warns():
        torch.jit.save(torch.jit.script(torch.nn.ReLU()), tmp_path / "program")
    with pytest.raises(InputError, match="TorchScript program"):
        recognition.kind(tmp_path / "program")
    with pytest.raises(InputError, match=r"asks for torch\._utils\._rebuild_sparse_tensor"):
        saved_and_read(tmp_path / "sparse", torch.eye(3).to_sparse(), True)


def test_every_truncation_of_torchs_own_files_is_refused(tmp_path):
    for zip_format in FORMATS:
        torch.save({"weight": torch.arange(4.0), "step": 3}, tmp_path / "a", _use_new_zipfile_serialization=zip_format)
        saved = (tmp_path / "a").read_bytes()
        for length in range(len(saved)):
            cut = tmp_path / f"cut{length % 2}"
            cut.unlink(missing_ok=True)
            cut.write_bytes(saved[:length])
            with pytest.raises(InputError):
                torch_file.read(cut)


def written_state(net):
    return {key: value.numpy() for key, value in net.state_dict().items()}


@pytest.mark.parametrize("options", [{}, {"mmap": True}])
def test_torch_loads_what_is_written(tmp_path, options):
    net, _ = trained()
    path = tmp_path / "a"
    torch_file.write(path, written_state(net))
    loaded = torch.load(path, weights_only=True, **options)
    assert type(loaded) is collections.OrderedDict and list(loaded) == list(net.state_dict())
    for key, value in net.state_dict().items():
        assert loaded[key].dtype == value.dtype and loaded[key].shape == value.shape and loaded[key].is_contiguous()
        assert content(loaded[key]) == content(value) and loaded[key].data_ptr() % 64 == 0
    other = Net()
    assert str(other.load_state_dict(loaded, strict=True)) == "<All keys matched successfully>"
    images = torch.randn(2, 3, 6, 6)
    assert torch.equal(other.eval()(images), net.eval()(images))


@pytest.mark.parametrize("options", [{}, {"mmap": True}])
def test_torch_loads_every_type_and_shape_that_is_written(tmp_path, options):
    generator = np.random.default_rng(0)
    entries = {}
    for dtype in (
            "float64", "float32", "float16", ml_dtypes.bfloat16, "int64", "int32", "int16", "int8", "uint8", "bool",
            "complex64", "complex128"):
        for shape in ((), (0,), (3, 0, 2), (1,), (5,), (2, 3, 4), (1, 1, 1, 1, 1, 70_000)):
            array = generator.integers(0, 2, shape) if dtype == "bool" else 100 * generator.random(shape)
            entries[f"{np.dtype(dtype)}{shape}"] = np.asarray(array).astype(dtype)
    entries["fortran"] = np.asfortranarray(generator.random((3, 4)))
    entries["swapped"] = np.arange(4, dtype=">f8")
    path = tmp_path / "a"
    torch_file.write(path, entries)
    loaded = torch.load(path, weights_only=True, **options)
    assert list(loaded) == list(entries)
    for key, array in entries.items():
        native = array.astype(array.dtype.newbyteorder("="))
        assert str(loaded[key].dtype) == f"torch.{native.dtype}" and tuple(loaded[key].shape) == array.shape
        assert content(loaded[key]) == native.tobytes()


def test_torch_reads_a_written_archive_from_memory_and_may_change_it(tmp_path):
    torch_file.write(tmp_path / "a", {"weight": np.ones((2, 2), np.float32), "other": np.ones(3, np.float32)})
    loaded = torch.load(io.BytesIO((tmp_path / "a").read_bytes()), weights_only=True)
    loaded["weight"].zero_()
    assert torch.equal(loaded["other"], torch.ones(3))


def test_what_torch_makes_of_a_big_endian_archive_is_what_is_read(tmp_path):
    import zipfile

    values = {"a": torch.arange(5.0), "b": torch.arange(3), "c": torch.arange(4).bfloat16(), "d": torch.tensor([1 + 2j])}
    torch.save(values, tmp_path / "a")
    with zipfile.ZipFile(tmp_path / "a") as little, zipfile.ZipFile(tmp_path / "b", "w") as big:
        for member in little.namelist():
            big.writestr(member, b"big" if member.endswith("/byteorder") else little.read(member))
    assert_equal(torch_file.read(tmp_path / "b"), torch.load(tmp_path / "b", weights_only=True))
