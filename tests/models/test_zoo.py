"""Every model keeps the same promises behind `init` and `apply`, whatever its architecture."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrd import models
from jaxrd.errors import InputError
from jaxrd.models import published

SMALL = ["resnet6_w8", "wrn10_1", "dm_wrn10_1"]
SHAPE = (8, 8, 1)


@functools.cache
def small(name):
    """A small model, variables with statistics that are not the initial ones, and its compiled apply."""
    model = models.create(name, classes=5, image_shape=SHAPE)
    apply = jax.jit(model.apply, static_argnums=2)
    variables = model.init(jax.random.key(0))
    _, batch_stats = apply(variables, images(16, seed=1), True)
    return model, {"params": variables["params"], "batch_stats": batch_stats}, apply


def images(batch, seed=0, shape=SHAPE):
    return jax.random.uniform(jax.random.key(seed), (batch, *shape))


@pytest.mark.parametrize("name, classes, image_shape, count", [
    ("resnet18", 10, (32, 32, 3), 11_173_962),
    ("resnet18", 100, (32, 32, 3), 11_220_132),
    ("resnet18", 200, (64, 64, 3), 11_271_432),
    ("resnet34", 10, (32, 32, 3), 21_282_122),
    ("resnet50", 10, (32, 32, 3), 23_520_842),
    ("preact_resnet18", 200, (64, 64, 3), 11_269_640),
    ("preact_resnet18_raw", 200, (64, 64, 3), 11_269_640 - 2 * 512),  # no last BatchNorm
    ("dm_preact_resnet18", 10, (32, 32, 3), 12_548_426),
    ("mobilenet_v2", 10, (32, 32, 3), 2_296_922),
    ("mobilenet_v2", 100, (32, 32, 3), 2_412_212),
    ("wrn28_10", 10, (32, 32, 3), 36_479_194),
    ("wrn34_10", 10, (32, 32, 3), 46_160_474),
    ("wrn34_10", 100, (32, 32, 3), 46_218_164),
    ("wrn34_20", 10, (32, 32, 3), 184_531_674),
    ("dm_wrn28_10", 10, (32, 32, 3), 36_479_194),
    ("dm_wrn28_10", 100, (32, 32, 3), 36_536_884),
    ("dm_wrn70_16", 10, (32, 32, 3), 266_796_506),
    ("resnet6_w32", 10, (8, 8, 1), 77_290),
])
def test_parameter_counts_are_the_published_ones(name, classes, image_shape, count):
    model = models.create(name, classes=classes, image_shape=image_shape)
    assert models.parameter_count(jax.eval_shape(model.init, jax.random.key(0))) == count


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18", "preact_resnet18_raw", "dm_preact_resnet18"])
def test_a_width_of_64_is_the_full_size(name):
    full, wide, narrow = (models.create(name, classes=10) for name in (name, f"{name}_w64", f"{name}_w8"))
    shapes = [jax.eval_shape(model.init, jax.random.key(0)) for model in (full, wide, narrow)]
    assert shapes[0] == shapes[1] != shapes[2]
    # A narrow one is the same network with an eighth of the channels, except in images and logits.
    assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[2])
    for large, small in zip(*map(jax.tree.leaves, (shapes[0], shapes[2]))):
        assert all(size in (other, 8 * other) for size, other in zip(large.shape, small.shape, strict=True))


@pytest.mark.parametrize("name", [
    "resnet18", "resnet34", "resnet50", "resnet8_w8", "preact_resnet18", "preact_resnet18_raw", "dm_preact_resnet18",
    "mobilenet_v2", "wrn34_10", "dm_wrn28_10"])
@pytest.mark.parametrize("image_shape", [(32, 32, 3), (64, 64, 3), (8, 8, 1), (28, 20, 1)])
def test_every_image_size_gives_one_row_of_logits_per_image(name, image_shape):
    model = models.create(name, classes=7, image_shape=image_shape)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    batch = jax.ShapeDtypeStruct((3, *image_shape), jnp.float32)
    for train in (False, True):
        logits, batch_stats = jax.eval_shape(functools.partial(model.apply, train=train), variables, batch)
        assert logits.shape == (3, 7) and logits.dtype == jnp.float32
        assert batch_stats == variables["batch_stats"]


@pytest.mark.parametrize("name", SMALL)
def test_eval_mode_sees_each_image_alone_and_leaves_the_statistics(name):
    model, variables, apply = small(name)
    batch = images(6)
    logits, batch_stats = apply(variables, batch, False)
    chex.assert_trees_all_equal(batch_stats, variables["batch_stats"])
    assert np.ptp(logits, axis=0).min() > 0
    others = batch.at[1:].set(1 - batch[1:])
    np.testing.assert_allclose(apply(variables, others, False)[0][0], logits[0], atol=1e-5)
    np.testing.assert_allclose(jax.jit(models.logits_fn(model, variables))(batch), logits, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_train_mode_normalises_by_the_batch_and_moves_every_statistic(name):
    _, variables, apply = small(name)
    batch = images(6)
    logits, batch_stats = apply(variables, batch, True)
    unchanged = jax.tree.map(lambda old, new: bool(jnp.all(old == new)), variables["batch_stats"], batch_stats)
    assert not any(jax.tree.leaves(unchanged))
    other_logits, _ = apply(variables, batch.at[1:].set(0.5 * batch[1:]), True)
    assert jnp.abs(other_logits[0] - logits[0]).max() > 1e-3
    # The running statistics are not read in train mode.
    doubled = {**variables, "batch_stats": jax.tree.map(lambda x: 2 * x + 1, variables["batch_stats"])}
    chex.assert_trees_all_equal(apply(doubled, batch, True)[0], logits)


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_computes_like_float32_and_keeps_float32_state(name):
    _, variables, apply = small(name)
    model = models.create(name, classes=5, image_shape=SHAPE, dtype="bfloat16")
    assert jax.eval_shape(model.init, jax.random.key(0)) == jax.eval_shape(lambda: variables)
    apply_bfloat16 = jax.jit(model.apply, static_argnums=2)
    for train in (False, True):
        exact, _ = apply(variables, images(6), train)
        logits, batch_stats = apply_bfloat16(variables, images(6), train)
        assert logits.dtype == jnp.float32
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(batch_stats))
        np.testing.assert_allclose(logits, exact, atol=0.1 * float(jnp.abs(exact).max()))
        assert jnp.any(logits != exact)


def test_normalisation_inside_equals_normalisation_outside():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    plain = models.create("resnet6_w8", classes=5, image_shape=(8, 8, 3))
    normalising = models.create("resnet6_w8", classes=5, image_shape=(8, 8, 3), mean=mean, std=std)
    variables = plain.init(jax.random.key(0))
    batch = images(4, shape=(8, 8, 3))
    outside = (batch - np.array(mean, np.float32)) / np.array(std, np.float32)
    for train in (False, True):
        expected, _ = jax.jit(plain.apply, static_argnums=2)(variables, outside, train)
        logits, _ = jax.jit(normalising.apply, static_argnums=2)(variables, batch, train)
        np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("options", [{}, dict(dtype="bfloat16", mean=[0.5], std=[0.25])])
def test_a_specification_survives_json_and_gives_the_same_model(options):
    model = models.create("resnet6_w8", classes=5, image_shape=[8, 8, 1], **options)
    again = models.create(**json.loads(json.dumps(model.specification)))
    assert again == model and hash(again) == hash(model)
    assert model != models.create("resnet6_w8", classes=6, image_shape=SHAPE, **options)


@pytest.mark.parametrize("name", SMALL)
def test_init_is_a_pure_function_of_the_key(name):
    model = small(name)[0]
    first = model.init(jax.random.key(7))
    chex.assert_trees_all_equal(first, jax.jit(model.init)(jax.random.key(7)))
    other = model.init(jax.random.key(8))
    stem = "init_conv" if name.startswith("dm_") else "conv1"
    assert jnp.any(first["params"][stem]["kernel"] != other["params"][stem]["kernel"])
    last = "conv_1" if name.startswith("dm_") else "conv2"
    blocks = [layer[last]["kernel"] for layer in first["params"].values() if last in layer]
    assert len({float(kernel.ravel()[0]) for kernel in blocks}) == len(blocks) > 1, "two layers share random numbers"


@pytest.mark.parametrize("name", SMALL)
def test_gradients_reach_every_parameter_and_the_image(name):
    _, variables, apply = small(name)

    def loss(params, batch):
        return jnp.sum(apply({**variables, "params": params}, batch, False)[0] ** 2)

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(variables["params"], images(4))
    assert all(jnp.any(leaf != 0) and jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("name, way_out", [
    ("resnt18", 'did you mean "resnet18"'),
    ("ResNet-18", 'did you mean "resnet18"'),
    ("resnet6", 'did you mean "resnet6_w8"'),
    ("resnet18_w0", "Names: resnet18"),
    ("PreActResNet18", 'did you mean "preact_resnet18"'),
    ("preact_resnet34", 'did you mean "preact_resnet18"'),
    ("preact_resnet18_w0", "Names: resnet18"),
    ("mobilenetv2", 'did you mean "mobilenet_v2"'),
    ("MobileNet-V2", 'did you mean "mobilenet_v2"'),
    ("wrn-34-10", 'did you mean "wrn34_10"'),
    ("wrn35_10", 'did you mean "wrn34_10"'),
    ("wrn4_2", 'did you mean "wrn10_2"'),
    ("preact_resnet18_rw", 'did you mean "preact_resnet18_raw"'),
    ("preact_resnet18_raw_w0", 'did you mean "preact_resnet18_raw"'),
    ("preact_resnet18_w8_raw", "Names: resnet18"),
    ("DMPreActResNet18", 'did you mean "dm_preact_resnet18"'),
    ("dm_preact_resnet34", 'did you mean "dm_preact_resnet18"'),
    ("DM-WRN-28-10", 'did you mean "dm_wrn28_10"'),
    ("dm_wrn29_10", 'did you mean "dm_wrn28_10"'),
    ("dm_wrn4_2", 'did you mean "dm_wrn10_2"'),
    ("dm_resnet18", "dm_preact_resnet18, these three"),
    ("Wang2023Better_WRN-28-11", "Names: resnet18"),
    ("transformer", "Names: resnet18"),
    (None, "Names: resnet18"),
])
def test_an_unknown_name_is_one_line_with_the_way_out(name, way_out):
    with pytest.raises(InputError) as error:
        models.create(name, classes=10)
    assert f'"{name}"' in str(error.value) and way_out in str(error.value) and "\n" not in str(error.value)


CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
CIFAR100 = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


@pytest.mark.parametrize("identifier, classes, architecture, statistics", [
    ("Wang2023Better_WRN-28-10", 10, "dm_wrn28_10", CIFAR10),
    ("Wang2023Better_WRN-28-10", 100, "dm_wrn28_10", CIFAR100),
    ("cifar10/L2/Wang2023Better_WRN-28-10", 10, "dm_wrn28_10", CIFAR10),
    ("Wang2023Better_WRN-70-16", 100, "dm_wrn70_16", CIFAR100),
    ("Rice2020Overfitting", 10, "wrn34_20", CIFAR10),
    ("cifar10/Linf/Wong2020Fast", 10, "preact_resnet18_raw", CIFAR10),
    ("Andriushchenko2020Understanding", 10, "preact_resnet18_raw", (None, None)),
    ("Chen2021LTD_WRN34_10", 100, "wrn34_10", (None, None)),
    ("Sehwag2021Proxy_R18", 10, "resnet18", (None, None)),
])
def test_a_published_identifier_is_its_architecture_with_its_normalisation(identifier, classes, architecture, statistics):
    model = models.create(identifier, classes=classes)
    assert model.name == model.specification["name"] == architecture and model.classes == classes
    assert (model.specification["mean"], model.specification["std"]) == statistics
    assert model == models.create(architecture, classes=classes, mean=statistics[0], std=statistics[1])
    assert models.create(**json.loads(json.dumps(model.specification))) == model


def test_other_options_of_a_published_identifier_are_the_callers():
    options = {"classes": 10, "dtype": "bfloat16", "batch_norm_sets": 2}
    model = models.create("Wang2023Better_WRN-28-10", **options)
    assert model == models.create("dm_wrn28_10", mean=CIFAR10[0], std=CIFAR10[1], **options)
    own = models.create("Wang2023Better_WRN-28-10", classes=10, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert own == models.create("dm_wrn28_10", classes=10, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    with pytest.raises(InputError, match="give both"):
        models.create("Wang2023Better_WRN-28-10", classes=10, mean=(0.1, 0.2, 0.3))


@pytest.mark.parametrize("image_shape", [(64, 64, 3), (32, 32, 1), (28, 28, 3)])
def test_a_published_identifier_is_for_its_own_images(image_shape):
    with pytest.raises(InputError) as error:
        models.create("Wang2023Better_WRN-28-10", classes=10, image_shape=image_shape)
    message = str(error.value)
    assert all(part in message for part in ("Wang2023Better_WRN-28-10", str(image_shape), "(32, 32, 3)", '"dm_wrn28_10"'))
    assert "\n" not in message
    assert models.create("dm_wrn28_10", classes=10, image_shape=image_shape).specification["mean"] is None


def test_a_published_identifier_with_other_classes_is_one_line():
    with pytest.raises(InputError) as error:
        models.create("Wang2023Better_WRN-28-10", classes=7)
    assert "10 or 100 classes, not 7" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet6_w8", "preact_resnet18_raw", "dm_preact_resnet18", "wrn10_2", "dm_wrn10_2", "mobilenet_v2"])
def test_the_name_of_an_architecture_is_not_looked_up(name, monkeypatch):
    monkeypatch.setattr(published, "find", lambda *_, **__: pytest.fail("looked up"))
    assert models.create(name, classes=10).specification["mean"] is None


@pytest.mark.parametrize("options, named", [
    (dict(classes=1), "classes is 1"),
    (dict(classes=10.0), "classes is 10.0"),
    (dict(image_shape=(32, 32)), "(32, 32)"),
    (dict(image_shape=(32, 0, 3)), "(32, 0, 3)"),
    (dict(dtype="float16"), "'float16'"),
    (dict(mean=(0.5, 0.5, 0.5)), "give both"),
    (dict(mean=(0.5,), std=(0.2,)), "one value per channel of the images: 3"),
    (dict(mean=(125.3, 123.0, 113.9), std=(0.2, 0.2, 0.2)), "units of [0, 1]"),
    (dict(mean=(0.5, 0.5, 0.5), std=(0.2, 0.0, 0.2)), "above 0"),
])
def test_a_bad_option_names_its_value(options, named):
    with pytest.raises(InputError) as error:
        models.create("resnet6_w8", **{"classes": 10, **options})
    assert named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(1, 1, 3), (7, 13, 3), (30, 31, 1)])
def test_deepminds_wide_resnet_takes_odd_sizes_too(shape):
    model = models.create("dm_wrn10_1", classes=5, image_shape=shape)
    logits, _ = model.apply(model.init(jax.random.key(0)), images(2, shape=shape), False)
    assert logits.shape == (2, 5) and np.isfinite(logits).all()


@pytest.mark.parametrize("name, smallest", [("dm_preact_resnet18_w4", 8)])
def test_images_of_which_nothing_would_be_left_are_refused(name, smallest):
    model = models.create(name, classes=5, image_shape=(smallest, smallest + 3, 1))
    variables = model.init(jax.random.key(0))
    assert np.isfinite(model.apply(variables, images(2, shape=model.image_shape), False)[0]).all()
    with pytest.raises(InputError, match=f"at least {smallest}") as error:
        models.create(name, classes=5, image_shape=(smallest + 3, smallest - 1, 1))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(4, 16, 16, 1), (4, 8, 8, 3), (8, 8, 1), (4, 1, 8, 8)])
@pytest.mark.parametrize("train", [False, True])
def test_images_of_another_shape_are_refused_with_both_shapes(shape, train):
    model, variables, apply = small("resnet6_w8")
    for function in (model.apply, apply):
        with pytest.raises(InputError) as error:
            function(variables, jnp.zeros(shape), train)
        assert str(list(shape)) in str(error.value) and "[batch, 8, 8, 1]" in str(error.value)


def test_integer_images_are_refused():
    model, variables, _ = small("resnet6_w8")
    with pytest.raises(InputError, match="uint8.*images / 255"):
        model.apply(variables, jnp.zeros((2, *SHAPE), jnp.uint8), False)
