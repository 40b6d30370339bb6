"""The public PyTorch classes of every architecture, written anew from their published layers: what jaxrd's are compared with.

Their state dicts have the keys of the public ones, in the order in which those register them. Width, depth and classes are
free. The blocks of the ResNets are those that `launch.pytorch` times. The published classes pool with a fixed window, 8x8 in the
wide ResNets and 4x4 in the others, which is the whole image for 32x32 pixels; `pool=None` pools over the whole image whatever
its size. This module needs torch.
"""

import torch
from torch import nn
from torch.nn import functional

from launch.pytorch.networks import BasicBlock, Bottleneck, shortcut

# (expansion, channels that come out, blocks, stride of the first block)
MOBILENET_GROUPS = [(1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]


def convolution(inputs, outputs, size, stride=1, padding=None, groups=1):
    """Returns a bias-free convolution, by default with symmetric padding."""
    padding = size // 2 if padding is None else padding
    return nn.Conv2d(inputs, outputs, size, stride=stride, padding=padding, groups=groups, bias=False)


def strides(blocks, first):
    """Returns the stride of each block of a stage whose first block has the stride `first`."""
    return [first] + [1] * (blocks - 1)


def pooled(x, window):
    return functional.adaptive_avg_pool2d(x, 1) if window is None else functional.avg_pool2d(x, window)


class ResNet(nn.Module):
    """ResNet for CIFAR, as the papers on robust distillation have it; one `layer` per entry of `blocks`."""

    def __init__(self, block, blocks, width=64, classes=10, pool=4, channels=3):
        super().__init__()
        self.conv1 = convolution(channels, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        inputs = width
        for stage, number in enumerate(blocks, start=1):
            layers = []
            for stride in strides(number, 1 if stage == 1 else 2):
                layers.append(block(inputs, width * 2 ** (stage - 1), stride))
                inputs = width * 2 ** (stage - 1) * block.expansion
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
        self.linear = nn.Linear(inputs, classes)
        self.stages, self.pool = len(blocks), pool

    def forward(self, x):
        x = functional.relu(self.bn1(self.conv1(x)))
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        x = pooled(x, self.pool)
        return self.linear(x.view(x.shape[0], -1))


class PreActBlock(nn.Module):
    def __init__(self, inputs, outputs, stride, raw_shortcut):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = convolution(inputs, outputs, 3, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = convolution(outputs, outputs, 3)
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(convolution(inputs, outputs, 1, stride))
        self.raw_shortcut = raw_shortcut

    def forward(self, x):
        activated = functional.relu(self.bn1(x))
        identity = x
        if hasattr(self, "shortcut"):
            identity = self.shortcut(x if self.raw_shortcut else activated)
        out = self.conv1(activated)
        return self.conv2(functional.relu(self.bn2(out))) + identity


class PreActResNet18(nn.Module):
    """The flavours of PreActResNet-18: with BatchNorm before the pool or without, shortcuts from the raw or activated input."""

    def __init__(self, last_batch_norm=True, raw_shortcut=False, width=64, classes=10, pool=4):
        super().__init__()
        self.conv1 = convolution(3, width, 3)
        inputs = width
        for stage in range(1, 5):
            outputs = width * 2 ** (stage - 1)
            first = PreActBlock(inputs, outputs, 1 if stage == 1 else 2, raw_shortcut)
            setattr(self, f"layer{stage}", nn.Sequential(first, PreActBlock(outputs, outputs, 1, raw_shortcut)))
            inputs = outputs
        if last_batch_norm:
            self.bn = nn.BatchNorm2d(inputs)
        self.linear = nn.Linear(inputs, classes)
        self.pool = pool

    def forward(self, x):
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        if hasattr(self, "bn"):
            x = functional.relu(self.bn(x))
        x = pooled(x, self.pool)
        return self.linear(x.view(x.shape[0], -1))


class WideBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = convolution(inputs, outputs, 3, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = convolution(outputs, outputs, 3)
        self.convShortcut = None if inputs == outputs else convolution(inputs, outputs, 1, stride)

    def forward(self, x):
        activated = functional.relu(self.bn1(x))
        out = self.conv2(functional.relu(self.bn2(self.conv1(activated))))
        return out + (x if self.convShortcut is None else self.convShortcut(activated))


class WideGroup(nn.Module):
    def __init__(self, blocks, inputs, outputs, stride):
        super().__init__()
        first, *others = strides(blocks, stride)
        layers = [WideBlock(inputs, outputs, first), *(WideBlock(outputs, outputs, other) for other in others)]
        self.layer = nn.Sequential(*layers)

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    """The wide ResNet of TRADES; with `sub_block1` it has a further group of blocks, which it never calls."""

    def __init__(self, depth=34, width=10, classes=10, sub_block1=False, pool=8):
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = convolution(3, 16, 3)
        self.block1 = WideGroup(blocks, 16, 16 * width, 1)
        if sub_block1:
            self.sub_block1 = WideGroup(blocks, 16, 16 * width, 1)
        self.block2 = WideGroup(blocks, 16 * width, 32 * width, 2)
        self.block3 = WideGroup(blocks, 32 * width, 64 * width, 2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, classes)
        self.channels, self.pool = 64 * width, pool

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = pooled(functional.relu(self.bn1(x)), self.pool)
        return self.fc(x.view(-1, self.channels))


def padded(x, stride):
    """Returns x with the padding of DeepMind's 3x3 convolutions: all sides for stride 1, right and bottom for stride 2."""
    return functional.pad(x, {1: (1, 1, 1, 1), 2: (0, 1, 0, 1)}[stride])


class DMWideBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(inputs)
        self.conv_0 = convolution(inputs, outputs, 3, stride, padding=0)
        self.batchnorm_1 = nn.BatchNorm2d(outputs)
        self.conv_1 = convolution(outputs, outputs, 3)
        self.shortcut = None if inputs == outputs else convolution(inputs, outputs, 1, stride)
        self.stride = stride

    def forward(self, x):
        activated = functional.silu(self.batchnorm_0(x))
        identity = x if self.shortcut is None else self.shortcut(activated)
        out = self.conv_0(padded(activated, self.stride))
        return self.conv_1(functional.silu(self.batchnorm_1(out))) + identity


class DMWideGroup(nn.Module):
    def __init__(self, blocks, inputs, outputs, stride):
        super().__init__()
        first, *others = strides(blocks, stride)
        layers = [DMWideBlock(inputs, outputs, first), *(DMWideBlock(outputs, outputs, other) for other in others)]
        self.block = nn.Sequential(*layers)

    def forward(self, x):
        return self.block(x)


class Normalising(nn.Module):
    """A network that normalises its images; mean and std are no part of its state dict."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def normalised(self, images):
        return (images - self.mean) / self.std


class DMWideResNet(Normalising):
    """DeepMind's wide ResNet, with SiLU."""

    def __init__(self, depth=28, width=10, classes=10, mean=(0.0,) * 3, std=(1.0,) * 3, pool=8):
        super().__init__(mean, std)
        blocks = (depth - 4) // 6
        self.init_conv = convolution(3, 16, 3)
        self.layer = nn.Sequential(
            DMWideGroup(blocks, 16, 16 * width, 1),
            DMWideGroup(blocks, 16 * width, 32 * width, 2),
            DMWideGroup(blocks, 32 * width, 64 * width, 2))
        self.batchnorm = nn.BatchNorm2d(64 * width)
        self.logits = nn.Linear(64 * width, classes)
        self.channels, self.pool = 64 * width, pool

    def forward(self, images):
        x = self.layer(self.init_conv(self.normalised(images)))
        x = pooled(functional.silu(self.batchnorm(x)), self.pool)
        return self.logits(x.view(-1, self.channels))


class DMPreActBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(inputs)
        self.conv_2d_1 = convolution(inputs, outputs, 3, stride, padding=0)
        self.batchnorm_1 = nn.BatchNorm2d(outputs)
        self.conv_2d_2 = convolution(outputs, outputs, 3)
        if stride != 1 or inputs != outputs:
            self.shortcut = convolution(inputs, outputs, 3, stride, padding=0)
        self.stride = stride

    def forward(self, x):
        identity = self.shortcut(padded(x, self.stride)) if hasattr(self, "shortcut") else x
        out = self.conv_2d_1(padded(functional.silu(self.batchnorm_0(x)), self.stride))
        return self.conv_2d_2(functional.silu(self.batchnorm_1(out))) + identity


class DMPreActResNet18(Normalising):
    """DeepMind's PreActResNet-18, with SiLU and strided 3x3 shortcuts."""

    def __init__(self, width=64, classes=10, mean=(0.0,) * 3, std=(1.0,) * 3, pool=4):
        super().__init__(mean, std)
        self.conv_2d = convolution(3, width, 3)
        inputs = width
        for stage in range(4):
            outputs = width * 2**stage
            first = DMPreActBlock(inputs, outputs, 1 if stage == 0 else 2)
            setattr(self, f"layer_{stage}", nn.Sequential(first, DMPreActBlock(outputs, outputs, 1)))
            inputs = outputs
        self.batchnorm = nn.BatchNorm2d(inputs)
        self.logits = nn.Linear(inputs, classes)
        self.pool = pool

    def forward(self, images):
        x = self.conv_2d(self.normalised(images))
        x = self.layer_3(self.layer_2(self.layer_1(self.layer_0(x))))
        x = pooled(functional.silu(self.batchnorm(x)), self.pool)
        return self.logits(x.view(x.shape[0], -1))


class InvertedResidual(nn.Module):
    def __init__(self, inputs, outputs, expansion, stride):
        super().__init__()
        inner = expansion * inputs
        self.conv1 = convolution(inputs, inner, 1)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = convolution(inner, inner, 3, stride, groups=inner)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = convolution(inner, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = shortcut(inputs, outputs, 1) if stride == 1 else nn.Sequential()
        self.stride = stride

    def forward(self, x):
        out = functional.relu(self.bn1(self.conv1(x)))
        out = functional.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return out + self.shortcut(x) if self.stride == 1 else out


class MobileNetV2(nn.Module):
    """MobileNetV2 for CIFAR, as the papers on robust distillation have it: ReLU, and 4x4 pixels before the pool."""

    def __init__(self, classes=10, pool=4):
        super().__init__()
        self.conv1 = convolution(3, 32, 3)
        self.bn1 = nn.BatchNorm2d(32)
        layers, inputs = [], 32
        for expansion, outputs, blocks, first in MOBILENET_GROUPS:
            for stride in strides(blocks, first):
                layers.append(InvertedResidual(inputs, outputs, expansion, stride))
                inputs = outputs
        self.layers = nn.Sequential(*layers)
        self.conv2 = convolution(inputs, 1280, 1)
        self.bn2 = nn.BatchNorm2d(1280)
        self.linear = nn.Linear(1280, classes)
        self.pool = pool

    def forward(self, x):
        x = self.layers(functional.relu(self.bn1(self.conv1(x))))
        x = pooled(functional.relu(self.bn2(self.conv2(x))), self.pool)
        return self.linear(x.view(x.shape[0], -1))
