"""Validation during training: what chooses the best checkpoint, and how close the student is to its teacher."""

import dataclasses

import jax

from jaxrd import models
from jaxrd.evaluation import robustness

ATTACK = "pgd10"
PROBE = 128  # images whose input gradients are compared with the teacher's


@jax.default_matmul_precision("highest")
def validate(model, variables, source, threat, mesh, *, teacher=None, teacher_variables=None) -> dict[str, float]:
    """Returns the clean and PGD-10 accuracy on the validation split, the one that chooses the best checkpoint.

    With a teacher also its accuracy on the same clean and adversarial images, and the mean cosine between the input gradients
    of both on the first images. Whatever the run computes in, this is in float32, products too, as evaluations are.
    """
    model = models.variant(model, dtype="float32")
    teacher = teacher and models.variant(teacher, dtype="float32")

    def measured(protocol, **options):
        return robustness.run_attack(model, variables, source, robustness.PROTOCOLS[protocol], threat, mesh=mesh, **options)

    clean = measured("clean", keep_images=False)
    attacked = measured(ATTACK, keep_images=teacher is not None)
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
