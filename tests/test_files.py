"""The lock that lets one at a time in, whoever dies; files that are replaced whole; what the dead leave; checksums."""

import concurrent.futures
import hashlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from jaxrd import files

ROOT = pathlib.Path(__file__).parents[1]


def test_of_many_threads_one_is_inside_and_the_file_is_gone_afterwards(tmp_path):
    inside, most = [], []

    def enter(_):
        for _ in range(20):
            with files.alone(tmp_path / "deep" / "lock") as alone:
                inside.append(None)
                most.append((alone, len(inside)))
                time.sleep(0.0005)
                inside.pop()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(enter, range(8)))
    assert set(most) == {(True, 1)} and len(most) == 160
    assert list((tmp_path / "deep").iterdir()) == []


HOLD = """
import sys, pathlib, time
from jaxrd import files
with files.alone(pathlib.Path(sys.argv[1])):
    print("inside", flush=True)
    time.sleep(600)
"""


def test_whoever_waits_is_told_for_whom_and_comes_in_when_that_one_is_killed(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "lock")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "inside\n"
    told, done = threading.Event(), []

    def enter():
        with files.alone(tmp_path / "lock", lambda name: (done.append(name), told.set())):
            done.append("inside")

    thread = threading.Thread(target=enter)
    thread.start()
    assert told.wait(60) and len(done) == 1 and done[0].startswith(f"process {holder.pid} on ")
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    thread.join(60)
    assert done[1:] == ["inside"] and list(tmp_path.iterdir()) == []


def test_an_exception_lets_the_next_one_in(tmp_path):
    with pytest.raises(KeyError), files.alone(tmp_path / "lock"):
        raise KeyError
    with files.alone(tmp_path / "lock", lambda name: pytest.fail(name)):
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_file_system_without_locks_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    with files.alone(tmp_path / "lock") as first, files.alone(tmp_path / "lock") as second:
        assert (first, second) == (False, False)


def test_a_lock_that_cannot_be_made_is_an_error_of_the_system(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError), files.alone(tmp_path / "file" / "lock"):
        pytest.fail("inside")


def test_of_two_writers_at_once_each_writes_a_file_of_its_own(tmp_path):
    path = tmp_path / "file"
    with files.replacing(path, "w") as first:
        first.write("first" * 1000)
        with files.replacing(path, "w") as second:
            second.write("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first" * 1000 and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path, kind):
    (tmp_path / "file").write_text("old")
    with pytest.raises(kind), files.replacing(tmp_path / "file") as file:
        file.write(b"half")
        raise kind
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {"file": "old"}


def test_what_is_removed_is_that_of_dead_processes_of_this_machine(tmp_path):
    host, living = socket.gethostname(), subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stay = [f".x-{host}-{living.pid}-a", f".x-{host}-{os.getpid()}-1", f".x-{host}-{dead.pid}-{dead.pid}-a",
            f".x-{host}-word-a", f".x-other{host}-{dead.pid}-a", f".y-{host}-{dead.pid}-a"]
    for name in [*stay, f".x-{host}-{dead.pid}-a", f".x-{host}-{dead.pid}-17", f".x-{host}-{'9' * 30}-17"]:
        (tmp_path / name / "below").mkdir(parents=True)
    files.remove_left(tmp_path, f".x-{host}-")
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(stay)
    living.communicate(b"\n")


def test_sha256_is_that_of_the_content(tmp_path):
    for content in (b"", b"x" * 1_000_003):
        (tmp_path / "file").write_bytes(content)
        assert files.sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
