"""The forward passes written once more with torch.nn.functional, from the parameters of our modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrd import models
from jaxrd.models.resnet import BottleneckBlock, ResNet

torch = pytest.importorskip("torch", reason="parity with PyTorch needs torch, which jaxrd does not")

TOLERANCES = {"mobilenet_v2": 1e-4}  # It has fifty layers, which amplify the rounding of float32.
EPSILON, MOMENTUM = 1e-5, 0.1


class TorchForward:
    """PyTorch's layers over one of our variable trees; `statistics` collects what its BatchNorm would keep."""

    def __init__(self, variables, train):
        self.params, self.batch_stats = variables["params"], variables["batch_stats"]
        self.train, self.statistics = train, {}

    def convolution(self, x, *path, stride=1):
        kernel = np.asarray(_at(self.params, path)["kernel"])
        weight = torch.tensor(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)))
        groups = x.shape[1] // kernel.shape[2]
        return torch.nn.functional.conv2d(x, weight, stride=stride, padding=kernel.shape[0] // 2, groups=groups)

    def batch_norm(self, x, *path):
        params, old = _tensors(_at(self.params, path)), _tensors(_at(self.batch_stats, path))
        mean, variance = old["mean"].clone(), old["var"].clone()
        y = torch.nn.functional.batch_norm(
            x, mean, variance, params["scale"], params["bias"], training=self.train, momentum=MOMENTUM, eps=EPSILON)
        if self.train:
            # PyTorch keeps the unbiased variance, our modules the biased one.
            count = x.numel() / x.shape[1]
            batch_variance = (variance - (1 - MOMENTUM) * old["var"]) / MOMENTUM * (count - 1) / count
            variance = (1 - MOMENTUM) * old["var"] + MOMENTUM * batch_variance
        self.statistics[path] = {"mean": mean.numpy(), "var": variance.numpy()}
        return y

    def pool_and_classify(self, x, name):
        linear = _tensors(self.params[name])
        return torch.nn.functional.linear(x.mean((2, 3)), linear["kernel"].T, linear["bias"])

    def resnet(self, images, blocks, bottleneck):
        x = torch.relu(self.batch_norm(self.convolution(images, "conv1"), "bn1"))
        for stage, number in enumerate(blocks, start=1):
            for index in range(number):
                block, stride = f"layer{stage}_{index}", 2 if stage > 1 and index == 0 else 1
                strides = (1, stride, 1) if bottleneck else (stride, 1)
                out = x
                for layer, layer_stride in enumerate(strides, start=1):
                    out = self.convolution(out, block, f"conv{layer}", stride=layer_stride)
                    out = self.batch_norm(out, block, f"bn{layer}")
                    out = torch.relu(out) if layer < len(strides) else out
                if "shortcut_conv" in self.params[block]:
                    x = self.convolution(x, block, "shortcut_conv", stride=stride)
                    x = self.batch_norm(x, block, "shortcut_bn")
                x = torch.relu(out + x)
        return self.pool_and_classify(x, "linear")

    def wide_resnet(self, images, blocks):
        x = self.pre_activated(self.convolution(images, "conv1"), "block", (blocks,) * 3)
        return self.pool_and_classify(torch.relu(self.batch_norm(x, "bn1")), "fc")

    def preact_resnet18(self, images):
        x = self.pre_activated(self.convolution(images, "conv1"), "layer", (2, 2, 2, 2))
        return self.pool_and_classify(torch.relu(self.batch_norm(x, "bn")), "linear")

    def pre_activated(self, x, prefix, blocks):
        for group, number in enumerate(blocks, start=1):
            for index in range(number):
                block, stride = f"{prefix}{group}_{index}", 2 if group > 1 and index == 0 else 1
                activated = torch.relu(self.batch_norm(x, block, "bn1"))
                out = self.convolution(activated, block, "conv1", stride=stride)
                out = self.convolution(torch.relu(self.batch_norm(out, block, "bn2")), block, "conv2")
                if "shortcut_conv" in self.params[block]:
                    x = self.convolution(activated, block, "shortcut_conv", stride=stride)
                x = x + out
        return x

    def mobilenet_v2(self, images):
        groups = [(16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1)]
        x = torch.relu(self.batch_norm(self.convolution(images, "conv1"), "bn1"))
        for group, (channels, number, group_stride) in enumerate(groups, start=1):
            for index in range(number):
                block, stride = f"layer{group}_{index}", group_stride if index == 0 else 1
                out = torch.relu(self.batch_norm(self.convolution(x, block, "conv1"), block, "bn1"))
                out = self.convolution(out, block, "conv2", stride=stride)
                out = self.convolution(torch.relu(self.batch_norm(out, block, "bn2")), block, "conv3")
                out = self.batch_norm(out, block, "bn3")
                if stride == 1 and x.shape[1] != channels:
                    x = self.batch_norm(self.convolution(x, block, "shortcut_conv"), block, "shortcut_bn")
                x = out + x if stride == 1 else out
        x = torch.relu(self.batch_norm(self.convolution(x, "conv2"), "bn2"))
        return self.pool_and_classify(x, "linear")


CASES = {
    "resnet6_w8": lambda torch_side, x: torch_side.resnet(x, (1, 1), bottleneck=False),
    "resnet18_w4": lambda torch_side, x: torch_side.resnet(x, (2, 2, 2, 2), bottleneck=False),
    "bottleneck": lambda torch_side, x: torch_side.resnet(x, (2, 2), bottleneck=True),
    "wrn10_2": lambda torch_side, x: torch_side.wide_resnet(x, 1),
    "wrn16_1": lambda torch_side, x: torch_side.wide_resnet(x, 2),
    "preact_resnet18_w4": lambda torch_side, x: torch_side.preact_resnet18(x),
    "mobilenet_v2": lambda torch_side, x: torch_side.mobilenet_v2(x),
}


@pytest.fixture(autouse=True)
def one_torch_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_logits_and_statistics_are_those_of_torch(name, train):
    image_shape = (16, 12, 3)
    init, apply = _functions(name, image_shape)
    images, variables = _random_images(8, image_shape), _random_variables(init)
    with jax.default_matmul_precision("highest"):  # Accelerators round float32 products to fewer bits by default.
        logits, batch_stats = jax.jit(apply, static_argnums=2)(variables, images, train)

    torch_side = TorchForward(variables, train)
    expected = CASES[name](torch_side, _channels_first(images)).numpy()
    tolerance = TOLERANCES.get(name, 1e-5)
    assert np.abs(expected).max() > 0.1 and np.ptp(expected, axis=0).min() > 10 * tolerance
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(batch_stats)]
    assert set(torch_side.statistics) == {tuple(part.key for part in path[:-1]) for path in paths}
    for path, statistics in torch_side.statistics.items():
        for kind in ("mean", "var"):
            np.testing.assert_allclose(_at(batch_stats, path)[kind], statistics[kind], rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_input_gradients_are_those_of_torch(name):
    image_shape = (8, 6, 3)
    init, apply = _functions(name, image_shape)
    images, variables = _random_images(4, image_shape), _random_variables(init)
    cotangent = np.random.default_rng(2).normal(size=(len(images), 10)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        gradients = jax.jit(jax.grad(lambda x: jnp.sum(apply(variables, x, False)[0] * cotangent)))(images)

    torch_images = _channels_first(images).requires_grad_()
    logits = CASES[name](TorchForward(variables, train=False), torch_images)
    expected, = torch.autograd.grad(logits, torch_images, torch.tensor(cotangent))
    expected = expected.numpy().transpose(0, 2, 3, 1)
    differences = np.abs(gradients - expected).max(axis=(1, 2, 3)) / np.abs(expected).max(axis=(1, 2, 3))
    # A ReLU whose input is 0 to rounding may fall on either side, and MobileNetV2 has many: one image is let off.
    assert np.sum(differences < 1e-4) >= 3, differences


def _random_images(batch, image_shape):
    return np.random.default_rng(0).uniform(size=(batch, *image_shape)).astype(np.float32)


def _channels_first(images):
    return torch.tensor(images.transpose(0, 3, 1, 2).copy())


def _functions(name, image_shape):
    """Returns a model's init and apply; for "bottleneck" those of a ResNet-50 cut down to two stages.

    Fifty layers of a few channels amplify the rounding of float32 beyond any useful tolerance.
    """
    if name != "bottleneck":
        model = models.create(name, classes=10, image_shape=image_shape)
        return model.init, model.apply
    module = ResNet((2, 2), 8, BottleneckBlock, classes=10, dtype=jnp.float32)

    def apply(variables, images, train):
        logits, updated = module.apply(variables, images, train=train, mutable=["batch_stats"])
        return logits, updated["batch_stats"]

    return lambda key: module.init(key, jnp.zeros((1, *image_shape)), train=False), apply


def _random_variables(init):
    """Returns variables in the shapes of a model's; at the initial zeros and ones of BatchNorm mistakes are invisible.

    Kernels are normal with variance 1 / fan_in: from PyTorch's, a third of it, nothing of the image would be left after the
    fifty layers of MobileNetV2 in eval mode.
    """
    draw = np.random.default_rng(1)
    ranges = {"scale": (0.5, 1.5), "bias": (-0.5, 0.5), "mean": (-0.5, 0.5), "var": (0.5, 1.5)}

    def randomise(path, leaf):
        if path[-1].key == "kernel":
            values = draw.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        else:
            values = draw.uniform(*ranges[path[-1].key], leaf.shape)
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(randomise, jax.eval_shape(init, jax.random.key(0)))


def _at(tree, path):
    for name in path:
        tree = tree[name]
    return tree


def _tensors(tree):
    return {name: torch.tensor(np.array(leaf)) for name, leaf in tree.items()}
