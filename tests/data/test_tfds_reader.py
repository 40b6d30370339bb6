"""Finding prepared data sets by their metadata, and reading them through arrays that are decoded once."""

import concurrent.futures
import errno
import io
import json
import os
import shutil
import sys
import threading

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jaxrd.data import array_cache, open_dataset, tfds_reader
from jaxrd.data.array_builder import ArrayBuilder, OfflineInfo, split_of
from tests.support import assert_input_error

GENERATOR = np.random.default_rng(0)
SPLITS = {split: (GENERATOR.integers(0, 256, (size, 5, 4, 3), dtype=np.uint8), np.arange(size) % 3)
          for split, size in (("train", 30), ("test", 20))}


def write(directory, name="mine", splits=SPLITS):
    """Writes records and metadata, and nothing else that `launch.prepare` writes."""
    builder = ArrayBuilder(name, (5, 4, 3), np.uint8, 3, data_dir=directory, file_format="array_record")
    return builder.write({split: split_of(*arrays) for split, arrays in splits.items()}, lambda images: None)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("written")
    write(directory)
    return directory


@pytest.fixture
def path(written, tmp_path):
    """A copy of the data set, without kept arrays."""
    shutil.copytree(written, tmp_path / "data", ignore=shutil.ignore_patterns("arrays"))
    return tmp_path / "data" / "mine" / "1.0.0"


@pytest.fixture
def decoded(monkeypatch):
    """A list that grows by the name of every split that is decoded."""
    decode, splits = tfds_reader.Prepared._chunks, []

    def chunks(self, split):
        splits.append(split)
        return decode(self, split)

    monkeypatch.setattr(tfds_reader.Prepared, "_chunks", chunks)
    return splits


def read(path, split="train"):
    return tfds_reader.find("mine", path.parents[1]).read(split)


def assert_read(path, split="train"):
    images, labels = read(path, split)
    assert images.dtype == np.uint8 and labels.dtype == np.int64
    assert (images == SPLITS[split][0]).all() and (labels == SPLITS[split][1]).all()
    return images


def test_finding_reads_no_images(path, monkeypatch):
    for shard in path.glob("*array_record*"):
        shard.unlink()
    found = tfds_reader.find("mine", path.parents[1])
    assert (found.name, found.path, found.image_shape, found.classes) == ("mine", path, (5, 4, 3), 3)
    assert found.splits == {"train": 30, "test": 20} and found.dtype == np.uint8
    assert_input_error(lambda: found.read("train"), str(path), "delete this directory")
    assert_input_error(found.check, str(path), "mine-train.array_record-00000-of-00001 is missing")


def test_the_order_is_that_of_the_records_and_later_reads_decode_nothing(path, decoded):
    assert_read(path), assert_read(path, "test")
    images = assert_read(path)
    assert_read(path, "test")
    assert decoded == ["train", "test"]
    assert isinstance(images, np.memmap) and not images.flags.writeable
    names = {"train_images.npy", "train_labels.npy", "train.json", "test_images.npy", "test_labels.npy", "test.json"}
    assert {file.name for file in (path / "arrays").iterdir()} == names
    # Anybody's NumPy opens them.
    assert (np.load(path / "arrays" / "train_images.npy") == SPLITS["train"][0]).all()
    assert (np.load(path / "arrays" / "train_labels.npy") == SPLITS["train"][1]).all()


def test_more_examples_than_fit_in_one_file_or_chunk_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxrd.data.array_builder._SHARD", 20_000)
    images = GENERATOR.integers(0, 256, (2345, 5, 4, 3), dtype=np.uint8)
    labels = GENERATOR.integers(0, 3, 2345)
    path = write(tmp_path, splits={"train": (images, labels)})
    assert len(list(path.glob("mine-train*"))) == 8
    there = tfds_reader.find("mine", tmp_path).read("train")
    assert (there[0] == images).all() and (there[1] == labels).all()


@pytest.mark.parametrize("file", ["records", "time", "dataset_info.json", "features.json"])
def test_arrays_of_other_records_are_made_anew(path, decoded, file):
    assert_read(path), assert_read(path, "test")
    (shard,) = path.glob("mine-train*")
    if file == "records":
        other = {"train": (255 - SPLITS["train"][0], SPLITS["train"][1]), "test": SPLITS["test"]}
        shutil.copy(write(path.parents[2] / "other", splits=other) / shard.name, shard)
    elif file == "time":
        os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    else:
        (path / file).write_text((path / file).read_text() + "\n")
    images, _ = read(path)
    assert (images == (255 - SPLITS["train"][0] if file == "records" else SPLITS["train"][0])).all()
    assert decoded == ["train", "test", "train"]
    assert_read(path, "test")
    assert decoded[3:] == ([] if file in ("records", "time") else ["test"])


def _cut(file):
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "cut": _cut,
    "one byte more": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "header only": lambda file: file.write_bytes(file.read_bytes()[:128]),
    "no header": lambda file: file.write_bytes(b"x" * file.stat().st_size),
    "another shape": lambda file: np.save(file, np.load(file)[:-1]),
    "another dtype": lambda file: np.save(file, np.load(file).view(np.int8 if "images" in file.name else np.uint64)),
    "another order": lambda file: np.save(file, np.asfortranarray(np.load(file))),
}


@pytest.mark.parametrize("damage, name", [
    (damage, f"train_{part}.npy") for damage in DAMAGES for part in ("images", "labels")
    if (damage, part) != ("another order", "labels")])
def test_arrays_that_are_cut_or_have_another_form_are_made_anew(path, decoded, damage, name):
    assert_read(path)
    file = path / "arrays" / name
    content = file.read_bytes()
    DAMAGES[damage](file)
    assert_read(path)
    assert decoded == ["train", "train"] and file.read_bytes() == content


def with_sums(path):
    sums = {file.name: tfds_reader.files.sha256(file) for file in path.glob("*array_record*")}
    (path / "checksums.json").write_text(json.dumps(sums))


def test_a_copy_with_other_times_decodes_nothing_where_there_are_checksums(path, decoded, tmp_path):
    with_sums(path)
    assert_read(path)
    copy = tmp_path / "copy" / "mine" / "1.0.0"
    shutil.copytree(path, copy, copy_function=shutil.copyfile)
    for place in (path, copy):
        for file in place.glob("*array_record*"):
            os.utime(file, ns=(0, 1))
        assert isinstance(assert_read(place), np.memmap)
    assert decoded == ["train"]


@pytest.mark.parametrize("content", ["{", "[3]", "3"])
def test_checksums_that_cannot_be_read_are_one_line(path, content):
    (path / "checksums.json").write_text(content)
    assert_input_error(lambda: read(path), str(path), "delete this directory")


def test_a_file_system_without_maps_keeps_the_arrays_all_the_same(path, decoded, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr("mmap.mmap", refuse)
    for _ in range(2):
        images = assert_read(path)
        assert not isinstance(images, np.memmap) and not images.flags.writeable
    assert decoded == ["train"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"fingerprint": 3}'])
def test_a_damaged_mark_is_none(path, decoded, content):
    assert_read(path)
    (path / "arrays" / "train.json").write_text(content)
    assert_read(path)
    assert decoded == ["train", "train"]


def test_where_nothing_can_be_written_the_arrays_stay_in_memory_and_it_says_so_once(path, capsys):
    (path / "arrays").write_text("in the way")
    for split in ("train", "train", "test"):
        assert not isinstance(assert_read(path, split), np.memmap)
    assert (path / "arrays").read_text() == "in the way"
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert f"{path}/arrays" in said.err and "File exists" in said.err and "every start" in said.err


@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "array_cache._write_header"])
def test_a_full_disk_leaves_nothing_and_the_arrays_in_memory(path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"jaxrd.data.array_cache.{call}" if call.startswith("os") else f"jaxrd.data.{call}", full)
        assert not isinstance(assert_read(path), np.memmap)
    assert list((path / "arrays").iterdir()) == []
    assert isinstance(assert_read(path), np.memmap)


def test_damaged_records_are_no_full_disk(path, monkeypatch, decoded):
    def damaged(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("tensorflow_datasets.core.data_sources.base.BaseDataSource.__getitems__", damaged)
    assert_input_error(lambda: read(path), str(path), "Input/output error", "delete this directory")
    assert list((path / "arrays").iterdir()) == [] and decoded == ["train"]


def test_of_several_threads_one_decodes(path, decoded):
    meeting = threading.Barrier(8)

    def meet(_):
        meeting.wait()
        return assert_read(path)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(isinstance(images, np.memmap) for images in pool.map(meet, range(8)))
    assert decoded == ["train"]


def test_what_a_killed_process_left_is_removed(path):
    left = path / "arrays" / ".train.unfinished-xyz"
    left.mkdir(parents=True)
    (left / "train_images.npy").write_bytes(b"half")
    (path / "arrays" / ".train.lock").write_text("process 1 on a machine that is gone")
    assert_read(path)
    assert {file.name for file in (path / "arrays").iterdir()} == {"train_images.npy", "train_labels.npy", "train.json"}


def test_records_that_are_not_those_of_their_checksums_are_refused(path):
    (shard,) = path.glob("mine-train*")
    with_sums(path)
    assert_read(path)
    shutil.rmtree(path / "arrays")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1  # nothing that a decoder would look at
    shard.write_bytes(content)
    assert_input_error(lambda: read(path), str(shard), "checksums.json", "delete this directory")
    assert_read(path, "test")


def test_a_record_file_with_fewer_examples_is_refused(path, tmp_path):
    images, labels = SPLITS["train"]
    other = write(tmp_path / "other", splits={"train": (images[:20], labels[:20])})
    (shard,) = path.glob("mine-train*")
    shutil.copy(other / shard.name, shard)
    assert_input_error(lambda: read(path), str(path), "delete this directory")
    assert list((path / "arrays").iterdir()) == []


def test_there_need_be_no_train_but_only_the_splits_there_are(tmp_path):
    write(tmp_path, splits={"test": SPLITS["test"]})
    found = tfds_reader.find("mine", tmp_path)
    assert found.splits == {"test": 20}
    assert_input_error(lambda: found.read("train"), "mine", '"train"', "known: test")


def test_a_pattern_stands_for_prepared_data_sets(tmp_path):
    for name in ("mine", "mint", "other"):
        write(tmp_path, name)
    for config in ("fog_1", "fog_2"):
        shutil.copytree(tmp_path / "mine", tmp_path / "corrupted" / config)
    shutil.copytree(tmp_path / "mine", tmp_path / ".hidden")
    (tmp_path / "downloads" / "x").mkdir(parents=True)
    assert tfds_reader.names("mine", tmp_path) == ["mine"]
    assert tfds_reader.names("mi*", tmp_path) == ["mine", "mint"]
    assert tfds_reader.names("*", tmp_path) == ["mine", "mint", "other"]
    assert tfds_reader.names("corrupted/*", tmp_path) == ["corrupted/fog_1", "corrupted/fog_2"]
    assert tfds_reader.names("corrupted/fog_[2-9]", tmp_path) == ["corrupted/fog_2"]
    assert_input_error(lambda: tfds_reader.names("theirs*", tmp_path), "theirs*", "not prepared")
    assert_input_error(lambda: tfds_reader.names("theirs", tmp_path), "theirs", "not prepared")
    assert_input_error(
        lambda: tfds_reader.names("cifar10_corrupted/*", tmp_path),
        f"python -m launch.prepare --dataset='cifar10_corrupted/*' --data_dir={tmp_path}")


MOCKED = {"cifar10": ((32, 32, 3), 10), "cifar100": ((32, 32, 3), 100), "svhn_cropped": ((32, 32, 3), 10),
          "cifar10_1": ((32, 32, 3), 10), "cifar10_corrupted/fog_3": ((32, 32, 3), 10), "tiny_imagenet": ((64, 64, 3), 200),
          "jaxrd_digits": ((8, 8, 1), 10)}


@pytest.mark.parametrize("name", MOCKED)
def test_mocked_data_sets_are_there_and_leave_nothing(tmp_path, name):
    with tfds.testing.mock_data(num_examples=7):
        found = tfds_reader.find(name, tmp_path)
        assert (found.image_shape, found.classes) == MOCKED[name]
        assert found.splits == ({"test": 7} if name.startswith("cifar10_") else {"train": 7, "test": 7})
        for split in found.splits:
            images, labels = found.read(split)
            assert images.shape == (7, *found.image_shape) and images.dtype == np.uint8 and images.std() > 1
            assert labels.dtype == np.int64 and labels.min() >= 0 and labels.max() < found.classes
        if "train" in found.splits:
            assert len(open_dataset(name, directory=tmp_path, validation_fraction=0.3).train) == 5
    assert not list(tmp_path.iterdir()) and "tensorflow" not in sys.modules


def test_mocked_patterns_and_names_that_are_not_there():
    with tfds.testing.mock_data(num_examples=2):
        assert len(tfds_reader.names("cifar10_corrupted/*")) == 95
        assert tfds_reader.names("cifar10_corrupted/fog_[12]") == ["cifar10_corrupted/fog_1", "cifar10_corrupted/fog_2"]
        assert_input_error(lambda: tfds_reader.find("cifar10_corrupted/nope"), "not prepared")
        assert_input_error(lambda: tfds_reader.find("mine"), "mine", "--npz")
        assert_input_error(lambda: tfds_reader.names("mine*"), "mine*", "--npz")


def test_a_mocked_data_set_is_none_afterwards(tmp_path):
    with tfds.testing.mock_data(num_examples=2):
        tfds_reader.find("cifar10", tmp_path)
    assert_input_error(lambda: tfds_reader.find("cifar10", tmp_path), "not prepared")


def test_a_data_set_stored_in_another_format(path):
    info = json.loads((path / "dataset_info.json").read_text())
    (path / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    assert_input_error(lambda: tfds_reader.find("mine", path.parents[1]), "tfrecord", "array_record", "--data_dir")


class PngImages(tfds.core.GeneratorBasedBuilder):
    """Three images per split, encoded as the catalogue's are; `shape` is what the features declare."""

    VERSION = tfds.core.Version("1.0.0")
    shape = (6, 5, 3)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 6, 5, 3), dtype=np.uint8)

    def _info(self):
        image, label = tfds.features.Image(shape=self.shape), tfds.features.ClassLabel(names=["a", "b", "c"])
        return OfflineInfo(builder=self, features=tfds.features.FeaturesDict({"image": image, "label": label}))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
        for label, pixels in enumerate(self.pixels):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "png")
            file.seek(0)
            yield label, {"image": file, "label": label}


def test_encoded_images_are_decoded(tmp_path):
    PngImages(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    for _ in range(2):
        images, labels = tfds_reader.find("png_images", tmp_path).read("test")
        assert images.shape == (3, 6, 5, 3) and sorted(labels) == [0, 1, 2]
        assert (images == PngImages.pixels[labels]).all()


def test_images_of_many_sizes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(PngImages, "shape", (None, None, 3))
    PngImages(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    assert_input_error(lambda: tfds_reader.find("png_images", tmp_path), "(None, None, 3)", "data.arrays")


@pytest.mark.parametrize(
    "name, mentions",
    [
        ("cifar10", ["not prepared", "python -m launch.prepare --dataset=cifar10 --data_dir=", "data.arrays"]),
        ("cifar10:3.0.2", ["not prepared", "--dataset=cifar10:3.0.2"]),
        ("tiny_imagenet", ["not prepared", "--dataset=tiny_imagenet --source=tiny-imagenet-200.zip"]),
        ("cifar1O", ["did you mean 'cifar10'", "python -m launch.prepare --npz=train.npz,test.npz --name=cifar1O"]),
        ("jaxrd_digit", ["did you mean 'jaxrd_digits'"]),
        ("qqqqqq", ["unknown", "data.arrays", "--npz=train.npz,test.npz --name=qqqqqq --data_dir="]),
        ("huggingface:mnist", ["data.arrays"]),
        ("../mnist", ["'../mnist'"]),
        ("", ["''"]),
    ],
)
def test_a_data_set_that_is_not_there_fails_at_once(written, monkeypatch, name, mentions):
    def no_network(*_):
        raise AssertionError("asked the network")

    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setattr("tensorflow_datasets.core.utils.gcs_utils.exists", no_network)
    assert_input_error(lambda: tfds_reader.find(name, written), *mentions)


def test_the_command_names_no_directory_where_it_is_the_usual_one(monkeypatch, tmp_path):
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    for directory in (None, tmp_path):
        assert_input_error(lambda: tfds_reader.find("cifar10", directory), "launch.prepare --dataset=cifar10, or")


def test_the_fingerprint_is_that_of_the_split(path):
    shards = sorted(path.glob("mine-*"))
    sums = {shard.name: tfds_reader.files.sha256(shard) for shard in shards}
    before = {shard.name: array_cache.fingerprint(path, [shard], {}) for shard in shards}
    summed = {shard.name: array_cache.fingerprint(path, [shard], sums) for shard in shards}
    os.utime(shards[0], ns=(0, 1))
    first, second = ({shard.name: array_cache.fingerprint(path, [shard], each) for shard in shards} for each in ({}, sums))
    assert first[shards[0].name] != before[shards[0].name] and first[shards[1].name] == before[shards[1].name]
    assert second == summed
    assert array_cache.fingerprint(path, [shards[0]], {shards[0].name: "another"}) != summed[shards[0].name]
    _cut(shards[0])
    assert array_cache.fingerprint(path, [shards[0]], sums) != summed[shards[0].name]
