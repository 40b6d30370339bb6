"""Evaluates runs under attack: `python -m launch.evaluate --workdir=runs/a[,runs/b,...] --attacks=clean,pgd20,autoattack`.

Writes evaluation.json, evaluation/ and report.html into every run directory; with --report also one report that compares them.
Runs that differ only in their seed share a row of the table, as mean and standard deviation. In tables/ beside a report lies
each of its tables as Markdown, LaTeX (booktabs) and CSV.

With --data=cifar10_1,'cifar10_corrupted/*' the attacks run on other test images with the same classes instead, and what earlier
calls measured stays. A call that was killed goes on where it stopped.
"""

import functools
import pathlib

from absl import flags

from jaxrd.errors import InputError
from launch import command, start

_WORKDIR = flags.DEFINE_list("workdir", [], "Run directories, comma-separated.")
_ATTACKS = flags.DEFINE_string(
    "attacks", None,
    "Attacks, comma-separated: clean, fgsm, mim, pgd10, pgd20, cw30, strong, autoattack, autoattack_plus, or fast "
    "(APGD-CE + APGD-T, which is not AutoAttack). By default clean,fgsm,pgd20,cw30,autoattack; with --data clean,pgd20.")
_CURVE = flags.DEFINE_string(
    "curve", "pgd20", 'The attack whose accuracy is drawn against the radius, if it is among --attacks; "none" for no curve. '
    "Of the run's own data only.")
_STEP = flags.DEFINE_string("step", "last", '"last", "best" by validation PGD accuracy, or a step\'s number.')
_SPLIT = flags.DEFINE_string("split", "test", '"test", or "validation" while choosing anything.')
_TEACHER = flags.DEFINE_string("teacher", "", "Teacher to compare input gradients with; by default each run's own.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the random starts.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Images per batch, at most.", lower_bound=1)
_DATA = flags.DEFINE_list(
    "data", [], "Other data to evaluate on, comma-separated: prepared TFDS data sets (cifar10_1, cifar10_corrupted/fog_3), "
    "patterns ('cifar10_corrupted/*') or files (images.npz with images and labels). By default the run's own.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS data sets lie; by default where the run's configuration says.")
_EXAMPLES = flags.DEFINE_integer(
    "examples", None, "With --data: only the first so many images of each, for a quick look.", lower_bound=1)
_REPORT = flags.DEFINE_string(
    "report", None, "Where to write the report that compares the runs, such as runs/report.html; its plots go to evaluation/ "
    "and its tables to tables/ beside it.")
start.define_flags()


def main() -> None:
    if flags.FLAGS["data"].present and not any(_DATA.value):
        raise InputError("--data is empty; name other data, such as --data=cifar10_1, or leave it out")
    if not _WORKDIR.value:
        raise InputError("--workdir is missing; give run directories, such as --workdir=runs/a,runs/b")
    for workdir in _WORKDIR.value:  # before the first of them is evaluated
        if not pathlib.Path(workdir).is_dir():
            raise command.HereError(f"--workdir={workdir}: no such run directory; train it first, or correct the path")
        inside = sorted(path.parent for path in pathlib.Path(workdir).glob("*/config.json"))
        if inside and not (pathlib.Path(workdir) / "config.json").is_file():  # of a sweep, say
            raise command.HereError(f"--workdir={workdir} is no run directory but holds {len(inside)}; give these, such as "
                                    f"--workdir={inside[0]}")
    if _REPORT.value and pathlib.Path(_REPORT.value).is_dir():
        raise InputError(f"--report={_REPORT.value} is a directory; name a file in it, such as report.html")
    start.initialize()
    from jaxrd.evaluation import evaluate, report
    from jaxrd.training import parallel, processes
    parallel.enable_compilation_cache()
    parallel.prepare_process()
    step = int(_STEP.value) if _STEP.value.isdecimal() else _STEP.value
    for workdir in _WORKDIR.value:
        evaluate.evaluate(
            workdir, _ATTACKS.value, step=step, split=_SPLIT.value, teacher=_TEACHER.value, seed=_SEED.value,
            batch_size=_BATCH_SIZE.value, curve=_CURVE.value, data=_DATA.value, data_directory=_DATA_DIR.value or None,
            examples=_EXAMPLES.value, say=functools.partial(print, flush=True))  # or a file or pipe gets the lines in the end
        with processes.together():
            if processes.is_main():
                report.write([workdir], pathlib.Path(workdir) / "report.html")
    with processes.together():
        if processes.is_main():
            _compare(report)


def _compare(report) -> None:
    """Prints the tables of all runs, and writes the report where one is asked for."""
    own = "" if _DATA.value else report.table(_WORKDIR.value)
    for table in filter(None, (own, report.other_data_table(_WORKDIR.value))):
        print(f"\n{table}")
    target = _REPORT.value or (pathlib.Path(_WORKDIR.value[0]) / "report.html" if len(_WORKDIR.value) == 1 else None)
    if _REPORT.value:
        report.write(_WORKDIR.value, _REPORT.value)
    if target:
        print(f"\nreport: {target}")


if __name__ == "__main__":
    command.run(main)
