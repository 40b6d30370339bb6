"""What a distillation method is: an attack plus a sum of weighted terms over named views. Nothing else.

A new method is a few lines: which objective its attack climbs, which views its terms compare, with which weights. It runs on
the one train step of `jaxrd.training.step`, as every method does.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxrd.data.augment import Augmentation
from jaxrd.distillation.inner_maximisation import Attack
from jaxrd.distillation.views import LABELS, View
from jaxrd.distillation.weight_perturbation import WeightPerturbation
from jaxrd.errors import InputError, choose, one_line

Array = jax.Array
Logits = Mapping[str, Array]  # view name -> logits [batch, classes], or what the view's readout gives
Loss = Callable[[Logits, Logits, Array], Array]  # (student, teacher, labels) -> [batch]
Ramp = Callable[[Array], Array]  # training progress in (0, 1] -> factor


@dataclasses.dataclass(frozen=True)
class Term:
    """One weighted summand of the loss.

    Attributes:
      name: its name in the metrics.
      loss: (student logits by view, teacher logits by view, labels) -> [batch]. The labels are int32 [batch], or soft,
        float32 [batch, classes], where training mixes images or smooths labels.
      student: views whose student logits it reads.
      teacher: views whose teacher logits it reads.
      weight: its factor in the sum.
      ramp: training progress in (0, 1] -> a further factor.
      hard_labels: it is defined for one true class per image only.
      labels: whose labels the loss is given: "labels", or "negative_labels" for those of the negatives, which are int32.
    """

    name: str
    loss: Loss
    student: tuple[str, ...]
    teacher: tuple[str, ...] = ()
    weight: float = 1.0
    ramp: Ramp = jnp.ones_like
    hard_labels: bool = False
    labels: str = "labels"


@dataclasses.dataclass(frozen=True)
class Monitor:
    """A quantity that is logged and not trained on. It reads only what some term reads too: nothing is forwarded for it.

    Attributes:
      name: its name in the metrics.
      value: (student logits by view, teacher logits by view, labels) -> [batch], as a term's loss.
      hard_labels: as a term's.
      labels: as a term's.
    """

    name: str
    value: Loss
    hard_labels: bool = False
    labels: str = "labels"


@dataclasses.dataclass(frozen=True)
class Method:
    """An attack plus weighted terms over views.

    Attributes:
      name: "rslad+igdm".
      attack: what generates the views that are not clean.
      views: every view that a term may ask for, in the order of the student's forwards.
      terms: the summands.
      monitors: what is logged besides.
      weight_perturbation: take the loss at adversarially perturbed weights; None: at the weights themselves.

    Raises:
      InputError: a term that reads a view which is not declared, two terms or views of one name, a term with the name of
        another metric, or labels that no batch has.
    """

    name: str
    attack: Attack
    views: tuple[View, ...]
    terms: tuple[Term, ...]
    monitors: tuple[Monitor, ...] = ()
    weight_perturbation: WeightPerturbation | None = None

    def __post_init__(self):
        # Logits and terms are kept by name: of two alike, one would silently stand in for the other.
        for kind, items in (("views", self.views), ("terms", (*self.terms, *self.monitors))):
            for name, count in collections.Counter(item.name for item in items).items():
                if count > 1:
                    raise InputError(f'method "{self.name}" has {count} {kind} named "{name}"; give each a name of its own')
        for item in (*self.terms, *self.monitors):
            if item.name in ("loss", "gradient_norm") or item.name.startswith(("accuracy/", "teacher_accuracy/", "weight/")):
                raise InputError(
                    f'term "{item.name}" of method "{self.name}" has the name of another metric; call it otherwise')
        for item in (*self.views, *self.terms, *self.monitors):
            choose(f'method "{self.name}", labels of "{item.name}"', item.labels, LABELS)
        known = {view.name for view in self.views}
        for term in self.terms:
            for name in (*term.student, *term.teacher):
                if name not in known:
                    raise InputError(
                        f'term "{term.name}" of method "{self.name}" reads view "{name}", which the method does not '
                        f"declare; add it to its views ({', '.join(sorted(known))})")

    @property
    def student_views(self) -> tuple[View, ...]:
        """The views that the student is forwarded on, in declared order: those that some term reads, or always."""
        needed = {name for term in self.terms for name in term.student}
        return tuple(view for view in self.views if view.name in needed or view.always)

    @property
    def student_forwards(self) -> tuple[tuple[View, ...], ...]:
        """`student_views` by forward: one each, except that neighbours which are to go `together` share one."""
        groups = itertools.groupby(self.student_views, lambda view: (view.together or view.name, view.batch_norm_set))
        return tuple(tuple(views) for _, views in groups)

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

    @property
    def needs_teacher_gradient(self) -> bool:
        """Whether the teacher is differentiated with respect to its images, by the attack or by a view's readout."""
        return self.attack.teacher_gradient or any(view.readout is not None for view in self.teacher_views)

    @property
    def hard_labels(self) -> bool:
        """Whether the method is defined for one true class per image only, so that images cannot be mixed."""
        return any(part.hard_labels for part in (self.attack, *self.terms, *self.monitors))

    @property
    def negatives(self) -> bool:
        """Whether a batch must have "negatives" and "negative_labels": an image of another class for each of its own."""
        return self.attack.negatives or any(
            part.labels == "negative_labels" for part in (*self.views, *self.terms, *self.monitors))

    @property
    def batch_norm_sets(self) -> int:
        """How many sets of BatchNorm the student must have."""
        return 1 + max((view.batch_norm_set for view in self.student_views), default=0)

    def loss(
        self, student: Logits, teacher: Logits, labels: Array, progress: Array, negative_labels: Array | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """Returns the per-example loss sum_i weight_i * ramp_i(progress) * term_i and the unweighted terms by name.

        Args:
          student: logits [batch, classes] by view.
          teacher: likewise; empty without a teacher.
          labels: [batch] int32, or soft ones, [batch, classes] float32.
          progress: scalar in (0, 1], the fraction of training that this step completes.
          negative_labels: [batch] int32, the classes of the negatives, where the method has such.

        Returns:
          ([batch], {term name: [batch]}).
        """
        terms = {
            term.name: term.loss(
                _Views(term.name, "student", {name: student[name] for name in term.student}),
                _Views(term.name, "teacher", {name: teacher[name] for name in term.teacher}),
                negative_labels if term.labels == "negative_labels" else labels)
            for term in self.terms}
        weights = self.weights(progress)
        return sum(weights[name] * terms[name] for name in terms), terms

    def weights(self, progress: Array) -> dict[str, Array]:
        """Returns weight * ramp(progress) of every term, by name."""
        return {term.name: term.weight * term.ramp(progress) for term in self.terms}

    def monitored(
        self, student: Logits, teacher: Logits, labels: Array, negative_labels: Array | None = None,
    ) -> dict[str, Array]:
        """Returns the value of every monitor, by name: arguments as for `loss`."""
        return {
            monitor.name: monitor.value(
                _Views(monitor.name, "student", student), _Views(monitor.name, "teacher", teacher),
                negative_labels if monitor.labels == "negative_labels" else labels)
            for monitor in self.monitors}


class _Views(dict):
    """The logits that a term may read; one that it did not ask for is answered with how to ask."""

    def __init__(self, term: str, network: str, logits: Logits):
        super().__init__(logits)
        self._term, self._network = term, network

    def __missing__(self, view):
        raise InputError(
            f'"{self._term}" reads the {self._network}\'s logits of view "{view}", which are not among those it has '
            f'({", ".join(self) or "none"}); name it in {self._network}=("{view}", ...) of a term')


def check_mixing(method: Method, augmentation: Augmentation) -> None:
    """Raises InputError where images are mixed and the method is defined for one true class per image only."""
    if augmentation.mixes and method.hard_labels:
        raise InputError(
            f'config.data.mixing "{augmentation.mixing}" gives soft labels, and {method.name} needs one true class per image; '
            "set --config.data.mixing=none, or use pgd_at, trades, ard, akd, rslad or adaad")


def check_accumulation(method: Method, accumulation: int) -> None:
    """Raises InputError where an attack looks for negatives in the batch, and would find them in a micro-batch only."""
    if accumulation > 1 and method.attack.two_classes:
        raise InputError(
            f"config.training.accumulation is {accumulation}, and {method.name} takes negative images from the whole batch; "
            "set it to 1, or --config.method.path_negatives=data")


def check_label_smoothing(method: Method, smoothing: float) -> None:
    """Raises InputError where labels are smoothed and a term is defined for one true class only, or none reads a label.

    Terms are traced with soft labels; nothing is computed. Attacks and monitors get the labels as they are.
    """
    if not smoothing:
        return
    asked, way_out = f"config.training.label_smoothing is {smoothing:g}", "set --config.training.label_smoothing=0"
    hard = [term.name for term in method.terms if term.hard_labels]
    if hard:
        raise InputError(
            f'{asked}, and "{hard[0]}" of {method.name} needs one true class per image; {way_out}, or use pgd_at, trades, '
            "akd, or ard with ard_alpha below 1")
    if not any(_reads_soft_labels(method, term, f"{asked}, a distribution over classes,", way_out) for term in method.terms):
        raise InputError(
            f"{asked}, and no term of {method.name} with its weights reads a label: {way_out}, or give the label a weight, as "
            "ard_alpha below 1 does")


def _reads_soft_labels(method: Method, term: Term, asked: str, way_out: str) -> bool:
    """Returns whether a term reads the images' labels; InputError where it cannot take soft ones."""
    if term.labels != "labels":
        return False
    batch, classes = 3, 2  # unlike, so that one does not pass for the other
    logits = jax.ShapeDtypeStruct((batch, classes), jnp.float32)
    student, teacher = (dict.fromkeys(names, logits) for names in (term.student, term.teacher))
    try:
        traced = jax.make_jaxpr(term.loss)(student, teacher, logits)
    except Exception as error:
        if {view.name for view in method.views if view.readout is not None} & {*term.student, *term.teacher}:
            return True  # of what it reads the shape is not known here
        reason = str(error) if isinstance(error, InputError) else one_line(error)
    else:
        # The labels are the last of the arguments.
        labels = traced.jaxpr.invars[-1]
        if traced.out_avals[0].shape in ((batch,), ()):
            return any(labels is variable for equation in traced.eqns for variable in equation.invars)
        reason = f"it gives {list(traced.out_avals[0].shape)} for a batch of {batch} and {classes} classes"
    raise InputError(f'{asked} which "{term.name}" of method {method.name} does not take ({reason}); {way_out}')
