"""The roll call of several processes, and the line that stays open to each: who joined, who is lost, who ended and why.

Process 0 listens at the coordinator's address until every process has said its number, answers with the port of JAX's own
service, and keeps the connections. The kernel closes that of a process which dies, so process 0 knows at once which one it
was, and tells the rest. JAX's runtime knows only after its heartbeats fail, and then ends every process with pages of log.

Messages are lines of JSON. To process 0: {"process", "processes"} to join, {"ended", "text"} from a process that an error
ends, {"done"} at the end of the work, {"here"} when asked. From it: {"go": port} or {"refused", "status"}, later {"ask"}, and
{"stop": status} or {"over"} at the end.
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from typing import NoReturn

from jaxrd.errors import InputError

LOST = 75  # exit status of the processes that are left: EX_TEMPFAIL of <sysexits.h>, worth another try
_LOST = "the others stop; nothing but the work since the last checkpoint is lost: give the same command again"
_LONGEST = 1 << 20  # bytes of a message


class RollCallError(InputError):
    """The processes did not come together: `status` to exit with, and whether this process is the one that `speaks`."""

    def __init__(self, message: str, *, status: int = 1, speaks: bool = True):
        super().__init__(message)
        self.status, self.speaks = status, speaks


class Lifelines:
    """The open connections of this process: of process 0 to every other, of any other to process 0.

    Args:
      process: this process's number.
      processes: how many there are.
      peers: {number: its connection}.
      port: of JAX's own service, on the coordinator's host.
    """

    def __init__(self, process: int, processes: int, peers: dict[int, "Peer"], port: int):
        self.process, self.processes, self.port = process, processes, port
        self._peers, self._done, self._answered = peers, set(), set()
        self._all_done, self._over, self._ending = threading.Event(), threading.Event(), threading.Lock()
        threading.Thread(target=self._watch, name="lifelines", daemon=True).start()

    def finish(self, patience: float | None = None) -> bool:
        """Returns when the work of every process is done (True), or once `patience` seconds have passed (False)."""
        if self.process:
            self._peers[0].send(done=True)
            return self._over.wait(None if patience is None else patience + 5)
        if not self._all_done.wait(patience):
            return False
        self._over.set()
        for peer in self._peers.values():
            peer.send(over=True)
        return True

    def fail(self, status: int, text: str) -> NoReturn:
        """Ends every process with `status`, for an error of this one; process 0 prints `text`, of several the first."""
        if self.process and not self._over.is_set() and self._peers[0].send(ended=status, text=text):
            time.sleep(5)  # process 0 answers at once, and that ends this process
        self._stop(status, text)

    def lost(self, text: str, patience: float = 2.0) -> NoReturn:
        """Ends every process as `LOST`, where one is gone, unless another thread knows within `patience` seconds which.

        Process 0 asks the others meanwhile, and names those that do not answer; where all do, it says `text`.
        """
        self._answered.clear()
        if self.process == 0:
            for peer in self._peers.values():
                peer.send(ask=True)
        time.sleep(patience)
        if self.process == 0 and (silent := sorted(set(self._peers) - self._answered)):
            names = ", ".join(map(str, silent[:8])) + (" and others" if len(silent) > 8 else "")
            text = f"process{'es' if len(silent) > 1 else ''} {names} of {self.processes} is lost (it no longer answers)"
        self.fail(LOST, f"error: {text}; {_LOST}\n")

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for number, peer in self._peers.items():
                peer.socket.settimeout(None)
                selector.register(peer.socket, selectors.EVENT_READ, number)
            while selector.get_map():
                for key, _ in selector.select():
                    messages, open_ = self._peers[key.data].receive()
                    for message in messages:
                        self._heard(key.data, message)
                    if not open_ or self.process and self._over.is_set():
                        selector.unregister(key.fileobj)
                        key.fileobj.close()
                        self._closed(key.data)

    def _heard(self, number: int, message: dict) -> None:
        if "stop" in message:
            self._stop(message["stop"], "")
        elif "over" in message:
            self._over.set()
        elif "ended" in message:
            self._stop(message["ended"], message["text"])
        elif "ask" in message:
            self._peers[0].send(here=True)
        elif "here" in message:
            self._answered.add(number)
        elif "done" in message:
            self._done.add(number)
            if len(self._done) == self.processes - 1:
                self._all_done.set()

    def _closed(self, number: int) -> None:
        if not self._over.is_set() and number not in self._done:
            self._stop(LOST, f"error: process {number} of {self.processes} is lost (its connection closed: it was killed, ran "
                             f"out of memory or was disconnected); {_LOST}\n")

    def _stop(self, status: int, text: str) -> NoReturn:
        """Ends this process, and as process 0 every other; from whichever thread comes first."""
        if not self._ending.acquire(blocking=False):
            time.sleep(10)
        if self.process == 0:
            for peer in self._peers.values():
                peer.send(stop=status)
        # Without process 0 the others cannot agree on one that speaks: the last one, for the first ones may share its machine.
        if text and (self.process in (0, self.processes - 1) or sys.stderr.isatty()):
            _write(text)
        flush = threading.Thread(target=flush_streams, daemon=True)  # another thread may hold a stream and wait for ever
        flush.start()
        flush.join(1)
        time.sleep(0.3 if self.process == 0 else 0)  # or what was not read here would take back what was sent
        os._exit(status)


class Peer:
    """One connection, in lines of JSON."""

    def __init__(self, connection: socket.socket):
        self.socket, self._buffer, self._lock = connection, b"", threading.Lock()

    def send(self, **message) -> bool:
        """Returns whether the other side was still there."""
        try:
            with self._lock:
                self.socket.sendall(json.dumps(message).encode() + b"\n")
            return True
        except OSError:
            return False

    def receive(self) -> tuple[list[dict], bool]:
        """Returns what has come, and whether the connection is still open; anything but our messages closes it."""
        try:
            received = self.socket.recv(1 << 16)
        except OSError:
            received = b""
        *lines, self._buffer = (self._buffer + received).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            return [], False
        if not all(isinstance(message, dict) for message in messages):
            return [], False
        return messages, bool(received) and len(self._buffer) < _LONGEST


def join(coordinator: str, processes: int, process: int, *, timeout: float, silence: float) -> Lifelines:
    """Returns when every process has joined.

    Args:
      coordinator: HOST:PORT of process 0.
      processes: how many there are.
      process: this one's number.
      timeout: seconds to wait for the others.
      silence: seconds after which a machine that no longer answers counts as lost.

    Raises:
      RollCallError: a process did not join in time, or the processes do not fit together; every process raises it.
    """
    host, port = coordinator.rsplit(":", 1)
    host, deadline = host.strip("[]"), time.monotonic() + timeout
    if process == 0:
        peers, jax_port = _call(coordinator, int(port), processes, deadline, timeout)
    else:
        peers, jax_port = _answer(coordinator, host, int(port), processes, process, deadline, timeout)
    for peer in peers.values():
        _keep_alive(peer.socket, silence)
    return Lifelines(process, processes, peers, jax_port)


def _call(coordinator, port, processes, deadline, timeout) -> tuple[dict[int, Peer], int]:
    joined: dict[int, Peer] = {}
    unknown: list[Peer] = []

    def refuse(text, status=1):
        for peer in (*joined.values(), *unknown):
            peer.send(refused=text, status=status)
        raise RollCallError(text, status=status)

    try:
        listener = _listen(port)
    except OSError as error:
        raise RollCallError(f"coordinator {coordinator}: process 0 cannot listen on that port ({error.strerror}); give "
                            "another to all processes: --coordinator=HOST:PORT") from None
    with listener, contextlib.ExitStack() as strangers, selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while len(joined) < processes - 1:
            left = deadline - time.monotonic()
            if left <= 0:
                missing = [str(number) for number in range(1, processes) if number not in joined]
                names = ", ".join(missing[:8]) + (" and others" if len(missing) > 8 else "")
                refuse(f"{len(missing)} of {processes} processes did not join within {timeout:g} s (missing: {names}; "
                       f"coordinator {coordinator}); see why they did not start, or wait longer with --start_timeout", LOST)
            for key, _ in selector.select(left):
                if key.fileobj is listener:
                    connection = strangers.enter_context(listener.accept()[0])
                    connection.settimeout(10)
                    unknown.append(Peer(connection))
                    selector.register(connection, selectors.EVENT_READ, unknown[-1])
                    continue
                messages, open_ = key.data.receive()
                for message in messages:
                    number, count = message.get("process"), message.get("processes")
                    if type(number) is not int or type(count) is not int:
                        open_ = False  # a stranger
                        break
                    if count != processes:
                        refuse(f"process {number} was started as one of {count} processes, process 0 as one of {processes}; "
                               "give all of them the same --processes")
                    if number in joined or number not in range(1, processes):
                        refuse(f"two processes say that they are process {number}; give each its own --process_id, 0 to "
                               f"{processes - 1}")
                    joined[number] = key.data
                if not open_:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
                    joined = {number: peer for number, peer in joined.items() if peer is not key.data}
        # Closing one that has joined must not end it: its connection goes on in another object.
        joined = {number: Peer(socket.socket(fileno=peer.socket.detach())) for number, peer in joined.items()}
    with socket.socket() as free:
        free.bind(("", 0))
        jax_port = free.getsockname()[1]
    for peer in joined.values():
        peer.send(go=jax_port)
    return joined, jax_port


def _answer(coordinator, host, port, processes, process, deadline, timeout) -> tuple[dict[int, Peer], int]:
    why = ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((host, port), timeout=min(left, 10))
            if connection.getsockname() == connection.getpeername():  # nobody listens, and the kernel gave out that very port
                connection.close()
                raise ConnectionRefusedError(0, "Connection refused")
        except OSError as error:
            why = error.strerror or str(error)
            time.sleep(min(0.2, left))
            continue
        peer = Peer(connection)
        peer.send(process=process, processes=processes)
        connection.settimeout(max(deadline - time.monotonic(), 0) + timeout + 2)  # process 0 may have begun later
        messages, open_ = peer.receive()
        while open_ and not messages:  # a line may come in parts
            messages, open_ = peer.receive()
        for message in messages:
            if "refused" in message:
                connection.close()
                raise RollCallError(message["refused"], status=message["status"], speaks=False)
            if "go" in message:
                return {0: peer}, message["go"]
        connection.close()
        why = "something answers there, but not process 0 of this run"
        time.sleep(min(1, left))
    raise RollCallError(
        f"process {process} of {processes} cannot reach process 0 at {coordinator} within {timeout:g} s ({why}); see whether "
        "it started and that --coordinator is its host and a port that is free and open", status=LOST,
        speaks=process == processes - 1 or sys.stderr.isatty())


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        except OSError:
            pass  # a kernel without IPv6
    return socket.create_server(("", port), backlog=1024)


def _keep_alive(connection: socket.socket, silence: float) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", silence / 2), ("TCP_KEEPINTVL", silence / 6), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), max(int(value), 1))


def _write(text: str) -> None:
    """Writes to the process's standard error, past Python's streams, which another thread may hold."""
    raw = text.encode(errors="replace")
    while raw:
        raw = raw[os.write(2, raw):]


def flush_streams() -> None:
    """Writes what Python's streams still hold."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
