"""What indirect gradient matching must be: nothing between equals, blind to biases, and in the limit the exact product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxrd import distillation
from jaxrd.distillation.gradient_matching import input_gradients

BATCH, SHAPE, CLASSES = 6, (3, 3, 2), 5
SIZE = int(np.prod(SHAPE))


def draw(*shape, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=shape)


IMAGES = np.random.default_rng(9).uniform(size=(BATCH, *SHAPE))
DELTA = draw(BATCH, *SHAPE, seed=8, scale=0.1)


def smooth(seed):
    """Parameters of a small network without kinks."""
    return {"hidden": draw(SIZE, 12, seed=seed, scale=0.5), "out": draw(12, CLASSES, seed=seed + 100)}


def network(params, images):
    return jnp.tanh(images.reshape(len(images), -1) @ params["hidden"]) @ params["out"]


STUDENT, TEACHER = smooth(1), smooth(2)


def at(images, delta, student=STUDENT, teacher=TEACHER, forward=network):
    """IGDM of two networks at images, along delta."""
    return distillation.igdm(
        forward(student, images + delta), forward(student, images - delta),
        forward(teacher, images + delta), forward(teacher, images - delta))


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("student, delta", [(TEACHER, DELTA), (STUDENT, 0 * DELTA)], ids=["student is teacher", "no delta"])
def test_nothing_to_match_costs_nothing_and_pulls_nowhere(float64, student, delta):
    def total(student):
        return jnp.sum(at(IMAGES, delta, student))

    value, gradients = jax.value_and_grad(total)(student)
    np.testing.assert_allclose(value, 0, atol=1e-14)
    for gradient in jax.tree.leaves(gradients):
        np.testing.assert_allclose(gradient, 0, atol=1e-14)
    assert at(IMAGES, DELTA, STUDENT).min() > 1e-4  # and there is something elsewhere


def test_both_ends_pull_on_the_student(float64):
    ends = [network(params, IMAGES + sign * DELTA) for params in (STUDENT, TEACHER) for sign in (1, -1)]
    plus, minus = jax.grad(lambda *ends: jnp.sum(distillation.igdm(*ends)), (0, 1))(*ends)
    np.testing.assert_allclose(plus, -minus, atol=1e-14)
    target = scipy.special.softmax(ends[2] - ends[3], axis=1)
    np.testing.assert_allclose(plus, scipy.special.softmax(ends[0] - ends[1], axis=1) - target, atol=1e-12)


def test_biases_of_linear_models_cancel(float64):
    def linear(params, images):
        return images.reshape(len(images), -1) @ params["weights"] + params["bias"]

    def with_bias(seed, scale):
        return {"weights": draw(SIZE, CLASSES, seed=seed), "bias": draw(CLASSES, seed=seed + 50, scale=scale)}

    without = at(IMAGES, DELTA, with_bias(1, 0), with_bias(2, 0), linear)
    np.testing.assert_allclose(at(IMAGES, DELTA, with_bias(1, 3), with_bias(2, 5), linear), without, rtol=1e-9)
    # For linear models the difference is 2 W d exactly, wherever the images are.
    np.testing.assert_allclose(at(IMAGES + 1, DELTA, with_bias(1, 3), with_bias(2, 5), linear), without, rtol=1e-9)
    exact = distillation.jvp_matching(
        lambda images: linear(with_bias(1, 3), images), lambda images: linear(with_bias(2, 5), images), IMAGES, DELTA)
    np.testing.assert_allclose(exact, without, rtol=1e-9)


def test_a_constant_per_example_changes_nothing(float64):
    ends = [draw(BATCH, CLASSES, seed=seed) for seed in range(4)]
    shifted = [end + draw(BATCH, 1, seed=10 + seed, scale=20) for seed, end in enumerate(ends)]
    np.testing.assert_allclose(distillation.igdm(*shifted), distillation.igdm(*ends), rtol=1e-9)


def test_swapping_the_ends_mirrors_both_differences(float64):
    plus, minus = network(STUDENT, IMAGES + DELTA), network(STUDENT, IMAGES - DELTA)
    np.testing.assert_allclose(distillation.igdm(plus, minus, plus, minus), 0, atol=1e-14)
    # Not symmetric in student and teacher, and not in one pair of ends alone.
    assert distillation.igdm(plus, minus, minus, plus).min() > 1e-4


def test_small_delta_limit_is_twice_the_variance_of_the_jacobian_product(float64):
    def product(params):
        return np.asarray(jax.jvp(lambda images: network(params, images), (jnp.asarray(IMAGES),), (jnp.asarray(DELTA),))[1])

    limit = 2 * np.var(product(TEACHER) - product(STUDENT), axis=1)
    errors = {}
    for t in (1e-1, 1e-2, 1e-3):
        errors[t] = np.abs(at(IMAGES, t * DELTA) / (t**2 * limit) - 1).max()
    # The next term of the logarithm's expansion is t^3, so the relative error falls with t.
    assert errors[1e-3] < 1e-3
    np.testing.assert_allclose(errors[1e-2] / errors[1e-3], 10, rtol=0.2)


def test_taylor_difference_and_exact_product_agree_to_fourth_order(float64):
    def student(images):
        return network(STUDENT, images)

    def teacher(images):
        return network(TEACHER, images)

    differences = {}
    for t in (0.1, 0.05, 0.025):
        exact = distillation.jvp_matching(student, teacher, jnp.asarray(IMAGES), jnp.asarray(t * DELTA))
        differences[t] = np.abs(at(IMAGES, t * DELTA) - exact)
    for larger, smaller in ((0.1, 0.05), (0.05, 0.025)):
        ratio = np.sum(differences[larger]) / np.sum(differences[smaller])
        np.testing.assert_allclose(ratio, 16, rtol=0.15)
    t = 1e-3
    exact = distillation.jvp_matching(student, teacher, jnp.asarray(IMAGES), jnp.asarray(t * DELTA))
    np.testing.assert_allclose(at(IMAGES, t * DELTA) / exact, 1, atol=1e-5)


def test_jvp_matching_against_finite_differences(float64):
    step = 1e-6

    def product(params):
        ends = [np.asarray(network(params, IMAGES + sign * step * DELTA)) for sign in (1, -1)]
        return (ends[0] - ends[1]) / (2 * step)

    target, model = (scipy.special.log_softmax(2 * product(params), axis=1) for params in (TEACHER, STUDENT))
    expected = np.sum(np.exp(target) * (target - model), axis=1)
    got = distillation.jvp_matching(
        lambda images: network(STUDENT, images), lambda images: network(TEACHER, images), jnp.asarray(IMAGES),
        jnp.asarray(DELTA))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_jvp_matching_trains_the_student_like_the_taylor_difference(float64):
    delta = jnp.asarray(1e-2 * DELTA)

    def exact(params):
        return jnp.sum(distillation.jvp_matching(
            lambda images: network(params, images), lambda images: network(TEACHER, images), jnp.asarray(IMAGES), delta))

    indirect = jax.grad(lambda params: jnp.sum(at(IMAGES, delta, params)))(STUDENT)
    for name, gradient in jax.grad(exact)(STUDENT).items():
        np.testing.assert_allclose(gradient, indirect[name], rtol=0, atol=1e-3 * np.abs(gradient).max())


def test_shapes_must_agree():
    images = jnp.zeros((2, *SHAPE))
    with pytest.raises(AssertionError):
        distillation.jvp_matching(lambda x: x, lambda x: x, images, images[:1])
    with pytest.raises(AssertionError):
        distillation.igdm(*[jnp.zeros([2, 3])] * 2, *[jnp.zeros([2, 4])] * 2)


def test_parity_with_the_loss_as_published_in_torch(float64):
    torch = pytest.importorskip("torch", reason="parity with PyTorch needs torch, which jaxrd does not")
    ends = [draw(BATCH, CLASSES, seed=seed, scale=2) for seed in range(4)]
    student_plus, student_minus = (torch.tensor(end, requires_grad=True) for end in ends[:2])
    teacher_plus, teacher_minus = map(torch.tensor, ends[2:])
    loss = torch.nn.functional.kl_div(
        torch.log_softmax(student_plus - student_minus, dim=1), torch.softmax(teacher_plus - teacher_minus, dim=1),
        reduction="batchmean")
    loss.backward()

    value, gradients = jax.value_and_grad(lambda *ends: jnp.mean(distillation.igdm(*ends)), (0, 1))(*map(jnp.asarray, ends))
    np.testing.assert_allclose(value, loss.item(), rtol=1e-10)
    np.testing.assert_allclose(gradients[0], student_plus.grad.numpy(), atol=1e-12)
    np.testing.assert_allclose(gradients[1], student_minus.grad.numpy(), atol=1e-12)


@pytest.mark.parametrize("scalar, expected", [
    ("probability", lambda q, z: jnp.sum(q * jax.nn.softmax(z))), ("logit", lambda q, z: jnp.sum(q * z)),
    ("cross_entropy", lambda q, z: -jnp.sum(q * jnp.log(jax.nn.softmax(z))))])
def test_input_gradients_under_soft_labels_are_those_of_the_expectation(float64, scalar, expected):
    soft = scipy.special.softmax(draw(BATCH, CLASSES, seed=3), axis=1)
    got = input_gradients(lambda images: network(STUDENT, images), IMAGES, jnp.asarray(soft), scalar)
    assert got.shape == IMAGES.shape
    for image, q, gradient in zip(IMAGES, soft, got):
        one = jax.grad(lambda image: expected(q, network(STUDENT, image[None])[0]))(jnp.asarray(image))
        np.testing.assert_allclose(gradient, one, atol=1e-12)
    labels = jnp.asarray([0, 1, 2, 3, 4, 0])
    certain = input_gradients(lambda images: network(STUDENT, images), IMAGES, jax.nn.one_hot(labels, CLASSES), scalar)
    hard = input_gradients(lambda images: network(STUDENT, images), IMAGES, labels, scalar)
    np.testing.assert_allclose(certain, hard, atol=1e-12)
