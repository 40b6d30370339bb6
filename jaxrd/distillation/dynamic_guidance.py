"""Dynamic guidance: what a teacher's mistakes are good for.

Park & Min, "Dynamic Guidance Adversarial Distillation with Enhanced Teacher Knowledge" (DGAD, ECCV 2024):
misclassification-aware partitioning (MAP), error-corrective label swapping (ELS), predictive consistency regularisation (PCR).
"""

import chex
import jax
import jax.numpy as jnp

from jaxrd import objectives

Array = jax.Array


def misclassified(teacher_logits: Array, labels: Array) -> Array:
    """Returns whether the teacher is wrong (DGAD, misclassification-aware partitioning, eq. 5).

    On the clean images it splits the batch: those that the teacher gets wrong are distilled clean, the others adversarially.

    Args:
      teacher_logits: [batch, classes].
      labels: [batch] int, in [0, classes).

    Returns:
      [batch] bool.
    """
    chex.assert_rank([teacher_logits, labels], [2, 1])
    return ~objectives.correct(teacher_logits, labels)


def swap_labels(teacher_logits: Array, labels: Array) -> Array:
    """Exchanges the true-class and top-class logits where the teacher errs (DGAD, error-corrective label swapping).

    The softmax keeps its values and only their places change, so the corrected target is as confident as the wrong one was.

    Args:
      teacher_logits: [batch, classes].
      labels: [batch] int, in [0, classes).

    Returns:
      [batch, classes]; rows that the teacher has right are unchanged.
    """
    chex.assert_rank([teacher_logits, labels], [2, 1])
    classes = jnp.arange(teacher_logits.shape[-1])[None, :]
    true, top = labels[:, None], jnp.argmax(teacher_logits, axis=-1)[:, None]
    # Where each entry is taken from; the identity where top and true class are one.
    source = jnp.where(classes == true, top, jnp.where(classes == top, true, classes))
    return jnp.take_along_axis(teacher_logits, source, axis=-1)


def smooth_labels(teacher_logits: Array, labels: Array, smoothing: float = 0.1) -> Array:
    """Replaces a wrong teacher's output by a smoothed one-hot label: a control for `swap_labels`.

    The paper compares with label smoothing (Table 3); its definition there is not published.

    Args:
      teacher_logits: [batch, classes].
      labels: [batch] int, in [0, classes).
      smoothing: probability that is spread over all classes, in [0, 1]; 0 is the one-hot label.

    Returns:
      [batch, classes], logits: their softmax is the target.
    """
    classes = teacher_logits.shape[-1]
    target = (1 - smoothing) * jax.nn.one_hot(labels, classes) + smoothing / classes
    return _where_wrong(teacher_logits, labels, target)


def mix_labels(teacher_logits: Array, labels: Array) -> Array:
    """Replaces a wrong teacher's output by its mean with the one-hot label: a control for `swap_labels`.

    The paper compares with label mixing (Table 3); its definition there is not published.

    Args and returns as `smooth_labels`.
    """
    target = 0.5 * (jax.nn.softmax(teacher_logits) + jax.nn.one_hot(labels, teacher_logits.shape[-1]))
    return _where_wrong(teacher_logits, labels, target)


def predictive_consistency(logits_a: Array, logits_b: Array) -> Array:
    """Returns (1/C) sum_c (softmax(a)_c - softmax(b)_c)^2 (DGAD, predictive consistency regularisation, as published code).

    Gradients flow into both. The paper writes ||softmax(a) - softmax(b)||_2, which is `objectives.l2_distance`.

    Args:
      logits_a: [batch, classes].
      logits_b: [batch, classes].

    Returns:
      [batch], in [0, 2/C].
    """
    return objectives.squared_l2_distance(logits_a, logits_b) / logits_a.shape[-1]


def _where_wrong(teacher_logits: Array, labels: Array, probabilities: Array) -> Array:
    wrong = misclassified(teacher_logits, labels)[:, None]
    # A logit of -1e9 for a probability of 0: exp and its product with the logarithm stay finite.
    return jnp.where(wrong, jnp.where(probabilities > 0, jnp.log(jnp.maximum(probabilities, 1e-38)), -1e9), teacher_logits)
