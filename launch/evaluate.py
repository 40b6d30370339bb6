"""Evaluates runs under attack: `python -m launch.evaluate --workdir=runs/a[,runs/b,...] --attacks=clean,pgd20,autoattack`.

Writes evaluation.json, evaluation/ and report.html into every run directory; with several runs (or --report) also one report
that compares them. Runs that differ only in their seed share a row of the table, as mean and standard deviation.
"""

import pathlib

from absl import flags

from jaxrd.errors import InputError
from launch import command

_WORKDIR = flags.DEFINE_list("workdir", [], "Run directories, comma-separated.")
_ATTACKS = flags.DEFINE_string(
    "attacks", "clean,fgsm,pgd20,cw30,autoattack",
    "Attacks, comma-separated: clean, fgsm, mim, pgd10, pgd20, cw30, strong, autoattack, autoattack_plus, or fast "
    "(APGD-CE + APGD-T, which is not AutoAttack).")
_CURVE = flags.DEFINE_string(
    "curve", "pgd20", 'The attack whose accuracy is drawn against the radius, if it is among --attacks; "none" for no curve.')
_STEP = flags.DEFINE_string("step", "last", '"last", "best" by validation PGD accuracy, or a step\'s number.')
_SPLIT = flags.DEFINE_string("split", "test", '"test", or "validation" while choosing anything.')
_TEACHER = flags.DEFINE_string("teacher", "", "Teacher to compare input gradients with; by default each run's own.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the random starts.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Images per batch, at most.", lower_bound=1)
_REPORT = flags.DEFINE_string("report", None, "Where to write the report that compares the runs.")


def main() -> None:
    if not _WORKDIR.value:
        raise InputError("--workdir is missing; give run directories, such as --workdir=runs/a,runs/b")
    for workdir in _WORKDIR.value:  # before the first of them is evaluated
        if not pathlib.Path(workdir).is_dir():
            raise InputError(f"--workdir={workdir}: no such run directory; train it first, or correct the path")
    if _REPORT.value and pathlib.Path(_REPORT.value).is_dir():
        raise InputError(f"--report={_REPORT.value} is a directory; name a file in it, such as report.html")
    from jaxrd.evaluation import evaluate, report
    from jaxrd.training import parallel
    parallel.enable_compilation_cache()
    step = int(_STEP.value) if _STEP.value.isdecimal() else _STEP.value
    for workdir in _WORKDIR.value:
        evaluate.evaluate(
            workdir, _ATTACKS.value, step=step, split=_SPLIT.value, teacher=_TEACHER.value, seed=_SEED.value,
            batch_size=_BATCH_SIZE.value, curve=_CURVE.value)
        report.write([workdir], pathlib.Path(workdir) / "report.html")
    print()
    print(report.table(_WORKDIR.value))
    target = _REPORT.value or (pathlib.Path(_WORKDIR.value[0]) / "report.html" if len(_WORKDIR.value) == 1 else None)
    if _REPORT.value:
        report.write(_WORKDIR.value, _REPORT.value)
    if target:
        print(f"\nreport: {target}")


if __name__ == "__main__":
    command.run(main)
