"""Memory of a process that trains on 50,000 images, and that several of them share the images, measured by the kernel."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

from jaxrd.data import preparation

ROOT = pathlib.Path(__file__).parents[2]
MIB = 2**20
IMAGES = 50_000 * 32 * 32 * 3

# Trains for 2 steps on a prepared set, reads all of its images, and prints in bytes: the largest resident size so far, and
# what of the mapping of its images is this process's own.
_PROCESS = """
import pathlib, re, sys
import numpy as np
from configs import cifar10
from jaxrd.config import Config
from jaxrd.training import loop, opening
values = cifar10.get_config("teacher").to_dict()
values |= {"student": "wrn10_1"}
values["data"] |= {"name": "mine", "directory": sys.argv[1], "validation_fraction": 0.002}
values["training"] |= {"steps": 2, "checkpoint_every": 2}
values["attack"] |= {"steps": 1}
config = Config.from_dict(values)
loop.train(config, sys.argv[2])
_, source = opening.open_data(config)
total = sum(int(source.images[start:start + 1000].sum()) for start in range(0, len(source), 1000))
status, own, mapped = pathlib.Path("/proc/self/status").read_text(), 0, False
for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
    if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
        mapped = line.endswith("train_images.npy")
    elif mapped and line.startswith(("Private_Dirty", "Anonymous")):
        own += 1024 * int(line.split()[1])
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]), own)
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/smaps").exists(), reason="the kernel does not tell")
@pytest.mark.parametrize("dtype, limit", [("uint8", 1.2 * 1024 * MIB), ("float32", 1.2 * 1024 * MIB + 3 * IMAGES)])
def test_a_training_process_stays_small_and_shares_its_images(tmp_path, dtype, limit):
    """1.2 GiB for CIFAR-10's size in bytes; floats are four times as many, mapped and counted while they are looked at."""
    generator = np.random.default_rng(0)
    splits = {}
    for split, n in (("train", 50_000), ("test", 100)):
        images = generator.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        splits[split] = (images if dtype == "uint8" else images / np.float32(255)), np.arange(n) % 10
    preparation.prepare_arrays("mine", splits, tmp_path / "tfds", say=lambda line: None)
    done = subprocess.run(
        [sys.executable, "-c", _PROCESS, tmp_path / "tfds", tmp_path / "run"], cwd=ROOT, capture_output=True, text=True,
        timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    largest, own = map(int, done.stdout.split()[-2:])
    assert IMAGES < largest < limit
    assert own == 0
