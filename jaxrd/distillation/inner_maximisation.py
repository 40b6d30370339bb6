"""Inner maximisation: the attacks that methods train against, as functions of one batch and two networks.

Each recipe fixes an objective and a start. The budget (threat model, step length, steps) comes from the run. Student and
teacher are in eval mode; nothing an attack does moves BatchNorm's running statistics.

| recipe | maximised over x' | start | of |
|---|---|---|---|
| cross_entropy_attack | CE(S(x'), y) | uniform | PGD-AT, ARD, IAD, AKD; MART from a Gaussian one |
| trades_attack | KL(S(x), S(x')) | Gaussian | TRADES |
| teacher_fixed_attack | KL(T(x), S(x')) | Gaussian | RSLAD |
| teacher_moving_attack | KL(T(x'), S(x')), the gradient through both | Gaussian | AdaAD, AdaIAD, DGAD |
| path_attack | one of these along the whole path, and a targeted descent | Gaussian | path |
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrd import attacks, objectives
from jaxrd.attacks.pgd import Objective
from jaxrd.distillation import adversarial_path
from jaxrd.errors import InputError, choose, need
from jaxrd.threat import ThreatModel, derived

Array = jax.Array
LogitsFn = Callable[[Array], Array]  # images -> logits


@dataclasses.dataclass(frozen=True)
class InnerMaximisation:
    """The budget of the training attack.

    Attributes:
      threat: norm, radius and pixel bounds.
      step_size: length of a step, in pixel units (papers: 2/255).
      steps: number of steps (papers: 10).
      start: "uniform", "gaussian" or "none"; None leaves it to the method.
      project_start: put the start inside ball and bounds; without it, as in most published code, the first gradient is taken
        at x + noise, and only what follows is projected.
    """

    threat: ThreatModel
    step_size: float
    steps: int = 10
    start: str | None = None
    project_start: bool = True


@dataclasses.dataclass(frozen=True)
class Context:
    """What an attack may look at: one augmented batch, and the two networks in eval mode.

    Attributes:
      images: [batch, h, w, c] float32.
      labels: [batch] int32, or soft ones, [batch, classes] float32.
      student: images -> logits.
      teacher: images -> logits, differentiable with respect to the images; None without a teacher.
      teacher_clean: [batch, classes], the teacher's logits on `images`, where the attack asked for them.
      auxiliary: the student with its second set of BatchNorm, where a method has one; else None.
      negatives: [batch, h, w, c] float32, an image of another class for each, augmented too, where a method has them; else
        None.
      negative_labels: [batch] int32, their classes.
    """

    images: Array
    labels: Array
    student: LogitsFn
    teacher: LogitsFn | None = None
    teacher_clean: Array | None = None
    auxiliary: LogitsFn | None = None
    negatives: Array | None = None
    negative_labels: Array | None = None


@dataclasses.dataclass(frozen=True)
class Attack:
    """An inner maximisation that generates views.

    Attributes:
      generate: (key, context, budget) -> {view name: points [batch, h, w, c]}.
      teacher_on_clean: the attack reads `context.teacher_clean`, so the teacher sees the clean view before it.
      teacher: the attack needs a teacher at all.
      teacher_gradient: it climbs through the teacher, which then needs an input gradient.
      two_classes: a batch must hold images of two classes at least.
      negatives: the attack reads `context.negatives`.
      hard_labels: it is defined for one true class per image only.
    """

    generate: Callable[[Array, Context, InnerMaximisation], dict[str, Array]]
    teacher_on_clean: bool = False
    teacher: bool = False
    teacher_gradient: bool = False
    two_classes: bool = False
    negatives: bool = False
    hard_labels: bool = False


def pgd_attack(
    objective: Callable[[Context], Objective],
    start: str,
    *,
    teacher_on_clean: bool = False,
    teacher: bool = False,
    teacher_gradient: bool = False,
) -> Attack:
    """Returns the attack that climbs `objective(context)` by PGD and generates the view "adversarial"."""

    def generate(key, context, inner):
        return {"adversarial": attacks.pgd(key, objective(context), context.images, **_budget(inner, start))}

    teacher = teacher or teacher_on_clean or teacher_gradient
    return Attack(generate, teacher_on_clean=teacher_on_clean, teacher=teacher, teacher_gradient=teacher_gradient)


def cross_entropy_attack(start: str = "uniform") -> Attack:
    """max CE(S(x'), y) (Madry et al. 2018)."""
    return pgd_attack(_climbs_cross_entropy, start)


def trades_attack() -> Attack:
    """max KL(S(x) || S(x')), the clean output fixed (Zhang et al. 2019).

    The published code computes S(x) anew in every step, to the same numbers.
    """
    def objective(context):
        clean = jax.lax.stop_gradient(context.student(context.images))
        return lambda points: objectives.kl_divergence(clean, context.student(points))

    return pgd_attack(objective, "gaussian")


def teacher_fixed_attack() -> Attack:
    """max KL(T(x) || S(x')), the teacher's output fixed (RSLAD, Zi et al. 2021)."""
    return pgd_attack(_climbs_fixed_teacher, "gaussian", teacher_on_clean=True)


def teacher_moving_attack() -> Attack:
    """max KL(T(x') || S(x')), the gradient through both networks (AdaAD, Huang et al. 2023)."""
    return pgd_attack(_climbs_moving_teacher, "gaussian", teacher_gradient=True)


def path_attack(
    *, inner_loss: str = "cross_entropy", points: int = 10, targeted: bool = True, targeted_start: str = "negative_image",
    target_class: str = "uniform", negatives: str = "data",
) -> Attack:
    """Returns the attack that generates the paths of the CVPR 2024 path method (a reconstruction: `adversarial_path`).

    Views: "path/1" to "path/{points - 1}" and "adversarial", evenly spaced along the untargeted ascent path, its last point
    included; where `targeted`, likewise "targeted/1" to "targeted/{points}" along the targeted descent path.

    Args:
      inner_loss: what the untargeted path climbs: "cross_entropy", "teacher_clean" (RSLAD's) or "teacher_moving" (AdaAD's).
      points: how many points of each path.
      targeted: generate the targeted path too.
      targeted_start: "negative_image", the target being the class of an anchor in the batch, or "anchor_image", any other.
      target_class: "uniform", or the best other class by the "teacher" or the "student", or the "least_likely".
      negatives: where the negative images for a uniform class come from: the "data", one for each image of the batch, which
        is its anchor; or the "batch" itself, each image with an anchor drawn from the others. Where a network chooses the
        class, there is no anchor, and the images of the batch are the negatives.

    Raises:
      InputError: an unknown name, or no points.
    """
    climbs = {"cross_entropy": _climbs_cross_entropy, "teacher_clean": _climbs_fixed_teacher,
              "teacher_moving": _climbs_moving_teacher}
    need(points >= 1, "path points", points, "1 or above")
    choose("path inner_loss", inner_loss, climbs)
    choose("path targeted_start", targeted_start, ("negative_image", "anchor_image"))
    choose("path target_class", target_class, ("uniform", "teacher", "student", "least_likely"))
    choose("path negatives", negatives, ("data", "batch"))
    negative_images = targeted and targeted_start == "negative_image"
    from_data = negative_images and target_class == "uniform" and negatives == "data"
    objective = climbs[inner_loss]
    teacher_on_clean = inner_loss == "teacher_clean" or targeted and target_class in ("teacher", "least_likely")

    def generate(key, context, inner):
        if points > inner.steps:
            raise InputError(
                f"method.path_points is {points}, more than the attack has steps ({inner.steps}); lower it, or raise "
                "attack.steps")
        # Evenly spaced, the last included: of 10 steps and 3 points, the 3rd, 7th and 10th.
        chosen = [round((index + 1) * inner.steps / points) - 1 for index in range(points)]
        budget = _budget(inner, "gaussian")
        path = attacks.pgd_path(key, objective(context), context.images, **budget)
        views = {f"path/{number}": path[step] for number, step in enumerate(chosen[:-1], 1)}
        views["adversarial"] = path[chosen[-1]]
        if targeted:
            start_key, target_key = (
                derived(key, lambda key, index=index: jax.random.split(jax.random.fold_in(key, _TARGETED))[index])
                for index in range(2))
            if from_data:
                start, descend = context.negatives, _descends_to_anchor(context, inner_loss)
            else:
                start = context.images
                descend = _descends_to_target(target_key, context, inner_loss, targeted_start, target_class)
            path = attacks.pgd_path(start_key, descend, start, descend=True, **budget)
            views |= {f"targeted/{number}": path[step] for number, step in enumerate(chosen, 1)}
        return views

    return Attack(
        generate, teacher_on_clean=teacher_on_clean, teacher=teacher_on_clean or inner_loss != "cross_entropy",
        teacher_gradient=inner_loss == "teacher_moving", two_classes=negative_images and not from_data, negatives=from_data,
        hard_labels=targeted)


def with_random_direction(attack: Attack) -> Attack:
    """Returns the attack that also generates "random", a point uniform in the ball (what IGDM may take for x + d)."""

    def generate(key, context, inner):
        start_key = derived(key, lambda key: jax.random.fold_in(key, _RANDOM))
        return {**attack.generate(key, context, inner),
                "random": inner.threat.random_start(start_key, context.images, "uniform")}

    return dataclasses.replace(attack, generate=generate)


# Folded into the key of a step for what must leave the base attack's own draws as they are: no index of an example.
_TARGETED, _RANDOM = 2**31 - 1, 2**31 - 2


def _budget(inner: InnerMaximisation, start: str) -> dict:
    return {"threat": inner.threat, "step_size": inner.step_size, "steps": inner.steps, "start": inner.start or start,
            "project_start": inner.project_start}


def _climbs_cross_entropy(context: Context) -> Objective:
    return lambda points: objectives.cross_entropy(context.student(points), context.labels)


def _climbs_fixed_teacher(context: Context) -> Objective:
    return lambda points: objectives.kl_divergence(context.teacher_clean, context.student(points))


def _climbs_moving_teacher(context: Context) -> Objective:
    return lambda points: objectives.kl_divergence(context.teacher(points), context.student(points))


def _descends_to_target(key, context, inner_loss, targeted_start, target_class) -> Objective:
    """What the targeted path of the batch's own images descends: towards an anchor among them, or a target class."""
    if targeted_start == "negative_image" and target_class == "uniform":
        return _descends_to_anchor(context, inner_loss, adversarial_path.draw_anchors(key, context.labels))
    student, scores = context.auxiliary or context.student, None
    if target_class == "teacher":
        scores = context.teacher_clean
    elif target_class == "student":
        scores = student(context.images)
    elif target_class == "least_likely":
        scores = -context.teacher_clean
    classes = jax.eval_shape(student, context.images).shape[-1]
    targets = adversarial_path.draw_targets(
        key, context.labels, classes, scores, present_only=targeted_start == "negative_image")
    return lambda points: objectives.cross_entropy(student(points), jnp.asarray(targets))


def _descends_to_anchor(context, inner_loss, anchors=slice(None)) -> Objective:
    """The inner loss towards the images of the batch at `anchors`, the n-th for the n-th: their classes, or T's outputs on
    them.
    """
    student = context.auxiliary or context.student
    if inner_loss == "teacher_clean":
        target = context.teacher_clean[anchors]
        return lambda points: objectives.kl_divergence(target, student(points))
    targets = jnp.asarray(context.labels[anchors])
    return lambda points: objectives.cross_entropy(student(points), targets)
