"""The one train step: every method, one compiled, donated, data-parallel program for the global batch.

    batch -> augment -> attack -> views -> student and teacher logits per view -> sum of weighted terms
          -> gradient -> optimiser -> weight average

The pieces are functions of their own, so that a benchmark can time each and a test can look inside; `make_train_step` puts
them together. Nothing here names a device axis: the compiler partitions the program over the mesh, and BatchNorm statistics
and means are those of the global batch on any number of devices.
"""

import dataclasses
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax

from jaxrd import objectives
from jaxrd.attacks import loop_unroll
from jaxrd.data import augment as augmenting
from jaxrd.distillation.composition import Method, Term, check_accumulation, check_label_smoothing, check_mixing
from jaxrd.distillation.inner_maximisation import Context, InnerMaximisation
from jaxrd.distillation.views import View
from jaxrd.distillation.weight_perturbation import perturb_weights
from jaxrd.errors import InputError, one_line
from jaxrd.models.zoo import Model
from jaxrd.threat import MicroBatchKey, derived, example_keys
from jaxrd.training import parallel, state as states
from jaxrd.training.snapshots import Snapshots
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
      shard_state: keep a part of the optimiser's state and of the weight average on each device, not all: see
        `parallel.state_shardings`.
    """

    method: Method
    student: Model
    teacher: Model | None
    inner: InnerMaximisation
    optimizer: optax.GradientTransformation
    steps: int
    augmentation: augmenting.Augmentation = augmenting.Augmentation()
    weight_average: float = 0.0
    snapshots: Snapshots | None = None
    label_smoothing: float = 0.0
    attack_batch_statistics: bool = False
    accumulation: int = 1
    joint_views: bool = True
    shard_state: bool = False

    @property
    def averages(self) -> bool:
        """Whether the state holds an average of the weights."""
        return self.weight_average > 0 or self.snapshots is not None


def make_train_step(recipe: Recipe, mesh: jax.sharding.Mesh) -> Callable:
    """Returns the compiled step `(state, teacher_variables, batch) -> (state, metrics)`.

    The state is donated. `batch` is {"images": uint8 or float32 [batch, h, w, c], "labels": int32 [batch]}, sharded over
    "data", and where the recipe mixes also "partners" and "partner_labels", shaped likewise: a permutation of the batch, made
    before it is sharded, so that no image crosses devices here. Where the method has negatives, it also has "negatives" and
    "negative_labels", shaped likewise: an image of another class for each. teacher_variables is None without a teacher.
    With `accumulation` every array has a first axis of that many micro-batches, [accumulation, batch / accumulation, ...], and
    is sharded over "data" along the second (`parallel.sharded`). Metrics are scalars: means over the global batch.

    Raises:
      InputError: a method that cannot take the soft labels of mixed images, or smooth ones, or whose attack takes negatives
        from the batch and would find them in a micro-batch only.
    """
    check_mixing(recipe.method, recipe.augmentation)
    check_label_smoothing(recipe.method, recipe.label_smoothing)
    if recipe.augmentation.mixes:
        _probe_soft_labels(recipe)
    check_accumulation(recipe.method, recipe.accumulation)

    def train_step(state, teacher_variables, batch):
        keys = jax.random.split(jax.random.fold_in(state.key, state.step))
        if recipe.accumulation == 1:
            inputs = _inputs(recipe, *keys, state, teacher_variables, batch)
        else:
            def of_part(_, part):
                first, rows = part
                return None, _inputs(
                    recipe, *(MicroBatchKey(key, first) for key in keys), state, teacher_variables, rows)

            firsts = jnp.arange(recipe.accumulation) * batch["labels"].shape[1]
            _, inputs = jax.lax.scan(of_part, None, (firsts, batch), unroll=loop_unroll())
        gradients, batch_stats, metrics = gradients_of(recipe, state, *inputs)
        if recipe.shard_state:
            # Or the partition of what they update would spread into the forward and backward pass.
            gradients, batch_stats = jax.lax.with_sharding_constraint((gradients, batch_stats), parallel.replicated(mesh))
        return update(recipe, state, gradients, batch_stats), metrics

    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings(recipe, mesh), parallel.replicated(mesh)))


def shardings(recipe: Recipe, mesh: jax.sharding.Mesh) -> TrainState:
    """Returns how the state of a run lies on the devices, a tree of shardings."""
    everywhere = parallel.replicated(mesh)
    shapes = jax.eval_shape(lambda: states.create(
        recipe.student, recipe.optimizer, jax.random.key(0), weight_average=recipe.averages))
    whole = jax.tree.map(lambda _: everywhere, shapes)
    if not recipe.shard_state:
        return whole
    return whole.replace(opt_state=parallel.state_shardings(shapes.opt_state, mesh),
                         average=parallel.state_shardings(shapes.average, mesh))


def _inputs(recipe, augment_key, attack_key, state, teacher_variables, batch) -> tuple[dict, dict, Array, Array | None]:
    """Returns what the gradient is taken on: the points by view, the teacher's outputs, the labels and the negatives'."""
    images, labels = augment(recipe, augment_key, batch)
    negatives, negative_labels = augment_negatives(recipe, augment_key, batch)
    views, teacher_clean = attack(
        recipe, attack_key, state, teacher_variables, images, labels, negatives, negative_labels)
    teacher = teacher_logits(recipe, teacher_variables, views, teacher_clean, labels, negative_labels)
    return views, teacher, labels, negative_labels


def augment(recipe: Recipe, key: Array, batch: dict[str, Array]) -> tuple[Array, Array]:
    """Returns the batch as (images float32 [batch, h, w, c] in [0, 1], labels), each example augmented by its own key.

    The labels are int32 [batch], as they came, where nothing is mixed, else float32 [batch, classes], rows that sum to 1.
    """
    images, labels = batch["images"], batch["labels"]
    if not recipe.augmentation.mixes:
        return augment_one_view(recipe, key, images), labels
    if not {"partners", "partner_labels"} <= set(batch):
        raise InputError(
            f'mixing "{recipe.augmentation.mixing}" takes a partner for each image, and the batch has {", ".join(batch)}; '
            'add "partners" and "partner_labels", such as a permutation of its images and labels')
    return augmenting.augment_pairs(
        recipe.augmentation, example_keys(key, images.shape[0]), images, labels, batch["partners"], batch["partner_labels"],
        recipe.student.classes)


def augment_one_view(recipe: Recipe, key: Array, images: Array) -> Array:
    """Returns images, uint8 or float32 [batch, h, w, c], as float32 in [0, 1], cropped, flipped and cut out of, never mixed."""
    return augmenting.augment(recipe.augmentation, example_keys(key, images.shape[0]), images)


# Folded into the key of the augmentation for the negatives': no position in a batch, whose keys are the images'.
_NEGATIVES = 2**31 - 1


def augment_negatives(recipe: Recipe, key: Array, batch: dict[str, Array]) -> tuple[Array, Array] | tuple[None, None]:
    """Returns the batch's (negatives float32 [batch, h, w, c] in [0, 1], their labels int32 [batch]), (None, None) for none.

    They are augmented independently of the images that they are negatives for, whose key they take, and never mixed.

    Raises:
      InputError: a batch without them, where the method has negatives.
    """
    if not recipe.method.negatives:
        return None, None
    if not {"negatives", "negative_labels"} <= set(batch):
        raise InputError(
            f'{recipe.method.name} takes a negative of another class for each image, and the batch has {", ".join(batch)}; '
            'add "negatives" and "negative_labels" (Source.negatives draws them), or, for path, set path_negatives to "batch"')
    negatives, labels = batch["negatives"], batch["negative_labels"]
    chex.assert_equal_shape([batch["images"], negatives])
    chex.assert_equal_shape([batch["labels"], labels])
    return augment_one_view(
        recipe, derived(key, lambda key: jax.random.fold_in(key, _NEGATIVES)), negatives), labels


def attack(
    recipe, key, state, teacher_variables, images, labels, negatives=None, negative_labels=None,
) -> tuple[dict[str, Array], Array | None]:
    """Returns the points of the batch by name (those of views, and what they follow from) and T(clean) where the attack
    needed it.
    """
    method = recipe.method
    variables = {"params": state.params, "batch_stats": state.batch_stats}

    def student(points, batch_norm_set=0):
        return _apply(recipe.student, variables, points, recipe.attack_batch_statistics, batch_norm_set)[0]

    teacher = teacher_clean = auxiliary = None
    if method.needs_teacher:
        def teacher(points):
            return recipe.teacher.apply(teacher_variables, points, train=False)[0]
    if method.attack.teacher_on_clean:
        teacher_clean = teacher(images)
    if method.batch_norm_sets > 1:
        def auxiliary(points):
            return student(points, batch_norm_set=1)
    context = Context(images, labels, student, teacher, teacher_clean, auxiliary, negatives, negative_labels)
    known = {"clean": images, **({} if negatives is None else {"negative": negatives})}
    known |= method.attack.generate(key, context, recipe.inner)
    return known | {view.name: view.points(known) for view in method.views}, teacher_clean


def teacher_logits(recipe, teacher_variables, views, teacher_clean, labels, negative_labels=None) -> dict[str, Array]:
    """Returns what the terms read of the teacher, by view: eval mode, no gradient, all logits in one forward.

    What the attack has already computed is not computed again. The views are interleaved per example rather than laid end
    to end, so that a batch sharded over "data" stays where it is.
    """
    def network(points):
        return recipe.teacher.apply(teacher_variables, points, train=False)[0]

    known = {} if teacher_clean is None else {"clean": teacher_clean}
    wanted = [view for view in recipe.method.teacher_views if view.name not in known]
    known |= _interleaved(network, {view.name: views[view.name] for view in wanted if view.readout is None})
    for view in wanted:
        if view.readout is not None:
            known[view.name] = view.readout(network, views[view.name], views, _labels_of(view, labels, negative_labels))
    return jax.lax.stop_gradient(known)


def gradients_of(
    recipe, state, views, teacher, labels, negative_labels=None,
) -> tuple[dict, dict, dict[str, Array]]:
    """Returns the gradient of the mean loss through every student view, the new BatchNorm statistics and the metrics.

    With `recipe.accumulation` the arrays have an axis of micro-batches in front. Each begins with the running statistics of the
    state, and the new ones are the mean of theirs: what one forward with a BatchNorm group for each would have come to.
    """
    method, progress = recipe.method, (state.step + 1) / recipe.steps

    def mean_loss(params, views, teacher, labels, negative_labels):
        batch_stats, student = state.batch_stats, {}
        for forwards in joint_forwards(recipe):
            first, moved = forwards[0][0], None
            # The views of a single forward are normalised together, those of several each by themselves.
            moves = tuple(forward[0].updates_statistics for forward in forwards) if len(forwards) > 1 else ()

            def network(points):
                nonlocal moved
                logits, moved = _apply(
                    recipe.student, {"params": params, "batch_stats": batch_stats}, points, True, first.batch_norm_set, moves)
                return logits

            if first.readout is not None:
                student[first.name] = first.readout(
                    network, views[first.name], views, _labels_of(first, labels, negative_labels))
                continue
            student |= _interleaved(network, {view.name: views[view.name] for forward in forwards for view in forward})
            batch_stats = moved if moves or first.updates_statistics else batch_stats
        targets = objectives.smooth_labels(labels, recipe.label_smoothing, recipe.student.classes)
        loss, terms = method.loss(student, teacher, targets, progress, negative_labels)
        metrics = {"loss": loss, **terms}
        metrics |= method.monitored(student, teacher, labels, negative_labels)
        metrics |= {f"weight/{name}": weight for name, weight in method.weights(progress).items()}
        true = {view.name: _labels_of(view, labels, negative_labels) for view in method.views if view.readout is None}
        for name, outputs in (("accuracy", student), ("teacher_accuracy", teacher)):
            metrics |= {f"{name}/{view}": objectives.correct(outputs[view], true[view]) for view in outputs if view in true}
        return jnp.mean(loss), (batch_stats, {name: jnp.mean(value) for name, value in metrics.items()})

    def mean_over_parts(function):
        inputs = (views, teacher, labels, negative_labels)
        if recipe.accumulation == 1:
            return function(*inputs)

        def add(total, part):
            return jax.tree.map(jnp.add, total, function(*part)), None

        shapes = jax.eval_shape(lambda: function(*jax.tree.map(lambda leaf: leaf[0], inputs)))
        zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, inputs, unroll=loop_unroll())
        return jax.tree.map(lambda leaf: leaf / recipe.accumulation, total)

    params = state.params
    if method.weight_perturbation is not None:
        ascent = mean_over_parts(lambda *part: jax.grad(lambda params: mean_loss(params, *part)[0])(state.params))
        params = perturb_weights(params, ascent, method.weight_perturbation.size(progress))
    gradients, (batch_stats, metrics) = mean_over_parts(lambda *part: jax.grad(mean_loss, has_aux=True)(params, *part))
    return gradients, batch_stats, metrics | {"gradient_norm": optax.tree.norm(gradients)}


def _probe_soft_labels(recipe: Recipe) -> None:
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


def _labels_of(view: View, labels: Array, negative_labels: Array | None) -> Array:
    return negative_labels if view.labels == "negative_labels" else labels


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


def _apply(
    model: Model, variables: dict, points: Array, train: bool, batch_norm_set: int, views: tuple[bool, ...] = (),
) -> tuple[Array, dict]:
    """A model that has one set of BatchNorm, or does not take several views, need not know of others."""
    further = {"batch_norm_set": batch_norm_set} if batch_norm_set else {}
    return model.apply(variables, points, train, **further, **({"views": views} if views else {}))


def _interleaved(network, points: dict[str, Array]) -> dict[str, Array]:
    """Returns network(points) by name, computed in one forward of all of them, interleaved per example."""
    if len(points) < 2:
        return {name: network(value) for name, value in points.items()}
    stacked = jnp.stack(list(points.values()), axis=1)
    batch, count, *image = stacked.shape
    outputs = network(stacked.reshape(batch * count, *image)).reshape(batch, count, -1)
    return {name: outputs[:, index] for index, name in enumerate(points)}


def update(recipe, state, gradients, batch_stats) -> TrainState:
    """Returns the state after the optimiser's step and the weight average's."""
    updates, opt_state = recipe.optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if average is not None:
        newest = {"params": params, "batch_stats": batch_stats}
        rate = recipe.snapshots.rate(state.step + 1) if recipe.snapshots else 1 - recipe.weight_average
        average = optax.incremental_update(newest, average, rate)
    return state.replace(
        step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state, average=average)
