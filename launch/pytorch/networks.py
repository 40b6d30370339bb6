"""ResNets and wide ResNets in plain PyTorch: those of `jaxrd.models`, with the weights' names of the public classes.

He et al. 2016, "Deep Residual Learning for Image Recognition", with a 3x3 stem for small images; Zagoruyko and Komodakis 2016,
"Wide Residual Networks", in the form of TRADES. `jaxrd.models.weights` reads and writes their state dicts. Imports torch only.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from launch.pytorch import jobs


def create(name: str, classes: int, channels: int = 3) -> nn.Module:
    """Returns the network of that name, images [batch, channels, height, width] -> logits [batch, classes].

    Raises:
      ValueError: there is none; see `jobs.FORMS`.
    """
    found = jobs.architecture(name)
    if found is None:
        raise ValueError(f'"{name}" is not known; known: {jobs.FORMS}')
    family, depth, width = found
    return (ResNet if family == "resnet" else WideResNet)(depth, width, classes, channels)


class ResNet(nn.Module):
    """Stem, stages of residual blocks that double the width and halve the image after the first, mean, linear layer."""

    def __init__(self, depth: int, width: int, classes: int, channels: int):
        super().__init__()
        block = Bottleneck if depth == 50 else BasicBlock
        self.conv1 = convolution(channels, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        inputs, self.stages = width, []
        for stage, blocks in enumerate(jobs.RESNET_BLOCKS[depth]):
            layers = []
            for index in range(blocks):
                layers.append(block(inputs, width * 2**stage, 2 if stage and not index else 1))
                inputs = width * 2**stage * block.expansion
            self.stages.append(f"layer{stage + 1}")
            self.add_module(self.stages[-1], nn.Sequential(*layers))
        self.linear = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(images)))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.linear(mean_over_image(x))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: ResNet-18 and 34."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = convolution(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = convolution(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """A 3x3 convolution between two of 1x1, of which the last has four times the channels, and a shortcut: ResNet-50."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = convolution(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = convolution(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = convolution(width, 4 * width, 1)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.shortcut = shortcut(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        out = functional.relu(self.bn2(self.conv2(out)))
        return functional.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class WideResNet(nn.Module):
    """16-channel stem, three groups of pre-activation blocks of 16, 32 and 64 times the width, BN-ReLU, mean, linear layer."""

    def __init__(self, depth: int, width: int, classes: int, channels: int):
        super().__init__()
        self.conv1 = convolution(channels, 16, 3)
        self.block1 = WideGroup(depth, 16, 16 * width, 1)
        self.block2 = WideGroup(depth, 16 * width, 32 * width, 2)
        self.block3 = WideGroup(depth, 32 * width, 64 * width, 2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(images))))
        return self.fc(mean_over_image(functional.relu(self.bn1(x))))


class WideGroup(nn.Module):
    """(depth - 4) / 6 blocks, the first of which has the stride."""

    def __init__(self, depth: int, inputs: int, outputs: int, stride: int):
        super().__init__()
        more = (WideBlock(outputs, outputs, 1) for _ in range((depth - 4) // 6 - 1))
        self.layer = nn.Sequential(WideBlock(inputs, outputs, stride), *more)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideBlock(nn.Module):
    """Pre-activation block; where channels or size change, the shortcut begins after the first activation."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = convolution(inputs, outputs, 3, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = convolution(outputs, outputs, 3)
        changes = stride != 1 or inputs != outputs
        self.convShortcut = convolution(inputs, outputs, 1, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        activated = functional.relu(self.bn1(x))
        out = self.conv2(functional.relu(self.bn2(self.conv1(activated))))
        return out + (x if self.convShortcut is None else self.convShortcut(activated))


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Returns the identity, or BN(conv1x1) where channels or size change."""
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


def mean_over_image(x: Tensor) -> Tensor:
    return torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1)
