"""PGD, MI-FGSM and the margin attack with restarts: the steps of others' code, and of attacks.pgd, on points still robust."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxrd import ThreatModel, attacks, objectives
from jaxrd.attacks.iterated import Ascent
from jaxrd.attacks.network import as_network
from jaxrd.attacks.search import Run, batch_sizes, run_search
from jaxrd.threat import example_keys
from tests.support import assert_input_error

COUNT, SHAPE, CLASSES = 12, (4, 4, 2), 4
SIZE = int(np.prod(SHAPE))
KEY = jax.random.key(0)
GENERATOR = np.random.default_rng(0)
HIDDEN = (0.5 * GENERATOR.normal(size=(SIZE, 10))).astype(np.float32)
OUT = GENERATOR.normal(size=(10, CLASSES)).astype(np.float32)
IMAGES = GENERATOR.uniform(size=(COUNT, *SHAPE)).astype(np.float32)
THREATS = {"linf": ThreatModel("linf", 0.06), "l2": ThreatModel("l2", 0.35)}
STEP_SIZES = {"linf": 0.02, "l2": 0.12}
each_norm = pytest.mark.parametrize("norm", ["linf", "l2"])


pytestmark = pytest.mark.usefixtures("quick_compilation")


def mlp(weights, images):
    return jnp.tanh((images.reshape(len(images), -1) - 0.5) @ weights[0]) @ weights[1]


LOGITS_FN = Partial(mlp, (HIDDEN, OUT))
LABELS = np.asarray(jnp.argmax(LOGITS_FN(IMAGES), axis=1)).astype(np.int32)
WRONG = np.array([2, 7])
LABELS[WRONG] = (LABELS[WRONG] + 1) % CLASSES
RIGHT = np.setdiff1d(np.arange(COUNT), WRONG)


def host(result):
    return type(result)(*map(np.asarray, result))


@functools.cache
def attacked(norm="linf", restarts=1, start="uniform", loss="ce", steps=4):
    return host(attacks.pgd_attack(
        KEY, LOGITS_FN, IMAGES, LABELS, threat=THREATS[norm], steps=steps, step_size=STEP_SIZES[norm], start=start, loss=loss,
        restarts=restarts))


def ends(search, norm="linf", step_size=None, key=KEY, logits_fn=LOGITS_FN, images=IMAGES, labels=LABELS):
    """The last iterates of all points: the public functions return those of adversarial points only."""
    step_sizes = np.full(len(images), STEP_SIZES[norm] if step_size is None else step_size, np.float32)
    run = Run(search)
    points = run.points({"images": images, "labels": labels, "step_size": step_sizes})
    found, = run_search(search, as_network(logits_fn, images), points, run.keys(example_keys(key, len(images))),
                        np.arange(len(images)), THREATS[norm], sizes=batch_sizes(len(images)))
    return found


def assert_ends_are_returned(result, found):
    """Where they are adversarial, and the point was right."""
    fooled = found.fooled[RIGHT]
    assert 0 < fooled.sum()
    np.testing.assert_array_equal(result.fooled[RIGHT], fooled)
    np.testing.assert_array_equal(result.images[RIGHT[fooled]], found.images[RIGHT[fooled]])
    np.testing.assert_array_equal(result.images[RIGHT[~fooled]], IMAGES[RIGHT[~fooled]])


# The steps of others.


@each_norm
@pytest.mark.parametrize("steps", [1, 4])
def test_pgd_without_a_random_start_is_that_of_foolbox(norm, steps):
    foolbox = pytest.importorskip("foolbox", reason="parity with foolbox needs foolbox, which jaxrd does not")
    theirs = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm]
    model = foolbox.JAXModel(jax.jit(lambda images: mlp((HIDDEN, OUT), images)), bounds=(0, 1))
    expected, _, success = theirs(abs_stepsize=STEP_SIZES[norm], steps=steps, random_start=False)(
        model, jnp.asarray(IMAGES), jnp.asarray(LABELS), epsilons=THREATS[norm].epsilon)
    expected, success = np.asarray(expected), np.asarray(success)
    result, found = attacked(norm, start="none", steps=steps), ends(Ascent("ce", steps, "none"), norm)
    np.testing.assert_allclose(found.images, expected, atol=1e-6)
    np.testing.assert_array_equal(result.fooled[RIGHT], success[RIGHT])
    assert_ends_are_returned(result, found)
    assert np.abs(expected - IMAGES).max() > STEP_SIZES[norm] / 20


@each_norm
def test_fgsm_is_that_of_foolbox(norm):
    foolbox = pytest.importorskip("foolbox", reason="parity with foolbox needs foolbox, which jaxrd does not")
    theirs = {"linf": foolbox.attacks.LinfFastGradientAttack, "l2": foolbox.attacks.L2FastGradientAttack}[norm]
    model = foolbox.JAXModel(jax.jit(lambda images: mlp((HIDDEN, OUT), images)), bounds=(0, 1))
    epsilon = THREATS[norm].epsilon
    expected, _, _ = theirs(random_start=False)(model, jnp.asarray(IMAGES), jnp.asarray(LABELS), epsilons=epsilon)
    np.testing.assert_allclose(ends(Ascent("ce", 1, "none"), norm, epsilon).images, np.asarray(expected), atol=1e-6)


@each_norm
@pytest.mark.parametrize("start", ["none", "uniform", "gaussian"])
def test_a_run_takes_the_steps_of_the_inner_maximisation(norm, start):
    keys = Run(None).keys(example_keys(KEY, COUNT))
    expected = attacks.pgd(
        keys, lambda images: objectives.cross_entropy(LOGITS_FN(images), LABELS), IMAGES, threat=THREATS[norm],
        step_size=STEP_SIZES[norm], steps=4, start=start)
    found, result = ends(Ascent("ce", 4, start), norm), attacked(norm, start=start)
    np.testing.assert_allclose(found.images, expected, atol=1e-6)
    assert_ends_are_returned(result, found)
    logits = np.asarray(LOGITS_FN(found.images))
    np.testing.assert_array_equal(found.fooled, np.argmax(logits, axis=1) != LABELS)
    np.testing.assert_allclose(result.loss[RIGHT], -np.asarray(jax.nn.log_softmax(logits))[RIGHT, LABELS[RIGHT]], rtol=1e-4)


# MI-FGSM, by numpy.


def gradients_by_numpy(images, labels):
    """Of the cross-entropy, by hand, in float64."""
    flat = np.float64(images).reshape(len(images), -1) - 0.5
    hidden = np.tanh(flat @ np.float64(HIDDEN))
    logits = hidden @ np.float64(OUT)
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    probabilities[np.arange(len(labels)), labels] -= 1
    return ((probabilities @ OUT.T) * (1 - hidden**2) @ HIDDEN.T).reshape(images.shape)


def mi_fgsm_by_numpy(momentum, steps, step_size, epsilon):
    points, velocity = np.float64(IMAGES), 0.0
    for _ in range(steps):
        gradients = gradients_by_numpy(points, LABELS)
        velocity = momentum * velocity + gradients / np.abs(gradients).sum(axis=(1, 2, 3), keepdims=True)
        moved = points + step_size * np.sign(velocity)
        points = np.clip(np.clip(moved, IMAGES - epsilon, IMAGES + epsilon), 0, 1)
    return points


@pytest.mark.parametrize("momentum, steps", [(1.0, 8), (0.5, 8)])
def test_mi_fgsm_adds_gradients_of_length_one(momentum, steps):
    expected = mi_fgsm_by_numpy(momentum, steps, 0.02, 0.06)
    found = ends(Ascent("ce", steps, "none", momentum))
    np.testing.assert_allclose(found.images, expected, atol=1e-6)
    result = attacks.mi_fgsm(
        LOGITS_FN, IMAGES, LABELS, threat=THREATS["linf"], steps=steps, step_size=0.02, momentum=momentum)
    assert_ends_are_returned(host(result), found)
    plain = mi_fgsm_by_numpy(0.0, steps, 0.02, 0.06)
    assert np.abs(plain - expected).max() > 0.01  # or momentum would not matter here


def test_without_momentum_it_takes_steps_of_the_sign():
    found = ends(Ascent("ce", 4, "none", 0.0))
    np.testing.assert_array_equal(found.images, ends(Ascent("ce", 4, "none")).images)
    np.testing.assert_allclose(found.images, mi_fgsm_by_numpy(0.0, 4, 0.02, 0.06), atol=1e-6)


def test_by_default_the_steps_of_mi_fgsm_reach_the_border_together():
    result = attacks.mi_fgsm(LOGITS_FN, IMAGES, LABELS, threat=THREATS["linf"], steps=8)
    assert_ends_are_returned(host(result), ends(Ascent("ce", 8, "none", 1.0), step_size=0.06 / 8))


@pytest.mark.parametrize("attack", ["pgd", "mi_fgsm"])
@each_norm
def test_a_gradient_of_zero_moves_nothing(attack, norm):
    """Of all points but two."""
    def flat(weights, images):
        steep = (jnp.abs(images[:, 0, 0, :1] - IMAGES[[0, 4], 0, 0, 0]).min(axis=1) < 0.01)[:, None]
        return jnp.where(steep, mlp(weights, images), jnp.arange(CLASSES) * 1.0)

    search = Ascent("ce", 3, "none", 1.0 if attack == "mi_fgsm" else None)
    logits_fn = Partial(flat, (HIDDEN, OUT))
    found = ends(search, norm, 0.003, logits_fn=logits_fn)
    assert np.isfinite(found.images).all() and np.isfinite(found.loss).all()
    moved = np.abs(found.images - IMAGES).max(axis=(1, 2, 3)) > 0
    assert moved[[0, 4]].all() and moved.sum() == 2


# The margin.


def test_cw_is_pgd_on_the_margin_until_it_is_confident():
    arguments = dict(threat=THREATS["linf"], step_size=0.02)
    result = host(attacks.cw_linf(KEY, LOGITS_FN, IMAGES, LABELS, steps=4, **arguments))
    same = attacked(loss="cw")
    for part, expected in zip(result, same):
        np.testing.assert_array_equal(part, expected)
    margins = attacked(loss="margin")  # which stays below 50 here
    for part, expected in zip(result, margins):
        np.testing.assert_array_equal(part, expected)
    logits = np.array(LOGITS_FN(ends(Ascent("cw", 4)).images))
    own = logits[np.arange(COUNT), LABELS].copy()
    logits[np.arange(COUNT), LABELS] = -np.inf
    np.testing.assert_allclose(result.loss[RIGHT], (logits.max(1) - own)[RIGHT], rtol=1e-4, atol=1e-5)


def test_cw_stops_where_the_margin_is_fifty():
    """Its gradient is 0 there: nothing is gained by more confidence."""
    steep = Partial(lambda weights, images: 1000 * mlp(weights, images), (HIDDEN, OUT))
    capped, free = (ends(Ascent(loss, 3), logits_fn=steep) for loss in ("cw", "margin"))
    np.testing.assert_array_equal(capped.fooled, free.fooled)
    beyond = free.loss > 60
    assert beyond.any() and (capped.loss <= 50).all()
    np.testing.assert_allclose(capped.loss[capped.loss < 0], free.loss[capped.loss < 0])


# Restarts.


@each_norm
def test_restarts_only_help(norm):
    arguments = dict(norm=norm, steps=1)
    one, three = attacked(restarts=1, **arguments), attacked(restarts=3, **arguments)
    assert (three.fooled >= one.fooled).all() and (three.loss >= one.loss).all()
    assert (three.loss > one.loss).any()
    np.testing.assert_array_equal(three.images[one.fooled], one.images[one.fooled])  # who is broken is left alone
    np.testing.assert_array_equal(three.loss[one.fooled], one.loss[one.fooled])


def test_a_restart_breaks_what_the_first_run_did_not():
    """One small step from a random start: luck decides."""
    def run(restarts):
        return host(attacks.pgd_attack(KEY, LOGITS_FN, IMAGES, LABELS, threat=THREATS["linf"], steps=1, step_size=0.001,
                                       restarts=restarts))

    counts = [int(run(restarts).fooled.sum()) for restarts in (1, 4, 16)]
    assert counts == sorted(counts) and counts[0] < counts[-1]


@each_norm
@pytest.mark.parametrize("attack", ["pgd_attack", "cw_linf", "mi_fgsm"])
def test_every_attack_stays_in_ball_and_box_and_leaves_wrong_points_alone(attack, norm):
    if attack == "mi_fgsm":
        result = host(attacks.mi_fgsm(LOGITS_FN, IMAGES, LABELS, threat=THREATS[norm], steps=4, step_size=STEP_SIZES[norm]))
    else:
        result = attacked(norm, loss="cw" if attack == "cw_linf" else "ce")
    np.testing.assert_array_equal(result.images[WRONG], IMAGES[WRONG])
    assert result.fooled[WRONG].all() and result.images.dtype == result.loss.dtype == np.float32
    clean = np.asarray(LOGITS_FN(IMAGES))[WRONG]
    if attack != "cw_linf":
        np.testing.assert_allclose(result.loss[WRONG], -np.asarray(jax.nn.log_softmax(clean))[[0, 1], LABELS[WRONG]], rtol=1e-5)
    np.testing.assert_array_equal(np.argmax(LOGITS_FN(result.images), axis=1) != LABELS, result.fooled)
    assert (THREATS[norm].distance(IMAGES, result.images) <= THREATS[norm].epsilon * (1 + 1e-5)).all()
    assert result.images.min() >= 0 and result.images.max() <= 1 and 2 < result.fooled.sum()


def test_defaults_are_those_of_the_papers():
    """PGD-20 and CW-30 with steps of a quarter of the radius: 2/255 at 8/255."""
    threat = ThreatModel("linf", 8 / 255)
    arguments = dict(key=KEY, logits_fn=LOGITS_FN, images=IMAGES, labels=LABELS, threat=threat)
    for attack, steps in ((attacks.pgd_attack, 20), (attacks.cw_linf, 30)):
        default, told = host(attack(**arguments)), host(attack(**arguments, steps=steps, step_size=2 / 255))
        for part, expected in zip(default, told):
            np.testing.assert_array_equal(part, expected)


# Under jit.


@pytest.mark.parametrize("attack", ["pgd_attack", "cw_linf", "mi_fgsm"])
def test_under_jit_the_result_is_the_same(attack):
    def call(images, labels, key, threat):
        arguments = dict(threat=threat, steps=3)
        if attack == "mi_fgsm":
            return attacks.mi_fgsm(LOGITS_FN, images, labels, **arguments)
        return getattr(attacks, attack)(key, LOGITS_FN, images, labels, restarts=2, **arguments)

    arguments = jnp.asarray(IMAGES), jnp.asarray(LABELS), KEY, THREATS["linf"]
    eager, compiled = host(call(*arguments)), host(jax.jit(call)(*arguments))
    np.testing.assert_array_equal(compiled.fooled, eager.fooled)
    np.testing.assert_allclose(compiled.images, eager.images, atol=1e-6)
    np.testing.assert_allclose(compiled.loss, eager.loss, rtol=1e-4, atol=1e-5)


# Arguments that make no sense.


@pytest.mark.parametrize("attack", ["pgd_attack", "cw_linf", "mi_fgsm"])
@pytest.mark.parametrize("changes, mentions", [
    ({"step_size": 0.0}, ["step_size", "is 0"]),
    ({"step_size": -0.01}, ["step_size", "-0.01"]),
    ({"step_size": 0.2}, ["step_size", "0.2", "2 epsilon = 0.12"]),
    ({"step_size": float("nan")}, ["step_size", "nan"]),
    ({"step_size": "2/255"}, ["step_size", "2/255"]),
    ({"steps": 0}, ["steps is 0"]),
    ({"steps": 2.0}, ["steps is 2.0"]),
    ({"images": 255 * IMAGES}, ["outside (0.0, 1.0)"]),
    ({"images": IMAGES[0]}, ["float32[4, 4, 2]"]),
    ({"images": (255 * IMAGES).astype(np.uint8)}, ["uint8"]),
    ({"images": IMAGES[:0], "labels": LABELS[:0]}, ["images are none"]),
    ({"labels": LABELS + CLASSES}, ["4 classes"]),
    ({"labels": LABELS[:-1]}, ["labels are int32[11]"]),
    ({"labels": LABELS.astype(np.float32)}, ["labels are float32"]),
    ({"logits_fn": Partial(mlp, (HIDDEN * np.nan, OUT))}, ["not finite"]),
])
def test_arguments_that_make_no_sense_are_one_line(attack, changes, mentions):
    arguments = dict(key=KEY, logits_fn=LOGITS_FN, images=IMAGES, labels=LABELS, threat=THREATS["linf"]) | changes
    if attack == "mi_fgsm":
        del arguments["key"]
    assert_input_error(lambda: getattr(attacks, attack)(**arguments), *mentions)


def test_options_that_make_no_sense_are_one_line():
    arguments = dict(logits_fn=LOGITS_FN, images=IMAGES, labels=LABELS, threat=THREATS["linf"])
    for changes, mentions in (
            ({"loss": "cross_entropy"}, ["loss", "cross_entropy", "ce, "]), ({"loss": "dlr-targeted"}, ["dlr-targeted"]),
            ({"restarts": 0}, ["restarts is 0"]), ({"start": "random"}, ['"random"', '"uniform"']),
            ({"start": "none", "restarts": 3}, ["restarts is 3", "the same run"]),
            ({"key": jax.random.PRNGKey(0)}, ["raw uint32"])):
        assert_input_error(lambda changes=changes: attacks.pgd_attack(**{"key": KEY} | arguments | changes), *mentions)
    for momentum in (-0.1, float("nan"), float("inf")):
        assert_input_error(lambda momentum=momentum: attacks.mi_fgsm(**arguments, momentum=momentum), "momentum", str(momentum))
    assert_input_error(lambda: attacks.mi_fgsm(**arguments, loss="kl"), "loss", '"kl"')


def test_logits_that_turn_nan_on_the_way_are_told():
    corner = IMAGES[:, 0, 0, 0]

    def brittle(weights, images):
        known = (images[:, 0, 0, :1] == corner).any(axis=1, keepdims=True)
        return jnp.where(known, mlp(weights, images), jnp.nan)

    logits_fn = Partial(brittle, (HIDDEN, OUT))
    arguments = dict(threat=THREATS["linf"], steps=3)
    assert_input_error(lambda: attacks.pgd_attack(KEY, logits_fn, IMAGES, LABELS, **arguments), "not finite")
    assert_input_error(lambda: attacks.mi_fgsm(logits_fn, IMAGES, LABELS, **arguments), "not finite")
