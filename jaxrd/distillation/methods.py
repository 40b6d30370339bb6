"""The methods: each is an attack and a few terms. Their formulas are pure functions elsewhere; here they are put together.

    base:    pgd_at, trades, mart (without a teacher); ard, iad, akd, rslad, adaad, adaiad; dgad; path (in `path_method`)
    module:  in `modules`, on top of any of them

S and T are student and teacher, x the clean image, x' the adversarial one, y the label, and KL(a || b) the divergence of the
softmax of b from that of a, summed over classes. Every loss is a batch mean.
"""

import jax
import jax.numpy as jnp

from jaxrd import objectives
from jaxrd.distillation import dynamic_guidance, introspection
from jaxrd.distillation.composition import Method, Monitor, Term
from jaxrd.distillation.inner_maximisation import (
    cross_entropy_attack, teacher_fixed_attack, teacher_moving_attack, trades_attack)
from jaxrd.distillation.terms import REDUCTIONS, cross_entropy, distillation, self_distillation, weighted
from jaxrd.distillation.views import ADVERSARIAL, CLEAN
from jaxrd.errors import choose, need

Array = jax.Array

_CORRECTIONS = {
    "swap": dynamic_guidance.swap_labels, "smooth": dynamic_guidance.smooth_labels, "mix": dynamic_guidance.mix_labels,
    "none": lambda teacher_logits, labels: teacher_logits}


# Without a teacher.


def pgd_at() -> Method:
    """Adversarial training: CE(S(x'), y) (Madry et al. 2018)."""
    return Method("pgd_at", cross_entropy_attack(), (ADVERSARIAL,), (cross_entropy("adversarial"),))


def trades(beta: float = 6.0, detach: bool = False) -> Method:
    """CE(S(x), y) + beta KL(S(x) || S(x')) (TRADES, Zhang et al. 2019).

    Args:
      beta: weight of the divergence, 0 or above.
      detach: no gradient into S(x) as its target; it flows in the published code.
    """
    need(beta >= 0, "method.trades_beta", beta, "0 or above")
    return Method("trades", trades_attack(), (CLEAN, ADVERSARIAL), weighted(
        cross_entropy("clean"), Term("self_distillation", self_distillation(detach), ("clean", "adversarial"), weight=beta)))


def mart(beta: float = 5.0) -> Method:
    """BCE(S(x'), y) + beta (1 - p_S(x)[y]) KL(S(x) || S(x')) (MART, Wang et al. 2020).

    BCE is `objectives.boosted_cross_entropy`. Without the 1e-12 and 1e-7 that the published code adds here and there.

    Args:
      beta: 5 for ResNets, 6 for wide ones in the published code; 0 or above.
    """
    need(beta >= 0, "method.mart_beta", beta, "0 or above")

    def doubtful(student, teacher, labels):
        doubt = 1 - jnp.exp(-objectives.cross_entropy(student["clean"], labels))
        return doubt * objectives.kl_divergence(student["clean"], student["adversarial"])

    return Method("mart", cross_entropy_attack("gaussian"), (CLEAN, ADVERSARIAL), weighted(
        Term("boosted_cross_entropy",
             lambda student, teacher, labels: objectives.boosted_cross_entropy(student["adversarial"], labels),
             student=("adversarial",), hard_labels=True),
        Term("self_distillation", doubtful, student=("clean", "adversarial"), weight=beta, hard_labels=True)))


# With a teacher whose output on the clean image is the target, or part of it.


def ard(temperature: float = 1.0, alpha: float = 1.0, reduction: str = "batchmean") -> Method:
    """alpha tau^2 KL_tau(T(x) || S(x')) + (1 - alpha) CE(S(x), y) (ARD, Goldblum et al. 2020).

    The defaults are how the IGDM authors run it. The original has temperature 30 and reduction "mean".

    Args:
      temperature: tau, above 0.
      alpha: in [0, 1].
      reduction: "batchmean", or "mean" to divide the divergence by the number of classes too.
    """
    need(temperature > 0, "method.ard_temperature", temperature, "above 0")
    need(0 <= alpha <= 1, "method.ard_alpha", alpha, "in [0, 1]")
    choose("method.ard_reduction", reduction, REDUCTIONS)
    return Method("ard", cross_entropy_attack(), (ADVERSARIAL, CLEAN), weighted(
        distillation("clean", "adversarial", weight=alpha, temperature=temperature, reduction=reduction),
        cross_entropy("clean", 1 - alpha)))


def iad(
    temperature: float = 1.0, alpha: float = 1.0, beta: float = 0.1, warmup: float = 0.3, weighting: str = "self",
) -> Method:
    """Introspective distillation on ARD, IAD-I (Zhu et al. 2022).

    alpha [tau^2 KL_tau(T(x) || S(x')) + (1 - A) KL(S(x) || S(x'))] + (1 - alpha) CE(S(x), y), with the reliability
    A = p_T(x')[y]^beta after the warm-up and 1 before. The gradient flows into the target S(x) too, as published.

    Args:
      temperature: tau, above 0.
      alpha: in [0, 1].
      beta: 0 or above.
      warmup: fraction of training with A = 1 (published: 60 of 200 epochs), in [0, 1).
      weighting: "self", as published code: A weighs the student's own target only; "both": the teacher's term gets A too.
    """
    return _introspective("iad", cross_entropy_attack(), "clean", temperature, alpha, beta, warmup, weighting)


def akd(weight: float = 0.5, target: str = "adversarial") -> Method:
    """(1 - weight) CE(S(x'), y) + weight KL(T(x') || S(x')) (AKD, Maroto et al. 2022).

    A reconstruction: the abstract says "a mixture of the original labels and the teacher outputs"; neither the weight nor
    the image on which the teacher is asked were found in a published source.

    Args:
      weight: in [0, 1].
      target: the view on which the teacher is asked, "adversarial" or "clean".
    """
    need(0 <= weight <= 1, "method.akd_weight", weight, "in [0, 1]")
    choose("method.akd_target", target, ("adversarial", "clean"))
    return Method("akd", cross_entropy_attack(), (ADVERSARIAL, CLEAN), weighted(
        distillation(target, "adversarial", weight=weight), cross_entropy("adversarial", 1 - weight)))


def rslad(scale: float = 0.1) -> Method:
    """Robust soft-label distillation: scale * [5/6 KL(T(x) || S(x')) + 1/6 KL(T(x) || S(x))] (RSLAD, Zi et al. 2021).

    Without the 1e-5 that the published code adds inside the logarithm.

    Args:
      scale: 0.1 is what the published mean over batch and classes (times 10 on CIFAR-100) amounts to; 1 is the batch mean
        that the other methods use. Above 0.
    """
    need(scale > 0, "method.rslad_scale", scale, "above 0")
    return Method("rslad", teacher_fixed_attack(), (ADVERSARIAL, CLEAN), (
        distillation("clean", "adversarial", name="distillation_adversarial", weight=scale * 5 / 6),
        distillation("clean", "clean", name="distillation_clean", weight=scale / 6),
    ))


# With a teacher that is asked about the adversarial image, in the attack too.


def adaad(weight: float = 1.0, reduction: str = "batchmean") -> Method:
    """weight KL(T(x') || S(x')) + (1 - weight) KL(T(x) || S(x)) (AdaAD, Huang et al. 2023).

    Args:
      weight: lambda, in [0, 1].
      reduction: "batchmean", or "mean" to divide by the number of classes too, as the published code does on CIFAR-10.
    """
    need(0 <= weight <= 1, "method.adaad_weight", weight, "in [0, 1]")
    choose("method.adaad_reduction", reduction, REDUCTIONS)
    return Method("adaad", teacher_moving_attack(), (CLEAN, ADVERSARIAL), weighted(
        distillation("adversarial", "adversarial", name="distillation_adversarial", weight=weight, reduction=reduction),
        distillation("clean", "clean", name="distillation_clean", weight=1 - weight, reduction=reduction)))


def adaiad(
    temperature: float = 1.0, alpha: float = 1.0, beta: float = 0.1, warmup: float = 0.3, weighting: str = "self",
) -> Method:
    """Introspection on AdaAD's attack: the loss of `iad` with T(x') in place of T(x) (AdaIAD, Huang et al. 2023).

    Args: as for `iad`; the published code has temperature 30.
    """
    return _introspective("adaiad", teacher_moving_attack(), "adversarial", temperature, alpha, beta, warmup, weighting)


def dgad(
    beta: float = 1.0, consistency: str = "mse", correction: str = "swap", attack: str = "adaad", scale: float = 1.0,
    product: bool = False, partition: bool = True,
) -> Method:
    """Dynamic guidance (DGAD, Park & Min 2024): KL on x where the teacher is wrong about x, on x' elsewhere, plus PCR.

    scale * [KL(T^(x) || S(x)) where T(x) is wrong, else KL(T^(x') || S(x'))] + beta PCR(S(x), S(x')), with T^ the teacher's
    output after error-corrective label swapping. Per example, which for a full batch equals the published form and stays
    finite where the teacher gets the whole batch wrong. The attack climbs the teacher's output as it is.

    Args:
      beta: weight of predictive consistency, 0 or above.
      consistency: "mse" of the probabilities, as published code, or their "l2" distance, as the paper writes.
      correction: "swap" (ELS); controls: "smooth", "mix" (see `dynamic_guidance`), "none".
      attack: "adaad", or "rslad": its attack, and T(x) as the target of x' (`method.attack` changes the attack alone).
      scale: of the distillation part (0.5 in the published code for MobileNetV2), above 0.
      product: reproduce that code's misplaced parenthesis for MobileNetV2, which multiplies the two parts:
        scale * (L_ST + share of x') * L_AT, with L_ST the sum of the clean part over the batch size, and L_AT the mean over
        the images that are distilled adversarially.
      partition: misclassification-aware partitioning (MAP); without it, to ablate it, all images are distilled on x', those
        of a wrong teacher too.
    """
    need(beta >= 0, "method.dgad_beta", beta, "0 or above")
    need(scale > 0, "method.dgad_scale", scale, "above 0")
    choose("method.dgad_consistency", consistency, ("mse", "l2"))
    choose("method.dgad_correction", correction, _CORRECTIONS)
    choose("method.dgad_attack", attack, ("adaad", "rslad"))
    correct, target = _CORRECTIONS[correction], "adversarial" if attack == "adaad" else "clean"

    def wrong(teacher, labels):
        return partition & dynamic_guidance.misclassified(teacher["clean"], labels)

    def divergence(student, teacher, labels, view, target):
        return objectives.kl_divergence(correct(teacher[target], labels), student[view])

    def on_clean(student, teacher, labels):
        return jnp.where(wrong(teacher, labels), divergence(student, teacher, labels, "clean", "clean"), 0.0)

    def on_adversarial(student, teacher, labels):
        right = ~wrong(teacher, labels)
        return jnp.where(right, divergence(student, teacher, labels, "adversarial", target), 0.0)

    def multiplied(student, teacher, labels):
        right = jnp.mean(~wrong(teacher, labels))
        factor = jnp.mean(on_clean(student, teacher, labels)) + right
        return factor * on_adversarial(student, teacher, labels) / jnp.maximum(right, 1e-10)

    student, asked = ("clean", "adversarial"), ("clean", *(["adversarial"] if attack == "adaad" else []))
    pcr = dynamic_guidance.predictive_consistency if consistency == "mse" else objectives.l2_distance
    terms = (Term("distillation_product", multiplied, student, asked, weight=scale, hard_labels=True),) if product else (
        Term("distillation_clean", on_clean, ("clean",), ("clean",), weight=scale, hard_labels=True),
        Term("distillation_adversarial", on_adversarial, ("adversarial",), asked, weight=scale, hard_labels=True))
    consistency_term = Term(
        "consistency", lambda student, teacher, labels: pcr(student["adversarial"], student["clean"]), student, weight=beta)
    monitors = [Monitor("partitioned", lambda student, teacher, labels: wrong(teacher, labels), hard_labels=True)] * partition
    if correction != "none" and attack == "adaad":
        # Of the whole batch; what is partitioned off is distilled on the clean image and its swap counted there.
        monitors.append(Monitor("swapped/adversarial", lambda student, teacher, labels: (
            dynamic_guidance.misclassified(teacher["adversarial"], labels) & ~wrong(teacher, labels)), hard_labels=True))
    base = teacher_moving_attack() if attack == "adaad" else teacher_fixed_attack()
    return Method("dgad", base, (CLEAN, ADVERSARIAL), weighted(*terms, consistency_term), tuple(monitors))


def _introspective(name, attack, target, temperature, alpha, beta, warmup, weighting) -> Method:
    """IAD and AdaIAD: see `iad`; `target` is the view on which the teacher's distribution is matched."""
    need(temperature > 0, f"method.{name}_temperature", temperature, "above 0")
    need(0 < alpha <= 1, f"method.{name}_alpha", alpha, "in (0, 1]")
    need(beta >= 0, f"method.{name}_beta", beta, "0 or above")
    need(0 <= warmup < 1, f"method.{name}_warmup", warmup, "in [0, 1)")
    choose(f"method.{name}_weighting", weighting, ("self", "both"))
    from_teacher = distillation(target, "adversarial", weight=alpha, temperature=temperature)
    from_itself = self_distillation()

    def introspection_loss(student, teacher, labels):
        doubt = 1 - introspection.reliability(teacher["adversarial"], labels, beta)
        gained = from_itself(student, teacher, labels)
        # A KL_teacher + (1 - A) KL_self = KL_teacher + (1 - A) (KL_self - KL_teacher)
        lost = from_teacher.loss(student, teacher, labels) if weighting == "both" else 0.0
        return doubt * (gained - lost)

    own = Term(
        "introspection", introspection_loss, student=("clean", "adversarial"),
        teacher=tuple({target: None, "adversarial": None}), weight=alpha, ramp=lambda progress: 1.0 * (progress > warmup),
        hard_labels=True)
    reliable = Monitor("reliability", lambda student, teacher, labels: introspection.reliability(
        teacher["adversarial"], labels, beta), hard_labels=True)
    return Method(
        name, attack, (ADVERSARIAL, CLEAN), weighted(from_teacher, own, cross_entropy("clean", 1 - alpha)), (reliable,))
