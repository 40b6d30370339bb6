"""ResNets for small images: He et al. 2016, "Deep Residual Learning for Image Recognition".

They have a 3x3 stem and no max-pool: what the robust-distillation papers call ResNet-18. Layers, padding and initial
distributions are those of their PyTorch code, so that weights can move between its files and this module.
"""

from collections.abc import Callable, Sequence
import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp

from jaxrd.models.normalization import BatchLayout, batch_norm

Array = jax.Array


def torch_uniform(key: Array, shape: Sequence[int], dtype: jnp.dtype = jnp.float32, fan_in: int | None = None) -> Array:
    """Returns U(-1/sqrt(fan_in), 1/sqrt(fan_in)), what PyTorch's convolution and linear layers start from.

    Args:
      key: typed key.
      shape: of the kernel, outputs last.
      dtype: of the kernel.
      fan_in: inputs of each output; None takes it from the shape. A bias has to be told.
    """
    bound = (fan_in or math.prod(shape[:-1])) ** -0.5
    return draw_flat(jax.random.uniform, key, shape, dtype) * (2 * bound) - bound


def draw_flat(distribution: Callable, key: Array, shape: Sequence[int], dtype: jnp.dtype) -> Array:
    """Returns distribution(key, shape, dtype), drawn as a vector and reshaped.

    The numbers are the same, but XLA on CPU takes about ten times as long to compile a draw in four dimensions as a
    flat one, and a model has many.
    """
    return distribution(key, (math.prod(shape),), dtype).reshape(shape)


def convolution(
        features: int,
        size: int,
        stride: int,
        dtype: jnp.dtype,
        name: str,
        kernel_init: Callable = torch_uniform,
        groups: int = 1,
) -> nn.Conv:
    """Returns a bias-free convolution, size x size with size odd, that pads size // 2 on all four sides.

    Flax's "SAME" pads a convolution of stride 2 on the right and the bottom only: another network than PyTorch's. As many
    `groups` as channels make it depthwise.
    """
    padding = ((size // 2, size // 2),) * 2
    return nn.Conv(
        features, (size, size), stride, padding, feature_group_count=groups, use_bias=False, kernel_init=kernel_init,
        dtype=dtype, name=name)


def checkpointed(block: type[nn.Module], checkpointing: bool) -> type[nn.Module]:
    """Returns a class of blocks, called as block(x, train), that keeps nothing of its inside for the backward pass if so asked.

    That pass computes it again from the block's input (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"): one
    more forward for the memory of the activations inside all blocks but one. Values and parameters are the same.
    """
    return nn.remat(block, static_argnums=(2,)) if checkpointing else block


def shortcut(x: Array, features: int, stride: int, dtype: jnp.dtype, train: bool | BatchLayout) -> Array:
    """Returns x, or bn(conv1x1(x)) where a block changes its shape; to be called inside the block, which owns the layers."""
    if stride == 1 and x.shape[-1] == features:
        return x
    x = convolution(features, 1, stride, dtype, "shortcut_conv")(x)
    return batch_norm(train, dtype, "shortcut_bn")(x)


def pool_and_classify(x: Array, classes: int, name: str = "linear", zero_bias: bool = False) -> Array:
    """Returns linear(mean of x over the image), in float32 whatever x is; to be called inside the network.

    Weights and bias begin as PyTorch's do, or the bias at 0.
    """
    x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
    bias_init = nn.initializers.zeros if zero_bias else functools.partial(torch_uniform, fan_in=x.shape[-1])
    return nn.Dense(classes, kernel_init=torch_uniform, bias_init=bias_init, dtype=jnp.float32, name=name)(x)


class BasicBlock(nn.Module):
    """relu(shortcut(x) + bn(conv3x3(relu(bn(conv3x3(x)))))): the block of ResNet-18 and 34.

    Attributes:
      width: channels, inside and out.
      stride: of the first convolution and of the shortcut.
      dtype: compute dtype.
    """

    width: int
    stride: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, train: bool | BatchLayout) -> Array:
        out = convolution(self.width, 3, self.stride, self.dtype, "conv1")(x)
        out = nn.relu(batch_norm(train, self.dtype, "bn1")(out))
        out = convolution(self.width, 3, 1, self.dtype, "conv2")(out)
        out = batch_norm(train, self.dtype, "bn2")(out)
        return nn.relu(out + shortcut(x, self.width, self.stride, self.dtype, train))


class BottleneckBlock(nn.Module):
    """relu(shortcut(x) + bn(conv1x1(relu(bn(conv3x3(relu(bn(conv1x1(x))))))))): the block of ResNet-50.

    Attributes:
      width: channels inside; four times as many come out.
      stride: of the 3x3 convolution and of the shortcut.
      dtype: compute dtype.
    """

    width: int
    stride: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, train: bool | BatchLayout) -> Array:
        out = convolution(self.width, 1, 1, self.dtype, "conv1")(x)
        out = nn.relu(batch_norm(train, self.dtype, "bn1")(out))
        out = convolution(self.width, 3, self.stride, self.dtype, "conv2")(out)
        out = nn.relu(batch_norm(train, self.dtype, "bn2")(out))
        out = convolution(4 * self.width, 1, 1, self.dtype, "conv3")(out)
        out = batch_norm(train, self.dtype, "bn3")(out)
        return nn.relu(out + shortcut(x, 4 * self.width, self.stride, self.dtype, train))


class ResNet(nn.Module):
    """A ResNet: 3x3 stem, stages of residual blocks, global average pool, linear layer.

    Each stage after the first doubles the width and halves the image by a stride of 2 in its first block.

    Attributes:
      blocks: residual blocks in each stage.
      width: channels of the stem and of the first stage.
      block: BasicBlock or BottleneckBlock.
      classes: number of logits.
      dtype: compute dtype of everything up to the pool; pool and linear layer are float32.
      checkpointing: see `resnet.checkpointed`.
    """

    blocks: Sequence[int]
    width: int
    block: type[nn.Module]
    classes: int
    dtype: jnp.dtype
    checkpointing: bool = False

    @nn.compact
    def __call__(self, images: Array, train: bool | BatchLayout) -> Array:
        x = convolution(self.width, 3, 1, self.dtype, "conv1")(images)
        x = nn.relu(batch_norm(train, self.dtype, "bn1")(x))
        block = checkpointed(self.block, self.checkpointing)
        for stage, blocks in enumerate(self.blocks):
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                x = block(self.width * 2**stage, stride, self.dtype, name=f"layer{stage + 1}_{index}")(x, train)
        return pool_and_classify(x, self.classes)
