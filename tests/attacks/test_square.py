"""Square: step by step what the paper says, inside the threat model, each point on its own and only until it has fallen."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrd import ThreatModel, objectives
from jaxrd.attacks.network import as_network
from jaxrd.attacks.search import Run, batch_sizes, run_search
from jaxrd.attacks.square import Square, pattern, square, uniforms, window_sizes
from jaxrd.threat import example_keys
from jaxrd.training.parallel import data_mesh
from tests.support import assert_input_error

BATCH, SHAPE, CLASSES = 14, (6, 6, 2), 4  # so many points are batched in one size only: fewer programs to compile
KEY = jax.random.key(3)
KEYS = example_keys(KEY, BATCH)
QUERIES, LONGER = 52, 104  # the longer is two chunks of 52, between which points leave the batch
THREATS = {"linf": ThreatModel("linf", 0.05), "l2": ThreatModel("l2", 0.4)}

each_norm = pytest.mark.parametrize("norm", ["linf", "l2"])


def images_of(shape, batch=BATCH, bounds=(0.0, 1.0)):
    return np.random.default_rng(batch).uniform(*bounds, size=(batch, *shape)).astype(np.float32)


@functools.cache
def weights(shape):
    generator, size = np.random.default_rng(1), int(np.prod(shape))
    return (generator.normal(size=(size, 16)) / np.sqrt(size) * 3).astype(np.float32), generator.normal(
        size=(16, CLASSES)).astype(np.float32)


@functools.cache
def network(shape):
    """A small network, and the same in NumPy."""
    hidden, out = weights(shape)
    return (lambda images: jnp.tanh((images.reshape(len(images), -1) - 0.5) @ hidden) @ out,
            lambda image: np.tanh((image.ravel().astype(np.float64) - 0.5) @ hidden) @ out)


logits_fn, _ = network(SHAPE)
IMAGES = images_of(SHAPE)
LABELS = np.asarray(jnp.argmax(logits_fn(IMAGES), axis=-1))


@functools.cache
def attacked(norm, queries=QUERIES, **arguments):
    return square(KEY, logits_fn, IMAGES, LABELS, threat=THREATS[norm], queries=queries, **arguments)


def assert_same(result, other, atol=1e-6):
    np.testing.assert_array_equal(result.fooled, other.fooled)
    np.testing.assert_allclose(result.images, other.images, atol=atol)
    np.testing.assert_allclose(result.loss, other.loss, atol=10 * atol)


# One image after the other, in NumPy, in the words of the paper and with the quirks of the official code.


def window_at(iteration, norm, height, width):
    share = 0.8
    for last in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000):
        share = share / 2 if iteration > last else share
    size = round(np.sqrt(share * height * width))
    if norm == "linf":
        return min(max(size, 1), height, width)
    size = max(size, 3)
    size = size + 1 if size % 2 == 0 else size
    while size > min(height, width):
        size -= 2
    return size


@functools.cache
def two_pyramids(size):
    halves = []
    for height, sign in ((size // 2, 1), (size - size // 2, -1)):
        half = np.zeros((height, size))
        row, column = height // 2, size // 2
        for k in range(max(row, column) + 1):
            half[max(row - k, 0):row + k + 1, max(column - k, 0):column + k + 1] += 1 / (k + 1) ** 2
        halves.append(sign * half / np.linalg.norm(half) if height else half)
    return np.concatenate(halves) / np.linalg.norm(np.concatenate(halves))


def sign(number):
    return -1 if number < 0.5 else 1


def tiles_by_hand(height, width):
    """Returns the side of the tiles that L2 starts from, and their corners."""
    size = max(min(height, width) // 5, 1)
    rows, columns = (
        [first for tile in range(side // size) if (first := max((side - size * 5) // 2, 0) + tile * size) + size <= side]
        for side in (height, width))
    return size, [(row, column) for row in rows for column in columns]


def start_by_hand(norm, epsilon, image, numbers):
    height, width, channels = image.shape
    if norm == "linf":
        stripes = np.where(numbers < 0.5, -1, 1).reshape(1, width, channels)
        return image + np.float32(epsilon) * stripes.astype(np.float32)
    (size, corners), numbers, delta = tiles_by_hand(height, width), iter(numbers), np.zeros(image.shape)
    for row, column in corners:
        eta = two_pyramids(size) if next(numbers) < 0.5 else two_pyramids(size).T
        for channel in range(channels):
            delta[row:row + size, column:column + size, channel] = eta * sign(next(numbers))
    return image + epsilon * delta / np.linalg.norm(delta)


def proposal_by_hand(norm, epsilon, image, point, size, numbers):
    height, width, channels = image.shape

    def window(row, column):
        row, column = int(row * (height - size)), int(column * (width - size))
        return slice(row, row + size), slice(column, column + size)

    if norm == "linf":
        moved, epsilon = point.copy(), np.float32(epsilon)
        for channel in range(channels):
            moved[(*window(*numbers[:2]), channel)] += 2 * epsilon * sign(numbers[2 + channel])
        return np.clip(moved, image - epsilon, image + epsilon)
    delta = point.astype(np.float64) - image
    first, second, signs = window(*numbers[0:2]), window(*numbers[2:4]), numbers[5:]
    eta = two_pyramids(size) if numbers[4] < 0.5 else two_pyramids(size).T
    union = np.zeros((height, width), bool)
    union[first] = union[second] = True
    unused, gathered = max(epsilon**2 - np.sum(delta**2), 0) / channels, np.sum(delta[union] ** 2)
    new = []
    for channel in range(channels):
        old = delta[..., channel][first]
        mixed = eta * sign(signs[channel]) + old / (1e-12 + np.linalg.norm(old))
        new.append(mixed / (1e-12 + np.linalg.norm(mixed)) * np.sqrt(unused + gathered))
    delta[second] = 0
    delta[first] = np.stack(new, axis=-1)
    return image + epsilon * delta / (1e-12 + np.linalg.norm(delta))


def attack_by_hand(norm, threat, image, label, logits, first_numbers, step_numbers):
    """Returns (point, largest margin, queries until success or None)."""

    def margin(point):  # the official sign: success at 0 or below
        values = logits(point)
        return values[label] - np.max(np.delete(values, label))

    def inside(point):
        return np.clip(point, *threat.bounds).astype(np.float32)

    point = inside(start_by_hand(norm, threat.epsilon, image, first_numbers))
    least = margin(point)
    for iteration, numbers in enumerate(step_numbers):
        if least <= 0:
            return point, -least, iteration
        size = window_at(iteration, norm, *image.shape[:2])
        tried = inside(proposal_by_hand(norm, threat.epsilon, image, point, size, numbers))
        found = margin(tried)
        if found < least or found <= 0:
            point, least = tried, found
    return point, -least, None if least > 0 else len(step_numbers)


@pytest.mark.parametrize("norm, shape, threat, queries", [
    ("linf", (7, 7, 3), ThreatModel("linf", 0.06), 205),
    ("linf", (6, 9, 1), ThreatModel("linf", 0.1, (-0.5, 1.0)), 205),
    ("l2", (12, 12, 1), ThreatModel("l2", 0.7), 205),
    ("l2", (10, 7, 3), ThreatModel("l2", 1.2, (-0.5, 1.0)), 205),
    ("l2", (4, 11, 1), ThreatModel("l2", 0.3), 60)])
def test_every_point_goes_the_way_of_the_algorithm_by_hand(norm, shape, threat, queries):
    batch, channels = 8, shape[2]
    function, logits = network(shape)
    images = images_of(shape, batch, threat.bounds)
    labels = np.asarray(jnp.argmax(function(images), axis=-1))
    keys = example_keys(KEY, batch)
    (found,) = run_search(Square(queries), as_network(function, images), {"images": images, "labels": labels}, keys,
                          np.arange(batch), threat, sizes=[batch])

    @jax.jit
    def numbers(keys):
        of_steps = jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(queries + 1)))(keys)
        return uniforms(of_steps[:, 0], counts[0]), jax.vmap(lambda keys: uniforms(keys, counts[1]))(of_steps[:, 1:])

    counts = (shape[1] * channels, 2 + channels) if norm == "linf" else (
        len(tiles_by_hand(*shape[:2])[1]) * (1 + channels), 5 + channels)
    took, (first, steps) = [], map(np.asarray, numbers(keys))
    for index in range(batch):
        point, margin, queried = attack_by_hand(
            norm, threat, images[index], labels[index], logits, first[index], steps[index])
        took.append(queried)
        assert bool(found.fooled[index]) == (queried is not None)
        np.testing.assert_allclose(found.images[index], point, atol=2e-6 if norm == "linf" else 1e-4)
        np.testing.assert_allclose(found.loss[index], margin, atol=1e-4)
    # Some fall early, some late, some never: windows of three or four sizes have been seen.
    assert None in took and any(queried is not None and queried > 10 for queried in took)


@pytest.mark.parametrize("norm, side, expected", [
    ("linf", 32, [29, 20, 14, 10, 7, 5, 4, 3]), ("l2", 32, [29, 21, 15, 11, 7, 5, 5, 3]),
    ("linf", 8, [7, 5, 4, 3, 2, 1, 1, 1]), ("l2", 8, [7, 5, 5, 3, 3, 3, 3, 3])])
def test_windows_shrink_by_the_published_table(norm, side, expected):
    sizes, rows = np.array(window_sizes(norm, side, side)), Square(5000).rows()
    used = sizes[rows["halvings"]]
    assert [used[0], *(used[at] for at in (11, 51, 201, 501, 1001, 2001, 4001))] == expected
    assert [used[at] for at in (10, 50, 200, 500, 1000, 2000, 4000, 4999)] == expected
    np.testing.assert_array_equal(rows["step"], np.arange(1, 5001))
    assert all(np.diff(used) <= 0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("height, width", [(1, 1), (1, 9), (2, 5), (4, 4), (3, 40), (32, 8), (224, 224)])
def test_windows_fit_any_image(norm, height, width):
    sizes = window_sizes(norm, height, width)
    assert sizes == tuple(window_at(iteration, norm, height, width)
                          for iteration in (0, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001))
    assert all(1 <= size <= min(height, width) for size in sizes)


def test_patterns_are_two_pyramids_of_opposite_sign():
    # By hand: above, one row of 1/4, 1 + 1/4, 1/4; below, the same and a row of 1/4 over it, negated.
    above, below = np.array([[1, 5, 1]]) / 27**0.5, np.array([[1, 1, 1], [1, 5, 1]]) / 30**0.5
    np.testing.assert_allclose(pattern(3), np.concatenate([above, -below]) / 2**0.5, rtol=1e-6)
    assert abs(pattern(1)) == 1
    for size in range(1, 30):
        np.testing.assert_allclose(pattern(size), two_pyramids(size), atol=1e-6)


@functools.cache
def started(norm):
    """The points that Square begins with, in the box's middle and all over it."""
    result = []
    for images in (0.4 + 0.2 * IMAGES, IMAGES):
        batch = {"images": jnp.asarray(images), "labels": jnp.asarray(LABELS), "key": KEYS}
        state = jax.jit(lambda batch: Square().start(as_network(logits_fn, IMAGES), batch, THREATS[norm]))(batch)
        result.append((images, np.asarray(state["points"])))
    return result


def test_the_linf_start_is_stripes_of_epsilon():
    (middle, points), (images, clipped) = started("linf")
    stripes = (points - middle) / 0.05
    np.testing.assert_allclose(np.abs(stripes), 1, atol=1e-5)
    np.testing.assert_allclose(stripes, np.repeat(stripes[:, :1], SHAPE[0], axis=1), atol=1e-5)
    signs = np.sign(stripes[:, 0])
    assert abs(signs.mean()) < 0.2 and len(np.unique(signs.reshape(BATCH, -1), axis=0)) > 0.9 * BATCH
    np.testing.assert_allclose(clipped, np.clip(images + 0.05 * np.sign(stripes), 0, 1), atol=1e-6)


def test_the_l2_start_has_length_epsilon_before_it_is_clipped():
    (middle, points), (images, clipped) = started("l2")
    np.testing.assert_allclose(THREATS["l2"].distance(middle, points), 0.4, rtol=1e-5)
    np.testing.assert_allclose(clipped, np.clip(images + (points - middle), 0, 1), atol=1e-6)


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(
    shape=st.sampled_from([(4, 4, 1), (3, 7, 2)]), norm=st.sampled_from(["linf", "l2"]),
    epsilon=st.floats(1e-4, 1.0), seed=st.integers(0, 2**31 - 1), extreme=st.booleans())
def test_every_point_is_in_ball_and_box(shape, norm, epsilon, seed, extreme):
    images = np.random.default_rng(seed).uniform(size=(4, *shape)).astype(np.float32)
    images = np.round(images) if extreme else images
    function, threat = network(shape)[0], ThreatModel(norm, epsilon)
    labels = np.asarray(jnp.argmax(function(images), axis=-1))
    points = {"images": images, "labels": labels}
    (found,) = run_search(Square(15), as_network(function, images), points, jax.random.split(jax.random.key(seed), 4),
                          np.arange(4), threat, sizes=[4])
    assert threat.distance(images, found.images).max() <= epsilon + 1e-6
    assert found.images.min() >= 0 and found.images.max() <= 1
    np.testing.assert_array_equal(found.fooled, jnp.argmax(function(found.images), axis=-1) != labels)


@each_norm
def test_what_is_fooled_is_misclassified_inside_the_threat_model_and_nothing_else_is_touched(norm):
    result, threat = attacked(norm), THREATS[norm]
    assert 0.2 < result.fooled.mean() < 0.9
    predictions = jnp.argmax(logits_fn(result.images), axis=-1)
    np.testing.assert_array_equal(predictions != LABELS, result.fooled)
    np.testing.assert_array_equal(result.images[~result.fooled], IMAGES[~result.fooled])
    assert threat.distance(IMAGES, result.images).max() <= threat.epsilon + 1e-6
    margins = objectives.margin(logits_fn(result.images), jnp.asarray(LABELS))
    np.testing.assert_allclose(result.loss[result.fooled], margins[result.fooled], atol=1e-5)
    assert (result.loss > 0).tolist() == result.fooled.tolist()
    assert (result.loss >= margins - 1e-5).all()


@each_norm
def test_misclassified_images_are_left_alone(norm):
    labels = np.where(np.arange(BATCH) % 2, LABELS, (LABELS + 1) % CLASSES)
    result = square(KEY, logits_fn, IMAGES, labels, threat=THREATS[norm], queries=QUERIES)
    wrong = np.arange(BATCH) % 2 == 0
    assert result.fooled[wrong].all()
    np.testing.assert_array_equal(result.images[wrong], IMAGES[wrong])
    np.testing.assert_allclose(
        result.loss[wrong], objectives.margin(logits_fn(IMAGES), jnp.asarray(labels))[wrong], atol=1e-5)
    # And the others do not notice.
    np.testing.assert_array_equal(result.fooled[~wrong], attacked(norm).fooled[~wrong])
    np.testing.assert_allclose(result.images[~wrong], attacked(norm).images[~wrong], atol=1e-6)


@each_norm
def test_more_queries_go_on_where_fewer_ended(norm):
    shorter, longer = attacked(norm), attacked(norm, LONGER)
    assert longer.fooled.sum() > shorter.fooled.sum() and longer.fooled[shorter.fooled].all()
    assert (longer.loss >= shorter.loss).all() and (longer.loss > shorter.loss)[~shorter.fooled].any()
    np.testing.assert_array_equal(longer.images[shorter.fooled], shorter.images[shorter.fooled])
    np.testing.assert_array_equal(longer.loss[shorter.fooled], shorter.loss[shorter.fooled])


@each_norm
def test_restarts_draw_anew_and_keep_what_was_found(norm):
    once, twice = attacked(norm), attacked(norm, restarts=2)
    assert twice.fooled[once.fooled].all() and twice.fooled.sum() > once.fooled.sum()
    np.testing.assert_array_equal(twice.images[once.fooled], once.images[once.fooled])
    assert (twice.loss >= once.loss).all()


@each_norm
def test_a_point_is_attacked_alike_in_any_company(norm):
    part = np.array([12, 5, 9, 3, 10, 7, 1, 8])
    alone = square(KEYS[part], logits_fn, IMAGES[part], LABELS[part], threat=THREATS[norm], queries=QUERIES)
    whole = attacked(norm)
    assert 0 < alone.fooled.sum() < len(part)
    assert_same(alone, whole._replace(images=whole.images[part], fooled=whole.fooled[part], loss=whole.loss[part]))


def searched(norm, images=IMAGES, labels=LABELS, function=logits_fn, sizes=(BATCH,), mesh=None, queries=LONGER):
    points = {"images": images, "labels": labels}
    (found,) = run_search(Square(queries), as_network(function, images), points, Run(Square()).keys(KEYS),
                          np.arange(len(images)), THREATS[norm], sizes=sizes, mesh=mesh)
    return found


@each_norm
def test_batches_that_shrink_and_four_devices_change_nothing(norm):
    whole = searched(norm)
    shrunk = searched(norm, sizes=(BATCH, 11))
    assert shrunk.forwards < whole.forwards
    assert_same(shrunk, whole)
    assert_same(searched(norm, sizes=batch_sizes(BATCH, 4)[:1], mesh=data_mesh()), whole)


def linear_problem(norm):
    """A linear classifier and images that all lie as far from its boundary, which is returned too."""
    generator = np.random.default_rng(2)
    direction = generator.normal(size=int(np.prod(SHAPE))).astype(np.float32)
    noise = generator.uniform(-0.1, 0.1, size=(BATCH, direction.size))
    noise -= np.outer(noise @ direction - 0.2, direction) / (direction @ direction)
    images = (0.5 + noise).astype(np.float32).reshape(BATCH, *SHAPE)

    def function(images):
        score = (images.reshape(len(images), -1) - 0.5) @ direction
        return jnp.stack([score, jnp.zeros_like(score)], axis=-1)

    return function, images, 0.2 / np.sum(np.abs(direction)) if norm == "linf" else 0.2 / np.linalg.norm(direction)


@each_norm
def test_a_linear_classifier_falls_above_its_exact_radius_only(norm):
    function, images, radius = linear_problem(norm)
    labels = np.zeros(BATCH, np.int32)

    def fooled(epsilon):
        return square(KEY, function, images, labels, threat=ThreatModel(norm, epsilon), queries=400).fooled

    assert not fooled(0.999 * radius).any()
    assert fooled(4 * radius).all()


def test_points_that_fall_at_once_cost_one_pass():
    def brittle(images):  # class 0 at 0.7 exactly and from far away
        distance = jnp.max(jnp.abs(images - 0.7), axis=(1, 2, 3))
        fallen, in_stripes = (distance > 1e-3) & (distance < 0.25), images[:, 0, 0, 0] == images[:, -1, 0, 0]
        label = jnp.where(fallen, jnp.where(in_stripes, -1.0, jnp.nan), 1.0)
        return jnp.stack([label, jnp.zeros(len(images))], axis=-1)

    hard, labels = np.arange(BATCH) % 4 == 3, np.zeros(BATCH, np.int32)
    images = np.where(hard[:, None, None, None], np.float32(0.3), np.full((BATCH, *SHAPE), np.float32(0.7)))
    found = searched("linf", images, labels, brittle, sizes=(BATCH, 5))
    np.testing.assert_array_equal(found.fooled, ~hard)
    assert (found.forwards, found.backwards) == (BATCH + LONGER * hard.sum(), 0)
    # Nor does it matter what the network says about points after they have fallen, where the batch is too small to shrink.
    np.testing.assert_array_equal(searched("linf", images, labels, brittle).fooled, ~hard)
    images[hard] = 0.7
    easy = searched("linf", images, labels, brittle, sizes=(BATCH, 5))
    assert easy.fooled.all() and easy.forwards == BATCH


def test_a_point_that_has_fallen_does_not_move_with_those_that_have_not():
    """Stepped further in one batch, without compaction."""
    once, twice = searched("linf", queries=QUERIES), searched("linf")
    assert 0 < once.fooled.sum() < twice.fooled.sum() < BATCH
    np.testing.assert_array_equal(once.images[once.fooled], twice.images[once.fooled])


def test_logits_that_never_change_fool_nobody_who_is_not_fooled():
    """All margins are 0; the argmax is class 0, and that is what counts."""
    def constant(images):
        return jnp.zeros((len(images), CLASSES))

    labels = np.arange(BATCH) % 2
    result = square(KEY, constant, IMAGES, labels, threat=THREATS["linf"], queries=QUERIES)
    np.testing.assert_array_equal(result.fooled, labels == 1)
    np.testing.assert_array_equal(result.images, IMAGES)
    np.testing.assert_array_equal(result.loss, np.zeros(BATCH))
    # Nothing is better than the start, so nothing replaces its stripes.
    moved = searched("linf", np.full_like(IMAGES, 0.5), 0 * labels, constant, queries=QUERIES).images
    np.testing.assert_array_equal(moved, np.repeat(moved[:, :1], SHAPE[0], axis=1))


def test_a_point_that_is_wrong_at_a_tie_is_taken():
    """The margin is 0 throughout, and only the argmax tells the two kinds of tie apart."""
    def tied(images):  # class 1 first, until three pixels have been raised
        raised = jnp.all(images[:, 2, 1:4, 0] > 0.5, axis=1)
        return jnp.stack([jnp.where(raised, 0.0, -1.0), jnp.zeros(len(images)), jnp.zeros(len(images))], axis=-1)

    images, labels = np.full_like(IMAGES, 0.5), np.ones(BATCH, np.int32)
    result = square(KEY, tied, images, labels, threat=THREATS["linf"], queries=QUERIES)
    assert result.fooled.sum() > BATCH / 2
    np.testing.assert_array_equal(jnp.argmax(tied(result.images), axis=-1) == 0, result.fooled)


def test_a_network_of_steps_is_fooled_though_it_has_no_gradient():
    def quantised(images):
        return jnp.round(2 * logits_fn(images))

    labels = np.asarray(jnp.argmax(quantised(IMAGES), axis=-1))
    result = square(KEY, quantised, IMAGES, labels, threat=THREATS["linf"], queries=QUERIES)
    assert 0.2 < result.fooled.mean() < 1
    np.testing.assert_array_equal(jnp.argmax(quantised(result.images), axis=-1) != labels, result.fooled)
    # At a tie, the search goes on until the argmax is wrong.
    assert (result.loss[~result.fooled] <= 0).all() and (result.loss[result.fooled] >= 0).all()
    assert (result.loss == 0).any()


def test_a_randomised_network_gets_another_key_with_every_query():
    def lucky(images, key):  # wrong once in 20 queries, whatever the image
        return jnp.full((len(images), 1), jax.random.uniform(key)) * jnp.array([0.0, 1.0]) + jnp.array([0.95, 0.0])

    result = square(KEY, lucky, IMAGES, np.zeros(BATCH, np.int32), threat=THREATS["linf"], queries=QUERIES)
    assert result.fooled.mean() > 0.6


@each_norm
def test_traced_is_eager(norm):
    @jax.jit
    def traced(threat, images):
        return square(KEY, logits_fn, images, LABELS, threat=threat, queries=QUERIES)

    assert_same(traced(THREATS[norm], IMAGES), attacked(norm))


HALVES = np.where(np.arange(BATCH)[:, None, None, None] % 2, np.float32(0.2), np.full_like(IMAGES, 0.5))


def broken(images):
    """NaN for one half of HALVES where they are moved, for the other where they have left the stripes of the start."""
    corner = images[:, 0, 0, 0]
    bad = (corner != images[:, -1, 0, 0]) | (corner < 0.3) & (corner != 0.2)
    return jnp.stack([jnp.where(bad, jnp.nan, 1.0), jnp.zeros(len(images))], axis=-1)


@pytest.mark.parametrize("changed, mentions", [
    ({"queries": 0}, ["square queries is 0", "at least 1"]),
    ({"queries": 1e3}, ["square queries is 1000.0", "whole number"]),
    ({"restarts": 0}, ["square restarts is 0", "at least 1"]),
    ({"images": 255 * IMAGES}, ["outside (0.0, 1.0)", "divide 0..255 by 255"]),
    ({"images": IMAGES[0]}, ["[batch, height, width, channel]"]),
    ({"labels": LABELS + CLASSES}, ["labels reach", f"from 0 to {CLASSES - 1}"]),
    ({"labels": LABELS[1:]}, ["labels are", f"{BATCH} images"]),
    ({"key": jax.random.PRNGKey(0)}, ["raw uint32", "jax.random.key(0)"]),
    ({"logits_fn": broken, "images": HALVES, "labels": 0 * LABELS}, ["14 of the 14 images", "not finite", "check"])])
def test_bad_input_is_one_line(changed, mentions):
    arguments = {"key": KEY, "logits_fn": logits_fn, "images": IMAGES, "labels": LABELS, "threat": THREATS["linf"]} | changed
    assert_input_error(lambda: square(**{"queries": QUERIES} | arguments), *mentions)
