"""Boundaries where linear networks have them, and surfaces of functions that are known everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrd import ThreatModel
from jaxrd.evaluation import alignment
from tests.evaluation.alignment.networks import (
    BATCH, DELTAS, HESSIANS, IMAGES, LABELS, SHAPE, flat, linear, quadratic, smooth)
from tests.support import assert_input_error

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def exact_boundary(images, directions):
    """The first t at which a linear network's top class of x + t d is another: where the first other logit catches up."""
    logits = np.asarray(linear(jnp.asarray(images)))
    slopes = np.asarray(linear(jnp.asarray(images + directions))) - logits
    rows, top = np.arange(len(images)), logits.argmax(axis=1)
    gap, closing = logits[rows, top, None] - logits, slopes - slopes[rows, top, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        times = np.where(closing > 0, gap / closing, np.inf)
    times[rows, top] = np.inf
    return times.min(axis=1)


@pytest.mark.parametrize("maximum, grid", [(1.0, 32), (5.0, 200), (0.2, 1)])
def test_the_boundary_of_a_linear_network(maximum, grid):
    generator = np.random.default_rng(0)
    images, directions = generator.uniform(size=(40, *SHAPE)), generator.normal(size=(40, *SHAPE))
    expected = exact_boundary(images, directions)
    # With one step of the grid a second change may undo the first: only those without are exact.
    got = np.asarray(jax.jit(lambda images, directions: alignment.boundary_distance(
        linear, images, directions, maximum=maximum, grid=grid, bisections=40))(images, directions))
    found = np.isfinite(got)
    assert found.any() and not found[expected > maximum].any()
    if grid > 1:
        assert (found == (expected <= maximum)).all() and (maximum == 5.0 or not found.all())
        np.testing.assert_allclose(got[found], expected[found], atol=1e-9)
    else:
        assert (got[found] >= expected[found] - 1e-9).all()
    moved = np.argmax(linear(jnp.asarray(images + np.where(found, got, 0)[:, None, None, None] * directions)), axis=1)
    assert ((moved != np.argmax(linear(jnp.asarray(images)), axis=1)) == found).all()  # the point is beyond the boundary


def test_the_first_of_several_changes_counts():
    def stripes(images):  # class 1 from 0.25 to 0.5 and from 0.75 on
        place = images[:, 0, 0, 0]
        inside = ((place > 0.25) & (place < 0.5)) | (place > 0.75)
        return jnp.stack([~inside, inside], axis=1).astype(images.dtype)

    images, directions = jnp.array([0.0, 0.55, 0.3]).reshape(3, 1, 1, 1), jnp.ones([3, 1, 1, 1])
    np.testing.assert_allclose(alignment.boundary_distance(stripes, images, directions), [0.25, 0.2, 0.2], atol=1e-6)


def test_with_labels_what_is_wrong_already_is_at_the_boundary():
    images, directions = jnp.asarray(IMAGES), 5 * jnp.asarray(DELTAS)
    predicted = jnp.argmax(smooth(images), axis=1)
    labels = predicted.at[0].set((predicted[0] + 1) % 4)
    got = alignment.boundary_distance(smooth, images, directions, labels=labels)
    by_prediction = alignment.boundary_distance(smooth, images, directions)
    assert got[0] == 0 and by_prediction[0] > 0
    np.testing.assert_array_equal(got[1:], by_prediction[1:])
    assert np.isinf(alignment.boundary_distance(smooth, images, 0 * directions)).all()


def test_the_boundary_along_a_path_is_that_of_its_straight_parts():
    generator = np.random.default_rng(1)
    images, path = generator.uniform(size=(30, *SHAPE)), generator.normal(size=(3, 30, *SHAPE))
    path[1] = path[0] + (path[0] - images)  # straight on for a second step
    got = alignment.path_boundary(linear, jnp.asarray(images), jnp.asarray(path), grid=64, bisections=40)
    ray = exact_boundary(images, path[0] - images)
    within = ray <= 2
    assert within.any() and not within.all()
    np.testing.assert_allclose(got[within], ray[within], atol=1e-9)
    last = 2 + exact_boundary(path[1], path[2] - path[1])
    beyond = ~within & (last <= 3)
    assert beyond.any()
    np.testing.assert_allclose(got[beyond], last[beyond], atol=1e-9)
    np.testing.assert_array_equal(np.isinf(got), ~within & ~beyond)


def test_coarse_paths_are_exact_where_they_change_once():
    images = jnp.zeros([2, 1, 1, 1])
    path = jnp.array([0.4, 0.8, 1.2]).reshape(3, 1, 1, 1, 1) * jnp.array([1.0, -1.0]).reshape(2, 1, 1, 1)

    def step(images):
        return jnp.stack([0 * images[:, 0, 0, 0], images[:, 0, 0, 0] - 0.5], axis=1)

    np.testing.assert_allclose(alignment.path_boundary(step, images, path), [1.25, np.inf], atol=1e-5)


def test_the_surface_of_a_quadratic_logit():
    images, adversarial = jnp.asarray(IMAGES), jnp.asarray(IMAGES + DELTAS)
    found = jax.jit(lambda images: alignment.loss_surface(
        jax.random.key(0), quadratic, images, adversarial, jnp.asarray(LABELS), n=7, extent=1.5, scalar="logit"))(images)
    assert found.values.shape == (BATCH, 7, 7)
    np.testing.assert_allclose(found.axis, np.linspace(-1.5, 1.5, 7))
    np.testing.assert_allclose(found.adversarial, DELTAS, atol=1e-12)
    for i, a in enumerate(found.axis):
        for j, b in enumerate(found.axis):
            logits = quadratic(images + a * found.adversarial + b * found.random)
            np.testing.assert_allclose(found.values[:, i, j], logits[np.arange(BATCH), LABELS], rtol=1e-10)
    np.testing.assert_allclose(found.values[:, 3, 3], quadratic(images)[np.arange(BATCH), LABELS], rtol=1e-12)
    second = (found.values[:, 4, 3] - 2 * found.values[:, 3, 3] + found.values[:, 2, 3]) / 0.5**2
    np.testing.assert_allclose(second, np.einsum("bi,bij,bj->b", flat(DELTAS), HESSIANS[LABELS], flat(DELTAS)), rtol=1e-8)


def test_the_random_direction_is_orthogonal_as_long_and_follows_its_example():
    images, labels = jnp.asarray(IMAGES), jnp.asarray(LABELS)
    adversarial = (images + jnp.asarray(DELTAS)).at[1].set(images[1])
    found = alignment.loss_surface(jax.random.key(0), smooth, images, adversarial, labels, n=2)
    a, b = flat(found.adversarial), flat(found.random)
    np.testing.assert_allclose(jnp.sum(a * b, axis=1), 0, atol=1e-13)
    np.testing.assert_allclose(jnp.linalg.norm(a, axis=1), jnp.linalg.norm(b, axis=1), rtol=1e-12)
    assert (b[1] == 0).all() and np.ptp(found.values[1]) == 0
    assert abs(np.corrcoef(b[0], b[2])[0, 1]) < 0.9
    keys = jax.vmap(lambda index: jax.random.fold_in(jax.random.key(0), index))(jnp.arange(BATCH))
    part = alignment.loss_surface(keys[3:], smooth, images[3:], adversarial[3:], labels[3:], n=2)
    np.testing.assert_allclose(part.random, found.random[3:], rtol=1e-12)


def test_counts_are_whole_numbers():
    images, deltas = jnp.asarray(IMAGES), jnp.asarray(DELTAS)
    assert_input_error(lambda: alignment.boundary_distance(linear, images, deltas, grid=0), "grid", "whole number")
    assert_input_error(lambda: alignment.path_boundary(linear, images, deltas[None], bisections=-1), "bisections", "-1")
    assert_input_error(
        lambda: alignment.loss_surface(jax.random.key(0), linear, images, deltas, jnp.asarray(LABELS), n=1), "n is 1", "2")


def test_lengths_are_above_zero_where_they_can_be_read():
    images, deltas, labels, key = jnp.asarray(IMAGES), jnp.asarray(DELTAS), jnp.asarray(LABELS), jax.random.key(0)
    assert_input_error(lambda: alignment.boundary_distance(linear, images, deltas, maximum=0.0), "maximum is 0", "above 0")
    assert_input_error(
        lambda: alignment.loss_surface(key, linear, images, images + deltas, labels, extent=-1.0), "extent is -1", "above 0")
    assert_input_error(lambda: alignment.gradient_change(linear, images, labels, step=0.0), "step is 0", "above 0")
    assert_input_error(lambda: alignment.local_linearity(
        key, linear, images, labels, threat=ThreatModel("linf", 0.1), steps=0), "steps is 0", "at least 1")
    change = jax.jit(lambda step: alignment.gradient_change(linear, images, labels, step=step))
    assert change(0.1).shape == labels.shape
