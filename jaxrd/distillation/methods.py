"""Distillation methods: an attack plus a sum of weighted terms over named views. Nothing else.

A new method is a few lines here: which objective its attack climbs, which views its terms compare, with which weights. The
formulas live in pure functions (`jaxrd.objectives`, `jaxrd.distillation.gradient_matching`). No method has a train step of
its own.
"""

import collections
import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxrd import attacks, objectives
from jaxrd.attacks.pgd import Objective
from jaxrd.distillation.gradient_matching import igdm as igdm_loss
from jaxrd.distillation.views import ADVERSARIAL, CLEAN, MIRRORED, View
from jaxrd.errors import InputError
from jaxrd.threat import ThreatModel

Array = jax.Array
LogitsFn = Callable[[Array], Array]  # images -> logits
Logits = Mapping[str, Array]  # view name -> logits [batch, classes]
Ramp = Callable[[Array], Array]  # training progress in (0, 1] -> factor

DEFAULT_IGDM_WEIGHT = 10.0


@dataclasses.dataclass(frozen=True)
class InnerMaximisation:
    """The budget of the training attack: the threat model, the step length and the number of steps (papers: 2/255, 10)."""

    threat: ThreatModel
    step_size: float
    steps: int = 10


@dataclasses.dataclass(frozen=True)
class Context:
    """What an attack may look at: one augmented batch, and the two networks in eval mode.

    Attributes:
      images: [batch, h, w, c] float32.
      labels: [batch] int32.
      student: images -> logits.
      teacher: images -> logits, differentiable with respect to the images; None without a teacher.
      teacher_clean: [batch, classes], the teacher's logits on `images`, where the attack asked for them.
    """

    images: Array
    labels: Array
    student: LogitsFn
    teacher: LogitsFn | None = None
    teacher_clean: Array | None = None


@dataclasses.dataclass(frozen=True)
class Attack:
    """An inner maximisation that generates views.

    Attributes:
      generate: (key, context, budget) -> {view name: points [batch, h, w, c]}.
      teacher_on_clean: the attack reads `context.teacher_clean`, so the teacher sees the clean view before it.
      teacher: the attack needs a teacher at all.
    """

    generate: Callable[[Array, Context, InnerMaximisation], dict[str, Array]]
    teacher_on_clean: bool = False
    teacher: bool = False


@dataclasses.dataclass(frozen=True)
class Term:
    """One weighted summand of the loss.

    Attributes:
      name: its name in the metrics.
      loss: (student logits by view, teacher logits by view, labels [batch]) -> [batch].
      student: views whose student logits it reads.
      teacher: views whose teacher logits it reads.
      weight: its factor in the sum.
      ramp: training progress in (0, 1] -> a further factor.
    """

    name: str
    loss: Callable[[Logits, Logits, Array], Array]
    student: tuple[str, ...]
    teacher: tuple[str, ...] = ()
    weight: float = 1.0
    ramp: Ramp = jnp.ones_like


@dataclasses.dataclass(frozen=True)
class Method:
    """An attack plus weighted terms over views.

    Attributes:
      name: "rslad+igdm".
      attack: what generates the views that are not clean.
      views: every view that a term may ask for, in the order of the student's forwards.
      terms: the summands.

    Raises:
      InputError: a term that reads a view which is not declared, or two terms or views of one name.
    """

    name: str
    attack: Attack
    views: tuple[View, ...]
    terms: tuple[Term, ...]

    def __post_init__(self):
        # Logits and terms are kept by name: of two alike, one would silently stand in for the other.
        for kind, items in (("views", self.views), ("terms", self.terms)):
            for name, count in collections.Counter(item.name for item in items).items():
                if count > 1:
                    raise InputError(f'method "{self.name}" has {count} {kind} named "{name}"; give each a name of its own')
        known = {view.name for view in self.views}
        for term in self.terms:
            for name in (*term.student, *term.teacher):
                if name not in known:
                    raise InputError(
                        f'term "{term.name}" of method "{self.name}" reads view "{name}", which the method does not '
                        f"declare; add it to its views ({', '.join(sorted(known))})")

    @property
    def student_views(self) -> tuple[View, ...]:
        """The views that some term needs the student on, in declared order."""
        needed = {name for term in self.terms for name in term.student}
        return tuple(view for view in self.views if view.name in needed)

    @property
    def teacher_views(self) -> tuple[View, ...]:
        """The views that some term, or the attack, needs the teacher on, in declared order."""
        needed = {name for term in self.terms for name in term.teacher}
        if self.attack.teacher_on_clean:
            needed.add("clean")
        return tuple(view for view in self.views if view.name in needed)

    @property
    def needs_teacher(self) -> bool:
        return bool(self.teacher_views) or self.attack.teacher

    def loss(self, student: Logits, teacher: Logits, labels: Array, progress: Array) -> tuple[Array, dict[str, Array]]:
        """Returns the per-example loss sum_i weight_i * ramp_i(progress) * term_i and the unweighted terms by name.

        Args:
          student: logits [batch, classes] by view.
          teacher: likewise; empty without a teacher.
          labels: [batch] int32.
          progress: scalar in (0, 1], the fraction of training that this step completes.

        Returns:
          ([batch], {term name: [batch]}).
        """
        terms = {term.name: term.loss(student, teacher, labels) for term in self.terms}
        total = sum(term.weight * term.ramp(progress) * terms[term.name] for term in self.terms)
        return total, terms


def linear_ramp(progress: Array) -> Array:
    """The factor e/E of the IGDM paper (appendix B.2), by steps where the paper goes by epochs: 1 in the last step."""
    return progress


def pgd_attack(
    objective: Callable[[Context], Objective],
    start: str,
    *,
    teacher_on_clean: bool = False,
    teacher: bool = False,
) -> Attack:
    """Returns the attack that climbs `objective(context)` by PGD and generates the view "adversarial"."""

    def generate(key, context, inner):
        points = attacks.pgd(
            key, objective(context), context.images, threat=inner.threat, step_size=inner.step_size, steps=inner.steps,
            start=start)
        return {"adversarial": points}

    return Attack(generate, teacher_on_clean=teacher_on_clean, teacher=teacher or teacher_on_clean)


def _cross_entropy_attack() -> Attack:
    """max CE(S(x'), y) from a uniform start (Madry et al. 2018): the attack of PGD-AT, ARD, IAD and AKD."""
    return pgd_attack(lambda context: lambda points: objectives.cross_entropy(context.student(points), context.labels),
                      start="uniform")


def _teacher_fixed_attack() -> Attack:
    """max KL(T(x) || S(x')) from a small Gaussian start, the teacher's output fixed (RSLAD)."""
    return pgd_attack(
        lambda context: lambda points: objectives.kl_divergence(context.teacher_clean, context.student(points)),
        start="gaussian", teacher_on_clean=True)


def pgd_at() -> Method:
    """Adversarial training without a teacher: CE(S(x'), y) (Madry et al. 2018)."""
    loss = Term("cross_entropy", lambda student, teacher, labels: objectives.cross_entropy(student["adversarial"], labels),
                student=("adversarial",))
    return Method("pgd_at", _cross_entropy_attack(), (ADVERSARIAL,), (loss,))


def ard() -> Method:
    """Adversarially robust distillation: KL(T(x) || S(x')) (Goldblum et al. 2020).

    At temperature 1, without hard labels and with the batch mean, as the IGDM authors run it; the original's temperature 30
    and its division by the number of classes are not used here.
    """
    return Method("ard", _cross_entropy_attack(), (ADVERSARIAL, CLEAN), (_distillation("clean", "adversarial"),))


def rslad(scale: float = 0.1) -> Method:
    """Robust soft-label distillation: scale * [5/6 KL(T(x) || S(x')) + 1/6 KL(T(x) || S(x))] (Zi et al. 2021).

    Without the 1e-5 that the published code adds inside the logarithm.

    Args:
      scale: 0.1 is what the published mean over batch and classes (times 10 on CIFAR-100) amounts to; 1 is the batch mean
        that the other methods use.
    """
    return Method("rslad", _teacher_fixed_attack(), (ADVERSARIAL, CLEAN), (
        _distillation("clean", "adversarial", name="distillation_adversarial", weight=scale * 5 / 6),
        _distillation("clean", "clean", name="distillation_clean", weight=scale / 6),
    ))


def with_igdm(base: Method, weight: float, *, ramp: Ramp = linear_ramp, mirrored_statistics: bool = False) -> Method:
    """Adds indirect gradient matching to any method: + weight * ramp * IGDM (Lee et al. 2025, eq. 9 and appendix B.2).

    The perturbation is the base's own. The views "clean" and "adversarial" are shared with the base; only "mirrored" is new
    to the student.

    Args:
      base: any method whose attack generates "adversarial".
      weight: alpha; the papers search it per teacher and student (0.2 to 220).
      ramp: progress -> factor; the papers' is linear.
      mirrored_statistics: let S(x - d) move the BatchNorm running statistics, as the published code does.
    """
    term = Term(
        "igdm",
        lambda student, teacher, labels: igdm_loss(
            student["adversarial"], student["mirrored"], teacher["adversarial"], teacher["mirrored"]),
        student=("adversarial", "mirrored"), teacher=("adversarial", "mirrored"), weight=weight, ramp=ramp)
    mirrored = dataclasses.replace(MIRRORED, updates_statistics=mirrored_statistics)
    return Method(f"{base.name}+igdm", base.attack, (*base.views, mirrored), (*base.terms, term))


def _distillation(teacher_view: str, student_view: str, name: str = "distillation", weight: float = 1.0) -> Term:
    """weight * KL(T(teacher view) || S(student view))."""
    return Term(
        name,
        lambda student, teacher, labels: objectives.kl_divergence(teacher[teacher_view], student[student_view]),
        student=(student_view,), teacher=(teacher_view,), weight=weight)


# The edge where config strings become functions.
BASES: dict[str, Callable[..., Method]] = {"pgd_at": pgd_at, "ard": ard, "rslad": rslad}
RAMPS: dict[str, Ramp] = {"linear": linear_ramp, "constant": jnp.ones_like}


def method(
    name: str,
    *,
    igdm: float | None = None,
    igdm_ramp: str = "linear",
    mirrored_statistics: bool = False,
    rslad_scale: float = 0.1,
) -> Method:
    """Returns a method by its name.

    Args:
      name: "pgd_at", "ard" or "rslad", with "+igdm" appended or not.
      igdm: weight of the IGDM term. None: 10 where the name says "+igdm", else no such term. A number decides by itself:
        above 0 adds the term, 0 leaves it out.
      igdm_ramp: "linear" (alpha * e / E) or "constant".
      mirrored_statistics: see `with_igdm`.
      rslad_scale: see `rslad`.

    Raises:
      InputError: an unknown name or ramp, or a weight that is negative or not finite.

    Example:
      >>> method("rslad", igdm=10.0).name
      'rslad+igdm'
    """
    base_name, *modules = name.split("+")
    if base_name not in BASES:
        raise InputError(f'method.name is "{name}"; {_suggest(base_name, BASES)}')
    if modules not in ([], ["igdm"]):
        raise InputError(f'method.name is "{name}"; the module that can follow a base is "+igdm"')
    if igdm is None:
        igdm = DEFAULT_IGDM_WEIGHT if modules else 0.0
    if not (math.isfinite(igdm) and igdm >= 0):
        raise InputError(f"method.igdm is {igdm}; it must be a number of 0 or above")
    if igdm_ramp not in RAMPS:
        raise InputError(f'method.igdm_ramp is "{igdm_ramp}"; {_suggest(igdm_ramp, RAMPS)}')
    base = rslad(rslad_scale) if base_name == "rslad" else BASES[base_name]()
    if igdm == 0:
        return base
    return with_igdm(base, igdm, ramp=RAMPS[igdm_ramp], mirrored_statistics=mirrored_statistics)


def _suggest(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f'did you mean "{close[0]}"? ' if close else ""
    return f"{hint}known: {', '.join(known)}"
