"""BatchNorm's numbers, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrd.models.normalization import batch_norm, normalize_images

OLD_MEAN, OLD_VARIANCE = 3.0, 4.0


def activations(offset=0.0):
    return offset + jax.random.normal(jax.random.key(0), (4, 3, 3, 2)) * jnp.array([1.0, 2.0])


def forward(x, train, dtype=jnp.float32):
    variables = {
        "params": {"scale": jnp.array([1.0, 0.5]), "bias": jnp.array([0.0, 1.0])},
        "batch_stats": {"mean": jnp.full(2, OLD_MEAN), "var": jnp.full(2, OLD_VARIANCE)},
    }
    y, updated = batch_norm(train, dtype, "bn").apply(variables, x, mutable=["batch_stats"])
    return y, updated["batch_stats"]


def test_training_normalises_by_the_batch_and_moves_the_running_statistics_by_a_tenth():
    x = np.asarray(activations(), np.float64)
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    y, statistics = forward(activations(), train=True)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(variance + 1e-5) * [1.0, 0.5] + [0.0, 1.0], atol=1e-5)
    np.testing.assert_allclose(statistics["mean"], 0.9 * OLD_MEAN + 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(statistics["var"], 0.9 * OLD_VARIANCE + 0.1 * variance, rtol=1e-5)


def test_evaluation_normalises_by_the_running_statistics_and_keeps_them():
    x = activations()
    y, statistics = forward(x, train=False)
    expected = (x - OLD_MEAN) / np.sqrt(OLD_VARIANCE + 1e-5) * np.array([1.0, 0.5]) + np.array([0.0, 1.0])
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert jnp.all(statistics["mean"] == OLD_MEAN) and jnp.all(statistics["var"] == OLD_VARIANCE)


def test_a_large_mean_does_not_cancel_the_variance():
    x = activations(offset=1e4)
    _, statistics = forward(x, train=True)
    variance = np.asarray(x, np.float64).var((0, 1, 2))
    np.testing.assert_allclose(statistics["var"], 0.9 * OLD_VARIANCE + 0.1 * variance, rtol=1e-3)


def test_bfloat16_activations_are_averaged_in_float32():
    # 257 has no bfloat16, and a bfloat16 mean of [1, 257, ...] could not be 129.5.
    x = jnp.tile(jnp.array([1.0, 258.0], jnp.bfloat16)[:, None, None, None], (2, 3, 3, 2))
    y, statistics = forward(x, train=True, dtype=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16 and statistics["mean"].dtype == statistics["var"].dtype == jnp.float32
    np.testing.assert_allclose(statistics["mean"], 0.9 * OLD_MEAN + 0.1 * 129.5, rtol=1e-6)


@pytest.mark.parametrize("mean, std", [((0.5,), (0.5,)), ((0.1, 0.2, 0.3), (1.0, 0.5, 0.25))])
def test_images_are_normalised_per_channel(mean, std):
    images = jax.random.uniform(jax.random.key(0), (2, 4, 4, len(mean)))
    y = normalize_images(images, mean, std)
    for channel in range(len(mean)):
        np.testing.assert_allclose(y[..., channel], (images[..., channel] - mean[channel]) / std[channel], rtol=1e-6)


def test_no_statistics_leave_the_images_as_they_are():
    images = jax.random.uniform(jax.random.key(0), (2, 4, 4, 3))
    assert normalize_images(images, None, None) is images
