"""Terms that several methods share, with the formula of each from `jaxrd.objectives`."""

import jax

from jaxrd import objectives
from jaxrd.distillation.composition import Loss, Term

REDUCTIONS = ("batchmean", "mean")


def weighted(*terms: Term) -> tuple[Term, ...]:
    """Returns the terms whose weight is not 0: what the others read need not be forwarded."""
    return tuple(term for term in terms if term.weight != 0)


def cross_entropy(view: str, weight: float = 1.0) -> Term:
    """weight * CE(S(view), y)."""
    return Term(
        "cross_entropy", lambda student, teacher, labels: objectives.cross_entropy(student[view], labels), student=(view,),
        weight=weight)


def distillation(
    teacher_view: str, student_view: str, name: str = "distillation", weight: float = 1.0, temperature: float = 1.0,
    reduction: str = "batchmean",
) -> Term:
    """weight * tau^2 KL_tau(T(teacher view) || S(student view)), divided by the number of classes for "mean"."""
    def loss(student, teacher, labels):
        logits = student[student_view]
        divergence = temperature**2 * objectives.kl_divergence(teacher[teacher_view], logits, temperature)
        return divergence / logits.shape[-1] if reduction == "mean" else divergence

    return Term(name, loss, student=(student_view,), teacher=(teacher_view,), weight=weight)


def self_distillation(detach: bool = False) -> Loss:
    """KL(S(x) || S(x'))."""
    def loss(student, teacher, labels):
        target = jax.lax.stop_gradient(student["clean"]) if detach else student["clean"]
        return objectives.kl_divergence(target, student["adversarial"])

    return loss
