"""Batches: the same numbers whatever their size, one compilation, and no more memory for more images."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxrd import ThreatModel
from jaxrd.evaluation import alignment
from jaxrd.evaluation.alignment import batching
from jaxrd.threat import example_keys
from jaxrd.training import parallel
from tests.support import assert_input_error

N, SHAPE, CLASSES = 23, (3, 2, 1), 3
GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.uniform(size=(N, *SHAPE)).astype(np.float32)
DELTAS = (0.3 * GENERATOR.normal(size=(N, *SHAPE))).astype(np.float32)
WEIGHTS = GENERATOR.normal(size=(6, CLASSES)).astype(np.float32)


def network(weights, images):
    return jnp.tanh(images.reshape(len(images), -1) @ weights)


LOGITS_FN = Partial(network, WEIGHTS)


@pytest.mark.parametrize("batch_size", [1, 4, 7, N, 100])
@pytest.mark.parametrize("function", [
    Partial(alignment.taylor_remainder, LOGITS_FN), lambda *batch: alignment.taylor_remainder(LOGITS_FN, *batch)])
def test_the_batch_size_changes_nothing(function, batch_size):
    got = alignment.in_batches(function, IMAGES, DELTAS, batch_size=batch_size)
    assert isinstance(got, np.ndarray) and got.shape == (N,)
    np.testing.assert_allclose(got, alignment.taylor_remainder(LOGITS_FN, IMAGES, DELTAS), rtol=1e-5)


@pytest.mark.parametrize("devices", [1, 4])
def test_devices_share_a_batch(devices):
    mesh = parallel.data_mesh(jax.devices()[:devices])
    function = Partial(alignment.taylor_remainder, jax.device_put(LOGITS_FN, parallel.replicated(mesh)))
    got = alignment.in_batches(function, IMAGES, DELTAS, batch_size=5, mesh=mesh)
    np.testing.assert_allclose(got, alignment.taylor_remainder(LOGITS_FN, IMAGES, DELTAS), rtol=1e-5)


def test_random_numbers_follow_the_example():
    threat = ThreatModel("linf", 0.1)
    keys = example_keys(jax.random.key(3), N)
    whole = threat.random_start(jax.random.key(3), IMAGES)
    for batch_size, devices in ((9, None), (2, None), (9, 4)):
        mesh = parallel.data_mesh(jax.devices()[:devices]) if devices else None
        got = alignment.in_batches(threat.random_start, keys, IMAGES, batch_size=batch_size, mesh=mesh)
        np.testing.assert_allclose(got, whole, atol=1e-7)  # compiled at once, a sum is rounded otherwise


def test_results_are_trees_of_any_types_and_batches_are_equal():
    sizes = []

    def function(images):
        sizes.append(len(images))
        return {"bright": images.mean(axis=(1, 2, 3)) > 0.5, "top": (jnp.argmax(network(WEIGHTS, images), axis=1), images)}

    got = alignment.in_batches(function, IMAGES, batch_size=10)
    np.testing.assert_array_equal(got["bright"], IMAGES.mean(axis=(1, 2, 3)) > 0.5)
    np.testing.assert_array_equal(got["top"][0], np.argmax(network(WEIGHTS, IMAGES), axis=1))
    np.testing.assert_array_equal(got["top"][1], IMAGES)
    assert got["bright"].dtype == bool and got["top"][0].dtype == np.int32
    assert set(sizes) == {8}  # three batches of 8, and not of 10, 10 and 3


def test_no_example_at_all():
    got = alignment.in_batches(lambda images: {"a": images[..., 0]}, IMAGES[:0])
    assert got["a"].shape == (0, 3, 2) and got["a"].dtype == np.float32


def test_one_compilation_serves_all_batches_and_all_weights():
    traces = []

    def counted(weights, images):
        traces.append(1)
        return network(weights, images)

    for weights in (WEIGHTS, 2 * WEIGHTS):
        got = alignment.in_batches(Partial(counted, weights), IMAGES, batch_size=5)
        np.testing.assert_allclose(got, network(weights, IMAGES), rtol=1e-5)
    assert len(traces) <= 3  # one for the shapes of the result each, one to be compiled
    assert batching._apply._cache_size() >= 1


def test_weights_that_are_closed_over_are_arguments_and_are_let_go():
    weights = jax.device_put(GENERATOR.normal(size=(6, 200_000)).astype(np.float32))

    @jax.jit
    def function(images):
        return network(weights, images).max(axis=1)

    compiled = batching._compiled(function, [jax.ShapeDtypeStruct((4, *SHAPE), jnp.float32)])
    program = compiled.func.lower(*compiled.args, IMAGES[:4]).compile()
    assert program.memory_analysis().argument_size_in_bytes > weights.nbytes
    np.testing.assert_allclose(
        alignment.in_batches(function, IMAGES), network(weights, IMAGES).max(axis=1), rtol=1e-5)
    held = weakref.ref(weights)
    del weights, function, compiled, program
    gc.collect()
    assert held() is None


def test_the_device_holds_one_batch_however_many_images():
    """What is alive on the device while a batch is at work."""
    alive = []

    def watch(images):
        jax.debug.callback(lambda: alive.append(sum(array.nbytes for array in jax.live_arrays())))
        return images.sum(axis=(1, 2, 3))

    jax.clear_caches()
    gc.collect()
    before = sum(array.nbytes for array in jax.live_arrays())
    images = GENERATOR.uniform(size=(64, 32, 32, 3)).astype(np.float32)
    np.testing.assert_allclose(alignment.in_batches(watch, images, batch_size=8), images.sum(axis=(1, 2, 3)), rtol=1e-4)
    assert len(alive) == 8 and max(alive) - before <= 3 * images[:8].nbytes


def test_what_cannot_be_put_in_batches_is_one_line():
    assert_input_error(lambda: alignment.in_batches(lambda x: x, IMAGES, DELTAS[:3]), "[23, 3]", "same number")
    assert_input_error(lambda: alignment.in_batches(lambda: 0), "arrays", "at least one")
    assert_input_error(lambda: alignment.in_batches(lambda x, y: x, IMAGES, 3), "None", "same number")
    assert_input_error(lambda: alignment.in_batches(lambda x: x, IMAGES, batch_size=0), "batch_size is 0")
    assert_input_error(lambda: alignment.in_batches(lambda x: x.mean(), IMAGES), "one row per example", "[]")
    assert_input_error(lambda: alignment.in_batches(lambda x: x.mean(axis=0), IMAGES, batch_size=7), "[3, 2, 1]", "batch of 6")


def test_a_static_choice_goes_in_with_a_partial_function():
    labels = np.arange(N) % CLASSES
    for scalar in ("margin", "logit"):
        function = functools.partial(alignment.linearity_error, LOGITS_FN, scalar=scalar)
        got = alignment.in_batches(function, IMAGES, DELTAS, labels, batch_size=6)
        expected = alignment.linearity_error(LOGITS_FN, IMAGES, DELTAS, labels, scalar)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
