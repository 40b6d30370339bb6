"""The cascade: what it reports is what it found, in any batches, on any devices; and on linear classifiers it is exact."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxrd import ThreatModel, attacks
from jaxrd.training.parallel import data_mesh
from tests.support import assert_input_error

cascades = importlib.import_module("jaxrd.attacks.autoattack")  # the name in the package is the function

COUNT, SHAPE, CLASSES = 20, (4, 4, 2), 5
SIZE = int(np.prod(SHAPE))
KEY = jax.random.key(0)
GENERATOR = np.random.default_rng(0)
WEIGHTS = [0.6 * GENERATOR.normal(size=(SIZE, 12)).astype(np.float32), GENERATOR.normal(size=(12, CLASSES)).astype(np.float32)]
IMAGES = GENERATOR.uniform(size=(COUNT, *SHAPE)).astype(np.float32)
THREAT = ThreatModel("linf", 0.03)
FULL = {name: getattr(cascades, name) for name in ("_STEPS", "_QUERIES", "_TARGETS", "_EOT", "_RESTARTS")}
STEPS, QUERIES, TARGETS, RESTARTS = 4, 20, 3, 2


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The cascade with few steps, queries, targets and restarts."""
    for name, value in (("_STEPS", STEPS), ("_QUERIES", QUERIES), ("_TARGETS", TARGETS), ("_RESTARTS", RESTARTS)):
        monkeypatch.setattr(cascades, name, value)


def mlp(weights, images):
    return jnp.tanh((images.reshape(len(images), -1) - 0.5) @ weights[0]) @ weights[1]


def predicted(images):
    """The classes by numpy, in float64."""
    return np.argmax(np.tanh((np.float64(images).reshape(len(images), -1) - 0.5) @ WEIGHTS[0]) @ WEIGHTS[1], axis=1)


LABELS = predicted(IMAGES).astype(np.int32)
WRONG = np.array([4, 13])
LABELS[WRONG] = (LABELS[WRONG] + 1) % CLASSES
LOGITS_FN = Partial(mlp, WEIGHTS)


def attacked(rows=slice(None), **changes):
    arguments = dict(
        key=KEY, logits_fn=LOGITS_FN, images=IMAGES[rows], labels=LABELS[rows], threat=THREAT, batch_size=8, say=None)
    return attacks.autoattack(**arguments | changes)


ORDERS = {"standard": "standard", "weak first": ("square", "apgd-ce", "fab-t", "apgd-t")}


@functools.cache
def reference(order="standard"):
    return attacked(version=ORDERS[order])


def assert_same(result, expected, rows=None):
    chosen = np.arange(len(expected.labels)) if rows is None else rows
    for name in ("robust", "clean_correct", "attack_index", "labels", "index"):
        np.testing.assert_array_equal(getattr(result, name), getattr(expected, name)[chosen])
    for name in ("images", "distances"):
        np.testing.assert_allclose(getattr(result, name), getattr(expected, name)[chosen], atol=1e-5)
    assert result.flags == expected.flags and result.stages == expected.stages
    if rows is None:
        assert result.per_attack_accuracy == expected.per_attack_accuracy and result.passes == expected.passes


# What is reported.


@pytest.mark.parametrize("order", ORDERS)
def test_flags_stages_and_accuracies_say_the_same(order):
    result = reference(order)
    names = ("clean", *(("apgd-ce", "apgd-t", "fab-t", "square") if order == "standard" else ORDERS[order]))
    assert result.stages == names == tuple(result.per_attack_accuracy) == tuple(result.passes) == tuple(result.seconds)
    accuracies = list(result.per_attack_accuracy.values())
    assert accuracies == sorted(accuracies, reverse=True)
    for place, accuracy in enumerate(accuracies):
        assert accuracy == np.mean((result.attack_index == -1) | (result.attack_index > place))
    assert accuracies[-1] == result.accuracy == result.rescored_accuracy == np.mean(result.robust)
    np.testing.assert_array_equal(result.robust, result.attack_index == -1)
    np.testing.assert_array_equal(result.clean_correct, result.attack_index != 0)
    np.testing.assert_array_equal(np.flatnonzero(result.attack_index == 0), WRONG)
    np.testing.assert_array_equal(result.labels, LABELS)
    np.testing.assert_array_equal(result.index, np.arange(COUNT))
    assert result.flags == [] and result.threat == THREAT and list(result.zero_gradients.values()) == [0, 0]
    assert result.version == ("standard" if order == "standard" else "square+apgd-ce+fab-t+apgd-t")
    assert (result.images.dtype, result.labels.dtype, result.distances.dtype) == (np.float32, np.int32, np.float32)
    assert len(set(result.attack_index)) >= (4 if order == "standard" else 5)  # or else little is shown here


@pytest.mark.parametrize("order", ORDERS)
def test_images_are_adversarial_where_broken_and_the_clean_ones_elsewhere(order):
    result = reference(order)
    broken = result.clean_correct & ~result.robust
    assert 5 < broken.sum() < COUNT - 5
    assert (predicted(result.images)[broken] != LABELS[broken]).all()
    np.testing.assert_array_equal(result.images[~broken], IMAGES[~broken])
    distances = np.abs(np.float64(result.images) - IMAGES).max(axis=(1, 2, 3))
    np.testing.assert_allclose(result.distances, distances, atol=1e-7)
    assert (distances[broken] > 0).all() and distances.max() <= THREAT.epsilon + 1e-6
    assert result.images.min() >= 0 and result.images.max() <= 1


def test_the_callers_arrays_are_left_as_they_are():
    images, labels = IMAGES.copy(), LABELS.copy()
    result = attacked(images=images, labels=labels)
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, LABELS)
    assert_same(result, reference())


def test_lists_jax_arrays_and_other_integers_serve_too():
    for labels in (LABELS.tolist(), jnp.asarray(LABELS), LABELS.astype(np.uint8), LABELS.astype(np.int64)):
        result = attacked(images=jnp.asarray(IMAGES), labels=labels, index=list(range(COUNT)))
        assert result.labels.dtype == np.int32
        assert_same(result, reference())


def test_a_function_that_closes_over_its_weights_is_attacked_like_a_partial():
    assert_same(attacked(logits_fn=lambda images: mlp(WEIGHTS, images)), reference())


def test_numbers_among_the_arguments_of_a_partial_are_weights_too():
    logits_fn = Partial(lambda scale, weights, images: scale * mlp(weights, images), 1.0, WEIGHTS)
    result = attacked(logits_fn=logits_fn, version=["apgd-ce"])
    assert result.per_attack_accuracy["apgd-ce"] == reference().per_attack_accuracy["apgd-ce"]


def test_nothing_is_attacked_where_everything_is_wrong():
    said = []
    result = attacked(labels=(predicted(IMAGES) + 1) % CLASSES, say=said.append)
    assert result.accuracy == result.rescored_accuracy == 0 and (result.attack_index == 0).all() and said == []
    np.testing.assert_array_equal(result.images, IMAGES)
    assert set(result.passes.values()) == {(COUNT, 0), (0, 0)} and result.flags == []


# Linear classifiers, where the distance to the boundary is known.


@functools.cache
def linear(classes):
    """(network, images, labels, class differences [n, classes, size], gaps [n, classes]) of a linear classifier."""
    generator = np.random.default_rng(classes)
    weights = generator.normal(size=(SIZE, classes)).astype(np.float32)
    images = generator.uniform(0.3, 0.7, size=(16, *SHAPE)).astype(np.float32)
    logits = (np.float64(images).reshape(16, -1) - 0.5) @ weights
    labels = np.argmax(logits, axis=1)
    gaps = logits[np.arange(16), labels][:, None] - logits
    gaps[np.arange(16), labels] = np.inf
    return Partial(lambda weights, images: (images.reshape(len(images), -1) - 0.5) @ weights, weights), images, labels, (
        weights[:, labels].T[:, None] - weights.T), gaps


@pytest.mark.parametrize("classes, norm, versions", [
    (10, "linf", ["standard", "fast"]), (10, "l2", ["standard", "fast"]), (2, "linf", ["standard", "fast"]),
    (3, "l2", ["plus"])])
def test_on_a_linear_classifier_the_accuracy_is_that_of_the_exact_margins(classes, norm, versions, monkeypatch):
    monkeypatch.setattr(cascades, "_STEPS", 20)
    monkeypatch.setattr(cascades, "_TARGETS", FULL["_TARGETS"])
    network, images, labels, differences, gaps = linear(classes)
    dual = np.abs(differences).sum(-1) if norm == "linf" else np.linalg.norm(differences, axis=-1)
    with np.errstate(invalid="ignore"):
        distances = np.nanmin(np.where(np.isinf(gaps), np.inf, gaps / np.maximum(dual, 1e-9)), axis=1)
    ordered = np.sort(distances)
    assert ordered[-1] < 0.3  # nothing reaches the bounds
    widest = np.argsort(ordered[:-1] / ordered[1:])[:3]  # radii in the widest gaps, so that rounding decides nothing
    for epsilon in (ordered[widest] + ordered[widest + 1]) / 2:
        for version in versions:
            result = attacked(logits_fn=network, images=images, labels=labels, threat=ThreatModel(norm, float(epsilon)),
                              version=version)
            np.testing.assert_array_equal(result.robust, distances > epsilon)
            assert result.accuracy == result.rescored_accuracy and 0 < result.accuracy < 1
            assert (result.distances <= epsilon * (1 + 1e-5)).all()
            broken = ~result.robust
            assert (result.distances[broken] >= distances[broken] * (1 - 1e-4)).all()
            assert len(result.flags) == {10: 0, 3: 1, 2: 1}[classes]


# The versions.


def runs_of(stages):
    return {stage.name: [(run.rank, run.restart) for run in stage.runs] for stage in stages}


@pytest.fixture
def full(monkeypatch, small):
    for name, value in FULL.items():
        monkeypatch.setattr(cascades, name, value)


def test_the_versions_are_those_of_the_official_code(full):
    """Attacks, their order, restarts, targets (ranks among the clean logits, the second first), steps, queries, EOT."""
    once, nine, five = [(0, 0)], [(rank, 0) for rank in range(2, 11)], [(0, restart) for restart in range(5)]
    expected = {
        "standard": {"apgd-ce": once, "apgd-t": nine, "fab-t": nine, "square": once},
        "plus": {"apgd-ce": five, "apgd-dlr": five, "fab": five, "square": once, "apgd-t": nine, "fab-t": nine},
        "rand": {"apgd-ce": once, "apgd-dlr": once},
        "fast": {"apgd-ce": once, "apgd-t": nine},
    }
    losses = {"apgd-ce": "ce", "apgd-dlr": "dlr", "apgd-t": "dlr-targeted"}
    for version, runs in expected.items():
        stages, flags = cascades.cascade(version, 10)
        assert runs_of(stages) == runs and list(runs_of(stages)) == list(runs) and flags == []
        for stage in stages:
            search, = {run.search for run in stage.runs}
            assert search.steps == (5000 if stage.name == "square" else 100)
            if stage.name in losses:
                assert (search.loss, search.eot) == (losses[stage.name], 20 if version == "rand" else 1)
            elif stage.name != "square":
                assert search.targeted == (stage.name == "fab-t")
    chosen, _ = cascades.cascade(["square", "fab", "apgd-t"], 100)
    assert runs_of(chosen) == {"square": once, "fab": once, "apgd-t": nine}


@pytest.mark.parametrize("version, classes, losses, replaced", [
    ("standard", 2, {"apgd-ce": "ce", "apgd-t": "margin"}, ["apgd-t"]),
    ("fast", 2, {"apgd-ce": "ce", "apgd-t": "margin"}, ["apgd-t"]),
    ("standard", 3, {"apgd-ce": "ce", "apgd-t": "dlr"}, ["apgd-t"]),
    ("plus", 2, {"apgd-ce": "ce", "apgd-dlr": "margin", "apgd-t": "margin"}, ["apgd-dlr", "apgd-t"]),
    ("plus", 3, {"apgd-ce": "ce", "apgd-dlr": "dlr", "apgd-t": "dlr"}, ["apgd-t"]),
    ("rand", 2, {"apgd-ce": "ce", "apgd-dlr": "margin"}, ["apgd-dlr"]),
    ("rand", 3, {"apgd-ce": "ce", "apgd-dlr": "dlr"}, []),
    ("standard", 4, {"apgd-ce": "ce", "apgd-t": "dlr-targeted"}, []),
])
def test_too_few_classes_for_a_loss_are_told_and_another_takes_its_place(full, version, classes, losses, replaced):
    stages, flags = cascades.cascade(version, classes)
    assert {stage.name: stage.runs[0].search.loss for stage in stages if stage.name in losses} == losses
    assert len(flags) == len(replaced)
    for flag, name in zip(flags, replaced):
        assert flag.startswith("classes: ") and name in flag and str(classes) in flag and "\n" not in flag
    runs = runs_of(stages)
    for name in ("apgd-t", "fab-t"):
        if name in runs and name not in replaced:
            assert runs[name] == [(rank, 0) for rank in range(2, 1 + classes)]  # no more targets than wrong classes


@pytest.mark.parametrize("classes", [2, 10])
def test_apgd_on_two_targets_is_never_called_autoattack(classes):
    """Its number is not that of AutoAttack."""
    network, images, labels, *_ = linear(classes)
    said = []
    result = attacked(logits_fn=network, images=images, labels=labels, version="fast", say=said.append)
    texts = [*said, *result.flags, result.version, *result.stages]
    assert said and not [text for text in texts if "autoattack" in text.lower() or "aa" in text.lower()]


def test_a_version_that_does_not_exist_is_told_with_the_nearest():
    for version, mentions in [
            ("standrd", ["standrd", '"standard"']), ("rnd", ['"rand"', "plus"]), (["apgd_t"], ["apgd_t", '"apgd-t"']),
            (["apgd-ce", "pgd"], ['"pgd"', "square"]), ([], ["[]", "square"]), (["fab", "fab"], ["once"]),
            (None, ["None"]), (3, ["3"])]:
        assert_input_error(lambda version=version: attacked(version=version), "version", *mentions)


# Arguments that make no sense.


@pytest.mark.parametrize("changes, mentions", [
    ({"images": 255 * IMAGES}, ["outside (0.0, 1.0)", "divide 0..255 by 255"]),
    ({"images": (IMAGES - 0.5) / 0.25}, ["outside (0.0, 1.0)", "normalisation"]),
    ({"images": np.where(np.arange(COUNT)[:, None, None, None] == 3, np.nan, IMAGES)}, ["nan"]),
    ({"images": (255 * IMAGES).astype(np.uint8)}, ["uint8"]),
    ({"images": IMAGES[0]}, ["float32[4, 4, 2]"]),
    ({"images": IMAGES.tolist()}, ["images", "list"]),
    ({"images": IMAGES[:0], "labels": LABELS[:0]}, ["images are none"]),
    ({"labels": LABELS + CLASSES}, ["labels", "5 classes"]),
    ({"labels": LABELS - CLASSES}, ["labels reach from -", "0 to 4"]),
    ({"labels": LABELS.astype(np.float32)}, ["labels are float32"]),
    ({"labels": LABELS > 0}, ["labels are bool"]),
    ({"labels": LABELS[:-1]}, ["labels are int32[19]", "20 images"]),
    ({"labels": LABELS[:, None]}, ["labels are int32[20, 1]"]),
    ({"labels": np.eye(CLASSES, dtype=np.int32)[LABELS]}, ["labels are int32[20, 5]"]),
    ({"batch_size": 0}, ["batch_size is 0"]),
    ({"batch_size": 8.0}, ["batch_size is 8.0"]),
    ({"key": jax.random.PRNGKey(0)}, ["raw uint32", "jax.random.key(0)"]),
    ({"key": 0}, ["key", "jax.random.key(0)"]),
    ({"key": jax.random.split(KEY, COUNT - 1)}, ["key"]),
    ({"index": np.arange(COUNT - 1)}, ["index is int64[19]", "[20]"]),
    ({"index": np.arange(COUNT) - 1}, ["index", "at least 0"]),
    ({"index": np.arange(COUNT) + 0.5}, ["index is float64"]),
    ({"index": np.arange(COUNT) + 2**40}, ["index"]),
    ({"logits_fn": lambda images: (mlp(WEIGHTS, images), None)}, ["logits_fn returns tuple"]),
    ({"logits_fn": Partial(mlp, [weight * np.nan for weight in WEIGHTS])}, ["8 of the 8", "not finite"]),
    ({"logits_fn": lambda images: jnp.where(jnp.arange(CLASSES) == 2, jnp.nan, mlp(WEIGHTS, images))}, ["not finite"]),
    ({"logits_fn": lambda images: jnp.where(images[:, :1, 0, 0] == IMAGES[19, 0, 0, 0], jnp.inf, mlp(WEIGHTS, images))},
     ["1 of the 4", "not finite"]),
])
def test_arguments_that_make_no_sense_are_one_line(changes, mentions):
    assert_input_error(lambda: attacked(**changes), *mentions)


@pytest.mark.parametrize("version", [["apgd-ce"], ["fab-t"], ["square"]])
def test_logits_that_turn_nan_under_attack_are_no_robustness(version):
    """Where a comparison with NaN would count them as robust."""
    corner = IMAGES[:, 0, 0, 0]

    def brittle(weights, images):
        known = (images[:, 0, 0, :1] == corner).any(axis=1, keepdims=True)
        return jnp.where(known, mlp(weights, images), jnp.nan)

    assert_input_error(lambda: attacked(logits_fn=Partial(brittle, WEIGHTS), version=version), "not finite")


# Cost.


def test_a_robust_point_costs_what_it_costs_in_the_official_code(full):
    """Counted there, for 10 classes: 101 + 101, 920 + 909, 1830 + 900 and 5003 forward and backward passes."""
    counted = {"apgd-ce": (101, 101), "apgd-t": (920, 909), "fab-t": (1830, 900), "square": (5003, 0)}
    total = np.zeros(2)
    for stage in cascades.cascade("standard", 10)[0]:
        cost = sum(np.array(run.search.cost["start"]) + run.search.steps * np.array(run.search.cost["step"])
                   + np.array(run.search.cost["finish"]) for run in stage.runs)
        np.testing.assert_allclose(cost, counted[stage.name], rtol=0.012)
        total = total + cost
    np.testing.assert_allclose(total, [7850, 1910], rtol=0.01)


class Counter:
    """What compiled code runs the network on: forward and backward passes of each image, told by the nearest clean one.

    Copies of an image within one pass are padding, and count once.
    """

    def __init__(self):
        self.forwards, self.backwards = np.zeros((2, COUNT), int)

        def told(passes):
            def tell(images):
                nearest = np.abs(np.array(images)[:, None] - IMAGES).mean(axis=(2, 3, 4)).argmin(axis=1)
                passes[np.unique(nearest)] += 1

            return lambda images: jax.debug.callback(tell, images)

        forward, backward = told(self.forwards), told(self.backwards)

        @jax.custom_vjp
        def tap(images):
            forward(images)
            return images

        tap.defvjp(lambda images: (tap(images), images), lambda images, cotangent: (backward(images), (cotangent,))[1])
        self.network = Partial(lambda weights, images: mlp(weights, tap(images)), WEIGHTS)


@functools.cache
def counter():
    """A counter, and what every point costs before and after the attacks: clean score, trust, fingerprint, final score."""
    counter = Counter()
    nobody = attacked(logits_fn=counter.network, labels=(predicted(IMAGES) + 1) % CLASSES, version=["apgd-ce"])
    jax.effects_barrier()
    assert nobody.accuracy == 0 and not counter.backwards.any()
    assert (counter.forwards >= 2).all() and counter.forwards.max() < 10
    return counter, counter.forwards.copy()


@pytest.mark.parametrize("version", [["apgd-ce", "apgd-t", "fab-t"], ["apgd-ce", "square"]])
def test_the_passes_told_are_those_executed_and_none_is_spent_on_a_broken_point(version, tmp_path):
    executed, overhead = counter()
    executed.forwards[:] = executed.backwards[:] = 0
    result = attacked(logits_fn=executed.network, version=version, resume=tmp_path / "records")
    jax.effects_barrier()
    seen, backwards = executed.forwards - overhead, executed.backwards
    assert seen.sum() == sum(forwards for forwards, _ in result.passes.values()) - COUNT
    assert backwards.sum() == sum(backwards for _, backwards in result.passes.values())
    assert (seen[WRONG] == 0).all() and (backwards[WRONG] == 0).all()

    # Start and four steps, by attack: forward and backward, for each run up to the one that breaks the point.
    costs = {"apgd-ce": (5, 5), "apgd-t": (6, 5), "fab-t": (9, 4), "square": (1 + QUERIES, 0)}
    most, broken = np.zeros((COUNT, 2), int), np.zeros(COUNT, int)
    for path in sorted((tmp_path / "records").glob("*.npz")):
        with np.load(path) as record:
            assert not broken[record["indices"]].any()
            broken[record["indices"][record["fooled"]]] += 1
            most[record["indices"]] += costs[str(record["stage"])]
    np.testing.assert_array_equal(broken, result.clean_correct & ~result.robust)
    np.testing.assert_array_equal(backwards, most[:, 1])
    expected = most[:, 0] + broken  # who is broken is looked at once more
    if "square" in version:  # a point that is broken may leave earlier
        assert (seen <= expected).all()
    np.testing.assert_array_equal(seen[result.robust], expected[result.robust])
    if "square" not in version:
        np.testing.assert_array_equal(seen, expected)


# Invariance.


@functools.cache
def pair(*version):
    return attacked(version=version)


@pytest.mark.parametrize("batch_size, version", [
    (7, ("fab-t", "apgd-ce")), (16, ("square", "apgd-t")), (1000, ("square", "apgd-ce"))])
def test_the_batch_size_changes_nothing(batch_size, version):
    assert_same(attacked(batch_size=batch_size, version=version), pair(*version))


@pytest.mark.parametrize("devices, version", [(1, ("apgd-ce",)), (2, ("fab-t", "apgd-t")), (4, ("square", "apgd-ce"))])
def test_the_devices_change_nothing(devices, version):
    assert_same(attacked(mesh=data_mesh(jax.devices()[:devices]), version=version), pair(*version))


# In a ball without corners no two starts lead to the same point.
ROUND = {"threat": ThreatModel("l2", 0.25), "version": ("apgd-ce",)}


@functools.cache
def whole():
    return attacked(**ROUND)


def assert_all_differ(result, other, rows):
    """Of these rows, those that both have broken."""
    both = rows[(result.attack_index[rows] == 1) & (other.attack_index[rows] == 1)]
    assert len(both) > 1 and (np.abs(result.images - other.images)[both].max(axis=(1, 2, 3)) > 1e-4).all()


@pytest.mark.parametrize("rows", [np.array([17, 4, 9, 2, 12, 3, 8, 11, 0, 10]), np.random.default_rng(3).permutation(COUNT)])
def test_some_points_in_any_order_are_attacked_as_in_the_whole(rows):
    assert_same(attacked(rows, index=rows), reference(), rows)
    result = attacked(rows, index=rows, **ROUND)
    np.testing.assert_array_equal(result.index, rows)
    assert_same(result, whole(), rows)
    other = attacked(rows, **ROUND)  # by other random numbers
    assert_all_differ(other, result, np.flatnonzero(rows != np.arange(len(rows))))


def test_keys_of_ones_own_serve_for_one_key():
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(COUNT))
    assert_same(attacked(key=keys), reference())


def test_another_seed_is_another_attack_and_the_same_one_the_same():
    np.testing.assert_array_equal(attacked(**ROUND).images, whole().images)
    np.testing.assert_array_equal(attacked().images, reference().images)
    assert_all_differ(attacked(key=jax.random.key(1), **ROUND), whole(), np.arange(COUNT))


# Randomised defences.


def noisy(weights, images, key):
    """Noise of two numbers, which compiles faster than a normal one."""
    return mlp(weights, images + 0.05 * jnp.sin(jax.random.key_data(key) % 1000 * 1.0))


@functools.cache
def randomised(batch_size=8, seed=0):
    """With three draws for twenty, which compile slowly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cascades, "_EOT", 3)
        return attacked(
            np.arange(8), key=jax.random.key(seed), logits_fn=Partial(noisy, WEIGHTS), version="rand", batch_size=batch_size)


def test_a_randomised_defence_is_attacked_through_several_draws():
    result = randomised()
    assert result.stages == ("clean", "apgd-ce", "apgd-dlr") and result.flags == []
    left = int(result.clean_correct.sum())
    for place, stage in enumerate(result.stages[1:], 1):
        assert result.passes[stage] == (3 * (1 + STEPS) * left,) * 2
        left -= int((result.attack_index == place).sum())
    assert 0 < result.accuracy < np.mean(result.clean_correct)
    assert result.distances.max() <= THREAT.epsilon + 1e-6


def test_the_noise_of_a_defence_follows_key_and_point_and_not_the_batch():
    assert_same(randomised(batch_size=4), randomised())
    assert randomised(batch_size=4).rescored_accuracy == randomised().rescored_accuracy
    assert np.abs(randomised(seed=1).images - randomised().images).max() > 1e-3
