"""Stochastic weight averages, beside torch.optim.swa_utils."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrd import models
from jaxrd.errors import InputError
from jaxrd.models.weights import layouts

SHAPE = (8, 8, 1)


def checkpoints(model, count):
    return [model.init(jax.random.key(seed)) for seed in range(count)]


def batches(count, size=6):
    return list(jax.random.uniform(jax.random.key(9), (count, size, *SHAPE)))


def test_the_average_of_the_weights_is_their_mean():
    model = models.create("resnet6_w8", classes=5, image_shape=SHAPE)
    three = checkpoints(model, 3)
    averaged = models.average_weights(three)
    kernel = np.mean([one["params"]["conv1"]["kernel"] for one in three], axis=0)
    np.testing.assert_allclose(averaged["params"]["conv1"]["kernel"], kernel, rtol=1e-6)
    one = models.average_weights(three[:1])
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), one, three[0])))


def test_estimated_statistics_are_the_mean_over_the_batches_whatever_was_there():
    model = models.create("resnet6_w8", classes=5, image_shape=SHAPE)
    variables = model.init(jax.random.key(0))
    images = batches(3)
    found = models.estimate_statistics(model, variables, images)
    stem = [jax.lax.conv_general_dilated(
        batch, variables["params"]["conv1"]["kernel"], (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
        for batch in images]
    measured = found["batch_stats"]["bn1"]
    np.testing.assert_allclose(measured["mean"], np.mean([np.mean(x, (0, 1, 2)) for x in stem], axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(measured["var"], np.mean([np.var(x, (0, 1, 2)) for x in stem], axis=0), rtol=1e-4)
    assert found["params"] is variables["params"]
    elsewhere = variables | {"batch_stats": jax.tree.map(lambda leaf: leaf + 7, variables["batch_stats"])}
    again = models.estimate_statistics(model, elsewhere, images)
    jax.tree.map(np.testing.assert_array_equal, again["batch_stats"], found["batch_stats"])


def test_other_sets_keep_their_statistics():
    model = models.create("resnet6_w8", classes=5, image_shape=SHAPE, batch_norm_sets=2)
    variables = model.init(jax.random.key(0))
    single = models.create("resnet6_w8", classes=5, image_shape=SHAPE)
    expected = models.estimate_statistics(
        single, {"params": {k: v for k, v in variables["params"].items() if k != "batch_norm_1"},
                 "batch_stats": {k: v for k, v in variables["batch_stats"].items() if k != "batch_norm_1"}}, batches(2))
    for chosen in (0, 1):
        found = models.estimate_statistics(model, variables, batches(2), batch_norm_set=chosen)["batch_stats"]
        sets = [{k: v for k, v in found.items() if k != "batch_norm_1"}, found["batch_norm_1"]]
        jax.tree.map(np.testing.assert_array_equal, sets[chosen], expected["batch_stats"])
        initial = {k: v for k, v in variables["batch_stats"].items() if k != "batch_norm_1"}
        jax.tree.map(np.testing.assert_array_equal, sets[1 - chosen], initial)


def test_the_average_is_that_of_torch():
    torch = pytest.importorskip("torch", reason="parity with PyTorch needs torch, which jaxrd does not")
    model = models.create("resnet6_w8", classes=5, image_shape=SHAPE)
    two, images = checkpoints(model, 2), batches(3)
    stem = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, padding=1, bias=False), torch.nn.BatchNorm2d(8))
    averaged = torch.optim.swa_utils.AveragedModel(stem)
    layout = layouts.entries("resnet6_w8", 5, 1)
    for variables in two:
        state = layouts.to_torch(variables, layout)
        stem[0].load_state_dict({"weight": torch.tensor(state["conv1.weight"])})
        averaged.update_parameters(stem)
    loader = [torch.tensor(np.asarray(batch).transpose(0, 3, 1, 2).copy()) for batch in images]
    torch.optim.swa_utils.update_bn(loader, averaged)
    ours = models.estimate_statistics(model, models.average_weights(two), images)["batch_stats"]["bn1"]
    norm = averaged.module[1]
    np.testing.assert_allclose(ours["mean"], norm.running_mean.numpy(), rtol=1e-4, atol=1e-6)
    count = loader[0].numel()  # one channel: pixels of a batch
    np.testing.assert_allclose(ours["var"] * count / (count - 1), norm.running_var.numpy(), rtol=1e-4)


def test_nothing_to_average_is_one_line():
    model = models.create("resnet6_w8", classes=5, image_shape=SHAPE)
    other = models.create("resnet6_w16", classes=5, image_shape=SHAPE)
    for call, named in (
            (lambda: models.average_weights([]), "no checkpoints"),
            (lambda: models.average_weights([checkpoints(model, 1)[0], checkpoints(other, 1)[0]]), "different models"),
            (lambda: models.estimate_statistics(model, checkpoints(model, 1)[0], []), "no batches")):
        with pytest.raises(InputError, match=named) as error:
            call()
        assert "\n" not in str(error.value)
