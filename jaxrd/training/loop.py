"""The training loop of one run directory, resumable at any point.

A run directory holds config.json, environment.json, metrics.jsonl and checkpoints/. The same call on a directory that holds
checkpoints continues from the last one, to the same parameters as a run that was never interrupted (where the device's
arithmetic is deterministic): batches, augmentation and attacks are functions of (seed, step) alone, and the rest is in the
state.
"""

import contextlib
import dataclasses
import os
import pathlib
import platform
import signal
import subprocess
import time
from typing import Any

import jax
import numpy as np

import jaxrd
from jaxrd import data, models
from jaxrd.config import Config
from jaxrd.data.opening import DataSet
from jaxrd.distillation import InnerMaximisation
from jaxrd.errors import InputError
from jaxrd.evaluation import robustness
from jaxrd.files import disk_explained
from jaxrd.performance import memory
from jaxrd.training import checkpoint, parallel, processes, schedule, state as states, swa, teacher_cache
from jaxrd.training.checks import check_batch, check_claim, check_teacher, check_teacher_gradient, claim
from jaxrd.training.feeding import Feeder
from jaxrd.training.log import Log, write_json
from jaxrd.training.recipe import Recipe
from jaxrd.training.snapshots import Snapshots
from jaxrd.training.step import make_train_step, shardings
from jaxrd.training.stopping import StopSignal

VALIDATION_ATTACK = "pgd10"
PROBE = 128  # validation images whose input gradients are compared with the teacher's


def train(config: Config, workdir: str | pathlib.Path, *, devices: list | None = None) -> states.TrainState:
    """Trains, or goes on training, the run of `config` in `workdir`, and returns its last state.

    Args:
      config: a validated configuration.
      workdir: created where it does not exist; may hold an unfinished run of the same configuration.
      devices: devices that share each batch; all by default.

    Raises:
      InputError: `workdir` holds a run of another configuration; data, teacher or checkpoint are missing, damaged or do not
        fit; the loss stops being finite.
      SystemExit: SIGTERM or SIGUSR1 came; the state was saved.
      KeyboardInterrupt: Ctrl-C came; the state was saved.
    """
    workdir = pathlib.Path(workdir)
    mesh = parallel.data_mesh(devices)

    # Resume order:
    with processes.together():  # what one process refuses ends all
        parallel.check_batch_size("config.training.batch_size", config.training.batch_size, mesh,
                                  accumulation=config.training.accumulation, bn_groups=config.bn_groups)
        # 1. The run directory belongs to this configuration, or to nobody.
        check_claim(workdir, config)
        # 2. What the configuration names: data, teacher (as it was when the run began), student, the step compiled for them.
        dataset, train_source = open_data(config)
        teacher_step, teacher_file = _teacher_of(config, workdir)
        images = _images_of(dataset, train_source, config, workdir)
        recipe, teacher_variables = build_recipe(config, dataset, train_source.epoch, mesh, teacher_step=teacher_step)
        with _naming("config.data"):
            recipe.augmentation.check_image(train_source.image_shape)
            if recipe.method.negatives:
                train_source.negatives(config.seed, 0, config.training.batch_size)  # refuses data of one class
        cached = teacher_cache.applies(recipe, config, train_source)
        train_step = make_train_step(recipe, mesh)
    # 3. All of it is there, so the directory is this run's from now on.
    with processes.together():
        claim(workdir, config)
    # 4. A fresh state: where a new run begins, and the shape of what a checkpoint must hold.
    state = parallel.replicate(recipe.fresh_state(jax.random.key(config.seed)), mesh, shardings(recipe, mesh))
    keep_every = config.intervals(train_source.epoch).keep_every
    with checkpoint.Checkpoints(workdir, keep=config.training.keep, keep_every=keep_every) as checkpoints:
        # 5. The newest checkpoint, where there is one, in place of the fresh state.
        state = checkpoints.restore_newest(state)
        # 6. The log, cut back to that step.
        log = Log(workdir, config, recipe.steps, resumed_at=int(state.step), devices=mesh.size)
        for line in checkpoints.set_aside:
            log.say(f"warning: {line}")
        # 7. The remaining steps.
        metadata = {"config": config.to_dict(), "model": dict(recipe.student.specification), "teacher_step": teacher_step,
                    "teacher_file": teacher_file, "images": images, "jaxrd": jaxrd.__version__}
        try:
            return _run(
                config, dataset, train_source, recipe, teacher_variables, train_step, state, checkpoints, metadata, log, mesh,
                cached)
        finally:
            log.close()


def _run(config, dataset, train_source, recipe, teacher_variables, train_step, state, checkpoints, metadata, log, mesh,
         cached):
    steps, batch_size = recipe.steps, config.training.batch_size
    intervals = config.intervals(train_source.epoch)
    learning_rate = schedule.learning_rate(config.optimizer, steps, batch_size=batch_size, epoch=train_source.epoch)
    step, pending = int(state.step), []
    if step >= steps:
        log.say(f"{log.workdir} is finished: step {step} of {steps}")
        return state
    found = environment() if processes.is_main() else {}
    _note_environment(log.workdir, found)
    log.say(_what_it_sees(config, dataset, train_source))
    table = None
    if cached:
        log.say(f"the teacher answers on the {len(train_source):,} training images once: they are the same in every epoch")
        table = teacher_cache.clean_logits(recipe, teacher_variables, train_source, mesh, batch_size)
    feeder = Feeder(
        train_source, mesh, seed=config.seed, batch_size=batch_size, first=step, last=steps,
        partners=recipe.augmentation.mixes, negatives=recipe.method.negatives, resident=config.data.resident,
        accumulation=recipe.accumulation, teacher_clean=table)
    stop = StopSignal(mesh)
    with stop, feeder:
        for batch in feeder:
            if recipe.method.attack.two_classes:
                check_batch(recipe.method, train_source.labels[train_source.indices(config.seed, step, batch_size)], step + 1)
            began = time.perf_counter()
            if not log.compiled:
                train_step = _compiled(train_step, state, teacher_variables, batch, mesh)
                if memory := step_memory(train_step):
                    _note_environment(log.workdir, found | {"step_memory": memory})
            state, metrics = train_step(state, teacher_variables, batch)
            step += 1
            if not log.compiled:
                jax.block_until_ready(metrics)
                log.note_compilation(step, time.perf_counter() - began)
                feeder.waited = 0.0
            if mesh.size > 1 and jax.default_backend() == "cpu":
                # XLA's in-process collectives deadlock where several steps are in flight on fake devices.
                jax.block_until_ready(metrics)
            pending.append(metrics)
            if len(pending) > 2:
                # Not far ahead of the device: a signal to stop waits for every step that is in flight.
                jax.block_until_ready(pending[-3])
            log.advance(step)
            # Asked once, so that a signal between two of the lines below cannot stop a run that was not saved.
            stopping = stop.after_step()
            last, due = step == steps, step % intervals.checkpoint_every == 0
            if step % intervals.log_every == 0 or due or last or stopping:
                train_metrics = _mean_metrics(pending, step, config, checkpoints)
                log.train(step, train_metrics, float(learning_rate(step - 1)), waited=feeder.waited)
                pending, feeder.waited = [], 0.0
            if due or last:
                state = swa.reestimate(recipe, state, teacher_variables, train_source, config, mesh)
            if (due or last) and dataset.validation is None:
                checkpoints.save(step, state, metadata, {})
            elif due or last:
                try:
                    validation = validate(
                        recipe.student, state.variables, dataset.validation, recipe.inner.threat, mesh,
                        teacher=recipe.teacher, teacher_variables=teacher_variables)
                except InputError as error:  # logits that are not finite: the last update was one step too far
                    raise _diverged(f"validation after step {step}: {error}", config, checkpoints) from None
                log.validation(step, validation)
                checkpoints.save(step, state, metadata, validation)
            elif stopping:
                checkpoints.save(step, state, metadata, {})
            if stopping and not last:
                checkpoints.wait()
                log.say(f"stopped by {stopping} after step {step}; the same command goes on from there")
                if stopping == "SIGINT":
                    raise KeyboardInterrupt
                raise SystemExit(128 + signal.Signals[stopping].value)
    return state


def _compiled(train_step, state, teacher_variables, batch, mesh):
    """Compiles the step ahead of time, for the arguments of all steps; InputError where it needs more memory than there is."""
    if not hasattr(train_step, "lower"):  # a function around it, that watches or disturbs it
        return train_step
    device = mesh.local_devices[0]
    with memory.shortage_explained(device, "the train step"):
        compiled = train_step.lower(state, teacher_variables, batch).compile()
    memory.check_fits((step_memory(compiled) or {}).get("total"), device, "the train step", devices=len(mesh.local_devices))
    return compiled


def _note_environment(workdir: pathlib.Path, found: dict[str, Any]) -> None:
    if processes.is_main():
        with disk_explained(str(workdir / "environment.json")):
            write_json(workdir / "environment.json", found)


def step_memory(compiled) -> dict[str, int] | None:
    """Returns the bytes on each device that a compiled step takes, as XLA has planned it; None where it does not say.

    "temporary" is what it needs while it runs (activations, for the most part), "arguments" (the state, the teacher, a batch)
    and "outputs" are what goes in and comes out, and "aliased" the part of the outputs that takes the place of arguments;
    "total" = temporary + arguments + outputs - aliased.
    """
    analysis = getattr(compiled, "memory_analysis", None)
    found = analysis() if analysis else None
    if found is None:
        return None
    memory = {"temporary": found.temp_size_in_bytes, "arguments": found.argument_size_in_bytes,
              "outputs": found.output_size_in_bytes, "aliased": found.alias_size_in_bytes}
    return memory | {"total": memory["temporary"] + memory["arguments"] + memory["outputs"] - memory["aliased"]}


def open_data(config: Config) -> tuple[DataSet, data.Source]:
    """Returns the data set of a configuration and the source that it trains on: `open_own_data` and its further images."""
    dataset, train_source = open_own_data(config)
    section = config.data
    if section.extra:
        with _naming("config.data.extra"):
            extra = data.open_split(
                section.extra, section.extra_split, classes=train_source.classes, directory=section.directory or None)
            train_source = data.mixture(train_source, extra, section.extra_fraction)
            train_source.indices(config.seed, 0, config.training.batch_size)  # refuses a fraction that rounds to none or all
    return dataset, train_source


def open_own_data(config: Config) -> tuple[DataSet, data.Source]:
    """Returns the data set of a configuration and what it trains on of it: all of the training split, or a draw."""
    section = config.data
    with _naming("config.data"):
        dataset = data.open_dataset(
            section.name, arrays=section.arrays, directory=section.directory or None,
            validation_fraction=section.validation_fraction, selection=section.selection)
        train_source = dataset.train
        if section.examples is not None:
            train_source = train_source.subset(section.examples, config.seed)
    return dataset, train_source


def build_recipe(
    config: Config, dataset: DataSet, train_examples: int, mesh, *, teacher: models.Model | None = None,
    teacher_step: int | str = "last",
) -> tuple[Recipe, dict | None]:
    """Returns what the step is compiled for, and the teacher's variables on the devices (None without a teacher).

    Args:
      config: the run's configuration.
      dataset: what it trains on: classes and image shape.
      train_examples: how many images an epoch has.
      mesh: the devices.
      teacher: an untrained teacher, for timing, in place of the one in `config.teacher`.
      teacher_step: which checkpoint of the one in `config.teacher`.
    """
    classes, image_shape = dataset.train.classes, dataset.train.image_shape
    method, variables = config.build_method(), None
    student = models.create(
        config.student, classes=classes, image_shape=image_shape, dtype=config.dtype, batch_norm_sets=method.batch_norm_sets,
        # Of one forward, which is that of a micro-batch.
        bn_groups=config.bn_groups and config.bn_groups // config.training.accumulation)
    if method.needs_teacher:
        if teacher:
            variables = teacher.init(jax.random.key(0))
        else:
            with _naming("config.teacher"):
                teacher, variables, _ = checkpoint.restore_model(config.teacher, teacher_step)
        with _naming("config.teacher_dtype"):
            teacher = models.variant(teacher, dtype=config.teacher_dtype)
        check_teacher(config.teacher, teacher, student)
        if method.needs_teacher_gradient:
            check_teacher_gradient(config.teacher, teacher, variables, dataset.train.images[:16], method)
        variables = parallel.replicate(variables, mesh)
    steps = config.steps(train_examples)
    return Recipe(
        method=method, student=student, teacher=teacher if method.needs_teacher else None,
        inner=InnerMaximisation(
            config.threat.build(), config.attack.step_size, config.attack.steps, config.attack.start or None,
            config.attack.project_start),
        optimizer=schedule.optimizer(
            config.optimizer, steps, batch_size=config.training.batch_size, epoch=train_examples),
        steps=steps,
        augmentation=config.build_augmentation(),
        weight_average=config.training.weight_average, snapshots=Snapshots.of(config, train_examples),
        label_smoothing=config.training.label_smoothing,
        attack_batch_statistics=config.attack.batch_statistics,
        accumulation=config.training.accumulation, joint_views=config.training.joint_views,
        attack_dtype=config.attack.dtype, gradient_checkpointing=config.training.gradient_checkpointing,
        shard_state=config.training.shard_state,
    ), variables


@contextlib.contextmanager
def _naming(field: str):
    """Begins the message of an InputError with the field that it is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{field}: {error}") from None


def _teacher_of(config: Config, workdir: pathlib.Path) -> tuple[int | None, str | None]:
    """Returns the teacher's step that this run distils, and the fingerprint of its file where it was imported.

    They are its newest when the run began, and those ever after: a teacher that went on training in between, or another one in
    its place, would otherwise change under a resumed run.
    """
    if not config.build_method().needs_teacher:
        return None, None
    with _naming("config.teacher"):
        there = checkpoint.steps_of(config.teacher)
        file = checkpoint.file_of(checkpoint.newest_metadata(config.teacher))
    if not checkpoint.has_checkpoints(workdir):
        return there[-1], file
    began = checkpoint.newest_metadata(workdir)
    began_with = began.get("teacher_step", there[-1])
    if "teacher_file" in began and began["teacher_file"] != file:
        raise InputError(
            f"{workdir} was begun with another teacher in {config.teacher}, of other imported weights; choose another "
            "--workdir, or import those again")
    if began_with not in there:
        raise InputError(
            f"{workdir} was begun with step {began_with} of its teacher {config.teacher}, which now holds "
            f"{', '.join(map(str, there))}; choose another --workdir, or bring that checkpoint back")
    return began_with, file


def _what_it_sees(config: Config, dataset: DataSet, source: data.Source) -> str:
    """Returns a line on what is trained on, and what the best checkpoint is chosen on."""
    name = config.data.arrays or config.data.name
    line = f"trains on {source.epoch:,} images of {name}"
    if config.data.extra:
        line += f" and {len(source) - source.epoch:,} of {config.data.extra}, {config.data.extra_fraction:.0%} of each batch"
    chosen = {"validation": "held-out images", "test": "TEST images: its accuracy on them will be optimistic"}
    if dataset.validation is None:
        return f"{line}; no checkpoint is the best one, the last counts"
    return f"{line}; the best checkpoint is chosen on {len(dataset.validation):,} {chosen[config.data.selection]}"


def _images_of(dataset: DataSet, source: data.Source, config: Config, workdir: pathlib.Path) -> list[str]:
    """Returns the fingerprints of the images to train and to validate on; InputError where the run was begun on others."""
    images = [source.fingerprint, *([dataset.validation.fingerprint] if dataset.validation is not None else [])]
    if checkpoint.has_checkpoints(workdir):
        began_with = checkpoint.newest_metadata(workdir).get("images", images)
        if began_with != images:
            raise InputError(
                f"{workdir} was begun with other images than are now in {config.data.arrays or config.data.name}"
                + (f" and {config.data.extra}" if config.data.extra else "")
                + "; choose another --workdir, or bring those back")
    return images


def validate(model, variables, source, threat, mesh, *, teacher=None, teacher_variables=None) -> dict[str, float]:
    """Returns the clean and PGD-10 accuracy on the validation split, the one that chooses the best checkpoint.

    With a teacher also its accuracy on the same clean and adversarial images, and the mean cosine between the input gradients
    of both on the first images. Whatever the run computes in, this is in float32, as evaluations are.
    """
    model = models.variant(model, dtype="float32")
    teacher = teacher and models.variant(teacher, dtype="float32")

    def measured(protocol, **options):
        return robustness.run_attack(model, variables, source, robustness.PROTOCOLS[protocol], threat, mesh=mesh, **options)

    clean = measured("clean", keep_images=False)
    attacked = measured(VALIDATION_ATTACK, keep_images=teacher is not None)
    metrics = {"clean_accuracy": clean.accuracy, "pgd_accuracy": attacked.accuracy}
    if teacher is not None:
        for name, images in (("teacher_clean_accuracy", source.images), ("teacher_pgd_accuracy", attacked.images)):
            metrics[name] = robustness.run_attack(
                teacher, teacher_variables, dataclasses.replace(source, images=images), robustness.PROTOCOLS["clean"], threat,
                mesh=mesh, keep_images=False).accuracy
        probe = dataclasses.replace(source, images=source.images[:PROBE], labels=source.labels[:PROBE])
        metrics["gradient_cosine"] = robustness.gradient_alignment(
            model, variables, teacher, teacher_variables, probe, mesh=mesh)["gradient_cosine"]
    return {f"validation/{name}": value for name, value in metrics.items()}


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
        "xla_flags": os.environ.get("XLA_FLAGS") or None, "git_commit": commit or None,
    }


def _mean_metrics(pending: list[dict], step: int, config: Config, checkpoints) -> dict[str, float]:
    """Fetches the metrics of the steps since the last entry and returns their means; stops where a step was not finite."""
    fetched = jax.device_get(pending)
    for number, metrics in enumerate(fetched, step - len(fetched) + 1):
        # The gradient too: it can be NaN where the loss is not, and then the parameters are.
        for name, value in (("loss", metrics["loss"]), ("gradient", metrics["gradient_norm"])):
            if not np.isfinite(value):
                raise _diverged(f"the {name} of step {number} is {value}", config, checkpoints)
    return {name: float(np.mean([metrics[name] for metrics in fetched])) for name in fetched[0]}


def _diverged(what: str, config: Config, checkpoints) -> InputError:
    checkpoints.wait()
    saved = f"step {checkpoints.steps[-1]} is saved" if checkpoints.steps else "nothing is saved yet"
    return processes.refusal(
        f"{what}; {saved}; lower config.optimizer.learning_rate (now {config.optimizer.learning_rate}) or the weights of the "
        "method's terms")
