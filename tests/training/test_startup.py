"""Which process this is: flags, clusters, and a roll call that ends in bounded time with a line on what is wrong."""

import concurrent.futures
import socket
import subprocess
import sys
import time

import pytest

from jaxrd.errors import InputError
from jaxrd.training import rollcall, startup
from tests.support import assert_input_error

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[003-004,009],other", "SLURM_NTASKS": "4", "SLURM_PROCID": "2",
         "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}


@pytest.fixture
def no_cluster(monkeypatch):
    for name in [*SLURM, "SLURM_STEP_NUM_TASKS", "OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_LOCAL_SIZE", "CUDA_VISIBLE_DEVICES",
                 "KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX", "JAX_COORDINATOR_ADDRESS", "JAX_LOCAL_DEVICE_IDS"]:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize("arguments, mentions", [
    (dict(processes=2), ["--processes=2 without --coordinator and --process_id", "launch.local"]),
    (dict(coordinator="a:1"), ["--coordinator=a:1 without --processes and --process_id"]),
    (dict(process_id=1), ["--process_id=1 without"]),
    (dict(coordinator="a:1", processes=2), ["without --process_id"]),
    (dict(coordinator="a:1", processes=2, process_id=2), ["--process_id is 2 with --processes=2", "0 to 1"]),
    (dict(coordinator="a:1", processes=1), ["--processes=1", "leave it out"]),
    (dict(coordinator="a", processes=2, process_id=0), ["--coordinator is a", "HOST:PORT"]),
    (dict(coordinator="a:0", processes=2, process_id=0), ["--coordinator is a:0", "HOST:PORT"]),
    (dict(coordinator="a:65536", processes=2, process_id=0), ["--coordinator is a:65536", "HOST:PORT"]),
    (dict(processes=0), ["--processes is 0", "at least 1"]),
    (dict(process_id=-1), ["--process_id is -1", "at least 0"]),
    (dict(local_devices=0), ["--cpu_devices is 0"]),
    (dict(timeout=0.0), ["--start_timeout is 0.0"]),
    (dict(timeout=float("inf")), ["--start_timeout is inf", "below 1000000"]),
    (dict(timeout=float("nan")), ["--start_timeout is nan"]),
    (dict(silence=1.0), ["JAXRD_HEARTBEAT_TIMEOUT is 1.0", "5 to 3600"]),
])
def test_flags_that_do_not_fit_together(no_cluster, arguments, mentions):
    assert_input_error(lambda: startup.initialize(**arguments), *mentions)


def test_an_address_of_the_environment_counts_where_it_is_needed(no_cluster):
    no_cluster.setenv("JAX_COORDINATOR_ADDRESS", "a")
    assert startup.initialize(processes=1) == ""
    assert_input_error(lambda: startup.initialize(processes=2, process_id=0), "JAX_COORDINATOR_ADDRESS is a", "HOST:PORT")


@pytest.mark.parametrize("variables", [
    {},
    {**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
    {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},  # an interactive step of a larger allocation
    {name: value for name, value in SLURM.items() if "STEP" not in name},  # a shell of salloc, a batch script
    {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # a notebook's pod
])
def test_one_process_is_alone_and_silent(no_cluster, capfd, variables):
    for name, value in variables.items():
        no_cluster.setenv(name, value)
    assert startup.initialize() == "" and startup.process_id() is None
    startup.finish()
    assert capfd.readouterr() == ("", "")


def test_what_slurm_says_of_a_task(no_cluster):
    for name, value in SLURM.items():
        no_cluster.setenv(name, value)
    cluster = startup._cluster()
    assert startup._ask(cluster, None, None, None, 9) == ("SLURM", f"node003:{61440 + 7}", 4, 2, [1])
    assert startup._ask(cluster, "other:99", None, 3, 9) == ("SLURM", "other:99", 4, 3, [1])  # what is given wins
    no_cluster.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert startup._local_device_ids(cluster) == [1]
    no_cluster.setenv("CUDA_VISIBLE_DEVICES", "5")  # --gpus-per-task: it sees its own alone
    assert startup._local_device_ids(cluster) is None
    no_cluster.delenv("CUDA_VISIBLE_DEVICES")
    no_cluster.setenv("SLURM_STEP_TASKS_PER_NODE", "2,1(x3)")  # alone on its host: all of it
    assert startup._local_device_ids(cluster) is None


def test_a_cluster_that_does_not_answer_is_one_line(no_cluster):
    for name, value in SLURM.items():
        no_cluster.setenv(name, value)
    no_cluster.setenv("SLURM_NTASKS", "many")
    assert_input_error(startup.initialize, "SLURM is detected", "'many'", "--coordinator=HOST:PORT")


def join(port, *calls, timeout=1.0):
    """Runs `rollcall.join` for each (process, processes) at once and returns their results, or what they raised."""
    def one(call):
        try:
            return rollcall.join(f"127.0.0.1:{port}", call[1], call[0], timeout=timeout, silence=30)
        except InputError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(one, calls))


def test_all_that_come_together_hear_of_one_port_and_end_together(port):
    lifelines = join(port, (1, 3), (2, 3), (0, 3))
    assert len({each.port for each in lifelines}) == 1
    assert not lifelines[2].finish(0.1)  # alone
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        assert all(threads.map(lambda each: each.finish(5), lifelines))


def test_what_is_no_process_of_the_run_is_not_counted(port):
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        both = threads.submit(join, port, (0, 2))
        for message in (b"GET / HTTP/1.1\r\n\r\n", b'["process", 1]\n', b"", b"{}\n", b'{"process": [1], "processes": 2}\n',
                        b"[" * 50_000 + b"\n"):
            with _connected(port) as stranger:
                stranger.sendall(message)
        with _connected(port):  # that says nothing
            assert threads.submit(join, port, (1, 2)).result()[0].port == both.result()[0].port


def _connected(port):
    for _ in range(100):
        try:
            return socket.create_connection(("127.0.0.1", port))
        except OSError:
            time.sleep(0.02)
    raise AssertionError("nobody listens")


@pytest.mark.parametrize("calls, status, mentions", [
    ([(0, 4), (2, 4)], 75, ["2 of 4 processes did not join within 1 s", "missing: 1, 3", "--start_timeout"]),
    ([(0, 3), (1, 2)], 1, ["process 1 was started as one of 2 processes, process 0 as one of 3"]),
    ([(0, 3), (1, 3), (1, 3)], 1, ["two processes say that they are process 1", "0 to 2"]),
])
def test_a_roll_call_that_fails_is_one_line_of_process_0(port, calls, status, mentions):
    errors = join(port, *calls)
    for process, error in enumerate(errors):
        assert error.status == status and error.speaks == (process == 0)
        assert all(mention in str(error) for mention in mentions) and "\n" not in str(error)


def test_a_coordinator_that_cannot_be_reached(port):
    with socket.create_server(("127.0.0.1", port)):  # takes connections and says nothing
        mute, = join(port, (1, 2), timeout=0.5)
    closed, = join(port, (1, 2), timeout=0.5)
    other, = join(port, (1, 3), timeout=0.5)
    assert "something answers there, but not process 0" in str(mute)
    assert f"process 1 of 2 cannot reach process 0 at 127.0.0.1:{port} within 0.5 s (Connection refused)" in str(closed)
    assert (closed.status, closed.speaks, other.speaks) == (75, True, False)  # the last one speaks


def test_a_port_that_is_taken(port):
    with socket.create_server(("", port)):
        error, = join(port, (0, 2))
    assert error.status == 1 and "cannot listen on that port" in str(error) and f":{port}" in str(error)


def test_one_of_several_leaves_as_python_does():
    """Its threads end, what is registered for the end runs, what is printed is written; alone, it is left to Python."""
    code = ("import atexit, threading, time; from jaxrd.training import startup; atexit.register(print, 'registered')\n"
            "threading.Thread(target=lambda: (time.sleep(0.3), print('thread'))).start()\n"
            "startup.leave(5); print('alone'); startup._lifelines = object(); startup.leave(7); print('never')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (7, "alone\nthread\nregistered\n", "")
