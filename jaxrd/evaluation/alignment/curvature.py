"""How much a network bends: second derivatives along directions and paths, and how fast its gradient turns."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from jaxrd.distillation.gradient_matching import LogitsFn, Scalar, gradient_distance, input_gradients, scalar_of
from jaxrd.errors import need_positive

Array = jax.Array


def second_derivative(function: Callable[[Array], Array], images: Array, directions: Array) -> Array:
    """Returns d^2/dt^2 f(x + t v) at t = 0, exactly, by forward mode over forward mode: v^T H v of every output.

    Three passes, no graph of a backward pass. 0 for networks that are piecewise linear in v (ReLU, with average pooling), whose
    bends lie between the pieces: see `gradient_change` for these.

    Args:
      function: images -> [batch, ...], such as logits, or a scalar of them.
      images: [batch, h, w, c], x.
      directions: [batch, h, w, c], v, of any length: the result grows with its square.

    Returns:
      What `function` returns, [batch, ...].
    """
    chex.assert_equal_shape([images, directions])

    def slope(points):
        return jax.jvp(function, (points,), (directions,))[1]

    return jax.jvp(slope, (images,), (directions,))[1]


def path_curvature(logits_fn: LogitsFn, images: Array, path: Array, labels: Array, scalar: Scalar = "cross_entropy") -> Array:
    """Returns the second derivative of a scalar along a path, in the middle of each of its segments, [steps, batch].

    Along the segment from each point to the next, x_0 being the image, per unit of L2 length; 0 for a segment of length 0.

    Args:
      logits_fn: images -> logits, examples independent of each other.
      images: [batch, h, w, c], x_0.
      path: [steps, batch, h, w, c], x_1 to x_steps, such as `attacks.pgd_path` gives.
      labels: [batch] int, or what `scalar` takes.
      scalar: see `input_gradients`.
    """
    chex.assert_rank([images, path], [4, 5])
    function = scalar_of(logits_fn, labels, scalar)
    starts = jnp.concatenate([images[None], path[:-1]])

    def middle_of(segment):
        start, end = segment
        return second_derivative(function, (start + end) / 2, _unit(end - start))

    return jax.lax.map(middle_of, (starts, path))


def gradient_change(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    *,
    step: float,
    directions: Array | None = None,
    scalar: Scalar = "cross_entropy",
) -> Array:
    """Returns ||g(x + h z) - g(x)|| / h with g = dl/dx: how fast the gradient turns.

    As h -> 0 it is ||H z||, the Hessian's product with z; over a finite step it also sees the bends of piecewise linear
    networks. CURE's regulariser is the square of its numerator (Moosavi-Dezfooli et al. 2019, "Robustness via Curvature
    Regularization, and Vice Versa").

    Args:
      logits_fn: images -> logits, examples independent of each other.
      images: [batch, h, w, c], x.
      labels: [batch] int, or what `scalar` takes.
      step: h, above 0, an L2 length in pixel units of [0, 1].
      directions: [batch, h, w, c], z, brought to L2 length 1; by default sign(g), as in CURE.
      scalar: see `input_gradients`.

    Returns:
      [batch], at least 0.

    Raises:
      InputError: a step of 0 or less.
    """
    need_positive("step", step)
    gradients = input_gradients(logits_fn, images, labels, scalar)
    directions = _unit(jnp.sign(gradients) if directions is None else directions)
    chex.assert_equal_shape([images, directions])
    return gradient_distance(input_gradients(logits_fn, images + step * directions, labels, scalar), gradients) / step


def _unit(directions: Array) -> Array:
    length = jnp.sqrt(jnp.sum(directions**2, axis=tuple(range(1, directions.ndim)), keepdims=True))
    return directions / jnp.where(length > 0, length, 1.0)
