"""Input-gradient matching between a student and a teacher.

Lee, Cho & Kim, "Indirect Gradient Matching for Adversarial Robust Distillation" (IGDM, ICLR 2025). Everything here maps
arrays, or functions of images, to one number per example.
"""

from collections.abc import Callable

import chex
import jax

from jaxrd import objectives

Array = jax.Array
LogitsFn = Callable[[Array], Array]  # images -> logits


def igdm(student_plus: Array, student_minus: Array, teacher_plus: Array, teacher_minus: Array) -> Array:
    """Returns KL(softmax(T(x+d) - T(x-d)) || softmax(S(x+d) - S(x-d))), indirect gradient matching (IGDM, eq. 8).

    By Taylor's theorem f(x+d) - f(x-d) = 2 J d + O(|d|^3): the central difference along the adversarial perturbation d
    stands for the input gradient without differentiating twice. The raw logit differences go into the softmax, at
    temperature 1, without division by 2 or |d|, as in the published code; x-d is not clipped to the pixel bounds there.
    0, with zero gradient, where student and teacher agree and where d = 0.

    Args:
      student_plus: [batch, classes], S(x+d).
      student_minus: [batch, classes], S(x-d).
      teacher_plus: [batch, classes], T(x+d), a constant to the caller's gradient if so wished.
      teacher_minus: [batch, classes], T(x-d).

    Returns:
      [batch]. Its mean over the batch is the published loss.
    """
    return objectives.kl_divergence(teacher_plus - teacher_minus, student_plus - student_minus)


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
    chex.assert_equal_shape([images, delta])
    _, student = jax.jvp(student_fn, (images,), (delta,))
    _, teacher = jax.jvp(teacher_fn, (images,), (delta,))
    return objectives.kl_divergence(2 * teacher, 2 * student)
