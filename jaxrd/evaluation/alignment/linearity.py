"""How far first derivatives reach: remainders of Taylor expansions of the logits, and of a loss."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from jaxrd.attacks.pgd import pgd_path
from jaxrd.attacks.search import check_count
from jaxrd.distillation.gradient_matching import LogitsFn, Scalar, scalar_of
from jaxrd.threat import ThreatModel

Array = jax.Array


def taylor_remainder(logits_fn: LogitsFn, images: Array, deltas: Array) -> Array:
    """Returns ||f(x+d) - f(x) - J d|| / ||f(x+d)||: the share of the logits that the expansion about x misses.

    Lee et al. 2025 (IGDM), section 3.1 and figure 2, with d uniform and of size 8/255. 0 for an affine network. Below 1e-6 it
    is the rounding of float32.

    Args:
      logits_fn: images -> logits [batch, classes].
      images: [batch, h, w, c], x.
      deltas: [batch, h, w, c], d.

    Returns:
      [batch], at least 0; 0 where the remainder is 0, whatever it is divided by.
    """
    chex.assert_rank(images, 4)
    chex.assert_equal_shape([images, deltas])
    at_images, first_order = jax.jvp(logits_fn, (images,), (deltas,))
    moved = logits_fn(images + deltas)
    return _share(moved - at_images - first_order, moved)


def central_remainder(logits_fn: LogitsFn, images: Array, deltas: Array) -> Array:
    """Returns ||f(x+d) - f(x-d) - 2 J d|| / ||f(x+d) - f(x-d)||: the share of IGDM's difference that is not the gradient's.

    IGDM (eq. 8) matches f(x+d) - f(x-d) for 2 J d. Even orders cancel in it: 0 for affine and quadratic networks, and else of
    second order in d, as this is a share.

    Args:
      logits_fn: images -> logits [batch, classes].
      images: [batch, h, w, c], x.
      deltas: [batch, h, w, c], d.

    Returns:
      [batch], at least 0; 0 where the remainder is 0, whatever it is divided by.
    """
    chex.assert_rank(images, 4)
    chex.assert_equal_shape([images, deltas])
    difference = logits_fn(images + deltas) - logits_fn(images - deltas)
    return _share(difference - 2 * jax.jvp(logits_fn, (images,), (deltas,))[1], difference)


def linearity_error(
    logits_fn: LogitsFn, images: Array, deltas: Array, labels: Array, scalar: Scalar = "cross_entropy"
) -> Array:
    """Returns |l(x+d) - l(x) - <d, dl/dx>|, of a scalar l of the logits.

    Qin et al. 2019, "Adversarial Robustness through Local Linearization" (LLR), section 4.

    Args:
      logits_fn: images -> logits, examples independent of each other.
      images: [batch, h, w, c], x.
      deltas: [batch, h, w, c], d.
      labels: [batch] int, or what `scalar` takes.
      scalar: see `input_gradients`.

    Returns:
      [batch], at least 0.
    """
    chex.assert_equal_shape([images, deltas])
    return _error_of_expansion(scalar_of(logits_fn, labels, scalar), images)(images + deltas)


def path_linearity(logits_fn: LogitsFn, images: Array, path: Array, labels: Array, scalar: Scalar = "cross_entropy") -> Array:
    """Returns `linearity_error` at every point of a path, with the expansion about the images, [steps, batch].

    One gradient and `steps` forward passes, one after the other.

    Args:
      logits_fn, images, labels, scalar: see `linearity_error`.
      path: [steps, batch, h, w, c], points such as `attacks.pgd_path` gives; the images are not among them.
    """
    chex.assert_rank([images, path], [4, 5])
    return jax.lax.map(_error_of_expansion(scalar_of(logits_fn, labels, scalar), images), path)


def local_linearity(
    key: Array,
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    *,
    threat: ThreatModel,
    scalar: Scalar = "cross_entropy",
    steps: int = 10,
    relative_step: float = 0.25,
) -> Array:
    """Returns max over the ball of |l(x+d) - l(x) - <d, dl/dx>|, as gradient ascent finds it: the gamma of LLR.

    A lower bound of the maximum: the largest error among the steps of PGD on the error itself, from a uniform start. The true
    gamma bounds what d does to the loss, |l(x+d) - l(x)| <= |<d, dl/dx>| + gamma (Qin et al. 2019, proposition 4.1).

    Args:
      key: one typed key, or [batch] typed keys.
      logits_fn, images, labels, scalar: see `linearity_error`.
      threat: the ball, and the pixel bounds, which points stay in too.
      steps: of the ascent.
      relative_step: length of a step in units of epsilon.

    Returns:
      [batch], at least 0.
    """
    check_count("steps", steps)
    error = _error_of_expansion(scalar_of(logits_fn, labels, scalar), images)
    path = pgd_path(key, error, images, threat=threat, step_size=relative_step * threat.epsilon, steps=steps)
    return jnp.max(jax.lax.map(error, path), axis=0)


def _error_of_expansion(function: Callable[[Array], Array], images: Array) -> Callable[[Array], Array]:
    """Returns points [batch, h, w, c] -> |l(points) - l(x) - <points - x, dl/dx>|, [batch]."""
    at_images, pull = jax.vjp(function, images)
    gradients = pull(jnp.ones_like(at_images))[0]

    def error(points):
        linear = jnp.sum((points - images) * gradients, axis=tuple(range(1, points.ndim)))
        return jnp.abs(function(points) - at_images - linear)

    return error


def _share(part: Array, whole: Array) -> Array:
    part, whole = (jnp.linalg.norm(values, axis=-1) for values in (part, whole))
    return jnp.where(part == 0, 0.0, part / whole)
