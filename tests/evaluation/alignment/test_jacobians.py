"""Jacobians and products with them: those of quadratic networks, finite differences, and each other; in bounded memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrd import models
from jaxrd.evaluation import alignment
from jaxrd.evaluation.alignment import jacobians
from tests.evaluation.alignment.networks import (
    BATCH, CLASSES, DELTAS, IMAGES, SHAPE, WEIGHTS, quadratic, quadratic_jacobian, smooth)
from tests.support import assert_input_error

CHUNKS = (1, 2, 3, CLASSES, 100)


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def wide(images):
    """More classes than an image has values: the Jacobian goes by columns."""
    logits = smooth(images)
    return jnp.concatenate([logits, logits**2, jnp.sin(3 * logits), jnp.exp(logits)], axis=1)


@pytest.mark.parametrize("unroll", [True, 1])  # on CPU, and elsewhere
@pytest.mark.parametrize("chunk", CHUNKS)
def test_the_jacobian_of_a_quadratic_network(chunk, unroll, monkeypatch):
    monkeypatch.setattr(jacobians, "loop_unroll", lambda: unroll)
    got = alignment.jacobian(quadratic, jnp.asarray(IMAGES), chunk=chunk)
    np.testing.assert_allclose(got, quadratic_jacobian(IMAGES), rtol=1e-12)


@pytest.mark.parametrize("network", [smooth, wide])
def test_the_jacobian_against_finite_differences(network):
    got = np.asarray(alignment.jacobian(network, jnp.asarray(IMAGES), chunk=3))
    step = 1e-6
    for index in np.ndindex(SHAPE):
        move = np.zeros(SHAPE)
        move[index] = step
        slopes = (network(jnp.asarray(IMAGES + move)) - network(jnp.asarray(IMAGES - move))) / (2 * step)
        np.testing.assert_allclose(got[(slice(None), slice(None), *index)], slopes, atol=1e-8)


@pytest.mark.parametrize("network", [smooth, wide])
def test_one_jacobian_whatever_the_chunk_and_the_transformation(network):
    whole = jax.vmap(jax.jacrev(lambda image: network(image[None])[0]))(jnp.asarray(IMAGES))
    compiled = jax.jit(alignment.jacobian, static_argnames=("logits_fn", "chunk"))
    for function, chunks in ((alignment.jacobian, (5, 100)), (compiled, (1, 3, 7))):
        for chunk in chunks:
            np.testing.assert_allclose(function(network, jnp.asarray(IMAGES), chunk=chunk), whole, rtol=1e-12, atol=1e-14)
    stacked = jnp.stack([IMAGES, 2 * IMAGES])
    mapped = jax.vmap(lambda images: alignment.jacobian(network, images, chunk=3))(stacked)
    np.testing.assert_allclose(mapped[0], whole, rtol=1e-12, atol=1e-14)


def test_products_are_those_with_the_jacobian_and_transposes_of_each_other():
    images, deltas = jnp.asarray(IMAGES), jnp.asarray(DELTAS)
    vectors = np.random.default_rng(1).normal(size=(BATCH, CLASSES))
    exact = quadratic_jacobian(IMAGES)
    pushed = alignment.directional_derivative(quadratic, images, deltas)
    pulled = alignment.vector_jacobian_product(quadratic, images, jnp.asarray(vectors))
    np.testing.assert_allclose(pushed, np.einsum("bchwk,bhwk->bc", exact, DELTAS), rtol=1e-12)
    np.testing.assert_allclose(pulled, np.einsum("bchwk,bc->bhwk", exact, vectors), rtol=1e-12)
    np.testing.assert_allclose(np.sum(vectors * pushed, axis=1), np.sum(pulled * DELTAS, axis=(1, 2, 3)), rtol=1e-12)
    with pytest.raises(AssertionError):
        alignment.vector_jacobian_product(quadratic, images, jnp.ones([BATCH, CLASSES + 1]))


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_alignment_of_jacobians_is_that_of_the_whole_ones(chunk):
    images = jnp.asarray(IMAGES)
    whole = [alignment.jacobian(network, images) for network in (quadratic, smooth)]
    got = jax.jit(lambda images: alignment.jacobian_alignment(quadratic, smooth, images, chunk=chunk))(images)
    np.testing.assert_allclose(got.distance, alignment.gradient_distance(*whole), rtol=1e-10)
    np.testing.assert_allclose(got.cosine, alignment.gradient_cosine(*whole), rtol=1e-10)
    same = alignment.jacobian_alignment(smooth, lambda images: 3 * smooth(images), images, chunk=chunk)
    np.testing.assert_allclose(same.cosine, 1, rtol=1e-12)
    np.testing.assert_allclose(same.distance, 2 * jnp.linalg.norm(whole[1].reshape(BATCH, -1), axis=1), rtol=1e-12)
    nothing = alignment.jacobian_alignment(smooth, lambda images: 0 * smooth(images), images, chunk=chunk)
    assert (nothing.cosine == 0).all()


def test_alignment_by_columns_too():
    images = jnp.asarray(IMAGES)
    got = alignment.jacobian_alignment(wide, lambda images: wide(images) ** 2, images, chunk=5)
    whole = [alignment.jacobian(network, images) for network in (wide, lambda images: wide(images) ** 2)]
    np.testing.assert_allclose(got.distance, alignment.gradient_distance(*whole), rtol=1e-10)
    np.testing.assert_allclose(got.cosine, alignment.gradient_cosine(*whole), rtol=1e-10)


def test_the_distance_of_jacobians_is_what_random_directions_see():
    images = jnp.asarray(np.repeat(IMAGES[:1], 20_000, axis=0))
    directions = jnp.asarray(np.random.default_rng(2).normal(size=images.shape))
    seen = jax.jvp(quadratic, (images,), (directions,))[1] - jax.jvp(smooth, (images,), (directions,))[1]
    distance = alignment.jacobian_alignment(quadratic, smooth, images[:1]).distance[0]
    np.testing.assert_allclose(jnp.mean(jnp.sum(seen**2, axis=1)), distance**2, rtol=0.03)


def test_a_linear_network_has_its_weights_for_a_jacobian_even_far_away():
    weights = jnp.asarray(WEIGHTS)
    got = alignment.jacobian(lambda images: images.reshape(len(images), -1) @ weights, 1e6 * jnp.asarray(IMAGES), chunk=3)
    for row in got:
        np.testing.assert_array_equal(row.reshape(CLASSES, -1), WEIGHTS.T)


@pytest.mark.parametrize("chunk", [0, -1, 1.5])
def test_a_chunk_is_a_whole_number(chunk):
    for function in (alignment.jacobian, functools.partial(alignment.jacobian_alignment, smooth)):
        assert_input_error(lambda: function(smooth, jnp.asarray(IMAGES), chunk=chunk), "chunk", "whole number", str(chunk))


def temporary_bytes(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("function", ["jacobian", "jacobian_alignment"])
def test_memory_follows_the_chunk_and_not_the_classes(function):
    with jax.enable_x64(False):
        images = jax.ShapeDtypeStruct((2, 16, 16, 1), jnp.float32)

        def needed(classes, chunk):
            model = models.create("resnet6_w8", classes=classes, image_shape=(16, 16, 1))
            logits_fn = models.logits_fn(model, jax.eval_shape(model.init, jax.random.key(0)))

            def call(logits_fn, images):
                if function == "jacobian":
                    return alignment.jacobian(logits_fn, images, chunk=chunk)
                return alignment.jacobian_alignment(logits_fn, lambda images: 2 * logits_fn(images), images, chunk=chunk)

            return temporary_bytes(call, logits_fn, images)

        result = 2 * 16 * 16 * 4  # bytes of one class
        assert needed(40, 5) < 0.5 * needed(40, 40)
        # Four times as many classes in chunks of the same size: more rows of the result, if anything.
        assert needed(40, 5) - needed(10, 5) < 0.1 * needed(10, 5) + 2 * 30 * result * (function == "jacobian")
