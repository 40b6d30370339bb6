"""The embedded digits: their split, their preparation by several at once, and what damage to them says."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from jaxrd.data import open_dataset
from jaxrd.data.digits import SPLITS, load_digits, split_indices
from jaxrd.errors import InputError
from tests.support import assert_input_error


def parts_of(data):
    return {"train": data.train, "validation": data.validation, "test": data.test}


def same(data, other):
    pairs = zip(parts_of(data).values(), parts_of(other).values())
    return all((a.images == b.images).all() and (a.labels == b.labels).all() for a, b in pairs)


def open_in_subprocess(directory, before="", after=""):
    call = f"from jaxrd.data import open_dataset\ndata = open_dataset('jaxrd_digits', directory={str(directory)!r})"
    command = [sys.executable, "-c", f"{before}\n{call}\n{after}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    open_dataset("jaxrd_digits", directory=directory)
    return directory


@pytest.fixture
def copy(prepared, tmp_path):
    """A copy of the prepared digits to damage: (data directory, directory of the prepared version)."""
    shutil.copytree(prepared, tmp_path / "tfds")
    return tmp_path / "tfds", tmp_path / "tfds" / "jaxrd_digits" / "1.0.0"


def test_splits_are_disjoint_complete_and_stratified():
    images, labels = load_digits()
    parts = split_indices(labels)
    sizes = {name: len(part) for name, part in parts.items()}
    assert sizes == SPLITS == {"train": 1000, "validation": 197, "test": 600}
    assert (np.sort(np.concatenate(list(parts.values()))) == np.arange(1797)).all()
    shares = np.bincount(labels) / 1797
    for part in parts.values():
        assert np.abs(np.bincount(labels[part]) - len(part) * shares).max() <= 2
    # The published split: changing it needs a new VERSION.
    assert [part[:5].tolist() for part in parts.values()] == [
        [0, 3, 4, 8, 11],
        [2, 6, 7, 20, 25],
        [1, 5, 9, 10, 16],
    ]


def test_pixels_are_the_original_grey_levels():
    from sklearn import datasets

    images, _ = load_digits()
    assert images.dtype == np.uint8 and images.shape == (1797, 8, 8, 1) and images.max() == 255 and images.min() == 0
    assert (np.round(images[..., 0] * (16 / 255)) == datasets.load_digits().images).all()


def test_opened_digits_are_the_bundled_ones(prepared):
    data = open_dataset("jaxrd_digits", directory=prepared)
    images, labels = load_digits()
    for name, indices in split_indices(labels).items():
        source = parts_of(data)[name]
        assert source.name == f"jaxrd_digits/{name}" and source.classes == 10 and source.image_shape == (8, 8, 1)
        assert source.images.dtype == np.uint8 and source.labels.dtype == np.int32
        read = sorted((image.tobytes(), label) for image, label in zip(source.images, source.labels))
        assert read == sorted((image.tobytes(), label) for image, label in zip(images[indices], labels[indices]))


def test_preparing_twice_gives_the_same_order(prepared, tmp_path):
    assert same(open_dataset("jaxrd_digits", directory=prepared), open_dataset("jaxrd_digits", directory=tmp_path))


def test_of_two_processes_one_prepares_quietly_and_without_tensorflow(prepared, tmp_path):
    # Whoever generates waits until the other one stands at the lock as well, which it says.
    together = f"""
import pathlib, time
from jaxrd import files
from jaxrd.data import digits, publication
generate, locked, meeting = digits.JaxrdDigits._split_generators, files._locked, pathlib.Path({str(tmp_path)!r})
def wait(self, manager):
    (meeting / f"generated-{{time.time_ns()}}").touch()
    deadline = time.time() + 60
    while not list(meeting.glob("waiting*")) and time.time() < deadline:
        time.sleep(0.01)
    return generate(self, manager)
def told(lock, waiting):
    def tell(holder):
        (meeting / f"waiting-{{holder}}").touch()
        waiting(holder)
    return locked(lock, tell)
digits.JaxrdDigits._split_generators = wait
files._locked = told
"""
    after = "import sys; assert len(data.train) == 1000; assert 'tensorflow' not in sys.modules"
    processes = [open_in_subprocess(tmp_path / "tfds", together, after) for _ in range(2)]
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert output == "" and "Generating" not in errors and "rename" not in errors
    assert len(list(tmp_path.glob("generated*"))) == 1
    (waiting,) = tmp_path.glob("waiting*")
    assert any(f"process {process.pid} on" in waiting.name for process in processes)
    data = open_dataset("jaxrd_digits", directory=tmp_path / "tfds")
    assert same(data, open_dataset("jaxrd_digits", directory=prepared))
    assert [path.name for path in (tmp_path / "tfds").iterdir()] == ["jaxrd_digits"]


def test_a_process_killed_while_preparing_leaves_nothing_in_the_way(prepared, tmp_path):
    die = """
import os
from jaxrd.data import digits
def die(self, images, labels, indices):
    yield 0, {"image": images[0], "label": 0}
    os._exit(9)
digits.JaxrdDigits._generate_examples = die
"""
    process = open_in_subprocess(tmp_path, die)
    process.communicate(timeout=120)
    assert process.returncode == 9 and list(tmp_path.glob(".jaxrd_digits.preparing/*"))
    assert same(open_dataset("jaxrd_digits", directory=tmp_path), open_dataset("jaxrd_digits", directory=prepared))
    assert [path.name for path in tmp_path.iterdir()] == ["jaxrd_digits"]


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    assert_input_error(lambda: open_dataset("jaxrd_digits", directory=tmp_path / "file"), str(tmp_path / "file"))


@pytest.mark.parametrize("damage", ["missing", "empty", "half", "one byte less"])
@pytest.mark.parametrize("name", ["dataset_info.json", "features.json", "train", "validation", "test"])
def test_a_damaged_copy_says_what_to_delete(copy, name, damage):
    directory, path = copy
    (file,) = path.glob(f"*{name}*")
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(content[: {"empty": 0, "half": len(content) // 2, "one byte less": len(content) - 1}[damage]])
    assert_input_error(lambda: parts_of(open_dataset("jaxrd_digits", directory=directory)), str(path), "delete this directory")


def test_a_changed_byte_is_noticed_or_harmless(copy, prepared):
    directory, path = copy
    intact = open_dataset("jaxrd_digits", directory=prepared)
    (file,) = path.glob("*train*")
    content, noticed = file.read_bytes(), 0
    for position in np.random.default_rng(0).integers(0, len(content), 20):
        file.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        shutil.rmtree(path / "arrays", ignore_errors=True)  # what is decoded already is not decoded again
        try:
            assert same(open_dataset("jaxrd_digits", directory=directory), intact)
        except InputError as error:
            noticed += "delete this directory" in str(error)
    assert noticed > 5


def edit_info(path, edit):
    info = json.loads((path / "dataset_info.json").read_text())
    edit(info)
    (path / "dataset_info.json").write_text(json.dumps(info))


def remove_split(path, name):
    edit_info(path, lambda info: info.update(splits=[split for split in info["splits"] if split["name"] != name]))


def rename(directory, path, name):
    """Makes the prepared digits a data set of another name, which TFDS knows by its files alone."""
    edit_info(path, lambda info: info.update(name=name))
    for file in path.glob("jaxrd_digits-*"):
        file.rename(path / file.name.replace("jaxrd_digits", name))
    path.parent.rename(directory / name)
    return directory / name / "1.0.0"


def test_any_prepared_data_set_opens_by_its_files(copy, prepared):
    directory, path = copy
    path = rename(directory, path, "mine")
    assert same(open_dataset("mine", directory=directory), open_dataset("jaxrd_digits", directory=prepared))
    remove_split(path, "validation")
    data = open_dataset("mine", directory=directory, validation_fraction=0.25)
    assert [len(data.train), len(data.validation), len(data.test)] == [750, 250, 600]
    assert np.ptp(np.bincount(data.validation.labels)) <= 3
    remove_split(path, "test")
    assert_input_error(lambda: open_dataset("mine", directory=directory), "mine", "['train']")
