"""The evaluation of one run directory: attacks, gradient alignment, a gallery, and evaluation.json, which holds them all."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import jaxrd
from jaxrd import models
from jaxrd.config import Config
from jaxrd.data.source import Source
from jaxrd.errors import InputError
from jaxrd.evaluation import robustness
from jaxrd.evaluation.plots import is_number
from jaxrd.models.batch_norm_sets import select_set
from jaxrd.training import checkpoint, parallel
from jaxrd.training.checks import check_teacher
from jaxrd.training.log import read_metrics, write_json
from jaxrd.training.loop import open_data

ATTACKS = "clean,fgsm,pgd20,cw30,autoattack"
_GALLERY_ATTACK = "pgd20"
_GALLERY_IMAGES = 10
_CURVE = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # in units of the run's epsilon


# Accelerators round the products of float32 convolutions by default, which masks gradients and moves predictions.
@jax.default_matmul_precision("highest")
def evaluate(
    workdir: str | pathlib.Path,
    attacks: str | list[str] = ATTACKS,
    *,
    step: str | int = "last",
    split: str = "test",
    teacher: str = "",
    seed: int = 0,
    batch_size: int = 256,
    curve: str = "pgd20",
    devices: list | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Evaluates a run's checkpoint, writes evaluation.json and evaluation/gallery.npz, and returns what the former holds.

    Networks compute in float32 here, whatever they were trained in. What an earlier call measured on the same checkpoint, data,
    threat model and seed with other attacks stays in the file. A cascade (autoattack, ...) records its finished batches in
    evaluation/NAME-SPLIT-stepSTEP-seedSEED, goes on from there when it was killed, and leaves its adversarial images there.

    Args:
      workdir: a run directory with a finished checkpoint.
      attacks: names in `robustness.PROTOCOLS` and `robustness.CASCADES`, comma-separated or a list.
      step: "last" (the papers' protocol), "best" by validation PGD accuracy, or a step's number.
      split: "test", or "validation" while choosing anything.
      teacher: run directory to measure the gradient alignment with; by default the run's own teacher, if it has one.
      seed: of the random starts.
      batch_size: images per batch, at most.
      curve: the attack whose accuracy is measured at several radii, if it is among `attacks`; "none" for no curve.
      devices: devices that share each batch; all by default.
      say: is given one line per attack, and the progress of cascades.

    Raises:
      InputError: an unknown attack or split; a run, checkpoint, data set or teacher that is missing or does not fit.
    """
    workdir = pathlib.Path(workdir)
    chosen = robustness.protocols(attacks)
    if curve != "none":
        robustness.protocols(curve)
    if split not in ("test", "validation"):
        raise InputError(f'split is "{split}"; use "test" or "validation"')
    parallel.check_one_process()
    mesh = parallel.data_mesh(devices)
    model, variables, origin = checkpoint.restore_model(workdir, step)
    model = models.create(**model.specification | {"dtype": "float32"})
    config = Config.from_dict(origin["config"])
    if origin["imported"] and not (config.data.name or config.data.arrays):
        raise InputError(f"{workdir}: nothing says which images its weights are of; import them again with --data")
    dataset, train_source = open_data(config)
    source: Source = getattr(dataset, split)
    if (source.classes, source.image_shape) != (model.classes, model.image_shape):
        raise InputError(
            f"{workdir}: its model takes images {model.image_shape} of {model.classes} classes, {source.name} has "
            f"{source.image_shape} of {source.classes}; evaluate it on the data it was trained on")
    own_teacher = not teacher and bool(config.teacher)
    teacher = teacher or config.teacher
    if teacher and pathlib.Path(teacher).resolve() == workdir.resolve():
        teacher = ""  # the teacher itself, listed among its students
    if teacher:  # before the attacks: a missing one should not cost them
        began_with = origin["teacher_step"] if own_teacher else None
        try:
            teacher_model, teacher_variables, teacher_origin = checkpoint.restore_model(
                teacher, "last" if began_with is None else began_with)
            teacher_model = models.create(**teacher_model.specification | {"dtype": "float32"})
            check_teacher(teacher, teacher_model, model)
            if own_teacher and origin["teacher_file"] != checkpoint.file_of(teacher_origin):
                raise InputError(f"{teacher} holds other weights now than those that this run was distilled from")
        except InputError as error:
            if not own_teacher:
                raise InputError(f"--teacher: {error}") from None
            say(f"{workdir}: no gradient alignment: its teacher cannot be read ({error}); name one with --teacher")
            teacher = ""
    threat = config.threat.build()
    shared = {"mesh": mesh, "seed": seed, "batch_size": batch_size}

    def directory_of(name):
        return workdir / "evaluation" / f"{name}-{split}-step{origin['step']}-seed{seed}"

    def tell(line):
        say(f"{workdir}: {line}")

    record = {
        "jaxrd": jaxrd.__version__,
        "run": {
            "workdir": str(workdir), "student": config.student,
            "method": origin["imported"]["name"] if origin["imported"] else config.build_method().name,
            "parameters": models.parameter_count(select_set(variables, 0, model.batch_norm_sets)),
            "teacher": config.teacher, "seed": config.seed,
            "step": origin["step"], "checkpoint": str(step), "weights": origin["weights"], "dtype": "float32"},
        "data": {"name": source.name.split("/")[0], "split": split, "examples": len(source),
                 "train_examples": None if origin["imported"] else len(train_source)},
        "threat": {"norm": threat.norm, "epsilon": threat.epsilon, "bounds": list(threat.bounds)},
        "seed": seed, "accuracy": {}, "attacks": {}, "seconds": {}, "cascades": {},
    }
    _keep_earlier(workdir / "evaluation.json", record)

    results = {}
    for name, protocol in chosen.items():
        directory = directory_of(name)
        cascade = isinstance(protocol, robustness.Cascade)
        result = robustness.run_attack(
            model, variables, source, protocol, threat, **shared, keep_images=name == _GALLERY_ATTACK,
            resume=directory if cascade else None, say=tell)
        results[name] = dataclasses.replace(result, cascade=None)
        record["accuracy"][name], record["seconds"][name] = result.accuracy, round(result.seconds, 3)
        record["attacks"][name] = protocol.definition(threat.epsilon)
        if cascade:
            result.cascade.save(directory / "result.npz")
            record["cascades"][name] = _stages(result.cascade) | {"file": str((directory / "result.npz").relative_to(workdir))}
            tell(f"{name}, stage by stage: " + ", ".join(
                f"{stage} {accuracy:.1%}" for stage, accuracy in result.cascade.per_attack_accuracy.items()))
        tell(f"{name} {result.accuracy:.1%} of {len(source)} {split} images ({result.seconds:.1f} s)")
        write_json(workdir / "evaluation.json", record)
    if teacher:
        record["alignment"] = robustness.gradient_alignment(
            model, variables, teacher_model, teacher_variables, source, mesh=mesh, batch_size=batch_size)
        record["alignment"] |= {"teacher": teacher, "teacher_step": teacher_origin["step"]}
    if curve in results:
        radii = [part * threat.epsilon for part in _CURVE if threat.norm != "linf" or part * threat.epsilon <= 1]
        known = {threat.epsilon: results[curve].accuracy}
        record["robustness_curve"] = robustness.robustness_curve(
            model, variables, source, threat, radii, name=curve, known=known, **shared,
            resume=directory_of(curve), say=tell)
    if seconds := _seconds_per_step(workdir, config.training.batch_size):
        record["training"] = {"seconds_per_step": seconds}
    _write_gallery(workdir, model, variables, source, threat, results.get(_GALLERY_ATTACK), shared)
    write_json(workdir / "evaluation.json", record)
    return record


def _keep_earlier(path, record) -> None:
    """Takes over what an evaluation of the same model on the same terms measured; a file that cannot be read has nothing."""
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if all(earlier.get(name) == record[name] for name in ("jaxrd", "run", "data", "threat", "seed")):
            for name in ("accuracy", "attacks", "seconds", "cascades"):
                record[name] |= earlier[name]
            record |= {name: earlier[name] for name in ("alignment", "robustness_curve") if name in earlier}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass


def _stages(found) -> dict[str, Any]:
    """What a cascade came to, stage by stage, for the result file."""
    return {
        "stages": found.per_attack_accuracy, "rescored_accuracy": found.rescored_accuracy, "flags": found.flags,
        "passes": {name: list(pair) for name, pair in found.passes.items()}, "zero_gradients": found.zero_gradients,
        "seconds": found.seconds}


def _seconds_per_step(workdir, batch_size: int) -> float | None:
    """The median pace of training, as its log has it: without compilation and validation."""
    entries = read_metrics(workdir / "metrics.jsonl")
    pace = [entry["images_per_second"] for entry in entries if is_number(entry.get("images_per_second"))]
    return batch_size / float(np.median(pace)) if pace else None


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
    (workdir / "evaluation").mkdir(exist_ok=True)
    np.savez_compressed(
        workdir / "evaluation" / "gallery.npz", images=images, adversarial=adversarial, labels=picked.labels,
        clean_prediction=robustness.predictions(model, variables, images),
        adversarial_prediction=robustness.predictions(model, variables, adversarial), attack=_GALLERY_ATTACK)
