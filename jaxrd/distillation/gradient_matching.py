"""Input-gradient matching between a student and a teacher, three ways: by Taylor difference, exactly, directly.

Lee, Cho & Kim, "Indirect Gradient Matching for Adversarial Robust Distillation" (IGDM, ICLR 2025). Everything here maps
arrays, or functions of images, to one number per example. The primitives of exact and direct matching take functions; the
`..._loss` beside each takes what those functions gave, for a method whose views have computed it.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from jaxrd import objectives
from jaxrd.errors import choose

Array = jax.Array
LogitsFn = Callable[[Array], Array]  # images -> logits
Scalar = str | Callable[[Array, Array], Array]  # a name in SCALARS, or (logits, labels) -> [batch]


def igdm(
    student_plus: Array, student_minus: Array, teacher_plus: Array, teacher_minus: Array, distance: str = "kl"
) -> Array:
    """Returns D(T(x+d) - T(x-d), S(x+d) - S(x-d)), indirect gradient matching (IGDM, eq. 8).

    By Taylor's theorem f(x+d) - f(x-d) = 2 J d + O(|d|^3): the central difference along the adversarial perturbation d
    stands for the input gradient without differentiating twice. D is KL(softmax(.) || softmax(.)), teacher first: the raw
    logit differences go into the softmax, at temperature 1, without division by 2 or |d|, as in the published code; x-d is
    not clipped to the pixel bounds there. 0, with zero gradient, where student and teacher agree and where d = 0.

    Args:
      student_plus: [batch, classes], S(x+d).
      student_minus: [batch, classes], S(x-d).
      teacher_plus: [batch, classes], T(x+d), a constant to the caller's gradient if so wished.
      teacher_minus: [batch, classes], T(x-d).
      distance: "kl", or "l1" or "l2": that norm of the difference between the raw logit differences, which the paper calls
        nearly indistinguishable from KL (section 4.1).

    Returns:
      [batch]. Its mean over the batch is the published loss.
    """
    choose("igdm distance", distance, DIFFERENCE_DISTANCES)
    return DIFFERENCE_DISTANCES[distance](teacher_plus - teacher_minus, student_plus - student_minus)


def jvp_matching(student_fn: LogitsFn, teacher_fn: LogitsFn, images: Array, delta: Array) -> Array:
    """Returns KL(softmax(2 J_T d) || softmax(2 J_S d)): what the Taylor difference of `igdm` approximates.

    The Jacobian-vector products are exact, by forward mode, so no remainder and no second differentiation. As t -> 0,
    igdm at t*d and this at t*d agree to O(t^4), both being t^2 * 2 Var_c[(J_T - J_S) d] + ... (variance over classes).

    Args:
      student_fn: images -> logits, the student's parameters closed over.
      teacher_fn: images -> logits.
      images: [batch, h, w, c].
      delta: [batch, h, w, c], the direction d.

    Returns:
      [batch].
    """
    return jvp_loss(directional_derivative(teacher_fn, images, delta), directional_derivative(student_fn, images, delta))


def jvp_loss(teacher: Array, student: Array) -> Array:
    """Returns KL(softmax(2 J_T d) || softmax(2 J_S d)) of two directional derivatives [batch, classes]."""
    return objectives.kl_divergence(2 * teacher, 2 * student)


def directional_derivative(logits_fn: LogitsFn, images: Array, delta: Array) -> Array:
    """Returns J d, [batch, classes], by forward mode, at images and along delta of [batch, h, w, c]."""
    chex.assert_equal_shape([images, delta])
    return jax.jvp(logits_fn, (images,), (delta,))[1]


def gradient_matching(
    student_fn: LogitsFn,
    teacher_fn: LogitsFn,
    images: Array,
    labels: Array,
    *,
    scalar: Scalar = "probability",
    distance: str = "l2",
) -> Array:
    """Returns D(ds/dx of the teacher, ds/dx of the student): direct gradient matching (IGDM, eq. 11).

    The paper's negative control: training on it differentiates twice. Which scalar s is differentiated and which distance
    is taken it does not say.

    Args:
      student_fn: images -> logits, examples independent of each other.
      teacher_fn: images -> logits.
      images: [batch, h, w, c].
      labels: [batch] int, in [0, classes), or soft ones, [batch, classes] floating.
      scalar: see `input_gradients`.
      distance: "l2" norm of the difference, "squared_l2", or "cosine" (1 - cosine similarity).

    Returns:
      [batch]. Its gradient is finite where the two input gradients agree, or one is 0.
    """
    choose("gradient_matching distance", distance, GRADIENT_DISTANCES)
    teacher = jax.lax.stop_gradient(input_gradients(teacher_fn, images, labels, scalar))
    return GRADIENT_DISTANCES[distance](teacher, input_gradients(student_fn, images, labels, scalar))


def input_gradients(logits_fn: LogitsFn, images: Array, labels: Array, scalar: Scalar = "probability") -> Array:
    """Returns ds/dx of a scalar of the logits, [batch, h, w, c].

    Args:
      logits_fn: images -> logits [batch, classes], examples independent of each other.
      images: [batch, h, w, c] float32.
      labels: [batch] int, or soft ones, [batch, classes] floating.
      scalar: "probability" (the softmax's) or "logit" of the true class, "cross_entropy", or "margin", the largest other logit
        above the true one (`objectives.margin`); the first two are expectations under soft labels, the last has none. Or any
        function (logits, labels) -> [batch].

    Raises:
      InputError: an unknown name; soft labels with "margin".
    """
    chex.assert_rank(images, 4)
    return jax.grad(lambda images: jnp.sum(scalar_of(logits_fn, labels, scalar)(images)))(images)


def scalar_of(logits_fn: LogitsFn, labels: Array, scalar: Scalar) -> Callable[[Array], Array]:
    """Returns the function images -> [batch] of a scalar of the logits; arguments and errors as for `input_gradients`."""
    if not callable(scalar):
        choose("gradient_matching scalar", scalar, SCALARS)
        scalar = SCALARS[scalar]

    def function(images):
        values = scalar(logits_fn(images), labels)
        chex.assert_shape(values, (images.shape[0],))
        return values

    return function


def gradient_distance(a: Array, b: Array) -> Array:
    """Returns ||a - b||_2 per example, [batch]; its gradient is 0 where a and b agree.

    Of gradients, [batch, h, w, c], or of whole Jacobians, [batch, classes, h, w, c]: then it is the Frobenius norm.
    """
    return objectives.safe_sqrt(_squared_distance(a, b))


def gradient_cosine(a: Array, b: Array) -> Array:
    """Returns the cosine of the angle between a and b per example, [batch], in [-1, 1]; 0 where either is 0.

    Of gradients, [batch, h, w, c], or of whole Jacobians, [batch, classes, h, w, c], by the Frobenius inner product.
    """
    return jnp.clip(jnp.sum(_unit(a) * _unit(b), axis=1), -1.0, 1.0)


def _probability(logits: Array, labels: Array) -> Array:
    if jnp.ndim(labels) == 2:
        return objectives.expectation(jax.nn.softmax(logits), labels)
    return jnp.exp(-objectives.cross_entropy(logits, labels))


# (logits, labels) -> [batch]
SCALARS = {
    "probability": _probability,
    "logit": objectives.expectation,
    "cross_entropy": objectives.cross_entropy,
    "margin": objectives.margin,
}


def _squared_distance(a: Array, b: Array) -> Array:
    return jnp.sum((_flat(a) - _flat(b)) ** 2, axis=1)


# (target, own) -> [batch]
DIFFERENCE_DISTANCES = {
    "kl": objectives.kl_divergence,
    "l1": lambda a, b: jnp.sum(jnp.abs(a - b), axis=-1),
    "l2": gradient_distance,
}
GRADIENT_DISTANCES = {
    "l2": gradient_distance,
    "squared_l2": _squared_distance,
    "cosine": lambda a, b: 1 - gradient_cosine(a, b),
}


def _unit(x: Array) -> Array:
    """Each example at length 1, or 0 where it is 0, [batch, size]."""
    x = _flat(x)
    # The gradients of a saturated softmax fall below 1e-20, where their squares underflow: measured by the largest first,
    # a scale that drops out again and needs no gradient.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=1, keepdims=True))
    x = x / jnp.where(largest > 0, largest, 1.0)
    return x / jnp.sqrt(jnp.maximum(jnp.sum(x**2, axis=1, keepdims=True), 1.0))  # the norm is below 1 only where it is 0


def _flat(x: Array) -> Array:
    return x.reshape(x.shape[0], -1)
