"""Where each weight of a model lies in the files of others: the keys of PyTorch's state dicts and of DeepMind's Haiku files.

An architecture has one table of renamings for its modules; the rest follows from the kind of a leaf. Kernels are HWIO here and
OIHW there, a linear layer's is transposed (PyTorch only; Haiku's arrays are as ours), BatchNorm's scale and bias are weight and
bias, its mean and variance running_mean and running_var.
"""

import functools
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrd.models import architectures
from jaxrd.models.deepmind import DeepMindPreActResNet, DeepMindWideResNet
from jaxrd.models.mobilenet_v2 import GROUPS, MobileNetV2
from jaxrd.models.preact_resnet import PreActResNet
from jaxrd.models.resnet import ResNet
from jaxrd.models.wide_resnet import WideResNet

# Class of the module -> (pattern, replacement) for each part of a module's path, to PyTorch's names.
_RENAMES = {
    ResNet: [(r"layer(\d)_(\d+)", r"layer\1.\2"), ("shortcut_conv", "shortcut.0"), ("shortcut_bn", "shortcut.1")],
    PreActResNet: [(r"layer(\d)_(\d+)", r"layer\1.\2"), ("shortcut_conv", "shortcut.0")],
    WideResNet: [(r"block(\d)_(\d+)", r"block\1.layer.\2"), ("shortcut_conv", "convShortcut")],
    MobileNetV2: [
        *((f"layer{group}_{index}", f"layers.{sum(blocks for _, _, blocks, _ in GROUPS[:group - 1]) + index}")
          for group, (_, _, blocks, _) in enumerate(GROUPS, start=1) for index in range(blocks)),
        ("shortcut_conv", "shortcut.0"), ("shortcut_bn", "shortcut.1")],
    DeepMindWideResNet: [(r"layer(\d)_(\d+)", r"layer.\1.block.\2")],
    DeepMindPreActResNet: [(r"layer(\d)_(\d+)", r"layer_\1.\2")],
}
_TORCH_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_HAIKU_LEAVES = {"kernel": "w", "scale": "scale", "bias": "b", "mean": "mean_ema", "var": "var_ema"}
COUNTER = "num_batches_tracked"  # of each BatchNorm in PyTorch's files: read by nothing that jaxrd has


class Entry(NamedTuple):
    """One array of a model.

    Attributes:
      key: its key in a PyTorch state dict of the public class.
      path: its path in the variables, "params" or "batch_stats" first.
      shape: its shape in the variables.
    """

    key: str
    path: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Its shape in a PyTorch state dict."""
        return tuple(self.shape[axis] for axis in _torch_axes(self.shape))

    @property
    def haiku_shape(self) -> tuple[int, ...]:
        """Its shape in a Haiku file, where BatchNorm's arrays are [1, 1, 1, channels]."""
        is_batch_norm = len(self.shape) == 1 and self.path[-2] != "logits"
        return (1, 1, 1, *self.shape) if is_batch_norm else self.shape


@functools.lru_cache(maxsize=64)
def entries(name: str, classes: int, channels: int = 3) -> tuple[Entry, ...]:
    """Returns every array of an architecture, in the order of the state dict of its public PyTorch class.

    Args:
      name: architecture.
      classes: number of logits.
      channels: of the images.
    """
    module = architectures.module(name, classes)
    order: list[str] = []

    def init(key):
        variables = module.init(key, jnp.zeros((1, 32, 32, channels)), train=False)
        # The order in which the layers are called, which a jax transform sorts away, is that of the public classes.
        order.extend(path for path, _ in _leaves(variables["params"]))
        return variables

    shapes = jax.eval_shape(init, jax.random.key(0))
    leaves = {kind: dict(_leaves(shapes[kind])) for kind in ("params", "batch_stats")}
    found = []
    for path in order:
        found.append(("params", path))
        if path[-1] == "bias" and (*path[:-1], "mean") in leaves["batch_stats"]:
            found += [("batch_stats", (*path[:-1], statistic)) for statistic in ("mean", "var")]
    return tuple(Entry(_torch_key(type(module), path), (kind, *path), leaves[kind][path].shape) for kind, path in found)


def to_torch(variables: Mapping, layout: tuple[Entry, ...], counters: Mapping[str, int] | None = None) -> dict[str, np.ndarray]:
    """Returns the state dict of the public PyTorch class: {key: contiguous array}.

    Args:
      variables: of a model with one BatchNorm set.
      layout: `entries` of that model.
      counters: num_batches_tracked by key; 0 where a key is missing. PyTorch reads it only where momentum is None.
    """
    state = {}
    for entry in layout:
        array = np.asarray(_at(variables, entry.path))
        state[entry.key] = np.ascontiguousarray(array.transpose(_torch_axes(array.shape)))
        if entry.path[-1] == "var":
            counter = f"{entry.key.rpartition('.')[0]}.{COUNTER}"
            state[counter] = np.asarray((counters or {}).get(counter, 0), np.int64)
    return state


def from_torch(state: Mapping[str, np.ndarray], layout: tuple[Entry, ...]) -> dict:
    """Returns the variables whose arrays lie in a state dict under the keys of the layout, in float32, each a copy."""
    def convert(entry):
        axes = np.argsort(_torch_axes(entry.shape))
        return np.array(state[entry.key].transpose(axes), np.float32, order="C")

    return _unflatten({entry.path: convert(entry) for entry in layout})


def haiku_name(entry: Entry) -> tuple[str, str]:
    """Returns (module, leaf) of an entry of the DeepMind wide ResNet in a Haiku file, without the root and the "~" in paths.

    The module of a running statistic ends in "mean_ema" or "var_ema", and the leaf is "average".
    """
    _, *modules, leaf = entry.path
    modules = [re.sub(r"layer(\d)_(\d+)", r"resnet_lay_\1_block_\2", part) for part in modules]
    if entry.path[0] == "batch_stats":
        return "/".join([*modules, _HAIKU_LEAVES[leaf]]), "average"
    if leaf == "bias" and modules[-1].startswith("batchnorm"):
        return "/".join(modules), "offset"
    return "/".join(modules), _HAIKU_LEAVES[leaf]


def from_haiku(arrays: Mapping[tuple[str, str], np.ndarray], layout: tuple[Entry, ...]) -> dict:
    """Returns the variables whose arrays lie under `haiku_name`, BatchNorm's [1, 1, 1, channels], in float32, each a copy."""
    return _unflatten({
        entry.path: np.array(np.reshape(arrays[haiku_name(entry)], entry.shape), np.float32, order="C") for entry in layout})


def identify(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, int] | None:
    """Returns (architecture, classes) of a PyTorch state dict by its keys and shapes, or None where none of ours has them all.

    Args:
      shapes: {key: shape}, prefixes removed.
    """
    def count(pattern):
        return len({match[1] for key in shapes if (match := re.match(pattern, key))})

    def width(key, unit):
        return max(shapes[key][0] // unit, 1) if len(shapes.get(key, ())) > 0 else 1

    stages = tuple(count(rf"layer{stage}\.(\d+)\.") for stage in range(1, 5))
    stem = width("conv1.weight", 1)
    if "init_conv.weight" in shapes:
        blocks = count(r"layer\.0\.block\.(\d+)\.")
        name = f"dm_wrn{6 * blocks + 4}_{width('layer.0.block.0.conv_0.weight', 16)}"
    elif "conv_2d.weight" in shapes:
        name = f"dm_preact_resnet18_w{width('conv_2d.weight', 1)}"
    elif "block1.layer.0.conv1.weight" in shapes:
        blocks = count(r"block1\.layer\.(\d+)\.")
        name = f"wrn{6 * blocks + 4}_{width('block1.layer.0.conv1.weight', 16)}"
    elif "layers.0.conv1.weight" in shapes:
        name = "mobilenet_v2"
    elif "layer1.0.conv1.weight" in shapes and "bn1.weight" in shapes:
        bottleneck = "layer1.0.conv3.weight" in shapes
        depths = [depth for depth, blocks in architectures.RESNET_BLOCKS.items()
                  if blocks == tuple(filter(None, stages)) and (depth == 50) == bottleneck]
        name = f"resnet{depths[0]}_w{stem}" if depths else ""
    elif "layer1.0.conv1.weight" in shapes:
        name = f"preact_resnet18{'' if 'bn.weight' in shapes else '_raw'}_w{stem}"
    else:
        return None
    name = re.sub(r"(resnet(?:18|34|50)(?:_raw)?)_w64$", r"\1", name)
    heads = [shapes[key][0] for key in ("linear.weight", "fc.weight", "logits.weight") if len(shapes.get(key, ())) == 2]
    if not heads or not architectures.is_architecture(name) or heads[0] < 2:
        return None
    stems = [shapes[key] for key in ("conv1.weight", "init_conv.weight", "conv_2d.weight") if len(shapes.get(key, ())) == 4]
    channels = stems[0][1] if stems else 3
    expected = {entry.key: entry.torch_shape for entry in entries(name, heads[0], channels)}
    # A deeper network has more blocks; another head or a dead entry is not of the body.
    more = [key for key in shapes if key not in expected and re.match(r"(layers?|block|layer_|bn|batchnorm)\d*\.", key)
            and not key.endswith(COUNTER)]
    fits = all(shapes.get(key) == shape for key, shape in expected.items()) and not more
    return (name, heads[0]) if fits else None


def _torch_key(kind: type, path: tuple[str, ...]) -> str:
    parts = []
    for part in path[:-1]:
        for pattern, replacement in _RENAMES[kind]:
            if re.fullmatch(pattern, part):
                part = re.sub(pattern, replacement, part)
                break
        parts.append(part)
    return ".".join([*parts, _TORCH_LEAVES[path[-1]]])


def _torch_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    return {4: (3, 2, 0, 1), 2: (1, 0)}.get(len(shape), tuple(range(len(shape))))


def _leaves(tree, path=()):
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _unflatten(leaves: Mapping[tuple[str, ...], np.ndarray]) -> dict:
    tree: dict = {}
    for path, leaf in leaves.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def _at(tree, path):
    for name in path:
        tree = tree[name]
    return tree
