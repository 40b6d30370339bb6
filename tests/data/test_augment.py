"""Augmentation: a second computation in plain loops, exact distributions, and independence of every example from the rest."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxrd.data import augment
from jaxrd.data.augment import Augmentation
from jaxrd.errors import InputError
from jaxrd.training import parallel
from tests.support import assert_input_error

pytestmark = pytest.mark.usefixtures("quick_compilation")

CLASSES, N = 4, 48  # of one size, so that one compiled program serves several tests
EVERYTHING = {
    mixing: Augmentation(shift=2, flip=True, cutout=3, mixing=mixing, mixing_alpha=0.4, mixing_probability=0.7)
    for mixing in augment.MIXINGS}


def keys_of(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def images_of(n, shape=(5, 6, 2), seed=0):
    return np.random.default_rng(seed).integers(1, 256, (n, *shape), dtype=np.uint8)


def pairs_of(n=N, shape=(8, 7, 2)):
    """Keys, images, labels, partners and their labels."""
    generator = np.random.default_rng(5)
    labels, partner_labels = generator.integers(0, CLASSES, (2, n)).astype(np.int32)
    return keys_of(n, 3), images_of(n, shape), labels, images_of(n, shape, 1), partner_labels


@functools.partial(jax.jit, static_argnums=0)
def augmented(augmentation, keys, images, labels, partners, partner_labels):
    if not augmentation.mixes:
        return augment.augment(augmentation, keys, images), labels
    return augment.augment_pairs(augmentation, keys, images, labels, partners, partner_labels, CLASSES)


# The whole once more, in loops of NumPy, on the same random numbers.


def plainly(augmentation, keys, images, labels, partners, partner_labels):
    """`augmented` in float64, image by image and pixel by pixel."""
    fold = jax.vmap(jax.random.fold_in, (0, None))
    n, height, width, _ = images.shape

    def moved(keys, images):
        offsets = jax.vmap(lambda key: jax.random.randint(key, (2,), 0, 2 * augmentation.shift + 1))(fold(keys, 0))
        mirrored = np.asarray(jax.vmap(jax.random.bernoulli)(fold(keys, 1)))
        result = np.zeros(images.shape)
        for i, (down, right) in enumerate(np.asarray(offsets) - augmentation.shift):
            for row in range(height):
                for column in range(width):
                    source = row + down, (width - 1 - column if mirrored[i] else column) + right
                    if 0 <= source[0] < height and 0 <= source[1] < width:
                        result[i, row, column] = images[i][source] / 255
        return result

    def centres(keys):
        return np.asarray(jax.vmap(lambda key: jax.random.randint(key, (2,), 0, jnp.array([height, width])))(keys))

    def box(centre, tall, wide):
        rows, columns = ([0 <= position - middle + side // 2 < side for position in range(size)]
                         for middle, side, size in zip(centre, (tall, wide), (height, width)))
        return np.outer(rows, columns)

    result, soft = moved(keys, images), np.eye(CLASSES)[labels]
    if augmentation.mixes:
        partners, partner_soft = moved(fold(keys, 2), partners), np.eye(CLASSES)[partner_labels]
        weight_keys, box_keys, choice_keys = jax.vmap(lambda key: jax.random.split(key, 3))(fold(keys, 3)).T
        u, v = np.asarray(jax.vmap(lambda key: jax.random.uniform(key, (2,)))(weight_keys), np.float64).T
        chosen = jax.vmap(lambda key: jax.random.bernoulli(key, augmentation.mixing_probability))(choice_keys)
        freedom = 2 * augmentation.mixing_alpha
        t = np.sqrt(freedom * (u ** (-2 / freedom) - 1)) * np.cos(2 * np.pi * v)
        weights = np.where(chosen, 0.5 + t / (2 * np.sqrt(freedom + t**2)), 1.0)
        assert 0 < chosen.sum() < n
        middles = centres(box_keys)
        for i, weight in enumerate(weights):
            if augmentation.mixing == "mixup":
                result[i] = weight * result[i] + (1 - weight) * partners[i]
            else:
                sides = (int(size * np.sqrt(1 - weight)) // 2 * 2 for size in (height, width))
                inside = box(middles[i], *sides)
                result[i][inside] = partners[i][inside]
                weight = 1 - inside.mean()
            soft[i] = weight * soft[i] + (1 - weight) * partner_soft[i]
    for i, centre in enumerate(centres(fold(keys, 4))):
        result[i][box(centre, augmentation.cutout, augmentation.cutout)] = 0
    return result, soft


@pytest.mark.parametrize("mixing", augment.MIXINGS)
def test_all_of_it_equals_plain_loops(mixing):
    pairs = pairs_of()
    images, labels = augmented(EVERYTHING[mixing], *pairs)
    expected_images, expected_labels = plainly(EVERYTHING[mixing], *pairs)
    assert images.dtype == np.float32 and images.min() >= 0 and images.max() <= 1
    np.testing.assert_allclose(images, expected_images, atol=2e-6)
    if mixing == "none":
        np.testing.assert_array_equal(labels, pairs[2])
        return
    assert labels.dtype == np.float32 and labels.shape == (N, CLASSES)
    np.testing.assert_allclose(labels, expected_labels, atol=2e-6)
    np.testing.assert_allclose(labels.sum(axis=1), 1, atol=1e-6)
    assert (np.asarray(labels) > 0.01).sum(axis=1).max() == 2


# Independence of everything else.


@pytest.mark.parametrize("mixing", augment.MIXINGS)
def test_an_example_does_not_depend_on_its_batch(mixing):
    pairs, order = pairs_of(), np.random.default_rng(0).permutation(N)
    order[10:] = order[10]
    whole = augmented(EVERYTHING[mixing], *pairs)
    reordered = augmented(EVERYTHING[mixing], *(rows[order] for rows in pairs))
    for a, b in zip(whole, reordered):
        np.testing.assert_array_equal(np.asarray(a)[order], b)
    if mixing == "cutmix":  # nor on its size
        few = augmented(EVERYTHING[mixing], *(rows[order[:3]] for rows in pairs))
        for a, b in zip(whole, few):
            np.testing.assert_allclose(np.asarray(a)[order[:3]], b, atol=1e-7)
    other = augmented(EVERYTHING[mixing], keys_of(N, 9), *pairs[1:])
    assert np.mean(np.any(np.asarray(other[0]) != np.asarray(whole[0]), axis=(1, 2, 3))) > 0.9


@pytest.mark.parametrize("mixing", augment.MIXINGS)
def test_a_sharded_batch_stays_on_its_devices(mixing):
    pairs, mesh = pairs_of(), parallel.data_mesh()
    placed = jax.device_put(pairs, parallel.sharded(mesh))
    program = augmented.lower(EVERYTHING[mixing], *placed).compile().as_text()
    assert mesh.size == 4 and not re.search("all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter", program)
    for four, one in zip(augmented(EVERYTHING[mixing], *placed), augmented(EVERYTHING[mixing], *pairs)):
        np.testing.assert_array_equal(four, one)


def test_bytes_and_floats_get_the_same_augmentation():
    keys, images, labels, partners, partner_labels = pairs_of()
    early = augmented(
        EVERYTHING["mixup"], keys, augment.to_float(images), labels, augment.to_float(partners), partner_labels)
    for a, b in zip(early, augmented(EVERYTHING["mixup"], keys, images, labels, partners, partner_labels)):
        np.testing.assert_allclose(a, b, atol=1e-7)


def test_nothing_asked_for_changes_nothing():
    images = images_of(4)
    np.testing.assert_array_equal(augment.augment(Augmentation(), keys_of(4), images), augment.to_float(images))


def test_mixing_draws_nothing_that_the_rest_draws():
    """The images of a run without mixing are those of one with it where an image stays as it is."""
    pairs = pairs_of()
    alone, _ = augmented(EVERYTHING["none"], *pairs)
    for mixing in ("mixup", "cutmix"):
        images, labels = augmented(EVERYTHING[mixing], *pairs)
        stay = np.all(np.asarray(labels) == np.eye(CLASSES)[pairs[2]], axis=1) & (pairs[2] != pairs[4])
        assert 5 < stay.sum() < 30
        np.testing.assert_array_equal(np.asarray(images)[stay], np.asarray(alone)[stay])


# Each by itself.


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


def positions(results, expected) -> np.ndarray:
    """How often each of the expected images is among the results, all of which are among them."""
    index = {np.asarray(image).tobytes(): place for place, image in enumerate(expected)}
    assert len(index) == len(expected)
    return np.bincount([index[np.asarray(image).tobytes()] for image in results], minlength=len(expected))


def uniform(counts):
    return scipy.stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("pixels", [1, 2])
def test_shift_reaches_every_offset_equally_often_and_nothing_else(pixels):
    image, n = images_of(1)[0], 2000
    padded = np.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)))
    offsets = range(2 * pixels + 1)
    shifted = jax.vmap(augment.shift, (0, None, None))(keys_of(n), image, pixels)
    assert shifted.dtype == image.dtype
    assert uniform(positions(shifted, [padded[r : r + 5, c : c + 6] for r in offsets for c in offsets]))


def test_flip_mirrors_columns_with_the_probability_asked_for():
    image, n = images_of(1)[0], 2000
    for probability in (0.0, 0.25, 0.5, 1.0):
        flipped = jax.vmap(augment.flip, (0, None, None))(keys_of(n), image, probability)
        mirrored = positions(flipped, [image, image[:, ::-1]])[1]
        assert scipy.stats.binomtest(int(mirrored), n, probability).pvalue > 1e-4


def test_shift_and_flip_are_independent():
    image = np.zeros((1, 3, 4, 1), np.uint8)
    image[0, 1, 1] = 1
    image[0, 1, 2] = 2
    images = augment.augment(Augmentation(shift=1, flip=True), keys_of(3600), np.tile(image, (3600, 1, 1, 1)))
    _, counts = np.unique(np.asarray(images).reshape(3600, -1), axis=0, return_counts=True)
    # 3 x 3 offsets times 2 directions.
    assert len(counts) == 18 and uniform(counts)


def test_an_image_and_its_partner_move_independently():
    n, image = 4000, np.zeros((3, 5, 1), np.uint8)
    image[1, 2] = 255
    augmentation = Augmentation(shift=1, mixing="mixup", mixing_alpha=50.0)
    labels = np.zeros(n, np.int32)
    images, _ = augment.augment_pairs(
        augmentation, keys_of(n), np.tile(image, (n, 1, 1, 1)), labels, np.tile(image, (n, 1, 1, 1)), labels + 1, 2)
    # Each is one bright pixel, and alpha so large that both are seen: as one spot where they moved alike, 1 time of 9.
    spots = (np.asarray(images) > 0.05).sum(axis=(1, 2, 3))
    assert set(spots) == {1, 2}
    assert scipy.stats.binomtest(int((spots == 1).sum()), n, 1 / 9).pvalue > 1e-4


def boxes(height, width, tall, wide):
    """The pixels within a box around each pixel, [height * width, height, width]."""
    rows, columns = np.arange(height), np.arange(width)
    return np.array([
        np.outer((rows >= r - tall // 2) & (rows < r - tall // 2 + tall),
                 (columns >= c - wide // 2) & (columns < c - wide // 2 + wide)) for r in rows for c in columns])


@pytest.mark.parametrize("side", [0, 2, 3])
def test_cutout_puts_zeros_around_every_pixel_equally_often(side):
    image, n = images_of(1)[0], 3000
    cut = jax.vmap(augment.cutout, (0, None, None))(keys_of(n), image, side)
    assert cut.dtype == image.dtype
    if side == 0:
        assert (np.asarray(cut) == image).all()
        return
    assert uniform(positions(cut, [image * ~inside[..., None] for inside in boxes(5, 6, side, side)]))


@pytest.mark.parametrize("weight, tall, wide", [(1.0, 0, 0), (0.75, 4, 2), (0.5, 4, 4), (0.0, 8, 6)])
def test_the_box_of_cutmix_and_the_weight_of_its_label(weight, tall, wide):
    """sqrt(1 - weight) of the height and of the width, cut off at the border; the label counts what is left, to the pixel."""
    n, image, partner = 3000, np.zeros((8, 6, 1), np.float32), np.ones((8, 6, 1), np.float32)
    mixed, kept = jax.vmap(augment.cutmix, (0, None, None, None))(keys_of(n), weight, image, partner)
    np.testing.assert_allclose(kept, 1 - np.mean(mixed, axis=(1, 2, 3)), atol=1e-6)
    if not tall:
        assert (np.asarray(kept) == 1).all() and not np.any(mixed)
        return
    expected = boxes(8, 6, tall, wide)
    # Boxes of another centre may be alike where they cover a whole axis: counted as what they are.
    kinds, shares = np.unique(expected.reshape(48, -1), axis=0, return_counts=True)
    counts = positions(np.asarray(mixed, bool), kinds.reshape(-1, 8, 6, 1))
    assert scipy.stats.chisquare(counts, n * shares / 48).pvalue > 1e-4
    areas, frequency = np.unique(expected.mean(axis=(1, 2)), return_counts=True)
    seen = np.bincount(np.argmin(np.abs(1 - np.asarray(kept)[:, None] - areas), axis=1), minlength=len(areas))
    assert scipy.stats.chisquare(seen, n * frequency / 48).pvalue > 1e-4


@jax.jit
def weights_of(keys, alpha):
    return jax.vmap(augment.mixing_weight, (0, None))(keys, alpha)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 1.0, 1.7, 5.0, 40.0])
def test_mixing_weights_have_the_beta_distribution(alpha):
    n = 20_000
    weights, beta = np.asarray(weights_of(keys_of(n), alpha), np.float64), scipy.stats.beta(alpha, alpha)
    assert np.all((weights >= 0) & (weights <= 1))
    # Kolmogorov-Smirnov, save for the last millionth at each end: float32 has no numbers closer to 1 than 6e-8, and for small
    # alpha a part of the distribution lies there.
    points = np.unique(np.clip(weights, 1e-6, 1 - 1e-6))[1:-1]
    ordered = np.sort(weights)
    gap = max(np.abs(np.searchsorted(ordered, points, side=side) / n - beta.cdf(points)).max() for side in ("left", "right"))
    assert gap < scipy.stats.kstwo.isf(1e-4, n)
    assert scipy.stats.kstwo.isf(1e-4, n) < 0.02
    if alpha < 1:  # the lower tail has its precision
        tail = weights[weights < 1e-6]
        assert scipy.stats.binomtest(len(tail), n, beta.cdf(1e-6)).pvalue > 1e-4
        assert alpha > 0.2 or len(np.unique(tail)) > 0.9 * len(tail)


def test_images_are_mixed_with_the_probability_asked_for():
    n, labels = 3000, np.zeros(3000, np.int32)
    images = np.zeros((n, 2, 2, 1), np.uint8)
    augmentation = Augmentation(mixing="mixup", mixing_probability=0.3)
    mixed, soft = augment.augment_pairs(augmentation, keys_of(n), images, labels, images + 255, labels + 1, 2)
    stay = np.asarray(soft)[:, 0] == 1
    assert scipy.stats.binomtest(int((~stay).sum()), n, 0.3).pvalue > 1e-4
    assert not np.any(np.asarray(mixed)[stay]) and np.all(np.any(np.asarray(mixed)[~stay], axis=(1, 2, 3)))
    np.testing.assert_allclose(soft[:, 1], np.asarray(mixed)[:, 0, 0, 0], atol=1e-6)


# Refusals.


@pytest.mark.parametrize("field, value, rule", [
    ("shift", -1, "0 (none) or above"), ("shift", 1.5, "whole number"), ("shift", True, "whole number"),
    ("cutout", -2, "0 (none) or above"), ("cutout", "4", "whole number"), ("flip", 0.5, "True or False"),
    ("mixing", "cutmixx", 'did you mean "cutmix"?'), ("mixing_alpha", 0.0, "above 0"), ("mixing_alpha", float("inf"), "above"),
    ("mixing_alpha", "1", "a number"), ("mixing_probability", 1.1, "in [0, 1]"), ("mixing_probability", float("nan"), "[0, 1]"),
])
def test_bad_options_are_refused(field, value, rule):
    assert_input_error(lambda: Augmentation(**{field: value}), f"{field} is ", str(value), rule)


def test_a_cutout_larger_than_the_image_is_refused():
    augment.augment(Augmentation(cutout=5), keys_of(2), images_of(2))
    assert_input_error(
        lambda: augment.augment(Augmentation(cutout=6), keys_of(2), images_of(2)), "cutout is 6", "at most 5")


def test_what_mixes():
    assert Augmentation(mixing="mixup").mixes and Augmentation(mixing="cutmix", mixing_probability=0.1).mixes
    assert not Augmentation(cutout=2).mixes and not Augmentation(mixing="cutmix", mixing_probability=0.0).mixes


def test_keys_images_and_partners_must_match():
    augmentation, (keys, images, labels, partners, partner_labels) = EVERYTHING["mixup"], pairs_of(4)
    for wrong in ((keys[:3], images), (keys[0], images), (keys, images[0])):
        with pytest.raises(AssertionError):
            augment.augment(augmentation, *wrong)
    for wrong in ((images, labels, partners[:3], partner_labels), (images, labels, partners, partner_labels[:3]),
                  (images, labels[:3], partners, partner_labels)):
        with pytest.raises(AssertionError):
            augment.augment_pairs(augmentation, keys, *wrong, CLASSES)
    assert_input_error(
        lambda: augment.augment_pairs(
            augmentation, keys, images, labels, augment.to_float(partners), partner_labels, CLASSES),
        "partners have dtype float32", "uint8")
