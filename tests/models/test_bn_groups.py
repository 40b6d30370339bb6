"""A forward with BatchNorm groups is a forward of each group alone, on any number of devices and without asking the others."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrd import models
from jaxrd.models.normalization import BatchLayout
from jaxrd.models.resnet import BasicBlock, ResNet
from jaxrd.training import parallel
from jaxrd.training.collectives import collectives
from tests.support import assert_input_error

pytestmark = pytest.mark.usefixtures("quick_compilation")

NAME, SHAPE = "resnet6_w4", (8, 8, 1)
GROUPS, ROWS = 4, 3
SMALL = ResNet((1,), 4, BasicBlock, 5, jnp.float32)  # one block: half of the smallest network that has a name


def create(bn_groups, name=NAME, **options):
    return models.create(name, classes=5, image_shape=SHAPE, bn_groups=bn_groups, **options)


def images(batch, seed=0):
    # Of very different means, so that which images share their statistics matters.
    draw = np.random.default_rng(seed)
    return (draw.uniform(size=(batch, 1, 1, 1)) * draw.uniform(size=(batch, *SHAPE))).astype(np.float32)


def group(x, index):
    return x[index * ROWS:(index + 1) * ROWS]


def mean_over_groups(trees):
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)


def randomised(init, *arguments):
    """Variables shaped as those of `init`, with scales, biases and statistics that are not the initial ones."""
    draw, shapes = np.random.default_rng(0), jax.eval_shape(init, jax.random.key(0), *arguments)
    return jax.tree.map(
        lambda leaf: draw.uniform(0.5 if leaf.ndim == 1 else -0.5, 1, leaf.shape).astype(np.float32), shapes)


@functools.cache
def small_variables():
    return randomised(functools.partial(SMALL.init, train=False), images(1))


def forward(bn_groups, variables, images):
    """(logits, moved statistics) of the small network in train mode."""
    layout = BatchLayout(bn_groups) if bn_groups > 1 else True
    logits, moved = SMALL.apply(variables, images, train=layout, mutable=["batch_stats"])
    return logits, moved["batch_stats"]


# What one forward gives.


def everything(bn_groups):
    """A compiled function of images and a direction: what is asked of a network in train mode, by name."""
    @jax.jit
    def measure(images, direction):
        def logits(params, images):
            return forward(bn_groups, small_variables() | {"params": params}, images)

        def loss(params, images):
            values, moved = logits(params, images)
            return jnp.sum(jnp.sin(values)), (values, moved)

        def sharpness(params):  # of the loss in the images, as direct gradient matching has it
            by_images, aux = jax.grad(loss, argnums=1, has_aux=True)(params, images)
            return jnp.sum(by_images ** 2), (by_images, *aux)

        params = small_variables()["params"]
        double, (by_images, values, moved) = jax.grad(sharpness, has_aux=True)(params)
        along = jax.jvp(lambda x: logits(params, x)[0], (images,), (direction,))[1]
        return {"logits": values, "batch_stats": moved, "by_images": by_images, "along": along,
                "by_params": jax.grad(loss, has_aux=True)(params, images)[0], "double": double}

    return measure


def test_one_forward_of_groups_is_a_forward_of_each():
    batch, direction = images(GROUPS * ROWS), images(GROUPS * ROWS, seed=5) - np.float32(0.3)
    together, alone = everything(GROUPS)(batch, direction), everything(1)
    parts = [alone(group(batch, index), group(direction, index)) for index in range(GROUPS)]
    for name in ("logits", "by_images", "along"):
        expected = np.concatenate([part[name] for part in parts])
        np.testing.assert_allclose(together[name], expected, atol=1e-5 * np.abs(expected).max())
    for name in ("by_params", "double"):
        expected = jax.tree.map(lambda *leaves: np.sum(leaves, axis=0), *(part[name] for part in parts))
        largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
        chex.assert_trees_all_close(together[name], expected, rtol=1e-4, atol=1e-5 * largest)
    chex.assert_trees_all_close(together["batch_stats"], mean_over_groups([part["batch_stats"] for part in parts]), rtol=1e-5)
    # Statistics of the whole batch would have given something else.
    assert np.abs(alone(batch, direction)["logits"] - together["logits"]).max() > 0.01


def reductions(jaxpr, axes):
    """How many sums over exactly these axes of arrays with four a traced program holds."""
    count = 0
    for equation in jaxpr.eqns:
        count += (equation.primitive.name == "reduce_sum" and equation.invars[0].aval.ndim == 4
                  and tuple(equation.params["axes"]) == axes)
        inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
        count += sum(reductions(part, axes) for part in inner if hasattr(part, "eqns"))
    return count


@pytest.mark.parametrize("name", [
    NAME, "resnet50_w4", "preact_resnet18_w4", "preact_resnet18_raw_w4", "dm_preact_resnet18_w4", "wrn10_1", "dm_wrn10_1",
    "mobilenet_v2"])
def test_every_layer_of_every_architecture_has_groups(name):
    plain, grouped = create(None, name), create(GROUPS, name)
    fresh = jax.eval_shape(plain.init, jax.random.key(0))
    assert jax.eval_shape(grouped.init, jax.random.key(0)) == fresh
    layers = len(jax.tree.leaves(fresh["batch_stats"])) // 2
    # A mean and a variance of each layer, over [batch, height, width, ...], or, with groups, over the second axis of the rows'
    # means, [groups, examples, views, ...].
    for model, over_batch, over_group in ((plain, 2 * layers, 0), (grouped, 0, 2 * layers)):
        traced = jax.make_jaxpr(functools.partial(model.apply, train=True), return_shape=True)
        jaxpr, (_, moved) = traced(fresh, images(2 * GROUPS))
        assert (reductions(jaxpr.jaxpr, (0, 1, 2)), reductions(jaxpr.jaxpr, (1,))) == (over_batch, over_group)
        assert moved == fresh["batch_stats"]


def test_bfloat16_computes_like_float32_with_statistics_in_float32():
    start, batch = randomised(create(None).init), images(GROUPS * ROWS)
    (exact, exact_stats), (logits, batch_stats) = (
        jax.jit(create(GROUPS, dtype=dtype).apply, static_argnums=2)(start, batch, True) for dtype in ("float32", "bfloat16"))
    assert logits.dtype == jnp.float32 and jnp.any(logits != exact)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(batch_stats))
    np.testing.assert_allclose(logits, exact, atol=0.1 * float(jnp.abs(exact).max()))
    chex.assert_trees_all_close(batch_stats, exact_stats, rtol=0.05, atol=0.05)


def test_measured_statistics_are_the_mean_of_the_groups():
    batch = images(GROUPS * ROWS)
    start = randomised(create(None, batch_norm_sets=2).init)
    grouped = models.estimate_statistics(create(GROUPS, batch_norm_sets=2), start, [batch], batch_norm_set=1)
    # A group is a batch of its own to a model without groups, and the mean over batches is what the function returns.
    parts = [group(batch, index) for index in range(GROUPS)]
    expected = models.estimate_statistics(create(None, batch_norm_sets=2), start, parts, batch_norm_set=1)
    chex.assert_trees_all_close(grouped, expected, rtol=1e-5, atol=1e-6)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), grouped["batch_stats"], start["batch_stats"])
    assert all(jax.tree.leaves(moved.pop("batch_norm_1"))) and not any(jax.tree.leaves(moved))


# Devices.


@functools.cache
def on_devices(bn_groups, devices, batch=24):
    """((loss, statistics), gradient) with a batch over so many devices, what they exchange, and how many numbers those are."""
    mesh = parallel.data_mesh(jax.devices()[:devices])

    def loss(params, batch_stats, images):
        logits, moved = forward(bn_groups, {"params": params, "batch_stats": batch_stats}, images)
        return jnp.mean(jnp.sin(logits)), moved

    arguments = (*(jax.device_put(small_variables()[kind], parallel.replicated(mesh)) for kind in ("params", "batch_stats")),
                 jax.device_put(images(batch), parallel.sharded(mesh)))
    program = jax.jit(
        jax.value_and_grad(loss, has_aux=True), out_shardings=parallel.replicated(mesh)).lower(*arguments).compile()
    numbers = sum(leaf.size for leaf in jax.tree.leaves(small_variables())) + 1
    exchanged = [(each.kind, each.bytes // 4) for each in collectives(program.as_text())]  # all float32
    return jax.tree.map(np.asarray, program(*arguments)), exchanged, numbers


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("bn_groups", [1, 2, 3, 4, 8])
def test_any_number_of_devices_gives_the_same(bn_groups, devices):
    one, none, _ = on_devices(bn_groups, 1)
    many, _, _ = on_devices(bn_groups, devices)
    assert not none
    chex.assert_trees_all_close(many, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bn_groups, devices", [(2, 2), (4, 2), (8, 2), (4, 4), (8, 4)])
def test_groups_within_devices_are_exchanged_once_with_the_gradient(bn_groups, devices):
    _, exchanged, numbers = on_devices(bn_groups, devices)
    # Gradient, loss and what moves the running statistics, of which nothing waits: neither forward nor backward pass.
    assert exchanged == [("all-reduce", numbers)]
    assert len(on_devices(1, devices)[1]) > 10  # where the statistics are everybody's


def test_groups_over_several_devices_are_sums_of_those():
    _, exchanged, numbers = on_devices(2, 4)
    assert {kind for kind, _ in exchanged} == {"all-reduce"}
    _, whole, _ = on_devices(1, 4)
    assert sum(count for _, count in exchanged) < sum(count for _, count in whole) + numbers


def test_groups_that_devices_share_unequally_exchange_a_number_for_each_image_and_channel_at_most():
    _, exchanged, _ = on_devices(3, 4)
    kinds = {kind for kind, _ in exchanged}
    assert kinds <= {"all-reduce", "all-gather"}
    # 24 images of 8 channels; their activations are 64 times as many.
    assert max(count for kind, count in exchanged if kind == "all-gather") <= 24 * 8


# Options and specifications.


def test_evaluation_takes_any_batch_and_does_not_read_the_groups():
    plain, grouped = create(None), create(GROUPS)
    start = randomised(plain.init)
    for batch in (1, 7):
        expected, _ = jax.jit(plain.apply, static_argnums=2)(start, images(batch), False)
        logits, batch_stats = jax.jit(grouped.apply, static_argnums=2)(start, images(batch), False)
        np.testing.assert_array_equal(logits, expected)
        chex.assert_trees_all_equal(batch_stats, start["batch_stats"])


def test_one_group_is_the_model_without():
    assert create(1) is create(None) and create(1).specification["bn_groups"] is None


def test_a_specification_keeps_the_groups_and_an_old_one_has_none():
    model = create(GROUPS)
    assert models.create(**json.loads(json.dumps(model.specification))) == model != create(None)
    old = {name: value for name, value in create(None).specification.items() if name != "bn_groups"}
    assert models.create(**old) == create(None)


@pytest.mark.parametrize("value", [0, -2, 2.0, "2"])
def test_a_bad_number_of_groups_is_named(value):
    assert_input_error(lambda: create(value), f"bn_groups is {value!r}", "at least 1", "None")


@pytest.mark.parametrize("batch, nearest", [(10, "give 8 or 12 images"), (3, "give 4 images"), (1, "give 4 images")])
def test_a_batch_that_the_groups_do_not_divide_is_refused_in_train_mode(batch, nearest):
    model = create(GROUPS)
    for call in (model.apply, jax.jit(model.apply, static_argnums=2)):
        assert_input_error(lambda call=call: call(randomised(model.init), images(batch), True),
                           f"batch of {batch} images", "4 equal groups", "bn_groups", NAME, nearest)
