"""APGD: the published iteration step by step, exact on linear classifiers, never outside its threat model.

The published iteration is derived again here from its description (Croce & Hein 2020, and what their code does where the paper
leaves a choice), in NumPy, in float64, with the network's gradient written by hand.
"""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from jax.tree_util import Partial

from jaxrd import ThreatModel, attacks
from jaxrd.attacks.apgd import Apgd, checkpoints
from jaxrd.attacks.network import Network, as_network
from jaxrd.attacks.search import Run
from jaxrd.threat import example_keys
from tests.support import assert_input_error

MANY, BATCH, SHAPE, CLASSES, STEPS = 24, 8, (4, 4, 2), 5, 10
SIZE = int(np.prod(SHAPE))
KEY = jax.random.key(0)
GENERATOR = np.random.default_rng(0)
WEIGHTS = [0.6 * GENERATOR.normal(size=(SIZE, 12)).astype(np.float32), GENERATOR.normal(size=(12, CLASSES)).astype(np.float32)]
MANY_IMAGES = GENERATOR.uniform(size=(MANY, *SHAPE)).astype(np.float32)
THREATS = {"linf": ThreatModel("linf", 0.04), "l2": ThreatModel("l2", 0.2)}
LOSSES = ("ce", "dlr", "dlr-targeted")

each_norm = pytest.mark.parametrize("norm", ["linf", "l2"])
each_loss = pytest.mark.parametrize("loss", LOSSES)


def mlp(weights, images):
    return jnp.tanh((images.reshape(len(images), -1) - 0.5) @ weights[0]) @ weights[1]


def linear(weights, images):
    return images.reshape(len(images), -1) @ weights[0] + weights[1]


def numpy_mlp(images):
    """Returns (logits, the function from a gradient at the logits to that at the images), in float64."""
    inner, outer = (weight.astype(np.float64) for weight in WEIGHTS)
    hidden = np.tanh((images.reshape(len(images), -1) - 0.5) @ inner)
    return hidden @ outer, lambda gradients: (((gradients @ outer.T) * (1 - hidden**2)) @ inner.T).reshape(images.shape)


ORDER = np.argsort(-numpy_mlp(MANY_IMAGES)[0], axis=1).astype(np.int32)
MANY_LABELS = ORDER[:, 0].copy()
MANY_LABELS[5] = ORDER[5, 1]  # one image is misclassified as it is
MANY_TARGETS = np.array([(label + 1 + i % 4) % CLASSES for i, label in enumerate(MANY_LABELS)], np.int32)
IMAGES, LABELS, TARGET = MANY_IMAGES[:BATCH], MANY_LABELS[:BATCH], MANY_TARGETS[:BATCH]


def loss_by_hand(loss, logits, label, target):
    """Returns one image's loss and its gradient at the logits."""
    order = np.argsort(-logits)
    one = np.eye(len(logits))
    if loss == "ce":
        shifted = np.exp(logits - logits.max())
        return np.log(shifted.sum()) + logits.max() - logits[label], shifted / shifted.sum() - one[label]
    if loss == "dlr":
        other = order[1] if order[0] == label else order[0]
        scale, scale_gradient = logits[order[0]] - logits[order[2]] + 1e-12, one[order[0]] - one[order[2]]
    else:
        other = target
        scale = logits[order[0]] - (logits[order[2]] + logits[order[3]]) / 2 + 1e-12
        scale_gradient = one[order[0]] - (one[order[2]] + one[order[3]]) / 2
    gain, gain_gradient = logits[other] - logits[label], one[other] - one[label]
    return gain / scale, gain_gradient / scale - gain * scale_gradient / scale**2


class ApgdByHand:
    """The published iteration on one image, with its table of losses.

    `decided` turns False once a comparison is closer than float32 can tell: from there on two correct programs may part.
    """

    def __init__(self, image, label, target, start, loss, norm, epsilon, steps):
        self.image, self.label, self.target, self.loss, self.norm, self.epsilon = image, label, target, loss, norm, epsilon
        self.table, self.decided = np.zeros(steps), True
        self.at, self.before, self.step_size = start, start, 2 * epsilon
        self.value, self.gradient, right = self.look(start)
        self.best, self.best_value, self.best_gradient = start, self.value, self.gradient
        self.adversarial, self.fooled = start, not right
        self.window, self.since = max(int(0.22 * steps), 1), 0
        self.least, self.decrease = max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
        self.halved, self.best_at_check = True, self.value

    def look(self, point):
        logits, pull_back = numpy_mlp(point[None])
        value, gradient = loss_by_hand(self.loss, logits[0], self.label, self.target)
        gradient = pull_back(gradient[None])[0]
        top, sizes = np.sort(logits[0]), np.abs(gradient)
        # The ratios are constant where the true class is the third: their gradient is nothing but rounding there.
        self.decided &= top[-1] - top[-2] > 1e-5 and sizes.max() > 1e-3
        self.decided &= self.norm == "l2" or sizes.min() > 1e-5 * sizes.max()
        return value, gradient, np.argmax(logits[0]) == self.label

    def inside(self, point):
        if self.norm == "linf":
            return np.clip(np.clip(point, self.image - self.epsilon, self.image + self.epsilon), 0, 1)
        delta = point - self.image
        length = np.sqrt((delta**2).sum())
        return np.clip(self.image + delta / (length + 1e-12) * min(length, self.epsilon), 0, 1)

    def step(self, i):
        """Takes step i, counted from 0."""
        g = self.gradient
        direction = np.sign(g) if self.norm == "linf" else g / (np.sqrt((g**2).sum()) + 1e-12)
        momentum, weight = self.at - self.before, 1.0 if i == 0 else 0.75
        ahead = self.inside(self.at + self.step_size * direction)
        moved = self.inside(self.at + weight * (ahead - self.at) + (1 - weight) * momentum)
        self.before, self.at = self.at, moved
        value, self.gradient, right = self.look(moved)
        self.table[i] = value
        for point, other in ((self.before, self.table[i - 1]), (self.best, self.best_value)):
            self.decided &= abs(value - other) > 3e-6 or np.array_equal(moved, point)
        if not right:
            self.adversarial, self.fooled = moved, True
        if value > self.best_value:
            self.best, self.best_value, self.best_gradient = moved, value, self.gradient
        self.since += 1
        if self.since == self.window:
            # The entry before the first is, by a negative index, the last of the table: still 0.
            raised = sum(self.table[j] > self.table[j - 1] for j in range(i - self.window + 1, i + 1))
            too_few = raised <= 0.75 * self.window
            same = not self.halved and self.best_at_check >= self.best_value
            self.halved, self.best_at_check = too_few or same, self.best_value
            if self.halved:
                self.step_size, self.at, self.gradient = self.step_size / 2, self.best, self.best_gradient
            self.since, self.window = 0, max(self.window - self.decrease, self.least)


@functools.cache
def compiled(loss):
    return jax.jit(Apgd(loss).start), jax.jit(Apgd(loss).step)


@functools.cache
def start_points(norm):
    """Starts on the border of the ball, in float32."""
    noise = np.random.default_rng(1).normal(size=MANY_IMAGES.shape)
    axes = (1, 2, 3)
    length = np.abs(noise).max(axes, keepdims=True) if norm == "linf" else np.sqrt((noise**2).sum(axes, keepdims=True))
    return np.clip(MANY_IMAGES + THREATS[norm].epsilon * noise / length, 0, 1).astype(np.float32)


def both(loss, norm, steps):
    """Yields, after the start and after each step, the state of the search and that derived by hand of every image."""
    threat, (start, step) = THREATS[norm], compiled(loss)
    network = Network(Partial(mlp, WEIGHTS))
    batch = {"images": MANY_IMAGES, "labels": MANY_LABELS, "key": jax.random.split(KEY, MANY), "start": start_points(norm),
             "target": MANY_TARGETS, "rank": np.zeros(MANY, np.int32), "restart": np.zeros(MANY, np.int32)}
    hands = [ApgdByHand(image, label, target, start, loss, norm, threat.epsilon, steps) for image, label, target, start in zip(
        np.float64(MANY_IMAGES), MANY_LABELS, MANY_TARGETS, np.float64(start_points(norm)))]
    state = start(network, batch, threat)
    state.pop("zero_gradient")
    yield state, hands
    rows = Apgd(loss, steps).rows()
    for i in range(steps):
        state = step(network, state, jax.tree.map(lambda row: row[i], rows), threat)
        for hand in hands:
            hand.step(i)
        yield state, hands


def agree(state, hands, **pairs):
    decided = np.array([hand.decided for hand in hands])
    for name, (attribute, tolerance) in pairs.items():
        expected = np.array([getattr(hand, attribute) for hand in hands])
        np.testing.assert_allclose(np.asarray(state[name], float)[decided], expected[decided], **tolerance, err_msg=name)


@each_loss
@each_norm
def test_ten_steps_follow_the_published_iteration(norm, loss):
    near, value = {"atol": 3e-6, "rtol": 0}, {"atol": 2e-5, "rtol": 2e-5}
    halved = compared = 0
    for state, hands in both(loss, norm, STEPS):
        agree(state, hands, points=("at", near), before=("before", near), best=("best", near),
              adversarial=("adversarial", near),
              best_loss=("best_value", value), gradients=("gradient", {"atol": 1e-4, "rtol": 1e-3}),
              best_gradients=("best_gradient", {"atol": 1e-4, "rtol": 1e-3}),
              step_size=("step_size", {"atol": 0, "rtol": 1e-6}), fooled=("fooled", near), halved=("halved", near))
        compared += sum(hand.decided for hand in hands)
        halved += sum(hand.halved and hand.step_size < 2 * THREATS[norm].epsilon and hand.decided for hand in hands)
    # The comparison means something: most images stay comparable for long, some are fooled and some not, steps are halved.
    fooled = [hand.fooled for hand in hands if hand.decided]
    assert compared > 0.6 * MANY * (STEPS + 1) and halved >= 8 and 1 <= sum(fooled) < len(fooled)


@pytest.mark.parametrize("loss, norm, steps", [
    ("ce", "linf", 100), ("ce", "l2", 50), ("dlr", "linf", 50), ("dlr", "l2", 100), ("dlr-targeted", "linf", 50),
    ("dlr-targeted", "l2", 50)])
def test_many_steps_reach_the_loss_and_the_flags_of_the_published_iteration(loss, norm, steps):
    *_, (state, hands) = both(loss, norm, steps)
    np.testing.assert_array_equal(state["fooled"], [hand.fooled for hand in hands])
    expected = np.array([hand.best_value for hand in hands])
    smooth = expected < 0.99  # a misclassified point's ratio has kinks, and from the plateau at 1 on no direction
    assert loss == "ce" or smooth.sum() > MANY / 3
    smooth |= loss == "ce"
    errors = np.abs(np.asarray(state["best_loss"]) - expected)[smooth]
    assert errors.max() < 0.02 and np.mean(errors < 2e-3) > 0.9  # rounding parts a path or two


def test_the_public_function_returns_what_the_iteration_found():
    """With the flags, the latest adversarial point, and the best loss of the images that are attacked."""
    *_, (state, hands) = both("ce", "linf", STEPS)
    result = attacks.apgd(KEY, Partial(mlp, WEIGHTS), IMAGES, LABELS, threat=THREATS["linf"], steps=STEPS,
                          x_init=start_points("linf")[:BATCH])
    attacked = np.arange(BATCH) != 5
    np.testing.assert_array_equal(result.fooled, [hand.fooled or i == 5 for i, hand in enumerate(hands[:BATCH])])
    for i in np.flatnonzero(attacked):
        expected = hands[i].adversarial if hands[i].fooled else IMAGES[i]
        np.testing.assert_allclose(result.images[i], expected, atol=3e-6)
    np.testing.assert_allclose(result.loss[attacked], state["best_loss"][:BATCH][attacked], rtol=1e-5)
    np.testing.assert_array_equal(result.images[5], IMAGES[5])
    np.testing.assert_allclose(result.loss[5], loss_by_hand("ce", numpy_mlp(IMAGES)[0][5], LABELS[5], 0)[0], rtol=1e-5)


@pytest.mark.parametrize("steps, expected", [
    (100, [22, 41, 57, 70, 80, 87, 93, 99]), (50, [11, 21, 30, 38, 45]), (20, [4, 7, *range(9, 21)]), (10, list(range(2, 11)))])
def test_checkpoints_are_the_published_ones(steps, expected):
    found = checkpoints(steps)
    assert list(found) == expected
    assert list(found.values()) == np.diff([0, *expected]).tolist()


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 33, 1000])
def test_checkpoints_are_within_the_steps_and_windows_shrink(steps):
    found = checkpoints(steps)
    windows = list(found.values())
    assert np.cumsum(windows).tolist() == list(found) and list(found)[-1] <= steps
    assert windows == sorted(windows, reverse=True) and windows[-1] >= 1
    window = Apgd(steps=steps).rows()["window"]
    assert {i + 1: int(size) for i, size in enumerate(window) if size} == found


def one_pixel(curve, steps, start):
    """Yields the states of a search in [0.4, 0.6] with the logits 0, of the true class, and `curve` of the pixel."""
    search, threat = Apgd("ce", steps), ThreatModel("linf", 0.1)

    def logits(images):
        value = curve(images[:, 0, 0, 0])
        return jnp.stack([jnp.zeros_like(value), value], axis=-1)

    network, step = Network(Partial(logits)), jax.jit(search.step)
    image = np.full((1, 1, 1, 1), 0.5, np.float32)
    batch = {"images": image, "labels": np.zeros(1, np.int32), "key": jax.random.split(KEY, 1), "start": image + (start - 0.5)}
    state = jax.jit(search.start)(network, batch, threat)
    state.pop("zero_gradient")
    yield state
    for i in range(steps):
        state = step(network, state, jax.tree.map(lambda row: row[i], search.rows()), threat)
        yield state


def test_the_first_checkpoint_does_not_halve_for_a_best_loss_that_stands_still():
    """On a hill at 0.51 from 0.5: step 1 overshoots to 0.6, step 2 comes back to 0.475, still below the start.

    Both count as raising the loss (the first against 0), so only an unchanged best loss could halve the step, and it does so
    from the second checkpoint on only.
    """
    states = list(one_pixel(lambda x: -(x - 0.51) ** 2, STEPS, start=0.5))
    points = [float(state["points"][0, 0, 0, 0]) for state in states]
    np.testing.assert_allclose(points[:3], [0.5, 0.6, 0.475], atol=1e-6)
    assert states[2]["step_size"][0] == pytest.approx(0.2) and not states[2]["halved"][0]
    # Step 3 goes to 0.6 and back by momentum: 0.475 + 0.75 (0.6 - 0.475) + 0.25 (0.475 - 0.6) = 0.5375. That is below the
    # start too, whence the second checkpoint halves, and goes back to the start.
    assert states[3]["step_size"][0] == pytest.approx(0.1) and states[3]["halved"][0]
    assert float(states[3]["points"][0, 0, 0, 0]) == pytest.approx(0.5)
    # The momentum after the jump is 0.5 - 0.475: 0.5 + 0.75 (0.6 - 0.5) + 0.25 (0.5 - 0.475).
    assert float(states[3]["before"][0, 0, 0, 0]) == pytest.approx(0.475)
    assert float(states[4]["points"][0, 0, 0, 0]) == pytest.approx(0.58125) or states[4]["halved"][0]
    assert float(states[4]["before"][0, 0, 0, 0]) == pytest.approx(0.5)


def test_the_halving_of_either_condition_keeps_the_other_from_repeating_it():
    """A constant loss: the first checkpoint halves, since no step raised it; the flag then holds condition 2 back for ever, and
    condition 1 goes on alone."""
    sizes = [float(state["step_size"][0]) for state in one_pixel(lambda x: 0 * x, 20, start=0.55)]
    expected = [0.2 / 2 ** sum(at <= step for at in checkpoints(20)) for step in range(21)]
    np.testing.assert_allclose(sizes, expected, rtol=1e-6)


@pytest.mark.parametrize("window, raised, halves", [
    (22, 16, True), (22, 17, False), (4, 3, True), (4, 4, False), (3, 2, True), (3, 3, False), (2, 1, True), (2, 2, False)])
def test_the_step_is_halved_where_at_most_three_quarters_of_the_steps_raised_the_loss(window, raised, halves):
    """After a step that does not, since the loss is constant, and where the checkpoint before has halved."""
    *_, state = one_pixel(lambda x: 0 * x, 1, start=0.55)
    before, state = state["step_size"][0], state | {"raised": np.float32([raised]), "halved": np.array([True])}
    state = flat_step()(state, {"step": np.int32(30), "window": np.int32(window)})
    assert state["step_size"][0] == pytest.approx(before / 2 if halves else before)
    assert state["raised"][0] == 0 and state["halved"][0] == halves


@functools.cache
def flat_step():
    network = Network(Partial(lambda images: jnp.zeros((len(images), 2))))
    return jax.jit(lambda state, row: Apgd().step(network, state, row, ThreatModel("linf", 0.1)))


# Linear classifiers, whose worst case is known.


def exact(weights, offsets, images, labels, norm):
    """Returns the differences of logits (label minus each other class), and what a unit of radius takes off each."""
    weights = weights.astype(np.float64)
    logits = images.reshape(len(images), -1) @ weights + offsets
    differences = logits[np.arange(len(labels)), labels][:, None] - logits
    directions = weights[:, labels].T[:, :, None] - weights[None]
    slopes = np.abs(directions).sum(1) if norm == "linf" else np.sqrt((directions**2).sum(1))
    return differences, slopes


def linear_problem(classes, low, high, seed=0):
    generator = np.random.default_rng(seed)
    images = generator.uniform(low, high, size=(BATCH, *SHAPE)).astype(np.float32)
    weights = generator.normal(size=(SIZE, classes)).astype(np.float32)
    offsets = -(0.5 * weights.sum(0))
    labels = np.argmax(images.reshape(BATCH, -1) @ weights + offsets, axis=1).astype(np.int32)
    return images, labels, weights, offsets


def between(radii, least=0.0):
    """Radii between which exactly one image changes sides, from all robust to none."""
    radii = np.sort(radii)
    return [0.7 * radii[0], *((a + b) / 2 for a, b in zip(radii, radii[1:]) if b - a > 0.01 * a + least), 1.3 * radii[-1]]


@each_norm
def test_two_linear_classes_are_fooled_exactly_where_they_can_be_at_the_optimum_of_each_loss(norm):
    images, labels, weights, offsets = linear_problem(2, 0.4, 0.6)
    differences, slopes = exact(weights, offsets, images, labels, norm)
    margins, slopes = differences[np.arange(BATCH), 1 - labels], slopes[np.arange(BATCH), 1 - labels]
    for epsilon in between(margins / slopes):
        assert epsilon < 0.4  # else the box would matter
        least = margins - epsilon * slopes
        arguments = dict(threat=ThreatModel(norm, float(epsilon)), steps=20)
        network = Partial(linear, (weights, offsets))
        result = attacks.apgd(KEY, network, images, labels, **arguments)
        np.testing.assert_array_equal(result.fooled, least < 0)
        np.testing.assert_allclose(result.loss, np.logaddexp(0, -least), atol=2e-5, rtol=2e-5)
        if norm == "linf":
            result = attacks.apgd(KEY, network, images, labels, loss="margin", **arguments)
            np.testing.assert_array_equal(result.fooled, least < 0)
            np.testing.assert_allclose(result.loss, -least, atol=2e-5, rtol=2e-5)


@each_norm
def test_ten_linear_classes_are_fooled_exactly_where_they_can_be(norm):
    images, labels, weights, offsets = linear_problem(10, 0.4, 0.6)
    differences, slopes = exact(weights, offsets, images, labels, norm)
    radii = np.where(differences == 0, np.inf, differences / np.maximum(slopes, 1e-9)).min(1)
    found = []
    for epsilon in between(radii):
        result = attacks.apgd(KEY, Partial(linear, (weights, offsets)), images, labels, steps=20, loss="dlr-targeted",
                              threat=ThreatModel(norm, float(epsilon)))
        np.testing.assert_array_equal(result.fooled, radii < epsilon)
        found.append(int(result.fooled.sum()))
    assert found[0] == 0 and found[-1] == BATCH and len(found) > 4


def test_the_difference_of_logits_ratio_reaches_its_optimum():
    """Logits (a, -a, -5) with a linear a: the ratio is 2a / (|a| + 5) towards class 1, which rises with -a alone."""
    images, labels, weights, offsets = linear_problem(2, 0.4, 0.6)
    slope = weights[:, 0] - weights[:, 1]
    weights, offsets = np.stack([slope, -slope, 0 * slope], 1), np.array([0, 0, -5.0], np.float32)
    offsets[:2] = [-0.5 * slope.sum(), 0.5 * slope.sum()]
    length = np.sqrt((slope**2).sum())
    value = images.reshape(BATCH, -1) @ slope + offsets[0]
    labels = np.where(value > 0, 0, 1).astype(np.int32)
    seen = set()
    for epsilon in np.quantile(np.abs(value) / length, [0.2, 0.55, 0.9]):
        gain = epsilon * length - np.abs(value)
        assert np.abs(gain).max() < 5  # the third class stays the last
        result = attacks.apgd(KEY, Partial(linear, (weights, offsets)), images, labels, loss="dlr", steps=20,
                              threat=ThreatModel("l2", float(epsilon)))
        np.testing.assert_array_equal(result.fooled, gain > 0)
        np.testing.assert_allclose(result.loss, 2 * gain / (np.abs(gain) + 5), atol=2e-5)
        seen |= set(np.sign(gain))
    assert seen == {-1, 1}


def test_the_box_is_reckoned_with_coordinate_by_coordinate():
    images, labels, weights, offsets = linear_problem(2, 0, 1, seed=3)
    towards = np.where(labels[:, None] == 0, 1, -1) * (weights[:, 1] - weights[:, 0])
    flat = images.reshape(BATCH, -1)
    moved = {}
    for epsilon in (0.01, 0.05, 0.1, 0.2, 0.4):
        worst = np.clip(flat + epsilon * np.sign(towards), 0, 1)
        logits = worst @ weights + offsets
        least = logits[np.arange(BATCH), labels] - logits[np.arange(BATCH), 1 - labels]
        result = attacks.apgd(KEY, Partial(linear, (weights, offsets)), images, labels, steps=20,
                              threat=ThreatModel("linf", epsilon))
        np.testing.assert_array_equal(result.fooled, least < 0)
        np.testing.assert_allclose(result.loss, np.logaddexp(0, -least), atol=2e-5, rtol=2e-5)
        moved[epsilon] = int(result.fooled.sum())
        assert epsilon < 0.05 or (np.abs(worst - flat) < epsilon - 1e-4).any()
    assert moved[0.01] < moved[0.4] == BATCH


# Where it starts.


@functools.cache
def starter():
    network, search = Network(Partial(mlp, WEIGHTS)), Apgd()
    return jax.jit(lambda images, keys, threat, extra: search.start(
        network, {"images": images, "labels": LABELS, "key": keys} | extra, threat)["points"])


def starts(norm, key=0, rank=0, restart=0, images=0.4 + 0.2 * IMAGES):
    keys = Run(Apgd(), rank, restart).keys(example_keys(jax.random.key(key), BATCH))
    return np.asarray(starter()(images, keys, THREATS[norm], {})), np.asarray(images)


@each_norm
def test_the_start_lies_on_the_border_of_the_ball(norm):
    points, images = starts(norm)
    np.testing.assert_allclose(THREATS[norm].distance(images, points), THREATS[norm].epsilon, rtol=1e-4)
    delta = (points - images) / THREATS[norm].epsilon
    if norm == "linf":  # uniform, and not on the corners
        assert 0.4 < np.abs(delta).mean() < 0.65 and np.abs((np.abs(delta) > 0.999).sum((1, 2, 3)) - 1).max() <= 1
    else:
        assert abs(delta.mean()) < 0.05 and np.abs(delta).max() < 0.95
    assert np.ptp(delta, axis=0).max() > 0.1


@each_norm
def test_the_start_is_inside_the_box_where_that_is_active(norm):
    points, images = starts(norm, images=IMAGES)
    assert points.min() >= 0 and points.max() <= 1
    assert (THREATS[norm].distance(images, points) <= THREATS[norm].epsilon + 1e-6).all()
    free, inside = starts(norm, images=0.5 + 0 * IMAGES)
    np.testing.assert_allclose(points, np.clip(IMAGES + (free - inside), 0, 1), atol=1e-6)


@each_norm
def test_points_restarts_ranks_and_keys_start_differently(norm):
    places = [starts(norm, *which)[0] - starts(norm)[1] for which in (
        (0, 0, 0), (1, 0, 0), (0, 2, 0), (0, 0, 1), (0, 2, 1), (0, 1, 2))]
    flat = np.concatenate(places).reshape(-1, SIZE)
    distances = np.abs(flat[:, None] - flat[None]).max(-1) + np.eye(len(flat))
    assert distances.min() > 0.1 * THREATS[norm].epsilon
    np.testing.assert_array_equal(starts(norm)[0], starts(norm)[0])


def test_a_given_start_is_used_as_it_is():
    given = start_points("l2")[:BATCH]
    np.testing.assert_array_equal(
        starter()(IMAGES, jax.random.split(KEY, BATCH), THREATS["l2"], {"start": jnp.asarray(given)}), given)


# Properties.


@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
@hypothesis.given(seed=strategies.integers(0, 2**31 - 1),
                  kind=strategies.sampled_from([("linf", "ce"), ("l2", "dlr-targeted")]),
                  radius=strategies.floats(0.005, 0.5), edge=strategies.booleans())
def test_results_keep_ball_and_box_and_are_what_the_flags_say(seed, kind, radius, edge):
    norm, loss = kind
    generator = np.random.default_rng(seed)
    images = generator.uniform(size=(BATCH, *SHAPE)).astype(np.float32)
    images = np.round(images) if edge else images
    labels = generator.integers(0, CLASSES, BATCH).astype(np.int32)
    clean = numpy_mlp(images)[0]
    labels[::2] = np.argmax(clean, axis=1)[::2]
    threat = ThreatModel(norm, radius)
    arguments = dict(threat=threat, loss=loss, steps=STEPS, targets=2)
    once, thrice = (attacks.apgd(jax.random.key(seed), Partial(mlp, WEIGHTS), images, labels, restarts=restarts, **arguments)
                    for restarts in (1, 3))
    for result in (once, thrice):
        points = np.asarray(result.images)
        assert points.dtype == np.float32 and points.min() >= 0 and points.max() <= 1
        assert (threat.distance(images, points) <= radius + 1e-6).all() and np.isfinite(result.loss).all()
        logits = numpy_mlp(points.astype(np.float64))[0]
        top = np.sort(logits, axis=1)
        sure = top[:, -1] - top[:, -2] > 1e-5
        np.testing.assert_array_equal((np.argmax(logits, axis=1) != labels)[sure], np.asarray(result.fooled)[sure])
        wrong = np.argmax(clean, axis=1) != labels
        assert np.asarray(result.fooled)[wrong].all()
        np.testing.assert_array_equal(points[wrong], images[wrong])
        np.testing.assert_array_equal(points[~np.asarray(result.fooled)], images[~np.asarray(result.fooled)])
    assert (thrice.fooled | ~once.fooled).all() and (thrice.loss >= once.loss).all()


@hypothesis.settings(max_examples=10, deadline=None, derandomize=True)
@hypothesis.given(seed=strategies.integers(0, 2**31 - 1), norm=strategies.sampled_from(["linf", "l2"]),
                  radii=strategies.tuples(strategies.floats(0.001, 0.3), strategies.floats(0.001, 0.3)))
def test_a_larger_ball_fools_no_less_of_a_linear_model(seed, norm, radii):
    images, labels, weights, offsets = linear_problem(2, 0, 1, seed)
    small, large = (attacks.apgd(jax.random.key(seed), Partial(linear, (weights, offsets)), images, labels, steps=20,
                                 threat=ThreatModel(norm, radius)) for radius in sorted(radii))
    assert (large.fooled | ~small.fooled).all() and (large.loss >= small.loss - 1e-5).all()


def test_several_targets_are_tried_where_one_does_not_lead_out():
    arguments = dict(threat=ThreatModel("l2", 0.3), loss="dlr-targeted", steps=STEPS)
    network = Partial(mlp, WEIGHTS)
    one, all_four = (
        np.asarray(attacks.apgd(KEY, network, IMAGES, LABELS, targets=targets, **arguments).fooled) for targets in (1, 9))
    given = [np.asarray(attacks.apgd(KEY, network, IMAGES, LABELS, target=ORDER[:BATCH, rank], **arguments).fooled)
             for rank in (1, 2, 3, 4)]
    assert (one <= all_four).all() and all_four.sum() > np.min([found.sum() for found in given])
    assert (all_four >= np.any(given, axis=0)).mean() > 0.8  # random starts differ


# Averaged gradients.


def test_gradients_are_averaged_and_loss_and_prediction_are_those_of_the_last_draw(eot=3):
    """A network of which each call is another linear function, run operation by operation."""
    generator = np.random.default_rng(5)
    draws = generator.normal(size=(30, SIZE, CLASSES)).astype(np.float32)
    called = []

    def logits(images):
        called.append(len(called))
        return images.reshape(len(images), -1) @ draws[called[-1]]

    def expected(points, numbers):
        gradients = []
        for number in numbers:
            z = points.reshape(BATCH, -1).astype(np.float64) @ draws[number]
            told = [loss_by_hand("ce", row, label, 0) for row, label in zip(z, LABELS)]
            gradients.append(np.stack([gradient for _, gradient in told]) @ draws[number].T)
        return np.mean(gradients, 0).reshape(points.shape), [value for value, _ in told], np.argmax(z, axis=1) == LABELS

    search, threat, network = Apgd("ce", 10, eot), THREATS["linf"], Network(Partial(logits))
    batch = {"images": IMAGES, "labels": LABELS, "key": jax.random.split(KEY, BATCH), "start": start_points("linf")[:BATCH]}
    with jax.disable_jit():
        state = search.start(network, batch, threat)
        state.pop("zero_gradient")
        assert len(called) == eot
        gradients, loss, right = expected(start_points("linf")[:BATCH], range(eot))
        np.testing.assert_allclose(state["gradients"], gradients, atol=1e-5)
        np.testing.assert_allclose(state["best_loss"], loss, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(state["fooled"], ~right)
        state = search.step(network, state, {"step": np.int32(1), "window": np.int32(0)}, threat)
    assert len(called) == 2 * eot
    moved = np.clip(np.clip(start_points("linf")[:BATCH] + 0.08 * np.sign(gradients), IMAGES - 0.04, IMAGES + 0.04), 0, 1)
    np.testing.assert_allclose(state["points"], moved, atol=1e-6)
    gradients, loss, right_too = expected(np.asarray(state["points"]), range(eot, 2 * eot))
    np.testing.assert_allclose(state["gradients"], gradients, atol=1e-5)
    np.testing.assert_allclose(state["loss"], loss, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(state["fooled"], ~right | ~right_too)


def test_every_pass_of_a_randomised_network_draws_anew_for_every_image():
    seen = []

    def logits(images, key):
        jax.debug.callback(lambda data: seen.append(tuple(np.ravel(data).tolist())), jax.random.key_data(key))
        noisy = images + 0.1 * jax.random.normal(key, images.shape)
        return mlp(WEIGHTS, noisy)

    search, network = Apgd("dlr-targeted", 3, 2), as_network(logits, IMAGES)
    batch = {"images": IMAGES, "labels": LABELS, "key": jax.random.split(KEY, BATCH), "rank": np.full(BATCH, 2, np.int32)}

    @jax.jit
    def attack(batch):
        state = search.start(network, batch, THREATS["linf"])
        state.pop("zero_gradient")
        return jax.lax.scan(
            lambda state, row: (search.step(network, state, row, THREATS["linf"]), None), state, search.rows())[0]

    seen.clear()
    jax.block_until_ready(attack(batch))
    jax.effects_barrier()
    # The starts' noise comes from the keys themselves, which no pass may use again.
    own = {tuple(np.ravel(data).tolist()) for data in np.asarray(jax.random.key_data(batch["key"]))}
    assert len(seen) == BATCH * (1 + 2 + 3 * 2) and len(set(seen)) == len(seen) and not own & set(seen)


@pytest.mark.parametrize("eot", [1, 3])
def test_a_function_that_ignores_its_key_is_attacked_like_one_without(eot):
    arguments = dict(threat=THREATS["linf"], steps=STEPS)
    plain = attacks.apgd(KEY, Partial(mlp, WEIGHTS), IMAGES, LABELS, **arguments)
    keyed = attacks.apgd(KEY, lambda images, key: mlp(WEIGHTS, images), IMAGES, LABELS, eot=eot, **arguments)
    np.testing.assert_array_equal(keyed.fooled, plain.fooled)
    np.testing.assert_allclose(keyed.images, plain.images, atol=1e-6)
    np.testing.assert_allclose(keyed.loss, plain.loss, rtol=1e-5, atol=1e-6)


# Mistakes.


MISTAKES = {
    "another loss": ({"loss": "cw"}, ['"cw"', "known"]),
    "no steps": ({"steps": 0}, ["steps is 0", "at least 1"]),
    "half a step": ({"steps": 2.5}, ["steps is 2.5"]),
    "restarts as a switch": ({"restarts": True}, ["restarts is True"]),
    "no draws": ({"eot": 0}, ["eot is 0"]),
    "no targets": ({"targets": 0, "loss": "dlr-targeted"}, ["targets is 0"]),
    "a target without a loss for it": ({"target": TARGET}, ['"ce"', "dlr-targeted"]),
    "targets that are no classes": ({"loss": "dlr-targeted", "target": np.full(BATCH, CLASSES, np.int32)}, ["target", "5"]),
    "targets below 0": ({"loss": "dlr-targeted", "target": np.full(BATCH, -1, np.int32)}, ["target", "-1"]),
    "too few targets": ({"loss": "dlr-targeted", "target": TARGET[:3]}, ["target", "8"]),
    "one target": ({"loss": "dlr-targeted", "target": np.int32(3)}, ["target"]),
    "targets that are no integers": ({"loss": "dlr-targeted", "target": TARGET + 0.5}, ["target", "float"]),
    "targets that are the labels": ({"loss": "dlr-targeted", "target": LABELS}, ["target"]),
    "restarts from one start": ({"x_init": IMAGES, "restarts": 2}, ["restarts is 2", "x_init"]),
    "too few starts": ({"x_init": IMAGES[:3]}, ["x_init is [3, 4, 4, 2]", "[8, 4, 4, 2]"]),
    "starts that are not finite": ({"x_init": np.full_like(IMAGES, np.nan)}, ["x_init"]),
    "starts outside the ball": ({"x_init": 1 - IMAGES}, ["x_init"]),
    "images of another range": ({"images": 255 * IMAGES}, ["outside"]),
    "images in a list": ({"images": IMAGES.tolist()}, ["images"]),
    "no images": ({"images": IMAGES[:0], "labels": LABELS[:0]}, ["images"]),
    "too few labels": ({"labels": LABELS[:3]}, ["labels", "8"]),
    "labels that are no integers": ({"labels": LABELS.astype(np.float32)}, ["labels are float32"]),
    "labels in a list": ({"labels": LABELS.tolist()}, ["labels"]),
    "labels that are no classes": ({"labels": LABELS + CLASSES}, ["labels", "5 classes"]),
    "labels below 0": ({"labels": LABELS - CLASSES}, ["labels"]),
    "a raw key": ({"key": jax.random.PRNGKey(0)}, ["typed"]),
    "a seed": ({"key": 0}, ["key"]),
    "too few keys": ({"key": jax.random.split(KEY, 3)}, ["key"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_arguments_that_make_no_sense(mistake):
    changed, mentions = MISTAKES[mistake]
    arguments = {"key": KEY, "logits_fn": Partial(mlp, WEIGHTS), "images": IMAGES, "labels": LABELS, "threat": THREATS["linf"],
                 "steps": 2} | changed
    assert_input_error(lambda: attacks.apgd(**arguments), *mentions)


@pytest.mark.parametrize("loss, classes, mentions", [
    ("dlr", 2, ["3 classes", '"ce" or "margin"']), ("dlr-targeted", 3, ["4 classes", 'or "dlr"']),
    ("dlr-targeted", 2, ["4 classes"])])
def test_losses_that_need_more_classes(loss, classes, mentions):
    network = Partial(linear, (np.zeros((SIZE, classes), np.float32), np.zeros(classes, np.float32)))
    assert_input_error(lambda: attacks.apgd(KEY, network, IMAGES, LABELS * 0, threat=THREATS["linf"], loss=loss), *mentions)
