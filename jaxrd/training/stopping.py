"""Requests to stop: signals that a loop honours between two steps, in several processes after the same step of all."""

import collections
import signal
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrd.training import parallel

_LAG = 2  # steps between a vote and its result where steps are in flight, so that no device is waited for


class StopSignal:
    """Turns SIGTERM, SIGUSR1 (a scheduler's warning) and Ctrl-C into a request that the loop honours after the step at hand.

    A KeyboardInterrupt in the middle of a save can leave orbax waiting for itself; a second Ctrl-C raises it all the same.

    In several processes one that gets a signal is enough: after every step they compare what they got, one number for each, and
    all stop after the same step, for the same signal. JAX's preemption service would do that for SIGTERM alone, and would hold
    that signal off from a process that does not train.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        self._requested = 0  # the signal's number
        self._old: dict[int, Any] = {}
        self._mesh, self._votes = mesh, collections.deque()
        self._lag = 0 if jax.default_backend() == "cpu" else _LAG
        self._largest = jax.jit(jnp.max, out_shardings=parallel.replicated(mesh))

    def __enter__(self):
        # Signals reach the main thread only; a run in another thread of a notebook does without.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._old[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: one that Python has not set

    def after_step(self) -> str | None:
        """Returns the name of the signal on which to stop now, or None; every process asks once after each of its steps."""
        # Read once, so that a signal in the middle of this cannot stop one process alone.
        number = self._requested
        if jax.process_count() > 1:
            mine = jax.make_array_from_callback(
                (self._mesh.size,), parallel.sharded(self._mesh), lambda part: np.full(self._mesh.size, number, np.int32)[part])
            self._votes.append(self._largest(mine))
            number = int(self._votes.popleft()) if len(self._votes) > self._lag else 0
        return signal.Signals(number).name if number else None

    def _request(self, number, _):
        if number == signal.SIGINT and self._requested:
            raise KeyboardInterrupt
        self._requested = number
