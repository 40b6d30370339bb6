"""From a file to a model: what is asked for, what is inside, and one line where they differ."""

import functools

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxrd import models
from jaxrd.errors import InputError
from jaxrd.models import weights
from jaxrd.models.weights import layouts, safetensors_file, torch_file
from tests.support import assert_input_error

CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
CIFAR100 = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


@functools.cache
def state(name, classes=10, channels=3):
    draw = np.random.default_rng(0)
    return {
        entry.key: draw.uniform(0.5, 1.5, entry.torch_shape).astype(np.float32)
        for entry in layouts.entries(name, classes, channels)}


def torch(path, contents):
    torch_file.write(str(path), contents)
    return path


@pytest.fixture
def small(tmp_path):
    return torch(tmp_path / "x.pt", state("wrn10_1"))


def haiku_trees(name="dm_wrn10_2", classes=10, root="wide_res_net/~/"):
    """Parameters and state as Haiku names them (reference: the class structure of DeepMind's model_zoo)."""
    draw = np.random.default_rng(0)
    params, moving = {}, {}

    def batch_norm(module, channels):
        shape = (1, 1, 1, channels)
        params[module] = {kind: draw.uniform(0.5, 1.5, shape).astype(np.float32) for kind in ("scale", "offset")}
        for kind in ("mean_ema", "var_ema"):
            average, hidden = (draw.uniform(0.5, 1.5, shape).astype(np.float32) for _ in range(2))
            moving[f"{module}/~/{kind}"] = {"counter": np.asarray(3, np.int32), "hidden": hidden, "average": average}

    def convolution(module, *shape):
        params[module] = {"w": draw.normal(size=shape).astype(np.float32)}

    convolution(f"{root}init_conv", 3, 3, 3, 16)
    before = 16
    for group, channels in enumerate((32, 64, 128)):
        block = f"{root}resnet_lay_{group}_block_0/~/"
        batch_norm(f"{block}batchnorm_0", before)
        convolution(f"{block}conv_0", 3, 3, before, channels)
        batch_norm(f"{block}batchnorm_1", channels)
        convolution(f"{block}conv_1", 3, 3, channels, channels)
        convolution(f"{block}shortcut", 1, 1, before, channels)
        before = channels
    batch_norm(f"{root}batchnorm", 128)
    params[f"{root}logits"] = {"w": draw.normal(size=(128, classes)).astype(np.float32), "b": np.ones(classes, np.float32)}
    return params, moving


def haiku(path, trees):
    content = np.empty(2, object)
    content[:] = trees
    np.save(path, content, allow_pickle=True)
    return path


def test_a_file_becomes_a_model_that_takes_images(small):
    found = weights.read(small, "wrn10_1")
    logits = models.logits_fn(found.model, found.variables)(np.full((2, 32, 32, 3), 0.5, np.float32))
    assert logits.shape == (2, 10) and np.isfinite(logits).all()
    assert jax.tree.map(np.shape, found.variables) == jax.tree.map(
        np.shape, jax.eval_shape(found.model.init, jax.random.key(0)))
    kernel = state("wrn10_1")["block2.layer.0.conv1.weight"]
    np.testing.assert_array_equal(found.variables["params"]["block2_0"]["conv1"]["kernel"], kernel.transpose(2, 3, 1, 0))
    assert found.model.specification["mean"] is None and found.normalization.startswith("none")


@pytest.mark.parametrize("name", ["robustbench", "official", "torch", ""])
def test_the_format_may_be_named_or_found(small, name):
    assert weights.read(small, "wrn10_1", format=name).kind == "torch"


def test_another_format_than_that_of_the_file_is_one_line(small):
    assert_input_error(lambda: weights.read(small, "wrn10_1", format="haiku"), "x.pt is a PyTorch file", "--format=robustbench")
    assert_input_error(lambda: weights.read(small, "wrn10_1", format="onnx"), '"onnx"', "safetensors")


def test_classes_and_channels_are_those_of_the_file(tmp_path):
    found = weights.read(torch(tmp_path / "x.pt", state("resnet6_w8", 7, 1)), "resnet6_w8", image_shape=(8, 8, 1))
    assert found.model.classes == 7 and found.model.image_shape == (8, 8, 1)
    assert weights.read(tmp_path / "x.pt", "resnet6_w8").model.image_shape == (32, 32, 1)
    assert_input_error(lambda: weights.read(tmp_path / "x.pt", "resnet6_w8", image_shape=(8, 8, 3)), "1 channels, not 3",
                       "--image_shape=H,W,1")
    assert_input_error(lambda: weights.read(tmp_path / "x.pt", "resnet6_w8", classes=10),
                       "linear.bias is of 7 classes, not of 10")


@pytest.mark.parametrize("name, other", [
    ("wrn10_1", "wrn16_1"), ("wrn10_2", "wrn10_1"), ("wrn10_1", "dm_wrn10_1"), ("dm_wrn10_1", "wrn10_1"),
    ("resnet18_w4", "resnet34_w4"), ("resnet34_w4", "resnet18_w4"), ("preact_resnet18_w4", "preact_resnet18_raw_w4"),
    ("preact_resnet18_raw_w4", "preact_resnet18_w4"), ("dm_preact_resnet18_w4", "preact_resnet18_w4"),
    ("mobilenet_v2", "resnet18")])
def test_a_wrong_architecture_is_answered_with_the_right_one(tmp_path, name, other):
    path = torch(tmp_path / "x.pt", state(name))
    assert_input_error(lambda: weights.read(path, other, normalization="none"), "x.pt",
                       f"the weights of {name} with 10 classes", f"not of {other}", f"--model={name}")
    assert weights.read(path, name, normalization="none").model.name == name


def test_a_stranger_is_told_what_is_missing(tmp_path):
    path = torch(tmp_path / "x.pt", {"features.0.weight": np.zeros((4, 3, 3, 3), np.float32)})
    assert_input_error(lambda: weights.read(path, "wrn10_1"), "x.pt does not hold", "arrays are missing", "conv1.weight",
                       "it has features.0.weight", "--model")


def test_one_missing_key_one_wrong_shape_and_one_too_many_are_named(tmp_path):
    good = state("wrn10_1")
    lacking = {key: value for key, value in good.items() if key != "block3.layer.0.bn2.running_var"}
    assert_input_error(lambda: weights.read(torch(tmp_path / "a.pt", lacking), "wrn10_1"), "a.pt", "1 of ",
                       "block3.layer.0.bn2.running_var")
    wrong = good | {"bn1.running_mean": np.ones(65, np.float32)}
    assert_input_error(lambda: weights.read(torch(tmp_path / "b.pt", wrong), "wrn10_1"), "b.pt",
                       "bn1.running_mean has shape [65]", "[64]")
    more = good | {"fc_rotation.weight": np.ones((4, 64), np.float32)}
    assert_input_error(lambda: weights.read(torch(tmp_path / "c.pt", more), "wrn10_1"), "c.pt", "fc_rotation.weight",
                       "--allow_unused")
    assert weights.read(tmp_path / "c.pt", "wrn10_1", allow_unused=True).accounts.unused == ("fc_rotation.weight",)
    whole = good | {"bn1.running_mean": np.ones(64, np.int64)}
    assert_input_error(lambda: weights.read(torch(tmp_path / "d.pt", whole), "wrn10_1"), "bn1.running_mean is int64")
    diverged = good | {"fc.bias": np.full(10, np.nan, np.float32)}
    assert_input_error(lambda: weights.read(torch(tmp_path / "e.pt", diverged), "wrn10_1"), "e.pt", "fc.bias", "not finite")
    scalar = good | {"fc.bias": np.ones((), np.float32)}
    assert_input_error(lambda: weights.read(torch(tmp_path / "f.pt", scalar), "wrn10_1"), "f.pt", "fc.bias has shape []")


def test_the_architecture_is_needed_and_must_be_known(small):
    assert_input_error(lambda: weights.read(small), "x.pt", "architecture is missing", "--model")
    assert_input_error(lambda: weights.read(small, "wrn-10-1"), '"wrn-10-1"', "did you mean")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_become_float32_and_are_told(tmp_path, dtype):
    other = {key: value.astype(dtype) for key, value in state("wrn10_1").items()}
    found = weights.read(torch(tmp_path / "x.pt", other), "wrn10_1")
    assert found.dtypes == (np.dtype(dtype).name,)
    kernel = found.variables["params"]["fc"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, other["fc.weight"].T.astype(np.float32))


@pytest.mark.parametrize("classes, statistics", [
    (10, CIFAR10), (100, CIFAR100), (200, ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)))])
@pytest.mark.parametrize("name", ["dm_wrn10_1", "dm_preact_resnet18_w4"])
def test_the_deepmind_family_normalises_as_its_public_class(tmp_path, name, classes, statistics):
    found = weights.read(torch(tmp_path / "x.pt", state(name, classes)), name)
    assert (found.model.specification["mean"], found.model.specification["std"]) == statistics
    assert "public class" in found.normalization


def test_a_normalisation_that_nobody_knows_must_be_given(tmp_path):
    path = torch(tmp_path / "x.pt", state("dm_wrn10_1", 7))
    assert_input_error(lambda: weights.read(path, "dm_wrn10_1"), "7 classes", "--normalization=none")
    assert weights.read(path, "dm_wrn10_1", normalization="none").model.specification["mean"] is None
    given = weights.read(path, "dm_wrn10_1", normalization=((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))).model.specification
    assert given["mean"] == (0.1, 0.2, 0.3) and given["std"] == (0.4, 0.5, 0.6)
    assert_input_error(lambda: weights.read(path, "dm_wrn10_1", normalization="imagenet"), '"imagenet"', "cifar10")
    assert_input_error(lambda: weights.read(path, "dm_wrn10_1", normalization=((0.1,), (0.4,))), "one value per channel")


def test_a_layer_without_weights_in_front_is_no_reason_to_go_without_normalisation(tmp_path):
    path = torch(tmp_path / "x.pt", {f"module.1.{key}": value for key, value in state("wrn10_1").items()})
    assert_input_error(lambda: weights.read(path, "wrn10_1"), 'keys begin with "module.1."', "--normalization=none")
    assert weights.read(path, "wrn10_1", normalization="cifar10").model.specification["mean"] == CIFAR10[0]
    first = torch(tmp_path / "y.pt", {f"module.0.{key}": value for key, value in state("wrn10_1").items()})
    assert weights.read(first, "wrn10_1").model.specification["mean"] is None


def test_two_normalisations_are_not_taken_for_one(tmp_path):
    buffers = {"0.mean": np.float32([0.1, 0.2, 0.3]), "0.std": np.float32([0.4, 0.5, 0.6])}
    path = torch(tmp_path / "x.pt", {f"1.{key}": value for key, value in state("dm_wrn10_1").items()} | buffers)
    assert_input_error(lambda: weights.read(path, "dm_wrn10_1"), "in front of the network", "m + s M")
    plain = torch(tmp_path / "y.pt", {f"1.{key}": value for key, value in state("wrn10_1").items()} | buffers)
    np.testing.assert_allclose(weights.read(plain, "wrn10_1").model.specification["mean"], (0.1, 0.2, 0.3), rtol=1e-6)


@pytest.mark.parametrize("data, expected", [
    ("", CIFAR10[0]), ("cifar10", CIFAR10[0]), ("cifar10_1", CIFAR10[0]), ("svhn_cropped", (0.5, 0.5, 0.5)),
    ("cifar100", CIFAR100[0])])
def test_the_data_set_decides_over_the_number_of_classes(tmp_path, data, expected):
    found = weights.read(torch(tmp_path / "x.pt", state("dm_wrn10_1")), "dm_wrn10_1", data=data)
    assert found.model.specification["mean"] == expected and ("assumed" in found.normalization) == (not data)
    assert_input_error(lambda: weights.read(tmp_path / "x.pt", "dm_wrn10_1", data="mnist"), "mnist", "--normalization")


def test_one_mean_for_all_channels_is_one_for_each(tmp_path):
    buffers = {"mean": np.float32(0.5), "std": np.reshape(np.float32(0.25), (1, 1, 1))}
    found = weights.read(torch(tmp_path / "x.pt", state("wrn10_1") | buffers), "wrn10_1").model.specification
    assert found["mean"] == (0.5, 0.5, 0.5) and found["std"] == (0.25, 0.25, 0.25)


def test_a_negative_variance_is_refused(tmp_path):
    damaged = state("wrn10_1") | {"bn1.running_var": np.full(64, -0.5, np.float32)}
    assert_input_error(lambda: weights.read(torch(tmp_path / "x.pt", damaged), "wrn10_1"), "bn1.var", "-0.5")


def test_a_normalisation_in_the_file_is_taken(tmp_path):
    buffers = {"mu": np.reshape(np.float32([0.1, 0.2, 0.3]), (1, 3, 1, 1)),
               "sigma": np.reshape(np.float32([0.4, 0.5, 0.6]), (1, 3, 1, 1))}
    path = torch(tmp_path / "x.pt", state("wrn10_1") | buffers)
    found = weights.read(path, "wrn10_1")
    np.testing.assert_allclose(found.model.specification["mean"], (0.1, 0.2, 0.3), rtol=1e-6)
    np.testing.assert_allclose(found.model.specification["std"], (0.4, 0.5, 0.6), rtol=1e-6)
    assert "in the file" in found.normalization
    assert weights.read(path, "wrn10_1", normalization="none").model.specification["mean"] is None


@functools.cache
def full_size(name, classes):
    """The published sizes, all ones: kept for the module because the larger ones take a second."""
    return {entry.key: np.ones(entry.torch_shape, np.float32) for entry in layouts.entries(name, classes)}


def test_a_published_name_brings_architecture_normalisation_and_classes(tmp_path):
    path = torch(tmp_path / "x.pt", full_size("preact_resnet18_raw", 10))
    found = weights.read(path, "Wong2020Fast")
    assert found.name == "cifar10/Linf/Wong2020Fast" and found.model.name == "preact_resnet18_raw"
    assert (found.model.specification["mean"], found.model.specification["std"]) == CIFAR10
    assert found.published.clean == 83.34
    plain = weights.read(path, "Andriushchenko2020Understanding")
    assert plain.model.specification["mean"] is None
    assert_input_error(lambda: weights.read(path, "Wong2020Fast", image_shape=(64, 64, 3)), "32x32x3, not 64x64x3",
                       "--model=preact_resnet18_raw")
    assert_input_error(lambda: weights.read(path, "Rice2020Overfitting"), "cifar10/Linf/Rice2020Overfitting")
    assert_input_error(lambda: weights.read(path, "cifar100/Linf/Rice2020Overfitting"),
                       "holds the weights of preact_resnet18_raw with 10 classes, not of preact_resnet18")
    other = torch(tmp_path / "y.pt", full_size("preact_resnet18", 10))
    assert_input_error(lambda: weights.read(other, "cifar100/Linf/Rice2020Overfitting"),
                       "linear.bias is of 10 classes, not of 100")
    buffers = {"mu": np.float32([0.5, 0.5, 0.5]), "sigma": np.float32([0.5, 0.5, 0.5])}
    third = torch(tmp_path / "z.pt", full_size("preact_resnet18_raw", 10) | buffers)
    assert_input_error(lambda: weights.read(third, "Wong2020Fast"), "(0.5, 0.5, 0.5)", "0.4914", "--normalization")
    assert weights.read(third, "Wong2020Fast", normalization="cifar10").model.specification["mean"] == CIFAR10[0]


def test_safetensors_of_ours_need_no_name_and_those_of_others_do(tmp_path):
    model = models.create("wrn10_1", classes=10, image_shape=(16, 16, 3), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    weights.write_safetensors(tmp_path / "ours.safetensors", state("wrn10_1"), model)
    found = weights.read(tmp_path / "ours.safetensors")
    assert found.model == model and found.kind == "safetensors" and found.normalization == "that in the file's metadata"
    assert weights.read(tmp_path / "ours.safetensors", "wrn10_1").model == model, "what the file says holds for the name too"
    given = weights.read(tmp_path / "ours.safetensors", "wrn10_1", normalization="none", image_shape=(8, 8, 3)).model
    assert given.image_shape == (8, 8, 3) and given.specification["mean"] is None, "what is asked for goes before it"
    plain = models.create("dm_wrn10_1", classes=10)
    weights.write_safetensors(tmp_path / "plain.safetensors", state("dm_wrn10_1"), plain)
    assert weights.read(tmp_path / "plain.safetensors", "dm_wrn10_1").model == plain, "nor is a family's habit"
    safetensors_file.write(str(tmp_path / "theirs.safetensors"), state("wrn10_1"), {"format": "pt"})
    assert_input_error(lambda: weights.read(tmp_path / "theirs.safetensors"), "theirs.safetensors", "--model")
    assert weights.read(tmp_path / "theirs.safetensors", "wrn10_1").model.name == "wrn10_1"


@pytest.mark.parametrize("metadata", [
    "{", "[" * 100_000, "[]", '{"name": "wrn10_1"}',
    '{"name": "wrn10_1", "classes": "10", "image_shape": [8, 8, 3], "mean": null, "std": null}',
    '{"name": "wrn10_1", "classes": 10, "image_shape": 5, "mean": null, "std": null}',
    '{"name": "wrn10_1", "classes": 10, "image_shape": [8, 8, 3], "mean": 5, "std": 5}',
    '{"name": "wrn6000004_1", "classes": 10, "image_shape": [8, 8, 3], "mean": null, "std": null}'])
def test_damaged_metadata_are_one_line_or_passed_over_where_the_model_is_named(tmp_path, metadata):
    safetensors_file.write(str(tmp_path / "x.safetensors"), state("wrn10_1"), {"jaxrd_model": metadata})
    assert_input_error(lambda: weights.read(tmp_path / "x.safetensors"), "metadata jaxrd_model is damaged", "--model")
    assert weights.read(tmp_path / "x.safetensors", "wrn10_1").model.classes == 10


def test_tiny_imagenets_classes_mean_its_image_size(tmp_path):
    path = torch(tmp_path / "x.pt", state("preact_resnet18_w4", 200))
    assert weights.read(path, "preact_resnet18_w4").model.image_shape == (64, 64, 3)
    assert weights.read(path, "preact_resnet18_w4", image_shape=(32, 32, 3)).model.image_shape == (32, 32, 3)


def test_what_a_file_says_cannot_break_the_line(tmp_path):
    keys = {"a\nerror: all is well\x1b[31m" + "k" * 3000: np.ones((2, 2), np.float32)}
    path = torch(tmp_path / "x.pt", state("wrn10_1") | keys)
    with pytest.raises(InputError) as error:
        weights.read(path, "wrn10_1")
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("root", ["wide_res_net/~/", "wide_res_net/"])
def test_a_haiku_file_gives_averaged_statistics(tmp_path, root):
    params, moving = haiku_trees(root=root)
    found = weights.read(haiku(tmp_path / "x.npy", (params, moving)), "dm_wrn10_2", format="deepmind")
    assert found.kind == "haiku" and (found.model.specification["mean"], found.model.specification["std"]) == CIFAR10
    ours, block = found.variables, f"{root}resnet_lay_2_block_0/~/"
    np.testing.assert_array_equal(ours["params"]["layer2_0"]["conv_0"]["kernel"], params[f"{block}conv_0"]["w"])
    offset = params[f"{block}batchnorm_1"]["offset"]
    np.testing.assert_array_equal(ours["params"]["layer2_0"]["batchnorm_1"]["bias"], offset[0, 0, 0])
    average = moving[f"{block}batchnorm_1/~/var_ema"]["average"]
    np.testing.assert_array_equal(ours["batch_stats"]["layer2_0"]["batchnorm_1"]["var"], average[0, 0, 0])
    np.testing.assert_array_equal(ours["params"]["logits"]["kernel"], params[f"{root}logits"]["w"])
    assert found.accounts.unused == ()


def test_a_haiku_file_of_another_network_is_one_line(tmp_path):
    params, moving = haiku_trees()
    path = haiku(tmp_path / "x.npy", (params, moving))
    assert_input_error(lambda: weights.read(path, "dm_wrn16_2"), "x.npy", "arrays are missing",
                       "resnet_lay_0_block_1/batchnorm_0:scale")
    assert_input_error(lambda: weights.read(path, "wrn10_2"), "x.npy", "holds a dm_wrn", "not a wrn10_2")
    assert_input_error(lambda: weights.read(path, "dm_wrn10_1"), "has shape")
    assert_input_error(lambda: weights.read(path, "dm_wrn10_2", classes=100), "logits:b is of 10 classes, not of 100")
    wide = haiku_trees(classes=100)
    found = weights.read(haiku(tmp_path / "y.npy", wide), "dm_wrn10_2")
    assert found.model.classes == 100 and found.model.specification["mean"] == CIFAR100[0]
