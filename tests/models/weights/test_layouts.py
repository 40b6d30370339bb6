"""Keys, shapes and order of the public state dicts, typed by hand from their classes; test_models_torch_parity runs them."""

import functools
import re

import jax
import numpy as np
import pytest

from jaxrd import models
from jaxrd.models.weights import layouts


@pytest.mark.parametrize("name, classes, entries, parameters", [
    ("wrn28_10", 10, 155, 36_479_194),
    ("wrn34_10", 10, 191, 46_160_474),
    ("wrn34_10", 100, 191, 46_218_164),
    ("wrn34_20", 10, 191, 184_531_674),
    ("dm_wrn28_10", 10, 155, 36_479_194),
    ("dm_wrn28_10", 100, 155, 36_536_884),
    # 1 stem, 33 blocks with two convolutions and two BatchNorms, 3 shortcuts, the last BatchNorm, weight and bias.
    ("dm_wrn70_16", 10, 1 + 33 * 12 + 3 + 5 + 2, 266_796_506),
    ("resnet18", 10, 122, 11_173_962),
    ("resnet18", 200, 122, 11_271_432),
    ("resnet34", 10, 36 * 6 + 2, 21_282_122),
    ("resnet50", 10, 53 * 6 + 2, 23_520_842),
    ("mobilenet_v2", 10, 344, 2_296_922),
    ("mobilenet_v2", 100, 344, 2_412_212),
    # 1 stem, 8 blocks, 3 shortcuts, the last BatchNorm, weight and bias.
    ("preact_resnet18", 200, 1 + 8 * 12 + 3 + 5 + 2, 11_269_640),
    # 190 rows of the last layer less.
    ("preact_resnet18", 10, 107, 11_269_640 - 190 * 513),
    # No last BatchNorm.
    ("preact_resnet18_raw", 10, 102, 11_269_640 - 190 * 513 - 2 * 512),
    # Shortcuts of 3x3.
    ("dm_preact_resnet18", 10, 107, 12_548_426),
    ("dm_preact_resnet18", 10, 107, 11_269_640 - 190 * 513 + 8 * (64 * 128 + 128 * 256 + 256 * 512)),
])
def test_entries_and_parameters_are_as_many_as_published(name, classes, entries, parameters):
    layout = layouts.entries(name, classes)
    counters = sum(entry.path[-1] == "var" for entry in layout)  # num_batches_tracked of each BatchNorm
    assert len(layout) + counters == entries
    assert sum(int(np.prod(entry.shape)) for entry in layout if entry.path[0] == "params") == parameters
    assert len({entry.key for entry in layout}) == len({entry.path for entry in layout}) == len(layout)


# The modules that own weights, in the order in which the public classes register them.
MODULES = {
    "wrn16_1": """
        conv1
        block1.layer.0.bn1 block1.layer.0.conv1 block1.layer.0.bn2 block1.layer.0.conv2
        block1.layer.1.bn1 block1.layer.1.conv1 block1.layer.1.bn2 block1.layer.1.conv2
        block2.layer.0.bn1 block2.layer.0.conv1 block2.layer.0.bn2 block2.layer.0.conv2 block2.layer.0.convShortcut
        block2.layer.1.bn1 block2.layer.1.conv1 block2.layer.1.bn2 block2.layer.1.conv2
        block3.layer.0.bn1 block3.layer.0.conv1 block3.layer.0.bn2 block3.layer.0.conv2 block3.layer.0.convShortcut
        block3.layer.1.bn1 block3.layer.1.conv1 block3.layer.1.bn2 block3.layer.1.conv2
        bn1 fc""",
    "wrn10_2": """
        conv1
        block1.layer.0.bn1 block1.layer.0.conv1 block1.layer.0.bn2 block1.layer.0.conv2 block1.layer.0.convShortcut
        block2.layer.0.bn1 block2.layer.0.conv1 block2.layer.0.bn2 block2.layer.0.conv2 block2.layer.0.convShortcut
        block3.layer.0.bn1 block3.layer.0.conv1 block3.layer.0.bn2 block3.layer.0.conv2 block3.layer.0.convShortcut
        bn1 fc""",
    "dm_wrn16_1": """
        init_conv
        layer.0.block.0.batchnorm_0 layer.0.block.0.conv_0 layer.0.block.0.batchnorm_1 layer.0.block.0.conv_1
        layer.0.block.1.batchnorm_0 layer.0.block.1.conv_0 layer.0.block.1.batchnorm_1 layer.0.block.1.conv_1
        layer.1.block.0.batchnorm_0 layer.1.block.0.conv_0 layer.1.block.0.batchnorm_1 layer.1.block.0.conv_1
        layer.1.block.0.shortcut
        layer.1.block.1.batchnorm_0 layer.1.block.1.conv_0 layer.1.block.1.batchnorm_1 layer.1.block.1.conv_1
        layer.2.block.0.batchnorm_0 layer.2.block.0.conv_0 layer.2.block.0.batchnorm_1 layer.2.block.0.conv_1
        layer.2.block.0.shortcut
        layer.2.block.1.batchnorm_0 layer.2.block.1.conv_0 layer.2.block.1.batchnorm_1 layer.2.block.1.conv_1
        batchnorm logits""",
    "resnet8_w4": """
        conv1 bn1
        layer1.0.conv1 layer1.0.bn1 layer1.0.conv2 layer1.0.bn2
        layer2.0.conv1 layer2.0.bn1 layer2.0.conv2 layer2.0.bn2 layer2.0.shortcut.0 layer2.0.shortcut.1
        layer3.0.conv1 layer3.0.bn1 layer3.0.conv2 layer3.0.bn2 layer3.0.shortcut.0 layer3.0.shortcut.1
        linear""",
    "resnet18_w4": """
        conv1 bn1
        layer1.0.conv1 layer1.0.bn1 layer1.0.conv2 layer1.0.bn2
        layer1.1.conv1 layer1.1.bn1 layer1.1.conv2 layer1.1.bn2
        layer2.0.conv1 layer2.0.bn1 layer2.0.conv2 layer2.0.bn2 layer2.0.shortcut.0 layer2.0.shortcut.1
        layer2.1.conv1 layer2.1.bn1 layer2.1.conv2 layer2.1.bn2
        layer3.0.conv1 layer3.0.bn1 layer3.0.conv2 layer3.0.bn2 layer3.0.shortcut.0 layer3.0.shortcut.1
        layer3.1.conv1 layer3.1.bn1 layer3.1.conv2 layer3.1.bn2
        layer4.0.conv1 layer4.0.bn1 layer4.0.conv2 layer4.0.bn2 layer4.0.shortcut.0 layer4.0.shortcut.1
        layer4.1.conv1 layer4.1.bn1 layer4.1.conv2 layer4.1.bn2
        linear""",
    "preact_resnet18_w4": """
        conv1
        layer1.0.bn1 layer1.0.conv1 layer1.0.bn2 layer1.0.conv2
        layer1.1.bn1 layer1.1.conv1 layer1.1.bn2 layer1.1.conv2
        layer2.0.bn1 layer2.0.conv1 layer2.0.bn2 layer2.0.conv2 layer2.0.shortcut.0
        layer2.1.bn1 layer2.1.conv1 layer2.1.bn2 layer2.1.conv2
        layer3.0.bn1 layer3.0.conv1 layer3.0.bn2 layer3.0.conv2 layer3.0.shortcut.0
        layer3.1.bn1 layer3.1.conv1 layer3.1.bn2 layer3.1.conv2
        layer4.0.bn1 layer4.0.conv1 layer4.0.bn2 layer4.0.conv2 layer4.0.shortcut.0
        layer4.1.bn1 layer4.1.conv1 layer4.1.bn2 layer4.1.conv2
        bn linear""",
    "dm_preact_resnet18_w4": """
        conv_2d
        layer_0.0.batchnorm_0 layer_0.0.conv_2d_1 layer_0.0.batchnorm_1 layer_0.0.conv_2d_2
        layer_0.1.batchnorm_0 layer_0.1.conv_2d_1 layer_0.1.batchnorm_1 layer_0.1.conv_2d_2
        layer_1.0.batchnorm_0 layer_1.0.conv_2d_1 layer_1.0.batchnorm_1 layer_1.0.conv_2d_2 layer_1.0.shortcut
        layer_1.1.batchnorm_0 layer_1.1.conv_2d_1 layer_1.1.batchnorm_1 layer_1.1.conv_2d_2
        layer_2.0.batchnorm_0 layer_2.0.conv_2d_1 layer_2.0.batchnorm_1 layer_2.0.conv_2d_2 layer_2.0.shortcut
        layer_2.1.batchnorm_0 layer_2.1.conv_2d_1 layer_2.1.batchnorm_1 layer_2.1.conv_2d_2
        layer_3.0.batchnorm_0 layer_3.0.conv_2d_1 layer_3.0.batchnorm_1 layer_3.0.conv_2d_2 layer_3.0.shortcut
        layer_3.1.batchnorm_0 layer_3.1.conv_2d_1 layer_3.1.batchnorm_1 layer_3.1.conv_2d_2
        batchnorm logits""",
    "mobilenet_v2": " ".join([
        "conv1 bn1",
        *(f"layers.{index}.{module}" for index in range(17) for module in [
            "conv1", "bn1", "conv2", "bn2", "conv3", "bn3", *["shortcut.0", "shortcut.1"] * (index in (0, 1, 10, 16))]),
        "conv2 bn2 linear"]),
}
MODULES["preact_resnet18_raw_w4"] = MODULES["preact_resnet18_w4"].replace("bn linear", "linear")


def typed_keys(name):
    """Returns the keys of MODULES' modules, without num_batches_tracked."""
    keys = []
    for module in MODULES[name].split():
        leaves = ["weight"]
        if re.search(r"(^|\.)(bn\d?|batchnorm(_\d)?|shortcut\.1)$", module):
            leaves = ["weight", "bias", "running_mean", "running_var"]
        elif module in ("fc", "linear", "logits"):
            leaves = ["weight", "bias"]
        keys += [f"{module}.{leaf}" for leaf in leaves]
    return keys


@pytest.mark.parametrize("name", MODULES)
def test_keys_are_those_of_the_public_class_in_its_order(name):
    assert [entry.key for entry in layouts.entries(name, 10)] == typed_keys(name)


@pytest.mark.parametrize("name, key, shape", [
    ("wrn34_10", "conv1.weight", (16, 3, 3, 3)),
    ("wrn34_10", "block2.layer.0.conv1.weight", (320, 160, 3, 3)),
    ("wrn34_10", "block2.layer.0.convShortcut.weight", (320, 160, 1, 1)),
    ("wrn34_10", "block2.layer.0.bn1.running_var", (160,)),
    ("wrn34_10", "fc.weight", (10, 640)),
    ("dm_wrn28_10", "layer.2.block.0.shortcut.weight", (640, 320, 1, 1)),
    ("dm_wrn28_10", "logits.bias", (10,)),
    ("dm_preact_resnet18", "layer_3.0.shortcut.weight", (512, 256, 3, 3)),
    ("preact_resnet18", "layer4.0.shortcut.0.weight", (512, 256, 1, 1)),
    ("resnet50", "layer1.0.shortcut.0.weight", (256, 64, 1, 1)),
    ("resnet50", "layer4.2.conv3.weight", (2048, 512, 1, 1)),
    ("mobilenet_v2", "layers.16.conv2.weight", (960, 1, 3, 3)),
    ("mobilenet_v2", "layers.10.shortcut.0.weight", (96, 64, 1, 1)),
    ("mobilenet_v2", "conv2.weight", (1280, 320, 1, 1)),
    ("mobilenet_v2", "linear.weight", (10, 1280)),
])
def test_shapes_are_those_of_the_public_class(name, key, shape):
    entry, = (entry for entry in layouts.entries(name, 10) if entry.key == key)
    assert entry.torch_shape == shape


def test_channels_of_the_images_are_those_of_the_stem():
    assert [layouts.entries("resnet6_w4", 10, channels)[0].torch_shape[1] for channels in (1, 3)] == [1, 3]


@functools.cache
def random_variables(name, classes=10):
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(models.create(name, classes=classes).init, jax.random.key(0))
    return jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("name", MODULES)
def test_variables_to_a_state_dict_and_back_are_the_same_bits(name):
    layout, variables = layouts.entries(name, 10), random_variables(name)
    state = layouts.to_torch(variables, layout)
    again = layouts.from_torch(state, layout)
    assert jax.tree.structure(again) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    assert all(leaf.dtype == np.float32 and leaf.flags.c_contiguous and leaf.flags.writeable for leaf in jax.tree.leaves(again))
    originals = [array.copy() for array in state.values()]
    for leaf in jax.tree.leaves(again):
        leaf += 1
    for array, original in zip(state.values(), originals):
        np.testing.assert_array_equal(array, original)


def test_a_state_dict_has_the_axes_of_torch_and_a_counter_after_each_variance():
    variables = random_variables("mobilenet_v2")
    params, batch_stats = variables["params"], variables["batch_stats"]
    state = layouts.to_torch(variables, layouts.entries("mobilenet_v2", 10), {"layers.3.bn1.num_batches_tracked": 7})
    assert all(array.flags.c_contiguous for array in state.values())
    kernel, depthwise = params["layer1_0"]["conv1"]["kernel"], params["layer3_1"]["conv2"]["kernel"]
    for out, inputs in np.ndindex(32, 32):
        np.testing.assert_array_equal(state["layers.0.conv1.weight"][out, inputs], kernel[:, :, inputs, out])
    assert depthwise.shape == (3, 3, 1, 192)
    for channel in range(192):
        np.testing.assert_array_equal(state["layers.4.conv2.weight"][channel, 0], depthwise[:, :, 0, channel])
    np.testing.assert_array_equal(state["linear.weight"], params["linear"]["kernel"].T)
    np.testing.assert_array_equal(state["linear.bias"], params["linear"]["bias"])
    for leaf, ours in (("weight", params["layer3_0"]["bn1"]["scale"]), ("bias", params["layer3_0"]["bn1"]["bias"]),
                       ("running_mean", batch_stats["layer3_0"]["bn1"]["mean"]),
                       ("running_var", batch_stats["layer3_0"]["bn1"]["var"])):
        np.testing.assert_array_equal(state[f"layers.3.bn1.{leaf}"], ours)

    keys = list(state)
    counters = {key: state[key] for key in keys if key.endswith("num_batches_tracked")}
    assert len(keys) == 344 and len(counters) == 57
    for key, counter in counters.items():
        assert keys[keys.index(key) - 1] == key.replace("num_batches_tracked", "running_var")
        assert counter.dtype == np.int64 and counter.shape == () and counter == (7 if key.startswith("layers.3.bn1.") else 0)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_a_state_dict_of_another_precision_gives_float32(dtype):
    layout, variables = layouts.entries("wrn10_2", 10), random_variables("wrn10_2")
    state = {key: array.astype(dtype) if array.ndim else array for key, array in layouts.to_torch(variables, layout).items()}
    found = layouts.from_torch(state, layout)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(found))
    jax.tree.map(lambda ours, theirs: np.testing.assert_array_equal(ours.astype(dtype), theirs.astype(dtype)), found, variables)


HAIKU_NAMES = {
    "init_conv.weight": ("init_conv", "w"),
    "layer.0.block.0.batchnorm_0.weight": ("resnet_lay_0_block_0/batchnorm_0", "scale"),
    "layer.0.block.0.batchnorm_0.bias": ("resnet_lay_0_block_0/batchnorm_0", "offset"),
    "layer.0.block.0.batchnorm_0.running_mean": ("resnet_lay_0_block_0/batchnorm_0/mean_ema", "average"),
    "layer.0.block.0.batchnorm_0.running_var": ("resnet_lay_0_block_0/batchnorm_0/var_ema", "average"),
    "layer.0.block.0.conv_0.weight": ("resnet_lay_0_block_0/conv_0", "w"),
    "layer.0.block.3.conv_1.weight": ("resnet_lay_0_block_3/conv_1", "w"),
    "layer.2.block.0.shortcut.weight": ("resnet_lay_2_block_0/shortcut", "w"),
    "batchnorm.weight": ("batchnorm", "scale"),
    "batchnorm.bias": ("batchnorm", "offset"),
    "batchnorm.running_mean": ("batchnorm/mean_ema", "average"),
    "batchnorm.running_var": ("batchnorm/var_ema", "average"),
    "logits.weight": ("logits", "w"),
    "logits.bias": ("logits", "b"),
}


def test_haiku_names_are_those_of_deepminds_files():
    names = {entry.key: layouts.haiku_name(entry) for entry in layouts.entries("dm_wrn28_10", 10)}
    assert {key: names[key] for key in HAIKU_NAMES} == HAIKU_NAMES
    assert len(set(names.values())) == len(names)
    # A block has ten arrays, four for each BatchNorm, and some a shortcut.
    assert [sum(module.startswith(f"resnet_lay_1_block_{index}/") for module, _ in names.values()) for index in range(5)] == [
        11, 10, 10, 10, 0]


def test_haiku_arrays_give_the_variables_whatever_shape_batch_norm_has_there():
    layout, variables = layouts.entries("dm_wrn10_2", 10), random_variables("dm_wrn10_2")
    arrays = {}
    for group in range(3):
        block, params = f"resnet_lay_{group}_block_0", variables["params"][f"layer{group}_0"]
        for layer in ("conv_0", "conv_1", "shortcut"):
            arrays[f"{block}/{layer}", "w"] = params[layer]["kernel"].astype(np.float64)
        for layer in ("batchnorm_0", "batchnorm_1"):
            put_batch_norm(arrays, f"{block}/{layer}", params[layer], variables["batch_stats"][f"layer{group}_0"][layer])
    put_batch_norm(arrays, "batchnorm", variables["params"]["batchnorm"], variables["batch_stats"]["batchnorm"])
    arrays["init_conv", "w"] = variables["params"]["init_conv"]["kernel"]
    arrays["logits", "w"], arrays["logits", "b"] = (variables["params"]["logits"][leaf] for leaf in ("kernel", "bias"))
    found = layouts.from_haiku(arrays, layout)
    assert jax.tree.structure(found) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(found))
    found["params"]["init_conv"]["kernel"] += 1
    np.testing.assert_array_equal(arrays["init_conv", "w"], variables["params"]["init_conv"]["kernel"])


def put_batch_norm(arrays, module, params, statistics):
    expanded = {key: array.reshape(1, 1, 1, -1) for key, array in (params | statistics).items()}
    arrays[module, "scale"], arrays[module, "offset"] = expanded["scale"], expanded["bias"]
    arrays[f"{module}/mean_ema", "average"] = expanded["mean"]
    arrays[f"{module}/var_ema", "average"] = expanded["var"]


def shapes(name, classes=10, channels=3):
    """Returns {key: shape} of a state dict, counters and all."""
    found = {entry.key: entry.torch_shape for entry in layouts.entries(name, classes, channels)}
    counters = [key.replace("running_var", "num_batches_tracked") for key in found if key.endswith("running_var")]
    return found | dict.fromkeys(counters, ())


@pytest.mark.parametrize("name, classes, channels", [
    *((name, 10, 3) for name in (
        "resnet18", "resnet34", "resnet50", "preact_resnet18", "preact_resnet18_raw", "dm_preact_resnet18", "mobilenet_v2",
        "wrn28_10", "wrn34_10", "wrn34_20", "wrn70_16", "wrn16_1", "wrn10_2", "dm_wrn28_10", "dm_wrn34_20", "dm_wrn70_16",
        "dm_wrn10_1", "resnet18_w4", "resnet34_w16", "resnet50_w8", "preact_resnet18_w16", "preact_resnet18_raw_w4",
        "dm_preact_resnet18_w8", "resnet6_w64", "resnet8_w4", "resnet10_w8", "resnet6_w8")),
    *((name, classes, 3) for classes in (2, 100, 200) for name in (
        "resnet18", "preact_resnet18_raw", "dm_preact_resnet18", "mobilenet_v2", "wrn34_10", "dm_wrn28_10")),
    *((name, 10, 1) for name in (
        "resnet8_w4", "preact_resnet18", "dm_preact_resnet18", "mobilenet_v2", "wrn16_1", "dm_wrn16_1")),
])
def test_a_state_dict_tells_its_architecture_and_classes(name, classes, channels):
    assert layouts.identify(shapes(name, classes, channels)) == (name, classes)
    without_counters = {entry.key: entry.torch_shape for entry in layouts.entries(name, classes, channels)}
    assert layouts.identify(without_counters) == (name, classes)


def test_a_width_of_64_has_the_name_without_it():
    for name in ("resnet18", "resnet34", "resnet50", "preact_resnet18", "preact_resnet18_raw", "dm_preact_resnet18"):
        assert layouts.identify(shapes(f"{name}_w64")) == (name, 10)


def test_entries_that_no_forward_pass_reads_do_not_hide_an_architecture():
    dead = {f"sub_block1.{key.removeprefix('block1.')}": shape for key, shape in shapes("wrn16_1").items()
            if key.startswith("block1.")}
    assert layouts.identify(shapes("wrn16_1") | dead | {"mean": (3, 1, 1), "std": (3, 1, 1)}) == ("wrn16_1", 10)


TORCHVISION_RESNET18 = {
    **{key.replace("shortcut", "downsample").replace("linear", "fc"): shape for key, shape in shapes("resnet18", 1000).items()},
    "conv1.weight": (64, 3, 7, 7),
}


@pytest.mark.parametrize("stranger", [
    {},
    {"weight": (10, 5)},
    {"conv1.weight": (16, 3, 3, 3)},
    {"conv1.weight": (16, 3, 3, 3), "block1.layer.0.conv1.weight": (16, 16, 3, 3), "fc.weight": (10, 64)},
    {"init_conv.weight": (16, 3, 3, 3), "logits.weight": (10, 64)},
    {"init_conv.weight": (), "logits.weight": (10, 64)},
    {"conv_2d.weight": (), "logits.weight": (10, 64)},
    {"layer1.0.conv1.weight": (), "bn1.weight": (), "conv1.weight": (), "linear.weight": (10, 64)},
    {"layer1.0.conv1.weight": (4, 4, 3, 3), "linear.weight": (10, 64)},
    {"layers.0.conv1.weight": (32, 32, 1, 1), "linear.weight": (10, 1280)},
    TORCHVISION_RESNET18,
    {f"module.{key}": shape for key, shape in shapes("resnet8_w4").items()},
    shapes("resnet8_w4") | {"linear.weight": (1, 16), "linear.bias": (1,)},
], ids=range(13))
def test_a_stranger_is_none(stranger):
    assert layouts.identify(stranger) is None


@pytest.mark.parametrize("name", MODULES)
def test_a_missing_key_or_another_shape_makes_a_stranger(name):
    complete = shapes(name)
    for entry in layouts.entries(name, 10):
        assert layouts.identify({key: shape for key, shape in complete.items() if key != entry.key}) is None, entry.key
        other = (*entry.torch_shape[:-1], entry.torch_shape[-1] + 1)
        assert layouts.identify(complete | {entry.key: other}) is None, entry.key


@pytest.mark.parametrize("name, block", [
    ("preact_resnet18_w4", "layer2.2"), ("preact_resnet18_raw_w4", "layer4.2"), ("dm_preact_resnet18_w4", "layer_3.2"),
    ("wrn10_2", "block2.layer.1"), ("dm_wrn10_2", "layer.2.block.1"), ("mobilenet_v2", "layers.17"),
    ("resnet18_w4", "layer3.2")])
def test_another_block_makes_a_stranger_and_another_head_does_not(name, block):
    complete = shapes(name)
    assert layouts.identify(complete | {f"{block}.conv1.weight": (4, 4, 3, 3)}) is None
    others = {"fc_rotation.weight": (4, 64), "sub_block1.layer.0.conv1.weight": (4, 4, 3, 3), "mu": (1, 3, 1, 1),
              "bn1.num_batches_tracked": ()}
    assert layouts.identify(complete | others) == (name, 10)
