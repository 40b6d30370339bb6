"""Several processes of a command: what ends one ends all, in bounded time, with one message and a documented status."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.launch.commands import ROOT, environment

TOGETHER = "tests.launch.together"
LOST = "; the others stop; nothing but the work since the last checkpoint is lost: give the same command again\n"


def local(*arguments, **variables):
    return subprocess.run([sys.executable, "-m", "launch.local", *arguments], cwd=ROOT, env=environment(**variables),
                          capture_output=True, text=True, timeout=100)


def two(*arguments):
    return local("--processes=2", "--cpu_devices=2", "--", TOGETHER, *arguments)


def test_processes_join_compute_and_end():
    done = two("--steps=2")
    assert (done.returncode, done.stderr) == (0, "")
    found, *sums = done.stdout.splitlines()
    assert re.fullmatch(r"2 processes x 2 cpu devices, found by flags; coordinator 127\.0\.0\.1:\d+", found)
    assert sums == ["step 1: 6 over 4 devices", "step 2: 6 over 4 devices"]


@pytest.mark.parametrize("how, says", [
    ("refuse", r"error: process 1: refused by one alone\n"),
    pytest.param("all refuse", r"error: (process 1: )?the same in all\n", marks=pytest.mark.slow),  # whose came first
    ("together", r"error: process 1: refused, together\n"),
])
def test_a_refusal_is_said_once_and_ends_all(how, says):
    done = two(f"--how={how}")
    assert done.returncode == 1
    assert re.fullmatch(says + r"process \d ended with status 1\n", done.stderr)


def test_a_bug_of_one_keeps_its_traceback_and_ends_all():
    done = two("--how=raise")
    assert done.returncode == 1
    assert done.stderr.startswith("process 1:\nTraceback") and done.stderr.count("Traceback") == 1
    assert "ArithmeticError: a bug of one\n" in done.stderr


def test_the_faked_environment_of_slurm():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_NODEID": "0",
                 "SLURM_STEP_TASKS_PER_NODE": "2", "JAX_COORDINATOR_PORT": str(port)}
    tasks = [start("--cpu_devices=2", "--steps=1", SLURM_PROCID=str(task), SLURM_LOCALID=str(task), **variables)
             for task in range(2)]
    try:
        outputs = [task.communicate(timeout=100) for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert outputs == [(f"2 processes x 2 cpu devices, found by SLURM; coordinator localhost:{port}\n"
                        "step 1: 6 over 4 devices\n", ""), ("", "")]


def start(*arguments, **variables):
    return subprocess.Popen([sys.executable, "-m", TOGETHER, *arguments], cwd=ROOT, env=environment(**variables), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def running(processes, **variables):
    """Starts that many, each in steps without end, and returns them once all of them take steps."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [start(f"--coordinator=127.0.0.1:{port}", f"--processes={processes}", f"--process_id={process}",
                     "--cpu_devices=2", "--steps=1000000", **variables) for process in range(processes)]
    for line in started[0].stdout:
        if line.startswith("step 2"):
            return started
    raise AssertionError(started[0].communicate())


@pytest.mark.parametrize("processes, victim, speaker", [(2, 0, 1), (3, 1, 0)])
def test_a_process_that_is_killed_ends_the_others_with_one_line(processes, victim, speaker):
    started = running(processes)
    started[victim].kill()
    began = time.monotonic()
    for process, each in enumerate(started):
        _, error = each.communicate(timeout=30)
        if process != victim:
            assert each.returncode == 75
            assert error == ((f"error: process {victim} of {processes} is lost (its connection closed: it was killed, ran out "
                              f"of memory or was disconnected){LOST}") if process == speaker else "")
    assert time.monotonic() - began < 10


@pytest.mark.slow
@pytest.mark.parametrize("victim, says", [(0, "one of 2 processes"), (1, "process 1 of 2")])
def test_a_process_that_no_longer_answers_ends_the_others(victim, says):
    """Its machine may be gone: no connection closes, and JAX's heartbeats find out, in a thread of C++."""
    started = running(2, JAXRD_HEARTBEAT_TIMEOUT="8")
    started[victim].send_signal(signal.SIGSTOP)
    try:
        _, error = started[1 - victim].communicate(timeout=60)
    finally:
        started[victim].kill()
        started[victim].communicate()
    assert started[1 - victim].returncode == 75
    assert error == f"error: {says} is lost (it no longer answers){LOST}"


def children(launcher):
    """{process number: process id} of the processes of a launcher."""
    found = {}
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            parent = re.search(r"PPid:\s*(\d+)", (path / "status").read_text())[1]
            number = re.search(r"--process_id=(\d+)", (path / "cmdline").read_text())
        except OSError:
            continue
        if int(parent) == launcher.pid and number:
            found[int(number[1])] = int(path.name)
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("how", ["a child", "the launcher", "interrupted"])
def test_the_launcher_leaves_no_process_behind(how):
    launcher = subprocess.Popen(
        [sys.executable, "-m", "launch.local", "--processes=2", "--cpu_devices=1", "--", TOGETHER, "--steps=1000000"],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in launcher.stdout:
        if line.startswith("step 2"):
            break
    there = children(launcher)
    assert set(there) == {0, 1}
    if how == "a child":
        os.kill(there[1], signal.SIGKILL)
    else:
        launcher.send_signal(signal.SIGKILL if how == "the launcher" else signal.SIGINT)
    _, error = launcher.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while any(pathlib.Path(f"/proc/{child}/fd").exists() and _alive(child) for child in there.values()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if how == "a child":
        assert launcher.returncode == 137
        assert error == (f"error: process 1 of 2 is lost (its connection closed: it was killed, ran out of memory or was "
                         f"disconnected){LOST}process 1 was killed by SIGKILL\n")
    elif how == "interrupted":
        assert launcher.returncode == 130 and "Traceback" not in error and error.count("interrupted\n") == 1, error


def _alive(child):
    try:
        return "Z" not in re.search(r"State:\s*(\w)", pathlib.Path(f"/proc/{child}/status").read_text())[1]
    except OSError:
        return False


@pytest.mark.parametrize("arguments, mentions", [
    ([], ["--processes"]),
    (["--processes=0", "--", TOGETHER], ["--processes is 0", "at least 1"]),
    (["--processes=2"], ["module", "missing"]),
    (["--processes=2", "--cpu_devices=1", "--devices_per_process=1", "--", TOGETHER], ["exclude each other"]),
    (["--processes=2", "--", TOGETHER, "--process_id=1"], ["--process_id=1", "leave it out"]),
])
def test_mistakes_of_the_launcher_are_one_line(arguments, mentions):
    done = local(*arguments)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert all(mention in done.stderr for mention in mentions), done.stderr


def test_the_files_of_the_clusters_can_be_read():
    import yaml

    for name in ("slurm.sbatch", "tpu_vm.sh"):
        subprocess.run(["sh", "-n", ROOT / "launch" / name], check=True)
    job = yaml.safe_load((ROOT / "launch" / "gke.yaml").read_text())
    (workers,) = job["spec"]["replicatedJobs"]
    spec = workers["template"]["spec"]
    (command,) = spec["template"]["spec"]["containers"][0]["args"]
    host = f"{job['metadata']['name']}-{workers['name']}-0-0.{job['metadata']['name']}"
    assert f"--coordinator={host}:" in command and f"--processes={spec['parallelism']} " in command
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
