"""Augmentation, written per example so that the compiled step keeps every example on its own device.

    crop and flip, of an image and of its partner alike -> mixing of the two and of their labels -> cutout

Every function is pure: the same key gives the same result, whatever the rest of the batch holds.
"""

import dataclasses
import numbers

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxrd.errors import InputError, choose, need

Array = jax.Array

MIXINGS = ("none", "mixup", "cutmix")

# Folded into an example's key, one for each thing that is drawn.
_SHIFT, _FLIP, _PARTNER, _MIXING, _CUTOUT = range(5)

# 1/255 in two parts, the first of 16 bits so that its product with a byte is exact in float32.
_RECIPROCAL_HIGH = np.float32(round(2**23 / 255) / 2**23)
_RECIPROCAL_LOW = np.float32(1 / 255 - float(_RECIPROCAL_HIGH))


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What the train step does to its images, each by its own key.

    Attributes:
      shift: pixels of random pad-and-crop; 0: none.
      flip: mirror left and right with probability 1/2.
      cutout: side in pixels of a random square of zeros; 0: none.
      mixing: "mixup" or "cutmix", with another image, whose label is mixed in too; "none".
      mixing_alpha: of the Beta(alpha, alpha) distribution of mixing weights, above 0.
      mixing_probability: of an image to be mixed, in [0, 1]; the others and their labels stay as they are.

    Raises:
      InputError: a value outside of these.
    """

    shift: int = 0
    flip: bool = False
    cutout: int = 0
    mixing: str = "none"
    mixing_alpha: float = 1.0
    mixing_probability: float = 1.0

    def __post_init__(self):
        for field in ("shift", "cutout"):
            value = getattr(self, field)
            whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
            need(whole and value >= 0, field, value, "a whole number of pixels, 0 (none) or above")
        need(self.flip in (True, False), "flip", self.flip, "True or False")
        choose("mixing", self.mixing, MIXINGS)
        alpha, probability = self.mixing_alpha, self.mixing_probability
        need(isinstance(alpha, numbers.Real) and alpha > 0, "mixing_alpha", alpha, "a number above 0")
        need(isinstance(probability, numbers.Real) and 0 <= probability <= 1, "mixing_probability", probability,
             "a number in [0, 1]")

    def check_image(self, shape: tuple[int, ...]) -> None:
        """Raises InputError where images of this shape, (height, width, channel), are smaller than the cutout."""
        side = min(shape[:2])
        need(self.cutout <= side, "cutout", self.cutout, f"at most {side}, the shorter side of the images")

    @property
    def is_identity(self) -> bool:
        """Whether images stay as they are, in every epoch."""
        return not (self.shift or self.flip or self.cutout or self.mixes)

    @property
    def mixes(self) -> bool:
        """Whether images have partners, and labels are soft."""
        return self.mixing != "none" and self.mixing_probability > 0


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


def augment(augmentation: Augmentation, keys: Array, images: Array) -> Array:
    """Crops, flips and cuts out of every image by its own key; mixes nothing.

    Args:
      augmentation: what of it.
      keys: [batch] typed keys, one per example.
      images: [batch, height, width, channel], uint8 in [0, 255] or floating in [0, 1].

    Returns:
      [batch, height, width, channel], floating in [0, 1].

    Raises:
      InputError: another dtype, or a cutout larger than the image.
    """
    _check(augmentation, keys, images)

    def one(key, image):
        return _cut_out(augmentation, key, _crop_and_flip(augmentation, key, image))

    # Under vmap: indexing the whole batch with computed rows would make XLA gather a sharded batch on every device.
    return jax.vmap(one)(keys, images)


def augment_pairs(
    augmentation: Augmentation, keys: Array, images: Array, labels: Array, partners: Array, partner_labels: Array,
    classes: int,
) -> tuple[Array, Array]:
    """Crops and flips every image and its partner, mixes the two and their labels, and cuts out of what comes of it.

    Args:
      augmentation: one that `mixes`.
      keys: [batch] typed keys, one per example.
      images: [batch, height, width, channel], uint8 in [0, 255] or floating in [0, 1].
      labels: [batch] int, in [0, classes).
      partners: like `images`.
      partner_labels: like `labels`.
      classes: number of classes.

    Returns:
      (images [batch, height, width, channel] floating in [0, 1], labels [batch, classes] float32, rows that sum to 1).

    Raises:
      InputError: another dtype, or two, or a cutout larger than the image.
    """
    _check(augmentation, keys, images)
    chex.assert_equal_shape([images, partners])
    if images.dtype != partners.dtype:
        raise InputError(f"partners have dtype {partners.dtype} and images {images.dtype}: pass both in the same")
    chex.assert_equal_shape([keys, labels, partner_labels])

    def one(key, pair, label, partner_label):
        both = jnp.stack([key, jax.random.fold_in(key, _PARTNER)])
        image, partner = jax.vmap(lambda key, image: _crop_and_flip(augmentation, key, image))(both, pair)
        weight_key, box_key, choice_key = jax.random.split(jax.random.fold_in(key, _MIXING), 3)
        weight = mixing_weight(weight_key, augmentation.mixing_alpha)
        if augmentation.mixing_probability < 1:
            # The weight 1 leaves image and label as they are, to the last bit.
            weight = jnp.where(jax.random.bernoulli(choice_key, augmentation.mixing_probability), weight, 1.0)
        if augmentation.mixing == "mixup":
            image = mixup(weight, image, partner)
        else:
            image, weight = cutmix(box_key, weight, image, partner)
        label, partner_label = (jax.nn.one_hot(each, classes, dtype=jnp.float32) for each in (label, partner_label))
        return _cut_out(augmentation, key, image), mixup(weight, label, partner_label)

    # Moved as one stack: on CPU in 3/5 of the time that XLA takes for two gathers in one loop.
    return jax.vmap(one)(keys, jnp.stack([images, partners], axis=1), labels, partner_labels)


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


def cutout(key: Array, image: Array, side: int) -> Array:
    """Puts zeros in a square around a pixel drawn uniformly; part of it may lie outside of the image (DeVries & Taylor 2017).

    Args:
      key: one typed key.
      image: [height, width, channel].
      side: of the square in pixels, at least 0 (published: 16 on CIFAR-10, 8 on CIFAR-100).

    Returns:
      [height, width, channel], dtype of `image`.
    """
    chex.assert_rank(image, 3)
    return jnp.where(_box(key, image.shape, (side, side))[:, :, None], jnp.zeros_like(image), image)


def mixing_weight(key: Array, alpha: float) -> Array:
    """Draws lambda from Beta(alpha, alpha), a float32 in [0, 1]; 1 keeps the image, 0 puts its partner in its place.

    By inversion of Student's t: with U and V uniform, T = sqrt(2a (U^(-1/a) - 1)) cos(2 pi V) has t's distribution with 2a
    degrees of freedom (Bailey 1994), and 1/2 + T / (2 sqrt(2a + T²)) has Beta(a, a)'s (Best 1978). Exact for every alpha, and
    without the loop of a rejection method, which under vmap runs until the last example has been accepted.

    Args:
      key: one typed key.
      alpha: above 0; 1 is the uniform distribution.
    """
    u, v = jax.random.uniform(key, (2,), jnp.float32)
    s, cosine = u ** (1 / alpha), jnp.cos(2 * jnp.pi * v)
    # With C = T / sqrt(2a): C² / (1 + C²) and its complement, neither of which overflows where s is tiny.
    scale = s + (1 - s) * cosine**2
    far = jnp.sqrt((1 - s) * cosine**2 / scale)
    lower = 0.5 * (s / scale) / (1 + far)  # (1 - far) / 2 without its cancellation
    return jnp.where(cosine < 0, lower, 1 - lower)


def mixup(weight: Array, image: Array, partner: Array) -> Array:
    """Returns weight * image + (1 - weight) * partner (mixup, Zhang et al. 2018, section 2), for labels as for images."""
    return weight * image + (1 - weight) * partner


def cutmix(key: Array, weight: Array, image: Array, partner: Array) -> tuple[Array, Array]:
    """Pastes a box of the partner into the image, around a pixel drawn uniformly (CutMix, Yun et al. 2019, section 3.1).

    The box has sqrt(1 - weight) of the image's height and width, rounded down to an even number of pixels as in the published
    code, and what lies outside of the image is cut off.

    Args:
      key: one typed key.
      weight: scalar in [0, 1].
      image: [height, width, channel].
      partner: like `image`.

    Returns:
      (the mixed image, the share of its pixels that are the image's own: the weight of its label).
    """
    chex.assert_equal_shape([image, partner])
    height, width, _ = image.shape
    sides = [2 * jnp.floor(0.5 * size * jnp.sqrt(1 - weight)).astype(jnp.int32) for size in (height, width)]
    box = _box(key, image.shape, sides)
    return jnp.where(box[:, :, None], partner, image), 1 - jnp.sum(box) / (height * width)


def _crop_and_flip(augmentation: Augmentation, key: Array, image: Array) -> Array:
    """On the bytes as they come, a quarter of what the floats would move."""
    if augmentation.shift:
        image = shift(jax.random.fold_in(key, _SHIFT), image, int(augmentation.shift))
    if augmentation.flip:
        image = flip(jax.random.fold_in(key, _FLIP), image)
    return to_float(image)


def _cut_out(augmentation: Augmentation, key: Array, image: Array) -> Array:
    return cutout(jax.random.fold_in(key, _CUTOUT), image, augmentation.cutout) if augmentation.cutout else image


def _box(key: Array, shape: tuple[int, ...], sides) -> Array:
    """Returns which pixels lie in a box of these sides around one drawn uniformly, [height, width] bool."""
    centre = jax.random.randint(key, (2,), 0, jnp.array(shape[:2]))

    def within(axis):
        first = centre[axis] - sides[axis] // 2
        position = jnp.arange(shape[axis])
        return (position >= first) & (position < first + sides[axis])

    return within(0)[:, None] & within(1)[None, :]


def _check(augmentation: Augmentation, keys: Array, images: Array) -> None:
    chex.assert_rank([keys, images], [1, 4])
    chex.assert_equal_shape_prefix([keys, images], 1)
    augmentation.check_image(images.shape[1:])
