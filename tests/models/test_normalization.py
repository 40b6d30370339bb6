"""BatchNorm's numbers, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrd.models.normalization import BatchLayout, batch_norm, normalize_images

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


@pytest.mark.parametrize("groups", [1, 2])
def test_a_large_mean_does_not_cancel_the_variance(groups):
    x = activations(offset=1e4)
    _, statistics = forward(x, train=BatchLayout(groups))
    variance = np.asarray(x, np.float64).reshape(groups, -1, 2).var(1).mean(0)
    np.testing.assert_allclose(statistics["var"], 0.9 * OLD_VARIANCE + 0.1 * variance, rtol=1e-3)


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_are_normalised_by_their_own_statistics_and_the_running_ones_move_by_their_mean(groups):
    x = np.asarray(activations(), np.float64)
    parts = x.reshape(groups, -1, *x.shape[1:])  # contiguous rows
    mean, variance = parts.mean((1, 2, 3)), parts.var((1, 2, 3))
    y, statistics = forward(activations(), train=BatchLayout(groups))
    own = [array[:, np.newaxis, np.newaxis, np.newaxis] for array in (mean, variance)]
    expected = (parts - own[0]) / np.sqrt(own[1] + 1e-5) * [1.0, 0.5] + [0.0, 1.0]
    np.testing.assert_allclose(y, expected.reshape(x.shape), atol=1e-5)
    np.testing.assert_allclose(statistics["mean"], 0.9 * OLD_MEAN + 0.1 * mean.mean(0), rtol=1e-5)
    np.testing.assert_allclose(statistics["var"], 0.9 * OLD_VARIANCE + 0.1 * variance.mean(0), rtol=1e-5)


def test_a_layer_with_groups_has_the_variables_of_one_without():
    plain, grouped = (batch_norm(train, jnp.float32, "bn").init(jax.random.key(0), activations()) for train in (True, BatchLayout(2)))
    assert jax.tree.structure(plain) == jax.tree.structure(grouped)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.dtype == b.dtype and jnp.array_equal(a, b), plain, grouped)))


@pytest.mark.parametrize("groups", [1, 2])
def test_bfloat16_activations_are_averaged_in_float32(groups):
    # 257 has no bfloat16, and a bfloat16 mean of [1, 257, ...] could not be 129.5.
    x = jnp.tile(jnp.array([1.0, 258.0], jnp.bfloat16)[:, None, None, None], (2, 3, 3, 2))
    y, statistics = forward(x, train=BatchLayout(groups), dtype=jnp.bfloat16)
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
