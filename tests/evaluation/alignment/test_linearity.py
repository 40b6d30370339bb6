"""Remainders: none where there is none, exact on quadratic networks, and of the right order in the step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrd import InputError, ThreatModel, attacks
from jaxrd.evaluation import alignment
from tests.evaluation.alignment.networks import (
    BATCH, CLASSES, DELTAS, HESSIANS, IMAGES, LABELS, SHAPE, flat, linear, quadratic, smooth)

SCALARS = ("probability", "logit", "cross_entropy", "margin", lambda logits, labels: jnp.sum(logits**2, axis=1))

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def bends(deltas):
    """d^T H d of every logit of the quadratic network."""
    return np.einsum("bi,cij,bj->bc", flat(deltas), HESSIANS, flat(deltas))


def logit(network):
    """A scalar that is as linear or quadratic as the network."""
    return lambda images: np.asarray(network(jnp.asarray(images)))[np.arange(BATCH), LABELS]


def test_an_affine_network_has_no_remainder():
    images, deltas = jnp.asarray(IMAGES), jnp.asarray(DELTAS)
    np.testing.assert_allclose(alignment.taylor_remainder(linear, images, deltas), 0, atol=1e-14)
    np.testing.assert_allclose(alignment.central_remainder(linear, images, deltas), 0, atol=1e-14)
    for nothing in (lambda images: 0 * linear(images), lambda images: jnp.ones([len(images), CLASSES])):
        assert (alignment.taylor_remainder(nothing, images, deltas) == 0).all()
        assert (alignment.central_remainder(nothing, images, deltas) == 0).all()
    assert (alignment.taylor_remainder(smooth, images, 0 * deltas) == 0).all()


def test_the_remainder_of_a_quadratic_network_is_its_second_order():
    images, deltas = jnp.asarray(IMAGES), jnp.asarray(DELTAS)
    expected = np.linalg.norm(bends(DELTAS) / 2, axis=1) / np.linalg.norm(quadratic(images + deltas), axis=1)
    np.testing.assert_allclose(alignment.taylor_remainder(quadratic, images, deltas), expected, rtol=1e-10)
    np.testing.assert_allclose(alignment.central_remainder(quadratic, images, deltas), 0, atol=1e-13)


@pytest.mark.parametrize("name", ["taylor_remainder", "central_remainder"])
def test_both_shares_are_of_second_order_and_per_example(name):
    measure, images, deltas = getattr(alignment, name), jnp.asarray(IMAGES), jnp.asarray(DELTAS)
    small = measure(smooth, images, 1e-3 * deltas) / measure(smooth, images, 1e-2 * deltas)
    np.testing.assert_allclose(small, 1e-2, rtol=0.05)
    alone = jnp.concatenate([measure(smooth, images[i:i + 1], deltas[i:i + 1]) for i in range(BATCH)])
    np.testing.assert_allclose(jax.jit(lambda *arrays: measure(smooth, *arrays))(images, deltas), alone, rtol=1e-10)
    assert alone.std() > 0


def test_the_central_difference_is_the_jacobians_product_where_the_remainder_is_small():
    """What IGDM takes for the gradient, on the network that the share is about."""
    images, deltas = jnp.asarray(IMAGES), 0.01 * jnp.asarray(DELTAS)
    difference = smooth(images + deltas) - smooth(images - deltas)
    exact = 2 * alignment.directional_derivative(smooth, images, deltas)
    share = jnp.linalg.norm(difference - exact, axis=1) / jnp.linalg.norm(difference, axis=1)
    np.testing.assert_allclose(alignment.central_remainder(smooth, images, deltas), share, rtol=1e-6)
    assert (share < 1e-3).all()


@pytest.mark.parametrize("scalar", SCALARS)
def test_the_linearity_error_against_finite_differences(scalar):
    images, deltas = jnp.asarray(IMAGES), jnp.asarray(DELTAS)
    function = alignment.linearity.scalar_of(smooth, jnp.asarray(LABELS), scalar)
    step = 1e-6
    slope = (function(images + step * deltas) - function(images - step * deltas)) / (2 * step)
    expected = jnp.abs(function(images + deltas) - function(images) - slope)
    got = alignment.linearity_error(smooth, images, deltas, jnp.asarray(LABELS), scalar)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-9)
    assert got.shape == (BATCH,) and (got > 1e-5).all()


def test_the_linearity_error_of_a_quadratic_logit_on_a_path():
    path = np.random.default_rng(3).normal(size=(6, BATCH, *SHAPE))
    got = alignment.path_linearity(quadratic, jnp.asarray(IMAGES), jnp.asarray(path), jnp.asarray(LABELS), "logit")
    for found, points in zip(got, path):
        np.testing.assert_allclose(found, abs(bends(points - IMAGES)[np.arange(BATCH), LABELS]) / 2, rtol=1e-9)
    straight = alignment.path_linearity(linear, jnp.asarray(IMAGES), jnp.asarray(path), jnp.asarray(LABELS), "logit")
    np.testing.assert_allclose(straight, 0, atol=1e-12)


def test_local_linearity_finds_the_corner_in_which_a_convex_function_bends_most():
    curve = np.random.default_rng(4).uniform(0.5, 2, size=flat(IMAGES).shape[1])

    def bowl(images):  # l = sum_i c_i x_i^2: the error is sum_i c_i d_i^2, largest in the corners of the ball
        return jnp.stack([flat(images) ** 2 @ curve, jnp.zeros(len(images))], axis=1)

    images = jnp.asarray(0.3 + 0.4 * IMAGES, jnp.float64)
    threat = ThreatModel("linf", 0.1)
    got = jax.jit(lambda images: alignment.local_linearity(
        jax.random.key(0), bowl, images, jnp.zeros(BATCH, int), threat=threat, scalar="logit", steps=10))(images)
    np.testing.assert_allclose(got, curve.sum() * 0.1**2, rtol=1e-5)


def test_local_linearity_is_a_bound_on_what_the_loss_gains_in_the_ball():
    images, labels = jnp.asarray(0.3 + 0.4 * IMAGES), jnp.asarray(LABELS)
    threat = ThreatModel("linf", 0.1)
    gamma = jax.jit(lambda images: alignment.local_linearity(
        jax.random.key(0), smooth, images, labels, threat=threat, steps=8))(images)
    error = jax.jit(lambda deltas: alignment.linearity_error(smooth, images, deltas, labels))
    for seed in range(5):
        assert (error(threat.random_start(jax.random.key(seed), images) - images) <= gamma).all()
    assert (gamma > 0).all()
    affine = jax.jit(lambda images: alignment.local_linearity(
        jax.random.key(0), linear, images, labels, threat=threat, scalar="logit", steps=2))(images)
    np.testing.assert_allclose(affine, 0, atol=1e-6)


def test_random_starts_follow_the_keys_of_the_examples():
    images, labels = jnp.asarray(0.3 + 0.4 * IMAGES), jnp.asarray(LABELS)
    keys = jax.vmap(lambda index: jax.random.fold_in(jax.random.key(0), index))(jnp.arange(BATCH))
    measured = [jax.jit(lambda key, images, labels: alignment.local_linearity(
        key, smooth, images, labels, threat=ThreatModel("l2", 0.5), steps=1))(key, images[rows], labels[rows])
        for key, rows in ((jax.random.key(0), slice(None)), (keys[2:], slice(2, None)))]
    np.testing.assert_allclose(measured[0][2:], measured[1], rtol=1e-6)


def test_a_path_of_an_attack_can_be_measured_and_a_scalar_must_be_known():
    images, labels = jnp.asarray(IMAGES), jnp.asarray(LABELS)
    path = attacks.pgd_path(jax.random.key(0), lambda points: -smooth(points)[:, 0], images,
                            threat=ThreatModel("linf", 0.1), step_size=0.05, steps=4)
    got = jax.jit(lambda path: alignment.path_linearity(smooth, images, path, labels))(path)
    for found, points in zip(got, path):
        np.testing.assert_allclose(found, alignment.linearity_error(smooth, images, points - images, labels), rtol=1e-6)
    with pytest.raises(InputError, match='did you mean "margin"'):
        alignment.linearity_error(smooth, images, images, labels, "margins")
    with pytest.raises(AssertionError):
        alignment.linearity_error(smooth, images, images, labels, lambda logits, labels: logits)
