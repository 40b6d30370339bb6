"""Introspection: how far a student should trust its teacher, image by image.

Zhu et al., "Reliable Adversarial Distillation with Unreliable Teachers" (IAD, ICLR 2022).
"""

import chex
import jax
import jax.numpy as jnp

from jaxrd import objectives

Array = jax.Array


def reliability(teacher_logits: Array, labels: Array, beta: float = 0.1) -> Array:
    """Returns A = softmax(T(x'))[y]^beta, without gradient: near 1 where the teacher is right about the adversarial image.

    Args:
      teacher_logits: [batch, classes], on the adversarial images.
      labels: [batch] int, in [0, classes).
      beta: 0.1 in the published code; 0 trusts always.

    Returns:
      [batch], in [0, 1].
    """
    chex.assert_rank([teacher_logits, labels], [2, 1])
    return jax.lax.stop_gradient(jnp.exp(-beta * objectives.cross_entropy(teacher_logits, labels)))
