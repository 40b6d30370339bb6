"""Signs that a number is not to be trusted: each is told where it is, in one line, and none where nothing is wrong."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback
from jax.tree_util import Partial

from jaxrd import ThreatModel, attacks, models
from jaxrd.attacks import trust

cascades = importlib.import_module("jaxrd.attacks.autoattack")  # the name in the package is the function

COUNT, SHAPE, CLASSES, SIZE = 8, (4, 4, 2), 4, 32
KEY = jax.random.key(0)
GENERATOR = np.random.default_rng(0)
WEIGHTS = GENERATOR.normal(size=(SIZE, CLASSES)).astype(np.float32)
KERNEL = GENERATOR.normal(size=(3, 3, 2, 4)).astype(np.float32)
IMAGES = GENERATOR.uniform(size=(COUNT, *SHAPE)).astype(np.float32)


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in (("_STEPS", 4), ("_QUERIES", 40), ("_TARGETS", 2), ("_EOT", 2)):
        monkeypatch.setattr(cascades, name, value)


def linear(images):
    return (images.reshape(len(images), -1) - 0.5) @ WEIGHTS


def attacked(logits_fn, images=IMAGES, labels=None, **changes):
    """By default with labels that are all wrong, so that nothing is attacked, and nothing compiled for it."""
    labels = np.argmin(linear(images), axis=1) if labels is None else labels
    arguments = dict(threat=ThreatModel("linf", 0.05), version=["square"], batch_size=8, say=None)
    return attacks.autoattack(KEY, logits_fn, images, labels, **arguments | changes)


def kinds(result):
    for flag in result.flags:
        assert "\n" not in flag and 20 < len(flag) < 300
    return [flag.split(":")[0] for flag in result.flags]


# What is wrong with a function.


def noise_by_callback(callback):
    shape = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    return lambda x: linear(x + callback(lambda: 0.1 * np.random.normal(size=SHAPE).astype(np.float32), shape))


@jax.custom_vjp
def straight_through(x):
    return jnp.round(8 * x) / 8


straight_through.defvjp(lambda x: (straight_through(x), None), lambda _, cotangent: (cotangent,))


def until(x):
    return jax.lax.while_loop(lambda pair: pair[0] < 2, lambda pair: (pair[0] + 1, 1.5 * pair[1]), (0, x))[1]


DOUBTFUL = {
    "probabilities": (lambda x: jax.nn.softmax(linear(x)), ["probabilities"]),
    "noise by pure_callback": (noise_by_callback(jax.pure_callback), ["randomised", "dynamic"]),
    "noise by io_callback": (noise_by_callback(io_callback), ["randomised", "dynamic"]),
    "noise drawn as the function is traced": (
        lambda x: linear(x + 0.1 * np.random.normal(size=SHAPE).astype(np.float32)), ["randomised"]),
    "a number drawn as the function is traced": (lambda x: linear(x) * (1 + np.random.uniform()), ["randomised"]),
    "numbers in the shape of the batch drawn as the function is traced": (
        lambda x: linear(x) + np.random.normal(size=(len(x), CLASSES)), ["randomised"]),
    "a key of its own": (lambda x: linear(x + 0.1 * jax.random.normal(jax.random.key(0), x.shape)), ["randomised"]),
    "a key of its own under jit": (
        jax.jit(lambda x: linear(x + 0.1 * jax.random.uniform(jax.random.key(0), x.shape))), ["randomised"]),
    "a key closed over": ((lambda key: lambda x: linear(x + 0.1 * jax.random.normal(key, x.shape)))(KEY), ["randomised"]),
    "a key as an argument": (lambda x, key: linear(x + 0.1 * jax.random.normal(key, x.shape)), ["randomised"]),
    "a gradient of its own": (lambda x: linear(straight_through(x)), ["dynamic"]),
    "a loop": (lambda x: linear(until(x)), ["dynamic"]),
    "a loop in a scan": (lambda x: linear(jax.lax.scan(lambda x, _: (until(x), None), x, length=2)[0]), ["dynamic"]),
    "a loop in a branch": (lambda x: jax.lax.cond(x.sum() > 0, lambda x: linear(until(x)), linear, x), ["dynamic"]),
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_a_doubtful_function_is_told(name):
    function, expected = DOUBTFUL[name]
    result = attacked(function)
    found = [kind for kind in kinds(result) if kind != "re-scoring"]  # two scores of a random function may differ too
    assert found == expected
    if "dynamic" in found:
        named = "custom_vjp" if "gradient" in name else "while" if "loop" in name else name.split()[-1]
        assert f"contains {named}" in " ".join(result.flags)


def test_the_version_for_the_function_is_named():
    random, = attacked(DOUBTFUL["a key as an argument"][0]).flags
    assert '"rand"' in random
    for function in (linear, Partial(lambda weights, x: x.reshape(len(x), -1) @ weights, WEIGHTS)):
        result = attacked(function, version="rand")
        assert kinds(result) == ["randomised"] and '"standard"' in result.flags[0] and "no key" in result.flags[0]
    assert attacked(DOUBTFUL["a key as an argument"][0], version="rand").flags == []
    assert kinds(attacked(lambda x, key: jax.nn.softmax(linear(x)), version="rand")) == ["probabilities"]


# What is wrong with the images.


def test_images_that_were_divided_twice_are_told():
    assert kinds(attacked(linear, IMAGES / 255)) == ["range"]
    assert attacked(linear, IMAGES / 10).flags == []


def test_a_first_batch_of_dark_images_is_no_doubt():
    """In a data set of which the others are not."""
    images = np.concatenate([IMAGES / 255, IMAGES])
    assert attacked(linear, images).flags == []


def test_dark_is_what_is_dark_in_the_bounds():
    images, threat = 0.5 * IMAGES - 0.75, ThreatModel("linf", 0.05, (-1.0, 1.0))
    assert attacked(linear, images, threat=threat).flags == []


# What the attacks come to.


def rounded(x):
    """Logits without gradients, which a few pixels change all the same."""
    return linear(jnp.round(5 * x) / 5)


LABELS = np.argmax(linear(IMAGES), axis=1)


@functools.cache
def reviewed(name):
    # Labels first, then functions that have no gradient, or none for some.
    if name == "rounded":
        labels = np.argmax(rounded(IMAGES), axis=1)
        return attacked(rounded, labels=labels, version=["apgd-ce", "square"], threat=ThreatModel("linf", 0.1))
    if name == "constant":
        return attacked(lambda x: jnp.zeros((len(x), CLASSES)).at[:, 0].set(2.0), labels=np.zeros(COUNT, int),
                        version=["apgd-ce", "square"])
    if name == "saturated":
        return attacked(lambda x: 1e4 * linear(x), labels=LABELS, version=["apgd-ce"], threat=ThreatModel("linf", 0.001))
    return attacked(linear, labels=LABELS, version=["square", "apgd-ce"], threat=ThreatModel("linf", 0.05))


def test_gradients_that_vanish_are_told_and_so_is_an_attack_that_needs_none():
    result = reviewed("rounded")
    assert kinds(result) == ["gradients", "square"]
    assert "100%" in result.flags[0] and "apgd-ce" in result.flags[0] and result.zero_gradients == {"apgd-ce": COUNT}
    lead = result.per_attack_accuracy["apgd-ce"] - result.per_attack_accuracy["square"]
    assert f"{lead:.2%}" in result.flags[1] and lead > 0.1


def test_a_constant_function_is_told():
    result = reviewed("constant")
    assert kinds(result) == ["gradients"] and result.accuracy == 1 and result.zero_gradients == {"apgd-ce": COUNT}


def test_gradients_that_confidence_makes_vanish_are_told():
    """The cross-entropy's, in float32, of logits that are hundreds apart."""
    result = reviewed("saturated")
    assert kinds(result) == ["gradients"] and result.zero_gradients["apgd-ce"] > 1 and result.accuracy == 1


def test_square_before_the_others_is_no_doubt():
    result = reviewed("linear")
    assert result.flags == [] and result.per_attack_accuracy["square"] < 1


@pytest.mark.parametrize("after, stages, n, told", [
    (0.48, ["apgd-ce", "square"], 100, True),
    (0.49, ["apgd-ce", "square"], 100, False),  # one point of a hundred is chance
    (0.499, ["apgd-ce", "square"], 10000, False),  # and so are two in a thousand
    (0.497, ["apgd-ce", "square"], 10000, True),
    (0.4, ["square"], 100, False),  # nothing to compare with
    (0.4, ["square", "apgd-ce"], 100, False),
])
def test_square_is_ahead_by_more_than_chance(after, stages, n, told):
    accuracy = {"clean": 0.9} | {stage: 0.5 for stage in stages} | {"square": after}
    flags = trust.review(accuracy, {}, {stage: n for stage in stages}, {"apgd-ce"} & set(stages), n)
    assert [flag.split(":")[0] for flag in flags] == ["square"] * told


def test_a_few_vanishing_gradients_are_no_doubt():
    for count, told in ((10, False), (11, True)):
        flags = trust.review({"clean": 1.0, "apgd-ce": 0.5}, {"apgd-ce": count}, {"apgd-ce": 100}, {"apgd-ce"}, 100)
        assert len(flags) == told
    assert trust.review({"clean": 0.0, "apgd-ce": 0.0}, {"apgd-ce": 0}, {"apgd-ce": 0}, {"apgd-ce"}, 100) == []


def test_a_function_that_answers_differently_is_scored_differently():
    """Right at first, and about attacked images that were said to be adversarial."""
    calls = []

    def count(x):
        calls.append(None)
        return np.float32(len(calls) % 2)

    def moody(x):
        return linear(x) * (1 - 2 * jax.pure_callback(count, jax.ShapeDtypeStruct((), jnp.float32), x))

    result = attacked(moody, labels=LABELS)
    assert "randomised" in kinds(result) and (result.rescored_accuracy != result.accuracy) == ("re-scoring" in kinds(result))


# Nothing wrong: no flag, or else none is read.


def network(images, activation=jax.nn.relu):
    features = jax.lax.conv_general_dilated(images, KERNEL, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    features = activation(features / jnp.sqrt(jnp.mean(features**2, axis=-1, keepdims=True) + 1e-5))
    features = jax.lax.reduce_window(features, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return jnp.tile(features.mean((1, 2)), (1, 2))[:, :CLASSES]


ORDINARY = {
    "convolutions, maximum pooling": network,
    "gelu, silu, softplus": functools.partial(
        network, activation=lambda x: jax.nn.gelu(x) + jax.nn.silu(x) + jax.nn.softplus(x)),
    "clipped, standardised": lambda x: network(jnp.clip(jax.nn.standardize(x, axis=(1, 2, 3)), -2, 2)),
    "log-probabilities": lambda x: jax.nn.log_softmax(linear(x)),
    "between 0 and 1, but no probabilities": lambda x: jax.nn.sigmoid(linear(x)),
    "logits that sum to 1, but leave [0, 1]": lambda x: (linear(x) - linear(x).mean(1, keepdims=True)) + 1 / CLASSES,
    "the same logits for all classes but one": lambda x: jnp.where(jnp.arange(CLASSES) == 0, linear(x)[:, :1], -1.0),
    "jit": jax.jit(linear),
    "checkpoint": jax.checkpoint(network),
    "scan": lambda x: jax.lax.scan(lambda x, weights: (jnp.tanh(x @ weights), None), x.reshape(len(x), -1), np.stack(
        [WEIGHTS @ WEIGHTS.T / SIZE] * 3))[0][:, :CLASSES],
    "vmap": jax.vmap(lambda image: (image.reshape(-1) - 0.5) @ WEIGHTS),
    "low precision": lambda x: linear(x.astype(jnp.bfloat16).astype(jnp.float32)).astype(jnp.bfloat16),
    "constants that are not finite, made anew": lambda x: linear(x) + jnp.nan_to_num(
        jnp.asarray(np.array([np.nan, 0, 0, 1], np.float32))),
    "noise drawn before": (lambda noise: lambda x: linear(x + noise))(0.1 * jax.random.normal(KEY, SHAPE)),
    "Partial": Partial(lambda weights, x: x.reshape(len(x), -1) @ weights, WEIGHTS),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_an_ordinary_function_raises_no_doubt(name):
    assert attacked(ORDINARY[name]).flags == []


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.02), ("l2", 0.1)])
def test_the_attack_on_a_linear_classifier_raises_no_doubt(norm, epsilon):
    result = attacked(linear, labels=LABELS, version=["apgd-ce", "square"], threat=ThreatModel(norm, epsilon))
    assert result.flags == [] and 0 < result.accuracy < 1 and result.zero_gradients == {"apgd-ce": 0}


def test_the_attack_on_a_network_of_the_zoo_raises_no_doubt():
    model = models.create("resnet6_w4", classes=10, image_shape=(8, 8, 1))
    variables = model.init(KEY)
    images = GENERATOR.uniform(size=(COUNT, 8, 8, 1)).astype(np.float32)
    logits_fn = models.logits_fn(model, variables)
    logits = np.asarray(jax.jit(logits_fn)(images))
    result = attacked(logits_fn, images, np.argmax(logits, axis=1), version=["apgd-ce", "square"])
    assert result.flags == [] and result.clean_correct.all()
    for closure in (lambda x: logits_fn(x), lambda x: model.apply(variables, x, False)[0],
                    jax.jit(lambda x: model.apply(variables, x, False)[0])):
        assert attacked(closure, images, np.argmin(logits, axis=1)).flags == []
