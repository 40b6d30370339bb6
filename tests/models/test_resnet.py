"""The convolution that all models share, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrd.models.resnet import convolution


@pytest.mark.parametrize("stride, expected", [
    (1, [[10, 18, 24, 18], [27, 45, 54, 39], [51, 81, 90, 63], [42, 66, 72, 50]]),
    (2, [[10, 24], [51, 90]]),
])
def test_three_by_three_convolutions_pad_one_on_every_side(stride, expected):
    # A window of ones sums its pixels. "SAME" would start strided windows one pixel further in: [[45, 39], [66, 50]].
    image = jnp.arange(16.0).reshape(1, 4, 4, 1)
    y = convolution(1, 3, stride, jnp.float32, "conv").apply({"params": {"kernel": jnp.ones((3, 3, 1, 1))}}, image)
    np.testing.assert_array_equal(y[0, :, :, 0], expected)


def test_one_by_one_convolutions_pad_nothing():
    image = jnp.arange(16.0).reshape(1, 4, 4, 1)
    y = convolution(1, 1, 2, jnp.float32, "conv").apply({"params": {"kernel": jnp.full((1, 1, 1, 1), 2.0)}}, image)
    np.testing.assert_array_equal(y[0, :, :, 0], [[0, 4], [16, 20]])
