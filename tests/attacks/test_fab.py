"""FAB: the nearest boundary of linear classifiers, the steps that a plain re-derivation takes, and what every attack keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrd import ThreatModel
from jaxrd.attacks.fab import Fab, fab
from jaxrd.attacks.network import as_network
from jaxrd.attacks.search import Run, run_search
from jaxrd.threat import example_keys
from tests.support import assert_input_error

BATCH, SHAPE, CLASSES, STEPS = 12, (6, 6, 2), 10, 24
SIZE = int(np.prod(SHAPE))
GENERATOR = np.random.default_rng(0)
# A third of the pixels on the border of the box, as in photographs.
IMAGES = jnp.asarray(np.clip(GENERATOR.uniform(-0.25, 1.25, (BATCH, *SHAPE)), 0, 1), jnp.float32)
MIDDLE = jnp.asarray(GENERATOR.uniform(0.4, 0.6, (BATCH, *SHAPE)), jnp.float32)  # the box is out of the way
HIDDEN = jnp.asarray(GENERATOR.normal(size=(SIZE, 16)) / 4, jnp.float32)
OUT = jnp.asarray(GENERATOR.normal(size=(16, CLASSES)), jnp.float32)
# Every class looks at fewer pixels than the one before, and harder: which boundary is the nearest depends on the norm.
PIXELS = np.linspace(SIZE, 8, CLASSES).astype(int)
WEIGHTS = np.where(np.arange(SIZE)[:, None] < PIXELS, GENERATOR.normal(size=(SIZE, CLASSES)) * (SIZE / PIXELS) ** 0.75, 0)
WEIGHTS = jnp.asarray(np.where(WEIGHTS, WEIGHTS - WEIGHTS.sum(0) / PIXELS, 0), jnp.float32)
KEY = jax.random.key(0)
THREATS = {"linf": ThreatModel("linf", 0.03), "l2": ThreatModel("l2", 0.2)}
DUAL = {"linf": 1, "l2": 2}

each_norm = pytest.mark.parametrize("norm", ["linf", "l2"])
targeted_or_not = pytest.mark.parametrize("targets", [0, 3])


def curved(images):
    return jnp.tanh(images.reshape(len(images), -1) @ HIDDEN) @ OUT


def linear(images):
    return images.reshape(len(images), -1) @ WEIGHTS


def linear_in_two(images):
    return linear(images)[:, :2]


def top(logits_fn, images):
    return jnp.argmax(logits_fn(images), axis=-1)


LABELS = top(curved, IMAGES).at[4].set((top(curved, IMAGES)[4] + 1) % CLASSES)  # the fifth is misclassified as it is


@functools.cache
def attacked(norm, targets=0, restarts=1, steps=STEPS):
    return fab(KEY, curved, IMAGES, LABELS, threat=THREATS[norm], targets=targets, restarts=restarts, steps=steps)


def boundary_distances(logits_fn, norm, images, labels):
    """The distance of every image to its boundary with every class, for a linear function, [batch, classes]."""
    logits = np.asarray(logits_fn(images), float)
    weights = np.asarray(WEIGHTS, float)[:, :logits.shape[1]]
    rows = np.arange(len(labels))
    gaps = logits[rows, labels][:, None] - logits
    normals = weights[None] - weights.T[labels][:, :, None]
    distances = gaps / np.maximum(np.linalg.norm(normals, DUAL[norm], axis=1), 1e-12)
    distances[rows, labels] = np.inf
    return distances


def overshoot(steps):
    """The least distance that FAB finds where the distance to a plane is 1: its recurrence on the line from image to plane."""
    at, least = 0.0, np.inf
    for _ in range(steps):
        to_plane = abs(1 - at)
        weight = min(to_plane / (to_plane + 1), 0.1)
        at = (1 - weight) * (at + 1.05 * (1 - at)) + weight * 1.05
        if at > 1:
            least, at = min(least, at), 0.9 * at
    return least


@each_norm
@pytest.mark.parametrize("logits_fn, how", [
    (linear, "nearest"), (linear, "given"), (linear, "most likely"), (linear_in_two, "most likely")])
def test_on_a_linear_classifier_distances_and_robust_accuracy_are_the_exact_ones(logits_fn, how, norm):
    labels = top(logits_fn, MIDDLE)
    exact = boundary_distances(logits_fn, norm, MIDDLE, labels)
    least = exact.min(axis=1)
    given = {"nearest": {}, "given": {"target": jnp.argmin(exact, axis=1)}, "most likely": {"targets": 9}}[how]
    assert 1 < overshoot(STEPS) < 1.006
    for search, factor in ((20, 1.0), (0, overshoot(STEPS))):
        # Not within the 0.6 % beyond an image's distance by which FAB overshoots without its final search.
        for radius in [0.5 * least.min(), *(np.sort(least)[[2, 5, 8]] * 1.0065), 1.1 * least.max()]:
            result = fab(
                KEY, logits_fn, MIDDLE, labels, threat=ThreatModel(norm, radius), steps=STEPS, final_search=search, **given)
            np.testing.assert_allclose(-result.loss, factor * least, rtol=2e-5, atol=1.5e-7)
            np.testing.assert_array_equal(result.fooled, least <= radius)
            inside = np.asarray(result.fooled)
            found = ThreatModel(norm, 1.0).distance(MIDDLE, result.images)
            np.testing.assert_allclose(found[inside], factor * least[inside], rtol=2e-5, atol=1.5e-7)


class Reference:
    """FAB's steps in float64, from the paper, on `curved`: the gradient by hand, the projections by bisection."""

    def __init__(self, norm, target, start):
        self.norm, self.target = norm, target
        self.hidden, self.out = np.asarray(HIDDEN, float), np.asarray(OUT, float)
        self.images, self.labels = np.asarray(IMAGES, float).reshape(BATCH, -1), np.asarray(LABELS)
        self.points = np.asarray(start, float).reshape(BATCH, -1)
        self.nearest, self.distance = self.images.copy(), np.full(BATCH, np.inf)

    def logits(self, point):
        return np.tanh(point @ self.hidden) @ self.out

    def project(self, point, normal, offset):
        if normal @ point < offset:
            normal, offset = -normal, -offset
        room = np.where(normal > 0, point, 1 - point) * (normal != 0)
        rate = np.abs(normal) if self.norm == "l2" else 1.0
        low, high = 0.0, 1e3
        for _ in range(200):
            middle = (low + high) / 2
            short = np.abs(normal) @ np.minimum(middle * rate, room) < normal @ point - offset
            low, high = (middle, high) if short else (low, middle)
        return -np.sign(normal) * np.minimum(high * rate, room)

    def length(self, d):
        return np.abs(d).max() if self.norm == "linf" else np.sqrt(d @ d)

    def step(self):
        for i, (image, label) in enumerate(zip(self.images, self.labels)):
            point = self.points[i]
            slope = 1 - np.tanh(point @ self.hidden) ** 2
            gaps = self.logits(point) - self.logits(point)[label]
            normals = (self.hidden * slope) @ (self.out - self.out[:, [label]])
            if self.target is None:
                ratios = [np.inf if c == label else abs(gaps[c]) / np.linalg.norm(normals[:, c], DUAL[self.norm])
                          for c in range(CLASSES)]
                towards = int(np.argmin(ratios))
            else:
                towards = self.target[i]
            normal = normals[:, towards]
            offset = normal @ point - gaps[towards]
            d1, d2 = self.project(point, normal, offset), self.project(image, normal, offset)
            a1, a2 = max(self.length(d1), 1e-8), max(self.length(d2), 1e-8)
            weight = min(a1 / (a1 + a2), 0.1)
            point = np.clip((point + 1.05 * d1) * (1 - weight) + (image + 1.05 * d2) * weight, 0, 1)
            if np.argmax(self.logits(point)) != label:
                if self.length(point - image) < self.distance[i]:
                    self.distance[i], self.nearest[i] = self.length(point - image), point
                point = image + 0.9 * (point - image)
            self.points[i] = point


@functools.cache
def started(norm, targeted, restart=0):
    """The network, the search's state at the start and its compiled step."""
    network = as_network(curved, IMAGES)
    search = Fab(targeted=targeted, steps=STEPS, classes=CLASSES)
    batch = {"images": IMAGES, "labels": LABELS, "key": example_keys(KEY, BATCH), "rank": jnp.full(BATCH, 2),
             "restart": jnp.full(BATCH, restart)}
    start, step = jax.jit(search.start), jax.jit(search.step)
    return start(network, batch, THREATS[norm]), lambda state, row: step(network, state, row, THREATS[norm])


@each_norm
@pytest.mark.parametrize("targeted, restart", [(False, 0), (True, 0), (True, 1)])
def test_every_iterate_is_the_one_of_a_plain_rederivation(targeted, restart, norm):
    state, step = started(norm, targeted, restart)
    order = np.argsort(-np.asarray(curved(IMAGES)), axis=1)
    reference = Reference(norm, order[:, 1] if targeted else None, state["points"])
    if restart == 0:
        np.testing.assert_array_equal(state["points"], IMAGES)
    for row in range(1, 11):
        state = step(state, row)
        reference.step()
        np.testing.assert_allclose(state["points"].reshape(BATCH, -1), reference.points, atol=3e-5)
        np.testing.assert_allclose(state["distance"], reference.distance, rtol=2e-4)
        np.testing.assert_allclose(state["nearest"].reshape(BATCH, -1), reference.nearest, atol=3e-5)
    assert np.isfinite(reference.distance).sum() > BATCH / 2  # the adversarial branch was taken


@each_norm
def test_a_restart_begins_half_a_radius_away_in_the_box(norm):
    threat = ThreatModel(norm, 0.05, (0.1, 0.9))
    network = as_network(curved, MIDDLE)
    batch = {"images": MIDDLE, "labels": LABELS, "key": example_keys(KEY, BATCH), "restart": jnp.arange(BATCH) % 3}
    points = Fab(False, STEPS, CLASSES).start(network, batch, threat)["points"]
    np.testing.assert_allclose(threat.distance(MIDDLE, points), np.where(batch["restart"] > 0, 0.025, 0), rtol=1e-4)
    assert len(np.unique(np.round(points - MIDDLE, 6)[batch["restart"] > 0][:, 0, 0, 0])) == 8
    border = jnp.where(MIDDLE > 0.5, 0.9, 0.1)
    points = Fab(False, STEPS, CLASSES).start(network, batch | {"images": border}, threat)["points"]
    assert points.min() >= 0.1 and points.max() <= 0.9 and (points != border)[1].any()


@each_norm
@targeted_or_not
def test_what_is_fooled_is_a_misclassified_image_in_ball_and_box_and_the_rest_is_unchanged(targets, norm):
    threat, result = THREATS[norm], attacked(norm, targets)
    wrong = np.asarray(top(curved, result.images) != LABELS)
    clean_wrong = np.asarray(top(curved, IMAGES) != LABELS)
    np.testing.assert_array_equal(result.fooled, wrong)
    assert BATCH / 4 < wrong.sum() < BATCH and clean_wrong.sum() == 1
    distance = threat.distance(IMAGES, result.images)
    assert distance.max() <= threat.epsilon and result.images.min() >= 0 and result.images.max() <= 1
    kept = clean_wrong | ~wrong
    np.testing.assert_array_equal(result.images[kept], IMAGES[kept])
    np.testing.assert_array_equal(result.loss[clean_wrong], 0.0)
    found = wrong & ~clean_wrong
    np.testing.assert_allclose(-result.loss[found], distance[found], rtol=1e-5)
    assert (-result.loss[~wrong] > threat.epsilon).all()


@each_norm
def test_other_bounds_are_kept_and_met(norm):
    images = 0.3 + 0.4 * IMAGES
    labels = top(curved, images)
    threat = ThreatModel(norm, 0.39 if norm == "linf" else 3.0, (0.3, 0.7))
    result = fab(KEY, curved, images, labels, threat=threat, targets=1, steps=STEPS)
    assert result.fooled.sum() > BATCH / 2
    assert result.images.min() == jnp.float32(0.3) and result.images.max() == jnp.float32(0.7)


@each_norm
@targeted_or_not
def test_restarts_never_worsen(targets, norm):
    once, thrice = attacked(norm, targets), attacked(norm, targets, restarts=3)
    assert (thrice.loss >= once.loss).all()
    assert norm == "linf" or (thrice.loss > once.loss).any()  # here, all runs end alike in linf
    assert (thrice.fooled >= once.fooled).all()
    # The nearest of all runs is returned, and its distance is the one told.
    inside = np.asarray(once.fooled)
    distances = ThreatModel(norm, 1.0).distance(IMAGES, thrice.images)
    np.testing.assert_allclose(distances[inside], -thrice.loss[inside], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm, targets", [("linf", 0), ("l2", 3)])
def test_a_point_is_attacked_alike_in_any_company(targets, norm):
    expected, part = attacked(norm, targets, restarts=3), np.array([9, 4, 0, 7, 2])
    result = fab(example_keys(KEY, BATCH)[part], curved, IMAGES[part], LABELS[part], threat=THREATS[norm], targets=targets,
                 restarts=3, steps=STEPS)
    np.testing.assert_array_equal(result.fooled, expected.fooled[part])
    np.testing.assert_allclose(result.images, expected.images[part], atol=1e-4)
    np.testing.assert_allclose(result.loss, expected.loss[part], rtol=1e-3)


@pytest.mark.parametrize("norm, targets, restarts", [("linf", 3, 1), ("l2", 0, 3)])
def test_under_jit_the_result_is_the_same(norm, targets, restarts):
    attack = jax.jit(lambda threat, images: fab(
        KEY, curved, images, LABELS, threat=threat, targets=targets, restarts=restarts, steps=STEPS))
    expected, result = attacked(norm, targets, restarts), attack(THREATS[norm], IMAGES)
    np.testing.assert_array_equal(result.fooled, expected.fooled)
    np.testing.assert_allclose(result.images, expected.images, atol=1e-4)
    np.testing.assert_allclose(result.loss, expected.loss, rtol=1e-3)


def test_the_noise_of_a_randomised_function_follows_the_image():
    def noisy(images, key):
        return curved(images + 0.01 * jax.random.normal(key, (SIZE,)).reshape(1, *SHAPE))

    arguments, part = dict(threat=THREATS["l2"], targets=3, restarts=3, steps=STEPS), np.array([5, 1])
    expected = fab(KEY, noisy, IMAGES, LABELS, **arguments)
    result = fab(example_keys(KEY, BATCH)[part], noisy, IMAGES[part], LABELS[part], **arguments)
    np.testing.assert_allclose(result.loss, expected.loss[part], rtol=1e-3)
    assert (result.loss != attacked("l2", 3, restarts=3).loss[part]).all()


def test_without_any_gradient_nothing_is_found():
    labels = jnp.zeros(BATCH, int)
    result = fab(KEY, lambda images: 0 * curved(images), IMAGES, labels, threat=THREATS["l2"], steps=3, restarts=2)
    assert not result.fooled.any() and (result.loss == -np.inf).all()
    np.testing.assert_array_equal(result.images, IMAGES)


class Counter:
    """Images forwarded and differentiated by the function that it makes, as they are executed."""

    def __init__(self):
        self.forwards = self.backwards = 0

    def logits_fn(self):
        def count(name, images):
            setattr(self, name, getattr(self, name) + images)

        @jax.custom_vjp
        def tap(logits):
            jax.debug.callback(lambda _: count("forwards", len(logits)), logits[0, 0])
            return logits

        def forward(logits):
            return tap(logits), None

        def backward(_, cotangent):
            jax.debug.callback(lambda _: count("backwards", len(cotangent)), cotangent[0, 0])
            return (cotangent,)

        tap.defvjp(forward, backward)
        return lambda images: tap(linear(images))


@pytest.mark.parametrize("search, forwards, backwards", [
    (Fab(targeted=True, steps=3), 1 + 2 * 3, 3), (Fab(targeted=True, steps=3, target_known=True), 2 * 3, 3),
    (Fab(targeted=False, steps=3, classes=CLASSES), 2 * 3, 3 * CLASSES)])
def test_the_passes_that_are_counted_are_those_that_are_executed(search, forwards, backwards):
    counter, images = Counter(), np.asarray(MIDDLE)
    points = Run(search, 2, 1).points({"images": images, "labels": np.asarray(top(linear, MIDDLE), np.int32)})
    if search.target_known:
        points["target"] = (points["labels"] + 1) % CLASSES
    logits_fn = counter.logits_fn()
    network = as_network(logits_fn, images)
    found, = run_search(search, network, points, example_keys(KEY, BATCH), np.arange(BATCH), THREATS["l2"], sizes=[BATCH])
    jax.effects_barrier()
    assert (counter.forwards, counter.backwards) == (found.forwards, found.backwards) == (BATCH * forwards, BATCH * backwards)


@pytest.mark.parametrize("changed, mentions", [
    ({"steps": 0}, ["fab steps", "0"]),
    ({"restarts": 1.5}, ["fab restarts", "1.5"]),
    ({"targets": -1}, ["fab targets", "-1", "at least 0"]),
    ({"targets": 2, "target": (LABELS + 1) % CLASSES}, ["fab targets is 2", "target given"]),
    ({"target": LABELS[:3]}, ["fab target", "[3]", "[12]"]),
    ({"target": LABELS + 0.5}, ["fab target", "float32"]),
    ({"target": (LABELS + 1) % CLASSES - CLASSES}, ["fab target", "-", "10 classes", "0 to 9"]),
    ({"labels": LABELS[:3]}, ["labels", "[3]"]),
    ({"images": 255 * IMAGES}, ["divide 0..255 by 255"]),
    ({"logits_fn": lambda images: curved(images)[:, 0]}, ["logits_fn", "[batch, classes >= 2]"]),
])
def test_arguments_that_make_no_sense_are_answered_in_one_line(changed, mentions):
    arguments = {"logits_fn": curved, "images": IMAGES, "labels": LABELS} | changed
    assert_input_error(lambda: fab(KEY, threat=THREATS["linf"], **({"steps": STEPS} | arguments)), *mentions)


def test_logits_that_stop_being_finite_on_the_way_are_refused():
    def breaks(images):
        return curved(images) + jnp.where(jnp.all(images == jnp.round(images, 2), axis=(1, 2, 3)), 0, jnp.nan)[:, None]

    images = jnp.round(IMAGES, 2)
    labels = top(curved, images)
    assert_input_error(
        lambda: fab(KEY, breaks, images, labels, threat=THREATS["linf"], targets=1, steps=2), "12 of the 12", "not finite")


def test_a_search_for_the_nearest_class_needs_their_number():
    assert_input_error(lambda: Fab(targeted=False), "fab classes is 0")
