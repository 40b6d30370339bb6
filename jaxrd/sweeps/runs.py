"""One run of a sweep: trained, evaluated, and what its directory says of how far it is.

Its state is the run directory itself, and status.json in it: "status" ("running", "stopped", "failed" or "finished"), "error",
"steps" (the length of training, once it has come to its end) and "step" (the one that was evaluated, once it was).
"""

import contextlib
import json
import pathlib
import shutil
import traceback
from collections.abc import Iterator
from typing import Any

from jaxrd import files
from jaxrd.errors import InputError, one_line
from jaxrd.evaluation import record
from jaxrd.sweeps.plan import Plan, Run

STATUS = "status.json"
LOG = "log.txt"
_LOCK = ".sweep.lock"
_SEED = 0  # of the evaluation's random starts: the same for all runs, whose own seeds differ


def is_finished(plan: Plan, run: Run) -> bool:
    """Whether a run was trained to its end and evaluated with all attacks of the sweep."""
    directory = plan.path(run)
    return read_status(directory).get("status") == "finished" and not _missing(plan, run)


def error_of(plan: Plan, run: Run) -> str:
    """Returns why a run failed when it was last tried; empty where it did not."""
    note = read_status(plan.path(run))
    return str(note.get("error", "")) if note.get("status") == "failed" else ""


def evaluation_of(plan: Plan, run: Run) -> dict[str, Any]:
    """Returns what evaluation.json holds of the checkpoint that the sweep evaluates; empty where it is of another one."""
    found = record.read(plan.path(run) / "evaluation.json")
    described, data = found.get("run"), found.get("data")
    if not isinstance(described, dict) or not isinstance(data, dict) or not isinstance(found.get("accuracy"), dict):
        return {}
    note = read_status(plan.path(run))
    step = note.get("step", note.get("steps") if run.checkpoint == "last" else None)
    fits = (described.get("checkpoint") == run.checkpoint and data.get("split") == "test" and found.get("seed") == _SEED
            and step is not None and described.get("step") == step)
    return found if fits else {}


def read_status(directory: pathlib.Path) -> dict[str, Any]:
    """Returns a run's status; empty where it has none yet."""
    return record.read(directory / STATUS)


def write_status(directory: pathlib.Path, **changes: Any) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    note = {"error": ""} | read_status(directory) | changes
    with files.replacing(directory / STATUS, "w") as file:
        json.dump(note, file, indent=2)
        file.write("\n")


def fail(plan: Plan, run: Run, error: str) -> None:
    """Notes why a run failed, in one line."""
    write_status(plan.path(run), status="failed", error=" ".join(error.split()))


def execute(plan: Plan, run: Run) -> None:
    """Trains and evaluates a run, or goes on with it; what goes wrong is noted in its directory, and the next one may begin.

    What the run would say on a console goes to log.txt in its directory.

    Raises:
      KeyboardInterrupt, SystemExit: a signal came; training has saved its state.
      InputError: another process is at work on this run.
    """
    directory = plan.path(run)
    with _alone(directory, run):
        if is_finished(plan, run):
            return
        write_status(directory, status="running", error="")
        with _logged(directory / LOG):
            try:
                _train(plan, run)
                _evaluate(plan, run)
            except Exception as error:
                traceback.print_exc()
                fail(plan, run, str(error) if isinstance(error, InputError) else one_line(error))
            except BaseException:
                write_status(directory, status="stopped")
                raise
            else:
                write_status(directory, status="finished")


def _train(plan: Plan, run: Run) -> None:
    from jaxrd.training import loop

    directory = plan.path(run)
    if _is_trained(directory):
        return
    teacher = plan.teacher_of(run)
    if teacher and not _is_trained(plan.path(teacher)):
        raise InputError(f"its teacher {teacher.point} has not been trained ({error_of(plan, teacher) or 'not run'})")
    twin = next((plan.path(other) for other in plan.twins(run) if _is_trained(plan.path(other))), None)
    if twin and not (directory / "checkpoints").exists():
        _copy(twin, directory)
        print(f"trained as {twin}, whose configuration is the same; copied from there")
        steps = read_status(twin)["steps"]
    else:
        steps = int(loop.train(run.config, directory).step)
    write_status(directory, steps=steps)


def _is_trained(directory: pathlib.Path) -> bool:
    steps = read_status(directory).get("steps")
    return steps is not None and (directory / "checkpoints" / str(steps)).is_dir()


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
    for name in ("config.json", "environment.json", "metrics.jsonl"):
        shutil.copy2(source / name, target / name)
    with files.appearing(target / "checkpoints", directory=True) as temporary:
        shutil.copytree(source / "checkpoints", temporary, dirs_exist_ok=True)


def _evaluate(plan: Plan, run: Run) -> None:
    from jaxrd.evaluation.evaluate import evaluate

    directory, missing = plan.path(run), _missing(plan, run)
    if not missing and "step" in read_status(directory):
        return
    step = int(run.checkpoint) if run.checkpoint.isdecimal() else run.checkpoint
    # Killed after its attacks, it still lacks what is measured besides: an attack again, for that.
    found = evaluate(directory, missing or list(plan.attacks[:1]), step=step, seed=_SEED, curve="none")
    write_status(directory, step=found["run"]["step"])


def _missing(plan: Plan, run: Run) -> list[str]:
    accuracy = evaluation_of(plan, run).get("accuracy", {})
    return [name for name in plan.attacks if name not in accuracy]


@contextlib.contextmanager
def _alone(directory: pathlib.Path, run: Run) -> Iterator[None]:
    def refuse(holder):
        raise InputError(f"{run.label}: {holder} is at work on it, in {directory}; wait for that, or stop it")

    with files.alone(directory / _LOCK, refuse):
        yield


@contextlib.contextmanager
def _logged(path: pathlib.Path) -> Iterator[None]:
    with open(path, "a", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield
