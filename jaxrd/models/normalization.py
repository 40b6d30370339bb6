"""The two normalisations of a model: of its input images, and of its activations by batch statistics.

BatchNorm follows Ioffe and Szegedy 2015, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
Covariate Shift", with the constants of PyTorch's layer. What the networks hand on to it as `train` is False in evaluation, True
for a batch that is normalised as a whole, and else the `BatchLayout` of what is normalised apart.
"""

from collections.abc import Sequence
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array

MOMENTUM = 0.9  # what running statistics keep of themselves in a step; PyTorch's 0.1 is the rest
EPSILON = 1e-5  # added to the variance


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


class BatchLayout(NamedTuple):
    """What lies in a batch of training, whose parts BatchNorm normalises apart.

    The rows are examples, in their order, each with its views next to each other; `groups` equal parts of the examples follow
    one another.

    Attributes:
      groups: contiguous groups of examples, which divide the batch.
      views: one for each view of an example: whether it moves the running statistics, which views do in their order.
    """

    groups: int = 1
    views: tuple[bool, ...] = (True,)


def batch_norm(train: bool | BatchLayout, dtype: jnp.dtype, name: str) -> nn.Module:
    """Returns the BatchNorm layer that every model uses: (x - mean) / sqrt(var + 1e-5) * scale + bias, per channel.

    With `train` the mean and variance are those of the batch, and running <- 0.9 running + 0.1 batch (PyTorch's
    momentum 0.1); without it they are the running ones. The running variance takes the biased batch variance (sum / n),
    where PyTorch's takes the unbiased one (sum / (n - 1)), with n = batch * height * width.

    Args:
      train: False: normalise by the running statistics. True: by the batch, and update them. A layout: by each of its parts,
        see `GroupedBatchNorm`. Parameters and statistics have the same names and shapes.
      dtype: of the returned activations; scale, bias and all statistics are float32.
      name: of the layer in the parameter tree.
    """
    if isinstance(train, BatchLayout):
        return GroupedBatchNorm(train, dtype, name=name)
    # The fast variance E[x^2] - E[x]^2 cancels catastrophically in float32: that of N(1e4, 1) comes out as 0 or 16.
    return nn.BatchNorm(
        use_running_average=not train, momentum=MOMENTUM, epsilon=EPSILON, use_fast_variance=False, dtype=dtype, name=name)


class GroupedBatchNorm(nn.Module):
    """BatchNorm in training, by the mean and the biased variance of each part of the batch.

    Groups: ghost BatchNorm, Hoffer et al. 2017, "Train longer, generalize better: closing the generalization gap in large
    batch training of neural networks". With as many groups as replicas it is what replicas compute that do not synchronise
    theirs. The running statistics move by the mean over groups of the groups' means, and of their variances.

    Views: what as many forwards, one after another, would have come to, in one.

    Attributes:
      layout: of the batch.
      dtype: of the returned activations; scale, bias and all statistics are float32.
    """

    layout: BatchLayout
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        running_variance = self.variable("batch_stats", "var", jnp.ones, channels)

        # Rows first, then parts of them, so that only [batch, channels] is ever reshaped: groups that devices share
        # unequally cannot make the compiler gather the activations.
        x = x.astype(jnp.float32)
        mean = self._mean(x)
        centred = x - self._of_rows(mean, x)
        variance = self._mean(jnp.square(centred))
        if not self.is_initializing():
            for running, found in ((running_mean, mean), (running_variance, variance)):
                for view, moves in zip(jnp.mean(found, axis=0), self.layout.views, strict=True):
                    if moves:
                        running.value = MOMENTUM * running.value + (1 - MOMENTUM) * view
        y = centred * self._of_rows(jax.lax.rsqrt(variance + EPSILON) * scale, x) + bias
        return y.astype(self.dtype)

    def _mean(self, x: Array) -> Array:
        """Returns the mean of each part, [groups, views, channels], of x, [batch, ..., channels]."""
        rows = jnp.mean(x, axis=range(1, x.ndim - 1))
        return jnp.mean(rows.reshape(self.layout.groups, -1, len(self.layout.views), x.shape[-1]), axis=1)

    def _of_rows(self, values: Array, x: Array) -> Array:
        """Returns values, [groups, views, channels], for each row of x, to be broadcast over all between rows and channels."""
        groups, views, channels = values.shape
        rows = jnp.broadcast_to(values[:, jnp.newaxis], (groups, len(x) // groups // views, views, channels))
        return rows.reshape(len(x), *(1,) * (x.ndim - 2), channels)
