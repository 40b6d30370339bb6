"""Adversarial weight perturbation: the worst weights near the present ones.

Wu, Xia & Wang, "Adversarial Weight Perturbation Helps Robust Generalization" (AWP, NeurIPS 2020).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class WeightPerturbation:
    """Part of a method: its loss is taken at perturbed weights.

    Attributes:
      gamma: size of the perturbation relative to each layer's weights, above 0 (published code: 0.01 on AT, 0.005 on TRADES).
      warmup: fraction of training without it, in [0, 1).
    """

    gamma: float
    warmup: float = 0.0

    def size(self, progress: Array) -> Array:
        """Returns gamma, or 0 in the warm-up; progress in (0, 1] as `Term.ramp` takes it."""
        return self.gamma * (progress > self.warmup)


def perturb_weights(params: Any, gradients: Any, gamma: Array | float) -> Any:
    """Returns w + gamma * ||w|| * g / ||g|| for every tensor of two or more dimensions, the others unchanged (AWP, eq. 7-9).

    The published code takes one step of SGD on a copy of the network and rescales the difference to each layer's norm, in
    which the step's length drops out. Biases and BatchNorm's parameters stay as they are.

    Args:
      params: a tree of arrays.
      gradients: a like tree, of the loss.
      gamma: scalar; 0 returns the weights.
    """
    def worst(weight, gradient):
        if weight.ndim < 2:
            return weight
        # Measured by the largest entry first: the squares of small gradients underflow.
        largest = jnp.max(jnp.abs(gradient))
        scaled = gradient / jnp.where(largest > 0, largest, 1.0)
        return weight + gamma * jnp.linalg.norm(weight) * scaled / jnp.maximum(jnp.linalg.norm(scaled), 1.0)

    return jax.tree.map(worst, params, gradients)
