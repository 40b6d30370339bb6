"""`python -m launch.benchmark`: it runs, and what it prints is of the configuration that it was given; no number is judged."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def benchmark(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "launch.benchmark", "--config=configs/digits.py:pgd_at", "--config.student=resnet6_w4",
         "--config.attack.steps=1", "--config.training.batch_size=16", "--repeats=1", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_the_parts_of_a_step_and_what_it_waits_for_its_input(tiny_arrays):
    status, out, error = benchmark(f"--config.data.arrays={tiny_arrays}", "--config.data.examples=None")
    assert status == 0, error
    names = ["augmentation", "attack (1 steps)", "student loss and gradient", "optimiser and weight average", "whole step",
             "waiting for input, of it", "compilation"]
    assert [line.strip()[:len(name)] for line, name in zip(out.splitlines()[1:], names, strict=True)] == names
    assert re.search(r"waiting for input, of it +\d+\.\d+ ms +\d+\.\d\d%", out)


def test_accumulated_batches_and_a_split_state(tiny_arrays):
    status, out, error = benchmark(
        f"--config.data.arrays={tiny_arrays}", "--config.data.examples=None", "--config.training.accumulation=2",
        "--config.training.shard_state=true", "--cpu_devices=2")
    assert status == 0, error
    assert "2 cpu device(s)" in out and "; parts: of 1 of 2 micro-batches\n" in out


def test_the_input_alone_on_random_images_and_on_ones_own(tiny_arrays):
    status, out, error = benchmark("--input=6x5x3", "--config.training.batch_size=5000", "--config.data.shift=2")
    assert status == 0, error
    assert out.startswith("50,000 images 6x5x3 uint8, batch 5000, shift 2, flip False") and "times 10 batches" in out
    status, out, error = benchmark("--input=data", f"--config.data.arrays={tiny_arrays}", "--config.data.examples=None")
    assert status == 0, error
    assert out.startswith("180 images 8x8x1 uint8, batch 16")
    rows = re.findall(r"^  (\S.*?) +([\d.]+) ms a batch +([\d,]+) images/s$", out, re.M)
    assert [name for name, _, _ in rows] == ["gathered and brought there", "augmented", "both, as in training"]
    for _, milliseconds, rate in rows:
        assert abs(float(milliseconds) * int(rate.replace(",", "")) / 1000 / 16 - 1) < 0.05


def test_a_shape_that_is_none_is_one_line():
    for shape in ("32x32", "32x0x3", "axbxc"):
        status, _, error = benchmark(f"--input={shape}")
        assert status == 1 and error.startswith(f"error: --input={shape}") and "32x32x3" in error and error.count("\n") == 1
