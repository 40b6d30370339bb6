"""Several processes as one run: who speaks, what they tell each other, and that a refusal of one is the end of all.

JAX's own runtime connects the processes (`jax.distributed`, started by `startup`); everything here is a line on top of
`jax.experimental.multihost_utils`. In one process every function is free.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jaxrd.errors import InputError

_LONGEST = 1000  # bytes of a message that travels


class SharedInputError(InputError):
    """A refusal that every process raises alike, so that one of them is enough to print it."""


def is_main() -> bool:
    """Returns whether this process is the one that writes files and speaks."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def gather(values: np.ndarray) -> np.ndarray:
    """Returns the arrays of all processes, which have one shape and dtype, stacked: [processes, ...]."""
    if jax.process_count() == 1:
        return np.asarray(values)[np.newaxis]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(np.asarray(values)))


def any_of(flag: bool) -> bool:
    """Returns whether the flag of any process is set."""
    return bool(np.any(gather(np.asarray(flag))))


def gather_text(text: str) -> list[str]:
    """Returns the texts of all processes, in their order, each cut to 1,000 bytes."""
    encoded = np.zeros(_LONGEST, np.uint8)
    raw = text.encode()[:_LONGEST]
    encoded[:len(raw)] = np.frombuffer(raw, np.uint8)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in gather(encoded)]


def refusal(message: str) -> InputError:
    """Returns the exception for what all processes have found alike, such as a loss that is not finite."""
    return InputError(message) if jax.process_count() == 1 else SharedInputError(message)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Ends when every process has ended its block; where one of them raised an InputError there, all of them do.

    Without it the others would wait, in their next collective, for a process that has gone. The block itself holds no
    collective that a process which refuses would miss.

    Raises:
      InputError: that of this process where it is alone, else a `SharedInputError` with the first one's message, which names
        the process unless all say the same.
    """
    error = None
    try:
        yield
    except InputError as caught:
        error = caught
    if jax.process_count() == 1:
        if error is not None:
            raise error
        return
    messages = gather_text(str(error) if error is not None else "")
    if any(messages):
        first = next(index for index, message in enumerate(messages) if message)
        alike = all(message == messages[first] for message in messages)
        raise SharedInputError(messages[first] if alike else f"process {first}: {messages[first]}") from None


def from_main(call: Callable[[], Any]) -> Any:
    """Returns what `call()` gives in the main process, as JSON has it; it is called nowhere else.

    What a decision of all processes rests on is read once: of a file on a shared disk two of them may see two states.

    Raises:
      InputError: whatever `call` raises.
    """
    if jax.process_count() == 1:
        return call()
    with together():
        text = json.dumps(call()).encode() if is_main() else b""
    length = int(gather(np.array([len(text)], np.int32))[0, 0])
    sent = np.zeros(length, np.uint8)
    sent[:len(text)] = np.frombuffer(text, np.uint8)
    return json.loads(bytes(gather(sent)[0]))
