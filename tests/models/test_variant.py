"""A model computed otherwise is the same function of the same variables."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrd import models
from tests.support import assert_input_error

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPE = (8, 8, 3)
NAMES = ["resnet6_w4", *(pytest.param(name, marks=pytest.mark.slow) for name in (
    "wrn10_1", "preact_resnet18_w4", "dm_wrn10_1", "dm_preact_resnet18_w4", "mobilenet_v2", "resnet50_w4"))]


def trained(model, variables, images, views=(True, False)):
    def loss(params):
        logits, moved = model.apply(variables | {"params": params}, images, True, views=views)
        return jnp.mean(jnp.square(logits)), moved
    return loss


def kept_bytes(model, variables, images) -> int:
    """Returns what waits for the backward pass, by its shapes."""
    _, backward = jax.eval_shape(
        lambda params: jax.vjp(lambda params: trained(model, variables, images)(params)[0], params), variables["params"])
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_keeps_less_and_changes_nothing(name):
    model = models.create(name, classes=10, image_shape=SHAPE)
    spare = models.variant(model, gradient_checkpointing=True)
    assert spare.specification == model.specification
    variables = model.init(jax.random.key(0))
    chex.assert_trees_all_equal(spare.init(jax.random.key(0)), variables)
    images = np.random.default_rng(0).uniform(size=(8, *SHAPE)).astype(np.float32)
    chex.assert_trees_all_close(spare.apply(variables, images, False), model.apply(variables, images, False), rtol=1e-5, atol=1e-5)
    (gradients, moved), (expected, stats) = (
        jax.jit(jax.grad(trained(one, variables, images), has_aux=True))(variables["params"]) for one in (spare, model))
    chex.assert_trees_all_close(moved, stats, rtol=1e-4, atol=1e-6)
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected))
    chex.assert_trees_all_close(gradients, expected, rtol=1e-3, atol=1e-4 * largest)
    # Parameters, which any backward pass reads, are kept either way.
    parameters = 4 * models.parameter_count(variables)
    inside, outside = (kept_bytes(one, variables, images) - parameters for one in (model, spare))
    assert outside < inside / 2


def test_deep_networks_gain_most():
    """WRN-34-10 on 16 images: what waits for the backward pass is less than a quarter."""
    model = models.create("wrn34_10", classes=10)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((16, 32, 32, 3), jnp.float32)

    def kept(model):
        def backward(variables, images):
            return jax.vjp(lambda params: trained(model, variables, images, views=(True,))(params)[0], variables["params"])[1]
        shapes = jax.eval_shape(backward, variables, images)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)) - 4 * models.parameter_count(variables)

    whole, spare = kept(model), kept(models.variant(model, gradient_checkpointing=True))
    assert whole > 7e8 and spare < whole / 4


def test_another_dtype_rounds_and_no_more():
    model = models.create("resnet6_w8", classes=10, image_shape=SHAPE, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    half = models.variant(model, dtype="bfloat16")
    assert half.specification == model.specification | {"dtype": "bfloat16"} and models.variant(half, dtype="float32") == model
    variables = model.init(jax.random.key(0))
    images = np.random.default_rng(0).uniform(size=(16, *SHAPE)).astype(np.float32)
    exact, rounded = (one.apply(variables, images, False)[0] for one in (model, half))
    assert rounded.dtype == jnp.float32
    difference = float(jnp.max(jnp.abs(exact - rounded)) / jnp.max(jnp.abs(exact)))
    assert 0 < difference < 0.05
    jaxpr = str(jax.make_jaxpr(lambda images: half.apply(variables, images, False)[0])(images))
    assert "bf16" in jaxpr


def test_nothing_asked_is_the_model_itself():
    model = models.create("resnet6_w4", classes=10, image_shape=SHAPE)
    assert models.variant(model) is model and models.variant(model, dtype="float32") is model


def test_what_cannot_be_is_refused():
    own = models.Model("own", 10, SHAPE, init=lambda key: {}, apply=lambda *_: None, specification={})
    assert models.variant(own, dtype="float32") is own
    assert_input_error(lambda: models.variant(own, dtype="bfloat16"), '"own"', "models.create")
    assert_input_error(lambda: models.variant(own, gradient_checkpointing=True), '"own"', "models.create")
    model = models.create("resnet6_w4", classes=10, image_shape=SHAPE)
    assert_input_error(lambda: models.variant(model, dtype="float8"), "float8", "bfloat16")
