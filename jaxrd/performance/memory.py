"""Memory: what a program will need, what a device has, and one line where the first is more than the second."""

import contextlib
import os
import pathlib
import re
import sys
from collections.abc import Iterator

import jax

from jaxrd.errors import InputError

try:
    import resource
except ImportError:  # Windows
    resource = None

WAYS_OUT = "a smaller config.training.batch_size, config.training.accumulation, or config.training.gradient_checkpointing=true"


def compile_within(program, arguments: tuple, devices: list[jax.Device], what: str):
    """Returns a jitted function compiled ahead of time, for what the devices have.

    Args:
      program: what `jax.jit` returned; what cannot be compiled ahead is returned as it is.
      arguments: those that it will be called with, or their shapes.
      devices: those of this process that run it.
      what: needs the memory: "the train step".

    Raises:
      InputError: it needs more memory than there is.
    """
    if not hasattr(program, "lower"):  # a function around it, that watches or disturbs it
        return program
    with shortage_explained(devices[0], what):
        compiled = program.lower(*arguments).compile()
    check_fits((planned(compiled) or {}).get("total"), devices[0], what, devices=len(devices))
    return compiled


def planned(compiled) -> dict[str, int] | None:
    """Returns the bytes on each device that a compiled program takes, as XLA has planned it; None where it does not say.

    "temporary" is what it needs while it runs (of a train step activations, for the most part), "arguments" (the state, the
    teacher, a batch) and "outputs" are what goes in and comes out, and "aliased" the part of the outputs that takes the place
    of arguments; "total" = temporary + arguments + outputs - aliased.
    """
    analysis = getattr(compiled, "memory_analysis", None)
    found = analysis() if analysis else None
    if found is None:
        return None
    sizes = {"temporary": found.temp_size_in_bytes, "arguments": found.argument_size_in_bytes,
             "outputs": found.output_size_in_bytes, "aliased": found.alias_size_in_bytes}
    return sizes | {"total": sizes["temporary"] + sizes["arguments"] + sizes["outputs"] - sizes["aliased"]}


def check_fits(needed: int | None, device: jax.Device, what: str, *, devices: int = 1) -> None:
    """Raises InputError where a program needs more memory than there is, before it is run.

    Args:
      needed: bytes on each device, as `planned` gives them in "total"; None where it is not known.
      device: one of the devices.
      what: needs it: "the train step".
      devices: how many devices of this host share its memory; read on CPU alone, whose devices do.
    """
    available = memory_of(device)
    shared = devices if device.platform == "cpu" else 1
    if needed is None or available is None or needed * shared <= available:
        return
    where = f"{device.device_kind} has" if device.platform != "cpu" else "this machine has"
    on_each = f" ({_gib(needed)} for each of {shared} CPU devices)" if shared > 1 else ""
    raise InputError(f"{what} needs {_gib(needed * shared)} of memory{on_each}, and {where} {_gib(available)}: take {WAYS_OUT}")


@contextlib.contextmanager
def shortage_explained(device: jax.Device, what: str) -> Iterator[None]:
    """Turns the complaint of a backend that is out of memory, while it compiles or runs, into one line.

    Args:
      device: one of the devices.
      what: needs it: "the train step".

    Raises:
      InputError: in place of the backend's exception.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if not re.search(r"RESOURCE_EXHAUSTED|out of memory", message, re.IGNORECASE):
            raise
        asked = re.search(r"allocat\w+ (?:of )?(\d+) bytes|allocat\w+ ([\d.]+ ?[KMGT]i?B)", message)
        size = "" if not asked else f" (it asked for {_gib(int(asked[1])) if asked[1] else asked[2]} at once)"
        available = memory_of(device)
        has = f" of {_gib(available)}" if available else ""
        raise InputError(f"{what} does not fit into the memory{has} of {device.device_kind}{size}: take {WAYS_OUT}") from None


def memory_of(device: jax.Device) -> int | None:
    """Returns the bytes that a program can have on a device: on CPU the machine's, or its container's; None if unknown."""
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    return host_memory()


def host_memory(root: pathlib.Path = pathlib.Path("/")) -> int | None:
    """Returns the bytes of memory of this machine, or those that a control group of this process may use, if that is less.

    Args:
      root: of the file system in which the control groups of this process and their limits are written.
    """
    found = []
    with contextlib.suppress(ValueError, OSError, AttributeError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    lines = []
    with contextlib.suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    for line in ["0::/", "0:memory:/", *lines]:  # in a container the group may stand at the top, whatever the line says
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / controllers
        limit = "memory.limit_in_bytes" if controllers else "memory.max"
        group = top / path.lstrip("/")
        for directory in (group, *(parent for parent in group.parents if parent.is_relative_to(top))):
            with contextlib.suppress(ValueError, OSError):  # "max": none
                found.append(int((directory / limit).read_text()))
    return min(found, default=None)


def peak_in_use(device: jax.Device) -> tuple[int, str] | None:
    """Returns (bytes, "device" or "process"): the most that a device has held so far; on CPU, that this process has.

    None where the backend does not say.
    """
    if device.platform != "cpu":
        found = (device.memory_stats() or {}).get("peak_bytes_in_use")
        return None if found is None else (found, "device")
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
