"""Point-wise alignment: its range, and the bound, which is exact about what it leaves out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrd.evaluation import alignment
from tests.evaluation.alignment.networks import CLASSES, DELTAS, IMAGES, linear, quadratic, smooth
from tests.support import assert_input_error

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def softmax(logits):
    exponentials = np.exp(np.asarray(logits) - np.max(logits, axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def test_the_distance_is_that_of_the_probabilities():
    points = jnp.asarray(IMAGES + DELTAS)
    got = alignment.point_distance(quadratic, smooth, points)
    np.testing.assert_allclose(got, np.linalg.norm(softmax(quadratic(points)) - softmax(smooth(points)), axis=1), rtol=1e-10)
    np.testing.assert_allclose(alignment.point_distance(smooth, lambda images: smooth(images) + 3, points), 0, atol=1e-14)
    one_hot = [lambda images, place=place: 1e3 * jnp.tile(jnp.eye(CLASSES)[place], (len(images), 1)) for place in (0, 1)]
    np.testing.assert_allclose(alignment.point_distance(*one_hot, points), np.sqrt(2), rtol=1e-12)


@pytest.mark.parametrize("output", ["probability", "logit"])
@pytest.mark.parametrize("scale", [1e-3, 1, 30])
def test_the_distance_is_at_most_its_parts(output, scale):
    images, deltas = jnp.asarray(IMAGES), scale * jnp.asarray(DELTAS)
    found = jax.jit(lambda deltas: alignment.point_bound(quadratic, smooth, images, deltas, output))(deltas)
    assert (found.distance <= found.bound + found.remainder + 1e-12).all()
    assert (jnp.abs(found.distance - found.remainder) <= found.bound + 1e-12).all()
    if scale == 1e-3:  # where networks are as linear as the paper takes them to be
        assert (found.distance <= found.bound * (1 + 1e-3)).all()
        assert (found.remainder < 0.01 * found.first_order).all()


def test_the_bound_of_the_paper_is_exact_for_linear_networks_and_fails_without_the_remainder_for_others():
    images, deltas = jnp.asarray(IMAGES), jnp.asarray(DELTAS)
    found = alignment.point_bound(linear, lambda images: 0.3 * linear(images), images, deltas, "logit")
    np.testing.assert_allclose(found.remainder, 0, atol=1e-13)
    assert (found.distance <= found.bound + 1e-12).all()
    np.testing.assert_allclose(found.at_images, np.linalg.norm(0.7 * linear(images), axis=1), rtol=1e-12)
    first_order = alignment.directional_derivative(linear, images, deltas)
    np.testing.assert_allclose(found.first_order, np.linalg.norm(0.7 * first_order, axis=1), rtol=1e-12)
    bent = alignment.point_bound(
        lambda images: linear(images) ** 2, lambda images: 0 * linear(images), 0 * images, 9 * deltas, "logit")
    assert (bent.distance > bent.bound + 1e-3).any()


def test_an_unknown_output_is_one_line():
    assert_input_error(lambda: alignment.point_bound(linear, linear, jnp.asarray(IMAGES), jnp.asarray(DELTAS), "logits"),
                       "point_bound output", '"logits"', 'did you mean "logit"')
