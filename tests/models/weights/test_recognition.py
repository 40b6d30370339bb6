"""A file is recognised by its content, and what is no file of weights is called what it is, with the way out."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from jaxrd.errors import InputError
from jaxrd.models.weights import recognition, torch_file
from tests.support import assert_input_error

LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}q\x00."  # as torch.save began until PyTorch 1.6


def torch_zip(path):
    torch_file.write(path, {"weight": np.ones(3, np.float32)})


def haiku(path):
    with open(path, "wb") as file:
        np.save(file, np.array([{}, {}], object))


GOOD = {
    "torch": torch_zip, "torch_legacy": lambda path: path.write_bytes(LEGACY), "haiku": haiku,
    "safetensors": lambda path: safetensors.numpy.save_file({"a": np.ones(3)}, path)}


@pytest.mark.parametrize("suffix", ["", ".pt", ".npy", ".safetensors", ".tar", ".html"])
@pytest.mark.parametrize("kind", GOOD)
def test_the_suffix_does_not_matter(tmp_path, kind, suffix):
    path = tmp_path / f"file{suffix}"
    GOOD[kind](path)
    assert recognition.kind(path) == recognition.kind(str(path)) == kind


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_legacy_file_of_any_protocol_is_one(tmp_path, protocol):
    (tmp_path / "a").write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol) + pickle.dumps(1001, protocol))
    assert recognition.kind(tmp_path / "a") == "torch_legacy"


def test_safetensors_without_entries_and_with_metadata_are_some(tmp_path):
    safetensors.numpy.save_file({}, tmp_path / "a")
    safetensors.numpy.save_file({}, tmp_path / "b", {"x": "y"})
    assert recognition.kind(tmp_path / "a") == recognition.kind(tmp_path / "b") == "safetensors"


def archive(*names):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name in names:
            file.writestr(name, b"content")
    return stream.getvalue()


def arrays(save, **options):
    stream = io.BytesIO()
    save(stream, **options)
    return stream.getvalue()


def tar(**options):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", **options) as file:
        for name in ("sys_info", "pickle", "tensors", "storages"):  # as PyTorch wrote until 0.1.10
            file.addfile(tarfile.TarInfo(name))
    return stream.getvalue()


FOREIGN = {
    "empty": (b"", "it is empty; download it again"),
    "html": (
        b"<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning", "an HTML page", "download the file itself"),
    "html with blanks": (b"\xef\xbb\xbf\r\n  <HTML lang=en>", "an HTML page", "download the file itself"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "an HTML page", "download the file itself"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git-lfs", "git lfs pull"),
    "gzip": (gzip.compress(b"content"), "compressed by gzip; decompress it"),
    "bzip2": (bz2.compress(b"content"), "compressed by bzip2; decompress it"),
    "xz": (lzma.compress(b"content"), "compressed by xz; decompress it"),
    "7z": (b"7z\xbc\xaf\x27\x1c\x00\x04", "compressed by 7z"), "rar": (b"Rar!\x1a\x07\x01\x00", "compressed by RAR"),
    "zstd": (b"\x28\xb5\x2f\xfd\x24\x07", "compressed by Zstandard"),
    "tar": (tar(), "a tar archive", "0.1.10", "unpack it"),
    "pax": (tar(format=tarfile.PAX_FORMAT), "a tar archive", "save it again"),
    "npz": (arrays(np.savez, a=np.ones(3)), "a NumPy archive (.npz)", "is expected"),
    "zip": (archive("readme.txt", "model.pt", "a", "b"), "a zip archive of readme.txt, model.pt, a, ...", "unpack it"),
    "empty zip": (archive(), "a zip archive of nothing"),
    "deeper": (archive("a/b/data.pkl"), "a zip archive of a/b/data.pkl, not a PyTorch file"),
    "TorchScript": (archive("m/data.pkl", "m/constants.pkl"), "a TorchScript program (torch.jit.save)", "state_dict()"),
    "TorchScript code": (archive("m/data.pkl", "m/code/__torch__/a.py"), "a TorchScript program"),
    "cut zip": (archive("archive/data.pkl")[:-5], "its end is missing; download it again"),
    "start of a zip": (b"PK\x03\x04" + bytes(100), "its end is missing; download it again"),
    "pickle 2": (pickle.dumps({"a": 1}, 2), "a bare pickle, not made by torch.save"),
    "pickle 4": (pickle.dumps({"a": 1}, 4), "a bare pickle"), "pickle 5": (pickle.dumps([1], 5), "a bare pickle"),
    "hdf5": (b"\x89HDF\r\n\x1a\n\x00\x00", "an HDF5 file, such as Keras writes"),
    "npy": (arrays(np.save, arr=np.ones((3, 2), np.float32)), "an .npy file of a plain float32 array of shape [3, 2]"),
    "records": (arrays(np.save, arr=np.zeros(2, [("a", "f4"), ("b", "i4")])), "an .npy file of a plain"),
    "cut npy": (arrays(np.save, arr=np.ones(3))[:40], "damaged"), "npy only": (b"\x93NUMPY", "damaged"),
    "json": (json.dumps({"model_type": "resnet"}).encode(), 'JSON that begins \'{"model_type": "resnet"}\''),
    "json list": (b" [1, 2]", "JSON that begins '[1, 2]'"),
    "text": ("Grüße, world".encode(), r"text that begins 'Gr\xfc\xdfe, world'"),
    "brace": (b"function{ return 1; }", "text that begins 'function{ return 1; }'"),
    "long text": (b"a" * 4095 + "ü".encode() + b"b", "text that begins 'aaaa"),
    "cut safetensors": (
        struct.pack("<Q", 500) + b'{"a":', "begins like a safetensors file but is truncated after 13 bytes; download it again"),
    "zeros": (bytes(5000), "begins with 4096 bytes of 0, as a download that has not finished does"),
    "binary": (
        b"\x08\x07\x12\xff\xfe\xf0\x00\x01\x02\x03", "10 bytes of an unknown format that begin with 08 07 12 ff fe f0 00 01"),
    "one byte": (b"\x80", "1 bytes of an unknown format"), "control": (b"\x00\x01abc", "unknown format"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_no_file_of_weights_is_called_what_it_is(tmp_path, what):
    path = tmp_path / "weights.pt"
    content, *mentions = FOREIGN[what]
    path.write_bytes(content)
    assert_input_error(lambda: recognition.kind(path), f"{path}: ", *mentions)


def test_paths_that_are_no_files_are_refused(tmp_path):
    assert_input_error(lambda: recognition.kind(tmp_path / "nowhere"), "nowhere: there is no such file", "torch.save")
    assert_input_error(lambda: recognition.kind(tmp_path), f"{tmp_path}: a directory; give the file of weights in it")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert_input_error(lambda: recognition.kind(tmp_path / "run"), "this is already a run directory")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    assert_input_error(lambda: recognition.kind(str(tmp_path / "other")), "this is already a run directory")
    os.mkfifo(tmp_path / "pipe")
    assert_input_error(lambda: recognition.kind(tmp_path / "pipe"), "neither a file nor a directory")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert_input_error(lambda: recognition.kind(tmp_path / "link"), "there is no such file")


@pytest.mark.filterwarnings("ignore")  # NumPy's, about headers that Python 2 might have written
@pytest.mark.parametrize("kind", GOOD)
def test_the_start_of_a_file_is_recognised_or_refused_on_one_line(tmp_path, kind):
    GOOD[kind](tmp_path / "a")
    content = (tmp_path / "a").read_bytes()
    generator = np.random.default_rng(0)
    path = tmp_path / "b"
    for trial in range(400):
        changed = bytearray(content[:trial % len(content)] if trial % 2 else content)
        for position in generator.integers(max(1, len(changed)), size=trial % 4):
            if position < len(changed):
                changed[position] ^= int(generator.integers(1, 256))
        path.write_bytes(changed)
        try:
            assert recognition.kind(path) in GOOD
        except InputError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
