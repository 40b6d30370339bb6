"""`python -m launch.prepare`: data sets in, one line for every mistake, and nothing left of what did not succeed."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from jaxrd.data import tfds_reader
from tests.launch.commands import ROOT, check_one_line, environment, run_all

GENERATOR = np.random.default_rng(0)
IMAGES = {name: GENERATOR.integers(0, 256, (size, 8, 8, 3), dtype=np.uint8) for name, size in (("train", 12), ("test", 6))}
LABELS = {name: np.arange(len(images)) % 3 for name, images in IMAGES.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    place = tmp_path_factory.mktemp("prepare")
    for name in IMAGES:
        np.savez(place / f"{name}.npz", images=IMAGES[name], labels=LABELS[name])
        np.savez(place / f"generated_{name}.npz", image=IMAGES[name], label=LABELS[name], extra=np.zeros(3))
    np.savez(place / "validation.npz", images=IMAGES["test"][::-1], labels=LABELS["test"][::-1])
    np.savez(place / "keys.npz", x=IMAGES["test"], y=LABELS["test"])
    np.savez(place / "objects.npz", images=np.array([{}, []], object), labels=np.arange(2))
    np.savez(place / "wide.npz", images=np.zeros((6, 9, 8, 3), np.uint8), labels=LABELS["test"])
    np.savez(place / "float.npz", images=np.zeros((6, 8, 8, 3), np.float32), labels=LABELS["test"])
    np.savez(place / "many.npz", images=IMAGES["test"], labels=LABELS["test"] + 1)
    content = (place / "train.npz").read_bytes()
    (place / "cut.npz").write_bytes(content[:len(content) // 2])
    (place / "changed.npz").write_bytes(content[:600] + bytes([content[600] ^ 1]) + content[601:])
    (place / "cut.zip").write_bytes(content[:100])
    for split, count in (("train", 3), ("test", 1)):
        for name in ("cat", "dog"):
            (place / "photos" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = GENERATOR.integers(0, 256, (6, 7, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / "photos" / split / name / f"{index}.png")
    (place / "file").write_text("")
    return place


NPZ = "prepare --name=mine --data_dir=FILES/data --npz="
# Command line -> what its one line must say.
MISTAKES = {
    "prepare": ["--dataset", "--npz", "--folder"],
    "prepare --dataset=cifar10 --npz=a.npz,b.npz": ["--dataset and --npz", "exactly one"],
    "prepare cifar10": ["cifar10", "--"],
    "prepare --npz=FILES/train.npz,FILES/test.npz": ["--name is missing"],
    NPZ + "FILES/train.npz,b.npz,c.npz,d.npz": ["two files", "three", "or one"],
    NPZ + "FILES/train.npz,,FILES/test.npz": ["must end in .npz"],
    NPZ + "FILES/train.txt,FILES/test.npz": ["train.txt", "must end in .npz"],
    NPZ + "FILES/none.npz,FILES/test.npz": ["none.npz", "no such file"],
    NPZ + "FILES/cut.npz,FILES/test.npz": ["cut.npz", "cannot be read"],
    NPZ + "FILES/changed.npz,FILES/test.npz": ["changed.npz", "cannot be read"],
    NPZ + "FILES/objects.npz,FILES/test.npz": ["objects.npz"],
    NPZ + "FILES/train.npz,FILES/keys.npz": ["keys.npz", "x", "y", "images"],
    NPZ + "FILES/train.npz,FILES/wide.npz": ["(8, 8, 3)", "(9, 8, 3)"],
    NPZ + "FILES/train.npz,FILES/float.npz": ["uint8", "float32"],
    NPZ + "FILES/train.npz,FILES/many.npz": ["labels", "[0, 3)"],
    NPZ + "FILES/many.npz,FILES/test.npz": ["label 0"],
    NPZ + "FILES/train.npz,FILES/test.npz --source=x": ["--source does not go with --npz"],
    NPZ + "FILES/train.npz,FILES/test.npz --image_size=4": ["--image_size does not go with --npz"],
    "prepare --npz=FILES/train.npz,FILES/test.npz --name=My-Set --data_dir=FILES/data": ['"My-Set"', "small letters"],
    "prepare --npz=FILES/train.npz,FILES/test.npz --name=cifar10 --data_dir=FILES/data": ["cifar10", "my_cifar10"],
    "prepare --npz=FILES/train.npz,FILES/test.npz --name=mine --data_dir=FILES/file": ["FILES/file", "--data_dir"],
    "prepare --folder=FILES/none --name=mine --data_dir=FILES/data": ["FILES/none", "no such folder"],
    "prepare --folder=FILES/photos/train --name=mine --data_dir=FILES/data": ["cat, dog", "train and test"],
    "prepare --folder=FILES/photos --name=mine --image_size=0": ["image_size"],
    "prepare --dataset=mnist --name=mine": ["--name does not go with --dataset"],
    "prepare --dataset=mnist --image_size=8": ["--image_size", "mnist"],
    "prepare --dataset=cifar1O --data_dir=FILES/data": ["did you mean 'cifar10'"],
    "prepare --dataset=tiny_imagenet --data_dir=FILES/data": ["--source", "tiny-imagenet-200.zip"],
    "prepare --dataset=tiny_imagenet --image_size=32 --data_dir=FILES/data": ["--source", "tiny-imagenet-200.zip"],
    "prepare --dataset=tiny_imagenet --source=FILES/none.zip --data_dir=FILES/data": ["none.zip", "no such file"],
    "prepare --dataset=tiny_imagenet --source=FILES/cut.zip --data_dir=FILES/data": ["cut.zip", "download it again"],
    "prepare --dataset=tiny_imagenet --source=FILES/photos --data_dir=FILES/data": ["photos", "val_annotations.txt"],
    "prepare --datset=mnist": ["did you mean --dataset?"],
}


@pytest.fixture(scope="module")
def mistakes(files):
    before = sorted(files.rglob("*"))
    lines = {line: line.replace("FILES", str(files)) for line in MISTAKES}
    results = run_all(list(lines.values()))
    return {line: results[typed] for line, typed in lines.items()}, before, sorted(files.rglob("*"))


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line(mistakes, files, line):
    check_one_line(mistakes[0][line], *(word.replace("FILES", str(files)) for word in MISTAKES[line]))


def test_mistakes_leave_nothing(mistakes):
    _, before, after = mistakes
    assert after == before


def test_npz_files_and_folders_become_data_sets(files, tmp_path):
    def line(name, rest):
        return f"prepare --name={name} --data_dir={tmp_path}/data {rest}"

    three = ",".join(f"{files}/{name}.npz" for name in ("train", "validation", "test"))
    two = f"{files}/generated_train.npz,{files}/generated_test.npz"
    lines = [line("three", f"--npz={three}"), line("two", f"--npz={two}"), line("photos", f"--folder={files}/photos"),
             line("small", f"--folder={files}/photos --image_size=5"),
             f"prepare --dataset=jaxrd_digits --data_dir={tmp_path}/data", line("one", f"--npz={files}/generated_train.npz")]
    first, second = run_all(lines), run_all(lines)
    for each in lines:
        assert first[each][0] == second[each][0] == 0 and first[each][2] == second[each][2] == "", (first[each], second[each])
        assert "prepared in" in first[each][1] and "prepared already" in second[each][1]
    assert "--config.data.extra=one" in first[lines[5]][1]
    assert tfds_reader.find("one", tmp_path / "data").splits == {"train": 12}
    assert (tfds_reader.find("one", tmp_path / "data").read("train")[0] == IMAGES["train"]).all()
    assert f"--config.data.name=three --config.data.directory={tmp_path}/data" in first[lines[0]][1]
    found = tfds_reader.find("three", tmp_path / "data")
    assert found.splits == {"train": 12, "validation": 6, "test": 6}
    assert (found.read("train")[0] == IMAGES["train"]).all() and (found.read("test")[0] == IMAGES["test"]).all()
    assert (found.read("validation")[0] == IMAGES["test"][::-1]).all()
    assert (tfds_reader.find("two", tmp_path / "data").read("train")[1] == LABELS["train"]).all()
    assert tfds_reader.find("photos", tmp_path / "data").image_shape == (6, 7, 3)
    assert tfds_reader.find("small", tmp_path / "data").image_shape == (5, 5, 3)
    assert sorted(os.listdir(tmp_path / "data")) == ["jaxrd_digits", "one", "photos", "small", "three", "two"]
    # The line that it prints is one that launch.train takes.
    data = f"--config.data.name=two --config.data.directory={tmp_path}/data"
    extra = f"{data} --config.data.extra=one"
    trained = run_all([f"train --config=configs/digits.py:pgd_at {each} --print_config" for each in (data, extra)])
    assert all(result[0] == 0 for result in trained.values()), trained


# Command line -> the function that is to say something.
PIPES = {
    "prepare --name=mine --npz=FILES/train.npz --data_dir=FILES/nothing": ("jaxrd.data.preparation", "prepare_arrays"),
    "prepare --name=mine --folder=FILES/photos --data_dir=FILES/nothing": ("jaxrd.data.preparation", "prepare_folder"),
    "prepare --dataset=mnist --data_dir=FILES/nothing": ("jaxrd.data.preparation", "prepare_catalogue"),
    "prepare --dataset=tiny_imagenet --source=FILES --image_size=8": ("jaxrd.data.preparation", "prepare_tiny_imagenet"),
    "evaluate --workdir=FILES/photos": ("jaxrd.evaluation.evaluate", "evaluate"),
}
SAY = """
import importlib, os, runpy, sys
module, name, command, *sys.argv[1:] = sys.argv[1:]
def work(*arguments, **options):
    say, = filter(callable, [*arguments, *options.values()])
    say("line")
    os._exit(3)
setattr(importlib.import_module(module), name, work)
runpy.run_module(f"launch.{command}", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("line", PIPES)
def test_a_line_is_in_a_pipe_as_soon_as_it_is_said(files, line):
    arguments = [sys.executable, "-c", SAY, *PIPES[line], *line.replace("FILES", str(files)).split()]
    variables = {name: value for name, value in environment().items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(arguments, cwd=ROOT, env=variables, text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (3, "line\n"), done.stderr  # what a buffer holds is lost at such an exit


def test_interrupted_it_is_one_line_and_leaves_nothing(files, tmp_path):
    code = """
import runpy, sys, time
from jaxrd.data import array_builder
def slow(self, split):
    print("writing", flush=True)
    time.sleep(60)
array_builder.ArrayBuilder._examples = slow
runpy.run_module("launch.prepare", run_name="__main__", alter_sys=True)
"""
    arguments = ["--name=mine", f"--npz={files}/train.npz,{files}/test.npz", f"--data_dir={tmp_path}/data"]
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment(), text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout.readline() == "writing\n"
        time.sleep(0.2)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
        assert process.returncode == status and error.count("\n") <= 1 and "Traceback" not in error, error
        assert not (tmp_path / "data").exists()


def test_help_has_an_example_of_each_source():
    (status, output, *_), = run_all(["prepare --help"]).values()
    assert status == 0
    for word in ("--npz=train.npz,test.npz --name=", "--folder=", "--dataset=cifar10", "tiny-imagenet-200.zip", "--data_dir"):
        assert word in output
