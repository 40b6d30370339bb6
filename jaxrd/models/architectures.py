"""Names of architectures, and the Flax modules that they stand for."""

import difflib
import re

from flax import linen as nn
import jax.numpy as jnp

from jaxrd.errors import InputError
from jaxrd.models import published
from jaxrd.models.deepmind import DeepMindPreActResNet, DeepMindWideResNet
from jaxrd.models.mobilenet_v2 import MobileNetV2
from jaxrd.models.preact_resnet import PreActResNet
from jaxrd.models.resnet import BasicBlock, BottleneckBlock, ResNet
from jaxrd.models.wide_resnet import WideResNet

# Residual blocks per stage. 6, 8 and 10 are small ones for small images and quick runs.
RESNET_BLOCKS = {6: (1, 1), 8: (1, 1, 1), 10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
FORMS = (
    "resnet18, resnet34, resnet50, resnet{depth}_w{width} with depth 6, 8, 10, 18, 34 or 50, preact_resnet18, "
    "preact_resnet18_raw, dm_preact_resnet18, these three also with _w{width}, mobilenet_v2, wrn{depth}_{width} and "
    "dm_wrn{depth}_{width} with depth 10, 16, 22, 28, 34, ..., and published models: python -m launch.weights zoo")
_EXAMPLES = ["resnet18", "resnet34", "resnet50", "wrn16_4", "wrn28_10", "wrn34_10", "wrn34_20", "wrn70_16", "dm_wrn28_10"]
_EXAMPLES += ["dm_wrn34_20", "dm_wrn70_16", "preact_resnet18", "preact_resnet18_raw", "dm_preact_resnet18", "mobilenet_v2"]
_EXAMPLES += [f"resnet{depth}_w{width}" for depth in RESNET_BLOCKS for width in (8, 16, 32)]


def module(name: str, classes: int, dtype: jnp.dtype = jnp.float32, checkpointing: bool = False) -> nn.Module:
    """Returns the Flax module of that name, which is called with (images, train); `normalization` says what `train` is.

    Args:
      name: as `models.create` lists them, without published identifiers.
      classes: number of logits.
      dtype: compute dtype of the layers before the pool.
      checkpointing: see `resnet.checkpointed`.

    Raises:
      InputError: there is no such architecture.
    """
    if match := re.fullmatch(r"resnet([1-9]\d*)(?:_w([1-9]\d*))?", str(name)):
        depth, width = int(match[1]), int(match[2] or 64)
        if depth in (18, 34, 50) or depth in RESNET_BLOCKS and match[2]:
            block = BottleneckBlock if depth == 50 else BasicBlock
            return ResNet(RESNET_BLOCKS[depth], width, block, classes, dtype, checkpointing)
    if match := re.fullmatch(r"preact_resnet18(_raw)?(?:_w([1-9]\d*))?", str(name)):
        return PreActResNet(RESNET_BLOCKS[18], int(match[2] or 64), classes, dtype, bool(match[1]), checkpointing)
    if match := re.fullmatch(r"dm_preact_resnet18(?:_w([1-9]\d*))?", str(name)):
        return DeepMindPreActResNet(int(match[1] or 64), classes, dtype, checkpointing)
    if name == "mobilenet_v2":
        return MobileNetV2(classes, dtype, checkpointing)
    if match := re.fullmatch(r"(dm_)?wrn([1-9]\d*)_([1-9]\d*)", str(name)):
        if max(len(match[2]), len(match[3])) > 3:  # a file may name its own architecture
            raise InputError(f'model name is "{name[:40]}"; depth and width of a wide ResNet are below 1000')
        depth, width = int(match[2]), int(match[3])
        if depth >= 10 and depth % 6 == 4:
            return (DeepMindWideResNet if match[1] else WideResNet)(depth, width, classes, dtype, checkpointing)
        nearest = f"{match[1] or ''}wrn{max(10, 6 * round((depth - 4) / 6) + 4)}_{width}"
        raise InputError(f'model name is "{name}"; a wide ResNet is 6n + 4 deep: did you mean "{nearest}"?')
    known = {example.lower().replace("-", "_"): example
             for example in (*(entry.name for entry in published.PUBLISHED), *published.names(), *_EXAMPLES)}
    typed = re.sub("wide_?res_?net_?", "wrn", str(name).lower().replace("-", "_"))
    close = difflib.get_close_matches(typed, known, n=1)
    suggestion = f'did you mean "{known[close[0]]}"? ' if close else ""
    raise InputError(f'model name is "{name}", which is not known; {suggestion}Names: {FORMS}')


def is_architecture(name: str) -> bool:
    """Returns whether `module` knows the name."""
    try:
        module(name, 2)
    except InputError:
        return False
    return True
