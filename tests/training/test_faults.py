"""What befalls a run of two processes costs the work since its last checkpoint and no more, and the message says what to do.

Every interrupted run is started once more, by the same command, and must end as the one that nothing happened to: the same
weights to the bit, the same losses, every step logged once.
"""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxrd.training import checkpoint, loop
from jaxrd.training.log import read_metrics
from tests.support import assert_input_error
from tests.training.faulty import SAVED, STOPPED, UNSAVED

ROOT = pathlib.Path(__file__).parents[2]
LAST = 10
LOST = ("error: process {} of 2 is lost (its connection closed: it was killed, ran out of memory or was disconnected); the "
        "others stop; nothing but the work since the last checkpoint is lost: give the same command again\n")


@pytest.fixture(scope="module")
def flags(tiny_arrays):
    """Of a run of 10 steps that saves after 4, 8 and 10."""
    return ["--config=configs/digits.py:pgd_at", f"--config.data.arrays={tiny_arrays}", "--config.data.examples=None",
            "--config.data.shift=1", "--config.data.selection=last", "--config.student=resnet6_w4",
            "--config.training.batch_size=16", "--config.attack.steps=1", f"--config.training.steps={LAST}",
            f"--config.training.checkpoint_every={SAVED}", "--config.training.log_every=1", "--config.training.keep=5"]


@pytest.fixture(scope="module")
def uninterrupted(flags, tmp_path_factory):
    """The run directory that every other must come to."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    finish(workdir, flags)
    return workdir


def two(workdir, flags, fault=None, **variables):
    """Starts the two processes, at once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    module = "tests.training.faulty" if fault else "launch.train"
    return [subprocess.Popen(
        [sys.executable, "-m", module, f"--coordinator=127.0.0.1:{port}", "--processes=2", f"--process_id={process}",
         "--cpu_devices=2", f"--workdir={workdir}", *flags],
        cwd=ROOT, env=os.environ | {"FAULT": fault or ""} | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True) for process in range(2)]


def ended(processes, seconds=120):
    """Returns [(status, stdout, stderr)] and how long the last took to end after the first."""
    deadline = time.monotonic() + seconds
    try:
        while all(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.05)
        began = time.monotonic()
        outputs = [process.communicate(timeout=max(deadline - time.monotonic(), 1)) for process in processes]
        return [(process.returncode, *output) for process, output in zip(processes, outputs)], time.monotonic() - began
    finally:
        for process in processes:
            process.kill()


def finish(workdir, flags):
    """Runs the command to its end and returns what it printed."""
    results, _ = ended(two(workdir, flags))
    assert [(status, error) for status, _, error in results] == [(0, "")] * 2, results
    assert results[1][1] == ""
    return results[0][1]


def check_equal(workdir, expected):
    """The last weights to the bit, every number that was logged, and nothing left over."""
    found, wanted = (checkpoint.restore_model(path)[1] for path in (workdir, expected))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert measured(workdir) == measured(expected)
    assert [name for name in names(workdir) if not name.startswith("damaged-")] == names(expected) == ["10", "4", "8"]


def measured(workdir):
    timings = {"seconds", "images_per_second", "input_wait"}
    return [{name: value for name, value in entry.items() if name not in timings}
            for entry in read_metrics(workdir / "metrics.jsonl")]


def names(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("moment, resumed, victim", [
    ("kill in training", SAVED, 0), ("kill in training", SAVED, 1), ("kill in a save", SAVED, 0), ("kill in a save", SAVED, 1),
    ("kill in the first step", 0, 1)])
def test_a_killed_process_costs_the_work_since_the_last_checkpoint(
        uninterrupted, flags, tmp_path, moment, resumed, victim):
    workdir = tmp_path / "run"
    # Without the cache of compiled programs the first step takes seconds.
    results, took = ended(two(workdir, flags, f"{moment}:{victim}",
                              JAX_ENABLE_COMPILATION_CACHE="false" if not resumed else "true"))
    assert results[victim][0] == -signal.SIGKILL
    assert results[1 - victim][::2] == (75, LOST.format(victim))
    assert took < 15
    if resumed:
        assert [name for name in names(workdir) if name.isdigit()] == [str(resumed)]
        assert any(name.startswith(f"{UNSAVED}.") for name in names(workdir)) == (moment == "kill in a save")
    else:
        assert not checkpoint.has_checkpoints(workdir) and "compiled" not in results[0][1]

    out = finish(workdir, flags)
    assert (f"resumed after step {resumed} of 10" if resumed else "seed 0, 10 steps") in out
    check_equal(workdir, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("name, status, to", [("SIGTERM", 143, 1), ("SIGUSR1", 138, 0)])
def test_a_signal_to_one_stops_both_after_the_same_step(uninterrupted, flags, tmp_path, name, status, to):
    workdir = tmp_path / "run"
    results, took = ended(two(workdir, flags, f"{name}:{to}"))
    assert [(status, error) for status, _, error in results] == [(status, "")] * 2
    assert took < 15
    assert f"stopped by {name} after step {STOPPED}; the same command goes on from there\n" in results[0][1]
    assert names(workdir) == [str(SAVED), str(STOPPED)]
    assert f"resumed after step {STOPPED} of 10" in finish(workdir, flags)
    shutil.rmtree(workdir / "checkpoints" / str(STOPPED))  # which the other has not
    check_equal(workdir, uninterrupted)


@pytest.mark.slow
def test_two_processes_fall_back_on_the_checkpoint_before_a_truncated_one(uninterrupted, flags, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(LAST))
    for path in (workdir / "checkpoints" / str(UNSAVED) / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    out = finish(workdir, flags)
    warnings = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert re.fullmatch(r"warning: .*/checkpoints/8: this checkpoint is damaged \(.*\); it is now damaged-8, and an "
                        "earlier one is taken", warnings[0])
    assert f"resumed after step {SAVED} of 10" in out
    assert f"damaged-{UNSAVED}" in names(workdir)
    check_equal(workdir, uninterrupted)


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of so many KiB, and gives it more when called again."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = False

    def sized(kibibytes):
        nonlocal mounted
        options = f"size={kibibytes}k" + (",remount" if mounted else "")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "jaxrd", place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted: {done.stderr.strip()}")
        mounted = True
        return place

    if shutil.which("mount") is None:
        pytest.skip("no mount command")
    yield sized
    if mounted:
        subprocess.run(["umount", place], check=True)


def size_of(workdir):
    """Its size in KiB on a file system of pages of 4 KiB."""
    return sum(-(-path.stat().st_size // 4096) * 4 for path in workdir.rglob("*") if path.is_file())


@pytest.mark.slow
def test_a_full_disk_ends_two_processes_with_one_line_and_what_is_saved_stays(uninterrupted, flags, tmp_path, small_disk):
    each = size_of(uninterrupted / "checkpoints" / str(LAST))
    workdir = small_disk(each * 4 // 5 + 256) / "run"  # what is asked for besides the arrays, and most of one
    results, took = ended(two(workdir, flags))
    assert [status for status, *_ in results] == [1, 1] and results[1][2] == ""
    assert took < 30
    assert re.fullmatch(
        rf"error: process 0: {workdir}/checkpoints: the checkpoint of step 8 cannot be written: it takes up to "
        r"[\d.]+ MB, and [\d.]+ MB are free; step 4 is saved; make room there and give the same command again\n",
        results[0][2])
    assert "4" in names(workdir) and "8" not in names(workdir)
    small_disk(10_000)
    assert f"resumed after step {SAVED} of 10" in finish(workdir, flags)
    check_equal(workdir, uninterrupted)


def test_a_full_disk_ends_a_run_with_one_line_and_what_is_saved_stays(tiny_config, small_disk):
    config = tiny_config(training={"steps": 6, "checkpoint_every": 2, "keep": 5})
    reference = small_disk(10_000) / "reference"
    loop.train(config, reference, devices=jax.devices()[:1])
    each, files = size_of(reference / "checkpoints" / "6"), measured(reference)
    shutil.rmtree(reference)
    workdir = small_disk(each * 5 // 2 + 20) / "run"
    assert_input_error(lambda: loop.train(config, workdir, devices=jax.devices()[:1]),
                       f"{workdir}/checkpoints: the checkpoint of step 6 cannot be written (No space left on device)",
                       "step 4 is saved", "make room there", "same command again")
    assert [name for name in names(workdir) if name.isdigit()] == ["2", "4"]
    # Not even a line of the log.
    with open(workdir.parent / "other", "wb", buffering=0) as other:
        while True:
            try:
                other.write(b"0" * 4096)
            except OSError:
                break
    assert_input_error(lambda: loop.train(config, workdir, devices=jax.devices()[:1]), str(workdir), "No space left on device")
    small_disk(each * 20)
    loop.train(config, workdir, devices=jax.devices()[:1])
    assert names(workdir) == ["2", "4", "6"] and measured(workdir) == files
