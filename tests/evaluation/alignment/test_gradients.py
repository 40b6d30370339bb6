"""Gradient alignment: right gradients, and measures that do not fail at the ends of float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrd.evaluation import alignment
from tests.support import assert_input_error

BATCH, SHAPE, CLASSES = 4, (3, 2, 2), 3
SIZE = int(np.prod(SHAPE))
GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.uniform(size=(BATCH, *SHAPE))
LABELS = GENERATOR.integers(0, CLASSES, BATCH)
HIDDEN, OUT = GENERATOR.normal(size=(SIZE, 8)), GENERATOR.normal(size=(8, CLASSES))
A, B = (jnp.asarray(GENERATOR.normal(size=(BATCH, *SHAPE)), jnp.float32) for _ in range(2))


def logits_fn(images):
    return jnp.tanh(images.reshape(len(images), -1) @ HIDDEN) @ OUT


def test_input_gradients_against_finite_differences():
    def probability(images):
        logits = np.asarray(logits_fn(images), np.float64)
        exponentials = np.exp(logits)
        return exponentials[np.arange(BATCH), LABELS] / exponentials.sum(axis=1)

    with jax.enable_x64(True):
        got = np.asarray(alignment.input_gradients(logits_fn, jnp.asarray(IMAGES), jnp.asarray(LABELS)))
        step = 1e-6
        for index in np.ndindex(SHAPE):
            move = np.zeros(SHAPE)
            move[index] = step
            slope = (probability(IMAGES + move) - probability(IMAGES - move)) / (2 * step)
            np.testing.assert_allclose(got[(slice(None), *index)], slope, atol=1e-9)


def test_input_gradients_of_other_scalars():
    images, labels = jnp.asarray(IMAGES, jnp.float32), jnp.asarray(LABELS)
    jacobian, logits = alignment.jacobian(logits_fn, images), logits_fn(images)
    own = jnp.take_along_axis(jacobian, labels[:, None, None, None, None], axis=1)[:, 0]
    np.testing.assert_allclose(alignment.input_gradients(logits_fn, images, labels, "logit"), own, rtol=1e-5)
    others = np.asarray(logits).copy()
    others[np.arange(BATCH), LABELS] = -np.inf
    rival = jacobian[np.arange(BATCH), others.argmax(axis=1)]
    np.testing.assert_allclose(
        alignment.input_gradients(logits_fn, images, labels, "margin"), rival - own, rtol=1e-4, atol=1e-5)
    residual = jax.nn.softmax(logits) - jax.nn.one_hot(labels, CLASSES)
    np.testing.assert_allclose(
        alignment.input_gradients(logits_fn, images, labels, "cross_entropy"),
        alignment.vector_jacobian_product(logits_fn, images, residual), rtol=1e-4, atol=1e-5)
    squares = alignment.input_gradients(logits_fn, images, labels, lambda logits, labels: jnp.sum(logits**2, axis=1) / 2)
    np.testing.assert_allclose(
        squares, alignment.vector_jacobian_product(logits_fn, images, logits), rtol=1e-4, atol=1e-5)


def test_a_margin_has_one_true_class_and_a_scalar_one_number_per_image():
    soft = jnp.full([BATCH, CLASSES], 1 / CLASSES)
    assert_input_error(lambda: alignment.input_gradients(logits_fn, jnp.asarray(IMAGES), soft, "margin"), "soft")
    assert_input_error(lambda: alignment.input_gradients(logits_fn, jnp.asarray(IMAGES), LABELS, "loss"), '"loss"', "margin")
    with pytest.raises(AssertionError):
        alignment.input_gradients(logits_fn, jnp.asarray(IMAGES), LABELS, lambda logits, labels: logits.sum())


def test_input_gradients_need_images_and_labels():
    with pytest.raises(AssertionError):
        alignment.input_gradients(logits_fn, jnp.asarray(IMAGES), jnp.zeros([BATCH, CLASSES, 1]))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12])
def test_cosine_of_equal_opposite_and_orthogonal_gradients(scale):
    a = scale * A  # a saturated softmax has gradients far below 1e-20
    np.testing.assert_allclose(alignment.gradient_cosine(a, a), 1, rtol=1e-5)
    np.testing.assert_allclose(alignment.gradient_cosine(a, -3 * a), -1, rtol=1e-5)
    np.testing.assert_allclose(alignment.gradient_cosine(a, B), alignment.gradient_cosine(A, 2 * B), rtol=1e-4)
    swapped = a.reshape(BATCH, -1)[:, ::-1] * jnp.tile(jnp.array([1.0, -1.0]), SIZE // 2)
    np.testing.assert_allclose(alignment.gradient_cosine(a, swapped.reshape(a.shape)), 0, atol=1e-6)


def test_cosine_is_that_of_numpy():
    a, b = (np.asarray(x, np.float64).reshape(BATCH, -1) for x in (A, B))
    expected = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b)]
    np.testing.assert_allclose(alignment.gradient_cosine(A, B), expected, rtol=1e-5)


def test_cosine_stays_in_range():
    many = jnp.asarray(GENERATOR.normal(size=(500, *SHAPE)), jnp.float32)
    for other in (many, -7 * many):
        assert jnp.abs(alignment.gradient_cosine(many, other)).max() <= 1


def test_cosine_with_a_zero_gradient_is_zero():
    zero = A.at[1].set(0)
    for a, b in ((zero, A), (A, zero), (zero, zero)):
        cosines = alignment.gradient_cosine(a, b)
        assert cosines[1] == 0 and jnp.isfinite(cosines).all() and (jnp.delete(cosines, 1) > 0.99).all()


def test_distance_is_the_euclidean_norm_of_the_difference():
    expected = np.linalg.norm(np.asarray(A - B).reshape(BATCH, -1), axis=1)
    np.testing.assert_allclose(alignment.gradient_distance(A, B), expected, rtol=1e-6)
    assert (alignment.gradient_distance(A, A) == 0).all()
