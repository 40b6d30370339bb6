"""Checkpoints of a run directory: the only file that imports orbax.

One step holds the state, and as metadata the configuration, the model's specification and the validation metrics. Saves are
asynchronous and atomic: a step appears under its number when it is complete, or not at all. The newest few are kept, and the
best one by validation PGD accuracy, and those of regular intervals where asked for.
"""

import contextlib
import json
import pathlib
import shutil
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jaxrd import models
from jaxrd.errors import InputError, one_line
from jaxrd.files import disk_explained, signals_deferred
from jaxrd.training import processes
from jaxrd.training.state import TrainState

BEST_METRIC = "validation/pgd_accuracy"
_ROOM = 1 << 18  # bytes of a checkpoint besides its arrays
_METRICS = "metrics/metrics"  # where orbax puts them in a step's directory


class DamagedCheckpoint(InputError):
    """A checkpoint that cannot be read though it is there: an earlier one may do."""


class Checkpoints:
    """The checkpoints under `workdir/checkpoints`; a context manager that waits for the last save when it closes.

    Saving is a matter of all processes, which call `save` and `wait` alike. Reading is each one's own: one that finds damage
    would leave the others waiting inside orbax.

    Attributes:
      directory: where they lie.
      set_aside: a line on each damaged checkpoint that `restore_newest` has renamed to "damaged-STEP", and on validation
        metrics that could not be read when they were opened: their checkpoint stays, as one that was not validated.
    """

    def __init__(self, workdir: str | pathlib.Path, *, keep: int | None = None, keep_every: int | None = None):
        """Opens them.

        Args:
          workdir: the run directory.
          keep: how many of the newest a later `save` leaves, besides the best; None to read only.
          keep_every: steps of which every multiple that is saved stays, besides those; None for none.
        """
        self.directory = pathlib.Path(workdir).absolute() / "checkpoints"
        self.set_aside: list[str] = []
        self._checkpointer, self._saving = None, None
        if keep is None:
            return
        policies = ocp.training.preservation_policies
        # Orbax reads the metrics of all when it opens, and gives up.
        self.set_aside += processes.from_main(lambda: _set_metrics_aside(self.directory))
        with _damage_explained(self.directory), disk_explained(str(self.directory)):
            self._checkpointer = ocp.training.Checkpointer(
                self.directory,
                # When to save is the loop's decision, which has just validated.
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=policies.AnyPreservationPolicy([
                    policies.LatestN(keep),
                    policies.BestN(get_metric_fn=_best_metric, n=1, keep_checkpoints_without_metrics=False),
                    *([policies.EveryNSteps(keep_every)] if keep_every else [])]),
                cleanup_tmp_directories=True,  # what a killed save left behind; a reader leaves it to the writer
            )

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self._checkpointer is None:
            return
        if kind is None:
            with self._saving_explained():
                self._checkpointer.close()
        elif jax.process_count() == 1 or issubclass(kind, processes.SharedInputError | SystemExit | KeyboardInterrupt):
            with contextlib.suppress(Exception):  # what is on its way says more
                self._checkpointer.close()
        # Else the others, which do not come here, would be waited for.

    def _saving_explained(self):
        return disk_explained(f"{self.directory}: the checkpoint of step {self._saving}", self._newest)

    def _newest(self) -> str:
        return f"step {self.steps[-1]} is saved" if self.steps else "nothing is saved yet"

    def _check_room(self, state: TrainState) -> None:
        """Raises InputError where the disk has no room for a save by several processes.

        Where one of them meets a full disk, orbax can leave all of them at its barriers for 20 minutes.
        """
        # Each writes its part, and then one copies all parts into one file.
        needed = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(_as_tree(state))) + _ROOM
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise InputError(
                f"{self.directory}: the checkpoint of step {self._saving} cannot be written: it takes up to "
                f"{needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free; {self._newest()}; make room there and give the "
                "same command again")

    @property
    def steps(self) -> list[int]:
        """Steps that can be restored, oldest first."""
        return sorted(int(child.name) for child in self.directory.glob("*") if child.name.isdigit())

    @property
    def best_step(self) -> int | None:
        """The step with the highest validation PGD accuracy, the later one on ties; None where nothing is measured."""
        measured = []
        for step in self.steps:
            path = self.directory / str(step) / _METRICS
            try:
                if path.exists():
                    measured.append((_best_metric(_read_metrics(path)), step))
            except (OSError, ValueError) as error:
                raise DamagedCheckpoint(
                    f"{self.directory / str(step)}: its validation metrics cannot be read ({one_line(error)}), so that the "
                    "best checkpoint is not known; take the last, or one of the steps "
                    f"{', '.join(map(str, self.steps))}") from None
        return max(measured)[1] if measured else None

    def save(self, step: int, state: TrainState, metadata: dict[str, Any], metrics: dict[str, float]) -> None:
        """Starts saving and returns; an earlier save that still runs is waited for.

        What goes wrong in the background is raised by the next `save` or `wait`, or at the end.

        Args:
          step: the number it is saved under.
          state: may be donated to the next step at once.
          metadata: what `restore_model` reads: {"config": ..., "model": arguments of `models.create`,
            "teacher_step": of the run's teacher, or None}.
          metrics: validation metrics; `BEST_METRIC` among them decides which step is the best.

        Raises:
          InputError: the disk is full or takes nothing.
        """
        self.wait()
        self._saving = step
        if jax.process_count() > 1:
            with processes.together():
                if processes.is_main():
                    self._check_room(state)
        with self._saving_explained():
            self._checkpointer.save_checkpointables_async(
                step, {"state": _as_tree(state)}, metrics=metrics, custom_metadata=metadata, force=True)

    def wait(self) -> None:
        """Returns when no save is running; raises InputError where the last one found a full disk."""
        with self._saving_explained():
            self._checkpointer.wait()

    def restore(self, step: int, state: TrainState) -> TrainState:
        """Returns the state saved at `step`, placed and typed as `state` is.

        Raises:
          InputError: the checkpoint is damaged, or holds other leaves, shapes or dtypes than `state`; the first is named.
        """
        wanted = _as_tree(state)
        _compare(self._metadata(step).metadata, wanted, self.directory / str(step))
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted)
        return TrainState(**self._load(step, abstract))

    def restore_newest(self, state: TrainState) -> TrainState:
        """Returns the newest state that can be read, placed and typed as `state` is, or `state` where there is none.

        A damaged checkpoint is passed over and set aside, so that its step can be saved again: see `set_aside`. In several
        processes, which must all call this, one is passed over that any of them cannot read.

        Args:
          state: see `restore`.

        Raises:
          InputError: all are damaged, or the newest that is not holds other leaves, shapes or dtypes than `state`.
        """
        damaged, restored = {}, state
        # On a shared disk two processes may see two lists.
        steps = processes.from_main(lambda: self.steps)
        for step in reversed(steps):
            error = None
            try:
                restored = self.restore(step, state)
            except InputError as caught:
                error = caught
            if not processes.any_of(isinstance(error, DamagedCheckpoint)):
                with processes.together():
                    if error:
                        raise error
                break
            found = processes.gather_text(str(error) if isinstance(error, DamagedCheckpoint) else "")
            damaged[step] = next(filter(None, found))
        if damaged and len(damaged) == len(steps):
            raise processes.refusal(next(iter(damaged.values())))
        self._set_aside(damaged)
        return restored

    def restore_variables(self, step: int) -> tuple[models.Model, dict, dict[str, Any]]:
        """Returns (model, variables, origin) of `step`: see `restore_model`."""
        found = self._metadata(step)
        tree, custom = found.metadata, found.custom_metadata or {}
        if "model" not in custom:
            raise InputError(
                f"{self.directory / str(step)}: no model specification; this checkpoint is damaged or not one of jaxrd: "
                "use another, or train again")
        model = models.create(**custom["model"])
        averaged = bool(tree.get("average"))
        source = tree["average"] if averaged else tree
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        _compare({name: source.get(name) for name in shapes}, shapes, self.directory / str(step))
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
        restored = self._load(step, {"average": abstract} if averaged else abstract, partial=True)
        variables = restored["average"] if averaged else restored
        return model, variables, {
            "step": step, "config": custom["config"], "teacher_step": custom.get("teacher_step"),
            "teacher_file": custom.get("teacher_file"),
            "weights": "average" if averaged else "newest", "imported": custom.get("imported"),
            "counters": custom.get("counters", {})}

    def _set_aside(self, damaged: dict[int, str]) -> None:
        """Renames steps, given with what is wrong with each; all processes call it with the same ones."""
        for step, reason in damaged.items():
            aside = self.directory / f"damaged-{step}"
            if processes.is_main():
                shutil.rmtree(aside, ignore_errors=True)
                (self.directory / str(step)).rename(aside)
            self.set_aside.append(f"{reason.partition(';')[0]}; it is now {aside.name}, and an earlier one is taken")
        if damaged:
            processes.barrier("damaged checkpoints are set aside")
            if self._checkpointer:
                self._checkpointer.reload()

    def _metadata(self, step: int):
        with _damage_explained(self.directory / str(step)), _alone():
            found = ocp.metadata(self.directory / str(step), checkpointable_name="state")
            if found.metadata is None:  # orbax has logged why, and goes on
                raise ValueError("its arrays cannot be read")
            return found

    def _load(self, step: int, abstract: dict, partial: bool = False) -> dict:
        context = _alone()
        context.pytree.loading.partial_load = partial
        with _damage_explained(self.directory / str(step)), context:
            return ocp.load_checkpointables(self.directory / str(step), {"state": abstract})["state"]


def save_variables(workdir: str | pathlib.Path, variables: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Saves variables without an optimiser's state as step 0 of a run directory, and returns when they are written.

    Raises:
      OSError: they cannot be written.
    """
    # An exception in the middle would leave orbax's threads waiting for each other, for minutes.
    with signals_deferred():
        try:
            with Checkpoints(workdir, keep=1) as checkpoints:
                checkpoints._checkpointer.save_checkpointables(
                    0, {"state": variables}, metrics={}, custom_metadata=metadata, force=True)
        except Exception as error:  # the file system's complaints, in tensorstore's words
            raise OSError(f"is the disk full? {' '.join(str(error).split())[:120]}") from None


def restore_model(workdir: str | pathlib.Path, step: int | str = "last") -> tuple[models.Model, dict, dict[str, Any]]:
    """Returns the model of a run directory, its variables (the weight average where the run kept one) and their origin.

    Args:
      workdir: a run directory.
      step: "last", "best" (by validation PGD accuracy), or a step's number.

    Returns:
      (model, variables, {"step", "config", "teacher_step", "teacher_file", "weights", "imported", "counters"}); `teacher_step`
      and `teacher_file` (see `file_of`) are those of the teacher it was distilled from, or None; `weights` is "average" or
      "newest"; `imported` is what import.json says, or None for a trained run; `counters` are PyTorch's counters of batches, by
      key, where it had some.

    Raises:
      InputError: no such directory, no checkpoint in it, no such step, or a damaged one.
    """
    with _reader(workdir) as checkpoints:
        steps = checkpoints.steps
        chosen = checkpoints.best_step if step == "best" else max(steps) if step == "last" else step
        if chosen is None:
            raise InputError(
                f"{workdir}: none of its checkpoints was validated, so none is the best (config.data.selection decides); "
                f"take the last, or one of the steps {', '.join(map(str, steps))}")
        if chosen not in steps:
            raise InputError(
                f"{workdir}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}, and best and last")
        return checkpoints.restore_variables(chosen)


def has_checkpoints(workdir: str | pathlib.Path) -> bool:
    """Returns whether the directory holds a finished checkpoint."""
    return any(child.name.isdigit() for child in (pathlib.Path(workdir) / "checkpoints").glob("*"))


def steps_of(workdir: str | pathlib.Path) -> list[int]:
    """Returns the steps of a run directory that can be restored, oldest first; raises InputError where there are none."""
    with _reader(workdir) as checkpoints:
        return checkpoints.steps


def newest_metadata(workdir: str | pathlib.Path) -> dict[str, Any]:
    """Returns the metadata that the newest checkpoint of a run directory was saved with: the newest that can be read."""
    checkpoints, first = _reader(workdir), None
    for step in reversed(checkpoints.steps):
        try:
            return checkpoints._metadata(step).custom_metadata or {}
        except DamagedCheckpoint as error:
            first = first or error
    raise first


def file_of(metadata: dict[str, Any]) -> str | None:
    """Returns the SHA-256 of the file that a checkpoint's weights were imported from, or None where they were trained."""
    return ((metadata.get("imported") or {}).get("file") or {}).get("sha256")


def _reader(workdir: str | pathlib.Path) -> Checkpoints:
    directory = pathlib.Path(workdir).absolute()
    if directory.is_file():
        raise InputError(
            f"{workdir} is a file, not a run directory; make one of its weights: python -m launch.weights import "
            f"--source={workdir} --workdir=DIR")
    if not directory.is_dir():
        raise InputError(f"{workdir}: no such run directory; train it first, or correct the path")
    if not has_checkpoints(directory):
        raise InputError(f"{workdir}: no finished checkpoint in it; train that run first")
    return Checkpoints(directory)


def _alone() -> ocp.Context:
    """Returns a context in which orbax reads for this process and waits for no other."""
    context, me = ocp.Context(), jax.process_index()
    options = context.multiprocessing
    options.primary_host, options.active_processes, options.barrier_sync_key_prefix = me, {me}, f"reader-{me}"
    return context


def _best_metric(metrics: dict[str, float]) -> float:
    return metrics.get(BEST_METRIC, float("-inf"))


def _as_tree(state: TrainState) -> dict[str, Any]:
    return {field: getattr(state, field) for field in state.__dataclass_fields__}


def _leaves(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """{dotted path: (shape, dtype)} of every leaf, whatever kind of container holds it; typed keys are left out."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))
    named = {".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path): leaf
             for path, leaf in leaves}
    return {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in named.items() if name != "key"}


def _compare(found: Any, wanted: Any, where: pathlib.Path) -> None:
    """Raises InputError for the first leaf in which a checkpoint differs from what is asked of it.

    Orbax would say so too, in several hundred lines whose cause is the last.
    """
    found, wanted = _leaves(found), _leaves(wanted)
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            def say(leaf):
                return "absent" if leaf is None else f"{leaf[1]}{list(leaf[0])}"
            raise InputError(
                f"{where}: {name} is {say(found.get(name))}, this run needs {say(wanted.get(name))}; "
                "the checkpoint is of another model or optimiser, use another workdir")


@contextlib.contextmanager
def _damage_explained(where: pathlib.Path):
    """Turns whatever orbax raises on a file that is cut short or missing into one line about `where`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # Orbax wraps the cause several times, and in its own words it is a missing handler.
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(str(cause).split())[:160]
        # Not every failure to read is damage, and advice to delete must not be given lightly.
        if isinstance(cause, MemoryError | PermissionError) or any(
                word in reason for word in ("RESOURCE_EXHAUSTED", "Out of memory", "PERMISSION_DENIED", "Permission denied")):
            raise
        raise DamagedCheckpoint(
            f"{where}: this checkpoint is damaged ({type(cause).__name__}: {reason}); "
            "delete its directory to fall back on an earlier one, or train again") from None


def _set_metrics_aside(directory: pathlib.Path) -> list[str]:
    """Renames validation metrics that cannot be read, and returns a line on each."""
    lines = []
    for path in sorted(directory.glob(f"*/{_METRICS}")):
        step = path.parents[1]
        if not step.name.isdigit():
            continue
        try:
            _read_metrics(path)
        except (OSError, ValueError) as error:
            aside = path.with_name("damaged")
            path.rename(aside)
            lines.append(f"{step}: its validation metrics cannot be read ({one_line(error)}); they are now "
                         f"{aside.relative_to(step)}, and it counts as one that was not validated")
    return lines


def _read_metrics(path: pathlib.Path) -> dict[str, float]:
    """Returns validation metrics; ValueError where the file holds something else."""
    metrics = json.loads(path.read_text())
    if not isinstance(metrics, dict) or not isinstance(metrics.get(BEST_METRIC, 0.0), int | float):
        raise ValueError(f"{BEST_METRIC} is not a number in them")
    return metrics
