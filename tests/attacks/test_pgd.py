"""PGD: inside the threat model, exact on linear objectives, blind to its neighbours in the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrd import InputError, ThreatModel, attacks, objectives
from jaxrd.threat import example_keys
from tests.support import assert_input_error

BATCH, SHAPE, CLASSES = 10, (4, 4, 1), 5
SIZE = int(np.prod(SHAPE))
GENERATOR = np.random.default_rng(0)
IMAGES = jnp.asarray(GENERATOR.uniform(size=(BATCH, *SHAPE)), jnp.float32)
LABELS = jnp.asarray(GENERATOR.integers(0, CLASSES, BATCH))
HIDDEN = jnp.asarray(GENERATOR.normal(size=(SIZE, 16)), jnp.float32)
OUT = jnp.asarray(GENERATOR.normal(size=(16, CLASSES)), jnp.float32)
DIRECTIONS = jnp.asarray(GENERATOR.normal(size=(BATCH, *SHAPE)), jnp.float32)
KEY = jax.random.key(0)
STEPS = 4
THREATS = {"linf": ThreatModel("linf", 0.1), "l2": ThreatModel("l2", 0.4)}

each_norm = pytest.mark.parametrize("norm", ["linf", "l2"])


def logits_fn(images):
    return jnp.tanh(images.reshape(len(images), -1) @ HIDDEN) @ OUT


def cross_entropy(images):
    return objectives.cross_entropy(logits_fn(images), LABELS)


def linear(images):
    return jnp.sum(DIRECTIONS * images, axis=(1, 2, 3))


@functools.cache
def attacked(norm, start="uniform", descend=False):
    """The path of STEPS steps on the cross-entropy, compiled."""
    threat = THREATS[norm]
    walk = functools.partial(
        attacks.pgd_path, objective=cross_entropy, images=IMAGES, threat=threat, step_size=threat.epsilon / 3, steps=STEPS,
        start=start, descend=descend)
    return jax.jit(lambda key: walk(key))(KEY)


def mean_loss(images):
    return float(jnp.mean(cross_entropy(images)))


@pytest.mark.parametrize("norm, start", [("linf", "uniform"), ("linf", "gaussian"), ("l2", "uniform"), ("l2", "none")])
def test_every_iterate_is_in_ball_and_box_and_the_objective_rises(norm, start):
    threat, path = THREATS[norm], attacked(norm, start)
    assert path.shape == (STEPS, *IMAGES.shape) and path.dtype == jnp.float32
    assert path.min() >= 0 and path.max() <= 1
    assert max(threat.distance(IMAGES, points).max() for points in path) <= threat.epsilon * (1 + 1e-5)
    losses = [mean_loss(points) for points in path]
    assert losses[-1] > losses[0] > mean_loss(IMAGES)
    assert losses[-1] > mean_loss(threat.random_start(KEY, IMAGES)) + 0.5


@each_norm
def test_descending_lowers_the_objective(norm):
    path = attacked(norm, descend=True)
    assert mean_loss(path[-1]) < mean_loss(path[0]) < mean_loss(IMAGES) + 0.1
    assert mean_loss(path[-1]) < mean_loss(IMAGES) - 0.1


@each_norm
def test_descending_is_ascending_the_negative(norm):
    arguments = dict(threat=THREATS[norm], step_size=0.03, steps=3)
    np.testing.assert_allclose(
        attacks.pgd(KEY, cross_entropy, IMAGES, descend=True, **arguments),
        attacks.pgd(KEY, lambda images: -cross_entropy(images), IMAGES, **arguments), atol=1e-6)


@each_norm
def test_the_path_ends_where_pgd_does_and_a_shorter_path_is_its_beginning(norm):
    threat, path = THREATS[norm], attacked(norm)
    arguments = dict(threat=threat, step_size=threat.epsilon / 3)
    # Not compiled here, compiled there.
    np.testing.assert_allclose(
        attacks.pgd(KEY, cross_entropy, IMAGES, steps=STEPS, **arguments), path[-1], atol=1e-6)
    np.testing.assert_allclose(attacks.pgd_path(KEY, cross_entropy, IMAGES, steps=3, **arguments), path[:3], atol=1e-6)


@each_norm
def test_linear_objective_is_maximised_exactly(norm):
    if norm == "linf":  # with the box active: its optimum is still known
        images, threat = IMAGES, THREATS["linf"]
        expected = jnp.clip(images + threat.epsilon * jnp.sign(DIRECTIONS), 0, 1)
    else:
        images, threat = 0.4 + 0.2 * IMAGES, ThreatModel("l2", 0.2)
        expected = images + threat.epsilon * DIRECTIONS / jnp.sqrt(jnp.sum(DIRECTIONS**2, (1, 2, 3), keepdims=True))
    for start in ("uniform", "none"):
        # Steps as wide as the ball turn an L2 start by a factor of three each towards the optimum.
        points = attacks.pgd(KEY, linear, images, threat=threat, step_size=2 * threat.epsilon, steps=12, start=start)
        np.testing.assert_allclose(linear(points), linear(expected), rtol=1e-6, atol=2e-6)
        np.testing.assert_allclose(points, expected, atol=2e-6)


def test_fgsm_is_one_step_of_epsilon_from_the_image():
    threat = THREATS["linf"]
    points = attacks.pgd(KEY, cross_entropy, IMAGES, threat=threat, step_size=threat.epsilon, steps=1, start="none")
    gradients = jax.grad(lambda images: cross_entropy(images).sum())(IMAGES)
    np.testing.assert_allclose(points, jnp.clip(IMAGES + threat.epsilon * jnp.sign(gradients), 0, 1), atol=1e-7)


@each_norm
def test_pgd_is_ascent_steps_from_the_start(norm):
    threat = THREATS[norm]
    points = threat.random_start(KEY, IMAGES)
    for _ in range(3):
        points = attacks.ascent_step(cross_entropy, IMAGES, points, threat, 0.03)
    np.testing.assert_allclose(
        points, attacks.pgd(KEY, cross_entropy, IMAGES, threat=threat, step_size=0.03, steps=3), atol=1e-6)


@each_norm
def test_no_steps_return_the_start(norm):
    threat = THREATS[norm]
    start = threat.random_start(KEY, IMAGES)
    np.testing.assert_array_equal(attacks.pgd(KEY, cross_entropy, IMAGES, threat=threat, step_size=0.03, steps=0), start)


@each_norm
def test_an_example_is_attacked_alike_in_any_company(norm):
    keys, part = example_keys(KEY, BATCH), np.array([8, 1, 4])
    threat = THREATS[norm]

    def alone(images):
        return objectives.cross_entropy(logits_fn(images), LABELS[part])

    points = attacks.pgd(keys[part], alone, IMAGES[part], threat=threat, step_size=threat.epsilon / 3, steps=STEPS)
    np.testing.assert_allclose(points, attacked(norm)[-1][part], atol=1e-5)


@each_norm
def test_an_example_without_gradient_stays_at_its_start(norm):
    threat = THREATS[norm]
    flat = jnp.arange(BATCH) == 2
    points = attacks.pgd(
        KEY, lambda images: jnp.where(flat, 1.0, linear(images)), IMAGES, threat=threat, step_size=0.03, steps=2)
    np.testing.assert_allclose(points[2], threat.random_start(KEY, IMAGES)[2], atol=1e-6)
    assert jnp.isfinite(points).all() and (threat.distance(IMAGES, points) > 0).all()


@each_norm
def test_the_scale_of_the_objective_does_not_matter(norm):
    """Nor does confidence, then, which shrinks the gradients of a cross-entropy below what float32 can square."""
    arguments = dict(threat=THREATS[norm], step_size=0.03, steps=4)
    points = attacks.pgd(KEY, lambda images: 1e-25 * linear(images), IMAGES, **arguments)
    np.testing.assert_allclose(points, attacks.pgd(KEY, linear, IMAGES, **arguments), atol=1e-6)


def test_no_gradient_flows_to_images_or_parameters():
    def reached(images, out):
        def objective(points):
            logits = jnp.tanh(points.reshape(BATCH, -1) @ HIDDEN) @ out
            return objectives.cross_entropy(logits, LABELS)

        arguments = dict(threat=THREATS["l2"], step_size=0.1, steps=2)
        return jnp.sum(attacks.pgd(KEY, objective, images, **arguments)) + jnp.sum(
            attacks.pgd_path(KEY, objective, images, **arguments, start="none"))

    for gradient in jax.grad(reached, (0, 1))(IMAGES, OUT):
        assert (gradient == 0).all()


def test_one_compilation_serves_every_radius_and_step():
    traces = []

    @jax.jit
    def attack(threat, step_size):
        traces.append(None)
        return attacks.pgd(KEY, linear, IMAGES, threat=threat, step_size=step_size, steps=5)

    for epsilon in (0.02, 0.05, 0.1):
        threat = ThreatModel("linf", epsilon)
        points = attack(threat, epsilon / 2)
        np.testing.assert_allclose(points, jnp.clip(IMAGES + epsilon * jnp.sign(DIRECTIONS), 0, 1), atol=1e-6)
    assert len(traces) == 1


@pytest.mark.parametrize("attack", [attacks.pgd, attacks.pgd_path])
@pytest.mark.parametrize("changed, mentions", [
    ({"step_size": 0.0}, ["step_size", "is 0"]),
    ({"step_size": 0.3}, ["step_size", "0.3", "2 epsilon = 0.2"]),
    ({"threat": ThreatModel("linf", 2 / 255), "step_size": 8 / 255}, ["swapped"]),
    ({"start": "random"}, ['"random"', '"uniform"']),
])
def test_arguments_that_make_no_sense(attack, changed, mentions):
    arguments = {"threat": THREATS["linf"], "step_size": 0.03, "steps": 2} | changed
    with pytest.raises(InputError) as caught:
        attack(KEY, linear, IMAGES, **arguments)
    assert "\n" not in str(caught.value)
    for mention in mentions:
        assert mention in str(caught.value)


@pytest.mark.parametrize("images, words", [
    (IMAGES[0], ["float32[", "[batch, height, width, channel]"]),
    ((255 * IMAGES).astype(jnp.uint8), ["uint8"]),
    (255 * IMAGES, ["outside (0.0, 1.0)", "divide 0..255 by 255"]),
    ((IMAGES - 0.5) / 0.25, ["outside (0.0, 1.0)", "normalisation"])])
def test_images_of_another_rank_dtype_or_range_are_refused(images, words):
    assert_input_error(
        lambda: attacks.pgd(KEY, linear, images, threat=THREATS["linf"], step_size=0.03), *words)
