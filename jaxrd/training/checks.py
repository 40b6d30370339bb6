"""What a run asks of its directory, its teacher and its batches: refusals of one line, before any compute where possible."""

import json
import os
import pathlib

import jax
import numpy as np

from jaxrd import data, models
from jaxrd.config import Config, difference
from jaxrd.distillation import Method
from jaxrd.errors import InputError
from jaxrd.training import checkpoint
from jaxrd.training.log import read_metrics, write_json


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


def check_teacher_gradient(name: str, teacher: models.Model, variables: dict, images: np.ndarray, method: Method) -> None:
    """Raises InputError where the teacher's logits have no input gradient for an attack to climb or a term to match.

    Noticed by a vector-Jacobian product, with a fixed random direction, on the first training images: it is 0 for each of
    them where the teacher rounds, thresholds or stops the gradient of its input, or has died.
    """
    logits, vjp = jax.vjp(lambda points: teacher.apply(variables, points, False)[0], data.augment.to_float(images))
    (gradients,) = vjp(jax.random.normal(jax.random.key(0), logits.shape))
    largest = float(np.max(np.abs(np.asarray(gradients))))
    if not (largest > 0 and np.isfinite(largest)):
        needs, way_out = "attacks through it", "an attack that leaves it alone: --config.method.attack=rslad"
        if not method.attack.teacher_gradient:
            needs, way_out = "matches its gradients", "a method without +jvp and +direct"
        elif method.name.split("+")[0] == "path":
            way_out = "an attack that leaves it alone: --config.method.path_inner_loss=cross_entropy"
        raise InputError(
            f"config.teacher {name}: the gradient of its logits with respect to {len(images)} training images is "
            f"{largest:g} everywhere, and {method.name} {needs}; use a teacher that is differentiable in its images, "
            f"or {way_out}")


def check_batch(method: Method, labels: np.ndarray, step: int) -> None:
    """Raises InputError where a method takes negatives of another class from a batch that holds one class only."""
    if method.attack.two_classes and np.all(labels == labels[0]):
        raise InputError(
            f"all {len(labels)} images in the batch of step {step} are of class {labels[0]}, and {method.name} takes negative "
            "images of another class from it; raise config.training.batch_size, train on two classes or more, or set "
            "--config.method.path_targeted_start=anchor_image")


def check_claim(workdir: pathlib.Path, config: Config) -> None:
    """Raises InputError where the directory belongs to another configuration, or cannot be one."""
    path = workdir / "config.json"
    nearest = next(parent for parent in (workdir, *workdir.absolute().parents) if parent.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        reason = "is not writable" if nearest.is_dir() else "is a file"
        raise InputError(f"--workdir={workdir}: {nearest} {reason}; choose another --workdir")
    if (workdir / "import.json").exists():
        raise InputError(
            f"{workdir} holds imported weights, not a run to go on with; choose another --workdir, and give this one as "
            "--config.teacher")
    if not path.exists():
        if checkpoint.has_checkpoints(workdir):
            raise InputError(f"{workdir} holds checkpoints but no config.json; choose another --workdir")
        return
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError):
        raise InputError(f"{path} is damaged; delete {workdir} or choose another --workdir") from None
    if isinstance(method := stored.get("method") if isinstance(stored, dict) else None, dict):
        method.setdefault("path_negatives", "batch")  # what older runs of the path method did
    if isinstance(optimizer := stored.get("optimizer") if isinstance(stored, dict) else None, dict):
        optimizer.setdefault("scaling_batch", config.optimizer.scaling_batch)  # older runs scaled nothing
    try:
        # By way of `Config`, so that a field that is younger than the run counts as its default.
        old = Config.from_dict(stored).to_dict()
    except InputError as error:
        raise InputError(f"{path}: {error}; or choose another --workdir") from None
    if found := difference(old, config.to_dict()):
        field, before, now = found
        raise InputError(
            f"{workdir} holds a run with config.{field} = {before!r}, not {now!r}; choose another --workdir, "
            "or delete that one")


def claim(workdir: pathlib.Path, config: Config) -> None:
    """Makes the directory this configuration's: writes config.json, after `check_claim`."""
    check_claim(workdir, config)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            write_json(workdir / "config.json", config.to_dict())
    except OSError as error:
        raise InputError(f"--workdir={workdir} cannot be written ({error.strerror}); choose another --workdir") from None


def release(workdir: pathlib.Path) -> None:
    """Gives back a directory in which nothing has been trained yet, so that the next attempt may differ: in its batch size."""
    if jax.process_index() == 0 and not checkpoint.has_checkpoints(workdir) and not read_metrics(workdir / "metrics.jsonl"):
        (workdir / "config.json").unlink(missing_ok=True)
