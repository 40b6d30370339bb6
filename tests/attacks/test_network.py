"""The function under attack as an argument of compiled code: any function serves, as it is now, and none is kept in memory."""

import dataclasses
import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxrd import ThreatModel, attacks
from jaxrd.attacks.network import Network, as_network, classes_of
from tests.support import assert_input_error

BATCH, SHAPE, CLASSES = 8, (4, 4, 2), 5
SIZE = int(np.prod(SHAPE))
KEY = jax.random.key(0)
GENERATOR = np.random.default_rng(0)
IMAGES = jnp.asarray(GENERATOR.uniform(size=(BATCH, *SHAPE)), jnp.float32)
WEIGHTS, OTHER = jnp.asarray(GENERATOR.normal(size=(2, SIZE, CLASSES)), jnp.float32)
LABELS = jnp.argmax(IMAGES.reshape(BATCH, -1) @ WEIGHTS, axis=-1)
THREAT = ThreatModel("linf", 0.02)
ARGUMENTS = dict(images=IMAGES, labels=LABELS, threat=THREAT, steps=2)


def linear(weights, images):
    return images.reshape(len(images), -1) @ weights


def attacked(logits_fn):
    return attacks.apgd(KEY, logits_fn, **ARGUMENTS)


@functools.cache
def expected(name):
    """The result for WEIGHTS, or OTHER, with both as arguments: the reference for every other way to write the function."""
    return attacked(Partial(linear, {"weights": WEIGHTS, "other": OTHER, "negative": -WEIGHTS, "half": WEIGHTS / 2}[name]))


def assert_attacked_as(name, logits_fn):
    result = attacked(logits_fn)
    np.testing.assert_allclose(result.loss, expected(name).loss, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(result.fooled, expected(name).fooled)
    np.testing.assert_allclose(result.images, expected(name).images, atol=1e-5)


def test_the_references_tell_the_weights_apart():
    for a, b in (("weights", "other"), ("weights", "negative"), ("weights", "half")):
        assert np.abs(expected(a).loss - expected(b).loss).max() > 0.1


class Model:
    def __init__(self, weights):
        self.weights = weights

    def logits(self, images):
        return linear(self.weights, images)

    def __call__(self, images):
        return linear(self.weights, images)


class Scaled:
    """Python state, which tracing writes into the program."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, images):
        return self.scale * linear(WEIGHTS, images)


@dataclasses.dataclass(frozen=True)
class Equal:
    """Two of one scale are equal and have one hash."""

    scale: float

    def __call__(self, images):
        return self.scale * linear(WEIGHTS, images)


def apply(variables, images, train=False):
    """Written as the libraries of networks write it."""
    return images.reshape(images.shape[0], -1) @ variables["params"]["kernel"] + (1.0 if train else 0.0)


def nested_jit(weights):
    inner = jax.jit(lambda images: linear(weights, images))
    return lambda images: inner(images)


VARIABLES = {"params": {"kernel": WEIGHTS}}
INTEGERS = jnp.arange(SIZE)[::-1]
FORMS = {
    "closure over a jax array": lambda: lambda x: linear(WEIGHTS, x),
    "closure over a numpy array": lambda: (lambda weights: lambda x: linear(weights, x))(np.asarray(WEIGHTS)),
    "closure over a float64 numpy array": lambda: (lambda weights: lambda x: linear(weights, x))(np.float64(WEIGHTS)),
    "closure over a Python scalar": lambda: (lambda one: lambda x: one * linear(WEIGHTS, x))(1.0),
    "closure over a numpy scalar": lambda: (lambda one: lambda x: one * linear(WEIGHTS, x))(np.float32(1)),
    "closure over integers and booleans": lambda: lambda x: jnp.where(
        jnp.ones(SIZE, bool), x.reshape(len(x), -1), 0)[:, INTEGERS] @ WEIGHTS[INTEGERS],
    "nothing closed over": lambda: lambda x: linear(jnp.asarray(np.asarray(WEIGHTS)), x),
    "jax.jit": lambda: jax.jit(lambda x: linear(WEIGHTS, x)),
    "jax.jit under jax.jit": lambda: jax.jit(nested_jit(WEIGHTS)),
    "closure over a jitted function": lambda: nested_jit(WEIGHTS),
    "jax.checkpoint": lambda: jax.checkpoint(lambda x: linear(WEIGHTS, x)),
    "Partial": lambda: Partial(linear, WEIGHTS),
    "Partial of a jitted function": lambda: Partial(jax.jit(linear), WEIGHTS),
    "functools.partial": lambda: functools.partial(linear, WEIGHTS),
    "functools.partial by keyword": lambda: functools.partial(apply, VARIABLES, train=False),
    "bound method": lambda: Model(WEIGHTS).logits,
    "callable object": lambda: Model(WEIGHTS),
    "apply with an option": lambda: lambda x: apply(VARIABLES, x),
    "a function with an option": lambda: lambda x, train=False: apply(VARIABLES, x, train),
    "scan over rows": lambda: lambda x: jax.lax.scan(
        lambda total, pair: (total + pair[0][:, None] * pair[1], None), jnp.zeros((len(x), CLASSES)),
        (x.reshape(len(x), -1).T, WEIGHTS))[0],
    "vmap": lambda: jax.vmap(lambda image: image.reshape(-1) @ WEIGHTS),
    "a constant as long as the batch": lambda: lambda x: linear(WEIGHTS, x) + jnp.asarray(np.zeros(len(x)))[:, None],
}


@pytest.mark.parametrize("form", FORMS)
def test_any_way_to_write_a_function_is_attacked_alike(form):
    assert_attacked_as("weights", FORMS[form]())


def test_constants_that_follow_the_batch_size_are_those_of_the_batch():
    """One in shape, one in value alone."""
    def rising(images):
        return linear(WEIGHTS, images) + jnp.asarray(np.arange(float(len(images))))[:, None]

    def averaged(images):
        return linear(WEIGHTS, images) * jnp.asarray(np.full(CLASSES, 1 / len(images)))

    for function in (rising, averaged):
        network = as_network(function, IMAGES)
        for images in (IMAGES, IMAGES[:3]):
            np.testing.assert_allclose(jax.jit(Network.__call__)(network, images), function(images), rtol=1e-5, atol=1e-5)


def constants_of(closed):
    """The arrays in a program, at any depth."""
    found = [np.asarray(constant) for constant in closed.consts]

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            for value in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "jaxpr") or hasattr(leaf, "eqns")):
                if hasattr(value, "jaxpr"):
                    found.extend(np.asarray(constant) for constant in value.consts)
                    walk(value.jaxpr)
                elif hasattr(value, "eqns"):
                    walk(value)

    walk(closed.jaxpr)
    return found


@pytest.mark.parametrize("form", [
    "closure over a jax array", "closure over a numpy array", "closure over integers and booleans", "jax.jit",
    "jax.jit under jax.jit", "closure over a jitted function", "jax.checkpoint", "Partial", "functools.partial", "bound method",
    "callable object", "apply with an option", "scan over rows", "vmap"])
def test_weights_are_arguments_of_the_program_and_not_constants(form):
    function = FORMS[form]()
    network = as_network(function, IMAGES)
    assert max((leaf.size for leaf in network.leaves), default=0) == WEIGHTS.size
    # In what XLA is given, constants stand written out.
    text = jax.jit(Network.__call__).lower(network, IMAGES).as_text()
    assert "dense<\"0x" not in text and all(
        constant.size < WEIGHTS.size for constant in constants_of(jax.make_jaxpr(Network.__call__)(network, IMAGES)))


def test_closures_of_the_same_code_have_their_own_weights():
    closures = [(lambda weights: lambda x: linear(weights, x))(weights) for weights in (WEIGHTS, OTHER)]
    assert_attacked_as("weights", closures[0])
    assert_attacked_as("other", closures[1])
    assert_attacked_as("weights", closures[0])


def holder_of_a_global():
    box = {"weights": WEIGHTS}
    return (lambda x: linear(box["weights"], x)), functools.partial(box.__setitem__, "weights", OTHER)


def holder_in_an_object():
    model = Model(WEIGHTS)
    return model, lambda: setattr(model, "weights", OTHER)


def holder_with_a_bound_method():
    model = Model(WEIGHTS)
    method = model.logits
    return method, lambda: setattr(model, "weights", OTHER)


@pytest.mark.parametrize("holder", [holder_of_a_global, holder_in_an_object, holder_with_a_bound_method])
def test_weights_that_are_replaced_between_two_calls_are_the_new_ones(holder):
    """As in a notebook, where training goes on and the function that reads the variables is defined once."""
    function, replace = holder()
    assert_attacked_as("weights", function)
    replace()
    assert_attacked_as("other", function)


def test_a_python_number_that_is_replaced_between_two_calls_is_the_new_one():
    function = Scaled(1.0)
    assert_attacked_as("weights", function)
    function.scale = -1.0
    assert_attacked_as("negative", function)


def test_equal_functions_do_not_depend_on_each_other():
    for make in (lambda: Equal(0.5), (lambda model: lambda: model.logits)(Model(WEIGHTS / 2))):
        first, second = make(), make()
        assert first == second and first is not second
        as_network(first, IMAGES)
        network = as_network(second, IMAGES)
        del first
        gc.collect()
        np.testing.assert_allclose(network(IMAGES), linear(WEIGHTS, IMAGES) / 2, rtol=1e-5, atol=1e-6)
        assert_attacked_as("half", second)


def test_a_network_can_be_used_after_its_function_has_gone_out_of_sight():
    network = as_network(lambda images: linear(WEIGHTS, images), IMAGES)
    gc.collect()
    np.testing.assert_allclose(network(IMAGES), linear(WEIGHTS, IMAGES), rtol=1e-6)
    assert_attacked_as("weights", network)


@pytest.mark.parametrize("form", [
    "closure", "numpy closure", "jax.jit", "closure over a jitted function", "Partial", "functools.partial", "bound method",
    "callable object", "randomised"])
def test_weights_die_with_their_function(form):
    weights = np.array(WEIGHTS) if form == "numpy closure" else jnp.array(WEIGHTS)
    function = {
        "closure": lambda weights: lambda x: linear(weights, x),
        "numpy closure": lambda weights: lambda x: linear(weights, x),
        "jax.jit": lambda weights: jax.jit(lambda x: linear(weights, x)),
        "closure over a jitted function": nested_jit,
        "Partial": lambda weights: Partial(linear, weights),
        "functools.partial": lambda weights: functools.partial(linear, weights),
        "bound method": lambda weights: Model(weights).logits,
        "callable object": Model,
        "randomised": lambda weights: lambda x, key: linear(weights, x),
    }[form](weights)
    attacked(function)
    watch = weakref.ref(weights)
    del function, weights
    gc.collect()
    assert watch() is None


# Gradients of the function's own making.


def straight_through_vjp():
    @jax.custom_vjp
    def rounded(x):
        return jnp.round(8 * x) / 8

    rounded.defvjp(lambda x: (rounded(x), None), lambda _, cotangent: (cotangent,))
    return rounded


def straight_through_jvp():
    @jax.custom_jvp
    def rounded(x):
        return jnp.round(8 * x) / 8

    rounded.defjvp(lambda primals, tangents: (rounded(*primals), tangents[0]))
    return rounded


@pytest.mark.parametrize("make", [straight_through_vjp, straight_through_jvp])
def test_a_custom_gradient_is_the_one_that_is_used(make):
    rounded = make()
    network = as_network(logits_fn := lambda x: linear(WEIGHTS, rounded(x)), IMAGES)
    gradients = jax.jit(jax.grad(lambda images, network: jnp.sum(network(images)[:, 0])))(IMAGES, network)
    np.testing.assert_allclose(gradients, jnp.broadcast_to(WEIGHTS[:, 0].reshape(SHAPE), IMAGES.shape), rtol=1e-5)
    arguments = ARGUMENTS | {"threat": ThreatModel("linf", 0.2)}
    through = attacks.apgd(KEY, logits_fn, **arguments)
    without = attacks.apgd(KEY, lambda x: linear(WEIGHTS, jnp.round(8 * x) / 8), **arguments)
    assert through.fooled.sum() == BATCH > without.fooled.sum()  # rounding alone has the gradient 0


# Dtypes and randomness.


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_logits_of_low_precision_are_compared_in_float32(dtype):
    network = as_network(logits_fn := lambda x: linear(WEIGHTS, x).astype(dtype), IMAGES)
    logits = network(IMAGES)
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, logits_fn(IMAGES).astype(jnp.float32))
    result = attacked(lambda x: linear(WEIGHTS.astype(dtype), x.astype(dtype)))
    assert result.images.dtype == result.loss.dtype == jnp.float32
    np.testing.assert_allclose(result.loss, expected("weights").loss, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("function, randomised", [
    (lambda x: linear(WEIGHTS, x), False),
    (lambda x, key: linear(WEIGHTS, x), True),
    (lambda x, /, key: linear(WEIGHTS, x), True),
    (lambda x, train=False: linear(WEIGHTS, x), False),
    (lambda x, *rest, **options: linear(WEIGHTS, x), False),
    (lambda x, *, train=False: linear(WEIGHTS, x), False),
    (jax.jit(lambda x, key: linear(WEIGHTS, x)), True),
    (Partial(lambda weights, x, key: linear(weights, x), WEIGHTS), True),
    (Partial(linear, WEIGHTS), False),
    (functools.partial(apply, VARIABLES), False),
    (Model(WEIGHTS).logits, False),
    (Model(WEIGHTS), False)])
def test_a_function_of_images_and_key_is_a_randomised_one(function, randomised):
    network = as_network(function, IMAGES)
    assert network.randomised is randomised and classes_of(network, IMAGES) == CLASSES
    np.testing.assert_allclose(network(IMAGES, jax.random.split(KEY, BATCH)), linear(WEIGHTS, IMAGES), rtol=1e-5, atol=1e-5)


def test_the_noise_of_a_randomised_function_follows_the_image():
    network = as_network(logits_fn := lambda x, key: linear(WEIGHTS, x + jax.random.normal(key, x.shape)), IMAGES)
    keys = jax.random.split(KEY, BATCH)
    whole, order = network(IMAGES, keys), np.array([6, 1, 3])
    np.testing.assert_allclose(network(IMAGES[order], keys[order]), whole[order], rtol=1e-5, atol=1e-5)
    noise = jax.vmap(lambda key: jax.random.normal(key, (1, *SHAPE))[0])(keys)
    np.testing.assert_allclose(whole, linear(WEIGHTS, IMAGES + noise), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(whole[:1], logits_fn(IMAGES[:1], keys[0]), rtol=1e-5, atol=1e-4)


# Inside other people's transformations.


def test_weights_that_are_traced_are_attacked_like_others_and_get_no_gradient():
    def inner(weights, scale):
        def logits_fn(images):
            return scale * linear(weights, images)

        return attacks.apgd(KEY, logits_fn, **ARGUMENTS)

    result = jax.jit(inner)(WEIGHTS, 1.0)
    np.testing.assert_array_equal(result.fooled, expected("weights").fooled)
    np.testing.assert_allclose(result.images, expected("weights").images, atol=1e-5)
    np.testing.assert_allclose(result.loss, expected("weights").loss, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.jit(inner)(OTHER, 1.0).loss, expected("other").loss, rtol=1e-4, atol=1e-5)

    def robust_loss(weights):
        points = inner(weights, 1.0).images
        return -jnp.mean(jax.nn.log_softmax(linear(weights, points))[jnp.arange(BATCH), LABELS]), points

    gradients, points = jax.jit(jax.grad(robust_loss, has_aux=True))(WEIGHTS)
    fixed = jax.grad(lambda weights: -jnp.mean(jax.nn.log_softmax(linear(weights, points))[jnp.arange(BATCH), LABELS]))(WEIGHTS)
    np.testing.assert_allclose(gradients, fixed, rtol=1e-4, atol=1e-6)
    for part in ("images", "loss"):
        through = jax.jit(jax.grad(lambda weights: jnp.sum(getattr(inner(weights, 1.0), part))))(WEIGHTS)
        assert (through == 0).all()


def test_networks_and_radii_can_be_mapped_over():
    networks = jax.vmap(lambda weights: attacked(lambda x: linear(weights, x)).loss)(jnp.stack([WEIGHTS, OTHER]))
    np.testing.assert_allclose(networks, [expected("weights").loss, expected("other").loss], rtol=1e-4, atol=1e-5)


# Functions that are none.


MISTAKES = {
    "nothing": (None, ["NoneType", "images -> logits"]),
    "a number": (3, ["int"]),
    "a name": ("resnet18", ["str"]),
    "variables": ({"params": WEIGHTS}, ["dict"]),
    "returns a tuple": (lambda x: (linear(WEIGHTS, x), None), ["tuple", "[batch, classes >= 2]"]),
    "returns a tuple of one": (lambda x: (linear(WEIGHTS, x),), ["tuple"]),
    "returns a dict": (lambda x: {"logits": linear(WEIGHTS, x)}, ["dict"]),
    "returns a list": (lambda x: [linear(WEIGHTS, x)], ["list"]),
    "returns nothing": (lambda x: None, ["NoneType"]),
    "returns a number": (lambda x: 1.0, ["logits [batch, classes >= 2]"]),
    "returns images": (lambda x: x, ["[batch, 4, 4, 2]"]),
    "returns one number per image": (lambda x: linear(WEIGHTS, x)[:, 0], ["[batch", "classes >= 2"]),
    "one class": (lambda x: linear(WEIGHTS, x)[:, :1], ["[batch, 1]"]),
    "loses the batch": (lambda x: linear(WEIGHTS, x)[:1], ["(1, 5)"]),
    "transposed": (lambda x: linear(WEIGHTS, x).T, ["(5, 2)"]),
    "returns booleans": (lambda x: linear(WEIGHTS, x) > 0, ["bool"]),
    "returns integers": (lambda x: jnp.argsort(linear(WEIGHTS, x)), ["int32"]),
    "does not fit the images": (lambda x: linear(WEIGHTS[:-1], x), ["cannot be traced", "[2, 4, 4, 2]"]),
    "a Partial that does not fit the images": (Partial(linear, WEIGHTS[:-1]), ["cannot be traced"]),
    "a Partial that returns a tuple": (Partial(lambda weights, x: (linear(weights, x),), WEIGHTS), ["tuple"]),
    "written for numpy": (lambda x: np.tanh(np.asarray(x)), ["cannot be traced"]),
    "written for torch": (lambda x: x.detach(), ["cannot be traced", "detach"]),
    "branches on values": (lambda x: x if x.sum() > 0 else -x, ["cannot be traced"]),
    "picks by values": (lambda x: linear(WEIGHTS, x[x > 0]), ["cannot be traced"]),
    "has a mistake": (lambda x: {}["weights"], ["cannot be traced", "weights"]),
    "takes nothing": (lambda: linear(WEIGHTS, IMAGES), ["cannot be traced"]),
    "takes too much": (lambda a, b, c: linear(WEIGHTS, a), ["cannot be traced"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_functions_that_give_no_logits(mistake):
    function, mentions = MISTAKES[mistake]
    assert_input_error(lambda: as_network(function, IMAGES), *mentions)
    assert_input_error(lambda: attacked(function), *mentions)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_no_robustness(bad):
    for weights in (WEIGHTS.at[0, 0].set(bad), WEIGHTS * bad):
        assert_input_error(lambda: attacked(Partial(linear, weights)), "8 of the 8 images", "finite")
