"""What a step computes: forwards and backwards of both networks, counted, against the least that each method needs.

With K attack steps. The published code's counts stand beside (reference: the official repositories; for IGDM its own scripts):

    method         here: student in the attack, after it; teacher     published: after the attack; teacher
    pgd_at         K f + K b, 1 f + 1 b; -                            1 f + 1 b; -
    trades         K+1 f + K b, 2 f + 2 b; -                          3 f + 3 b, and 2K f in the attack; -
    ard            K f + K b, 1 f + 1 b; 1 f                          2 f, of which one is not used; 1 f
    rslad          K f + K b, 2 f + 2 b; 1 f                          2 f + 2 b; 1 f
    adaad          K f + K b, 1 f + 1 b; K f + K b, 1 f               2 f, of which one is not used; K f + K b, 2 f
    ard+igdm       K f + K b, 2 f + 2 b; 3 f                          3 f; 3 f
    rslad+igdm     K f + K b, 3 f + 3 b; 3 f                          4 f; 4 f
    adaad+igdm     K f + K b, 2 f + 2 b; K f + K b, 2 f               4 f; K f + K b, 4 f
    dgad           K f + K b, 2 f + 2 b; K f + K b, 2 f               2 f + 2 b; K f + K b, 2 f
    path           2K f + 2K b, 2K+2 f + 2K b; 2 f                    not published
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrd import ThreatModel, distillation, models
from jaxrd.training import step, state as states

BATCH, CLASSES, SHAPE, K = 4, 3, (2, 2, 1), 4


class Counter:
    """A dense network that counts batches forwarded and differentiated, as they are executed (not traced)."""

    def __init__(self):
        self.forwards, self.backwards, self.calls = {True: 0, False: 0}, {True: 0, False: 0}, []
        self.model = models.Model("counted", CLASSES, SHAPE, self.init, self.apply, {})

    def init(self, key):
        scale = jnp.ones((2, SHAPE[-1]))
        kernel = jax.random.normal(key, (4, CLASSES))
        return {"params": {"kernel": kernel, "scale": scale}, "batch_stats": {"mean": jnp.zeros((2,))}}

    def apply(self, variables, images, train, batch_norm_set=0):
        batches = images.shape[0] // BATCH
        self.forwards[train] += batches
        self.calls.append(batches)

        @jax.custom_vjp
        def tap(logits):
            return logits

        def backward(_, cotangent):
            self.backwards[train] += batches
            return (cotangent,)

        tap.defvjp(lambda logits: (logits, None), backward)
        mean = variables["batch_stats"]["mean"]
        hidden = images.reshape(len(images), -1) - (0 if train else mean[batch_norm_set])
        moved = mean.at[batch_norm_set].set(0.9 * mean[batch_norm_set] + 0.1 * jnp.mean(images)) if train else mean
        return tap(jnp.tanh(hidden) @ variables["params"]["kernel"]), {"mean": moved}


def counts(name, **options):
    """Runs one step, operation by operation, and returns what it forwarded and differentiated."""
    method = distillation.method(name, **({"path_points": K} | options))
    student, teacher = Counter(), Counter()
    recipe = step.Recipe(
        method=method, student=student.model, teacher=teacher.model if method.needs_teacher else None,
        inner=distillation.InnerMaximisation(ThreatModel("linf", 0.1), 0.03, K), optimizer=optax.sgd(0.1), steps=10)
    state = states.create(student.model, recipe.optimizer, jax.random.key(0), weight_average=False)
    variables = teacher.model.init(jax.random.key(1))
    generator = np.random.default_rng(0)
    images = jnp.asarray(generator.uniform(size=(BATCH, *SHAPE)), jnp.float32)
    labels = jnp.asarray([0, 1, 2, 1])
    negatives = (1 - images, (labels + 1) % CLASSES) if method.negatives else (None, None)
    with jax.disable_jit():
        views, clean = step.attack(recipe, jax.random.key(2), state, variables, images, labels, *negatives)
        before = list(teacher.calls)
        logits = step.teacher_logits(recipe, variables, views, clean, labels, negatives[1])
        step.gradients_of(recipe, state, views, logits, labels, negatives[1])
    return {
        "attack": (student.forwards[False], student.backwards[False]),
        "student": (student.forwards[True], student.backwards[True]),
        "teacher in attack": (sum(before), teacher.backwards[False]), "teacher": teacher.calls[len(before):]}


NONE = (0, 0)


@pytest.mark.parametrize("name, attack, student, teacher_in_attack, teacher", [
    ("pgd_at", (K, K), (1, 1), NONE, []),
    ("trades", (K + 1, K), (2, 2), NONE, []),
    ("mart", (K, K), (2, 2), NONE, []),
    ("ard", (K, K), (1, 1), NONE, [1]),
    ("iad", (K, K), (2, 2), NONE, [2]),
    ("akd", (K, K), (1, 1), NONE, [1]),
    ("rslad", (K, K), (2, 2), (1, 0), []),  # T(x) serves the attack and both terms
    ("adaad", (K, K), (1, 1), (K, K), [1]),
    ("adaiad", (K, K), (2, 2), (K, K), [1]),
    ("dgad", (K, K), (2, 2), (K, K), [2]),
    # Both starts are forwarded for their weights, without a gradient; the teacher sees both together.
    ("path", (2 * K, 2 * K), (2 * K + 2, 2 * K), NONE, [2]),
    ("pgd_at+igdm", (K, K), (2, 2), NONE, [2]),
    ("trades+igdm", (K + 1, K), (3, 3), NONE, [2]),
    ("ard+igdm", (K, K), (2, 2), NONE, [3]),
    # Student K + 3 forwards; teacher 3: T(x) before the attack, T(x + d) and T(x - d) together after it.
    ("rslad+igdm", (K, K), (3, 3), (1, 0), [2]),
    ("adaad+igdm", (K, K), (2, 2), (K, K), [2]),
    ("dgad+igdm", (K, K), (3, 3), (K, K), [3]),
    ("path+igdm", (2 * K, 2 * K), (2 * K + 3, 2 * K + 1), NONE, [4]),
    ("pgd_at+awp", (K, K), (2, 2), NONE, []),  # the loss twice: for the perturbation, then for the update
])
def test_a_step_computes_no_more_than_its_method_needs(name, attack, student, teacher_in_attack, teacher):
    assert counts(name) == {
        "attack": attack, "student": student, "teacher in attack": teacher_in_attack, "teacher": teacher}


@pytest.mark.parametrize("options, student, teacher", [
    ({"path_weights": "uniform"}, (2 * K, 2 * K), [2]),  # nobody looks at the starts
    ({"path_weights": "last_only"}, (2, 2), [2]),
    ({"path_points": 2}, (6, 4), [2]),
    ({"path_gamma": 0.0}, (K + 1, K), [1]),
    ({"path_align_target": "teacher_at_point"}, (2 * K + 2, 2 * K), [2 * K]),
    ({"path_alpha": 0.5}, (2 * K + 2, 2 * K + 1), [2]),
    ({"path_alpha": 0.5, "path_natural": "both"}, (2 * K + 2, 2 * K + 2), [2]),
    ({"path_dual_batch_norm": False}, (2 * K + 2, 2 * K), [2]),
    ({"path_inner_loss": "teacher_clean"}, (2 * K + 2, 2 * K), [1]),  # and T(x) in the attack
    # From the batch, the starts of both branches are the same images.
    ({"path_negatives": "batch"}, (2 * K + 2, 2 * K), [1]),
    ({"path_negatives": "batch", "path_dual_batch_norm": False}, (2 * K + 1, 2 * K), [1]),
    ({"path_negatives": "batch", "path_weights": "uniform"}, (2 * K, 2 * K), [1]),
    ({"path_targeted_start": "anchor_image"}, (2 * K + 2, 2 * K), [1]),
])
def test_options_of_path_leave_out_what_they_do_not_read(options, student, teacher):
    counted = counts("path", **options)
    assert (counted["student"], counted["teacher"]) == (student, teacher)


@pytest.mark.parametrize("name, forwards", [
    ("trades", 3), ("adaad", 2), ("ard+igdm", 3), ("rslad+igdm", 4), ("adaad+igdm", 4), ("ard", 2), ("rslad", 2)])
def test_preset_official_repeats_the_student_forwards_of_the_published_code(name, forwards):
    counted = counts(name, preset="official")
    assert counted["student"][0] == forwards
    # Nothing is trained through what is forwarded for its statistics only.
    assert counted["student"][1] == counts(name)["student"][1]
    assert counted["teacher"] == counts(name)["teacher"]


def test_the_repeated_forwards_move_the_running_statistics_and_not_the_loss():
    def moved(**options):
        method = distillation.method("rslad+igdm", **options)
        student = Counter()
        recipe = step.Recipe(
            method, student.model, None, distillation.InnerMaximisation(ThreatModel("linf", 0.1), 0.03, K), optax.sgd(0.1), 10)
        state = states.create(student.model, recipe.optimizer, jax.random.key(0), weight_average=False)
        generator = np.random.default_rng(0)
        views = {view.name: jnp.asarray(generator.uniform(size=(BATCH, *SHAPE)), jnp.float32)
                 for view in (distillation.ADVERSARIAL, distillation.CLEAN, distillation.MIRRORED)}
        views |= {view.name: view.points(views) for view in method.views}
        teacher = {name: jnp.asarray(generator.normal(size=(BATCH, CLASSES)), jnp.float32)
                   for name in ("clean", "adversarial", "mirrored")}
        _, statistics, metrics = step.gradients_of(recipe, state, views, teacher, jnp.zeros(BATCH, int))
        means = {name: float(jnp.mean(views[name])) for name in ("adversarial", "clean", "mirrored")}
        return float(statistics["mean"][0]), float(metrics["loss"]), means

    expected = {}
    for preset, order in {"default": ("adversarial", "clean"),
                          "official": ("adversarial", "adversarial", "clean", "mirrored")}.items():
        mean, loss, means = moved(preset=preset)
        running = 0.0
        for name in order:
            running = 0.9 * running + 0.1 * means[name]
        assert mean == pytest.approx(running, rel=1e-5)
        expected[preset] = loss
    assert expected["official"] == pytest.approx(expected["default"], rel=1e-6)


def test_weight_perturbation_is_the_published_procedure():
    """The update of one step of PGD-AT with AWP, from two gradients taken by hand."""
    method = distillation.method("pgd_at", awp=0.05)
    student = Counter()
    recipe = step.Recipe(
        method, student.model, None, distillation.InnerMaximisation(ThreatModel("linf", 0.1), 0.03, K), optax.sgd(0.1), 10)
    state = states.create(student.model, recipe.optimizer, jax.random.key(0), weight_average=False)
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(BATCH, *SHAPE)), jnp.float32)
    labels = jnp.asarray([0, 1, 2, 1])
    views = {"clean": images, "adversarial": images}

    def loss(params):
        logits, _ = student.apply({"params": params, "batch_stats": state.batch_stats}, images, True)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(BATCH), labels])

    ascent = jax.grad(loss)(state.params)["kernel"]
    kernel = state.params["kernel"]
    worst = kernel + 0.05 * jnp.linalg.norm(kernel) / jnp.linalg.norm(ascent) * ascent
    expected = jax.grad(loss)(state.params | {"kernel": worst})["kernel"]
    gradients, statistics, metrics = step.gradients_of(recipe, state, views, {}, labels)
    np.testing.assert_allclose(gradients["kernel"], expected, rtol=1e-4, atol=1e-6)
    assert metrics["loss"] > loss(state.params)
    # One move of the statistics, not one per forward.
    np.testing.assert_allclose(statistics["mean"][0], 0.1 * jnp.mean(images), rtol=1e-5)

    warming = dataclasses.replace(recipe, method=distillation.method("pgd_at", awp=0.05, awp_warmup=0.5))
    gradients, _, _ = step.gradients_of(warming, state, views, {}, labels)
    np.testing.assert_allclose(gradients["kernel"], ascent, rtol=1e-4, atol=1e-6)
