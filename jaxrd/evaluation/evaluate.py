"""The evaluation of one run directory: attacks, alignment, classes, a gallery, and evaluation.json, which holds them all."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxrd import models
from jaxrd.data.source import Source
from jaxrd.errors import InputError
from jaxrd.evaluation import measures, other_data, record, robustness, shares
from jaxrd.evaluation.plots import is_number
from jaxrd.evaluation.subject import Subject
from jaxrd.training import checkpoint, parallel, processes
from jaxrd.training.checks import check_teacher
from jaxrd.training.log import read_metrics
from jaxrd.training.opening import open_own_data

ATTACKS = "clean,fgsm,pgd20,cw30,autoattack"
_GALLERY_ATTACK = measures.ADVERSARIAL_ATTACK
_GALLERY_IMAGES = 10
_CURVE = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # in units of the run's epsilon


# Accelerators round the products of float32 convolutions by default, which masks gradients and moves predictions.
@jax.default_matmul_precision("highest")
def evaluate(
    workdir: str | pathlib.Path,
    attacks: str | list[str] | None = None,
    *,
    step: str | int = "last",
    split: str = "test",
    teacher: str = "",
    seed: int = 0,
    batch_size: int = 256,
    curve: str = "pgd20",
    data: str | list[str] = "",
    data_directory: str | pathlib.Path | None = None,
    examples: int | None = None,
    devices: list | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Evaluates a run's checkpoint, writes evaluation.json and evaluation/gallery.npz, and returns what the former holds.

    Beside accuracies the file has how far the network is linear around the images and how alike it is to its teacher there
    ("alignment"), and what holds class by class ("classes"); see `measures`. Adversarial images are taken from pgd20, where it
    is among the attacks.

    Networks compute in float32 here, whatever they were trained in. What an earlier call measured on the same checkpoint, data,
    threat model and seed with other attacks stays in the file. A cascade (autoattack, ...) records its finished batches in
    evaluation/NAME-SPLIT-stepSTEP-seedSEED, goes on from there when it was killed, and leaves its adversarial images there.

    With `data`, the attacks run on the test images of other data sets instead. Each has a record of its own under "other_data"
    in evaluation.json, which otherwise stays as it is; an attack that is on record for the same weights, images and terms is
    not run again, so a call that was killed goes on.

    In a run of several processes all of them make this call. Each attacks its share of the images on its own devices, the main
    one writes and speaks, and all return the same.

    Args:
      workdir: a run directory with a finished checkpoint.
      attacks: names in `robustness.PROTOCOLS` and `robustness.CASCADES`, comma-separated or a list; `ATTACKS` by default, with
        `data` `other_data.ATTACKS`.
      step: "last" (the papers' protocol), "best" by validation PGD accuracy, or a step's number.
      split: "test", or "validation" while choosing anything.
      teacher: run directory to measure the gradient alignment with; by default the run's own teacher, if it has one.
      seed: of the random starts.
      batch_size: images per batch of a process, at most.
      curve: the attack whose accuracy is measured at several radii, if it is among `attacks`; "none" for no curve, as with
        `data`.
      data: other data, comma-separated or a list: prepared TFDS data sets ("cifar10_1"), patterns ("cifar10_corrupted/*") and
        files (images.npz with `images` and `labels`); their classes and image shape must be the model's.
      data_directory: where TFDS keeps its data sets; by default where the run's configuration says.
      examples: with `data`, only this many images of each, the first; their record is called NAME[:EXAMPLES].
      devices: devices that share each batch; all by default. Of each process, those of its own.
      say: is given one line per attack (with `data`, per data set), and the progress of cascades.

    Returns:
      The record of the run's own data, as it stands in evaluation.json; with `data`, name -> record.

    Raises:
      InputError: an unknown attack or split; a run, checkpoint, data set or teacher that is missing or does not fit.
    """
    workdir = pathlib.Path(workdir)
    if attacks is None:
        attacks = other_data.ATTACKS if data else ATTACKS
    with processes.together():
        chosen = robustness.protocols(attacks)
        if curve != "none":
            robustness.protocols(curve)
        if split not in ("test", "validation"):
            raise InputError(f'split is "{split}"; use "test" or "validation"')
        other_data.check_options(data, split=split, teacher=teacher, examples=examples)
        mesh = shares.local_mesh(parallel.data_mesh(devices))
        subject = Subject.open(workdir, step)
    if data_directory:
        section = dataclasses.replace(subject.config.data, directory=str(data_directory))
        subject = dataclasses.replace(subject, config=dataclasses.replace(subject.config, data=section))
    shared = {"mesh": mesh, "seed": seed, "batch_size": batch_size}

    def tell(line):
        if processes.is_main():
            say(f"{workdir}: {line}")

    if data:
        found = other_data.evaluate(subject, chosen, data, examples, **shared, say=tell)
    else:
        found = _evaluate_own(subject, chosen, split, teacher, curve, shared, tell)
    return processes.from_main(lambda: found)  # and nobody leaves before the files are written


def _evaluate_own(subject: Subject, chosen, split, teacher, curve, shared, tell) -> dict[str, Any]:
    """Evaluates on the run's own data, see `evaluate`."""
    workdir, config, model, variables = subject.workdir, subject.config, subject.model, subject.variables
    imported, threat = subject.origin["imported"], subject.threat
    with processes.together():
        source, train_examples = _open_own(subject, split)
    aligned = _open_teacher(subject, teacher, tell)  # before the attacks: a missing one should not cost them
    found = subject.record({
        "name": source.name.split("/")[0], "split": split, "examples": len(source),
        "train_examples": None if imported else train_examples,
        # What chose the best checkpoint; of imported weights nobody here knows.
        "selection": None if imported else config.data.selection}, shared["seed"])
    path = workdir / "evaluation.json"
    record.keep_earlier(found, processes.from_main(lambda: record.read(path)))

    results = {}
    for name, result in subject.attacked(
            source, chosen, found, data=split, keep_images_of=_GALLERY_ATTACK, **shared, say=tell):
        results[name] = result
        tell(f"{name} {result.accuracy:.1%} of {len(source)} {split} images ({result.seconds:.1f} s)")
        record.write(path, found)
    measured = measures.around_images(
        model, variables, source, threat, teacher=aligned[1:3] if aligned else None,
        adversarial=results[_GALLERY_ATTACK].images if _GALLERY_ATTACK in results else None, **shared)
    compared = {"teacher": aligned[0], "teacher_step": aligned[3]} if aligned else None
    found["alignment"] = measures.alignment_record(measured, found.get("alignment", {}), compared)
    found["classes"] = measures.classes_record(measured, results, source, found.get("classes", {}))
    if curve in results:
        radii = [part * threat.epsilon for part in _CURVE if threat.norm != "linf" or part * threat.epsilon <= 1]
        known = {threat.epsilon: results[curve].accuracy}
        found["robustness_curve"] = robustness.robustness_curve(
            model, variables, source, threat, radii, name=curve, known=known, **shared,
            resume=subject.directory(curve, split, shared["seed"]), say=tell)
    if cost := _cost_of_training(workdir, config.training.batch_size):
        found["training"] = cost
    _write_gallery(workdir, model, variables, source, threat, results.get(_GALLERY_ATTACK), shared)
    record.write(path, found)
    return found


def _open_own(subject: Subject, split: str) -> tuple[Source, int]:
    """Returns the images of a split of the run's own data, and how many it trains on."""
    workdir, config, model, imported = subject.workdir, subject.config, subject.model, subject.origin["imported"]
    if imported and not (config.data.name or config.data.arrays):
        raise InputError(f"{workdir}: nothing says which images its weights are of; name test images here with --data, or "
                         "import them again with --data")
    if split == "validation" and config.data.selection != "validation":
        raise InputError(f'split is "validation", but the run held no images out (its data.selection is '
                         f'"{config.data.selection}"); use "test"')
    dataset, train_source = open_own_data(config)
    source: Source = getattr(dataset, split)
    if (source.classes, source.image_shape) != (model.classes, model.image_shape):
        raise InputError(
            f"{workdir}: its model takes images {model.image_shape} of {model.classes} classes, {source.name} has "
            f"{source.image_shape} of {source.classes}; evaluate it on the data it was trained on")
    return source, len(train_source)


def _open_teacher(subject: Subject, teacher: str, tell) -> tuple[str, models.Model, dict, int] | None:
    """Returns (directory, model, variables, step) of what to measure the gradient alignment with; None where there is none."""
    config, origin, workdir = subject.config, subject.origin, subject.workdir
    own_teacher = not teacher and bool(config.teacher)
    teacher = teacher or config.teacher
    # The teacher itself may be listed among its students.
    if not teacher or pathlib.Path(teacher).resolve() == workdir.resolve():
        return None
    began_with = origin["teacher_step"] if own_teacher else None
    try:
        with processes.together():  # all compare gradients, or none
            model, variables, found = checkpoint.restore_model(teacher, "last" if began_with is None else began_with)
            model = models.variant(model, dtype="float32")
            check_teacher(teacher, model, subject.model)
            if own_teacher and origin["teacher_file"] != checkpoint.file_of(found):
                raise InputError(f"{teacher} holds other weights now than those that this run was distilled from")
        return teacher, model, variables, found["step"]
    except InputError as error:
        if not own_teacher:
            raise type(error)(f"--teacher: {error}") from None
        tell(f"no gradient alignment: its teacher cannot be read ({error}); name one with --teacher")
        return None


def _cost_of_training(workdir, batch_size: int) -> dict[str, float]:
    """Returns "seconds_per_step", the median pace of training as its log has it, without compilation and validation, and
    "step_memory", the bytes that a step takes on each device (`jaxrd.performance.memory.planned`); of both what is known.
    """
    entries, cost = read_metrics(workdir / "metrics.jsonl"), {}
    if pace := [entry["images_per_second"] for entry in entries if is_number(entry.get("images_per_second"))]:
        cost["seconds_per_step"] = batch_size / float(np.median(pace))
    memory = record.read(workdir / "environment.json").get("step_memory")
    if isinstance(memory, dict) and is_number(memory.get("total")):
        cost["step_memory"] = memory["total"]
    return cost


def _write_gallery(workdir, model, variables, source, threat, result, shared) -> None:
    """Keeps one image per class (up to ten) with its adversarial twin and the predictions for both."""
    _, rows = np.unique(source.labels, return_index=True)
    rows = rows[:_GALLERY_IMAGES]
    picked = Source(source.images[rows], source.labels[rows], source.classes, source.name)
    images = robustness.float_images(picked.images)
    if result is None:
        result = robustness.run_attack(
            model, variables, picked, robustness.PROTOCOLS[_GALLERY_ATTACK], threat, **shared)
        adversarial = result.images
    else:
        adversarial = result.images[rows]
    if not processes.is_main():
        return
    (workdir / "evaluation").mkdir(exist_ok=True)
    np.savez_compressed(
        workdir / "evaluation" / "gallery.npz", images=images, adversarial=adversarial, labels=picked.labels,
        clean_prediction=robustness.predictions(model, variables, images),
        adversarial_prediction=robustness.predictions(model, variables, adversarial), attack=_GALLERY_ATTACK)
