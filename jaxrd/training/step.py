"""The one train step: every method, one compiled, donated, data-parallel program for the global batch.

    batch -> augment -> attack -> views -> student and teacher logits per view -> sum of weighted terms
          -> gradient -> optimiser -> weight average

The pieces are functions of their own, so that a benchmark can time each and a test can look inside; `make_train_step` puts
them together. Nothing here names a device axis: the compiler partitions the program over the mesh, and BatchNorm statistics
and means are those of the global batch on any number of devices.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxrd import objectives
from jaxrd.data import augment as augmentation
from jaxrd.distillation.methods import Context, InnerMaximisation, Method
from jaxrd.models.zoo import Model
from jaxrd.threat import example_keys
from jaxrd.training import parallel
from jaxrd.training.state import TrainState

Array = jax.Array


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
      shift: pixels of random pad-and-crop.
      flip: random horizontal flips.
      weight_average: decay of the weight average; 0 for none.
      attack_batch_statistics: normalise the student's attack forwards by their own batch statistics instead of the running
        ones (running statistics never move in an attack).
    """

    method: Method
    student: Model
    teacher: Model | None
    inner: InnerMaximisation
    optimizer: optax.GradientTransformation
    steps: int
    shift: int = 0
    flip: bool = False
    weight_average: float = 0.0
    attack_batch_statistics: bool = False


def make_train_step(recipe: Recipe, mesh: jax.sharding.Mesh) -> Callable:
    """Returns the compiled step `(state, teacher_variables, batch) -> (state, metrics)`.

    The state is donated. `batch` is {"images": uint8 or float32 [batch, h, w, c], "labels": int32 [batch]}, sharded over
    "data"; teacher_variables is None without a teacher. Metrics are scalars: means over the global batch.
    """

    def train_step(state, teacher_variables, batch):
        augment_key, attack_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        images = augment(recipe, augment_key, batch["images"])
        views, teacher_clean = attack(recipe, attack_key, state, teacher_variables, images, batch["labels"])
        teacher = teacher_logits(recipe, teacher_variables, views, teacher_clean)
        gradients, batch_stats, metrics = gradients_of(recipe, state, views, teacher, batch["labels"])
        return update(recipe, state, gradients, batch_stats), metrics

    replicated = parallel.replicated(mesh)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(replicated, replicated))


def augment(recipe: Recipe, key: Array, images: Array) -> Array:
    """Returns the batch as float32 in [0, 1], each example augmented by its own key."""
    return augmentation.augment(
        example_keys(key, images.shape[0]), augmentation.to_float(images), shift_pixels=recipe.shift,
        flip_probability=0.5 if recipe.flip else 0.0)


def attack(recipe, key, state, teacher_variables, images, labels) -> tuple[dict[str, Array], Array | None]:
    """Returns all views of the batch by name, and the teacher's logits on the clean one where the attack needed them."""
    method = recipe.method
    variables = {"params": state.params, "batch_stats": state.batch_stats}

    def student(points):
        return recipe.student.apply(variables, points, train=recipe.attack_batch_statistics)[0]

    teacher = teacher_clean = None
    if method.needs_teacher:
        def teacher(points):
            return recipe.teacher.apply(teacher_variables, points, train=False)[0]
    if method.attack.teacher_on_clean:
        teacher_clean = teacher(images)
    context = Context(images, labels, student, teacher, teacher_clean)
    known = {"clean": images, **method.attack.generate(key, context, recipe.inner)}
    return {view.name: view.points(known) for view in method.views}, teacher_clean


def teacher_logits(recipe, teacher_variables, views, teacher_clean) -> dict[str, Array]:
    """Returns the teacher's logits on the views that some term reads: eval mode, no gradient, one forward.

    What the attack has already computed is not computed again. The views are interleaved per example rather than laid end
    to end, so that a batch sharded over "data" stays where it is.
    """
    known = {} if teacher_clean is None else {"clean": teacher_clean}
    names = [view.name for view in recipe.method.teacher_views if view.name not in known]
    if names:
        stacked = jnp.stack([views[name] for name in names], axis=1)
        batch, count, *image = stacked.shape
        logits, _ = recipe.teacher.apply(teacher_variables, stacked.reshape(batch * count, *image), train=False)
        logits = logits.reshape(batch, count, -1)
        known |= {name: logits[:, index] for index, name in enumerate(names)}
    return jax.lax.stop_gradient(known)


def gradients_of(recipe, state, views, teacher, labels) -> tuple[dict, dict, dict[str, Array]]:
    """Returns the gradient of the mean loss through every student view, the new BatchNorm statistics and the metrics."""
    progress = (state.step + 1) / recipe.steps

    def mean_loss(params):
        batch_stats, student = state.batch_stats, {}
        for view in recipe.method.student_views:
            variables = {"params": params, "batch_stats": batch_stats}
            student[view.name], moved = recipe.student.apply(variables, views[view.name], train=True)
            batch_stats = moved if view.updates_statistics else batch_stats
        loss, terms = recipe.method.loss(student, teacher, labels, progress)
        metrics = {"loss": loss, **terms}
        metrics |= {f"accuracy/{name}": objectives.correct(logits, labels) for name, logits in student.items()}
        return jnp.mean(loss), (batch_stats, {name: jnp.mean(value) for name, value in metrics.items()})

    gradients, (batch_stats, metrics) = jax.grad(mean_loss, has_aux=True)(state.params)
    return gradients, batch_stats, metrics | {"gradient_norm": optax.tree.norm(gradients)}


def update(recipe, state, gradients, batch_stats) -> TrainState:
    """Returns the state after the optimiser's step and the weight average's."""
    updates, opt_state = recipe.optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if average is not None:
        newest = {"params": params, "batch_stats": batch_stats}
        average = optax.incremental_update(newest, average, 1 - recipe.weight_average)
    return state.replace(
        step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state, average=average)
