"""Runs a command as several processes on this host: `python -m launch.local --processes=2 -- launch.train --config=...`.

    python -m launch.local --processes=2 --cpu_devices=2 -- launch.train --config=configs/digits.py:pgd_at --workdir=runs/a
    python -m launch.local --processes=4 --devices_per_process=1 -- launch.train ...       (4 GPUs; not tested on any yet)

Lines of processes other than 0 begin with their number, "[1] ". SIGTERM, SIGINT and SIGUSR1 go to all of them. When one ends
badly the others get --grace seconds to end by themselves and are killed then. The exit status is that of the first that ended
badly, 128 + N where a signal N killed it. None outlives this launcher, however it ends (on Linux).
"""

import argparse
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        sys.exit(_say(f"error: {message}; such as python -m launch.local --processes=2 --cpu_devices=2 -- launch.train "
                      "--config=...", 1))


def main(arguments: list[str]) -> int:
    """Runs the processes and returns the exit status."""
    options, command = _parse(arguments)
    port = _free_port()
    children = [_start(number, port, options, command) for number in range(options.processes)]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, _: _signal(children, number))
    readers = [threading.Thread(target=_pass_through, args=(number, source, target), daemon=True)
               for number, child in enumerate(children)
               for source, target in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)) if source]
    for reader in readers:
        reader.start()
    try:
        first = _wait(children, options.grace)
    finally:
        _signal(children, signal.SIGKILL)
        for child in children:
            child.wait()
    for reader in readers:
        reader.join(5)  # a grandchild may hold the pipe
    if first is None:
        return 0
    status = children[first].returncode
    if status < 0:
        return _say(f"process {first} was killed by {signal.Signals(-status).name}", 128 - status)
    return _say(f"process {first} ended with status {status}", status)


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = _Parser(prog="python -m launch.local", description=__doc__, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, required=True, help="how many processes")
    parser.add_argument("--cpu_devices", type=int, help="fake CPU devices of each process")
    parser.add_argument("--devices_per_process", type=int, help="GPUs of each process, by CUDA_VISIBLE_DEVICES")
    parser.add_argument("--grace", type=float, default=60.0, help="seconds that the others get when one ends badly")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --: the module and its arguments")
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    for name in ("processes", "cpu_devices", "devices_per_process"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; it must be at least 1")
    if options.cpu_devices and options.devices_per_process:
        parser.error("--cpu_devices and --devices_per_process exclude each other; the first is for fake devices")
    if not command or command[0].startswith("-"):
        parser.error("the module to run is missing after --")
    if taken := [argument for argument in command if argument.startswith(("--coordinator", "--processes", "--process_id"))]:
        parser.error(f"{taken[0]} stands after --, but this launcher gives the processes their numbers; leave it out")
    return options, command


def _start(number: int, port: int, options: argparse.Namespace, command: list[str]) -> subprocess.Popen:
    module, *rest = command
    flags = [f"--coordinator=127.0.0.1:{port}", f"--processes={options.processes}", f"--process_id={number}"]
    if options.cpu_devices:
        flags.append(f"--cpu_devices={options.cpu_devices}")
    environment = dict(os.environ)
    if each := options.devices_per_process:
        there = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name] or [
            str(device) for device in range(options.processes * each)]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(there[number * each:(number + 1) * each])
    launcher = os.getpid()
    return subprocess.Popen(
        [sys.executable, "-m", module, *flags, *rest], env=environment, preexec_fn=lambda: _die_with(launcher),
        # Its own session: Ctrl-C in a terminal comes once, from here.
        start_new_session=True, stdout=subprocess.PIPE if number else None, stderr=subprocess.PIPE if number else None)


def _die_with(launcher: int) -> None:
    """Has the kernel kill this process when the launcher is gone."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != launcher:  # gone before
            os._exit(1)


def _wait(children: list[subprocess.Popen], grace: float) -> int | None:
    """Returns, once all have ended or the grace is over, the number of the first that ended badly; None for none."""
    first, deadline = None, None
    while any(child.poll() is None for child in children):
        if first is None:
            first = _bad(children)
            deadline = None if first is None else time.monotonic() + grace
        elif time.monotonic() > deadline:
            return first
        time.sleep(0.05)
    return _bad(children) if first is None else first


def _bad(children: list[subprocess.Popen]) -> int | None:
    """Returns the number of one that has ended badly, rather a killed one, for the others may be its echo."""
    bad = [number for number, child in enumerate(children) if child.poll()]
    return min(bad, key=lambda number: (children[number].returncode > 0, children[number].returncode == 75), default=None)


def _signal(children: list[subprocess.Popen], number: int) -> None:
    for child in children:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if number == signal.SIGKILL else os.kill)(child.pid, number)


def _pass_through(number: int, source, target) -> None:
    for line in source:
        target.buffer.write(f"[{number}] ".encode() + line)
        target.buffer.flush()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _say(text: str, status: int) -> int:
    print(text, file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
