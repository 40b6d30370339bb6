"""A sweep from its description to its table and report."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxrd import files
from jaxrd.errors import InputError, choose, need
from jaxrd.sweeps import description as descriptions, execution, plan as plans, results, runs
from jaxrd.sweeps.description import Description
from jaxrd.sweeps.plan import Plan, Run
from jaxrd.sweeps.results import Table

_LOCK = ".sweep.lock"


def run(
    config: Any, *, workdir: str | pathlib.Path, grid: Mapping[str, Sequence] | None = None,
    points: Sequence[Mapping[str, Any]] = (), seeds: Sequence[int] = (0,), attacks: str | Sequence[str] = descriptions.ATTACKS,
    baseline: str | None = None, fields: Mapping[str, Any] | None = None, teachers: Mapping[str, Mapping] | None = None,
    title: str = "", about: str = "", backend: str = "inline", processes: int = 2, slurm: Mapping[str, Any] | None = None,
    report: bool = True, say: Callable[[str], None] = print,
) -> Table:
    """Trains and evaluates every point with every seed, and returns the table of what they came to.

    Everything is checked before anything runs. The same call on the same directory runs only what is missing: a run that was
    stopped goes on from its last checkpoint, one that failed is tried again, and points, seeds or attacks may be added. A run
    that fails does not stop the others; `Table.failed` tells why. What the training would print goes to log.txt in each run's
    directory.

    Args:
      config: what all points begin with: "configs/digits.py:ard+igdm" (a file and its argument), a ConfigDict or a `Config`.
      workdir: directory of the sweep, made if need be; a run lies in WORKDIR/POINT-seedN.
      grid: field -> list of values; every combination is a point, called "method.igdm=10" after its fields.
      points: points one by one: dicts with fields, and with "name", "argument" (of the config file), "config" or "checkpoint"
        ("last", "best" or a step). Where there is a grid too, each is crossed with it.
      seeds: of every point, different whole numbers.
      attacks: of the evaluation, see `jaxrd.evaluation.evaluate`.
      baseline: name of the point that others are compared with, seed by seed.
      fields: field -> value, for all points.
      teachers: name -> dict with "config", "argument" and fields; trained first, and called "@NAME" in the field "teacher".
        One that is called like a teacher which does not exist yet ("teacher" for "runs/teacher") takes its place.
      title, about: heading and introduction of the report.
      backend: "inline" (in this process), "processes" (so many at once, each with its own share of the GPUs) or "slurm".
        Methods that were registered in a notebook are known inline only.
      processes: how many.
      slurm: for submitit, see `execution.slurm`: {"slurm_partition": "gpu", "gpus_per_node": 1}.
      report: whether to write report.html and tables/, besides results.csv and summary.csv.
      say: is given one line per run.

    Returns:
      The table, which `read(workdir)` gives again later.

    Raises:
      InputError: for the first thing that is wrong, before anything runs: an unknown field, a value out of range, an empty
        list, a baseline that is no point, a directory that holds runs of another configuration, a teacher that does not exist,
        or another sweep at work in the directory.
      KeyboardInterrupt, SystemExit: a signal came; what was trained is saved.

    Example:
      >>> table = run("configs/digits.py:ard+igdm", grid={"method.igdm": [0, 10]}, seeds=[0, 1], attacks="clean,pgd20",
      ...             baseline="method.igdm=0", workdir="runs/alpha")                                        # doctest: +SKIP
    """
    description = Description(
        config=config, seeds=seeds, attacks=attacks, baseline=baseline, set=fields or {}, grid=grid or {}, points=points,
        teachers=teachers or {}, title=title, about=about, origin={"set": "fields"})
    return carry_out(description, workdir, backend=backend, processes=processes, slurm=slurm, report=report, say=say)


def carry_out(
    description: Description, workdir: str | pathlib.Path, *, backend: str = "inline", processes: int = 2,
    slurm: Mapping[str, Any] | None = None, report: bool = True, collect_only: bool = False,
    say: Callable[[str], None] = print,
) -> Table:
    """Does what `run` says for a description, such as `description.read` gives; with `collect_only` nothing is run."""
    choose("backend", backend, execution.BACKENDS)
    need(isinstance(processes, int) and processes > 0, "processes", processes, "1 or more")
    if slurm and backend != "slurm":
        raise InputError('--slurm is given, but the backend is another; give --backend=slurm with it, or leave it out')
    plan = plans.build(description, workdir)
    _check(plan)
    if collect_only and not any(runs.is_finished(plan, run) for run in plan.runs):
        raise InputError(f"{plan.workdir}: none of the {len(plan.runs)} runs of this sweep is finished yet; give the command "
                         "without --collect, or wait for its jobs")
    if backend == "slurm" and not collect_only:
        execution.slurm_executor(plan.workdir, slurm or {})  # which may not be installed

    def refuse(holder):
        raise InputError(f"{plan.workdir}: {holder} is at work on this sweep; wait for it, or choose another --workdir")

    with files.alone(plan.workdir / _LOCK, refuse):
        _say_what_changed(plan, say)
        plan.write()
        if not collect_only:
            for stage in (plan.teachers, plan.runs):
                _execute(plan, stage, backend, processes, slurm or {}, say)
        table = results.collect(plan)
        results.write(table)
        if report:
            from jaxrd.sweeps import report as page

            page.write(table)
    return table


def _execute(plan: Plan, stage: Sequence[Run], backend: str, processes: int, slurm: Mapping[str, Any], say) -> None:
    left = [run for run in stage if not runs.is_finished(plan, run)]
    what = "teachers" if stage and stage[0].point.startswith("@") else "runs"
    if len(left) < len(stage):
        say(f"{len(stage) - len(left)} of {len(stage)} {what} are finished already")
    if not left:
        return
    jobs = plan.jobs(left)
    at_once = {"inline": 1, "processes": min(processes, len(jobs)), "slurm": len(jobs)}[backend]
    how = {"inline": "one after another", "processes": f"{at_once} at once", "slurm": "as SLURM jobs"}[backend]
    say(f"{len(left)} {what}, {how}; each says how it goes in {plan.workdir}/RUN/{runs.LOG}")
    progress = execution.Progress(plan, len(left), say=say)
    if backend == "inline":
        execution.inline(plan, jobs, progress)
    elif backend == "processes":
        execution.processes(plan, jobs, progress, processes)
    else:
        execution.slurm(plan, jobs, progress, slurm, say)


def _check(plan: Plan) -> None:
    """Raises InputError where run directories belong to other configurations, or a teacher is missing: before anything runs."""
    from jaxrd.training import checkpoint
    from jaxrd.training.checks import check_claim

    for run in (*plan.teachers, *plan.runs):
        check_claim(plan.path(run), run.config)
    teachers = {}
    for run in plan.runs:
        if not run.teacher and run.settings["teacher"] and run.config.build_method().needs_teacher:
            teachers.setdefault(run.settings["teacher"], run)
    for teacher, run in teachers.items():
        try:
            checkpoint.steps_of(teacher)
        except InputError as error:
            raise InputError(f'config.teacher of point "{run.point}": {error}') from None


def _say_what_changed(plan: Plan, say) -> None:
    if not (plan.workdir / plans.FILE).exists():
        return
    try:
        before = plans.read(plan.workdir)
    except InputError:
        return  # written anew
    here = {run.directory for run in plan.runs}
    gone = [run.directory for run in before.runs if run.directory not in here]
    if gone:
        some = ", ".join(gone[:3]) + (", ..." if len(gone) > 3 else "")
        say(f"{len(gone)} runs of an earlier plan are not in this one, and are left alone: {some}")
