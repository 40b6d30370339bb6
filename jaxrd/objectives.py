"""Per-example functions of logits: what attacks maximise and what losses are made of.

Every function takes logits [batch, classes] and returns [batch]; the train step alone takes means. Where two distributions
meet, the target comes first. Labels are int [batch]; where it says so, also soft ones, floating [batch, classes], the
probability of each class.
"""

import chex
import jax
import jax.numpy as jnp

from jaxrd.errors import InputError

Array = jax.Array

# Added to the logit of the true class to keep it out of a maximum over the others: beyond any logit, well inside float32.
_MASK = 1e9


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Returns -log softmax(logits)[label], or -sum_c q_c log softmax(logits)_c for soft labels q.

    Args:
      logits: [batch, classes].
      labels: [batch] int, in [0, classes), or [batch, classes] floating, rows that sum to 1.
    """
    return -expectation(jax.nn.log_softmax(logits), labels)


def expectation(values: Array, labels: Array) -> Array:
    """Returns values[label], or sum_c q_c values_c for soft labels q.

    Args:
      values: [batch, classes], one for each class.
      labels: [batch] int, in [0, classes), or [batch, classes] floating, rows that sum to 1.

    Raises:
      InputError: labels of another dtype.
    """
    if jnp.ndim(labels) == 2:
        chex.assert_equal_shape([values, labels])
        _check_dtype(labels, jnp.floating)
        return jnp.sum(labels * values, axis=-1)
    _check(values, labels)
    return _at(values, labels)


def smooth_labels(labels: Array, smoothing: float, classes: int) -> Array:
    """Returns (1 - s) y + s / classes, with y the labels as a distribution; for s = 0 the labels as they are.

    Label smoothing: Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision", section 7.

    Args:
      labels: [batch] int, in [0, classes), or [batch, classes] floating, rows that sum to 1.
      smoothing: s, in [0, 1).
      classes: number of classes.

    Returns:
      [batch, classes] float32, rows that sum to 1, unless s is 0.
    """
    if smoothing == 0:
        return labels
    if jnp.ndim(labels) == 1:
        labels = jax.nn.one_hot(labels, classes, dtype=jnp.float32)
    return (1 - smoothing) * labels + smoothing / classes


def boosted_cross_entropy(logits: Array, labels: Array) -> Array:
    """Returns -log p_y - log(1.0001 - max_{c != y} p_c) with p the softmax: MART's BCE (Wang et al. 2020, eq. 8).

    The 1.0001 is the published code's; it keeps the second part finite.

    Args:
      logits: [batch, classes].
      labels: [batch] int, in [0, classes).
    """
    _check(logits, labels)
    others = jax.nn.softmax(logits) * (1 - jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype))
    return cross_entropy(logits, labels) - jnp.log(1.0001 - jnp.max(others, axis=-1))


def kl_divergence(target_logits: Array, logits: Array, temperature: float = 1.0) -> Array:
    """Returns KL(softmax(target_logits / tau) || softmax(logits / tau)) = sum_c t_c (log t_c - log s_c), summed over classes.

    The mean over the batch is PyTorch's `batchmean`; its `mean` divides by the number of classes too. Gradients flow into
    both arguments.

    Args:
      target_logits: [batch, classes], the distribution to match: the teacher's.
      logits: [batch, classes].
      temperature: tau, above 0. The factor tau^2 that goes with it in distillation is the caller's.
    """
    chex.assert_rank([target_logits, logits], 2)
    chex.assert_equal_shape([target_logits, logits])
    if temperature != 1:
        target_logits, logits = target_logits / temperature, logits / temperature
    target = jax.nn.log_softmax(target_logits)
    return jnp.sum(jnp.exp(target) * (target - jax.nn.log_softmax(logits)), axis=-1)


def margin(logits: Array, labels: Array) -> Array:
    """Returns max_{c != y} z_c - z_y: above 0 where the example is misclassified (Carlini & Wagner 2017).

    Args:
      logits: [batch, classes].
      labels: [batch] int, in [0, classes).
    """
    _check(logits, labels)
    return jnp.max(logits - _MASK * jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), axis=-1) - _at(logits, labels)


def dlr(logits: Array, labels: Array) -> Array:
    """Returns the difference-of-logits ratio (max_{c != y} z_c - z_y) / (z_pi1 - z_pi3) (Croce & Hein 2020, eq. 6).

    Invariant to shifts and positive scalings of the logits; needs at least 3 classes.

    Args:
      logits: [batch, classes >= 3].
      labels: [batch] int, in [0, classes).
    """
    _check(logits, labels, classes=3)
    top = jnp.sort(logits, axis=-1)
    return margin(logits, labels) / (top[:, -1] - top[:, -3] + 1e-12)


def targeted_dlr(logits: Array, labels: Array, targets: Array) -> Array:
    """Returns (z_t - z_y) / (z_pi1 - (z_pi3 + z_pi4) / 2) (Croce & Hein 2020, eq. 7); needs at least 4 classes.

    Args:
      logits: [batch, classes >= 4].
      labels: [batch] int, the true classes.
      targets: [batch] int, the classes to be mistaken for.
    """
    _check(logits, labels, classes=4)
    top = jnp.sort(logits, axis=-1)
    scale = top[:, -1] - 0.5 * (top[:, -3] + top[:, -4]) + 1e-12
    return (_at(logits, targets) - _at(logits, labels)) / scale


def l1_distance(target_logits: Array, logits: Array) -> Array:
    """Returns ||softmax(target_logits) - softmax(logits)||_1, [batch] in [0, 2]; both arguments [batch, classes]."""
    return jnp.sum(jnp.abs(_probability_difference(target_logits, logits)), axis=-1)


def squared_l2_distance(target_logits: Array, logits: Array) -> Array:
    """Returns ||softmax(target_logits) - softmax(logits)||_2^2, [batch] in [0, 2]; both arguments [batch, classes].

    Squared, hence smooth where the two agree.
    """
    return jnp.sum(_probability_difference(target_logits, logits) ** 2, axis=-1)


def l2_distance(target_logits: Array, logits: Array) -> Array:
    """Returns ||softmax(target_logits) - softmax(logits)||_2, [batch] in [0, sqrt 2]; both arguments [batch, classes].

    Its gradient is 0 where the two agree exactly.
    """
    return safe_sqrt(squared_l2_distance(target_logits, logits))


def safe_sqrt(x: Array) -> Array:
    """Returns the square root, elementwise, with the gradient 0 where x is 0 and its own is infinite."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)


def correct(logits: Array, labels: Array) -> Array:
    """Returns whether the largest logit is the true class (the first index on ties), [batch] bool.

    Args:
      logits: [batch, classes].
      labels: [batch] int, in [0, classes), or [batch, classes] floating: then the likeliest class counts as the true one.
    """
    if jnp.ndim(labels) == 2:
        chex.assert_equal_shape([logits, labels])
        _check_dtype(labels, jnp.floating)
        labels = jnp.argmax(labels, axis=-1)
    _check(logits, labels)
    return jnp.argmax(logits, axis=-1) == labels


def _at(logits: Array, labels: Array) -> Array:
    return jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]


def _probability_difference(target_logits: Array, logits: Array) -> Array:
    chex.assert_rank([target_logits, logits], 2)
    chex.assert_equal_shape([target_logits, logits])
    return jax.nn.softmax(target_logits) - jax.nn.softmax(logits)


def _check(logits: Array, labels: Array, classes: int = 2) -> None:
    if jnp.ndim(labels) == 2 and jnp.issubdtype(jnp.result_type(labels), jnp.floating):
        raise InputError(
            f"labels are soft, {jnp.result_type(labels)}{list(labels.shape)}, where one true class per image is needed; pass "
            "int [batch] (in training: set --config.data.mixing=none)")
    chex.assert_rank([logits, labels], [2, 1])
    _check_dtype(labels, jnp.integer)
    chex.assert_equal_shape_prefix([logits, labels], 1)
    chex.assert_axis_dimension_gteq(logits, 1, classes)


def _check_dtype(labels: Array, kind: type) -> None:
    if not jnp.issubdtype(jnp.result_type(labels), kind):
        raise InputError(
            f"labels are {jnp.result_type(labels)}{list(labels.shape)}; pass int [batch], in [0, classes), or, where they may "
            "be soft, floating [batch, classes], rows that sum to 1")
