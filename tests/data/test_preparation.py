"""Preparing arrays and class folders: what comes back, what is refused, and what an interruption or a full disk leaves."""

import concurrent.futures
import errno
import hashlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from jaxrd.data import array_builder, open_dataset, preparation, publication, tfds_reader
from jaxrd.errors import InputError
from tests.support import assert_input_error

ROOT = pathlib.Path(__file__).parents[2]
GENERATOR = np.random.default_rng(0)


def arrays(size, dtype=np.uint8, shape=(6, 5, 3), classes=3):
    images = GENERATOR.integers(0, 256, (size, *shape), dtype=np.uint8)
    if dtype != np.uint8:
        images = (images / 255).astype(dtype)
    return images, GENERATOR.permutation(np.arange(size) % classes)


SPLITS = {"test": arrays(20), "train": arrays(30)}


def everything(directory):
    return {path.relative_to(directory).as_posix(): path.read_bytes() if path.is_file() else None
            for path in directory.rglob("*")}


def says():
    lines = []
    return lines, lines.append


def assert_prepared(directory, splits, name="mine"):
    found = tfds_reader.find(name, directory)
    assert found.splits == {split: len(labels) for split, (_, labels) in splits.items()}
    for split, (images, labels) in splits.items():
        there = found.read(split)
        assert isinstance(there[0], np.memmap) and there[0].dtype == images.dtype
        assert (there[0] == images).all() and (there[1] == labels).all()
    assert [path.name for path in directory.iterdir()] == [name]  # neither lock nor workplace


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("shape", [(6, 5, 3), (4, 4, 1)])
def test_arrays_come_back_in_their_order(tmp_path, dtype, shape, monkeypatch):
    splits = {split: arrays(size, dtype, shape) for split, size in (("train", 1201), ("validation", 7), ("test", 33))}
    path = preparation.prepare_arrays("mine", splits, tmp_path, lambda line: None)
    assert path == tmp_path / "mine" / "1.0.0"
    assert_prepared(tmp_path, splits)
    data = open_dataset("mine", directory=tmp_path)
    assert (np.asarray(data.train.images) == splits["train"][0]).all() and (data.test.labels == splits["test"][1]).all()
    # The records hold the same as the arrays beside them.
    for file in (path / "arrays").iterdir():
        file.unlink()
    assert_prepared(tmp_path, splits)


def test_what_was_prepared_is_never_decoded_again_even_on_another_disk(tmp_path, monkeypatch):
    path = preparation.prepare_arrays("mine", SPLITS, tmp_path / "data", lambda line: None)
    monkeypatch.setattr(tfds_reader.Prepared, "_chunks", lambda self, split: pytest.fail("decoded"))
    assert_prepared(tmp_path / "data", SPLITS)
    shutil.copytree(path, tmp_path / "copy" / "mine" / "1.0.0", copy_function=shutil.copyfile)
    for file in (tmp_path / "copy").glob("*/*/*"):
        os.utime(file, ns=(0, 1))
    assert_prepared(tmp_path / "copy", SPLITS)


def test_float64_is_kept_as_float32(tmp_path):
    splits = {split: arrays(9, np.float64) for split in ("train", "test")}
    preparation.prepare_arrays("mine", splits, tmp_path, lambda line: None)
    assert_prepared(tmp_path, {split: (images.astype(np.float32), labels) for split, (images, labels) in splits.items()})


def test_the_description_and_the_checksums_are_those_of_the_data(tmp_path):
    path = preparation.prepare_arrays("mine", SPLITS, tmp_path, lambda line: None, paths=("a.npz", "b.npz"))
    description = json.loads((path / "jaxrd.json").read_text())
    assert description["origin"]["kind"] == "arrays" and description["origin"]["paths"] == ["a.npz", "b.npz"]
    for split, (images, labels) in SPLITS.items():
        there = description["splits"][split]
        assert there["examples"] == len(labels)
        assert there["label_histogram"] == {str(label): int((labels == label).sum()) for label in range(3)}
        np.testing.assert_allclose(there["channel_means"], (images / 255).mean((0, 1, 2)), rtol=1e-12)
        assert there["sha256"] == {"images": hashlib.sha256(images.tobytes()).hexdigest(),
                                   "labels": hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()}
    sums = json.loads((path / "checksums.json").read_text())
    assert sums == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.glob("mine-*")} and len(sums) == 2


def test_it_says_where_the_data_set_is_and_how_to_use_it(tmp_path, monkeypatch):
    lines, say = says()
    path = preparation.prepare_arrays("mine", SPLITS, tmp_path, say)
    text = "\n".join(lines)
    for part in (str(path), "train 30", "test 20", "6x5x3", "uint8", "3 classes", " MB",
                 f"--config.data.name=mine --config.data.directory={tmp_path}"):
        assert part in text, text
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path / "usual"))
    lines, say = says()
    preparation.prepare_arrays("mine", SPLITS, None, say)
    assert lines[-1].endswith("--config.data.name=mine")


def test_the_same_again_changes_nothing(tmp_path):
    preparation.prepare_arrays("mine", SPLITS, tmp_path, lambda line: None)
    before = everything(tmp_path)
    lines, say = says()
    # In another order and of another integer type, but the same data.
    again = {split: (images.copy(), labels.astype(np.uint8)) for split, (images, labels) in reversed(SPLITS.items())}
    preparation.prepare_arrays("mine", again, tmp_path, say)
    assert "prepared already" in lines[0] and everything(tmp_path) == before


@pytest.mark.parametrize("change", ["pixel", "label", "split", "dtype"])
def test_another_source_of_the_same_name_is_refused(tmp_path, change):
    path = preparation.prepare_arrays("mine", SPLITS, tmp_path, lambda line: None, paths=("first.npz",))
    before = everything(tmp_path)
    images, labels = (array.copy() for array in SPLITS["test"])
    if change == "pixel":
        images[3, 2, 1, 0] ^= 1
    elif change == "label":
        labels[3] = (labels[3] + 1) % 3
    other = {**SPLITS, "test": (images, labels)}
    if change == "split":
        other["validation"] = SPLITS["test"]
    elif change == "dtype":
        other = {split: (images / np.float32(255), labels) for split, (images, labels) in SPLITS.items()}
    assert_input_error(lambda: preparation.prepare_arrays("mine", other, tmp_path), str(path), "first.npz", "--name")
    assert everything(tmp_path) == before


def test_a_damaged_data_set_of_this_name_says_what_to_delete(tmp_path):
    path = preparation.prepare_arrays("mine", SPLITS, tmp_path, lambda line: None)
    (shard,) = path.glob("mine-test*")
    shard.rename(tmp_path / "away")
    assert_input_error(lambda: preparation.prepare_arrays("mine", SPLITS, tmp_path), f"{shard.name} is missing", "delete")
    (tmp_path / "away").rename(shard)
    for file in ("jaxrd.json", "dataset_info.json"):
        (path / file).write_text("{")
        assert_input_error(lambda: preparation.prepare_arrays("mine", SPLITS, tmp_path), str(path), "delete")


@pytest.mark.parametrize(
    "name", ["mine-train.array_record-00000-of-00001", "arrays/train_images.npy", "arrays/test_labels.npy"])
def test_one_bit_that_is_not_as_it_was_prepared_says_what_to_delete(tmp_path, name):
    path = preparation.prepare_arrays("mine", SPLITS, tmp_path, lambda line: None)
    times = path.joinpath(name).stat()
    content = bytearray(path.joinpath(name).read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.joinpath(name).write_bytes(content)
    os.utime(path / name, ns=(times.st_atime_ns, times.st_mtime_ns))
    lines, say = says()
    assert_input_error(
        lambda: preparation.prepare_arrays("mine", SPLITS, tmp_path, say), str(path), "delete this directory and prepare")
    assert lines == []


def test_images_to_mix_in_need_no_test_part(tmp_path):
    splits = {"train": SPLITS["train"]}
    for dtype in (np.uint8, np.float32):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(splits, "train", arrays(30, dtype))
            lines, say = says()
            preparation.prepare_arrays("mine", splits, tmp_path / str(np.dtype(dtype)), say)
            assert_prepared(tmp_path / str(np.dtype(dtype)), splits)
        assert f"--config.data.extra=mine --config.data.directory={tmp_path}" in lines[-1]
    assert "data.name" not in "".join(lines)


def test_writing_counts_every_image(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxrd.data.array_builder._SHARD", 20_000)
    counted, splits = [], {"train": arrays(1230), "validation": arrays(500), "test": arrays(7)}
    builder = preparation.ArrayBuilder("mine", (6, 5, 3), np.uint8, 3, data_dir=tmp_path, file_format="array_record")
    builder.write({split: preparation.split_of(*each) for split, each in splits.items()}, counted.append)
    assert counted == [500, 500, 230, 500, 7]


def test_more_images_or_labels_than_a_split_says_are_not_written(tmp_path):
    images, labels = arrays(20)
    for size, pair in ((19, (images, labels)), (20, (images, labels[:-1])), (20, (images, np.append(labels, 0)))):
        builder = preparation.ArrayBuilder("mine", (6, 5, 3), np.uint8, 3, data_dir=tmp_path, file_format="array_record")
        with pytest.raises(ValueError):
            builder.write({"train": array_builder.Split(size, lambda pair=pair: [pair])}, lambda images: None)


NAMES = {**dict.fromkeys(["", "Mine", "my-images", "3d", "a__b", "../x", "mine/x"], "small letters"),
         **{name: f"my_{name}" for name in ("cifar10", "tiny_imagenet", "jaxrd_digits", "downloads")}}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_tfds_cannot_take_or_has_are_refused(tmp_path, name):
    directory = tmp_path / "data"
    for prepare in (lambda: preparation.prepare_arrays(name, SPLITS, directory),
                    lambda: preparation.prepare_folder(name, tmp_path, directory)):
        assert_input_error(prepare, f'"{name}"', NAMES[name])
    assert not directory.exists()


def without(label):
    images, labels = SPLITS["train"]
    return images[labels != label], labels[labels != label]


BAD_ARRAYS = {
    "no test": ({"train": SPLITS["train"], "validation": SPLITS["test"]}, ["['train', 'validation']", "train alone"]),
    "no train": ({"test": SPLITS["test"]}, ["['test']", "train"]),
    "unknown split": ({**SPLITS, "dev": SPLITS["test"]}, ['"dev"', "validation"]),
    "labels beyond the classes": ({**SPLITS, "test": (SPLITS["test"][0], SPLITS["test"][1] + 1)}, ["mine/test", "[0, 3)"]),
    "labels from 1": ({**SPLITS, "train": (SPLITS["train"][0], SPLITS["train"][1] + 1)}, ["mine/train", "label 0"]),
    "negative labels": ({**SPLITS, "train": (SPLITS["train"][0], SPLITS["train"][1] - 1)}, ["mine/train", "-1"]),
    "a class without images": ({**SPLITS, "train": without(1)}, ["mine/train", "label 1"]),
    "mixed shapes": ({**SPLITS, "test": arrays(20, shape=(6, 6, 3))}, ["shape (6, 5, 3)", "mine/test", "(6, 6, 3)"]),
    "mixed dtypes": ({**SPLITS, "test": arrays(20, np.float32)}, ["dtype uint8", "mine/test", "float32"]),
    "fewer labels": ({**SPLITS, "test": (SPLITS["test"][0], SPLITS["test"][1][1:])}, ["mine/test", "19 labels"]),
    "wrong range": ({**SPLITS, "test": (SPLITS["test"][0].astype(np.float32), SPLITS["test"][1])}, ["mine/test", "0..255"]),
    "no channel": ({**SPLITS, "test": (SPLITS["test"][0][..., 0], SPLITS["test"][1])}, ["mine/test", "[..., None]"]),
}


@pytest.mark.parametrize("mistake", BAD_ARRAYS)
def test_bad_arrays_are_one_line_and_leave_nothing(tmp_path, mistake):
    splits, mentions = BAD_ARRAYS[mistake]
    assert_input_error(lambda: preparation.prepare_arrays("mine", splits, tmp_path / "data"), *mentions)
    assert not (tmp_path / "data").exists()


# Class folders.


def picture(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path):
    """Three classes; 7 images of each to train, 2 to test: PNG, so that the pixels are exact."""
    folder, pixels = tmp_path / "photos", {}
    for place, count in (("train", 7), ("test", 2)):
        for name in ("b", "a", "c"):
            for index in range(count):
                path = f"{place}/{name}/{index}.png"
                pixels[path] = GENERATOR.integers(0, 256, (8, 9, 3), dtype=np.uint8)
                picture(folder / path, pixels[path])
    return folder, pixels


def as_splits(pixels, rename=lambda place: place):
    splits = {}
    for path in sorted(pixels):
        place, name, _ = path.split("/")
        images, labels = splits.setdefault(rename(place), ([], []))
        images.append(pixels[path]), labels.append("abc".index(name))
    return {split: (np.stack(images), np.array(labels)) for split, (images, labels) in splits.items()}


def test_class_folders_come_back_in_the_order_of_their_paths_with_the_names_of_the_classes(tmp_path, folder):
    folder, pixels = folder
    for path in ("val/c/x.png", "val/a/deep/y.png"):
        pixels[path.replace("deep/", "")] = GENERATOR.integers(0, 256, (8, 9, 3), dtype=np.uint8)
        picture(folder / path, pixels[path.replace("deep/", "")])
    (folder / "train" / ".hidden").write_text("")
    (folder / "train" / "a" / ".DS_Store").write_text("")
    path = preparation.prepare_folder("mine", folder, tmp_path / "data", say=lambda line: None)
    splits = as_splits(pixels, lambda place: "validation" if place == "val" else place)
    assert_prepared(tmp_path / "data", splits)
    assert (path / "label.labels.txt").read_text().split() == ["a", "b", "c"]
    assert json.loads((path / "jaxrd.json").read_text())["origin"]["paths"] == [str(folder)]


def test_other_modes_become_rgb(tmp_path, folder):
    folder, pixels = folder
    grey = GENERATOR.integers(0, 256, (8, 9), dtype=np.uint8)
    picture(folder / "train/a/0.png", grey)
    pixels["train/a/0.png"] = np.repeat(grey[..., None], 3, axis=2)
    picture(folder / "train/a/1.png", np.dstack([pixels["train/a/1.png"], np.full((8, 9), 255, np.uint8)]))
    preparation.prepare_folder("mine", folder, tmp_path / "data", say=lambda line: None)
    assert_prepared(tmp_path / "data", as_splits(pixels))


def test_images_are_resized_when_that_is_asked_for(tmp_path, folder):
    folder, pixels = folder
    picture(folder / "train/b/0.png", GENERATOR.integers(0, 256, (20, 33, 3), dtype=np.uint8))
    picture(folder / "train/b/1.png", np.full((40, 17, 3), 77, np.uint8))
    preparation.prepare_folder("mine", folder, tmp_path / "data", image_size=4, say=lambda line: None)
    found = tfds_reader.find("mine", tmp_path / "data")
    images, _ = found.read("train")
    assert found.image_shape == (4, 4, 3) and (images[8] == 77).all()
    # Antialiased: the mean stays, and no pixel is simply taken over.
    original = pixels["train/a/0.png"]
    assert abs(images[0].mean() - original.mean()) < 6
    assert images[0].std() < 0.8 * original.std()


def _no_test(folder):
    (folder / "test").rename(folder / "tset")


def _cut_image(folder):
    file = folder / "train/b/3.png"
    file.write_bytes(file.read_bytes()[:60])


BAD_FOLDERS = {
    "no test": (_no_test, ["photos", "train, tset", "test"]),
    "two validations": (lambda folder: [(folder / name).mkdir() for name in ("val", "validation")], ["val and validation"]),
    "mixed sizes": (lambda folder: picture(folder / "test/c/1.png", np.zeros((9, 8, 3), np.uint8)),
                    ["test/c/1.png is 8x9", "train/a/0.png 9x8", "--image_size"]),
    "a damaged image": (_cut_image, ["train/b/3.png", "cannot be read"]),
    "no image": (lambda folder: (folder / "train/a/notes.txt").write_text("hello"), ["train/a/notes.txt", "remove it"]),
    "16 bits": (lambda folder: picture(folder / "train/a/0.png", np.full((8, 9), 3000, np.uint16)), ["a/0.png", "8 bits"]),
    "an empty class": (lambda folder: (folder / "train/d").mkdir(), ["train/d", "no images"]),
    "an empty class of test": (lambda folder: [path.unlink() for path in (folder / "test/b").iterdir()], ["test/b", "no im"]),
    "a class that train lacks": (lambda folder: picture(folder / "test/d/0.png", np.zeros((8, 9, 3), np.uint8)),
                                 ["test/d", "train has no class d"]),
    "an image in no class": (lambda folder: picture(folder / "train/x.png", np.zeros((8, 9, 3), np.uint8)), ["train/x.png"]),
}


@pytest.mark.parametrize("mistake", BAD_FOLDERS)
def test_bad_folders_are_one_line_and_leave_nothing(tmp_path, folder, mistake):
    folder, _ = folder
    spoil, mentions = BAD_FOLDERS[mistake]
    spoil(folder)
    assert_input_error(lambda: preparation.prepare_folder("mine", folder, tmp_path / "data", say=lambda line: None), *mentions)
    assert not (tmp_path / "data").exists()


def test_a_folder_that_is_not_there(tmp_path):
    assert_input_error(lambda: preparation.prepare_folder("mine", tmp_path / "photos", tmp_path), "photos", "no such folder")


def test_a_changed_folder_is_another_source(tmp_path, folder):
    folder, _ = folder
    preparation.prepare_folder("mine", folder, tmp_path / "data", say=lambda line: None)
    lines, say = says()
    preparation.prepare_folder("mine", folder, tmp_path / "data", say=say)
    assert "prepared already" in lines[0]
    assert_input_error(lambda: preparation.prepare_folder("mine", folder, tmp_path / "data", 4), str(folder), "--name")
    os.utime(folder / "train/a/0.png", ns=(0, 1))
    for size in (None, 4):
        assert_input_error(lambda: preparation.prepare_folder("mine", folder, tmp_path / "data", size), str(folder), "--name")


# Interruptions, several at once, disks.


def in_process(code, *arguments):
    command = [sys.executable, "-c", "import sys\nfrom jaxrd.data import preparation, image_files, publication\n" + code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, *map(str, arguments)], cwd=ROOT, text=True, **pipes)


SLOW_FOLDER = """
import time
image_files.CHUNK = 4
decode = image_files._decode
def slow(sources, path, *rest, **options):
    if path == "test/a/0.png":
        print("decoded", flush=True)
        time.sleep(60)
    return decode(sources, path, *rest, **options)
image_files._decode = slow
preparation.prepare_folder("mine", sys.argv[1], sys.argv[2], say=lambda line: None)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_after_an_interruption_the_same_command_goes_on_where_it_stopped(tmp_path, folder, how, monkeypatch):
    folder, pixels = folder
    process = in_process(SLOW_FOLDER.replace("time.sleep(60)", "import signal, threading\n"
                         "        signal.raise_signal(int(sys.argv[3])) if sys.argv[3] == '9' else "
                         "signal.pthread_kill(threading.main_thread().ident, int(sys.argv[3]))"),
                         folder, tmp_path / "data", int(how))
    process.communicate(timeout=120)
    assert process.returncode != 0
    left = everything(tmp_path / "data")
    assert not any(path.startswith("mine") and content for path, content in left.items())
    assert len([path for path in left if path.startswith(".mine.preparing/kept/train")]) >= 5
    monkeypatch.setattr("jaxrd.data.image_files.CHUNK", 4)
    decoded = []
    decode = preparation.image_files._decode
    monkeypatch.setattr(preparation.image_files, "_decode", lambda sources, path, *rest, **options: (
        decoded.append(path), decode(sources, path, *rest, **options))[1])
    lines, say = says()
    preparation.prepare_folder("mine", folder, tmp_path / "data", say=say)
    assert_prepared(tmp_path / "data", as_splits(pixels))
    assert "goes on after" in lines[0] and decoded and all(path.startswith(("test", "train/c")) for path in decoded)


def test_what_was_decoded_from_another_source_is_not_used(tmp_path, folder, monkeypatch):
    folder, pixels = folder
    process = in_process(SLOW_FOLDER.replace("time.sleep(60)", "import os; os._exit(9)"), folder, tmp_path / "data")
    process.communicate(timeout=120)
    assert process.returncode == 9
    pixels["train/a/0.png"] = 255 - pixels["train/a/0.png"]
    picture(folder / "train/a/0.png", pixels["train/a/0.png"])
    monkeypatch.setattr("jaxrd.data.image_files.CHUNK", 4)
    preparation.prepare_folder("mine", folder, tmp_path / "data", say=lambda line: None)
    assert_prepared(tmp_path / "data", as_splits(pixels))


def _no_content(file):
    file.write_bytes(b"")


def _zeros(file):
    file.write_bytes(bytes(file.stat().st_size))


def _fewer(file):
    np.save(file, np.load(file)[:-1])


def _another_type(file):
    np.save(file, np.load(file).astype(np.int16))


@pytest.mark.parametrize("spoil", [_no_content, _zeros, _fewer, _another_type])
def test_what_a_power_cut_left_half_written_is_decoded_again(tmp_path, folder, monkeypatch, spoil):
    folder, pixels = folder
    process = in_process(SLOW_FOLDER.replace("time.sleep(60)", "import os; os._exit(9)"), folder, tmp_path / "data")
    process.communicate(timeout=120)
    assert process.returncode == 9
    chunk = tmp_path / "data" / ".mine.preparing" / "kept" / "train-00000004.npy"
    spoil(chunk)
    monkeypatch.setattr("jaxrd.data.image_files.CHUNK", 4)
    lines, say = says()
    preparation.prepare_folder("mine", folder, tmp_path / "data", say=say)
    assert "goes on after 17 of 27 images" in lines[0]  # 5 whole chunks of 4 and one of 1 to train, less that one
    assert_prepared(tmp_path / "data", as_splits(pixels))


def test_chunks_of_another_size_are_not_used(tmp_path, folder, monkeypatch):
    folder, pixels = folder
    process = in_process(SLOW_FOLDER.replace("time.sleep(60)", "import os; os._exit(9)"), folder, tmp_path / "data")
    process.communicate(timeout=120)
    monkeypatch.setattr("jaxrd.data.image_files.CHUNK", 20)  # the last one has the same images
    lines, say = says()
    preparation.prepare_folder("mine", folder, tmp_path / "data", say=say)
    assert "goes on" not in lines[0]
    assert_prepared(tmp_path / "data", as_splits(pixels))


DIE = """
import os, numpy as np
def die(*_):
    os._exit(9)
publication.{where} = die
with np.load(sys.argv[1]) as file:
    splits = {{split: (file[split], file[split + "_labels"]) for split in ("train", "test")}}
preparation.prepare_arrays("mine", splits, sys.argv[2], say=lambda line: None)
"""


@pytest.mark.parametrize("where", ["_complete", "files.sha256", "os.replace", "_summarise"])
def test_killed_at_any_moment_it_leaves_all_or_nothing(tmp_path, where):
    named = {f"{split}{part}": array for split, pair in SPLITS.items() for part, array in zip(("", "_labels"), pair)}
    np.savez(tmp_path / "arrays.npz", **named)
    process = in_process(DIE.format(where=where), tmp_path / "arrays.npz", tmp_path / "data")
    assert process.wait(timeout=120) == 9, process.stderr.read()
    process.communicate()
    if where == "_summarise":
        assert_prepared(tmp_path / "data", SPLITS)
    else:
        assert_input_error(lambda: tfds_reader.find("mine", tmp_path / "data"), "not prepared")
    lines, say = says()
    preparation.prepare_arrays("mine", SPLITS, tmp_path / "data", say)
    assert ("prepared already" in lines[0]) == (where == "_summarise")
    assert_prepared(tmp_path / "data", SPLITS)


def test_what_is_left_beside_a_finished_data_set_goes_as_well(tmp_path):
    preparation.prepare_arrays("mine", SPLITS, tmp_path, lambda line: None)
    (tmp_path / ".mine.preparing" / "kept").mkdir(parents=True)
    preparation.prepare_arrays("mine", SPLITS, tmp_path, lambda line: None)
    assert_prepared(tmp_path, SPLITS)


def test_where_nothing_may_be_written_a_data_set_that_is_there_is_enough(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    preparation.prepare_arrays("mine", SPLITS, tmp_path, lambda line: None)
    monkeypatch.setattr("jaxrd.files.os.open", refuse)
    for _ in range(2):
        lines, say = says()
        preparation.prepare_arrays("mine", SPLITS, tmp_path, say)
        assert "prepared already" in lines[0]
        (tmp_path / ".mine.preparing").mkdir(exist_ok=True)
    assert_input_error(lambda: preparation.prepare_arrays("other", SPLITS, tmp_path), str(tmp_path), "Permission denied")


def test_of_several_threads_one_prepares_and_the_others_say_that_they_wait(tmp_path, monkeypatch):
    complete, wrote = publication._complete, []
    lines, say = says()

    def slow(*arguments):
        wrote.append(arguments)
        deadline = time.monotonic() + 60
        while sum("waiting" in line for line in lines) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        complete(*arguments)

    monkeypatch.setattr(publication, "_complete", slow)
    meeting = threading.Barrier(4)

    def prepare(_):
        meeting.wait()
        return preparation.prepare_arrays("mine", SPLITS, tmp_path / "data", say)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert set(pool.map(prepare, range(4))) == {tmp_path / "data" / "mine" / "1.0.0"}
    assert len(wrote) == 1
    waiting = [line for line in lines if "waiting" in line]
    assert len(waiting) >= 3 and all(f"process {os.getpid()}" in line for line in waiting)
    assert sum("prepared already" in line for line in lines) == 3
    assert_prepared(tmp_path / "data", SPLITS)


def test_without_locks_two_at_once_give_one_whole_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxrd.files.fcntl", None)
    meeting, complete = threading.Barrier(2), publication._complete
    monkeypatch.setattr(publication, "_complete", lambda *arguments: (complete(*arguments), meeting.wait(60)))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: preparation.prepare_arrays("mine", SPLITS, tmp_path, lambda line: None), range(2)))
    for left in tmp_path.glob(".*.lock"):
        left.unlink()  # nobody knows when it is of no more use
    assert_prepared(tmp_path, SPLITS)


def test_without_locks_the_workplaces_of_dead_processes_go(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxrd.files.fcntl", None)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f".mine.preparing-{socket.gethostname()}-{dead.pid}-140", f".mine.preparing-elsewhere-{dead.pid}-140"):
        (tmp_path / name / "build").mkdir(parents=True)
    preparation.prepare_arrays("mine", SPLITS, tmp_path, lambda line: None)
    assert sorted(os.listdir(tmp_path)) == [".mine.lock", f".mine.preparing-elsewhere-{dead.pid}-140", "mine"]


def test_different_data_sets_are_prepared_at_once_without_disturbing_each_other(tmp_path, capsys):
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda name: preparation.prepare_arrays(name, SPLITS, tmp_path / name, print), ("one", "two", "three")))
    for name in ("one", "two", "three"):
        assert_prepared(tmp_path / name, SPLITS, name)
    assert capsys.readouterr().out.count("use it with") == 3 and sys.stdout is not None


@pytest.mark.parametrize("call", ["array_builder.ArrayBuilder._written", "publication.os.replace", "array_cache.os.replace",
                                  "publication.files.sha256", "array_cache._write_header"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"jaxrd.data.{call}", full)
    directory = tmp_path / "some" / "where"
    assert_input_error(
        lambda: preparation.prepare_arrays("mine", SPLITS, directory), str(directory), "No space left", "--data_dir")
    assert not (tmp_path / "some").exists()


def test_why_the_arrays_cannot_be_kept_is_what_it_says(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr("jaxrd.data.array_cache._write_header", refuse)
    assert_input_error(lambda: preparation.prepare_arrays("mine", SPLITS, tmp_path / "data"), "Disk quota exceeded")
    assert not (tmp_path / "data").exists() and capsys.readouterr().err == ""


def test_a_file_system_without_maps_is_no_full_disk(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENODEV, "No such device")

    with monkeypatch.context() as patch:
        patch.setattr("mmap.mmap", refuse)
        preparation.prepare_arrays("mine", SPLITS, tmp_path, lambda line: None)
    assert_prepared(tmp_path, SPLITS)


def test_a_file_that_the_system_does_not_let_grow_is_one_line_and_leaves_nothing(tmp_path):
    code = """
import resource, numpy as np
from jaxrd.errors import InputError
images = np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3), dtype=np.uint8)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    preparation.prepare_arrays("mine", {split: (images, np.arange(300) % 3) for split in ("train", "test")}, sys.argv[1], print)
except InputError as error:
    print(error)
"""
    for limit in (100_000, 700_000, 910_000):  # in the first records, at their end, in the arrays
        process = in_process(code, tmp_path / "data", limit)
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert output.count("\n") == 1 and f"{tmp_path}/data" in output and "nothing of it is left" in output, output
        assert not (tmp_path / "data").exists()


def test_too_small_a_disk_is_refused_before_the_work(tmp_path, monkeypatch, folder):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("jaxrd.data.publication.shutil.disk_usage", lambda path: usage)
    for prepare in (lambda: preparation.prepare_arrays("mine", SPLITS, tmp_path / "data"),
                    lambda: preparation.prepare_folder("mine", folder[0], tmp_path / "data")):
        assert_input_error(prepare, str(tmp_path / "data"), "MB", "--data_dir")
        assert not (tmp_path / "data").exists()


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "below", pathlib.Path("/proc/nowhere")):
        assert_input_error(lambda: preparation.prepare_arrays("mine", SPLITS, directory), str(directory), "--data_dir")


def test_records_that_do_not_read_as_they_were_written_are_not_published(tmp_path, monkeypatch):
    written = preparation.ArrayBuilder._examples

    def wrong(self, split):
        examples = list(written(self, split))
        return iter([examples[1], examples[0], *examples[2:]])

    monkeypatch.setattr(preparation.ArrayBuilder, "_examples", wrong)
    with pytest.raises(InputError, match="not read as it was written"):
        preparation.prepare_arrays("mine", SPLITS, tmp_path / "data")
    assert not (tmp_path / "data").exists()
