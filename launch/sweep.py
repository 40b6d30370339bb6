"""Trains and compares points of a configuration over seeds: `python -m launch.sweep --sweep=FILE.toml --workdir=runs/a`.

    python -m launch.sweep --sweep=configs/ablations/alpha.toml --workdir=runs/alpha
    python -m launch.sweep --sweep=configs/ablations/alpha.toml --workdir=runs/alpha100 --config=configs/cifar100.py:ard+igdm
    python -m launch.sweep --config=configs/digits.py:rslad --grid='{"method.igdm": [0, 1, 10]}' --seeds=0,1 --workdir=runs/b

Every run is an ordinary run directory, WORKDIR/POINT-seedN; results.csv has a row for each, summary.csv and report.html compare
the points, with differences from the baseline paired by seed. The same command again runs only what is missing: it goes on with
what was stopped and tries again what failed. The form of a sweep file stands at the top of jaxrd/sweeps/description.py.
"""

import functools
import json

from absl import flags

from jaxrd.errors import InputError
from launch import command

_SWEEP = flags.DEFINE_string("sweep", None, "Sweep file (TOML), such as configs/ablations/alpha.toml.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the sweep; goes on where it holds one.")
_GRID = flags.DEFINE_string("grid", None, "Field -> values, as JSON; every combination is a point, such as those of "
                            '\'{"method.igdm": [0, 1, 10]}\'.')
_SEEDS = flags.DEFINE_list("seeds", None, "Seeds of every point, comma-separated.")
_ATTACKS = flags.DEFINE_string("attacks", None, "Attacks of the evaluation, comma-separated, as launch.evaluate's. By default "
                               "what the sweep file says, else clean,pgd20,autoattack.")
_BASELINE = flags.DEFINE_string("baseline", None, "Name of the point that others are compared with, such as method.igdm=0.")
_BACKEND = flags.DEFINE_string("backend", "inline", '"inline": one run after another; "processes": several at once, here; '
                               '"slurm": as an array of jobs (needs submitit, an extra).')
_PROCESSES = flags.DEFINE_integer("processes", 2, "With --backend=processes: how many runs at once.", lower_bound=1)
_SLURM = flags.DEFINE_string("slurm", None, "With --backend=slurm: submitit's parameters, as JSON: "
                             '\'{"slurm_partition": "gpu", "gpus_per_node": 1, "timeout_min": 600}\'.')
_COLLECT = flags.DEFINE_bool("collect", False, "Run nothing: write tables and report of what there is.")


def main() -> None:
    if not _WORKDIR.value:
        raise InputError("--workdir is missing; give the sweep's directory, such as --workdir=runs/alpha")
    config, overrides = command.base_config()
    from jaxrd.sweeps import description as descriptions
    if _SWEEP.value:
        description = descriptions.read(_SWEEP.value)
    elif config:
        description = descriptions.Description(config=config)
    else:
        raise InputError("--sweep and --config are missing; give a sweep file, such as --sweep=configs/ablations/alpha.toml, "
                         "or --config=configs/digits.py:ard+igdm with a --grid")
    given = {
        "grid": _GRID.value is not None and descriptions.parse_grid(_GRID.value),
        "seeds": _SEEDS.value is not None and descriptions.parse_seeds(_SEEDS.value),
        "attacks": _ATTACKS.value, "baseline": _BASELINE.value}
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    description = description.replaced({name: f"--{name}" for name in given}, **given)
    description = description.with_config(config if _SWEEP.value else None, overrides)

    if _BACKEND.value != "inline":  # or this process would take its share of an accelerator, whose memory the runs need
        import jax
        jax.config.update("jax_platforms", "cpu")
    from jaxrd.sweeps import sweep
    from jaxrd.training import parallel
    parallel.enable_compilation_cache()
    parallel.prepare_process()
    table = sweep.carry_out(
        description, _WORKDIR.value, backend=_BACKEND.value, processes=_PROCESSES.value, slurm=_slurm(),
        collect_only=_COLLECT.value, say=functools.partial(print, flush=True))
    print(f"\n{table}", flush=True)
    if any(row["status"] == "finished" for row in table.rows):
        print(f"\nreport: {table.plan.workdir / 'report.html'}", flush=True)
    if table.failed:
        first = table.failed[0]
        raise InputError(f"{len(table.failed)} of {len(table.rows)} runs failed; {first['run']}: {first['error']}")


def _slurm() -> dict | None:
    try:
        found = None if _SLURM.value is None else json.loads(_SLURM.value)
    except ValueError as error:
        raise InputError(f"--slurm is no JSON ({error}); write it like --slurm='{{\"slurm_partition\": \"gpu\"}}'") from None
    if not isinstance(found, dict | None):
        raise InputError(f"--slurm={_SLURM.value}; it must be a JSON object, such as '{{\"slurm_partition\": \"gpu\"}}'")
    return found


if __name__ == "__main__":
    command.define_base_config()
    command.run(main)
