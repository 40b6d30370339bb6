"""The tools on a WideResNet-28-10 of 36 M parameters at 32x32: in the memory of a batch, and of a few classes of a Jacobian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxrd import ThreatModel, models
from jaxrd.evaluation import alignment, measures
from jaxrd.evaluation.alignment import batching

pytestmark = pytest.mark.slow

SHAPE = (32, 32, 3)
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def logits_fn():
    model = models.create("dm_wrn28_10", classes=10)
    variables = jax.jit(model.init)(jax.random.key(0))
    assert 36e6 < models.parameter_count(variables) < 37e6
    return models.logits_fn(model, variables)


def images_of(n, seed=0):
    return np.random.default_rng(seed).uniform(size=(n, *SHAPE)).astype(np.float32)


def temporary_bytes(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def test_more_images_take_no_more_memory(logits_fn, monkeypatch):
    """The one program that is compiled, and what is on the device when its batches are done, at two sizes of the data set."""
    programs, compiled = [], batching._compiled

    def watched(function, example):
        program = batching._apply.lower(function, *example).compile().memory_analysis()
        programs.append((program.temp_size_in_bytes, program.argument_size_in_bytes, program.output_size_in_bytes))
        return compiled(function, example)

    monkeypatch.setattr(batching, "_compiled", watched)
    live, found = [], []
    for n in (2, 6):
        images, deltas = images_of(6)[:n], 8 / 255 * (2 * images_of(6, seed=1)[:n] - 1)
        found.append(alignment.in_batches(Partial(alignment.taylor_remainder, logits_fn), images, deltas, batch_size=2))
        live.append(sum(array.nbytes for array in jax.live_arrays()))
    assert programs[0] == programs[1] and live[0] == live[1]
    assert programs[0][0] < 64 * MEGABYTE  # besides 139 MiB of weights
    np.testing.assert_allclose(found[1][:2], found[0], rtol=1e-3)
    assert found[1].shape == (6,) and (found[1] > 0).all() and (found[1] < 1).all()


def test_the_whole_jacobian_of_an_image(logits_fn):
    image = jnp.asarray(images_of(1))
    got = jax.jit(lambda logits_fn, image: alignment.jacobian(logits_fn, image, chunk=5))(logits_fn, image)
    assert got.shape == (1, 10, *SHAPE)
    row = jax.jit(alignment.vector_jacobian_product)(logits_fn, image, jax.nn.one_hot(jnp.array([7]), 10))
    np.testing.assert_allclose(got[:, 7], row, rtol=1e-3, atol=1e-3 * float(jnp.abs(row).max()))


@pytest.mark.parametrize("function", ["jacobian", "jacobian_alignment"])
def test_a_jacobian_of_100_classes_takes_the_memory_of_a_chunk_of_them(function):
    model = models.create("dm_wrn28_10", classes=100)
    abstract = models.logits_fn(model, jax.eval_shape(model.init, jax.random.key(0)))
    images = jax.ShapeDtypeStruct((2, *SHAPE), jnp.float32)

    def needed(chunk):
        def call(first, second, images):
            if function == "jacobian":
                return alignment.jacobian(first, images, chunk=chunk)
            return alignment.jacobian_alignment(first, second, images, chunk=chunk)

        return temporary_bytes(call, abstract, abstract, images)

    assert needed(10) < 0.5 * needed(100)


def test_what_an_evaluation_measures_beside_a_teacher_fits_too(logits_fn):
    """Two networks of 36 M parameters, their gradients, and all that is measured at a batch, in one program."""
    batch = 16
    images, labels = jax.ShapeDtypeStruct((batch, *SHAPE), jnp.float32), jax.ShapeDtypeStruct((batch,), jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    needed = temporary_bytes(measures._measure, logits_fn, logits_fn, ThreatModel(), keys, images, labels, images)
    # Weights are laid out anew for the gradients, 139 MiB each at most, and an image's activations are kept for one network.
    assert needed < (2 * 140 + 64 * batch) * MEGABYTE
