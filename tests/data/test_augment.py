"""Augmentation: exact offsets, frequencies, and independence of every example from the rest of the batch."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrd.data import augment
from jaxrd.errors import InputError


def keys_of(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def images_of(n, shape=(5, 6, 2)):
    return np.random.default_rng(0).integers(1, 256, (n, *shape), dtype=np.uint8)


def test_to_float_divides_bytes_and_keeps_floats():
    levels = np.arange(256, dtype=np.uint8)
    for convert in (augment.to_float, jax.jit(augment.to_float)):
        for images in (levels, jnp.asarray(levels)):
            converted = convert(images)
            assert converted.dtype == jnp.float32
            np.testing.assert_array_equal(converted, levels.astype(np.float32) / np.float32(255))
    floats = jnp.linspace(0, 1, 5)
    assert augment.to_float(floats) is floats
    with pytest.raises(InputError, match="int32"):
        augment.to_float(jnp.arange(3))


@pytest.mark.parametrize("pixels", [1, 2])
def test_shift_reaches_every_offset_and_nothing_else(pixels):
    image = images_of(1)[0]
    padded = np.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)))
    offsets = [(r, c) for r in range(2 * pixels + 1) for c in range(2 * pixels + 1)]
    crops = {padded[r : r + 5, c : c + 6].tobytes(): (r, c) for r, c in offsets}
    assert len(crops) == len(offsets)
    n = 40 * len(offsets)
    shifted = jax.vmap(augment.shift, (0, None, None))(keys_of(n), image, pixels)
    assert shifted.dtype == image.dtype
    reached = [crops[np.asarray(row).tobytes()] for row in shifted]
    counts = np.array([reached.count(offset) for offset in offsets])
    # Expected 40 each; six standard deviations.
    assert counts.min() > 40 - 6 * 40**0.5 and counts.max() < 40 + 6 * 40**0.5


def test_flip_mirrors_columns_with_the_probability_asked_for():
    image = images_of(1)[0]
    for probability in (0.0, 0.25, 0.5, 1.0):
        flipped = np.asarray(jax.vmap(augment.flip, (0, None, None))(keys_of(2000), image, probability))
        mirrored = (flipped == image[:, ::-1]).all((1, 2, 3))
        assert (mirrored | (flipped == image).all((1, 2, 3))).all()
        assert abs(mirrored.mean() - probability) <= 6 * (probability * (1 - probability) / 2000) ** 0.5


def test_shift_and_flip_are_independent():
    image = np.zeros((1, 3, 4, 1), np.uint8)
    image[0, 1, 1] = 1
    image[0, 1, 2] = 2
    images = augment.augment(keys_of(3600), np.tile(image, (3600, 1, 1, 1)), shift_pixels=1, flip_probability=0.5)
    _, counts = np.unique(np.asarray(images).reshape(3600, -1), axis=0, return_counts=True)
    # 3 x 3 offsets times 2 directions, 200 of each expected.
    assert len(counts) == 18 and np.abs(counts - 200).max() < 6 * 200**0.5


def test_an_example_does_not_depend_on_its_batch():
    keys, images = keys_of(32), images_of(32)
    options = dict(shift_pixels=2, flip_probability=0.5)
    whole = augment.augment(keys, images, **options)
    part = np.array([30, 2, 17])
    np.testing.assert_array_equal(augment.augment(keys[part], images[part], **options), whole[part])
    np.testing.assert_array_equal(jax.jit(lambda k, x: augment.augment(k, x, **options))(keys, images), whole)
    assert (np.asarray(augment.augment(keys_of(32, seed=1), images, **options)) != whole).any()


def test_bytes_and_floats_get_the_same_augmentation():
    keys, images = keys_of(8), images_of(8)
    options = dict(shift_pixels=1, flip_probability=0.5)
    late = augment.to_float(augment.augment(keys, images, **options))
    np.testing.assert_array_equal(late, augment.augment(keys, augment.to_float(images), **options))


def test_nothing_asked_for_changes_nothing():
    images = jnp.asarray(images_of(4))
    assert augment.augment(keys_of(4), images) is images


@pytest.mark.parametrize(
    "options", [{"shift_pixels": -1}, {"shift_pixels": 1.5}, {"flip_probability": 1.1}, {"flip_probability": -0.1}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        augment.augment(keys_of(2), images_of(2), **options)


def test_keys_and_images_must_match():
    with pytest.raises(AssertionError):
        augment.augment(keys_of(3), images_of(2), shift_pixels=1)
    with pytest.raises(AssertionError):
        augment.augment(jax.random.key(0), images_of(2), shift_pixels=1)


def test_a_sharded_batch_stays_on_its_devices():
    code = """
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_platforms", "cpu")
from jaxrd.data import augment
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
keys = jax.device_put(jax.random.split(jax.random.key(0), 8), rows)
host = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
images = jax.device_put(host, rows)
step = jax.jit(lambda k, x: augment.augment(k, x, shift_pixels=1, flip_probability=0.5))
text = step.lower(keys, images).compile().as_text()
for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
    assert collective not in text, collective
alone = step(jax.device_put(keys, jax.devices()[0]), host)
assert (np.asarray(step(keys, images)) == np.asarray(alone)).all()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
