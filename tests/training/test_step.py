"""One step for every method: the published update, computed once, the same on any number of devices."""

import collections
import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrd import attacks, distillation, models
from jaxrd.config import OptimizerConfig
from jaxrd.data.augment import Augmentation
from jaxrd.models.resnet import BasicBlock, ResNet
from jaxrd.threat import ThreatModel
from jaxrd.training import parallel, schedule, state as states, step

pytestmark = pytest.mark.usefixtures("quick_compilation")

METHODS = ["pgd_at", "rslad", "ard+igdm", *(pytest.param(name, marks=pytest.mark.slow) for name in (
    "ard", "dgad+igdm", "iad", "path", "path of the batch", "ard+jvp", "ard+direct", "pgd_at+awp"))]
BATCH, STEPS, RATE, ALPHA, DECAY = 16, 5, 0.05, 30.0, 0.8
THREAT, STEP_SIZE = ThreatModel(epsilon=0.1), 0.05


def small(width) -> models.Model:
    """A ResNet with one block, half of the smallest that has a name: what costs time here is compilation."""
    module, shape = ResNet((1,), width, BasicBlock, 10, jnp.float32), (8, 8, 1)

    def apply(variables, images, train):
        if not train:
            return module.apply(variables, images, train=False), variables["batch_stats"]
        logits, moved = module.apply(variables, images, train=True, mutable=["batch_stats"])
        return logits, moved["batch_stats"]

    init = jax.jit(lambda key: dict(module.init(key, jnp.zeros((1, *shape)), train=False)))
    return models.Model(f"small{width}", 10, shape, init, apply, {})


STUDENT, TEACHER = small(4), small(6)


def recipe_of(name="ard+igdm", mirrored_statistics=False, **options) -> step.Recipe:
    """Recipes differ in little, so that one compiled program serves several tests."""
    name, _, of_the_batch = name.partition(" ")
    method = distillation.method(
        name, igdm=ALPHA if "igdm" in name else None, mirrored_statistics=mirrored_statistics, path_points=2,
        path_negatives="batch" if of_the_batch else "data")
    student = STUDENT
    if method.batch_norm_sets > 1:
        student = models.create("resnet6_w4", classes=10, image_shape=(8, 8, 1), batch_norm_sets=method.batch_norm_sets)
    values = {
        "method": method, "student": student, "teacher": TEACHER if method.needs_teacher else None,
        "inner": distillation.InnerMaximisation(THREAT, STEP_SIZE, 2),
        "optimizer": schedule.optimizer(OptimizerConfig(learning_rate=RATE, nesterov=True), STEPS), "steps": STEPS,
        "augmentation": Augmentation(shift=1, flip=True), "weight_average": DECAY}
    return step.Recipe(**values | options)


@functools.cache
def teacher_variables():
    """A teacher with statistics that are not the initial ones, and gradients worth matching."""
    variables, apply = TEACHER.init(jax.random.key(7)), jax.jit(TEACHER.apply, static_argnums=2)
    for index in range(5):
        _, batch_stats = apply(variables, jnp.asarray(batch(index)["images"] / np.float32(255)), True)
        variables = variables | {"batch_stats": batch_stats}
    return variables


def batch(index=0, negatives=False) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(index)
    # Images of one class are alike, so that there is something to learn and the statistics are no accident.
    labels = generator.integers(0, 10, BATCH).astype(np.int32)
    rows = {"images": images_of(labels, generator), "labels": labels}
    if negatives:
        others = ((labels + generator.integers(1, 10, BATCH)) % 10).astype(np.int32)
        rows |= {"negatives": images_of(others, generator), "negative_labels": others}
    return rows


def images_of(labels, generator) -> np.ndarray:
    means = np.random.default_rng(99).uniform(0, 255, (10, 8, 8, 1))[labels]
    return np.clip(means + generator.normal(0, 30, means.shape), 0, 255).astype(np.uint8)


def fresh(recipe, mesh, seed=0):
    """The state before the first step and the teacher's variables, as the loop places them."""
    state = states.create(
        recipe.student, recipe.optimizer, jax.random.key(seed), weight_average=recipe.weight_average > 0)
    variables = teacher_variables() if recipe.teacher else None
    # A copy: the state is donated.
    state = jax.tree.map(jnp.copy, state)
    return jax.device_put((state, variables), parallel.replicated(mesh))


def one_device():
    return parallel.data_mesh(jax.devices()[:1])


def run(recipe, mesh, steps=1):
    """States (host copies, the initial one first) and metrics of some steps."""
    state, variables = fresh(recipe, mesh)
    train_step, history, metrics = step.make_train_step(recipe, mesh), [jax.tree.map(np.asarray, _arrays(state))], []
    for index in range(steps):
        rows = batch(index, recipe.method.negatives)
        state, measured = train_step(state, variables, parallel.put_batch(rows, mesh))
        # On fake CPU devices two steps in flight wait for each other for ever.
        jax.block_until_ready((state, measured))
        history.append(jax.tree.map(np.asarray, _arrays(state)))
        metrics.append({name: float(value) for name, value in measured.items()})
    return history, metrics


def _arrays(state):
    return {name: getattr(state, name) for name in ("step", "params", "batch_stats", "opt_state", "average")}


def inputs(recipe):
    """What the first step sees: the state, augmented images, labels, and the key of its attack."""
    state, _ = fresh(recipe, one_device())
    augment_key, attack_key = jax.random.split(jax.random.fold_in(state.key, 0))
    images, labels = jax.jit(lambda key, batch: step.augment(recipe, key, batch))(augment_key, batch())
    return state, images, labels, attack_key


# What a step computes.


def test_a_step_of_ard_with_igdm_is_the_plain_computation():
    """The paper's step written a second time, without views, terms or methods."""
    recipe = recipe_of("ard+igdm")
    state, images, labels, attack_key = inputs(recipe)
    teacher = teacher_variables()
    log_softmax = jax.nn.log_softmax

    def student_eval(x):
        return STUDENT.apply({"params": state.params, "batch_stats": state.batch_stats}, x, False)[0]

    def cross_entropy(x):
        return -log_softmax(student_eval(x))[jnp.arange(BATCH), labels]

    def kl(target, logits):
        target = log_softmax(target)
        return jnp.sum(jnp.exp(target) * (target - log_softmax(logits)), -1).mean()

    adversarial = jax.jit(lambda key, x: attacks.pgd(
        key, cross_entropy, x, threat=THREAT, step_size=STEP_SIZE, steps=2, start="uniform"))(attack_key, images)
    mirrored = images - (adversarial - images)
    assert mirrored.min() < 0  # nobody has clipped it
    teacher_eval = jax.jit(lambda x: TEACHER.apply(teacher, x, False)[0])
    t_clean, t_plus, t_minus = (teacher_eval(x) for x in (images, adversarial, mirrored))

    def loss(params):
        def forward(x):
            return STUDENT.apply({"params": params, "batch_stats": state.batch_stats}, x, True)
        (s_plus, statistics), (s_minus, _) = forward(adversarial), forward(mirrored)
        distillation_loss, igdm_loss = kl(t_clean, s_plus), kl(t_plus - t_minus, s_plus - s_minus)
        return distillation_loss + ALPHA / STEPS * igdm_loss, (distillation_loss, igdm_loss, statistics)

    (total, (distilled, igdm, statistics)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.params)
    optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(RATE, momentum=0.9, nesterov=True))
    updates, _ = optimizer.update(gradients, optimizer.init(state.params), state.params)
    params = optax.apply_updates(state.params, updates)

    (before, after), (metrics,) = run(recipe, one_device())
    assert igdm * ALPHA / STEPS > 0.01 * distilled  # the term is no rounding error of the loss
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)
    np.testing.assert_allclose(metrics["distillation"], distilled, rtol=1e-5)
    np.testing.assert_allclose(metrics["igdm"], igdm, rtol=1e-4)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(gradients), rtol=1e-4)
    chex.assert_trees_all_close(after["params"], params, atol=1e-6, rtol=1e-5)
    chex.assert_trees_all_close(after["batch_stats"], statistics, atol=1e-6, rtol=1e-5)
    average = jax.tree.map(
        lambda old, new: DECAY * old + (1 - DECAY) * new, {"params": before["params"], "batch_stats": before["batch_stats"]},
        {"params": params, "batch_stats": statistics})
    chex.assert_trees_all_close(after["average"], average, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("blocked", ["adversarial", "mirrored"])
def test_the_gradient_flows_through_every_student_view(blocked):
    recipe = recipe_of()
    state, images, labels, attack_key = inputs(recipe)
    # The attack is beside the point here.
    noise = 0.1 * jnp.sign(jax.random.normal(attack_key, images.shape))
    views = {"clean": images, "adversarial": images + noise, "mirrored": images - noise}
    teacher = jax.jit(lambda views: step.teacher_logits(recipe, teacher_variables(), views, None, labels))(views)
    order = [view.name for view in recipe.method.student_views]

    calls = []
    def apply(variables, x, train):
        logits, moved = STUDENT.apply(variables, x, train)
        calls.append(order[len(calls)])
        return (jax.lax.stop_gradient(logits) if calls[-1] == blocked else logits), moved

    def gradients(recipe):
        return jax.jit(lambda state: step.gradients_of(recipe, state, views, teacher, labels)[0])(state)

    whole = gradients(recipe)
    without = gradients(dataclasses.replace(recipe, student=dataclasses.replace(STUDENT, apply=apply)))
    assert calls == order
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, whole, without))
    assert difference > 0.05 * optax.tree.norm(whole)


def test_the_igdm_weight_ramps_up_to_alpha_over_the_steps():
    _, metrics = run(recipe_of(), one_device(), STEPS)
    for k, measured in enumerate(metrics):
        weight = (measured["loss"] - measured["distillation"]) / measured["igdm"]
        np.testing.assert_allclose(weight, ALPHA * (k + 1) / STEPS, rtol=2e-3)


def test_the_weight_average_follows_its_decay_and_begins_at_the_initial_weights():
    history, _ = run(recipe_of(), one_device(), 3)
    average = {"params": history[0]["params"], "batch_stats": history[0]["batch_stats"]}
    chex.assert_trees_all_equal(history[0]["average"], average)
    for after in history[1:]:
        newest = {"params": after["params"], "batch_stats": after["batch_stats"]}
        average = jax.tree.map(lambda old, new: DECAY * old + (1 - DECAY) * new, average, newest)
        chex.assert_trees_all_close(after["average"], average, rtol=1e-5, atol=1e-6)


def test_without_a_weight_average_there_is_none():
    recipe = recipe_of("pgd_at", weight_average=0.0)
    state, _ = fresh(recipe, one_device())
    after = jax.eval_shape(lambda state: step.update(recipe, state, state.params, state.batch_stats), state)
    assert state.average is None and after.average is None
    assert state.variables == {"params": state.params, "batch_stats": state.batch_stats}


# BatchNorm.


@pytest.mark.parametrize("name, mirrored, moving", [
    ("pgd_at", False, ["adversarial"]),
    ("ard+igdm", False, ["adversarial"]),
    ("ard+igdm", True, ["adversarial", "mirrored"]),
    ("rslad+igdm", False, ["adversarial", "clean"]),
    ("rslad+igdm", True, ["adversarial", "clean", "mirrored"]),
])
def test_running_statistics_move_once_per_view_that_updates_them(name, mirrored, moving):
    recipe = recipe_of(name, mirrored_statistics=mirrored)
    state, images, labels, attack_key = inputs(recipe)

    @jax.jit
    def statistics(state, variables):
        views, teacher_clean = step.attack(recipe, attack_key, state, variables, images, labels)
        teacher = step.teacher_logits(recipe, variables, views, teacher_clean, labels)
        return views, step.gradients_of(recipe, state, views, teacher, labels)[1]

    views, moved = statistics(state, teacher_variables() if recipe.teacher else None)
    expected = state.batch_stats
    for view in moving:
        # From zero statistics, 0.9 * 0 + 0.1 * batch.
        zeros = jax.tree.map(jnp.zeros_like, state.batch_stats)
        _, tenth = STUDENT.apply({"params": state.params, "batch_stats": zeros}, views[view], True)
        expected = jax.tree.map(lambda running, tenth: 0.9 * running + tenth, expected, tenth)
    chex.assert_trees_all_close(moved, expected, rtol=1e-5, atol=1e-6)

    # The first layer without the model's help.
    mean = np.asarray(state.batch_stats["bn1"]["mean"])
    for view in moving:
        out = jax.lax.conv_general_dilated(
            views[view], state.params["conv1"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        mean = 0.9 * mean + 0.1 * np.mean(out, axis=(0, 1, 2))
    np.testing.assert_allclose(moved["bn1"]["mean"], mean, rtol=1e-4, atol=1e-6)


def test_batch_statistics_in_the_attack_change_its_points_and_not_the_running_statistics():
    points, means = {}, {}
    for option in (False, True):
        recipe = recipe_of("pgd_at", attack_batch_statistics=option)
        state, images, labels, attack_key = inputs(recipe)
        views, _ = step.attack(recipe, attack_key, state, None, images, labels)
        points[option] = views["adversarial"]
        _, moved, _ = step.gradients_of(recipe, state, views, {}, labels)
        means[option] = moved["bn1"]["mean"]
        out = jax.lax.conv_general_dilated(
            views["adversarial"], state.params["conv1"]["kernel"], (1, 1), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"))
        # Initial statistics are 0: one tenth of the one batch that moved them.
        np.testing.assert_allclose(means[option], 0.1 * np.mean(out, axis=(0, 1, 2)), rtol=1e-4, atol=1e-6)
    assert np.mean(np.abs(points[True] - points[False]) > 0.01) > 0.05


# What it costs: forwards, compilations, copies, communication.


def counted(recipe):
    """The recipe with models that note every train-mode student forward and every teacher forward, while it is traced."""
    calls = collections.defaultdict(list)

    def counting(model, name):
        def apply(variables, images, train):
            # The inner maximisation runs the student in eval mode.
            if train or name == "teacher":
                calls[name].append(images.shape[0] // BATCH)
            return model.apply(variables, images, train)
        return dataclasses.replace(model, apply=apply)

    teacher = recipe.teacher and counting(recipe.teacher, "teacher")
    return dataclasses.replace(recipe, student=counting(recipe.student, "student"), teacher=teacher), calls


@pytest.mark.parametrize("name, student, teacher", [
    ("pgd_at", [1], []),
    ("ard", [1], [1]),
    ("rslad", [1, 1], [1]),  # T(x) serves the attack and both terms
    ("ard+igdm", [1, 1], [3]),
    ("rslad+igdm", [1, 1, 1], [1, 2]),  # T(x) before the attack, T(x + d) and T(x - d) together after it
])
def test_every_view_is_forwarded_once(name, student, teacher):
    recipe, calls = counted(recipe_of(name))
    mesh = one_device()
    state, variables = fresh(recipe, mesh)
    jax.eval_shape(step.make_train_step(recipe, mesh), state, variables, parallel.put_batch(batch(), mesh))
    assert calls["student"] == student
    assert calls["teacher"] == teacher


@pytest.mark.parametrize("devices", [1, 4])
def test_the_step_is_traced_once_and_its_state_donated(devices):
    recipe, calls = counted(recipe_of())
    mesh = parallel.data_mesh(jax.devices()[:devices])
    state, variables = fresh(recipe, mesh)
    expected = jax.tree.map(np.asarray, variables)
    train_step = step.make_train_step(recipe, mesh)
    for index in range(3):
        old = state
        state, metrics = train_step(state, variables, parallel.put_batch(batch(index), mesh))
        jax.block_until_ready((state, metrics))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
        assert int(state.step) == index + 1
    assert calls == {"student": [1, 1], "teacher": [3]}
    assert all(value.shape == () for value in metrics.values())
    # The teacher is neither donated nor trained.
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, variables), expected)


@pytest.mark.parametrize("name", ["ard+igdm", "rslad+igdm"])
def test_no_gradient_reaches_the_teacher(name):
    recipe = recipe_of(name)
    state, images, labels, attack_key = inputs(recipe)

    def loss(variables):
        views, teacher_clean = step.attack(recipe, attack_key, state, variables, images, labels)
        teacher = step.teacher_logits(recipe, variables, views, teacher_clean, labels)
        _, _, metrics = step.gradients_of(recipe, state, views, teacher, labels)
        return metrics["loss"]

    # Not through the logits, and not through the attack that read them.
    gradients = jax.jit(jax.grad(loss))(teacher_variables())
    assert optax.tree.norm(gradients) == 0


@pytest.mark.parametrize("name", METHODS)
def test_one_device_and_four_are_the_same_run(name):
    # Adversarial training amplifies rounding: sooner or later a sign of some gradient differs, and then all does.
    steps = 4 if name in ("pgd_at", "rslad", "ard+igdm") else 2
    one, one_metrics = run(recipe_of(name), one_device(), steps)
    four, four_metrics = run(recipe_of(name), parallel.data_mesh(), steps)
    for a, b in zip(one_metrics, four_metrics, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    chex.assert_trees_all_close(one[-1], four[-1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_four_devices_exchange_sums_and_nothing_else(name, record_property):
    recipe, mesh = recipe_of(name), parallel.data_mesh()
    state, variables = fresh(recipe, mesh)
    rows = parallel.put_batch(batch(0, recipe.method.negatives), mesh)
    lowered = step.make_train_step(recipe, mesh).lower(state, variables, rows)
    program = lowered.compile().as_text()
    exchanged = collections.defaultdict(list)
    for shape, kind in re.findall(
            r"= (\S+) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", program):
        exchanged[kind].append(shape)
    record_property("all_reduces", len(exchanged["all-reduce"]))
    assert exchanged.pop("all-reduce")
    if name == "path of the batch":  # who is whose negative takes everybody's label; never their images
        assert {re.sub(r"{.*", "", shape) for shape in exchanged.pop("all-gather")} <= {f"s32[{BATCH}]", f"f32[{BATCH}]"}
    assert not exchanged
