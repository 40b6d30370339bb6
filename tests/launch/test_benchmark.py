"""`python -m launch.benchmark`: it runs, and what it prints is of the configuration that it was given; no number is judged."""

import json
import os
import pathlib
import re
import statistics
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def benchmark(*arguments, environment=None):
    done = subprocess.run(
        [sys.executable, "-m", "launch.benchmark", "--config=configs/digits.py:pgd_at", "--config.student=resnet6_w4",
         "--config.attack.steps=1", "--config.training.batch_size=16", "--repeats=1", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | (environment or {}))
    return done.returncode, done.stdout, done.stderr


def test_the_parts_of_a_step_its_operations_and_what_it_waits_for(tiny_arrays, tmp_path):
    status, out, error = benchmark(f"--config.data.arrays={tiny_arrays}", "--config.data.examples=None",
                                   f"--json={tmp_path / 'figures.json'}")
    assert status == 0, error
    names = ["augmentation", "attack (1 steps)", "student forward", "student backward, by difference",
             "student loss and gradient", "optimiser and weight average", "whole step", "waiting for input, of it",
             "host until the call returns, of it", "host between two steps, of it", "as in training",
             "Parts are compiled alone", "operations, counted by XLA", "operations, in closed form",
             "attack: student 1 forward", "student: student 1 forward, 1 to parameters", "reached on each device",
             "of the peak", "of what a matrix product reaches", "of what a convolution reaches",
             "of what its image gradient reaches", "of what its kernel gradient reaches",
             *["matrix product, ", "convolution, ", "its image ", "its kernel "] * 2,
             "memory of a step, as planned", "most in use by this process", "compilation"]
    assert [line.strip()[:len(name)] for line, name in zip(out.splitlines()[1:], names, strict=True)] == names
    assert re.search(r"waiting for input, of it +\d+\.\d+ ms .* \d+\.\d\d%", out) and "warning" not in out
    assert "a CPU has no published peak: give --peak_flops" in out
    # The table is of the figures.
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert f"{figures['images_per_second']:,.0f} images/s" in out and figures["operations"]["agree"] is True
    assert figures["config"]["student"] == "resnet6_w4" and figures["environment"]["jax"]


def test_accumulated_batches_and_a_split_state(tiny_arrays):
    status, out, error = benchmark(
        f"--config.data.arrays={tiny_arrays}", "--config.data.examples=None", "--config.training.accumulation=2",
        "--config.training.shard_state=true", "--cpu_devices=2", "--noceilings", "--peak_flops=1e12")
    assert status == 0, error
    assert "2 cpu device(s)" in out and "; parts: of 1 of 2 micro-batches\n" in out
    assert re.search(r"of the peak +\d+\.\d%", out) and "for each device" in out and "matrix product" not in out


def test_random_images_and_an_untrained_teacher_stand_in_for_what_is_not_there():
    status, out, error = benchmark(
        "--config.method=ard+igdm", "--config.teacher=runs/nowhere", "--teacher_model=resnet6_w8", "--random_images=6x5x3",
        "--classes=4", "--methods=ard,ard+igdm", "--repeats=2")
    assert status == 0, error
    rows = re.findall(r"^  (ard\S*) +([\d.]+) +\[[\d.]+ \.\. [\d.]+\] +([\d.]+)x", out, re.M)
    assert [name for name, _, _ in rows] == ["ard", "ard+igdm"] and rows[0][2] == "1.00"
    assert float(rows[1][2]) == pytest.approx(float(rows[1][1]) / float(rows[0][1]), abs=0.02)


def test_a_sweep_prints_a_line_through_its_rows(tmp_path):
    status, out, error = benchmark("--random_images=8x8x1", "--sweep_attack_steps=3,1", "--sweep_batch=8",
                                   f"--json={tmp_path / 'figures.json'}")
    assert status == 0, error
    rows = re.findall(r"^  (\d+) +[\d.]+ +\[", out, re.M)
    assert rows == ["1", "3", "8"] and "one value: no line goes through it" in out
    figures = json.loads((tmp_path / "figures.json").read_text())
    steps, line = figures["sweep_attack_steps"]["steps"], figures["sweep_attack_steps"]["line"]
    assert line["seconds_slope"] == pytest.approx((steps["3"]["median_seconds"] - steps["1"]["median_seconds"]) / 2)
    assert f"{1e3 * line['seconds_slope']:.3f} ms for each attack step" in out


def test_a_trace_says_where_the_time_goes(tmp_path):
    status, out, error = benchmark("--random_images=8x8x1", f"--trace={tmp_path / 'trace'}")
    assert status == 0, error
    assert re.search(r"ms a step, of which events cover \d+\.\d%.*; \d+\.\d% is in none", out)
    assert "by scope" in out and "    convolution " in out and "10 longest operations" in out
    assert list((tmp_path / "trace").rglob("*.trace.json.gz"))


@pytest.mark.parametrize("flags, mentions", [
    (["--config.training.batch_size=4000000", "--random_images=8x8x1"], ["the train step of pgd_at", "GiB", "accumulation"]),
    (["--peak_flops=989", "--random_images=8x8x1"], ["--peak_flops=989", "989e12"]),
    (["--methods=ard", "--attacks=square"], ["--methods and --attacks", "one of them"]),
    (["--sweep_attack_steps=1,x"], ["--sweep_attack_steps=1,x", "1,5,10"]),
    (["--random_images=8x8"], ["--random_images=8x8", "32x32x3"]),
    (["--json=nowhere/figures.json"], ["--json=nowhere/figures.json", "benchmark.json"]),
    (["--json=figures.json", "--scaling=8"], ["--scaling", "leave it out"]),
    (["--scaling=1,0"], ["--scaling=1,0", "1,4,8"])])
def test_what_cannot_be_is_one_line(flags, mentions):
    status, out, error = benchmark(*flags)
    assert status == 1 and error.startswith("error: ") and error.count("\n") == 1 and not out
    assert all(mention in error for mention in mentions), error


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


def test_in_turn_with_pytorch(tiny_arrays, tmp_path):
    pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[parity]'")
    status, out, error = benchmark(
        f"--config.data.arrays={tiny_arrays}", "--config.data.examples=None", "--compare=torch", "--torch_variants=eager,bf16",
        "--repeats=3", f"--json={tmp_path / 'figures.json'}")
    assert status == 0, error
    assert "PyTorch 2" in out and "teacher none" in out
    rows = re.findall(r"^  (jaxrd|eager|bf16) +([\d.]+) +([\d.]+)x", out, re.M)
    assert [name for name, _, _ in rows] == ["jaxrd", "eager", "bf16"]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {name: len(seconds) for name, seconds in figures["seconds"].items()} == {"jaxrd": 3, "eager": 3, "bf16": 3}
    by_turn = [theirs / ours for ours, theirs in zip(figures["seconds"]["jaxrd"], figures["seconds"]["eager"])]
    assert figures["ratios"]["eager"]["ratio"] == pytest.approx(statistics.median(by_turn))
    assert figures["pytorch"]["method"] == "pgd_at" and figures["pytorch_errors"] == {}


@pytest.mark.parametrize("arguments, mentions", [
    (["--config.method=path", "--config.method.path_points=1", "--config.teacher=runs/nowhere"], ["--compare=torch", "path"]),
    (["--config.threat.norm=l2"], ["--compare=torch", "config.threat.norm is l2"]),
    (["--torch_variants=fast"], ["fast", "channels_last"]),
])
def test_what_pytorch_does_not_have_is_one_line(tiny_arrays, arguments, mentions):
    pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[parity]'")
    status, _, error = benchmark(f"--config.data.arrays={tiny_arrays}", "--config.data.examples=None", "--compare=torch",
                                 "--teacher_model=resnet6_w4", *arguments)
    assert status != 0 and error.startswith("error: ") and len(error.strip().splitlines()) == 1
    for mention in mentions:
        assert mention in error


def test_without_pytorch_the_comparison_says_how_to_get_it(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as util\nfind = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n")
    status, _, error = benchmark("--compare=torch", environment={"PYTHONPATH": str(tmp_path)})
    assert status != 0 and error == "error: --compare=torch needs PyTorch; pip install -e '.[parity]'\n"
