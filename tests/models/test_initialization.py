"""Initial weights have the distributions of the PyTorch code that the papers trained with."""

import functools
import math
import re

import jax
import numpy as np
import pytest

from jaxrd import models


@functools.cache
def initial(name):
    return jax.device_get(models.create(name, classes=100, image_shape=(8, 8, 3)).init(jax.random.key(0)))


def kernels(params):
    return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if "kernel" in str(path[-1])]


OTHERS = ["resnet6_w32", "preact_resnet18_w8", "preact_resnet18_raw_w8", "dm_preact_resnet18_w8", "mobilenet_v2"]


@pytest.mark.parametrize("name", OTHERS)
def test_weights_of_other_networks_are_uniform_within_one_over_root_fan_in(name):
    for kernel in kernels(initial(name)["params"]):
        bound = 1 / math.sqrt(math.prod(kernel.shape[:-1]))
        assert bound * 0.95 < np.abs(kernel).max() <= bound
        # A uniform variance, within five standard errors (kurtosis 1.8).
        np.testing.assert_allclose(np.mean(kernel**2), bound**2 / 3, rtol=5 * math.sqrt(0.8 / kernel.size))


@pytest.mark.parametrize("name", OTHERS)
def test_their_linear_bias_has_the_bound_of_its_weights(name):
    linear = initial(name)["params"]["logits" if name.startswith("dm_") else "linear"]
    bound = 1 / math.sqrt(linear["kernel"].shape[0])
    assert bound * 0.9 < np.abs(linear["bias"]).max() <= bound


@pytest.mark.parametrize("name, last", [("wrn10_2", "fc"), ("dm_wrn10_2", "logits")])
def test_wide_resnet_convolutions_are_normal_with_variance_two_over_fan_out(name, last):
    params = dict(initial(name)["params"])
    linear = params.pop(last)
    for kernel in kernels(params):
        size, _, _, features = kernel.shape
        variance = 2 / (size * size * features)
        np.testing.assert_allclose(np.mean(kernel**2), variance, rtol=5 * math.sqrt(2 / kernel.size))
        assert np.abs(kernel).max() > 2.5 * math.sqrt(variance), "bounded, so not a normal distribution"
    assert np.all(linear["bias"] == 0)
    bound = 1 / math.sqrt(linear["kernel"].shape[0])
    assert bound * 0.95 < np.abs(linear["kernel"]).max() <= bound


@pytest.mark.parametrize("name", [*OTHERS, "wrn10_2", "dm_wrn10_2"])
def test_batch_norm_starts_as_the_identity(name):
    variables = initial(name)
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        expected = {"scale": 1, "var": 1, "mean": 0}.get(path[-1].key)
        if path[-1].key == "bias" and re.search("bn|batchnorm", path[-2].key):
            expected = 0
        assert expected is None or np.all(leaf == expected), path
