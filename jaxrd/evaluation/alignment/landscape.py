"""Where predictions change on the way from an image, and the loss in a plane through it."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxrd.attacks.search import check_count
from jaxrd.distillation.gradient_matching import LogitsFn, Scalar, scalar_of
from jaxrd.errors import need_positive
from jaxrd.threat import example_keys

Array = jax.Array


def boundary_distance(
    logits_fn: LogitsFn,
    images: Array,
    directions: Array,
    *,
    labels: Array | None = None,
    maximum: float = 1.0,
    grid: int = 32,
    bisections: int = 20,
) -> Array:
    """Returns the first t in (0, maximum] at which the predicted class of x + t d is another one, [batch].

    The ray is searched on a grid of equal steps and the first step that holds a change is halved `bisections` times, so t is
    exact to maximum / (grid * 2^bisections), unless the prediction changes and changes back inside one step of the grid. Points
    of the ray may lie outside the pixel bounds. With d = x' - x and maximum 1 it is the share of the way to x'.

    Args:
      logits_fn: images -> logits, examples independent of each other.
      images: [batch, h, w, c], x.
      directions: [batch, h, w, c], d.
      labels: [batch] int, the class that is left; by default that of the prediction at x. With labels, t is 0 where x is
        misclassified.
      maximum: end of the ray, above 0.
      grid: steps of the grid, at least 1.
      bisections: at least 0.

    Returns:
      [batch], a point at which the prediction has changed; inf where none is found.
    """
    check_count("grid", grid)
    need_positive("maximum", maximum)
    chex.assert_equal_shape([images, directions])
    times = maximum * jnp.arange(grid + 1, dtype=images.dtype) / grid
    return _first_change(logits_fn, lambda t: images + _per_image(t) * directions, labels, images, times, bisections)


def path_boundary(
    logits_fn: LogitsFn,
    images: Array,
    path: Array,
    *,
    labels: Array | None = None,
    grid: int = 1,
    bisections: int = 20,
) -> Array:
    """Returns the number of steps along a path after which the predicted class is another one, [batch], in (0, steps].

    Between its points the path goes straight, so 2.5 is halfway from its second point to its third.

    Args:
      logits_fn: images -> logits, examples independent of each other.
      images: [batch, h, w, c], where the path begins.
      path: [steps, batch, h, w, c], such as `attacks.pgd_path` gives.
      labels, bisections: see `boundary_distance`.
      grid: steps of the grid within each step of the path.

    Returns:
      [batch], see `boundary_distance`; inf where no change is found.
    """
    check_count("grid", grid)
    chex.assert_rank([images, path], [4, 5])
    knots, everyone = jnp.concatenate([images[None], path]), jnp.arange(len(images))

    def points(t):
        before = jnp.clip(jnp.floor(t).astype(jnp.int32), 0, len(path) - 1)
        start, end = knots[before, everyone], knots[before + 1, everyone]
        return start + _per_image(t - before) * (end - start)

    times = jnp.arange(len(path) * grid + 1, dtype=images.dtype) / grid
    return _first_change(logits_fn, points, labels, images, times, bisections)


class LossSurface(NamedTuple):
    """A scalar of the logits in a plane through each image.

    Attributes:
      values: [batch, n, n]; [b, i, j] is at x + axis[i] * adversarial + axis[j] * random.
      axis: [n], from -extent to extent.
      adversarial: [batch, h, w, c], the first direction.
      random: [batch, h, w, c], the second one, orthogonal to it and of the same L2 length.
    """

    values: Array
    axis: Array
    adversarial: Array
    random: Array


def loss_surface(
    key: Array,
    logits_fn: LogitsFn,
    images: Array,
    adversarial: Array,
    labels: Array,
    *,
    n: int = 21,
    extent: float = 1.0,
    scalar: Scalar = "cross_entropy",
) -> LossSurface:
    """Returns the loss in the plane of an adversarial and a random direction, as papers draw it to show smoothness.

    A rough surface around a low point is the sign of masked gradients. One forward pass of the batch for each of the n * n
    points, one after the other. Points of the plane may lie outside the pixel bounds.

    Args:
      key: one typed key, or [batch] typed keys (see `jaxrd.threat.example_keys`), of the random direction.
      logits_fn: images -> logits, examples independent of each other.
      images: [batch, h, w, c], x.
      adversarial: [batch, h, w, c], adversarial images; where one is x itself, both directions are 0.
      labels: [batch] int, or what `scalar` takes.
      n: points of an axis, at least 2; an odd number has x itself in the middle.
      extent: of both axes, in units of the adversarial perturbation.
      scalar: see `input_gradients`.
    """
    check_count("n", n, least=2)
    need_positive("extent", extent)
    chex.assert_rank(images, 4)
    chex.assert_equal_shape([images, adversarial])
    directions = adversarial - images
    noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:], images.dtype))(example_keys(key, len(images)))
    random = _orthogonal(noise, directions)
    function, axis = scalar_of(logits_fn, labels, scalar), jnp.linspace(-extent, extent, n, dtype=images.dtype)
    pairs = jnp.stack(jnp.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    values = jax.lax.map(lambda pair: function(images + pair[0] * directions + pair[1] * random), pairs)
    return LossSurface(jnp.moveaxis(values, 0, 1).reshape(-1, n, n), axis, directions, random)


def _first_change(logits_fn, points: Callable[[Array], Array], labels, images, times: Array, bisections: int) -> Array:
    """Returns the first t at which the class of `points(t [batch])` is another, on the grid `times` from 0 on, then halved."""
    check_count("bisections", bisections, least=0)
    home = jnp.argmax(logits_fn(images), axis=-1) if labels is None else labels
    chex.assert_shape(home, (len(images),))

    def changed(t):
        return jnp.argmax(logits_fn(points(t)), axis=-1) != home

    on_grid = jax.lax.map(lambda t: changed(jnp.full(len(images), t)), times)  # [grid + 1, batch]
    first = jnp.argmax(on_grid, axis=0)

    def halve(_, interval):
        low, high = interval
        middle = (low + high) / 2
        there = changed(middle)
        return jnp.where(there, low, middle), jnp.where(there, middle, high)

    _, found = jax.lax.fori_loop(0, bisections, halve, (times[jnp.maximum(first - 1, 0)], times[first]))
    return jnp.where(jnp.any(on_grid, axis=0), jnp.where(first == 0, 0.0, found), jnp.inf)


def _orthogonal(vectors: Array, directions: Array) -> Array:
    """Returns the part of the vectors that is orthogonal to the directions, at their length; 0 where these are 0."""
    def inner(a, b):
        return jnp.sum(a * b, axis=(1, 2, 3), keepdims=True)

    squared = inner(directions, directions)
    unit = directions / jnp.where(squared > 0, jnp.sqrt(squared), 1.0)
    for _ in range(2):  # once leaves what rounding left
        vectors = vectors - inner(vectors, unit) * unit
    lengths = inner(vectors, vectors)
    return vectors * jnp.sqrt(squared / jnp.where(lengths > 0, lengths, 1.0))


def _per_image(values: Array) -> Array:
    return values[:, None, None, None]
