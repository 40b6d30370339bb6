"""Requests to stop: signals that a loop honours between two steps, in several processes at the same step of all."""

import os
import signal
import threading
from typing import Any

import jax


class StopSignal:
    """Turns SIGTERM, SIGUSR1 (a scheduler's warning) and Ctrl-C into a request that the loop honours after the step at hand.

    A KeyboardInterrupt in the middle of a save can leave orbax waiting for itself; a second Ctrl-C raises it all the same.

    In several processes one that gets a signal is enough: JAX's preemption service, which listens for SIGTERM from
    `jax.distributed.initialize` on, has all of them stop after the same step. The other signals are passed on to it.
    """

    def __init__(self):
        self._requested: str | None = None
        self._shared = jax.process_count() > 1
        self._old: dict[int, Any] = {}

    def __enter__(self):
        # Signals reach the main thread only; a run in another thread of a notebook does without.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGUSR1, signal.SIGINT, *(() if self._shared else (signal.SIGTERM,))):
                self._old[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def after(self, step: int) -> str | None:
        """Returns the name of the signal on which to stop after `step`, or None; to be asked once after every step.

        All processes get an answer at the same step. It is "SIGTERM" in those that were not signalled themselves.
        """
        if not self._shared:
            return self._requested
        from jax.experimental import multihost_utils

        return (self._requested or "SIGTERM") if multihost_utils.reached_preemption_sync_point(step) else None

    def _request(self, number, _):
        if number == signal.SIGINT and self._requested:
            raise KeyboardInterrupt
        self._requested = signal.Signals(number).name
        if self._shared:
            os.kill(os.getpid(), signal.SIGTERM)  # to the preemption service
