"""The training loop of one run directory, resumable at any point.

A run directory holds config.json, environment.json, metrics.jsonl and checkpoints/. The same call on a directory that holds
checkpoints continues from the last one, to the same parameters as a run that was never interrupted: batches, augmentation and
attacks are functions of (seed, step) alone, and the rest is in the state.
"""

import json
import pathlib
import platform
import signal
import subprocess
import threading
import time
from typing import Any

import jax
import numpy as np

import jaxrd
from jaxrd import data, models
from jaxrd.config import Config, difference
from jaxrd.data.source import DataSet
from jaxrd.distillation import InnerMaximisation
from jaxrd.errors import InputError
from jaxrd.evaluation import robustness
from jaxrd.training import checkpoint, parallel, schedule, state as states
from jaxrd.training.log import Log, write_json
from jaxrd.training.step import Recipe, make_train_step

VALIDATION_ATTACK = "pgd10"


def train(config: Config, workdir: str | pathlib.Path, *, devices: list | None = None) -> states.TrainState:
    """Trains, or goes on training, the run of `config` in `workdir`, and returns its last state.

    Args:
      config: a validated configuration.
      workdir: created where it does not exist; may hold an unfinished run of the same configuration.
      devices: devices that share each batch; all by default.

    Raises:
      InputError: `workdir` holds a run of another configuration; data, teacher or checkpoint are missing, damaged or do not
        fit; the loss stops being finite.
    """
    workdir = pathlib.Path(workdir)
    mesh = parallel.data_mesh(devices)
    parallel.check_batch_size("config.training.batch_size", config.training.batch_size, mesh)

    # Resume order:
    # 1. The run directory belongs to this configuration, or to nobody.
    claim(workdir, config)
    # 2. What the configuration names: data, teacher, student, and the step compiled for them.
    dataset, train_source = open_data(config)
    recipe, teacher_variables = build_recipe(config, dataset, len(train_source), mesh)
    train_step = make_train_step(recipe, mesh)
    # 3. A fresh state: where a new run begins, and the shape of what a checkpoint must hold.
    state = states.create(
        recipe.student, recipe.optimizer, jax.random.key(config.seed), weight_average=recipe.weight_average > 0)
    state = jax.device_put(state, parallel.replicated(mesh))
    with checkpoint.Checkpoints(workdir, keep=config.training.keep) as checkpoints:
        # 4. The newest checkpoint, where there is one, in place of the fresh state.
        if checkpoints.steps:
            state = checkpoints.restore(checkpoints.steps[-1], state)
        # 5. The log, cut back to that step.
        log = Log(workdir, config, recipe.steps, resumed_at=int(state.step))
        # 6. The remaining steps.
        try:
            return _run(config, dataset, train_source, recipe, teacher_variables, train_step, state, checkpoints, log, mesh)
        finally:
            log.close()


def _run(config, dataset, train_source, recipe, teacher_variables, train_step, state, checkpoints, log, mesh):
    steps, batch_size = recipe.steps, config.training.batch_size
    checkpoint_every = config.training.checkpoint_every or max(steps // 10, 1)
    learning_rate = schedule.learning_rate(config.optimizer, steps)
    metadata = {"config": config.to_dict(), "model": recipe.student.specification, "jaxrd": jaxrd.__version__}
    step, pending = int(state.step), []
    if step >= steps:
        log.say(f"{log.workdir} is finished: step {step} of {steps}")
        return state
    stop = _StopSignal()
    with stop:
        while step < steps:
            rows = parallel.local_rows(train_source.indices(config.seed, step, batch_size))
            batch = parallel.put_batch(train_source.batch(rows), mesh)
            began = time.perf_counter()
            state, metrics = train_step(state, teacher_variables, batch)
            step += 1
            if not log.compiled:
                jax.block_until_ready(metrics)
                log.note_compilation(step, time.perf_counter() - began)
            if mesh.size > 1 and jax.default_backend() == "cpu":
                # XLA's in-process collectives deadlock where several steps are in flight on fake devices.
                jax.block_until_ready(metrics)
            pending.append(metrics)
            log.advance(step)
            last, due = step == steps, step % checkpoint_every == 0
            if step % config.training.log_every == 0 or due or last or stop.requested:
                train_metrics = _mean_metrics(pending, step, config, checkpoints)
                log.train(step, train_metrics, float(learning_rate(step - 1)))
                pending = []
            if due or last:
                validation = validate(recipe.student, state.variables, dataset.validation, recipe.inner.threat, mesh)
                log.validation(step, validation)
                checkpoints.save(step, state, metadata, validation)
            elif stop.requested:
                checkpoints.save(step, state, metadata, {})
            if stop.requested and not last:
                checkpoints.wait()
                log.say(f"stopped by {stop.requested} after step {step}; the same command goes on from there")
                raise SystemExit(128 + signal.Signals[stop.requested].value)
    return state


def open_data(config: Config) -> tuple[DataSet, data.Source]:
    """Returns the data set of a configuration and the source that it trains on (all of the training split, or a draw)."""
    section = config.data
    dataset = data.open_dataset(
        section.name, arrays=section.arrays, directory=section.directory or None,
        validation_fraction=section.validation_fraction)
    train_source = dataset.train
    if section.examples is not None:
        train_source = train_source.subset(section.examples, config.seed)
    return dataset, train_source


def build_recipe(config: Config, dataset: DataSet, train_examples: int, mesh) -> tuple[Recipe, dict | None]:
    """Returns what the step is compiled for, and the teacher's variables on the devices (None without a teacher)."""
    classes, image_shape = dataset.train.classes, dataset.train.image_shape
    student = models.create(config.student, classes=classes, image_shape=image_shape, dtype=config.dtype)
    method, teacher, variables = config.build_method(), None, None
    if method.needs_teacher:
        teacher, variables, _ = checkpoint.restore_model(config.teacher)
        check_teacher(config.teacher, teacher, student)
        variables = jax.device_put(variables, parallel.replicated(mesh))
    steps = config.steps(train_examples)
    return Recipe(
        method=method, student=student, teacher=teacher,
        inner=InnerMaximisation(config.threat.build(), config.attack.step_size, config.attack.steps),
        optimizer=schedule.optimizer(config.optimizer, steps), steps=steps,
        shift=config.data.shift, flip=config.data.flip,
        weight_average=config.training.weight_average, attack_batch_statistics=config.attack.batch_statistics,
    ), variables


def check_teacher(name: str, teacher: models.Model, student: models.Model) -> None:
    """Raises InputError where teacher and student do not speak of the same classes or images."""
    if teacher.classes != student.classes:
        raise InputError(
            f"config.teacher {name} has {teacher.classes} classes, the student and its data {student.classes}; "
            "use a teacher trained on the same classes")
    if teacher.image_shape != student.image_shape:
        raise InputError(
            f"config.teacher {name} takes images {teacher.image_shape}, the data has {student.image_shape}; "
            "use a teacher trained on the same images")


def validate(model, variables, source, threat, mesh) -> dict[str, float]:
    """Returns the clean and PGD-10 accuracy on the validation split, the one that chooses the best checkpoint."""
    accuracy = {
        name: robustness.run_attack(model, variables, source, robustness.PROTOCOLS[protocol], threat, mesh=mesh).accuracy
        for name, protocol in (("clean_accuracy", "clean"), ("pgd_accuracy", VALIDATION_ATTACK))}
    return {f"validation/{name}": value for name, value in accuracy.items()}


def claim(workdir: pathlib.Path, config: Config) -> None:
    """Writes config.json and environment.json, or checks that the directory already belongs to this configuration."""
    path, new = workdir / "config.json", config.to_dict()
    if path.exists():
        try:
            old = json.loads(path.read_text())
        except json.JSONDecodeError:
            raise InputError(f"{path} is damaged; delete {workdir} or choose another --workdir") from None
        if found := difference(old, new):
            field, before, now = found
            raise InputError(
                f"{workdir} holds a run with config.{field} = {before!r}, not {now!r}; choose another --workdir, "
                "or delete that one")
    elif (workdir / "checkpoints").exists():
        raise InputError(f"{workdir} holds checkpoints but no config.json; choose another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        write_json(path, new)
        write_json(workdir / "environment.json", environment())


def environment() -> dict[str, Any]:
    """Returns versions, devices and the git commit, as a run records them."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True, timeout=10,
            cwd=pathlib.Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    import flax
    import optax
    return {
        "jaxrd": jaxrd.__version__, "jax": jax.__version__, "flax": flax.__version__, "optax": optax.__version__,
        "numpy": np.__version__, "python": platform.python_version(), "platform": platform.platform(),
        "devices": [str(device.device_kind) for device in jax.devices()], "processes": jax.process_count(),
        "git_commit": commit or None,
    }


def _mean_metrics(pending: list[dict], step: int, config: Config, checkpoints) -> dict[str, float]:
    """Fetches the metrics of the steps since the last entry and returns their means; stops where a loss is not finite."""
    fetched = jax.device_get(pending)
    losses = np.array([metrics["loss"] for metrics in fetched])
    if not np.all(np.isfinite(losses)):
        bad = step - len(losses) + 1 + int(np.argmin(np.isfinite(losses)))
        saved = f"step {checkpoints.steps[-1]} is saved" if checkpoints.steps else "nothing is saved yet"
        raise InputError(
            f"the loss of step {bad} is {losses[np.argmin(np.isfinite(losses))]}; {saved}; lower "
            f"config.optimizer.learning_rate (now {config.optimizer.learning_rate}) or the weights of the method's terms")
    return {name: float(np.mean([metrics[name] for metrics in fetched])) for name in fetched[0]}


class _StopSignal:
    """Turns SIGTERM and SIGUSR1 (a scheduler's warning) into a request that the loop honours after the step at hand."""

    def __init__(self):
        self.requested: str | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self):
        # Signals reach the main thread only; a run in another thread of a notebook does without.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self._old[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _request(self, number, _):
        self.requested = signal.Signals(number).name
