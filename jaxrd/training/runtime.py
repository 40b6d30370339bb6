"""JAX's distributed runtime, started so that the loss of a process ends in a call of ours rather than in pages of log.

`jaxlib`'s client takes a `missed_heartbeat_callback`, and calls it from a thread of its own when another process no longer
answers or the coordinator is gone. Without one it aborts the process. With one, the jaxlib of today (0.10 to 0.12) cannot
turn the call's argument into a Python object and ends in `std::terminate` with a `std::bad_cast`; the terminate handler below
makes the same call then. Whatever of this a jaxlib does not have is left out, and the client aborts as it always did.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterator

import jax

_kept = []  # the handlers that C++ holds


def connect(coordinator: str, processes: int, process: int, *, local_device_ids: list[int] | None, timeout: int,
            silence: int, lost: Callable[[], None]) -> None:
    """Starts JAX as one of several processes, which have all joined.

    Args:
      coordinator: HOST:PORT of JAX's own service, in process 0.
      processes: how many there are.
      process: this one's number.
      local_device_ids: the accelerators of this host that are this process's; None for all that it sees.
      timeout: seconds to wait for the others.
      silence: seconds without a heartbeat after which a process counts as lost.
      lost: called, from any thread, when another process is lost; ends this one.
    """
    for option in ("jax_enable_preemption_service", "jax_check_proxy_envs"):
        # The first would swallow SIGTERM until the loop asks it; the second warns about proxies, which are not asked here.
        with contextlib.suppress(AttributeError):
            jax.config.update(option, False)
    with _calling(lost):
        jax.distributed.initialize(
            coordinator, processes, process, local_device_ids=local_device_ids, cluster_detection_method="deactivate",
            initialization_timeout=timeout, heartbeat_timeout_seconds=silence, shutdown_timeout_seconds=30)


@contextlib.contextmanager
def _calling(lost: Callable[[], None]) -> Iterator[None]:
    """Has the client that is made inside call `lost`."""
    try:
        from jax._src import distributed

        library, create = distributed._jax, distributed._jax.get_distributed_runtime_client
    except (ImportError, AttributeError):
        yield
        return

    def with_callback(*arguments, **options):
        try:
            return create(*arguments, missed_heartbeat_callback=lambda *_: lost(), **options)
        except TypeError:
            return create(*arguments, **options)

    if not _handle_termination(lost):
        yield
        return
    library.get_distributed_runtime_client = with_callback
    try:
        yield
    finally:
        library.get_distributed_runtime_client = create


def _handle_termination(lost: Callable[[], None]) -> bool:
    """Has C++ call `lost` where a `std::bad_cast` ends the process; returns whether this C++ library lets us."""
    try:
        library = ctypes.CDLL("libstdc++.so.6")
        set_terminate, exception_type = library._ZSt13set_terminatePFvvE, library.__cxa_current_exception_type
    except (OSError, AttributeError):
        return False
    set_terminate.restype = exception_type.restype = ctypes.c_void_p
    handler_type = ctypes.CFUNCTYPE(None)

    def handle():
        # Of a std::type_info: the table of virtual functions, then the name.
        kind = exception_type()
        if kind and ctypes.cast(kind, ctypes.POINTER(ctypes.c_char_p))[1] == b"St8bad_cast":
            lost()
        handler_type(before)()

    _kept.append(handler_type(handle))
    before = set_terminate(_kept[-1])
    return True


def silence_gloo() -> None:
    """Keeps from standard output what C++ libraries write there, and leaves it to Python.

    Gloo, which connects processes on CPU, greets every group of devices on it ("[Gloo] Rank 0 is connected to ...").
    """
    try:
        sys.stdout.flush()
        own = os.dup(1)
        python = open(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, newline="",
                      buffering=1 if sys.stdout.line_buffering else -1)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        if sys.stdout.fileno() == 1:
            os.dup2(nowhere, 1)
            sys.stdout = python
        os.close(nowhere)
    except (OSError, ValueError, AttributeError):
        pass  # a stream that is no file: a notebook's, a test's
