"""Where the runs of a sweep are computed: in this process, in a pool of processes, or as an array of SLURM jobs.

All three call `runs.execute`, which notes what became of a run in its directory; what is said here is read from there.
"""

import collections
import contextlib
import glob
import json
import logging
import math
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxrd import files
from jaxrd.attacks.progress import duration
from jaxrd.errors import InputError, one_line
from jaxrd.evaluation.names import attack_name
from jaxrd.sweeps import runs
from jaxrd.sweeps.plan import Plan, Run

BACKENDS = ("inline", "processes", "slurm")
_WORKER = ("-m", "jaxrd.sweeps.worker")
Say = Callable[[str], None]


class Progress:
    """Says what became of each run, and how long the rest may take."""

    def __init__(self, plan: Plan, total: int, *, say: Say):
        self._plan, self._total, self._say = plan, total, say
        self._done, self._began = 0, time.perf_counter()

    def ended(self, run: Run, error: str = "") -> None:
        """A run has come to its end; `error`: why it could not be tried."""
        self._done += 1
        seconds, left = time.perf_counter() - self._began, self._total - self._done
        error = error or runs.error_of(self._plan, run)
        if error:
            outcome = f"failed: {error}"
        else:
            accuracy = runs.evaluation_of(self._plan, run).get("accuracy", {})
            outcome = ", ".join(f"{attack_name(name)} {accuracy[name]:.1%}" for name in self._plan.attacks if name in accuracy)
        pace = f"  ETA {duration(left * seconds / self._done)}" if left else ""
        self._say(f"[{self._done:>{len(str(self._total))}}/{self._total}] {run.label}: {outcome}{pace}")


def inline(plan: Plan, jobs: Sequence[list[Run]], progress: Progress) -> None:
    """Computes the runs one after another in this process."""
    with files.termination_raised():
        for run in (run for job in jobs for run in job):
            progress.ended(run, attempt(plan, run))


def attempt(plan: Plan, run: Run) -> str:
    """Computes a run; returns why it could not even be tried, or nothing."""
    try:
        runs.execute(plan, run)
    except InputError as error:
        return str(error)
    return ""


def processes(plan: Plan, jobs: Sequence[list[Run]], progress: Progress, count: int) -> None:
    """Computes the runs in several processes at once, each of which takes one after another.

    A process that dies costs the run that it was at, and another one takes its place.
    """
    waiting, events = collections.deque(jobs), queue.SimpleQueue()
    workers = [_Worker(plan, number, count, waiting, events) for number in range(min(count, len(jobs)))]
    working = len(workers)
    with files.termination_raised():
        try:
            for worker in workers:
                worker.start()
            while working:
                event = events.get()
                if event is None:
                    working -= 1
                else:
                    progress.ended(*event)
        finally:
            waiting.clear()
            for worker in workers:
                worker.stop()
            with files.signals_deferred():  # the training of each saves its state
                for worker in workers:
                    worker.join()


class _Worker(threading.Thread):
    """Serves one process of the pool: gives it jobs, and notes the runs of which it dies."""

    def __init__(self, plan: Plan, number: int, count: int, waiting: collections.deque, events: queue.SimpleQueue):
        super().__init__(daemon=True)
        self._plan, self._waiting, self._events = plan, waiting, events
        self._environment = os.environ | devices_of(number, count, visible_gpus())
        self._process, self._stopping = None, False
        self._lock = threading.Lock()

    def run(self) -> None:
        try:
            while not self._stopping:
                try:
                    job = self._waiting.popleft()
                except IndexError:
                    break
                for run in job:
                    if self._stopping:
                        break
                    self._give(run)
        finally:
            if self._process:
                self._end()
            self._events.put(None)

    def stop(self) -> None:
        """Has the run at hand stop, once it has saved its state."""
        with self._lock:
            self._stopping = True
            if self._process:
                self._process.send_signal(signal.SIGTERM)

    def _give(self, run: Run) -> None:
        with self._lock:
            if self._stopping:
                return
            if not self._process:
                self._process = self._start()
            process = self._process
        answer = ""
        try:
            process.stdin.write(json.dumps(run.directory) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            pass
        if answer:
            self._events.put((run, json.loads(answer)))
            return
        status = self._end()
        if self._stopping:
            return
        how = (f"was killed by {signal.Signals(-status).name} (out of memory, perhaps)" if status < 0
               else f"ended with status {status}")
        runs.fail(self._plan, run, f"its process {how}; what it saved is there, and the same command goes on from that")
        self._events.put((run, ""))

    def _end(self) -> int:
        """Waits for the end of the process, which has nothing more to do or is gone; returns its status."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        status = self._process.wait()
        self._process.stdout.close()
        with self._lock:
            self._process = None
        return status

    def _start(self) -> subprocess.Popen:
        with open(self._plan.workdir / "processes.txt", "ab") as rest:
            return subprocess.Popen(
                [sys.executable, *_WORKER, str(self._plan.workdir)], env=self._environment, text=True, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=rest, start_new_session=True)  # Ctrl-C in a terminal comes once, from here


def visible_gpus() -> list[str]:
    """Returns the NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them, without starting JAX on them."""
    if (listed := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in listed.split(",") if name]
    return [str(number) for number in range(len(glob.glob("/dev/nvidia[0-9]*")))]


def devices_of(number: int, count: int, gpus: Sequence[str]) -> dict[str, str]:
    """Returns the environment in which process `number` of `count` has its share of the GPUs, without a common one if it can.

    Several that share a GPU take memory as they need it, not three quarters of it at once.
    """
    if not gpus:
        return {}
    if count >= len(gpus):
        crowded = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if count > len(gpus) else {}
        return {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)], **crowded}
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[number::count])}


class Task:
    """What a SLURM job does: its runs, one after another. One that is preempted is submitted again, and goes on with them."""

    def __init__(self, workdir: pathlib.Path):
        self.workdir = str(workdir)

    def __call__(self, directories: list[str]) -> list[str]:
        from jaxrd.sweeps import worker

        return worker.work(self.workdir, directories)

    def checkpoint(self, directories: list[str]):
        """Is called by submitit when the time is over or the job is preempted."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, directories)


def slurm(plan: Plan, jobs: Sequence[list[Run]], progress: Progress, parameters: Mapping[str, Any], say: Say) -> None:
    """Submits the runs as an array of SLURM jobs through submitit, and returns when all have ended.

    Args:
      plan, jobs, progress: as of the others.
      parameters: of `submitit.AutoExecutor.update_parameters`, such as {"slurm_partition": "gpu", "gpus_per_node": 1,
        "timeout_min": 600, "slurm_array_parallelism": 8}; and "cluster", where "local" stands for processes of this machine.
      say: is given a line on what was submitted.

    Raises:
      InputError: submitit or SLURM is not installed, or a parameter is none of submitit's.
    """
    executor = slurm_executor(plan.workdir, parameters)
    try:
        submitted = executor.map_array(Task(plan.workdir), [[run.directory for run in job] for job in jobs])
    except Exception as error:
        raise InputError(f"--slurm={json.dumps(dict(parameters))}: the jobs cannot be submitted ({one_line(error)})") from None
    say(f"submitted {len(jobs)} jobs from {submitted[0].job_id} on; what they say is in {plan.workdir / 'slurm'}; Ctrl-C "
        "leaves them running, and --collect reads later what they came to")
    left = dict(zip(submitted, jobs))
    gone: dict[Any, float] = {}
    queued, asked = None, -math.inf
    while left:
        now = time.monotonic()
        if now - asked > _ASK:
            queued, asked = _queued(), now
        for task in list(left):
            if queued is None:
                ended = task.done()
            else:
                if task.job_id not in queued:
                    gone.setdefault(task, now)
                # A job that was killed leaves no result; one that has just ended may still be writing it.
                ended = task.paths.result_pickle.exists() or now - gone.get(task, now) > _PATIENCE
            if ended:
                _settle(plan, task, left.pop(task), progress)
        if left:
            time.sleep(_POLL)


_POLL, _ASK, _PATIENCE = 1.0, 10.0, 20.0  # seconds


def slurm_executor(workdir: pathlib.Path, parameters: Mapping[str, Any]):
    """Returns submitit's executor with these parameters; see `slurm`."""
    submitit = _submitit()
    parameters = {"name": "jaxrd-sweep", "timeout_min": 720, **parameters}
    cluster = parameters.pop("cluster", "slurm")
    if cluster not in ("slurm", "local"):
        raise InputError(f'--slurm: cluster is "{cluster}"; it must be "slurm", or "local" for processes of this machine')
    try:
        executor = submitit.AutoExecutor(folder=workdir / "slurm", cluster=cluster)
        executor.update_parameters(**parameters)
    except Exception as error:
        raise InputError(f"--slurm={json.dumps(parameters)}: {one_line(error)}") from None
    return executor


def _submitit():
    level = os.environ.get("SUBMITIT_LOG_LEVEL")
    # Its configuration of logging closes the handlers of everybody else in this process.
    os.environ["SUBMITIT_LOG_LEVEL"] = "NOCONFIG"
    try:
        import submitit
    except ImportError:
        raise InputError('the backend "slurm" needs submitit, which is not installed: pip install "jaxrd[slurm]"') from None
    finally:
        # The jobs, which inherit it, do log.
        os.environ.pop("SUBMITIT_LOG_LEVEL")
        if level is not None:
            os.environ["SUBMITIT_LOG_LEVEL"] = level
    logging.getLogger("submitit").setLevel(logging.CRITICAL)  # that sacct is not there, again and again
    return submitit


def _queued() -> set[str] | None:
    """Returns the jobs that wait or run, or None where SLURM does not say.

    Submitit itself asks SLURM's accounting, which not every cluster has.
    """
    try:
        listed = subprocess.run(
            ["squeue", "--noheader", "--array", "--format=%i"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return set(listed.stdout.split())


def _settle(plan: Plan, task: Any, job: list[Run], progress: Progress) -> None:
    """Says what became of the runs of a job that has ended."""
    for run in job:
        if not runs.is_finished(plan, run) and not runs.error_of(plan, run):
            runs.fail(plan, run, f"its SLURM job {task.job_id} ended before it; see {task.paths.stderr}")
        progress.ended(run)
