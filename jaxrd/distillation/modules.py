"""Modules: what goes on top of any method. Each takes a method and returns one with a term, or a property, more."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxrd.distillation import gradient_matching
from jaxrd.distillation.composition import Method, Ramp, Term
from jaxrd.distillation.inner_maximisation import with_random_direction
from jaxrd.distillation.views import ADVERSARIAL, CLEAN, MIRRORED, View, displaced
from jaxrd.distillation.weight_perturbation import WeightPerturbation
from jaxrd.errors import InputError, choose, need

Array = jax.Array

_DIRECTIONS = ("attack", "random")
_CONTROLS = ("none", "zero", "mirror", "trades")


def linear_ramp(progress: Array) -> Array:
    """The factor e/E of the IGDM paper (appendix B.2), by steps where the paper goes by epochs: 1 in the last step."""
    return progress


def with_igdm(
    base: Method,
    weight: float,
    *,
    ramp: Ramp = linear_ramp,
    mirrored_statistics: bool = False,
    distance: str = "kl",
    direction: str = "attack",
    beta: float = 1.0,
    gamma: float = 1.0,
    control: str = "none",
) -> Method:
    """Adds indirect gradient matching to any method: + weight * ramp * IGDM (Lee et al. 2025, eq. 9 and appendix B.2).

    D(T(x + beta d) - T(x - gamma d), S(x + beta d) - S(x - gamma d)), with the perturbation d that the base has found. The
    views "clean" and "adversarial" are shared with the base; only "mirrored" is new to the student.

    Args:
      base: any method whose attack generates "adversarial".
      weight: alpha; the papers search it per teacher and student (0.2 to 220).
      ramp: progress -> factor; the papers' is linear.
      mirrored_statistics: let S(x - d) move the BatchNorm running statistics, as the published code does.
      distance: "kl", "l1" or "l2": see `igdm`.
      direction: d is the "attack"'s perturbation, or a "random" one, uniform in the ball.
      beta: scale of the forward point.
      gamma: scale of the mirrored point; 0 is the forward difference S(x + d) - S(x) (SAAD, eq. 11).
      control: "none"; without a teacher, the controls of appendix A.5: "zero" puts 0 for the teacher's difference,
        "mirror" is D(S(x - d), S(x + d)), "trades" D(S(x), S(x + d)). The paper equates the first two, which by KL are not
        the same, and does not say which it ran.
    """
    for field, value, known in (
            ("igdm_distance", distance, gradient_matching.DIFFERENCE_DISTANCES), ("igdm_direction", direction, _DIRECTIONS),
            ("igdm_control", control, _CONTROLS)):
        choose(f"method.{field}", value, known)
    for field, value in (("igdm_beta", beta), ("igdm_gamma", gamma)):
        need(value >= 0, f"method.{field}", value, "0 or above")
    if control == "trades":
        need(beta > 0, "method.igdm_beta", beta, 'above 0 with igdm_control "trades", which compares x + beta d with x')
        gamma = 0.0
    if beta == gamma == 0:
        raise InputError("method.igdm_beta and method.igdm_gamma are both 0: the difference is of one point; raise one")
    attack, along, views = base.attack, "adversarial", {view.name: view for view in base.views}
    if direction == "random":
        attack, along = with_random_direction(attack), "random"

    def at(scale, name, shared):
        """The name of the view at x + scale d, declared where it is not yet."""
        if scale == 0:
            view = CLEAN
        elif shared is not None and direction == "attack" and abs(scale) == 1:
            view = shared
        else:
            view = displaced(name, along, scale)
        if view not in (CLEAN, ADVERSARIAL):
            view = dataclasses.replace(view, updates_statistics=mirrored_statistics)
        if view.name not in ("clean", "adversarial") and view.name in views:
            raise InputError(f'method "{base.name}+igdm" has 2 views named "{view.name}"; give each a name of its own')
        views.setdefault(view.name, view)
        return view.name

    plus, minus = at(beta, "plus", ADVERSARIAL), at(-gamma, "mirrored", MIRRORED)
    measure = gradient_matching.DIFFERENCE_DISTANCES[distance]

    def loss(student, teacher, labels):
        ahead, behind = student[plus], student[minus]
        if control == "zero":
            return measure(jnp.zeros_like(ahead), ahead - behind)
        if control in ("mirror", "trades"):
            return measure(behind, ahead)
        return gradient_matching.igdm(ahead, behind, teacher[plus], teacher[minus], distance)

    asked = (plus, minus) if control == "none" else ()
    term = Term("igdm", loss, student=(plus, minus), teacher=asked, weight=weight, ramp=ramp)
    return _extended(base, "igdm", attack=attack, views=tuple(views.values()), terms=(*base.terms, term))


def with_jvp(base: Method, weight: float, *, ramp: Ramp = linear_ramp) -> Method:
    """Adds exact directional gradient matching: + weight * ramp * `jvp_matching` along the base's perturbation.

    The student's Jacobian-vector product is taken in train mode, through its batch statistics: the limit of IGDM's forwards.
    """
    view = View(
        "jvp", CLEAN.points, updates_statistics=False,
        readout=lambda network, points, known, labels: gradient_matching.directional_derivative(
            network, points, known["adversarial"] - points))
    term = Term("jvp", lambda student, teacher, labels: gradient_matching.jvp_loss(teacher["jvp"], student["jvp"]),
                student=("jvp",), teacher=("jvp",), weight=weight, ramp=ramp)
    return _extended(base, "jvp", views=(*base.views, view), terms=(*base.terms, term))


def with_direct(
    base: Method, weight: float, *, ramp: Ramp = linear_ramp, scalar: str = "probability", distance: str = "l2",
    at: str = "clean",
) -> Method:
    """Adds direct gradient matching, by double backprop: + weight * ramp * `gradient_matching` (Lee et al. 2025, eq. 11).

    The student's gradient is taken in train mode, through its batch statistics, by which each image depends a little on the
    others.

    Args:
      base: any method.
      weight: the paper sweeps 1 to 10,000, to no gain.
      ramp: progress -> factor.
      scalar: "probability", "logit", "cross_entropy" or "margin": see `input_gradients`; the paper does not say.
      distance: "l2", "squared_l2" or "cosine".
      at: the view at which gradients are matched, "clean" or "adversarial".
    """
    for field, value, known in (
            ("direct_scalar", scalar, gradient_matching.SCALARS), ("direct_at", at, ("clean", "adversarial")),
            ("direct_distance", distance, gradient_matching.GRADIENT_DISTANCES)):
        choose(f"method.{field}", value, known)
    view = View(
        "input_gradient", (CLEAN if at == "clean" else ADVERSARIAL).points, updates_statistics=False,
        readout=lambda network, points, known, labels: gradient_matching.input_gradients(network, points, labels, scalar))
    measure = gradient_matching.GRADIENT_DISTANCES[distance]
    term = Term(
        "direct", lambda student, teacher, labels: measure(teacher["input_gradient"], student["input_gradient"]),
        student=("input_gradient",), teacher=("input_gradient",), weight=weight, ramp=ramp)
    return _extended(base, "direct", views=(*base.views, view), terms=(*base.terms, term))


def with_awp(base: Method, gamma: float, *, warmup: float = 0.0) -> Method:
    """Takes the loss of any method at adversarially perturbed weights (AWP, Wu et al. 2020): see `WeightPerturbation`.

    The perturbation climbs the method's whole loss; it is computed in the warm-up too, where it is not used. Its forwards
    leave the running statistics alone. Weight decay acts on the weights themselves, where the published code lets it act on
    the perturbed ones.

    Args:
      base: any method.
      gamma: relative size, above 0 (published: 0.01 on AT, 0.005 on TRADES).
      warmup: fraction of training without it, in [0, 1) (published: 0 on AT, the first 9 of 200 epochs on TRADES).
    """
    need(gamma > 0, "method.awp", gamma, "above 0")
    need(0 <= warmup < 1, "method.awp_warmup", warmup, "in [0, 1)")
    if base.weight_perturbation:
        raise InputError(f'method "{base.name}" has a weight perturbation already; give one')
    return _extended(base, "awp", weight_perturbation=WeightPerturbation(gamma, warmup))


def with_forwards(base: Method, order: Sequence[str]) -> Method:
    """Forwards the student on these views in this order, repeats included, each moving the running statistics.

    Published code forwards some views twice, and some that no term reads; the losses are the same, the running statistics
    that the student is evaluated with are not.
    """
    declared, views = {view.name: view for view in base.views}, []
    declared.setdefault("clean", CLEAN)
    for name in order:
        view = dataclasses.replace(declared[name], updates_statistics=True, always=True)
        repeats = sum(other.name.partition("#")[0] == name for other in views)
        views.append(dataclasses.replace(view, name=f"{name}#{repeats + 1}" if repeats else name))
    rest = [view for name, view in declared.items() if name not in order]
    return dataclasses.replace(base, views=(*views, *rest))


def _extended(base: Method, module: str, **changes) -> Method:
    return dataclasses.replace(base, name=f"{base.name}+{module}", **changes)
