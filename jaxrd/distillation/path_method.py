"""The path method: its attack's points, what aligns student and teacher along them, and every option the sources leave open.

Its formulas are a reconstruction; they and their sources are in `adversarial_path`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxrd.distillation import adversarial_path
from jaxrd.distillation.composition import Method, Term
from jaxrd.distillation.inner_maximisation import path_attack
from jaxrd.distillation.terms import distillation
from jaxrd.distillation.views import CLEAN, NEGATIVE, View, generated
from jaxrd.errors import InputError, choose, need


def path(
    alpha: float = 1.0,
    gamma: float = 1.0,
    points: int = 10,
    weights: str = "drop",
    weight_model: str = "student",
    normalisation: str = "per_sample",
    floor: float = 0.0,
    scale: float = 1.0,
    inner_loss: str = "cross_entropy",
    targeted_start: str = "negative_image",
    target_class: str = "uniform",
    align_target: str = "teacher_clean",
    align_distance: str = "kl",
    dual_batch_norm: bool = True,
    batching: str = "joint",
    statistics: bool = False,
    natural: str = "anchor",
    hinge: float = 0.0,
    negatives: str = "data",
) -> Method:
    """Distillation along an untargeted and a targeted adversarial path (Dong et al., CVPR 2024).

    alpha (L_u + gamma L_d) + (1 - alpha) KL(T(x) || S(x)), where L_u is the weighted sum over t of D(T(x) || S(x_t)) along
    the ascent path of x away from its class, and L_d the same, D(T(v) || S(v_t)), along the descent path of v, a negative
    image of another class for x, towards the class of its anchor x, with the student's second BatchNorm set.

    **A reconstruction**, from the abstract and later work of the same group: neither the paper's equations nor its code were
    available. Where the sources leave a choice open, the first value named below is the default.

    Args:
      alpha: weight of the paths against the clean distillation, in (0, 1].
      gamma: weight of the targeted path, 0 or above; 0 leaves it out.
      points: how many points of each path, evenly spaced, the last included; at most the attack's steps.
      weights: "drop", "uniform", "linear", "last_only", "boundary", "gap": see `adversarial_path.path_weights`.
      weight_model: whose predictions "drop" and "boundary" look at: "student" or "teacher".
      normalisation: "per_sample", "batch" or "none": see `adversarial_path.weighted_path_loss`.
      floor: the least weight, in [0, 1].
      scale: of "boundary" and "gap", above 0.
      inner_loss: what the untargeted path climbs: "cross_entropy", "teacher_clean" (KL to T(x)) or "teacher_moving" (KL to
        T(x'), AdaAD's). The targeted path descends the cross-entropy of its target class, or, with "teacher_clean" and
        negative images of uniform classes, the KL to T(anchor).
      targeted_start: "negative_image" (the target is the class of its anchor, an image of the batch), "anchor_image" (any
        other class) or "anchor_runner_up" (the class that the student finds second best).
      target_class: "uniform", or the best other class by the "teacher" or the "student" (with the targeted branch's BatchNorm
        set), or the "least_likely" by the teacher.
      align_target: "teacher_clean" for T(x), "teacher_at_point" for T(x_t).
      align_distance: "kl", "squared_error" of the probabilities, "js", "l2".
      dual_batch_norm: a BatchNorm set for each branch; set 0, of the untargeted one, is used at test.
      batching: "joint" forwards the intermediate points of a branch as one batch with common statistics, "separate" one by
        one. Clean images and last points are always forwarded by themselves.
      statistics: intermediate points move the running statistics, as clean images and last points do.
      natural: what 1 - alpha weighs: KL(T(x) || S(x)) for the "anchor", in set 0, or for "both" branches' starts.
      hinge: count an alignment only above that of (1 - hinge, hinge/(C-1), ...) with the one-hot label; 0: always.
      negatives: where negative images of uniform classes come from. "data": every image of the batch, as an anchor, is given
        one, its class uniform over the others of the data and the image uniform in that class, as in the data sets published
        by the group; the teacher is asked about it too. "batch": every image of the batch is v itself, of an anchor of another
        class in the batch. Nothing to choose where gamma is 0, the path starts at anchors, or a network chooses the class: no
        image is then another's anchor, and the targeted path too starts at the images of the batch.
    """
    _check(**locals())  # the arguments, and nothing else yet
    looks = weights in ("drop", "boundary")
    by_student, by_teacher = (looks and weight_model == model for model in ("student", "teacher"))
    runner_up = targeted_start == "anchor_runner_up"
    chosen_by = "student" if runner_up else target_class
    attack = path_attack(
        inner_loss=inner_loss, points=points, targeted=gamma > 0,
        targeted_start="anchor_image" if runner_up else targeted_start, target_class=chosen_by, negatives=negatives)
    second = int(dual_batch_norm)

    def branch(names, start):
        together = f"{names[-1]}/joint" if batching == "joint" else None
        shared = {"batch_norm_set": start.batch_norm_set, "labels": start.labels}
        between = [generated(name, updates_statistics=statistics, together=together, **shared) for name in names[:-1]]
        # The start last, as RSLAD forwards x' before x: the running statistics remember the order.
        return (*between, generated(names[-1], **shared), start)

    def aligned(names, start, origin):
        """The weighted alignment along one branch, from the view `start` of the student and `origin` of the teacher."""
        if weights == "last_only":
            names = names[-1:]  # the others' weight is 0: they are not forwarded
        at_point = align_target == "teacher_at_point"
        student_views = (*([start.name] if by_student else []), *names)
        teacher_views = (*([] if at_point and not by_teacher else [origin]), *(names if at_point or by_teacher else []))
        distance = adversarial_path.ALIGNMENTS[align_distance]

        def loss(student, teacher, labels):
            logits = jnp.stack([student[name] for name in names])
            target = jnp.stack([teacher[name if at_point else origin] for name in names])
            looked_at = jnp.stack([teacher[name] for name in names]) if by_teacher else logits
            # The schemes that look at nobody take anything of that shape.
            looked_at_start = teacher[origin] if by_teacher else student[start.name] if by_student else logits[0]
            weight = adversarial_path.path_weights(
                looked_at_start, looked_at, labels, weights, teacher_logits=target, scale=scale, floor=floor)
            result = adversarial_path.weighted_path_loss(weight, jax.vmap(distance)(target, logits), normalisation, points)
            if hinge:
                result = adversarial_path.hinge(
                    result, adversarial_path.hinge_bound(hinge, logits.shape[-1], align_distance))
            return result

        return {"loss": loss, "student": student_views, "teacher": teacher_views, "hard_labels": looks, "labels": start.labels}

    untargeted = (*(f"path/{number}" for number in range(1, points)), "adversarial")
    views = branch(untargeted, CLEAN)
    terms = [Term("path_untargeted", weight=alpha, **aligned(untargeted, CLEAN, "clean"))]
    if gamma > 0:
        targeted = tuple(f"targeted/{number}" for number in range(1, points + 1))
        if attack.negatives:
            start, origin = dataclasses.replace(NEGATIVE, batch_norm_set=second), "negative"
        else:
            # The images of the batch, which the student sees through another set; with one set the clean view itself.
            start, origin = View("clean/targeted", CLEAN.points, batch_norm_set=1) if dual_batch_norm else CLEAN, "clean"
        views += tuple(view for view in branch(targeted, start) if view is not CLEAN)
        terms.append(Term("path_targeted", weight=alpha * gamma, **aligned(targeted, start, origin)))
    if alpha < 1:
        terms.append(distillation("clean", "clean", name="distillation_clean", weight=1 - alpha))
        if natural == "both":
            terms.append(distillation(origin, start.name, name="distillation_clean_targeted", weight=1 - alpha))
    return Method("path", attack, views, tuple(terms))


def _check(
    alpha, gamma, points, weights, weight_model, normalisation, floor, scale, inner_loss, targeted_start, target_class,
    align_target, align_distance, dual_batch_norm, batching, statistics, natural, hinge, negatives,
) -> None:
    """Raises InputError for an option of `path` out of range, or two that contradict each other."""
    need(0 < alpha <= 1, "method.path_alpha", alpha, "in (0, 1]")
    need(gamma >= 0, "method.path_gamma", gamma, "0 or above")
    need(points >= 1, "method.path_points", points, "1 or above")
    need(0 <= floor <= 1, "method.path_floor", floor, "in [0, 1]")
    need(scale > 0, "method.path_scale", scale, "above 0")
    need(0 <= hinge < 1, "method.path_hinge", hinge, "in [0, 1)")
    for field, value, known in (
            ("weights", weights, adversarial_path.SCHEMES), ("weight_model", weight_model, ("student", "teacher")),
            ("normalisation", normalisation, adversarial_path.NORMALISATIONS),
            ("inner_loss", inner_loss, ("cross_entropy", "teacher_clean", "teacher_moving")),
            ("targeted_start", targeted_start, ("negative_image", "anchor_image", "anchor_runner_up")),
            ("target_class", target_class, ("uniform", "teacher", "student", "least_likely")),
            ("align_target", align_target, ("teacher_clean", "teacher_at_point")),
            ("align_distance", align_distance, adversarial_path.ALIGNMENTS), ("batching", batching, ("joint", "separate")),
            ("natural", natural, ("anchor", "both")), ("negatives", negatives, ("data", "batch"))):
        choose(f"method.path_{field}", value, known)
    looks = weights in ("drop", "boundary")
    for wrong, message in (
            (weight_model == "teacher" and not looks,
             f'path_weights "{weights}" do not look at one model\'s predictions; leave path_weight_model at "student"'),
            (floor > 0 and weights == "last_only", 'path_weights "last_only" with path_floor above 0 is "uniform" in disguise; '
             'leave path_floor at 0, or choose path_weights=uniform'),
            (targeted_start == "anchor_runner_up" and target_class != "uniform",
             f'path_targeted_start "anchor_runner_up" chooses the class itself; leave path_target_class at "uniform", not '
             f'"{target_class}"'),
            (scale != 1 and weights not in ("boundary", "gap"),
             f'path_scale is for the weights "boundary" and "gap", not "{weights}"; leave it at 1'),
            (floor == 1, 'path_floor of 1 makes all weights 1; choose path_weights=uniform'),
            (gamma == 0 and targeted_start != "negative_image",
             f'path_gamma is 0, so there is no targeted path to start at "{targeted_start}"; raise it'),
            (gamma == 0 and target_class != "uniform",
             f'path_gamma is 0, so there is no target class for "{target_class}" to choose; raise it'),
            (natural == "both" and (gamma == 0 or alpha == 1),
             'path_natural "both" weighs 1 - path_alpha in each branch; it needs path_alpha below 1 and path_gamma above 0')):
        if wrong:
            raise InputError(f"method.{message}")
