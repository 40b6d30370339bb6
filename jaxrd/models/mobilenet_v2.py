"""MobileNetV2 for small images: Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks".

It is the small student of the robust-distillation papers (ARD, IAD, RSLAD, AdaAD, IGDM), which share one PyTorch file.
Against the paper, that file has ReLU instead of ReLU6, stride 1 in the stem and in the second group, and a shortcut also
where only the number of channels changes. Layers, padding and initial distributions are those of the file.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp

from jaxrd.models.normalization import BatchLayout, batch_norm
from jaxrd.models.resnet import checkpointed, convolution, pool_and_classify, shortcut

Array = jax.Array

# (expansion, channels that come out, blocks, stride of the first block) of each group: table 2 of the paper.
GROUPS = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class InvertedResidual(nn.Module):
    """bn(conv1x1(relu(bn(depthwise3x3(relu(bn(conv1x1(x)))))))), plus shortcut(x) where the stride is 1.

    Attributes:
      inner: channels between the 1x1 convolutions.
      features: channels that come out.
      stride: of the depthwise convolution.
      dtype: compute dtype.
    """

    inner: int
    features: int
    stride: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, train: bool | BatchLayout) -> Array:
        out = convolution(self.inner, 1, 1, self.dtype, "conv1")(x)
        out = nn.relu(batch_norm(train, self.dtype, "bn1")(out))
        out = convolution(self.inner, 3, self.stride, self.dtype, "conv2", groups=self.inner)(out)
        out = nn.relu(batch_norm(train, self.dtype, "bn2")(out))
        out = convolution(self.features, 1, 1, self.dtype, "conv3")(out)
        out = batch_norm(train, self.dtype, "bn3")(out)
        if self.stride != 1:
            return out
        return out + shortcut(x, self.features, 1, self.dtype, train)


class MobileNetV2(nn.Module):
    """MobileNetV2: 3x3 stem of 32 channels, 17 blocks, 1x1 convolution to 1280, global average pool, linear layer.

    The image shrinks by 8 on each side.

    Attributes:
      classes: number of logits.
      dtype: compute dtype of everything up to the pool; pool and linear layer are float32.
      checkpointing: see `resnet.checkpointed`.
    """

    classes: int
    dtype: jnp.dtype
    checkpointing: bool = False

    @nn.compact
    def __call__(self, images: Array, train: bool | BatchLayout) -> Array:
        x = convolution(32, 3, 1, self.dtype, "conv1")(images)
        x = nn.relu(batch_norm(train, self.dtype, "bn1")(x))
        for group, (expansion, features, blocks, group_stride) in enumerate(GROUPS, start=1):
            for index in range(blocks):
                stride = group_stride if index == 0 else 1
                block = checkpointed(InvertedResidual, self.checkpointing)(
                    expansion * x.shape[-1], features, stride, self.dtype, name=f"layer{group}_{index}")
                x = block(x, train)
        x = convolution(1280, 1, 1, self.dtype, "conv2")(x)
        x = nn.relu(batch_norm(train, self.dtype, "bn2")(x))
        return pool_and_classify(x, self.classes)
