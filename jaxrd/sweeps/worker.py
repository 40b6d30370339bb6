"""A process of a sweep's pool, `python -m jaxrd.sweeps.worker WORKDIR`: runs what it is told to, a directory per line.

It reads JSON lines (run directories, as sweep.json has them) and answers each with one: why the run could not be tried, or "".
"""

import ctypes
import json
import os
import signal
import sys

from jaxrd.sweeps import execution, plan as plans


def work(workdir: str, directories: list[str]) -> list[str]:
    """Computes runs of the sweep in `workdir`, one after another; returns of each why it could not be tried, or ""."""
    from jaxrd.training import parallel

    parallel.enable_compilation_cache()
    parallel.prepare_process()
    plan = plans.read(workdir)
    by_directory = {run.directory: run for run in (*plan.teachers, *plan.runs)}
    return [execution.attempt(plan, by_directory[directory]) for directory in directories]


def main() -> None:
    """Serves until its standard input ends."""
    _stop_with(os.getppid())
    # Nobody but this function speaks to the pool.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        answer, = work(sys.argv[1], [json.loads(line)])
        print(json.dumps(answer), file=answers, flush=True)


def _stop_with(parent: int) -> None:
    """Has the kernel stop this process when the pool's is gone, so that it saves what it is training, and ends."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
