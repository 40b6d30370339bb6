"""Point-wise alignment: how far two networks' outputs are apart at the same points, and why."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxrd import objectives
from jaxrd.distillation.gradient_matching import LogitsFn
from jaxrd.errors import choose

Array = jax.Array

OUTPUTS = {"probability": jax.nn.softmax, "logit": lambda logits: logits}


class PointBound(NamedTuple):
    """The distance of two networks' outputs at x+d, and what it is made of; each [batch], at least 0.

    Attributes:
      distance: ||f_T(x+d) - f_S(x+d)||_2.
      at_images: ||f_T(x) - f_S(x)||_2.
      first_order: ||(J_T - J_S) d||_2, what gradient matching makes small.
      remainder: ||r_T - r_S||_2, of r = f(x+d) - f(x) - J d.
    """

    distance: Array
    at_images: Array
    first_order: Array
    remainder: Array

    @property
    def bound(self) -> Array:
        """IGDM's eq. 10, at_images + first_order; `distance` is at most this plus `remainder`."""
        return self.at_images + self.first_order


def point_distance(teacher_fn: LogitsFn, student_fn: LogitsFn, points: Array) -> Array:
    """Returns ||softmax f_T - softmax f_S||_2 at the points, [batch] in [0, sqrt 2].

    Lee et al. 2025 (IGDM), table 5, whose points are x+d with d uniform in the ball, or that of an attack of 20 steps. That it
    compares probabilities is what its values tell; the paper does not say.

    Args:
      teacher_fn, student_fn: images -> logits [batch, classes].
      points: [batch, h, w, c].
    """
    return objectives.l2_distance(teacher_fn(points), student_fn(points))


def point_bound(
    teacher_fn: LogitsFn, student_fn: LogitsFn, images: Array, deltas: Array, output: str = "probability"
) -> PointBound:
    """Returns ||f_T(x+d) - f_S(x+d)|| with the terms that bound it: ||f_T(x) - f_S(x)|| + ||(J_T - J_S) d|| (IGDM, eq. 10).

    The paper takes both networks to be linear around x. Where they are not, the triangle inequality needs their remainders
    too: distance <= at_images + first_order + remainder holds always.

    Args:
      teacher_fn, student_fn: images -> logits [batch, classes].
      images: [batch, h, w, c], x.
      deltas: [batch, h, w, c], d.
      output: f is the "probability" (softmax) of the classes, or their "logit".

    Raises:
      InputError: another output.
    """
    choose("point_bound output", output, OUTPUTS)
    chex.assert_equal_shape([images, deltas])

    def expanded(logits_fn):
        def function(points):
            return OUTPUTS[output](logits_fn(points))

        return *jax.jvp(function, (images,), (deltas,)), function(images + deltas)

    at_images, first_order, moved = (teacher - student for teacher, student in zip(expanded(teacher_fn), expanded(student_fn)))
    parts = moved, at_images, first_order, moved - at_images - first_order
    return PointBound(*(objectives.safe_sqrt(jnp.sum(part**2, axis=-1)) for part in parts))
