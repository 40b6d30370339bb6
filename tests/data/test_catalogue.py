"""Preparing what TFDS knows: what is answered without TensorFlow, and (slow) the whole way with it, from stand-in archives."""

import configparser
import errno
import io
import json
import os
import pathlib
import shutil
import ssl
import subprocess
import sys
import tarfile
import venv

import numpy as np
import pytest
import requests
import scipy.io

from jaxrd.data import catalogue, preparation, tfds_reader
from jaxrd.data.array_builder import ArrayBuilder, split_of
from tests.support import assert_input_error

ROOT = pathlib.Path(__file__).parents[2]
GENERATOR = np.random.default_rng(0)
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"  # of cifar-10-binary.tar.gz, as TFDS has it


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise requests.ConnectionError("no network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("requests.sessions.Session.request", refuse)


@pytest.fixture
def as_if_tensorflow_were_there(monkeypatch, no_network):
    """What is refused before any of it is needed is refused alike with and without it."""
    monkeypatch.setattr(catalogue, "_need_tensorflow", lambda name: None)


def fail(directory, *mentions, **options):
    name = options.pop("name", "cifar10")
    assert_input_error(lambda: preparation.prepare_catalogue(name, directory, **options), *mentions)
    assert not directory.exists()


def test_without_tensorflow_it_says_how_to_get_it(tmp_path, monkeypatch, no_network):
    find = catalogue.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tensorflow" else find(name))
    fail(tmp_path / "data", "cifar10", "pip install 'jaxrd[prepare]'", "pip install -e '.[prepare]'")


@pytest.mark.parametrize("name, mentions", [
    ("cifar1O", ["did you mean 'cifar10'", "--npz"]),
    ("qqqqqq", ["unknown", "--npz"]),
    ("cifar10_1/v5", ["cifar10_1/v5", "v4, v6"]),
    ("cifar10_1/x*", ["cifar10_1/x*", "v4, v6"]),
    ("cifar10:1.0.0", ["cifar10:1.0.0"]),
    ("tiny_imagenet", ["--source", "http://cs231n.stanford.edu/tiny-imagenet-200.zip"]),
    ("imagenet2012", ["(None, None, 3)"]),
    ("imdb_reviews", ["'image' and 'label'"]),
])
def test_a_data_set_that_cannot_be_had_is_one_line(tmp_path, no_network, name, mentions):
    fail(tmp_path / "data", *mentions, name=name)


def test_a_server_that_does_not_answer_is_one_line(tmp_path, as_if_tensorflow_were_there):
    fail(tmp_path / "data", "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz cannot be reached", "170052171 bytes",
         SHA256, "--source=cifar-10-binary.tar.gz")


def _broken_by(error):
    """What requests makes of it while it reads an answer."""
    def fetch(self, resource):
        try:
            raise error
        except Exception as cause:
            raise requests.exceptions.ChunkedEncodingError(f"Connection broken: {cause!r}") from cause

    return fetch


BROKEN = [ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), TimeoutError(errno.ETIMEDOUT, "timed out"),
          ssl.SSLError(1, "[SSL: BAD] bad record"), requests.ConnectionError("Max retries exceeded")]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("error", BROKEN, ids=lambda error: type(error).__name__)
def test_a_download_that_breaks_off_is_no_full_disk(tmp_path, as_if_tensorflow_were_there, monkeypatch, error, wrapped):
    def fetch(self, resource):
        raise error

    monkeypatch.setattr(catalogue, "_unreachable", lambda url: "")
    monkeypatch.setattr("tensorflow_datasets.download.DownloadManager._download", _broken_by(error) if wrapped else fetch)
    fail(tmp_path / "data", "data set cifar10: the download broke off", str(error.args[-1]), "the same command goes on",
         "--source=", say=lambda line: None)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_download_that_cannot_be_written_is_the_disks_fault(tmp_path, as_if_tensorflow_were_there, monkeypatch, number):
    def fetch(self, resource):
        try:
            raise OSError(number, os.strerror(number))
        except OSError as cause:
            raise RuntimeError("in a thread of TFDS") from cause

    monkeypatch.setattr(catalogue, "_unreachable", lambda url: "")
    monkeypatch.setattr("tensorflow_datasets.download.DownloadManager._download", fetch)
    fail(tmp_path / "data", f"cifar10 cannot be written there ({os.strerror(number)})", "--data_dir", say=lambda line: None)


def test_other_errors_of_the_system_are_no_writing(tmp_path, as_if_tensorflow_were_there, monkeypatch):
    def fetch(self, resource):
        raise OSError(errno.ENOEXEC, "Exec format error")

    monkeypatch.setattr(catalogue, "_unreachable", lambda url: "")
    monkeypatch.setattr("tensorflow_datasets.download.DownloadManager._download", fetch)
    fail(tmp_path / "data", "TFDS cannot prepare it", "Exec format error", say=lambda line: None)


def test_a_source_that_is_missing_or_another_file_is_one_line(tmp_path, as_if_tensorflow_were_there):
    fail(tmp_path / "data", "nowhere", "no such file", source=tmp_path / "nowhere")
    (tmp_path / "cifar.tar.gz").write_bytes(b"x")
    fail(tmp_path / "data", "cifar10 is made from cifar-10-binary.tar.gz", source=tmp_path / "cifar.tar.gz")
    fail(tmp_path / "data", "cifar-10-binary.tar.gz (170052171 bytes", SHA256, "which is not there",
         "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", source=tmp_path)
    archive = tmp_path / "cifar-10-binary.tar.gz"
    archive.write_bytes(b"half of it")
    for source in (archive, tmp_path):
        fail(tmp_path / "data", f"{archive} is not the file that TFDS knows: it has 10 bytes", "170052171", SHA256,
             "get it again", source=source)
    assert archive.read_bytes() == b"half of it"


def test_what_is_prepared_already_needs_no_tensorflow(tmp_path, no_network):
    arrays = GENERATOR.integers(0, 256, (9, 32, 32, 3), dtype=np.uint8), np.arange(9)
    builder = ArrayBuilder("cifar10", (32, 32, 3), np.uint8, 10, data_dir=tmp_path / "x", file_format="array_record")
    path = builder.write({split: split_of(*arrays) for split in ("train", "test")}, lambda images: None)
    version = path.parents[1] / "cifar10" / "3.0.2"
    shutil.move(path, version)
    lines = []
    assert preparation.prepare_catalogue("cifar10", tmp_path / "x", say=lines.append) == [version]
    assert "prepared already" in lines[0] and not (version / "jaxrd.json").exists()


def test_the_digits_are_prepared_by_name(tmp_path, no_network):
    lines = []
    (path,) = preparation.prepare_catalogue("jaxrd_digits", tmp_path, say=lines.append)
    assert path == tmp_path / "jaxrd_digits" / "1.0.0" and "train 1,000, validation 197, test 600" in lines[1]
    assert json.loads((path / "jaxrd.json").read_text())["splits"]["test"]["examples"] == 600


# The whole way.

N = 20
DRIVER = """
import pathlib, sys
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums
from jaxrd.data import preparation
directory, archives, *names = sys.argv[1:]
for name in names:
    registered = tfds.builder_cls(name.split("/")[0]).url_infos
    for url, info in registered.items():
        registered[url] = checksums.compute_url_info(pathlib.Path(archives, info.filename))
    preparation.prepare_catalogue(name, directory, archives)
"""


def labelled(size, classes):
    return GENERATOR.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8), GENERATOR.integers(0, classes, size)


def as_binary(images, labels):
    """CIFAR's format: the label bytes, then the pixels channel by channel."""
    rows = labels.reshape(len(images), -1).tolist()
    return b"".join(bytes(row) + image.transpose(2, 0, 1).tobytes() for row, image in zip(rows, images))


def tar(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def stand_ins(place):
    """Writes archives with the published names and layouts, and returns what is in them."""
    place.mkdir()
    cifar10 = {"train": labelled(5 * N, 10), "test": labelled(N, 10)}
    batches = [tuple(array[part * N:(part + 1) * N] for array in cifar10["train"]) for part in range(5)]
    files = {f"data_batch_{part + 1}.bin": as_binary(*batch) for part, batch in enumerate(batches)}
    files |= {"test_batch.bin": as_binary(*cifar10["test"]), "batches.meta.txt": "\n".join(f"c{i}" for i in range(10)).encode()}
    tar(place / "cifar-10-binary.tar.gz", {f"cifar-10-batches-bin/{name}": content for name, content in files.items()})

    cifar100 = {"train": labelled(2 * N, 100), "test": labelled(N, 100)}
    files = {f"{split}.bin": as_binary(images, np.stack([labels // 5, labels], 1))
             for split, (images, labels) in cifar100.items()}
    files |= {f"{kind}_label_names.txt": "\n".join(f"{kind}{i}" for i in range(count)).encode()
              for kind, count in (("coarse", 20), ("fine", 100))}
    tar(place / "cifar-100-binary.tar.gz", {f"cifar-100-binary/{name}": content for name, content in files.items()})

    svhn = {split: labelled(N, 10) for split in ("train", "test", "extra")}
    for split, (images, labels) in svhn.items():
        numbers = np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)  # the published files call 0 ten
        scipy.io.savemat(place / f"{split}_32x32.mat", {"X": images.transpose(1, 2, 3, 0), "y": numbers})

    found = {"cifar10": cifar10, "cifar100": cifar100, "svhn_cropped": svhn}
    for config in ("v4", "v6"):
        found[f"cifar10_1/{config}"] = {"test": labelled(N, 10)}
        for part, array in zip(("data", "labels"), found[f"cifar10_1/{config}"]["test"]):
            np.save(place / f"cifar10.1_{config}_{part}.npy", array)
    return found


@pytest.fixture(scope="session")
def with_tensorflow(tmp_path_factory):
    """An interpreter that has TensorFlow, in an environment of its own."""
    place = tmp_path_factory.mktemp("tensorflow")
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lists = config["options"]["install_requires"], config["options.extras_require"]["prepare"]
    needed = [line for lines in lists for line in lines.splitlines() if line and not line.startswith("#")]
    done = subprocess.run([python, "-m", "pip", "install", "-q", *needed], text=True, capture_output=True)
    if done.returncode:
        pytest.skip(f"TensorFlow cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    yield python
    shutil.rmtree(place, ignore_errors=True)


@pytest.mark.slow
def test_prepared_with_tensorflow_and_read_without_the_pixels_are_equal(with_tensorflow, tmp_path):
    expected = stand_ins(tmp_path / "archives")
    names = ["cifar10", "cifar100", "svhn_cropped", "cifar10_1", "cifar10_1/*"]
    done = subprocess.run(
        [with_tensorflow, "-c", DRIVER, str(tmp_path / "data"), str(tmp_path / "archives"), *names], text=True, cwd=tmp_path,
        capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("prepared in") == 5 and done.stdout.count("prepared already") == 1, done.stdout
    assert "Traceback" not in done.stderr
    assert tfds_reader.names("cifar10_1/*", tmp_path / "data") == ["cifar10_1/v4", "cifar10_1/v6"]
    for name, splits in expected.items():
        found = tfds_reader.find(name, tmp_path / "data")
        assert set(found.splits) == set(splits) and found.classes == (100 if name == "cifar100" else 10)
        for split, (images, labels) in splits.items():
            there = found.read(split)
            assert isinstance(there[0], np.memmap)
            assert sorted((image.tobytes(), int(label)) for image, label in zip(*there)) == sorted(
                (image.tobytes(), int(label)) for image, label in zip(images, labels))
    assert tfds_reader.find("cifar10_1", tmp_path / "data").path == tfds_reader.find("cifar10_1/v4", tmp_path / "data").path
    assert "tensorflow" not in sys.modules
