"""Curvature: the Hessian's of quadratic networks, finite differences of smooth ones, and nothing where all is straight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrd.evaluation import alignment
from tests.evaluation.alignment.networks import (
    BATCH, DELTAS, HESSIANS, IMAGES, LABELS, SHAPE, flat, linear, quadratic, smooth)

IN_ORDER = np.arange(BATCH)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def test_the_second_derivative_of_a_quadratic_network_is_its_hessians():
    got = alignment.second_derivative(quadratic, jnp.asarray(IMAGES), jnp.asarray(DELTAS))
    np.testing.assert_allclose(got, np.einsum("bi,cij,bj->bc", flat(DELTAS), HESSIANS, flat(DELTAS)), rtol=1e-11)
    assert (alignment.second_derivative(linear, jnp.asarray(IMAGES), jnp.asarray(DELTAS)) == 0).all()


def test_the_second_derivative_against_finite_differences():
    images, deltas, step = jnp.asarray(IMAGES), jnp.asarray(DELTAS), 1e-4
    expected = (smooth(images + step * deltas) - 2 * smooth(images) + smooth(images - step * deltas)) / step**2
    np.testing.assert_allclose(alignment.second_derivative(smooth, images, deltas), expected, atol=1e-6)


def test_the_curvature_along_a_path_is_per_length_and_at_its_middles():
    path = np.random.default_rng(1).normal(size=(4, BATCH, *SHAPE))
    path[2] = path[1]  # a step of length 0
    got = jax.jit(lambda path: alignment.path_curvature(
        quadratic, jnp.asarray(IMAGES), path, jnp.asarray(LABELS), "logit"))(path)
    for found, start, end in zip(got, [IMAGES, *path[:-1]], path):
        step = flat(end - start)
        length = np.linalg.norm(step, axis=1)
        bends = np.einsum("bi,bij,bj->b", step, HESSIANS[LABELS], step)
        np.testing.assert_allclose(found, np.divide(bends, length**2, out=np.zeros(BATCH), where=length > 0), atol=1e-10)
    path = jnp.array([[[[[4.0]], [[0.0]]]] * 2])
    cubic = alignment.path_curvature(
        lambda images: flat(images) ** 3, jnp.zeros([2, 2, 1, 1]), path, jnp.zeros(2, int), "logit")
    np.testing.assert_allclose(cubic, 6 * 2.0)  # of x^3 from 0 to 4: in the middle, at 2


def test_the_change_of_a_quadratic_gradient_is_the_hessians_product():
    images, labels = jnp.asarray(IMAGES), jnp.asarray(LABELS)
    for step in (1e-3, 1.5):
        got = alignment.gradient_change(
            quadratic, images, labels, step=step, directions=jnp.asarray(DELTAS), scalar="logit")
        units = flat(DELTAS) / np.linalg.norm(flat(DELTAS), axis=1, keepdims=True)
        np.testing.assert_allclose(got, np.linalg.norm(np.einsum("bij,bj->bi", HESSIANS[LABELS], units), axis=1), rtol=1e-8)
    np.testing.assert_allclose(alignment.gradient_change(linear, images, labels, step=1.0, scalar="logit"), 0, atol=1e-14)


def test_the_direction_is_the_sign_of_the_gradient_unless_given():
    images, labels = jnp.asarray(IMAGES), jnp.asarray(LABELS)
    signs = jnp.sign(alignment.input_gradients(smooth, images, labels, "cross_entropy"))
    given = alignment.gradient_change(smooth, images, labels, step=0.1, directions=7 * signs)
    np.testing.assert_allclose(alignment.gradient_change(smooth, images, labels, step=0.1), given, rtol=1e-12)
    other = alignment.gradient_change(smooth, images, labels, step=0.1, directions=jnp.asarray(DELTAS))
    assert not np.allclose(given, other, rtol=0.01)


def test_a_kink_has_no_second_derivative_and_turns_the_gradient_all_the_same():
    def kinked(images):
        return jnp.stack([jax.nn.relu(flat(images) - 0.5).sum(axis=1), jnp.zeros(len(images))], axis=1)

    images, labels = jnp.full([1, 2, 1, 1], 0.45), jnp.zeros(1, int)
    up = jnp.ones_like(images)
    assert (alignment.second_derivative(kinked, images, up) == 0).all()
    turned = alignment.gradient_change(kinked, images, labels, step=0.2, directions=up, scalar="logit")
    np.testing.assert_allclose(turned, np.sqrt(2) / 0.2, rtol=1e-12)
