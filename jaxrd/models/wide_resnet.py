"""Wide ResNets: Zagoruyko and Komodakis 2016, "Wide Residual Networks", in the form that TRADES and RobustBench use.

That is ReLU, pre-activation and no dropout: Zhang et al. 2019, "Theoretically Principled Trade-off between Robustness
and Accuracy".
"""

from collections.abc import Sequence
import math

from flax import linen as nn
import jax
import jax.numpy as jnp

from jaxrd.models.normalization import BatchLayout, batch_norm
from jaxrd.models.preact_resnet import PreActBlock
from jaxrd.models.resnet import checkpointed, convolution, draw_flat, pool_and_classify

Array = jax.Array


def he_normal_fan_out(key: Array, shape: Sequence[int], dtype: jnp.dtype = jnp.float32) -> Array:
    """Returns N(0, 2 / fan_out) (He et al. 2015, "Delving Deep into Rectifiers").

    Args:
      key: typed key.
      shape: [height, width, inputs, outputs] of a convolution kernel; fan_out is height * width * outputs.
      dtype: of the kernel.
    """
    height, width, _, outputs = shape
    return draw_flat(jax.random.normal, key, shape, dtype) * math.sqrt(2 / (height * width * outputs))


class WideResNet(nn.Module):
    """WRN-depth-width: 3x3 stem, three groups of (depth - 4) / 6 blocks, BN-ReLU, global average pool, linear layer.

    The stem has 16 channels, the groups 16, 32 and 64 times `width`, with strides 1, 2 and 2.

    Attributes:
      depth: number of convolutions along the main path and the linear layer: 10, 16, 22, 28, 34, ...
      width: widening factor.
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
        x = convolution(16, 3, 1, self.dtype, "conv1", he_normal_fan_out)(images)
        for group in range(3):
            for index in range((self.depth - 4) // 6):
                stride = 2 if group > 0 and index == 0 else 1
                features = 16 * self.width * 2**group
                block = checkpointed(PreActBlock, self.checkpointing)(
                    features, stride, self.dtype, he_normal_fan_out, name=f"block{group + 1}_{index}")
                x = block(x, train)
        x = nn.relu(batch_norm(train, self.dtype, "bn1")(x))
        return pool_and_classify(x, self.classes, "fc", zero_bias=True)
