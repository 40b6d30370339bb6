"""What the step makes of views that are more than a forward: BatchNorm sets, joint forwards, readouts other than logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrd import ThreatModel, distillation, models
from jaxrd.distillation.catalogue import BASES
from jaxrd.training import parallel, step, state as states

pytestmark = pytest.mark.usefixtures("quick_compilation")

BATCH, SHAPE, CLASSES = 16, (4, 4, 1), 4
INNER = distillation.InnerMaximisation(ThreatModel("linf", 0.1), 0.05, 3)


def dense(width, batch_norm_sets=1) -> models.Model:
    """A two-layer network with BatchNorm: quick to compile, smooth, and with everything that a step looks at."""

    def init(key):
        first, second = jax.random.split(key)
        params = {"first": jax.random.normal(first, (16, width)) / 2, "scale": jnp.ones((batch_norm_sets, width)),
                  "second": jax.random.normal(second, (width, CLASSES)) / 2}
        return {"params": params, "batch_stats": {"mean": jnp.zeros((batch_norm_sets, width))}}

    def apply(variables, images, train, batch_norm_set=0):
        params, mean = variables["params"], variables["batch_stats"]["mean"]
        hidden = images.reshape(len(images), -1) @ params["first"]
        batch_mean = jnp.mean(hidden, axis=0)
        moved = mean.at[batch_norm_set].set(0.9 * mean[batch_norm_set] + 0.1 * batch_mean) if train else mean
        hidden = hidden - (batch_mean if train else mean[batch_norm_set])
        return jnp.tanh(hidden * params["scale"][batch_norm_set]) @ params["second"], {"mean": moved}

    return models.Model(f"dense{width}", CLASSES, SHAPE, init, apply, {})


@functools.cache
def setting(name, **options):
    """(recipe, state, teacher's variables, batch) of the first step of a method."""
    method = distillation.method(name, **{"path_points": 3} | options)
    recipe = step.Recipe(
        method, dense(8, method.batch_norm_sets), dense(6) if method.needs_teacher else None, INNER,
        optax.sgd(0.1), steps=4)
    state = states.create(recipe.student, recipe.optimizer, jax.random.key(0), weight_average=False)
    generator = np.random.default_rng(0)
    batch = {"images": generator.uniform(size=(BATCH, *SHAPE)).astype(np.float32),
             "labels": generator.integers(0, CLASSES, BATCH).astype(np.int32)}
    if method.negatives:
        batch["negatives"] = generator.uniform(size=(BATCH, *SHAPE)).astype(np.float32)
        batch["negative_labels"] = ((batch["labels"] + generator.integers(1, CLASSES, BATCH)) % CLASSES).astype(np.int32)
    return recipe, state, dense(6).init(jax.random.key(1)), batch


def gradients(recipe, state, teacher_variables, batch):
    images, labels, negatives, negative_labels = (
        None if name not in batch else jnp.asarray(batch[name])
        for name in ("images", "labels", "negatives", "negative_labels"))
    views, clean = step.attack(
        recipe, jax.random.key(2), state, teacher_variables, images, labels, negatives, negative_labels)
    teacher = step.teacher_logits(recipe, teacher_variables, views, clean, labels, negative_labels)
    return views, *step.gradients_of(recipe, state, views, teacher, labels, negative_labels)


@pytest.mark.parametrize("name", [
    *(pytest.param(base, marks=pytest.mark.slow) for base in BASES), *(f"{base}+igdm" for base in BASES),
    "path+igdm+jvp+direct+awp", *(pytest.param(name, marks=pytest.mark.slow) for name in (
        "ard+jvp", "ard+direct", "rslad+igdm+awp"))])
def test_every_method_takes_two_steps_on_its_one_step(name):
    recipe, state, teacher_variables, batch = setting(name)
    mesh = parallel.data_mesh(jax.devices()[:1])
    state = jax.tree.map(jnp.copy, state)
    before = jax.tree.map(np.asarray, state.params)
    train_step = step.make_train_step(recipe, mesh)
    for _ in range(2):
        state, metrics = train_step(
            state, teacher_variables if recipe.teacher else None, parallel.put_batch(batch, mesh))
    assert all(np.isfinite(value) for value in metrics.values())
    for term in recipe.method.terms:
        assert {term.name, f"weight/{term.name}"} <= set(metrics)
    total = sum(metrics[term.name] * metrics[f"weight/{term.name}"] for term in recipe.method.terms)
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)
    for view in recipe.method.teacher_views:
        assert (f"teacher_accuracy/{view.name}" in metrics) == (view.readout is None)
    assert metrics["accuracy/adversarial"] <= 1
    moved = jax.tree.map(lambda old, new: np.max(np.abs(old - np.asarray(new))), before, state.params)
    assert moved["first"] > 1e-6 and moved["second"] > 1e-6


# BatchNorm sets.


@pytest.mark.parametrize("negatives, start", [("data", "negative"), ("batch", "clean")])
def test_each_branch_of_path_has_its_statistics_and_its_parameters(negatives, start):
    recipe, state, teacher_variables, batch = setting("path", path_negatives=negatives)
    views, moved_by, statistics, metrics = gradients(recipe, state, teacher_variables, batch)
    first = state.params["first"]

    def running(*names):
        mean = jnp.zeros(8)
        for name in names:
            mean = 0.9 * mean + 0.1 * jnp.mean(views[name].reshape(BATCH, -1) @ first, axis=0)
        return mean

    # Starts and last points move them, the points between do not.
    np.testing.assert_allclose(statistics["mean"][0], running("adversarial", "clean"), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(statistics["mean"][1], running("targeted/3", start), rtol=1e-4, atol=1e-6)
    assert np.all(np.any(moved_by["scale"] != 0, axis=1))


def test_path_without_a_targeted_branch_has_one_set():
    assert distillation.method("path", path_gamma=0.0).batch_norm_sets == 1
    assert distillation.method("path", path_dual_batch_norm=False).batch_norm_sets == 1
    assert distillation.method("path").batch_norm_sets == 2


def test_the_targeted_attack_looks_through_the_second_set():
    recipe, state, teacher_variables, batch = setting("path")
    changed = state.replace(params=state.params | {"scale": state.params["scale"].at[1].set(-1.0)})
    before, after = (gradients(recipe, each, teacher_variables, batch)[0] for each in (state, changed))
    np.testing.assert_array_equal(before["adversarial"], after["adversarial"])
    assert np.max(np.abs(before["targeted/3"] - after["targeted/3"])) > 0.05


def test_points_that_go_together_share_their_batch_statistics():
    outputs = {}
    for batching in ("joint", "separate"):
        recipe, state, teacher_variables, batch = setting("path", path_batching=batching, path_statistics=True)
        views, _, statistics, _ = gradients(recipe, state, teacher_variables, batch)
        outputs[batching] = statistics["mean"][0]
        hidden = {name: jnp.mean(views[name].reshape(BATCH, -1) @ state.params["first"], axis=0)
                  for name in ("clean", "path/1", "path/2", "adversarial")}
        between = [(hidden["path/1"] + hidden["path/2"]) / 2] if batching == "joint" else [hidden["path/1"], hidden["path/2"]]
        expected = jnp.zeros(8)
        for mean in (*between, hidden["adversarial"], hidden["clean"]):
            expected = 0.9 * expected + 0.1 * mean
        np.testing.assert_allclose(outputs[batching], expected, rtol=1e-4, atol=1e-6)
    assert [len(forward) for forward in distillation.method("path", path_points=3).student_forwards] == [2, 1, 1, 2, 1, 1]


# Readouts.


def networks(recipe, state, teacher_variables, params=None):
    def student(points):
        return recipe.student.apply({"params": params or state.params, "batch_stats": state.batch_stats}, points, True)[0]

    return student, lambda points: recipe.teacher.apply(teacher_variables, points, False)[0]


def test_the_jvp_term_is_the_exact_directional_matching():
    recipe, state, teacher_variables, batch = setting("ard+jvp")
    views, _, statistics, metrics = gradients(recipe, state, teacher_variables, batch)
    expected = distillation.jvp_matching(
        *networks(recipe, state, teacher_variables), views["clean"], views["adversarial"] - views["clean"])
    np.testing.assert_allclose(metrics["jvp"], jnp.mean(expected), rtol=1e-5)
    # It leaves the running statistics alone, and is no view with an accuracy.
    np.testing.assert_allclose(
        statistics["mean"][0], 0.1 * jnp.mean(views["adversarial"].reshape(BATCH, -1) @ state.params["first"], axis=0),
        rtol=1e-4, atol=1e-6)
    assert "accuracy/jvp" not in metrics


def test_the_jvp_term_is_the_limit_of_igdm_in_the_step():
    """Train-mode forwards included: the derivative goes through the batch statistics."""
    small = distillation.InnerMaximisation(ThreatModel("linf", 0.002), 0.001, 3)
    found = {}
    for module in ("igdm", "jvp"):
        recipe, state, teacher_variables, batch = setting(f"ard+{module}")
        recipe = dataclasses.replace(recipe, inner=small)
        found[module] = gradients(recipe, state, teacher_variables, batch)[3][module]
    np.testing.assert_allclose(found["igdm"], found["jvp"], rtol=0.02)


@pytest.mark.parametrize("scalar", ["probability", "logit", "cross_entropy"])
@pytest.mark.parametrize("distance", ["l2", "squared_l2", "cosine"])
@pytest.mark.parametrize("at", ["clean", "adversarial"])
def test_the_direct_term_is_gradient_matching(scalar, distance, at):
    recipe, state, teacher_variables, batch = setting(
        "ard+direct", direct_scalar=scalar, direct_distance=distance, direct_at=at)
    views, _, _, metrics = gradients(recipe, state, teacher_variables, batch)
    expected = distillation.gradient_matching(
        *networks(recipe, state, teacher_variables), views[at], batch["labels"], scalar=scalar, distance=distance)
    np.testing.assert_allclose(metrics["direct"], jnp.mean(expected), rtol=1e-5)


def test_double_backprop_agrees_with_finite_differences():
    recipe, state, teacher_variables, batch = setting("ard+direct")
    with jax.enable_x64(True):
        cast = functools.partial(jax.tree.map, lambda x: jnp.asarray(np.asarray(x), jnp.float64))
        params, teacher_variables, images = cast(state.params), cast(teacher_variables), cast(batch["images"])
        state = state.replace(batch_stats=cast(state.batch_stats))

        def loss(params):
            student, teacher = networks(recipe, state, teacher_variables, params)
            return jnp.mean(distillation.gradient_matching(student, teacher, images, batch["labels"]))

        direction = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(1).normal(size=x.shape)), params)
        along = optax.tree.vdot(jax.grad(loss)(params), direction)

        def moved(h):
            return float(loss(jax.tree.map(lambda x, d: x + h * d, params, direction)))

        numeric = (moved(1e-5) - moved(-1e-5)) / 2e-5
        assert abs(numeric) > 1e-4
        np.testing.assert_allclose(float(along), numeric, rtol=1e-5)


def test_gradient_matching_is_zero_and_has_a_gradient_where_both_agree():
    recipe, state, _, batch = setting("ard+direct")
    variables = {"params": state.params, "batch_stats": state.batch_stats}

    def network(params):
        return lambda points: recipe.student.apply(variables | {"params": params}, points, False)[0]

    for distance in ("l2", "squared_l2", "cosine"):
        def loss(params):
            return jnp.mean(distillation.gradient_matching(
                network(params), network(state.params), jnp.asarray(batch["images"]), batch["labels"], distance=distance))

        value, gradient = jax.value_and_grad(loss)(state.params)
        assert abs(float(value)) < 1e-5
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
