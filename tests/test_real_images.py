"""CIFAR-10 and CIFAR-100 themselves, from prepare to a killed and resumed run, where the images are at hand.

They are no part of the project: $JAXRD_REAL_IMAGES names a directory with cifar10_train.npz, cifar10_test.npz,
cifar100_train.npz and cifar100_test.npz (images uint8, labels), without which the tests skip.
"""

import hashlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxrd import data, models
from jaxrd.training.log import read_metrics

ROOT = pathlib.Path(__file__).parents[1]
IMAGES = pathlib.Path(os.environ.get("JAXRD_REAL_IMAGES") or "none")
CLASSES = {"cifar10": 10, "cifar100": 100}
ENVIRONMENT = {**os.environ, "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "1"}


def run(*arguments, **options):
    finished = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900,
        **options)
    assert finished.returncode == 0, finished.stderr[-2000:]
    return finished.stdout


@pytest.fixture(scope="module", params=CLASSES)
def real(request, tmp_path_factory):
    """(name, {"train": (images, labels), "test": ...}, directory where they are prepared as my_{name})."""
    name, directory = request.param, tmp_path_factory.mktemp(request.param)
    paths = {split: IMAGES / f"{name}_{split}.npz" for split in ("train", "test")}
    if not all(path.is_file() for path in paths.values()):
        pytest.skip("$JAXRD_REAL_IMAGES names no directory with the images of CIFAR-10 and CIFAR-100")
    splits = {}
    for split, path in paths.items():
        with np.load(path) as file:
            splits[split] = file["images"], file["labels"]
    run("launch.prepare", f"--npz={paths['train']},{paths['test']}", f"--name=my_{name}", f"--data_dir={directory / 'tfds'}")
    return name, splits, directory


@pytest.mark.slow
def test_prepared_images_are_those_of_the_source(real):
    name, splits, directory = real
    # Published facts, so that the packs are what they say: class sizes and the means of the training set.
    images, labels = splits["train"]
    assert images.shape == (50_000, 32, 32, 3) and (np.bincount(labels) == 50_000 // CLASSES[name]).all()
    published = {"cifar10": (0.4914, 0.4822, 0.4465), "cifar100": (0.5071, 0.4865, 0.4409)}[name]
    np.testing.assert_allclose(images.mean(axis=(0, 1, 2)) / 255, published, atol=2e-4)

    dataset = data.open_tfds(f"my_{name}", directory=directory / "tfds", selection="last")
    for split, source in (("train", dataset.train), ("test", dataset.test)):
        images, labels = splits[split]
        np.testing.assert_array_equal(np.bincount(source.labels), np.bincount(labels))
        assert hashes(source.images[:]) == hashes(images)
        np.testing.assert_array_equal(source.labels, labels)
        np.testing.assert_array_equal(channel_means(source.images[:]), channel_means(images))
        assert source.classes == CLASSES[name]
    held_out = data.open_tfds(f"my_{name}", directory=directory / "tfds", validation_fraction=0.02)
    assert (np.bincount(held_out.validation.labels) == 1000 // CLASSES[name]).all()
    together = np.concatenate([held_out.train.images[:], held_out.validation.images[:]])
    assert sorted(hashes(together)) == sorted(hashes(splits["train"][0]))


def hashes(images):
    return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]


def channel_means(images):
    return images.sum(axis=(0, 1, 2), dtype=np.int64) / images[..., 0].size


@pytest.mark.slow
def test_rslad_igdm_from_a_wide_resnet_to_resnet18_is_killed_and_goes_on(real):
    name, _, directory = real
    shared = (
        f"--config.data.name=my_{name}", f"--config.data.directory={directory / 'tfds'}", "--config.training.batch_size=8",
        "--config.attack.steps=1", "--config.training.log_every=1", "--config.data.validation_fraction=0.002")
    run("launch.train", f"--config=configs/{name}.py:teacher,student=wrn10_1", *shared, "--config.training.steps=3",
        f"--workdir={directory / 'teacher'}")
    student = (f"--config=configs/{name}.py:rslad+igdm", *shared, f"--config.teacher={directory / 'teacher'}",
               "--config.training.steps=20", "--config.training.checkpoint_every=5")
    run("launch.train", *student, f"--workdir={directory / 'whole'}")

    killed = directory / "killed"
    command = [sys.executable, "-m", "launch.train", *student, f"--workdir={killed}"]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not any(entry["step"] > 7 for entry in read_metrics(killed / "metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    said = run("launch.train", *student, f"--workdir={killed}")
    resumed = int(re.search(r"resumed after step (\d+) of 20", said)[1])
    assert resumed in (5, 10, 15)

    entries = [{entry["step"]: entry for entry in read_metrics(path / "metrics.jsonl") if "train/loss" in entry}
               for path in (directory / "whole", killed)]
    assert list(entries[0]) == list(entries[1]) == list(range(1, 21))
    clock = {"seconds", "images_per_second", "input_wait"}
    for step in range(1, 21):  # the same images, augmented alike: the same losses to the last digit
        first, second = ({key: value for key, value in entry[step].items() if key not in clock} for entry in entries)
        assert first == second, step
    finals = [models.restore(path)[1] for path in (directory / "whole", killed)]
    for ours, theirs in zip(*map(jax.tree.leaves, finals), strict=True):
        np.testing.assert_array_equal(ours, theirs)
