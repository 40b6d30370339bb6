"""Threat models: the ball that an adversary may move an image in, and the moves inside it.

Follows the L-infinity and L2 threat models of Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial
Attacks", in pixel units of [0, 1].
"""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrd.errors import InputError

Array = jax.Array

# Keeps divisions by the length of a perturbation finite where that length is 0; far below any that still means something.
_TINY = 1e-12


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ThreatModel:
    """All images within `epsilon` of the clean one in `norm` that also stay inside `bounds`.

    A pytree whose one leaf is `epsilon`: pass it to a jitted function as an argument, and one compilation serves every radius.

    Attributes:
      norm: "linf" or "l2".
      epsilon: radius in pixel units of [0, 1]: above 0, and for "linf" at most 1.
      bounds: lowest and highest pixel value.

    Raises:
      InputError: a norm, radius or bounds outside those ranges.

    Example:
      >>> ThreatModel(norm="linf", epsilon=8 / 255).epsilon
      0.03137254901960784
    """

    norm: str = dataclasses.field(default="linf", metadata={"static": True})
    epsilon: float = 8 / 255
    bounds: tuple[float, float] = dataclasses.field(default=(0.0, 1.0), metadata={"static": True})

    def __post_init__(self):
        if self.norm not in ("linf", "l2"):
            raise InputError(f'threat.norm is "{self.norm}"; use "linf" or "l2"')
        low, high = self.bounds
        if not low < high:
            raise InputError(f"threat.bounds is {self.bounds}; the first must be below the second, such as (0, 1)")
        # Inside a transformation the radius is traced (or a placeholder of the tree machinery) and has no value to check.
        if not isinstance(self.epsilon, (numbers.Real, str)):
            return
        if isinstance(self.epsilon, str) or not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise InputError(f"threat.epsilon is {self.epsilon!r}; it must be a number above 0, such as 8/255")
        if self.norm == "linf" and self.epsilon > high - low:
            raise InputError(
                f"threat.epsilon is {self.epsilon}, wider than the pixel range {self.bounds}; "
                "give it in units of [0, 1], for instance 8/255 instead of 8")

    def project(self, images: Array, points: Array) -> Array:
        """Returns the points pulled back into the ball around `images` and then into the bounds.

        For L2 this is ball, then box, as the attacks in the literature do it: it stays in both (the box contains
        `images`, so clipping only moves points closer), but is not the nearest point of their intersection.

        Args:
          images: [batch, ...] float32, the centres, inside the bounds.
          points: [batch, ...] float32.
        """
        if self.norm == "linf":
            moved = jnp.clip(points, images - self.epsilon, images + self.epsilon)
        else:
            delta = points - images
            length = _per_example_norm(delta)
            moved = images + delta * jnp.minimum(1.0, self.epsilon / jnp.maximum(length, _TINY))
        return jnp.clip(moved, *self.bounds)

    def steepest_step(self, gradients: Array, step_size: float) -> Array:
        """Returns the step of length `step_size` (in the norm) that a linear function gains most from.

        sign(g) for L-infinity, g / ||g||_2 for L2; a zero gradient gives a zero step, and however small another is, its step
        has the full length.

        Args:
          gradients: [batch, ...] float32.
          step_size: length in pixel units.
        """
        if self.norm == "linf":
            return step_size * jnp.sign(gradients)
        # The gradients of a confident model fall below 1e-20, where their squares underflow: measured by the largest first.
        largest = jnp.max(jnp.abs(gradients), axis=tuple(range(1, gradients.ndim)), keepdims=True)
        scaled = gradients / jnp.where(largest > 0, largest, 1.0)
        return step_size * scaled / jnp.maximum(_per_example_norm(scaled), 1.0)  # the norm is below 1 only where it is 0

    def random_start(self, key: Array, images: Array, kind: str = "uniform", *, project: bool = True) -> Array:
        """Returns the points that an attack starts from, inside the ball and the bounds.

        "uniform": x + U(-epsilon, epsilon) per pixel for L-infinity (Madry et al. 2018); for L2 a Gaussian direction with a
        length uniform in [0, epsilon] (Rice et al. 2020). "gaussian": x + 0.001 N(0, 1) (TRADES, RSLAD, AdaAD).
        "none": x itself.

        Args:
          key: one typed key, whose i-th fold serves example i, or [batch] typed keys.
          images: [batch, ...] float32.
          kind: as above.
          project: put the start inside ball and bounds. The published code of TRADES, RSLAD and AdaAD does not: a start may
            lie outside the bounds there, until the first step's projection.

        Raises:
          InputError: an unknown kind.
        """
        if kind == "none":
            return images
        if kind not in ("uniform", "gaussian"):
            raise InputError(f'attack start is "{kind}"; use "uniform", "gaussian" or "none"')

        size = math.prod(images.shape[1:])

        # Drawn flat: the same numbers as in the image's shape, and several times faster to compile on CPU.
        def noise(key):
            if kind == "gaussian":
                return 0.001 * jax.random.normal(key, (size,))
            if self.norm == "linf":
                return self.epsilon * jax.random.uniform(key, (size,), minval=-1.0, maxval=1.0)
            direction_key, length_key = jax.random.split(key)
            direction = jax.random.normal(direction_key, (size,))
            length = self.epsilon * jax.random.uniform(length_key)
            return length * direction / jnp.maximum(jnp.sqrt(jnp.sum(direction**2)), _TINY)

        deltas = jax.vmap(noise)(example_keys(key, images.shape[0])).reshape(images.shape)
        return self.project(images, images + deltas) if project else images + deltas

    def check_step_size(self, step_size: float) -> None:
        """Raises InputError where a step cannot make sense: 0 or less, or longer than the ball is wide (2 epsilon)."""
        if isinstance(step_size, str):
            raise InputError(f"attack step_size is {step_size!r}; give a number, such as 2 / 255")
        if not (isinstance(step_size, numbers.Real) and isinstance(self.epsilon, numbers.Real)):
            return  # traced
        if not 0 < step_size <= 2 * self.epsilon * (1 + 1e-6):
            raise InputError(
                f"attack step_size is {step_size:g} with epsilon {self.epsilon:g}; it must be above 0 and at most "
                f"2 epsilon = {2 * self.epsilon:g} (were the two swapped?)")

    def check_images(self, images: Array) -> None:
        """Raises InputError where images are not [batch, h, w, c] floats inside the bounds.

        The range is read from concrete arrays only; under a transformation there are no values to read.
        """
        if not hasattr(images, "ndim"):
            raise InputError(f"images are a {type(images).__name__}; give an array, float32 [batch, height, width, channel]")
        if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
            raise InputError(
                f"images are {images.dtype}{list(images.shape)}; give float32 [batch, height, width, channel] in {self.bounds}")
        if isinstance(images, jax.core.Tracer) or not images.size:
            return
        values = np.asarray(images)  # by numpy: under jit a jax function of a constant is traced too
        low, high = float(values.min()), float(values.max())
        if not (self.bounds[0] - 1e-6 <= low and high <= self.bounds[1] + 1e-6):
            raise InputError(
                f"images reach from {low:g} to {high:g}, outside {self.bounds}; divide 0..255 by 255, and leave normalisation "
                "to the model")

    def distance(self, images: Array, points: Array) -> Array:
        """Returns ||points - images|| in this norm, [batch]."""
        delta = jnp.reshape(points - images, (images.shape[0], -1))
        return jnp.max(jnp.abs(delta), axis=1) if self.norm == "linf" else jnp.sqrt(jnp.sum(delta**2, axis=1))


class MicroBatchKey(NamedTuple):
    """The key of a batch, for a part of it: the examples from position `first` on, which draw what they would in the whole.

    Attributes:
      key: one typed key.
      first: scalar int, at least 0.
    """

    key: Array
    first: Array | int


def derived(key: Array | MicroBatchKey, function: Callable[[Array], Array]) -> Array | MicroBatchKey:
    """Returns function(key), such as a fold, of a key that may be one for a part of a batch, for the same part."""
    return key._replace(key=function(key.key)) if isinstance(key, MicroBatchKey) else function(key)


def example_keys(key: Array | MicroBatchKey, batch: int) -> Array:
    """Returns one typed key per example, [batch].

    One key is folded with each position; [batch] keys pass through. Randomness tied to an example, and not to the shape of
    the batch it came in, is what makes results independent of batch size, padding and device count.

    Raises:
      InputError: a raw key, an array of uint32; another number of keys.
    """
    first = 0
    if isinstance(key, MicroBatchKey):
        key, first = key
    if not hasattr(key, "dtype"):
        raise InputError(f"key is {key!r}; make a typed one, such as jax.random.key(0)")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise InputError(f"key is a raw {key.dtype} array; make a typed one, such as jax.random.key(0)")
    if key.ndim and key.shape != (batch,):
        raise InputError(f"key is {list(key.shape)} typed keys; give a single one, or one for each of the {batch} images")
    if key.ndim:
        return key
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(first + jnp.arange(batch))


def _per_example_norm(x: Array) -> Array:
    """L2 norm of each example, shaped [batch, 1, ..., 1] to broadcast."""
    return jnp.sqrt(jnp.sum(x**2, axis=tuple(range(1, x.ndim)), keepdims=True))
