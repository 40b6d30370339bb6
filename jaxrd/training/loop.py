"""The training loop of one run directory, resumable at any point.

A run directory holds config.json, environment.json, metrics.jsonl and checkpoints/. The same call on a directory that holds
checkpoints continues from the last one, to the same parameters as a run that was never interrupted (where the device's
arithmetic is deterministic): batches, augmentation and attacks are functions of (seed, step) alone, and the rest is in the
state.
"""

import pathlib
import signal
import time
from typing import Any

import jax
import numpy as np

import jaxrd
from jaxrd import data
from jaxrd.config import Config
from jaxrd.data.opening import DataSet
from jaxrd.errors import InputError
from jaxrd.files import disk_explained
from jaxrd.performance import memory
from jaxrd.training import checkpoint, checks, opening, parallel, processes, schedule, state as states, swa, teacher_cache
from jaxrd.training.environment import environment
from jaxrd.training.feeding import Feeder
from jaxrd.training.log import Log, write_json
from jaxrd.training.step import make_train_step, shardings
from jaxrd.training.stopping import StopSignal
from jaxrd.training.validation import validate


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
        checks.check_claim(workdir, config)
        # 2. What the configuration names: data, teacher (as it was when the run began), student, the step compiled for them.
        run = opening.open_run(config, workdir, mesh)
        train_step = make_train_step(run.recipe, mesh)
    # 3. All of it is there, so the directory is this run's from now on.
    with processes.together():
        checks.claim(workdir, config)
    # 4. A fresh state: where a new run begins, and the shape of what a checkpoint must hold.
    state = parallel.replicate(run.recipe.fresh_state(jax.random.key(config.seed)), mesh, shardings(run.recipe, mesh))
    keep_every = config.intervals(run.source.epoch).keep_every
    with checkpoint.Checkpoints(workdir, keep=config.training.keep, keep_every=keep_every) as checkpoints:
        # 5. The newest checkpoint, where there is one, in place of the fresh state.
        state = checkpoints.restore_newest(state)
        # 6. The log, cut back to that step.
        log = Log(workdir, config, run.recipe.steps, resumed_at=int(state.step), devices=mesh.size)
        for line in checkpoints.set_aside:
            log.say(f"warning: {line}")
        # 7. The remaining steps.
        try:
            return _run(run, train_step, state, checkpoints, log, mesh)
        except InputError:
            checks.release(workdir)
            raise
        finally:
            log.close()


def _run(run: opening.Run, train_step, state, checkpoints, log, mesh):
    config, recipe, source, validation_source = run.config, run.recipe, run.source, run.dataset.validation
    steps, batch_size = recipe.steps, config.training.batch_size
    intervals = config.intervals(source.epoch)
    learning_rate = schedule.learning_rate(config.optimizer, steps, batch_size=batch_size, epoch=source.epoch)
    step, pending = int(state.step), []
    if step >= steps:
        log.say(f"{log.workdir} is finished: step {step} of {steps}")
        return state
    found = environment() if processes.is_main() else {}
    _note_environment(log.workdir, found)
    log.say(_what_it_sees(config, run.dataset, source))
    table = None
    if run.cached:
        log.say(f"the teacher answers on the {len(source):,} training images once: they are the same in every epoch")
        table = teacher_cache.clean_logits(recipe, run.teacher_variables, source, mesh, batch_size)
    feeder = Feeder(
        source, mesh, seed=config.seed, batch_size=batch_size, first=step, last=steps,
        partners=recipe.augmentation.mixes, negatives=recipe.method.negatives, resident=config.data.resident,
        accumulation=recipe.accumulation, teacher_clean=table)
    metadata = {"config": config.to_dict(), "model": dict(recipe.student.specification), "teacher_step": run.teacher_step,
                "teacher_file": run.teacher_file, "images": run.images, "jaxrd": jaxrd.__version__}
    stop = StopSignal(mesh)
    with stop, feeder:
        for batch in feeder:
            if recipe.method.attack.two_classes:
                checks.check_batch(recipe.method, source.labels[source.indices(config.seed, step, batch_size)], step + 1)
            began = time.perf_counter()
            if not log.compiled:
                train_step = memory.compile_within(
                    train_step, (state, run.teacher_variables, batch), mesh.local_devices, "the train step")
                if planned := memory.planned(train_step):
                    _note_environment(log.workdir, found | {"step_memory": planned})
            state, metrics = train_step(state, run.teacher_variables, batch)
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
                state = swa.reestimate(recipe, state, run.teacher_variables, source, config, mesh)
            if (due or last) and validation_source is not None:
                try:
                    validation = validate(
                        recipe.student, state.variables, validation_source, recipe.inner.threat, mesh,
                        teacher=recipe.teacher, teacher_variables=run.teacher_variables)
                except InputError as error:  # logits that are not finite: the last update was one step too far
                    raise _diverged(f"validation after step {step}: {error}", config, checkpoints) from None
                log.validation(step, validation)
                checkpoints.save(step, state, metadata, validation)
            elif due or last or stopping:
                checkpoints.save(step, state, metadata, {})
            if stopping and not last:
                checkpoints.wait()
                log.say(f"stopped by {stopping} after step {step}; the same command goes on from there")
                if stopping == "SIGINT":
                    raise KeyboardInterrupt
                raise SystemExit(128 + signal.Signals[stopping].value)
    return state


def _note_environment(workdir: pathlib.Path, found: dict[str, Any]) -> None:
    if processes.is_main():
        with disk_explained(str(workdir / "environment.json")):
            write_json(workdir / "environment.json", found)


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
