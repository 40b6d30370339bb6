"""What the train step is compiled for: method, networks, attack budget, optimiser, and how it is to be computed."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from jaxrd import models
from jaxrd.data.augment import Augmentation
from jaxrd.distillation.composition import Method, Term
from jaxrd.distillation.inner_maximisation import InnerMaximisation
from jaxrd.distillation.views import View
from jaxrd.errors import InputError, one_line
from jaxrd.models.zoo import Model
from jaxrd.training import state as states
from jaxrd.training.snapshots import Snapshots
from jaxrd.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything static that a step is compiled for.

    Attributes:
      method: attack, views and terms.
      student: the model that is trained.
      teacher: the model that is not; None for methods without one.
      inner: budget of the training attack.
      optimizer: the gradient transformation.
      steps: length of training, for the ramps.
      augmentation: crops, flips, mixing and cutout of the images.
      weight_average: decay of the weight average; 0 for none.
      snapshots: the steps whose weights a stochastic weight average takes, in place of a decaying one; None for none.
      label_smoothing: s in (1 - s) y + s / classes, the labels that the terms of the loss read; attacks, views and monitors
        read y.
      attack_batch_statistics: normalise the student's attack forwards by their own batch statistics instead of the running
        ones (running statistics never move in an attack).
      accumulation: how many micro-batches, one after another, a batch is cut into, to the same update: memory for one of
        them is enough. BatchNorm's statistics are those of a micro-batch. What a term takes over a batch, such as the largest
        drop along a path, is taken over a micro-batch too.
      joint_views: forward the views that a method forwards one after another as one batch, where the student can: each is
        normalised by its own statistics all the same, and the gradient is added up over the devices once, not once for each.
      attack_dtype: what both networks compute in inside the attack, "float32" or "bfloat16"; None: what they do outside of it.
        Points, objectives, projections and what the terms read of the networks are not touched by it.
      gradient_checkpointing: keep for the backward pass only what enters each of the student's residual blocks.
      shard_state: keep a part of the optimiser's state and of the weight average on each device, not all: see
        `parallel.state_shardings`.
    """

    method: Method
    student: Model
    teacher: Model | None
    inner: InnerMaximisation
    optimizer: optax.GradientTransformation
    steps: int
    augmentation: Augmentation = Augmentation()
    weight_average: float = 0.0
    snapshots: Snapshots | None = None
    label_smoothing: float = 0.0
    attack_batch_statistics: bool = False
    accumulation: int = 1
    joint_views: bool = True
    attack_dtype: str | None = None
    gradient_checkpointing: bool = False
    shard_state: bool = False

    @property
    def averages(self) -> bool:
        """Whether the state holds an average of the weights."""
        return self.weight_average > 0 or self.snapshots is not None

    def fresh_state(self, key: jax.Array) -> TrainState:
        """Returns the state before the first step, drawn from a typed key."""
        return states.create(self.student, self.optimizer, key, weight_average=self.averages)

    @property
    def state_shapes(self) -> TrainState:
        """The shapes of the state; nothing is drawn."""
        return jax.eval_shape(lambda: self.fresh_state(jax.random.key(0)))

    @property
    def attacked_student(self) -> Model:
        """The student as the attack forwards it."""
        return models.variant(self.student, dtype=self.attack_dtype)

    @property
    def attacked_teacher(self) -> Model:
        """The teacher as an attack that climbs through it forwards it."""
        return models.variant(self.teacher, dtype=self.attack_dtype)

    @property
    def trained_student(self) -> Model:
        """The student as the loss forwards it."""
        return models.variant(self.student, gradient_checkpointing=self.gradient_checkpointing)

    @property
    def dtypes(self) -> dict[str, str | None]:
        """What the bodies of the networks compute in, by network; None for a model of one's own, which does not say."""
        networks = {"student": self.student, "attacked student": self.attacked_student}
        if self.teacher:
            networks["teacher"] = self.teacher
            if self.method.attack.teacher_gradient:
                networks["attacked teacher"] = self.attacked_teacher
        return {name: model.specification.get("dtype") for name, model in networks.items()}

    @property
    def reads_teacher_on_clean(self) -> bool:
        """Whether the logits T(clean) are needed, by the attack or by a term."""
        return any(view.name == "clean" and view.readout is None for view in self.method.teacher_views)


def joint_forwards(recipe: Recipe) -> list[list[tuple[View, ...]]]:
    """Returns the student's forwards in their order, those next to each other that can be one batch in one list."""
    lists: list[list[tuple[View, ...]]] = []
    for forward in recipe.method.student_forwards:
        alone = len(forward) > 1 or forward[0].readout is not None
        before = lists[-1][-1] if lists else None
        if (recipe.joint_views and recipe.student.joint_views and before is not None and not alone and len(before) == 1
                and before[0].readout is None and before[0].batch_norm_set == forward[0].batch_norm_set):
            lists[-1].append(forward)
        else:
            lists.append([forward])
    return lists


def probe_soft_labels(recipe: Recipe) -> None:
    """Raises InputError where a term or monitor, of a method of one's own for instance, does not take soft labels.

    By their shapes alone: nothing is computed. What reads more than logits is left to the step itself.
    """
    method, classes = recipe.method, recipe.student.classes
    batch = classes + 1  # another number, so that one does not pass for the other
    logits = jax.ShapeDtypeStruct((batch, classes), jnp.float32)
    student, teacher = ({view.name: logits for view in views if view.readout is None}
                        for views in (method.student_views, method.teacher_views))
    for item in (*method.terms, *method.monitors):
        function = item.loss if isinstance(item, Term) else item.value
        if isinstance(item, Term) and not {*item.student, *item.teacher} <= {*student, *teacher}:
            continue
        try:
            # Negatives are not mixed, and keep their one class.
            labels = jax.ShapeDtypeStruct((batch,), jnp.int32) if item.labels == "negative_labels" else logits
            shape = jax.eval_shape(function, student, teacher, labels).shape
        except KeyError:
            continue  # a monitor may read what is more than logits
        except Exception as error:
            reason = str(error) if isinstance(error, InputError) else one_line(error)
        else:
            if shape in ((batch,), ()):
                continue
            reason = f"it gives {list(shape)} for a batch of {batch} and {classes} classes"
        raise InputError(
            f'config.data.mixing "{recipe.augmentation.mixing}" gives soft labels, [batch, classes], which "{item.name}" of '
            f"method {method.name} does not take ({reason}); set --config.data.mixing=none")
