"""First derivatives of the logits by the images: products with the Jacobian, and all of it, a few rows at a time."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxrd import objectives
from jaxrd.attacks.pgd import loop_unroll
from jaxrd.attacks.search import check_count
from jaxrd.distillation.gradient_matching import LogitsFn

Array = jax.Array


class JacobianAlignment(NamedTuple):
    """How alike two Jacobians are.

    Attributes:
      distance: [batch], ||J_a - J_b||_F.
      cosine: [batch] in [-1, 1], <J_a, J_b>_F / (||J_a||_F ||J_b||_F); 0 where either is 0.
    """

    distance: Array
    cosine: Array


def vector_jacobian_product(logits_fn: LogitsFn, images: Array, vectors: Array) -> Array:
    """Returns v^T J, the gradient of <v, logits>, [batch, h, w, c], by reverse mode.

    The transpose of `directional_derivative`: <v^T J, d> = <v, J d>.

    Args:
      logits_fn: images -> logits, examples independent of each other.
      images: [batch, h, w, c].
      vectors: [batch, classes], v.
    """
    logits, pull = jax.vjp(logits_fn, images)
    chex.assert_equal_shape([logits, vectors])
    return pull(vectors.astype(logits.dtype))[0]


def jacobian(logits_fn: LogitsFn, images: Array, *, chunk: int = 10) -> Array:
    """Returns J, d logits / d images, [batch, classes, h, w, c].

    Row by row in reverse mode where an image has at least as many values as there are classes, else column by column in
    forward mode; `chunk` of them at once, one forward pass for all. Besides the result, memory is that of this pass and of
    `chunk` passes back (or on) of the batch, whatever the number of classes.

    Args:
      logits_fn: images -> logits, examples independent of each other.
      images: [batch, h, w, c].
      chunk: rows or columns at once, at least 1.
    """
    chex.assert_rank(images, 4)
    rows = _rows(logits_fn, images)
    _, blocks = _by_blocks(lambda total, indices: (total, rows.product(indices)), jnp.zeros([]), rows.count, chunk)
    blocks = jnp.moveaxis(blocks.reshape(-1, *blocks.shape[2:])[:rows.count], 0, 1)  # [batch, rows, ...]
    if not rows.reverse:
        blocks = jnp.moveaxis(blocks, 1, 2)
    return blocks.reshape(len(images), -1, *images.shape[1:])


def jacobian_alignment(a_fn: LogitsFn, b_fn: LogitsFn, images: Array, *, chunk: int = 10) -> JacobianAlignment:
    """Returns the Frobenius distance and cosine of two networks' Jacobians: all classes at once, and no scalar to choose.

    For random directions d with covariance s^2 1, E ||J_a d - J_b d||^2 = s^2 distance^2: what matching along random
    directions would take to 0. Blocks of rows are compared and forgotten, so neither Jacobian is ever in memory.

    Args:
      a_fn, b_fn: images -> logits [batch, classes], as many classes in both.
      images: [batch, h, w, c].
      chunk: see `jacobian`.
    """
    chex.assert_rank(images, 4)
    a, b = _rows(a_fn, images), _rows(b_fn, images)
    chex.assert_equal(a.count, b.count)

    def compare(total, indices):
        block_a, block_b = (rows.product(indices) for rows in (a, b))
        axes = (0, *range(2, block_a.ndim))
        products = (block_a - block_b) ** 2, block_a * block_b, block_a**2, block_b**2
        return total + jnp.stack([jnp.sum(product, axis=axes) for product in products]), None

    (squared, inner, norm_a, norm_b), _ = _by_blocks(compare, jnp.zeros([4, len(images)], images.dtype), a.count, chunk)
    norms = jnp.sqrt(norm_a) * jnp.sqrt(norm_b)
    cosine = jnp.where(norms > 0, inner / jnp.where(norms > 0, norms, 1.0), 0.0)
    return JacobianAlignment(objectives.safe_sqrt(squared), jnp.clip(cosine, -1.0, 1.0))


class _Rows(NamedTuple):
    """A Jacobian: `product(indices [k])` are k of its rows, [k, batch, h, w, c], or of its columns, [k, batch, classes]."""

    product: Callable[[Array], Array]
    count: int
    reverse: bool


def _rows(logits_fn, images) -> _Rows:
    classes = jax.eval_shape(logits_fn, images).shape[1]
    size = math.prod(images.shape[1:])
    reverse = classes <= size
    if reverse:
        logits, pull = jax.vjp(logits_fn, images)
        count, shape, apply = classes, logits.shape, lambda vector: pull(vector.astype(logits.dtype))[0]
    else:
        count, shape, apply = size, images.shape, jax.linearize(logits_fn, images)[1]

    def product(indices):  # 0 for an index beyond the last
        units = jax.nn.one_hot(indices, count, dtype=images.dtype).reshape(-1, 1, *shape[1:])
        return jax.vmap(apply)(jnp.broadcast_to(units, (len(indices), *shape)))

    return _Rows(product, count, reverse)


def _by_blocks(body: Callable[[Any, Array], tuple[Any, Any]], start: Any, count: int, chunk: int) -> tuple[Any, Any]:
    """Scans `body(carry, indices)` over blocks of indices up to `count`, the last one padded, one after the other."""
    check_count("chunk", chunk)
    blocks = math.ceil(count / chunk)
    size = math.ceil(count / blocks)
    indices = jnp.arange(blocks * size).reshape(blocks, size)

    def step(state, indices):
        # An unrolled scan leaves the order of its steps open, and all blocks might lie in memory at once: the indices wait for
        # what the block before gave, through a bound that none of them reaches. XLA's CPU backend forgets a barrier too early.
        carry, previous = state
        indices = jnp.minimum(indices, jnp.where(previous > 0, blocks * size, blocks * size + 1))
        carry, output = body(carry, indices)
        return (carry, jax.tree.leaves((carry, output))[-1].ravel()[0]), output

    if blocks == 1:  # an unrolled scan of one step would still be compiled as a loop
        carry, output = body(start, indices[0])
        return carry, jax.tree.map(lambda leaf: leaf[None], output)
    (carry, _), outputs = jax.lax.scan(step, (start, jnp.zeros([], jax.tree.leaves(start)[0].dtype)), indices,
                                       unroll=loop_unroll())
    return carry, outputs
