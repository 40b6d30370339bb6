"""The two networks of DeepMind's robustness papers: Gowal et al. 2020, "Uncovering the Limits of Adversarial Training against
Norm-Bounded Adversarial Examples", and those that build on it (Rebuffi et al. 2021, Wang et al. 2023, ...).

A wide ResNet and a pre-activation ResNet with SiLU, which some of that code calls Swish: the same function. They differ from
`wide_resnet` and `preact_resnet` in their padding, which for a stride of 2 is on the right and the bottom only. Layers and
padding are those of the PyTorch files (google-deepmind/deepmind-research), and of the JAX file, which has the wide ResNet; at
odd sizes, where the PyTorch one fails, the wide ResNet is as in JAX. The published classes normalise their images; here
`models.create` does, with the `mean` and `std` that it is given.
"""

from collections.abc import Callable
from typing import ClassVar

from flax import linen as nn
import jax
import jax.numpy as jnp

from jaxrd.models.normalization import BatchLayout, batch_norm
from jaxrd.models.resnet import checkpointed, pool_and_classify, torch_uniform
from jaxrd.models.wide_resnet import he_normal_fan_out

Array = jax.Array


def convolution(
        features: int, size: int, stride: int, dtype: jnp.dtype, name: str, kernel_init: Callable, padding="SAME") -> nn.Conv:
    """Returns a bias-free convolution; "SAME" pads as TensorFlow does, to a side of n / stride, rounded up."""
    return nn.Conv(
        features, (size, size), stride, padding, use_bias=False, kernel_init=kernel_init, dtype=dtype, name=name)


def normalised(x: Array, name: str, dtype: jnp.dtype, train: bool | BatchLayout) -> Array:
    """Returns silu(bn(x)); to be called inside the module that owns the layer."""
    return nn.silu(batch_norm(train, dtype, name)(x))


class DeepMindWideBlock(nn.Module):
    """shortcut + conv3x3(silu(bn(conv3x3(silu(bn(x)))))); the shortcut is x, or conv1x1(silu(bn(x))) for other channels.

    Attributes:
      features: channels that come out.
      stride: of the first convolution and of the shortcut.
      dtype: compute dtype.
    """

    features: int
    stride: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, train: bool | BatchLayout) -> Array:
        activated = normalised(x, "batchnorm_0", self.dtype, train)
        out = convolution(self.features, 3, self.stride, self.dtype, "conv_0", he_normal_fan_out)(activated)
        out = normalised(out, "batchnorm_1", self.dtype, train)
        out = convolution(self.features, 3, 1, self.dtype, "conv_1", he_normal_fan_out)(out)
        if x.shape[-1] != self.features:
            x = convolution(self.features, 1, self.stride, self.dtype, "shortcut", he_normal_fan_out)(activated)
        return x + out


class DeepMindWideResNet(nn.Module):
    """WRN-depth-width of Gowal et al.: 3x3 stem of 16 channels, three groups of (depth - 4) / 6 blocks, BN-SiLU, global average
    pool, linear layer. Initial distributions are those of Wang et al. 2023: He normal (fan-out), biases 0.

    Attributes:
      depth: 10, 16, 22, 28, ..., 70, ...
      width: widening factor; the groups have 16, 32 and 64 times as many channels, with strides 1, 2 and 2.
      classes: number of logits.
      dtype: compute dtype of everything up to the pool; pool and linear layer are float32.
      checkpointing: see `resnet.checkpointed`.
    """

    depth: int
    width: int
    classes: int
    dtype: jnp.dtype
    checkpointing: bool = False

    @nn.compact
    def __call__(self, images: Array, train: bool | BatchLayout) -> Array:
        x = convolution(16, 3, 1, self.dtype, "init_conv", he_normal_fan_out)(images)
        for group in range(3):
            for index in range((self.depth - 4) // 6):
                stride = 2 if group > 0 and index == 0 else 1
                features = 16 * self.width * 2**group
                block = checkpointed(DeepMindWideBlock, self.checkpointing)
                x = block(features, stride, self.dtype, name=f"layer{group}_{index}")(x, train)
        x = normalised(x, "batchnorm", self.dtype, train)
        return pool_and_classify(x, self.classes, "logits", zero_bias=True)


class DeepMindPreActBlock(nn.Module):
    """shortcut + conv3x3(silu(bn(conv3x3(silu(bn(x)))))); the shortcut is x, or conv3x3(x), of the raw input, where the block
    changes its shape.

    Attributes:
      features: channels that come out.
      stride: of the first convolution and of the shortcut.
      dtype: compute dtype.
    """

    features: int
    stride: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, train: bool | BatchLayout) -> Array:
        padding = ((1, 1) if self.stride == 1 else (0, 1),) * 2
        out = normalised(x, "batchnorm_0", self.dtype, train)
        out = convolution(self.features, 3, self.stride, self.dtype, "conv_2d_1", torch_uniform, padding)(out)
        out = normalised(out, "batchnorm_1", self.dtype, train)
        out = convolution(self.features, 3, 1, self.dtype, "conv_2d_2", torch_uniform)(out)
        if self.stride != 1 or x.shape[-1] != self.features:
            x = convolution(self.features, 3, self.stride, self.dtype, "shortcut", torch_uniform, padding)(x)
        return x + out


class DeepMindPreActResNet(nn.Module):
    """PreActResNet-18 of Rebuffi et al.: 3x3 stem, four stages of two blocks, BN-SiLU, global average pool, linear layer.

    Attributes:
      width: channels of the stem and of the first stage, 64 as published; each later stage doubles them.
      classes: number of logits.
      dtype: compute dtype of everything up to the pool; pool and linear layer are float32.
      checkpointing: see `resnet.checkpointed`.
    """

    smallest_side: ClassVar[int] = 8  # of an image: each stride of 2 halves a side, rounding down
    width: int
    classes: int
    dtype: jnp.dtype
    checkpointing: bool = False

    @nn.compact
    def __call__(self, images: Array, train: bool | BatchLayout) -> Array:
        x = convolution(self.width, 3, 1, self.dtype, "conv_2d", torch_uniform)(images)
        for stage in range(4):
            for index in range(2):
                stride = 2 if stage > 0 and index == 0 else 1
                block = checkpointed(DeepMindPreActBlock, self.checkpointing)
                x = block(self.width * 2**stage, stride, self.dtype, name=f"layer{stage}_{index}")(x, train)
        x = normalised(x, "batchnorm", self.dtype, train)
        return pool_and_classify(x, self.classes, "logits")
