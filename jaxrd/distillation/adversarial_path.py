"""Alignment along adversarial paths: the intermediate samples between a clean image and its adversarial one.

Follows Dong, Koniusz, Chen, Wang & Ong, "Robust Distillation via Untargeted and Targeted Intermediate Adversarial Samples"
(CVPR 2024). **Its formulas are a reconstruction**: they are built from the abstract and from later work of the same group,
whose adaptive weight by the drop of the true class's probability (AdvSimplex, ICML 2025) is the default here. Where the
sources leave a choice open, each alternative is an option.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxrd import objectives
from jaxrd.errors import InputError, choose
from jaxrd.threat import example_keys

Array = jax.Array

SCHEMES = ("drop", "uniform", "linear", "last_only", "boundary", "gap")
NORMALISATIONS = ("per_sample", "batch", "none")


def path_weights(
    start_logits: Array,
    path_logits: Array,
    labels: Array,
    scheme: str = "drop",
    *,
    teacher_logits: Array | None = None,
    scale: float = 1.0,
    floor: float = 0.0,
) -> Array:
    """Returns how much each point of an adversarial path counts, w_t(x), without gradient.

    With p the softmax and m points:
      drop: d_t = max(0, p(x)_y - p(x_t)_y), divided by its maximum over the batch at that step;
      uniform: 1;  linear: t / m;  last_only: 1 for the last point, else 0;
      boundary: exp(-|margin(x_t)| / scale), the largest near the decision boundary;
      gap: softmax over t of KL(T || S(x_t)) / scale, the largest where the student is farthest from its teacher.

    Args:
      start_logits: [batch, classes], of the points that the paths start from.
      path_logits: [steps, batch, classes].
      labels: [batch] int, the true classes of the starts, which "drop" and "boundary" look at.
      scheme: as above.
      teacher_logits: [batch, classes] or [steps, batch, classes], what "gap" measures from.
      scale: in logits for "boundary", in nats for "gap"; above 0.
      floor: weights below it are raised to it, in [0, 1].

    Returns:
      [steps, batch], in [0, 1].

    Raises:
      InputError: an unknown scheme, or "gap" without a teacher.
    """
    choose("path weights", scheme, SCHEMES)
    chex.assert_rank([start_logits, path_logits], [2, 3])
    if scheme in ("drop", "boundary"):
        chex.assert_rank(labels, 1)
    chex.assert_equal_shape([start_logits, path_logits[0]])
    steps, batch, _ = path_logits.shape

    if scheme == "drop":
        drop = jnp.maximum(_drop(start_logits, path_logits, labels), 0.0)
        weights = drop / jnp.maximum(jnp.max(drop, axis=1, keepdims=True), 1e-8)
    elif scheme == "uniform":
        weights = jnp.ones((steps, batch))
    elif scheme == "linear":
        weights = jnp.broadcast_to(jnp.arange(1, steps + 1)[:, None] / steps, (steps, batch))
    elif scheme == "last_only":
        weights = jnp.zeros((steps, batch)).at[-1].set(1.0)
    elif scheme == "boundary":
        weights = jnp.exp(-jnp.abs(jax.vmap(objectives.margin, (0, None))(path_logits, labels)) / scale)
    else:
        if teacher_logits is None:
            raise InputError('path weights "gap" measure from the teacher; give teacher_logits')
        teacher_logits = jnp.broadcast_to(teacher_logits, path_logits.shape)
        weights = jax.nn.softmax(jax.vmap(objectives.kl_divergence)(teacher_logits, path_logits) / scale, axis=0)
    return jax.lax.stop_gradient(jnp.maximum(weights, floor))


def weighted_path_loss(
    weights: Array, losses: Array, normalisation: str = "per_sample", points: int | None = None
) -> Array:
    """Returns the weighted sum over a path, one number per example.

      per_sample: sum_t w_t l_t / (sum_t w_t + 1e-8);
      batch: sum_t w_t l_t / (batch mean of sum_t w_t + 1e-8);
      none: (1/m) sum_t w_t l_t, the form of the later work. Where hardly any point counts it nearly vanishes.

    Args:
      weights: [steps, batch].
      losses: [steps, batch].
      normalisation: as above.
      points: m, where points of weight 0 have been left out; None: steps.

    Returns:
      [batch].
    """
    choose("path normalisation", normalisation, NORMALISATIONS)
    chex.assert_equal_shape([weights, losses])
    total, weight = jnp.sum(weights * losses, axis=0), jnp.sum(weights, axis=0)
    if normalisation == "per_sample":
        return total / (weight + 1e-8)
    if normalisation == "batch":
        return total / (jnp.mean(weight) + 1e-8)
    return total / (points or weights.shape[0])


def _drop(start_logits: Array, path_logits: Array, labels: Array) -> Array:
    """p(x)_y - p(x_t)_y, [steps, batch]; near 1 by way of the other classes, or a small drop would be rounding only."""
    true = jax.nn.one_hot(labels, start_logits.shape[-1])
    start, path = jax.nn.softmax(start_logits), jax.nn.softmax(path_logits)
    at_start = jnp.sum(start * true, axis=-1)
    others = jnp.sum(path * (1 - true), axis=-1) - jnp.sum(start * (1 - true), axis=-1)
    return jnp.where(at_start > 0.5, others, at_start - jnp.sum(path * true, axis=-1))


def hinge(losses: Array, bound: float) -> Array:
    """Returns losses - bound where their batch mean exceeds the bound, else 0: its mean is max(0, mean(losses) - bound).

    Args:
      losses: [batch].
      bound: see `hinge_bound`.
    """
    return jnp.where(jnp.mean(losses) > bound, losses - bound, 0.0)


def hinge_bound(threshold: float, classes: int, distance: str) -> float:
    """Returns the distance of (1 - threshold, threshold/(classes - 1), ...) from the one-hot distribution.

    Args:
      threshold: in (0, 1).
      classes: at least 2.
      distance: a name of `ALIGNMENTS`.
    """
    one_hot = -1e9 * (jnp.arange(classes) > 0)
    other = jnp.log(jnp.where(jnp.arange(classes) > 0, threshold / (classes - 1), 1 - threshold))
    return ALIGNMENTS[distance](one_hot[None], other[None])[0]


def jensen_shannon(target_logits: Array, logits: Array) -> Array:
    """Returns 1/2 KL(t || m) + 1/2 KL(s || m) with m = (t + s) / 2, [batch] in [0, log 2]; arguments [batch, classes]."""
    t, s = jax.nn.log_softmax(target_logits), jax.nn.log_softmax(logits)
    m = jnp.logaddexp(t, s) - jnp.log(2.0)
    return 0.5 * jnp.sum(jnp.exp(t) * (t - m) + jnp.exp(s) * (s - m), axis=-1)


# How far a student's distribution is from its target's, at one point: (target logits, logits) -> [batch].
ALIGNMENTS = {
    "kl": objectives.kl_divergence,
    "squared_error": objectives.squared_l2_distance,
    "js": jensen_shannon,
    "l2": objectives.l2_distance,
}


def draw_anchors(key: Array, labels: Array) -> Array:
    """Returns for each image of a batch the position of an anchor of another class, whose negative it is.

    The anchor's class is uniform over the other classes in the batch, the anchor uniform within it. The published pairing
    goes the other way round, from an anchor to a random negative image; drawing the anchor makes every image a negative
    exactly once, to the same joint distribution of (negative, anchor's class) where classes are equally frequent.

    Args:
      key: typed key.
      labels: [batch] int, of two classes at least.

    Returns:
      [batch] int, labels[anchors] != labels.

    Raises:
      InputError: one class only. Under jit there are no labels to read: the caller must have.
    """
    if not isinstance(labels, jax.core.Tracer) and np.all(np.asarray(labels) == np.asarray(labels)[0]):
        raise InputError(f"all {labels.shape[0]} labels are {labels[0]}; negatives need a batch of two classes at least")
    other = labels[:, None] != labels[None, :]
    alike = jnp.sum(~other, axis=1)  # images of each one's class
    return jax.random.categorical(key, jnp.where(other, -jnp.log(alike)[None, :], -jnp.inf), axis=1)


def draw_targets(
    key: Array, labels: Array, classes: int, scores: Array | None = None, *, present_only: bool = False,
) -> Array:
    """Returns a target class other than the true one for each example.

    Args:
      key: typed key.
      labels: [batch] int.
      classes: number of classes, at least 2.
      scores: [batch, classes]; the best other class is taken. None: uniformly at random.
      present_only: only classes of which the batch holds an image.

    Returns:
      [batch] int, never equal to the label.
    """
    if scores is None:
        keys = example_keys(key, labels.shape[0])
        scores = jax.vmap(lambda key: jax.random.uniform(key, (classes,)))(keys)
    allowed = jnp.arange(classes)[None, :] != labels[:, None]
    if present_only:
        allowed &= jnp.zeros(classes, bool).at[labels].set(True)[None, :]
    return jnp.argmax(jnp.where(allowed, scores, -jnp.inf), axis=-1)
