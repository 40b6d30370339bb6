"""Every architecture computes what its public PyTorch class computes, from one state dict, which both sides can write."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrd import models
from jaxrd.errors import InputError
from jaxrd.models import architectures
from jaxrd.models.weights import layouts

torch = pytest.importorskip("torch", reason="parity with PyTorch needs torch, which jaxrd does not")

# After the line that skips where there is no torch.
from tests.models import torch_modules

# Of float32, for logits and gradients of size 1, which differ by 1e-7 to 1e-6, and by 1e-5 in the deepest networks.
TOLERANCE = 1e-4
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


RESNET, PREACT, DM_PREACT = torch_modules.ResNet, torch_modules.PreActResNet18, torch_modules.DMPreActResNet18
WIDE, DM_WIDE = torch_modules.WideResNet, torch_modules.DMWideResNet
BASIC, BOTTLENECK = torch_modules.BasicBlock, torch_modules.Bottleneck
RAW = partial(PREACT, last_batch_norm=False, raw_shortcut=True)
# Our name -> the public class, which takes `classes` and `pool`.
SMALL = {
    # Two stages leave 16x16 pixels of 32x32, and no public class has them: it pools over all.
    "resnet6_w8": partial(RESNET, BASIC, (1, 1), 8, pool=None),
    "resnet18_w4": partial(RESNET, BASIC, (2, 2, 2, 2), 4),
    "resnet34_w4": partial(RESNET, BASIC, (3, 4, 6, 3), 4),
    "resnet50_w4": partial(RESNET, BOTTLENECK, (3, 4, 6, 3), 4),
    "preact_resnet18_w4": partial(PREACT, width=4),
    "preact_resnet18_raw_w4": partial(RAW, width=4),
    "dm_preact_resnet18_w4": partial(DM_PREACT, width=4),
    "wrn10_2": partial(WIDE, 10, 2),
    "wrn16_1": partial(WIDE, 16, 1),
    "wrn34_1": partial(WIDE, 34, 1),
    "dm_wrn10_2": partial(DM_WIDE, 10, 2),
    "dm_wrn28_1": partial(DM_WIDE, 28, 1),
    "dm_wrn70_1": partial(DM_WIDE, 70, 1),
    "mobilenet_v2": torch_modules.MobileNetV2,
}
FULL = {
    "resnet18": partial(RESNET, BASIC, (2, 2, 2, 2)),
    "resnet34": partial(RESNET, BASIC, (3, 4, 6, 3)),
    "resnet50": partial(RESNET, BOTTLENECK, (3, 4, 6, 3)),
    "preact_resnet18": PREACT,
    "preact_resnet18_raw": RAW,
    "dm_preact_resnet18": DM_PREACT,
    "wrn28_10": partial(WIDE, 28, 10),
    "wrn34_10": partial(WIDE, 34, 10),
    "dm_wrn28_10": partial(DM_WIDE, 28, 10),
}
HUGE = {  # of which only the layouts are compared
    "wrn34_20": partial(WIDE, 34, 20),
    "wrn70_16": partial(WIDE, 70, 16),
    "dm_wrn34_20": partial(DM_WIDE, 34, 20),
    "dm_wrn70_16": partial(DM_WIDE, 70, 16),
}
CLASSES = SMALL | FULL | HUGE
SMALL_SIZES = [pytest.param(name, marks=[pytest.mark.slow] * (name == "dm_wrn70_1")) for name in SMALL]
SIZES = [*SMALL_SIZES, *(pytest.param(name, marks=pytest.mark.slow) for name in FULL)]

pytestmark = pytest.mark.usefixtures("quick_compilation", "exact_products", "one_torch_thread")


@pytest.mark.parametrize("name, classes", [*((name, 10) for name in CLASSES), ("dm_wrn28_10", 100), ("resnet18", 200)])
def test_the_layout_is_the_state_dict_of_torch_in_its_order(name, classes):
    with torch.device("meta"):  # allocates nothing
        expected = {key: tuple(value.shape) for key, value in CLASSES[name](classes=classes).state_dict().items()}
    layout = {}
    for entry in layouts.entries(name, classes):
        layout[entry.key] = entry.torch_shape
        if entry.key.endswith("running_var"):
            layout[entry.key.replace("running_var", "num_batches_tracked")] = ()
    assert list(layout.items()) == list(expected.items())


@pytest.mark.parametrize("name", SIZES)
def test_logits_are_those_of_torch(name):
    variables, images = random_variables(name), random_images(batch(name))
    logits, batch_stats = compiled(name)(variables, images, False)
    assert_near(logits, forward(loaded(name, variables), images))
    jax.tree.map(np.testing.assert_array_equal, batch_stats, variables["batch_stats"])


@pytest.mark.parametrize("name", SIZES)
def test_logits_and_statistics_of_train_mode_are_those_of_torch(name):
    variables, images = random_variables(name), random_images(8)
    logits, batch_stats = compiled(name)(variables, images, True)
    module = loaded(name, variables).train()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    counts = numbers_of_values(module)
    assert_near(logits, forward(module, images))

    state = module.state_dict()
    for key, count in counts.items():
        # PyTorch keeps the unbiased variance, our modules the biased one.
        kept = 0.9 * before[f"{key}.running_var"]
        state[f"{key}.running_var"] = kept + (state[f"{key}.running_var"] - kept) * (count - 1) / count
    expected = layouts.from_torch({key: value.numpy() for key, value in state.items()}, layouts.entries(name, 10))
    assert jax.tree.structure(batch_stats) == jax.tree.structure(expected["batch_stats"])
    for old, new, theirs in zip(*map(jax.tree.leaves, (variables["batch_stats"], batch_stats, expected["batch_stats"]))):
        assert np.abs(new - old).max() > 1e-3
        np.testing.assert_allclose(new, theirs, rtol=TOLERANCE, atol=TOLERANCE)


# The others are slow to compile, and have their gradients compared in float32.
QUICK = ["resnet18_w4", "resnet50_w4", "preact_resnet18_w4", "preact_resnet18_raw_w4", "dm_preact_resnet18_w4", "wrn16_1",
         "dm_wrn10_2"]


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in (SMALL | FULL) if name not in QUICK)])
def test_input_gradients_in_float64_are_those_of_torch(name):
    # A ReLU whose input is 0 to rounding may fall on either side, which float32 meets in every few images, float64 in none.
    # Our pool and linear layer stay in float32, hence the tolerance; they come after the last ReLU.
    images = random_images(2, (32, 32, 3) if name in FULL else (16, 8, 3)).astype(np.float64)
    cotangent = np.random.default_rng(2).normal(size=(2, 10)).astype(np.float32)
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), random_variables(name))
        network = architectures.module(name, 10, jnp.float64)

        @jax.jit
        def ours(variables, images):
            logits, pullback = jax.vjp(lambda images: network.apply(variables, images, train=False), images)
            return logits, pullback(jnp.asarray(cotangent))[0]

        logits, gradients = jax.device_get(ours(variables, images))
    assert gradients.dtype == np.float64
    module = loaded(name, variables) if name in FULL else loaded(name, variables, pool=None)
    expected_logits, expected = torch_gradients(module, images, cotangent)
    np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=1e-6 * np.abs(expected_logits).max())
    np.testing.assert_allclose(gradients, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", SMALL_SIZES)
def test_logits_and_input_gradients_of_oblong_images_are_those_of_torch(name, monkeypatch):
    # MobileNetV2 has so many ReLUs that in most images one of them is near its kink.
    number, image_shape = (64, (8, 6, 3)) if name == "mobilenet_v2" else (16, (16, 12, 3))
    images, variables = random_images(number, image_shape), random_variables(name)
    cotangent = np.random.default_rng(2).normal(size=(number, 10)).astype(np.float32)
    model = models.create(name, classes=10, image_shape=image_shape)

    @jax.jit
    def ours(images):
        logits, pullback = jax.vjp(models.logits_fn(model, variables), images)
        return logits, pullback(jnp.asarray(cotangent))[0]

    logits, gradients = ours(images)
    distances = distances_from_kinks(monkeypatch)
    expected_logits, expected = torch_gradients(loaded(name, variables, pool=None), images, cotangent)
    assert_near(logits, expected_logits)
    # Images of which a ReLU has an input within rounding of 0 may have another gradient.
    clear = np.min([np.ones(number), *distances], axis=0) > 1e-5
    assert clear.sum() >= 4, clear
    size = np.abs(expected).max()
    np.testing.assert_allclose(gradients[clear] / size, expected[clear] / size, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", SIZES)
def test_a_state_dict_of_torch_gives_the_logits_of_torch(name):
    torch.manual_seed(0)
    module = CLASSES[name]()
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.weight, 0.5, 1.5)
            torch.nn.init.uniform_(part.bias, -0.5, 0.5)
            part.momentum = 1.0
    forward(module.train(), random_images(8, seed=3))  # whose statistics the momentum of 1 leaves in the module
    size = np.abs(forward(module.eval(), random_images(8, seed=3))).max().item()
    for parameter in list(module.children())[-1].parameters():
        parameter.data /= size
    images = random_images(batch(name))
    state = {key: value.numpy() for key, value in module.state_dict().items()}
    variables = layouts.from_torch(state, layouts.entries(name, 10))
    assert_near(compiled(name)(variables, images, False)[0], forward(module, images))


@pytest.mark.parametrize("name", ["dm_wrn10_2", "dm_preact_resnet18_w4"])
def test_normalisation_inside_is_that_of_deepminds_class(name):
    images, variables = random_images(4), random_variables(name)
    model = models.create(name, classes=10, mean=CIFAR10_MEAN, std=CIFAR10_STD)
    cotangent = np.random.default_rng(2).normal(size=(4, 10)).astype(np.float32)

    @jax.jit
    def ours(images):
        logits, pullback = jax.vjp(models.logits_fn(model, variables), images)
        return logits, pullback(jnp.asarray(cotangent))[0]

    logits, gradients = ours(images)
    module = loaded(name, variables, mean=CIFAR10_MEAN, std=CIFAR10_STD)
    expected_logits, expected = torch_gradients(module, images, cotangent)
    assert_near(logits, expected_logits)
    np.testing.assert_allclose(gradients, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
    assert np.abs(compiled(name)(variables, images, False)[0] - expected_logits).max() > 0.1


def test_weights_that_the_public_wide_resnet_never_calls_change_nothing():
    torch.manual_seed(0)
    plain, module = torch_modules.WideResNet(10, 2), torch_modules.WideResNet(10, 2, sub_block1=True)
    dead = {key: value for key, value in module.state_dict().items() if key.startswith("sub_block1.")}
    assert set(module.state_dict()) - set(plain.state_dict()) == set(dead) and len(dead) == 13
    with torch.device("meta"):
        of_teacher = torch_modules.WideResNet(34, 10, sub_block1=True).sub_block1.state_dict()
    assert len(of_teacher) == 61 and sum(value.numel() for value in of_teacher.values()) == 2_105_034
    images = random_images(4)
    state = {key: value.numpy() for key, value in module.state_dict().items()}
    variables = layouts.from_torch(state, layouts.entries("wrn10_2", 10))
    np.testing.assert_allclose(
        compiled("wrn10_2")(variables, images, False)[0], forward(module.eval(), images), rtol=0, atol=TOLERANCE)
    assert layouts.identify({key: tuple(value.shape) for key, value in state.items()}) == ("wrn10_2", 10)


@pytest.mark.parametrize("name", ["wrn10_2", "dm_wrn10_2"])
def test_larger_images_are_one_row_each_where_the_public_wide_resnets_give_four(name):
    variables, images = random_variables(name), random_images(2, (64, 64, 3))
    assert forward(loaded(name, variables), images).shape == (8, 10)
    with pytest.raises(InputError, match=r"\[2, 64, 64, 3\].*\[batch, 32, 32, 3\]"):
        models.create(name, classes=10).apply(variables, images, False)
    logits = compiled(name, (64, 64, 3))(variables, images, False)[0]
    assert_near(logits, forward(loaded(name, variables, pool=None), images))


@pytest.mark.parametrize("name", ["resnet18_w4", "preact_resnet18_w4", "preact_resnet18_raw_w4", "dm_preact_resnet18_w4"])
def test_larger_images_pool_as_adaptive_pooling_does(name):
    variables, images = random_variables(name), random_images(2, (64, 64, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        forward(loaded(name, variables), images)
    logits = compiled(name, (64, 64, 3))(variables, images, False)[0]
    assert_near(logits, forward(loaded(name, variables, pool=None), images))


def assert_near(logits, expected):
    """Asserts that logits agree, and that they depend on the image."""
    size = np.abs(expected).max()
    assert np.ptp(expected, axis=0).max() > 0.02 * size
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE * np.clip(size, 0.1, 1))


def batch(name):
    return 4 if name in SMALL else 2


@functools.cache
def compiled(name, image_shape=(32, 32, 3)):
    """Returns a model's apply."""
    return jax.jit(models.create(name, classes=10, image_shape=image_shape).apply, static_argnums=2)


def random_images(number, image_shape=(32, 32, 3), seed=0):
    """Returns images of coarse and of fine noise: those of fine noise alone would all have the same logits."""
    draw = np.random.default_rng(seed)
    height, width, channels = image_shape
    coarse = draw.uniform(size=(number, 4, 4, channels)).repeat(-(-height // 4), axis=1).repeat(-(-width // 4), axis=2)
    fine = draw.uniform(size=(number, *image_shape))
    return (0.7 * coarse[:, :height, :width] + 0.3 * fine).astype(np.float32)


@functools.lru_cache(maxsize=20)
def random_variables(name):
    """Returns random variables in the shapes of a model's; at the initial zeros and ones of BatchNorm mistakes are invisible.

    Kernels are normal with variance 1 / fan_in, and the running statistics near those of a batch, as in a trained network:
    activations have size 1 at any depth. The last layer is such that logits have size 1 too.
    """
    draw = np.random.default_rng(1)
    ranges = {"scale": (0.5, 1.5), "bias": (-0.5, 0.5), "mean": (0, 0), "var": (0, 0)}

    def randomise(path, leaf):
        if path[-1].key == "kernel":
            return draw.normal(size=leaf.shape, scale=np.prod(leaf.shape[:-1]) ** -0.5).astype(np.float32)
        return draw.uniform(*ranges[path[-1].key], leaf.shape).astype(np.float32)

    model = models.create(name, classes=10)
    variables = jax.tree_util.tree_map_with_path(randomise, jax.eval_shape(model.init, jax.random.key(0)))
    moved = jax.device_get(compiled(name)(variables, random_images(8, seed=3), True)[1])

    def shifted(node):  # a running statistic that was 0 is now a tenth of the batch's
        if "var" not in node:
            return {key: shifted(value) for key, value in node.items()}
        mean, variance = 10 * node["mean"], 10 * node["var"]
        mean = mean + np.sqrt(variance) * draw.uniform(-0.5, 0.5, mean.shape)
        return {"mean": mean.astype(np.float32), "var": (variance * draw.uniform(0.5, 1.5, mean.shape)).astype(np.float32)}

    variables = {"params": variables["params"], "batch_stats": shifted(moved)}
    size = np.abs(compiled(name)(variables, random_images(8, seed=3), False)[0]).max()
    variables["params"] = {
        layer: jax.tree.map(lambda leaf: leaf / size, leaves) if layer in ("linear", "fc", "logits") else leaves
        for layer, leaves in variables["params"].items()}
    return variables


def loaded(name, variables, **options):
    """Returns the public class with our variables, in eval mode and in their dtype."""
    state = {key: torch.tensor(value) for key, value in layouts.to_torch(variables, layouts.entries(name, 10)).items()}
    module = CLASSES[name](**options).to(next(iter(state.values())).dtype)
    module.load_state_dict(state, strict=True)
    return module.eval()


def channels_first(images):
    return torch.tensor(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def forward(module, images):
    with torch.no_grad():
        return module(channels_first(images)).numpy()


def torch_gradients(module, images, cotangent):
    """Returns logits and the gradient of sum(logits * cotangent) to the images, channels last."""
    inputs = channels_first(images).requires_grad_()
    logits = module(inputs)
    gradients, = torch.autograd.grad(logits, inputs, torch.tensor(cotangent).to(logits.dtype))
    return logits.detach().numpy(), gradients.numpy().transpose(0, 2, 3, 1)


def numbers_of_values(module):
    """Returns a dictionary that a forward pass fills: how many values each BatchNorm averages over, by its name."""
    counts = {}
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.register_forward_pre_hook(
                lambda _, inputs, name=name: counts.__setitem__(name, inputs[0].numel() / inputs[0].shape[1]))
    return counts


def distances_from_kinks(monkeypatch):
    """Returns a list that a forward pass fills: for each ReLU the smallest size of its inputs, by image."""
    distances, relu = [], torch.nn.functional.relu

    def watched(x):
        distances.append(x.detach().abs().flatten(1).amin(1).numpy())
        return relu(x)

    monkeypatch.setattr(torch.nn.functional, "relu", watched)
    return distances
