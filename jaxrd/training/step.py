"""The one train step: every method, one compiled, donated, data-parallel program for the global batch.

    batch -> augment -> attack -> views -> student and teacher logits per view -> sum of weighted terms
          -> gradient -> optimiser -> weight average

The pieces are functions of their own, so that a benchmark can time each and a test can look inside; `make_train_step` puts
them together. Nothing here names a device axis: the compiler partitions the program over the mesh, and BatchNorm statistics
and means are those of the global batch on any number of devices.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax

from jaxrd import compilation, objectives
from jaxrd.attacks import loop_unroll
from jaxrd.data import augment as augmenting
from jaxrd.distillation.composition import check_accumulation, check_label_smoothing, check_mixing
from jaxrd.distillation.inner_maximisation import Context
from jaxrd.distillation.views import View
from jaxrd.distillation.weight_perturbation import perturb_weights
from jaxrd.errors import InputError
from jaxrd.models.zoo import Model
from jaxrd.threat import MicroBatchKey, derived, example_keys
from jaxrd.training import parallel
from jaxrd.training.recipe import Recipe, joint_forwards, probe_soft_labels
from jaxrd.training.state import TrainState

Array = jax.Array


def make_train_step(recipe: Recipe, mesh: jax.sharding.Mesh) -> Callable:
    """Returns the compiled step `(state, teacher_variables, batch) -> (state, metrics)`.

    The state is donated. `batch` is {"images": uint8 or float32 [batch, h, w, c], "labels": int32 [batch]}, sharded over
    "data", and where the recipe mixes also "partners" and "partner_labels", shaped likewise: a permutation of the batch, made
    before it is sharded, so that no image crosses devices here. Where the method has negatives, it also has "negatives" and
    "negative_labels", shaped likewise: an image of another class for each. With "teacher_clean", float32 [batch, classes], the
    teacher's logits on the batch's images as they are after augmentation, it is not asked for them again. teacher_variables is
    None without a teacher.
    With `accumulation` every array has a first axis of that many micro-batches, [accumulation, batch / accumulation, ...], and
    is sharded over "data" along the second (`parallel.sharded`). Metrics are scalars: means over the global batch.

    Raises:
      InputError: a method that cannot take the soft labels of mixed images, or smooth ones, or whose attack takes negatives
        from the batch and would find them in a micro-batch only.
    """
    check_mixing(recipe.method, recipe.augmentation)
    check_label_smoothing(recipe.method, recipe.label_smoothing)
    if recipe.augmentation.mixes:
        probe_soft_labels(recipe)
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

    return compilation.jit(
        train_step, donate_argnums=0, out_shardings=(shardings(recipe, mesh), parallel.replicated(mesh)))


def shardings(recipe: Recipe, mesh: jax.sharding.Mesh) -> TrainState:
    """Returns how the state of a run lies on the devices, a tree of shardings."""
    everywhere = parallel.replicated(mesh)
    shapes = recipe.state_shapes
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
        recipe, attack_key, state, teacher_variables, images, labels, negatives, negative_labels, batch.get("teacher_clean"))
    teacher = teacher_logits(recipe, teacher_variables, views, teacher_clean, labels, negative_labels)
    return views, teacher, labels, negative_labels


# The names that the parts of a step have in a trace, and in the metadata of its compiled program.
SCOPES = ("augmentation", "attack", "teacher", "student", "optimiser")


@jax.named_scope("augmentation")
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


@jax.named_scope("augmentation")
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


@jax.named_scope("attack")
def attack(
    recipe, key, state, teacher_variables, images, labels, negatives=None, negative_labels=None, teacher_clean=None,
) -> tuple[dict[str, Array], Array | None]:
    """Returns the points of the batch by name (those of views, and what they follow from) and T(clean), [batch, classes], as
    it was given, or where the attack needed it; else None.
    """
    method = recipe.method
    variables = {"params": state.params, "batch_stats": state.batch_stats}

    def student(points, batch_norm_set=0):
        return _apply(attacked, variables, points, recipe.attack_batch_statistics, batch_norm_set)[0]

    attacked, teacher, auxiliary = recipe.attacked_student, None, None
    if method.needs_teacher:
        attacked_teacher = recipe.attacked_teacher

        def teacher(points):
            return attacked_teacher.apply(teacher_variables, points, train=False)[0]
    if method.attack.teacher_on_clean and teacher_clean is None:
        teacher_clean = recipe.teacher.apply(teacher_variables, images, train=False)[0]  # a term may read it too
    if method.batch_norm_sets > 1:
        def auxiliary(points):
            return student(points, batch_norm_set=1)
    context = Context(images, labels, student, teacher, teacher_clean, auxiliary, negatives, negative_labels)
    known = {"clean": images, **({} if negatives is None else {"negative": negatives})}
    known |= method.attack.generate(key, context, recipe.inner)
    return known | {view.name: view.points(known) for view in method.views}, teacher_clean


@jax.named_scope("teacher")
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
    method, progress, trained = recipe.method, (state.step + 1) / recipe.steps, recipe.trained_student

    @jax.named_scope("student")
    def mean_loss(params, views, teacher, labels, negative_labels):
        batch_stats, student = state.batch_stats, {}
        for forwards in joint_forwards(recipe):
            first, moved = forwards[0][0], None
            # The views of a single forward are normalised together, those of several each by themselves.
            moves = tuple(forward[0].updates_statistics for forward in forwards) if len(forwards) > 1 else ()

            def network(points):
                nonlocal moved
                logits, moved = _apply(
                    trained, {"params": params, "batch_stats": batch_stats}, points, True, first.batch_norm_set, moves)
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


def _labels_of(view: View, labels: Array, negative_labels: Array | None) -> Array:
    return negative_labels if view.labels == "negative_labels" else labels


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


@jax.named_scope("optimiser")
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
