"""SLURM itself, as a cluster of this one machine: what a task finds, and a preempted job that goes on by itself."""

import json
import pathlib
import subprocess
import sys
import time

import pytest

from tests.launch import slurm_cluster
from tests.launch.commands import ROOT, environment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment in which SLURM's commands work."""
    try:
        with slurm_cluster.running(tmp_path_factory.mktemp("slurm")) as variables:
            yield environment(**variables)
    except slurm_cluster.NoCluster as why:
        pytest.skip(f"no SLURM: {why}")


def call(slurm, *command, timeout=90):
    return subprocess.run(command, env=slurm, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def test_tasks_of_a_step_are_the_processes_of_one_run(slurm):
    done = call(slurm, "srun", "-n", "2", sys.executable, "-m", "tests.launch.together", "--cpu_devices=2", "--steps=2")
    assert (done.returncode, done.stderr) == (0, "")
    found, *sums = done.stdout.splitlines()
    assert found.startswith("2 processes x 2 cpu devices, found by SLURM; coordinator ")
    assert sums == ["step 1: 6 over 4 devices", "step 2: 6 over 4 devices"]


@pytest.mark.parametrize("how", ["one task", "a batch script without srun"])
def test_a_task_alone_is_one_process_and_silent(slurm, tmp_path, how):
    command = [sys.executable, "-m", "tests.launch.together", "--cpu_devices=2", "--steps=1"]
    if how == "one task":
        out = call(slurm, "srun", "-n", "1", *command).stdout
    else:
        file = tmp_path / "out"
        call(slurm, "sbatch", "--wait", "-n", "2", f"--output={file}", f"--wrap={' '.join(command)}")
        out = file.read_text()
    assert out == "step 1: 2 over 2 devices\n"


@pytest.mark.parametrize("tasks", [1, 2])
def test_a_preempted_job_requeues_and_resumes(slurm, tmp_path, tiny_arrays, tasks):
    run, out = tmp_path / "run", tmp_path / "out"
    sent = call(
        {**slurm, "JAXRD_PYTHON": sys.executable}, "sbatch", f"--ntasks={tasks}", f"--output={out}", "launch/slurm.sbatch",
        "launch.train", "--config=configs/digits.py:pgd_at", f"--workdir={run}", "--cpu_devices=2",
        f"--config.data.arrays={tiny_arrays}", "--config.data.examples=None", "--config.student=resnet6_w4",
        "--config.training.batch_size=16", "--config.attack.steps=1", "--config.training.steps=100000",
        "--config.training.checkpoint_every=100000", "--config.training.log_every=20")
    job = sent.stdout.split()[-1]
    assert job.isdecimal(), sent.stderr

    def log():
        return pathlib.Path(out).read_text(errors="replace") if out.exists() else ""

    def steps():
        metrics = run / "metrics.jsonl"
        return [json.loads(line)["step"] for line in metrics.read_text().splitlines()] if metrics.exists() else []

    def state():
        return call(slurm, "squeue", "-h", "-j", job, "-o", "%T").stdout.strip()

    try:
        _until(lambda: steps() and max(steps()) >= 40, log)
        call(slurm, "scancel", "--signal=TERM", "--full", job)
        _until(lambda: "stopped by SIGTERM after step" in log(), log)
        stopped = int(log().split("stopped by SIGTERM after step ")[1].split(";")[0])
        assert stopped >= 40
        _until(lambda: "restart 1 of at most" in log(), log)

        assert stopped in [int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal()]
        # SLURM holds a requeued job back for two minutes, unless told that it may begin: told only once it is queued again,
        # for the requeue sets the time anew, and not at once, for the node takes what begins in the second of the requeue for
        # the job that has just ended ("credential revoked"), and the job is gone.
        _until(lambda: state() == "PENDING", log)
        assert call(slurm, "scontrol", "update", f"JobId={job}", "StartTime=now+4").returncode == 0
        _until(lambda: max(steps()) > stopped + 40, log, seconds=200)
        assert sorted(set(steps())) == steps()
    finally:
        call(slurm, "scancel", job)


def _until(condition, log, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log()
        time.sleep(0.3)
