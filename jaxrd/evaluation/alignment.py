"""How alike the input gradients of two models are.

Lee et al. 2025 (IGDM) §4.2 report the mean L2 distance (GD) and the mean cosine similarity (GC) of student and teacher input
gradients over the test images, without saying of which scalar. Here it is the softmax probability of the true class, the
reading whose magnitude fits the published figures.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

Array = jax.Array
LogitsFn = Callable[[Array], Array]  # images -> logits

DEFINITION = (
    "input gradients of the softmax probability of the true class at the clean images; distance is the mean L2 norm of their "
    "difference, cosine the mean cosine similarity, student against teacher")


def input_gradients(logits_fn: LogitsFn, images: Array, labels: Array) -> Array:
    """Returns d softmax(logits)[label] / d image, [batch, h, w, c].

    Args:
      logits_fn: images -> logits [batch, classes], examples independent of each other.
      images: [batch, h, w, c] float32.
      labels: [batch] int.
    """
    chex.assert_rank([images, labels], [4, 1])

    def probability(images):
        return jnp.sum(jnp.take_along_axis(jax.nn.softmax(logits_fn(images)), labels[:, None], axis=-1))

    return jax.grad(probability)(images)


def gradient_distance(a: Array, b: Array) -> Array:
    """Returns ||a - b||_2 per example, [batch]."""
    return jnp.linalg.norm(_flat(a) - _flat(b), axis=1)


def gradient_cosine(a: Array, b: Array) -> Array:
    """Returns the cosine of the angle between a and b per example, [batch], in [-1, 1]; 0 where either is 0."""
    return jnp.clip(jnp.sum(_unit(a) * _unit(b), axis=1), -1.0, 1.0)


def _unit(x: Array) -> Array:
    """Each example at length 1, or 0 where it is 0, [batch, size]."""
    x = _flat(x)
    # The gradients of a saturated softmax fall below 1e-20, where their squares underflow: measured by the largest first.
    largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1.0)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1.0)  # the norm is below 1 only where it is 0


def _flat(x: Array) -> Array:
    return x.reshape(x.shape[0], -1)
