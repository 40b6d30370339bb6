"""Pre-activation ResNets: He et al. 2016, "Identity Mappings in Deep Residual Networks", for small images.

PreActResNet-18 is the student of the IGDM paper on Tiny-ImageNet, and a teacher of many others. Layers, padding and initial
distributions are those of their PyTorch code, which builds two networks under one name: with a last BatchNorm, and the
shortcut from the activated input (Rice et al. 2020, IGDM); or without that BatchNorm, and the shortcut from the raw input
(Wong et al. 2020, Andriushchenko & Flammarion 2020). DeepMind's, with a strided 3x3 shortcut, is in `deepmind`.
"""

from collections.abc import Callable, Sequence

from flax import linen as nn
import jax
import jax.numpy as jnp

from jaxrd.models.normalization import BatchLayout, batch_norm
from jaxrd.models.resnet import checkpointed, convolution, pool_and_classify, torch_uniform

Array = jax.Array


class PreActBlock(nn.Module):
    """shortcut + conv3x3(relu(bn(conv3x3(relu(bn(x)))))): the block of PreActResNet-18 and of wide ResNets.

    The shortcut is x itself, or, where the block changes its shape, conv1x1(relu(bn(x))), from the activated input and
    without BatchNorm; or conv1x1(x).

    Attributes:
      features: channels that come out.
      stride: of the first convolution and of the shortcut.
      dtype: compute dtype.
      kernel_init: initial distribution of the convolutions.
      raw_shortcut: the shortcut's convolution takes x, not relu(bn(x)).
    """

    features: int
    stride: int
    dtype: jnp.dtype
    kernel_init: Callable = torch_uniform
    raw_shortcut: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool | BatchLayout) -> Array:
        activated = nn.relu(batch_norm(train, self.dtype, "bn1")(x))
        out = convolution(self.features, 3, self.stride, self.dtype, "conv1", self.kernel_init)(activated)
        out = nn.relu(batch_norm(train, self.dtype, "bn2")(out))
        out = convolution(self.features, 3, 1, self.dtype, "conv2", self.kernel_init)(out)
        if self.stride != 1 or x.shape[-1] != self.features:
            shortcut = convolution(self.features, 1, self.stride, self.dtype, "shortcut_conv", self.kernel_init)
            x = shortcut(x if self.raw_shortcut else activated)
        return x + out


class PreActResNet(nn.Module):
    """A pre-activation ResNet: bare 3x3 stem, stages of blocks, BN-ReLU unless `raw`, global average pool, linear layer.

    Each stage after the first doubles the width and halves the image by a stride of 2 in its first block.

    Attributes:
      blocks: residual blocks in each stage.
      width: channels of the stem and of the first stage.
      classes: number of logits.
      dtype: compute dtype of everything up to the pool; pool and linear layer are float32.
      checkpointing: see `resnet.checkpointed`.
      raw: no BN-ReLU before the pool, and shortcuts from the raw input.
    """

    blocks: Sequence[int]
    width: int
    classes: int
    dtype: jnp.dtype
    raw: bool = False
    checkpointing: bool = False

    @nn.compact
    def __call__(self, images: Array, train: bool | BatchLayout) -> Array:
        x = convolution(self.width, 3, 1, self.dtype, "conv1")(images)
        for stage, blocks in enumerate(self.blocks):
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                block = checkpointed(PreActBlock, self.checkpointing)(
                    self.width * 2**stage, stride, self.dtype, raw_shortcut=self.raw, name=f"layer{stage + 1}_{index}")
                x = block(x, train)
        if not self.raw:
            x = nn.relu(batch_norm(train, self.dtype, "bn")(x))
        return pool_and_classify(x, self.classes)
