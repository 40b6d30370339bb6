"""Pre-activation ResNets: He et al. 2016, "Identity Mappings in Deep Residual Networks", for small images.

PreActResNet-18 is the student of the IGDM paper on Tiny-ImageNet. Layers, padding and initial distributions are those of
its PyTorch code. Others build another network under the same name: without the last BatchNorm, with a shortcut from the
raw input, or with a strided 3x3 shortcut.
"""

from collections.abc import Callable, Sequence

from flax import linen as nn
import jax
import jax.numpy as jnp

from jaxrd.models.normalization import batch_norm
from jaxrd.models.resnet import convolution, pool_and_classify, torch_uniform

Array = jax.Array


class PreActBlock(nn.Module):
    """shortcut + conv3x3(relu(bn(conv3x3(relu(bn(x)))))): the block of PreActResNet-18 and of wide ResNets.

    The shortcut is x itself, or conv1x1(relu(bn(x))), from the activated input and without BatchNorm, where the block
    changes its shape.

    Attributes:
      features: channels that come out.
      stride: of the first convolution and of the shortcut.
      dtype: compute dtype.
      kernel_init: initial distribution of the convolutions.
    """

    features: int
    stride: int
    dtype: jnp.dtype
    kernel_init: Callable = torch_uniform

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        activated = nn.relu(batch_norm(train, self.dtype, "bn1")(x))
        out = convolution(self.features, 3, self.stride, self.dtype, "conv1", self.kernel_init)(activated)
        out = nn.relu(batch_norm(train, self.dtype, "bn2")(out))
        out = convolution(self.features, 3, 1, self.dtype, "conv2", self.kernel_init)(out)
        if self.stride != 1 or x.shape[-1] != self.features:
            x = convolution(self.features, 1, self.stride, self.dtype, "shortcut_conv", self.kernel_init)(activated)
        return x + out


class PreActResNet(nn.Module):
    """A pre-activation ResNet: bare 3x3 stem, stages of blocks, BN-ReLU, global average pool, linear layer.

    Each stage after the first doubles the width and halves the image by a stride of 2 in its first block.

    Attributes:
      blocks: residual blocks in each stage.
      width: channels of the stem and of the first stage.
      classes: number of logits.
      dtype: compute dtype of everything up to the pool; pool and linear layer are float32.
    """

    blocks: Sequence[int]
    width: int
    classes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: Array, train: bool) -> Array:
        x = convolution(self.width, 3, 1, self.dtype, "conv1")(images)
        for stage, blocks in enumerate(self.blocks):
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                x = PreActBlock(self.width * 2**stage, stride, self.dtype, name=f"layer{stage + 1}_{index}")(x, train)
        x = nn.relu(batch_norm(train, self.dtype, "bn")(x))
        return pool_and_classify(x, self.classes)
