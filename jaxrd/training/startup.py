"""Start and end of a command that may run as several processes: `initialize` first in main, `finish` or `fail` last.

In one process all of it is free and silent. In several, what ends one of them ends them all, within a bounded time and with
one message from one process:

- a process that is lost (killed, its machine gone): `rollcall` sees its connection close, `runtime` its heartbeats end;
- an exception in one process, while the others wait for it in a collective: `fail`;
- its echo in the others, "connection closed by peer", where they see that first: `lost_process`.
"""

import atexit
import os
import re
import threading
import warnings
from typing import NoReturn

import jax

from jaxrd.errors import InputError, one_line
from jaxrd.training import rollcall, runtime

_NAMES = {"slurm": "SLURM", "ompi": "Open MPI", "gcetpu": "TPU VM", "gketpu": "GKE", "K8sCluster": "Kubernetes"}
_MOST = 1_000_000  # of processes, devices and seconds: no number that is meant is as large
_lifelines: rollcall.Lifelines | None = None

# What collectives (gloo, NCCL) and JAX's own service say of a process that is gone.
_GONE = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|socket closed|broken pipe|heartbeat|coordination service|barrier"
    r"|another task died|preempted|^UNAVAILABLE", re.IGNORECASE)


def initialize(
    coordinator: str | None = None, processes: int | None = None, process_id: int | None = None, *,
    local_devices: int | None = None, timeout: float = 300.0, silence: float | None = None,
) -> str:
    """Makes this process one of several, as the arguments say, else as a cluster that JAX detects says.

    Call it before anything that starts a JAX backend.

    Args:
      coordinator: HOST:PORT at which process 0 listens; JAX_COORDINATOR_ADDRESS by default.
      processes: how many there are.
      process_id: this one's number, 0 to processes - 1.
      local_devices: so many fake CPU devices in this process, instead of its accelerators.
      timeout: seconds to wait for the other processes.
      silence: seconds without a sign of life after which a process counts as lost; JAXRD_HEARTBEAT_TIMEOUT or 30 by default.

    Returns:
      What was found, in a line that process 0 also prints: "2 processes x 2 cpu devices, found by SLURM; coordinator
      127.0.0.1:41234"; empty for a single process.

    Raises:
      InputError: what is given is incomplete or contradicts itself.
      RollCallError: the processes did not come together.
    """
    global _lifelines
    _check(coordinator, processes, process_id, local_devices, timeout)
    silence = _silence(silence)
    if local_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", local_devices)
    if processes == 1:
        return ""
    if not coordinator and (coordinator := os.environ.get("JAX_COORDINATOR_ADDRESS") or None):
        _check_address("JAX_COORDINATOR_ADDRESS", coordinator)
    found, local_device_ids = "flags", None
    if None in (coordinator, processes, process_id) and (cluster := _cluster()):
        found, coordinator, processes, process_id, local_device_ids = _ask(
            cluster, coordinator, processes, process_id, timeout)
        if processes == 1:
            return ""
    if coordinator is None and processes is None and process_id is None:
        return ""
    _check_complete(coordinator, processes, process_id)
    lifelines = rollcall.join(coordinator, processes, process_id, timeout=timeout, silence=silence)
    _lifelines = lifelines
    jax_coordinator = f"{coordinator.rsplit(':', 1)[0]}:{lifelines.port}"
    runtime.connect(
        jax_coordinator, processes, process_id, local_device_ids=local_device_ids, timeout=60, silence=round(silence),
        lost=lambda: lifelines.lost(f"one of {processes} processes is lost (it no longer answers)"))
    if jax.default_backend() == "cpu":
        runtime.silence_gloo()
    local, kind = jax.local_device_count(), jax.default_backend()
    devices = f"{local} {kind} device{'s' if local > 1 else ''}"
    if jax.device_count() == local * processes:
        line = f"{processes} processes x {devices}"
    else:
        line = f"{processes} processes, {jax.device_count()} {kind} devices in all"
    line += f", found by {found}; coordinator {coordinator}"
    if process_id == 0:
        print(line, flush=True)
    return line


def process_id() -> int | None:
    """Returns the number of this process where it is one of several that have come together, else None."""
    return _lifelines.process if _lifelines else None


def finish(*, patience: float | None = None) -> None:
    """Ends the part of a process whose work is done: returns when all of them have come here.

    Args:
      patience: seconds to wait for the others, after which all are ended as lost; for ever by default, as the main process
        may write a report for long. One that is lost ends the wait in any case.
    """
    if _lifelines is None:
        return
    if not _lifelines.finish(patience):
        _lifelines.lost("the processes did not end together", patience=0)
    jax.distributed.shutdown()


def leave(status: int) -> None:
    """Ends this process after `finish`, where it is one of several, as Python does but for the destructors of C++ libraries.

    In these process 0 hung for ever in about one run of a hundred (jax 0.10, on CPU), its work done and Python at its end.
    """
    if _lifelines is None:
        return
    threading._shutdown()  # joins threads and executors, as Python does first at its end
    atexit._run_exitfuncs()
    rollcall.flush_streams()
    os._exit(status)


def fail(status: int, text: str) -> NoReturn:
    """Ends every process with `status`, for an error that ended the work of this one; process 0 prints `text`, and only once.

    Python's own exit would wait for the others, and they for this one. To be called in several processes only.
    """
    assert _lifelines is not None
    _lifelines.fail(status, text)


def lost_process(error: BaseException) -> str | None:
    """Returns what to say of an exception that is but the echo of another process's end, None for any other exception."""
    if _lifelines is None or isinstance(error, InputError):
        return None
    chain = [error]
    while (below := chain[-1].__cause__ or chain[-1].__context__) and below not in chain:
        chain.append(below)
    error = next((link for link in chain if isinstance(link, jax.errors.JaxRuntimeError) and _GONE.search(str(link))), None)
    if error is None:
        return None
    return f"one of {_lifelines.processes} processes is lost ({one_line(error)})"


def end_as_lost(what: str) -> NoReturn:
    """Ends every process with status 75 and the line that begins with `what`, unless it is known by then who was lost."""
    assert _lifelines is not None
    _lifelines.lost(what, patience=5.0)


def _check(coordinator, processes, process_id, local_devices, timeout) -> None:
    for name, value, least in (("processes", processes, 1), ("process_id", process_id, 0), ("cpu_devices", local_devices, 1),
                               ("start_timeout", timeout, 1)):
        if value is not None and not least <= value < _MOST:
            raise InputError(f"--{name} is {value}; it must be at least {least}"
                             + (f", and below {_MOST}" if not value < _MOST else ""))
    if coordinator:
        _check_address("--coordinator", coordinator)
    if processes is not None and process_id is not None and process_id >= processes:
        raise rollcall.RollCallError(
            f"--process_id is {process_id} with --processes={processes}; they are numbered 0 to {processes - 1}")
    if processes == 1 and coordinator is not None and process_id is None:
        raise InputError("--coordinator is given with --processes=1; leave it out, or say how many processes there are")


def _check_address(name: str, value: str) -> None:
    if not (re.fullmatch(r".+:\d{1,5}", value) and 0 < int(value.rpartition(":")[2]) < 2**16):
        raise InputError(f"{name} is {value}; write HOST:PORT of process 0, such as node1:12345")


def _check_complete(coordinator, processes, process_id) -> None:
    values = {"coordinator": coordinator, "processes": processes, "process_id": process_id}
    missing = [f"--{name}" for name, value in values.items() if value is None]
    if missing:
        given = ", ".join(f"--{name}={value}" for name, value in values.items() if value is not None)
        raise InputError(f"{given} without {' and '.join(missing)}, and no cluster is detected that would say; give all "
                         "three, or start the processes with python -m launch.local")


def _silence(silence: float | None) -> float:
    text = os.environ.get("JAXRD_HEARTBEAT_TIMEOUT", "30") if silence is None else str(silence)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 5 <= seconds <= 3600:
        raise InputError(f"JAXRD_HEARTBEAT_TIMEOUT is {text}; it must be seconds from 5 to 3600")
    return seconds


def _cluster():
    """Returns the first of JAX's cluster types that is there and runs this process as a task of its own; None for none."""
    try:
        from jax._src.clusters import ClusterEnv

        types = [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method]
    except (ImportError, AttributeError):
        return None
    for kind in types:
        # A notebook's pod is no task of a job; JAX would ask the cluster about it, or warn that it cannot.
        if kind.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in os.environ:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if kind.is_env_present():
                return kind
    return None


def _ask(cluster, coordinator, processes, process_id, timeout):
    """Returns what `cluster` says of what is None: (its name, coordinator, processes, process id, local device ids)."""
    name = _NAMES.get(cluster.name) or _NAMES.get(cluster.__name__) or cluster.name or cluster.__name__
    try:
        if processes is None:
            # A step of one task in a larger allocation is alone: an interactive shell, a batch script.
            step = os.environ.get("SLURM_STEP_NUM_TASKS") if cluster.name == "slurm" else None
            processes = int(step) if step else cluster.get_process_count()
        if processes == 1:
            return name, None, 1, 0, None
        process_id = cluster.get_process_id() if process_id is None else process_id
        coordinator = coordinator or cluster.get_coordinator_address(
            timeout_secs=round(timeout), override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT"))
        return name, coordinator, processes, process_id, _local_device_ids(cluster)
    except Exception as error:
        raise InputError(f"{name} is detected but does not say where this process stands ({one_line(error)}); give "
                         "--coordinator=HOST:PORT, --processes=N and --process_id=K") from None


def _local_device_ids(cluster) -> list[int] | None:
    """Returns the one accelerator of this task, or None where it has all that it sees.

    JAX gives a SLURM or Open MPI task the accelerator of its local number. That is wrong where it is the only task of its
    host, and where the scheduler itself shows it a part of them (--gpus-per-task).
    """
    local = cluster.get_local_process_id()
    if local is None or os.environ.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if _tasks_on_this_host() == 1 or visible and local >= len(visible.split(",")):
        return None
    return [local]


def _tasks_on_this_host() -> int | None:
    if size := os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"):
        return int(size)
    tasks = []
    for part in filter(None, os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(",")):  # such as 2(x3),1
        count, _, times = part.partition("(x")
        tasks += [int(count)] * int(times.rstrip(")") or 1)
    node = int(os.environ.get("SLURM_NODEID", 0))
    return tasks[node] if node < len(tasks) else None
