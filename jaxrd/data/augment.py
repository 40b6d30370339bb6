"""Random shifts and flips, written per example so that the compiled step keeps every example on its own device.

Every function is pure: the same key gives the same result, whatever the rest of the batch holds.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxrd.errors import InputError

Array = jax.Array

# 1/255 in two parts, the first of 16 bits so that its product with a byte is exact in float32.
_RECIPROCAL_HIGH = np.float32(round(2**23 / 255) / 2**23)
_RECIPROCAL_LOW = np.float32(1 / 255 - float(_RECIPROCAL_HIGH))


def to_float(images: Array) -> Array:
    """Converts uint8 pixels to float32 in [0, 1] by dividing by 255; float images pass through.

    The quotients are those of NumPy and PyTorch to the last bit, compiled or not.

    Args:
      images: any shape, uint8 in [0, 255] or floating in [0, 1].

    Returns:
      Floating images in [0, 1].

    Raises:
      InputError: if the dtype is neither.
    """
    if images.dtype == jnp.uint8:
        # XLA makes "/ 255" a product with the rounded reciprocal, and 126 of the 256 levels come out one unit off.
        levels = images.astype(jnp.float32)
        return levels * _RECIPROCAL_HIGH + levels * _RECIPROCAL_LOW
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images
    raise InputError(f"images have dtype {images.dtype}: pass uint8 in [0, 255] or float32 in [0, 1]")


def shift(key: Array, image: Array, pixels: int) -> Array:
    """Pads with zeros and crops back at a random offset: the pad-and-crop of the papers (4 for CIFAR, 1 for digits).

    Each of the (2 pixels + 1)² offsets is equally likely.

    Args:
      key: one typed key.
      image: [height, width, channel].
      pixels: the largest shift in each direction, at least 0.

    Returns:
      [height, width, channel], dtype of `image`.
    """
    chex.assert_rank(image, 3)
    rows, columns = jax.random.randint(key, (2,), 0, 2 * pixels + 1)
    padded = jnp.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)))
    return jax.lax.dynamic_slice(padded, (rows, columns, jnp.zeros_like(rows)), image.shape)


def flip(key: Array, image: Array, probability: float = 0.5) -> Array:
    """Mirrors left and right with the given probability.

    Args:
      key: one typed key.
      image: [height, width, channel].
      probability: in [0, 1].

    Returns:
      [height, width, channel], dtype of `image`.
    """
    chex.assert_rank(image, 3)
    return jnp.where(jax.random.bernoulli(key, probability), image[:, ::-1], image)


def augment(keys: Array, images: Array, *, shift_pixels: int = 0, flip_probability: float = 0.0) -> Array:
    """Shifts, then flips, every image with its own key; the identity when neither is asked for.

    Args:
      keys: [batch] typed keys, one per example.
      images: [batch, height, width, channel], any dtype.
      shift_pixels: see `shift`; 0 turns it off.
      flip_probability: see `flip`; 0 turns it off, 1/2 is the papers' choice.

    Returns:
      [batch, height, width, channel], dtype of `images`.

    Raises:
      InputError: if `shift_pixels` is negative or no integer, or `flip_probability` lies outside [0, 1].
    """
    if shift_pixels != int(shift_pixels) or shift_pixels < 0:
        raise InputError(f"shift_pixels={shift_pixels}: pass an integer of at least 0 (0 turns the shift off)")
    if not 0 <= flip_probability <= 1:
        raise InputError(f"flip_probability={flip_probability}: pass a probability in [0, 1] (0 turns the flip off)")
    chex.assert_rank([keys, images], [1, 4])
    chex.assert_equal_shape_prefix([keys, images], 1)

    # Under vmap: indexing the whole batch with computed rows would make XLA gather a sharded batch on every device.
    if shift_pixels:
        shift_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
        images = jax.vmap(shift, (0, 0, None))(shift_keys, images, int(shift_pixels))
    if flip_probability:
        flip_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
        images = jax.vmap(flip, (0, 0, None))(flip_keys, images, flip_probability)
    return images
