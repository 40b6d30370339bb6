"""The two normalisations of a model: of its input images, and of its activations by batch statistics.

BatchNorm follows Ioffe and Szegedy 2015, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
Covariate Shift", with the constants of PyTorch's layer.
"""

from collections.abc import Sequence

from flax import linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array

MOMENTUM = 0.9  # what running statistics keep of themselves in a step; PyTorch's 0.1 is the rest


def normalize_images(images: Array, mean: Sequence[float] | None, std: Sequence[float] | None) -> Array:
    """Returns (images - mean) / std per channel, or the images as they are where both are None.

    It belongs to the model, so that attacks and radii stay in pixel units of [0, 1].

    Args:
      images: [batch, height, width, channels] float, in [0, 1].
      mean: [channels], in [0, 1].
      std: [channels], above 0.
    """
    if mean is None:
        return images
    return (images - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def batch_norm(train: bool, dtype: jnp.dtype, name: str) -> nn.BatchNorm:
    """Returns the BatchNorm layer that every model uses: (x - mean) / sqrt(var + 1e-5) * scale + bias, per channel.

    With `train` the mean and variance are those of the batch, and running <- 0.9 running + 0.1 batch (PyTorch's
    momentum 0.1); without it they are the running ones. The running variance takes the biased batch variance (sum / n),
    where PyTorch's takes the unbiased one (sum / (n - 1)), with n = batch * height * width.

    Args:
      train: normalise by the batch and update the running statistics.
      dtype: of the returned activations; scale, bias and all statistics are float32.
      name: of the layer in the parameter tree.
    """
    # The fast variance E[x^2] - E[x]^2 cancels catastrophically in float32: that of N(1e4, 1) comes out as 0 or 16.
    return nn.BatchNorm(
        use_running_average=not train, momentum=MOMENTUM, epsilon=1e-5, use_fast_variance=False, dtype=dtype, name=name)
