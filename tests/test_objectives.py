"""Objectives against closed forms in NumPy and SciPy, in float64 where it matters, and at logits that overflow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from jaxrd import objectives
from tests.support import assert_input_error

BATCH, CLASSES = 40, 7
GENERATOR = np.random.default_rng(0)
LOGITS = GENERATOR.normal(scale=4, size=(BATCH, CLASSES))
TARGET = GENERATOR.normal(scale=4, size=(BATCH, CLASSES))
LABELS = GENERATOR.integers(0, CLASSES, BATCH)
TARGETS = (LABELS + 1 + GENERATOR.integers(0, CLASSES - 1, BATCH)) % CLASSES
ROWS = np.arange(BATCH)
EXTREME = np.array([
    [1e4, -1e4, 0, 3], [-1e4, 1e4, 1e4, -1e4], [1e4, 1e4, 1e4, 1e4], [0, 0, 0, -1e4], [-1e4, -1e4, -1e4, 1e4]], np.float32)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def others(logits, labels):
    """The logits of the wrong classes, [batch, classes - 1]."""
    return np.stack([np.delete(row, label) for row, label in zip(logits, labels)])


def tree(function, *arguments):
    return np.asarray(function(*map(jnp.asarray, arguments)))


def test_cross_entropy_is_minus_the_log_probability(float64):
    expected = -scipy.special.log_softmax(LOGITS, axis=1)[ROWS, LABELS]
    np.testing.assert_allclose(tree(objectives.cross_entropy, LOGITS, LABELS), expected, rtol=1e-12)


def test_cross_entropy_of_soft_labels_is_the_expectation(float64):
    q = scipy.special.softmax(TARGET, axis=1)
    expected = -np.sum(q * scipy.special.log_softmax(LOGITS, axis=1), axis=1)
    np.testing.assert_allclose(tree(objectives.cross_entropy, LOGITS, q), expected, rtol=1e-12)
    # Entropy plus divergence, and the gradient of both: softmax - q.
    divergence = tree(objectives.kl_divergence, np.log(q), LOGITS)
    np.testing.assert_allclose(expected, scipy.stats.entropy(q, axis=1) + divergence, rtol=1e-10)
    gradient = jax.grad(lambda z: jnp.sum(objectives.cross_entropy(z, jnp.asarray(q))))(jnp.asarray(LOGITS))
    np.testing.assert_allclose(gradient, scipy.special.softmax(LOGITS, axis=1) - q, atol=1e-12)


def test_soft_labels_that_are_certain_are_the_labels():
    logits, labels = jnp.asarray(LOGITS, jnp.float32), jnp.asarray(LABELS)
    certain = jax.nn.one_hot(labels, CLASSES)
    for function in (objectives.cross_entropy, objectives.expectation, objectives.correct):
        np.testing.assert_array_equal(function(logits, certain), function(logits, labels))


def test_soft_labels_are_correct_where_their_likeliest_class_is_found():
    logits = jnp.array([[2.0, 1.0, 0.0]] * 4)
    soft = jnp.array([[0.6, 0.4, 0.0], [0.4, 0.6, 0.0], [0.5, 0.5, 0.0], [0.3, 0.3, 0.4]])
    assert objectives.correct(logits, soft).tolist() == [True, False, True, False]


@pytest.mark.parametrize("function", [
    objectives.margin, objectives.dlr, objectives.boosted_cross_entropy,
    lambda z, q: objectives.targeted_dlr(z, q, jnp.zeros(4, int))])
def test_what_needs_one_true_class_refuses_soft_labels(function):
    assert_input_error(lambda: function(jnp.zeros([4, 5]), jnp.full([4, 5], 0.2)), "soft, float32[4, 5]", "int [batch]",
                       "--config.data.mixing=none")


@pytest.mark.parametrize("function", [objectives.cross_entropy, objectives.correct])
def test_labels_of_another_dtype_are_refused(function):
    for labels in (jnp.zeros([4]), jnp.zeros([4, 3], int), jnp.zeros([4], bool)):
        assert_input_error(lambda: function(jnp.zeros([4, 3]), labels), f"labels are {labels.dtype}[4", "rows that sum to 1")


def test_kl_divergence_takes_the_target_first(float64):
    target, model = scipy.special.softmax(TARGET, axis=1), scipy.special.softmax(LOGITS, axis=1)
    got = tree(objectives.kl_divergence, TARGET, LOGITS)
    np.testing.assert_allclose(got, [scipy.stats.entropy(t, m) for t, m in zip(target, model)], rtol=1e-10)
    assert np.abs(got - tree(objectives.kl_divergence, LOGITS, TARGET)).min() > 1e-6


def test_kl_divergence_of_a_certain_target_is_the_cross_entropy(float64):
    certain = 1e3 * np.eye(CLASSES)[LABELS]
    np.testing.assert_allclose(
        tree(objectives.kl_divergence, certain, LOGITS), tree(objectives.cross_entropy, LOGITS, LABELS), rtol=1e-12)


def test_soft_distances(float64):
    difference = scipy.special.softmax(TARGET, axis=1) - scipy.special.softmax(LOGITS, axis=1)
    np.testing.assert_allclose(tree(objectives.l1_distance, TARGET, LOGITS), np.abs(difference).sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(tree(objectives.squared_l2_distance, TARGET, LOGITS), (difference**2).sum(axis=1), rtol=1e-12)
    opposite = [1e3, 0.0], [0.0, 1e3]
    assert tree(objectives.l1_distance, *([row] for row in opposite)) == 2
    assert tree(objectives.squared_l2_distance, *([row] for row in opposite)) == 2


def test_margin(float64):
    expected = others(LOGITS, LABELS).max(axis=1) - LOGITS[ROWS, LABELS]
    np.testing.assert_array_equal(tree(objectives.margin, LOGITS, LABELS), expected)
    # Wrong logits that are all negative: masking by a product with 0 would put 0 among them.
    np.testing.assert_array_equal(tree(objectives.margin, -9 + 0 * LOGITS[:2], LABELS[:2]), 0)


def test_dlr_from_its_formula(float64):
    def one(z, y):
        order = np.argsort(z)[::-1]
        best_other = z[order[1]] if order[0] == y else z[order[0]]
        return -(z[y] - best_other) / (z[order[0]] - z[order[2]])

    expected = [one(z, y) for z, y in zip(LOGITS, LABELS)]
    np.testing.assert_allclose(tree(objectives.dlr, LOGITS, LABELS), expected, rtol=1e-9)
    assert min(expected) < -0.1 and max(expected) > 0.1  # both kinds of example are there


def test_targeted_dlr_from_its_formula(float64):
    def one(z, y, t):
        first, _, third, fourth = np.sort(z)[::-1][:4]
        return -(z[y] - z[t]) / (first - (third + fourth) / 2)

    expected = [one(*example) for example in zip(LOGITS, LABELS, TARGETS)]
    np.testing.assert_allclose(tree(objectives.targeted_dlr, LOGITS, LABELS, TARGETS), expected, rtol=1e-9)


@pytest.mark.parametrize("classes, objective", [
    (3, lambda z: objectives.dlr(z, jnp.array([1]))),
    (4, lambda z: objectives.targeted_dlr(z, jnp.array([1]), jnp.array([2]))),
])
def test_dlr_needs_its_classes(classes, objective):
    assert jnp.isfinite(objective(jnp.arange(float(classes))[None])).all()
    with pytest.raises(AssertionError):
        objective(jnp.arange(classes - 1.0)[None])


@pytest.mark.parametrize("scale, offset", [(1e-3, 0), (1, -50), (200, 7)])
def test_dlr_ignores_offset_and_positive_scale(float64, scale, offset):
    moved = scale * LOGITS + offset
    np.testing.assert_allclose(tree(objectives.dlr, moved, LABELS), tree(objectives.dlr, LOGITS, LABELS), rtol=1e-6)
    np.testing.assert_allclose(
        tree(objectives.targeted_dlr, moved, LABELS, TARGETS), tree(objectives.targeted_dlr, LOGITS, LABELS, TARGETS),
        rtol=1e-6)
    np.testing.assert_allclose(tree(objectives.margin, moved, LABELS), scale * tree(objectives.margin, LOGITS, LABELS))


def test_margin_and_dlr_are_positive_exactly_where_misclassified():
    wrong = LOGITS.argmax(axis=1) != LABELS
    assert 0 < wrong.sum() < BATCH
    np.testing.assert_array_equal(tree(objectives.margin, LOGITS, LABELS) > 0, wrong)
    np.testing.assert_array_equal(tree(objectives.dlr, LOGITS, LABELS) > 0, wrong)
    np.testing.assert_array_equal(tree(objectives.correct, LOGITS, LABELS), ~wrong)


def test_the_first_class_wins_ties():
    tied = jnp.array([[2.0, 2.0, 1.0]] * 2)
    assert objectives.correct(tied, jnp.array([0, 1])).tolist() == [True, False]
    assert objectives.margin(tied, jnp.array([0, 1])).tolist() == [0, 0]


def test_kl_is_nonnegative_and_zero_with_zero_gradient_at_equality():
    target, logits = jnp.asarray(TARGET, jnp.float32), jnp.asarray(LOGITS, jnp.float32)
    assert (objectives.kl_divergence(target, logits) > 0).all()
    near = target + 1e-4 * logits
    assert (objectives.kl_divergence(target, near) >= -1e-6).all()
    for argument in (0, 1):
        value, gradient = jax.value_and_grad(
            lambda a, b: jnp.sum(objectives.kl_divergence(a, b)), argument)(target, target + 3.0)
        np.testing.assert_allclose(value, 0, atol=1e-5)
        np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_kl_gradients_are_their_closed_forms(float64):
    target, model = scipy.special.softmax(TARGET, axis=1), scipy.special.softmax(LOGITS, axis=1)

    def total(a, b):
        return jnp.sum(objectives.kl_divergence(a, b))

    towards_target, towards_model = jax.grad(total, (0, 1))(jnp.asarray(TARGET), jnp.asarray(LOGITS))
    np.testing.assert_allclose(towards_model, model - target, atol=1e-12)
    ratio = np.log(target / model)
    np.testing.assert_allclose(towards_target, target * (ratio - np.sum(target * ratio, axis=1, keepdims=True)), atol=1e-12)


@pytest.mark.parametrize("name, arguments", [
    ("cross_entropy", "labels"), ("margin", "labels"), ("dlr", "labels"), ("targeted_dlr", "targets"),
    ("kl_divergence", "logits"), ("l1_distance", "logits"), ("squared_l2_distance", "logits")])
def test_extreme_logits_give_finite_values_and_gradients(name, arguments):
    logits, labels = jnp.asarray(EXTREME), jnp.array([0, 0, 1, 3, 2])
    for more in {
        "labels": [(labels,)],
        "targets": [(labels, (labels + 1) % 4)],
        "logits": [(jnp.roll(logits, shift, axis),) for axis in (0, 1) for shift in (0, 1, 2)],
    }[arguments]:
        function = getattr(objectives, name)
        assert jnp.isfinite(function(logits, *more)).all()
        argnums = (0, 1) if arguments == "logits" else 0
        gradients = jax.grad(lambda *all_: jnp.sum(function(*all_)), argnums)(logits, *more)
        assert all(jnp.isfinite(gradient).all() for gradient in jax.tree.leaves(gradients))


def test_extreme_logits_have_the_exact_divergence():
    one, other = jnp.array([[1e4, -1e4]]), jnp.array([[-1e4, 1e4]])
    assert objectives.kl_divergence(one, other) == 2e4
    assert objectives.kl_divergence(one, one) == 0
    assert objectives.cross_entropy(other, jnp.array([0])) == 2e4


def test_objectives_treat_examples_apart():
    logits, labels = jnp.asarray(LOGITS, jnp.float32), jnp.asarray(LABELS)
    for function in (objectives.cross_entropy, objectives.margin, objectives.dlr):
        whole = function(logits, labels)
        assert whole.shape == (BATCH,)
        np.testing.assert_allclose(function(logits[3:9], labels[3:9]), whole[3:9], rtol=1e-6)
    target = jnp.asarray(TARGET, jnp.float32)
    for function in (objectives.kl_divergence, objectives.l1_distance, objectives.squared_l2_distance):
        np.testing.assert_allclose(function(target[3:9], logits[3:9]), function(target, logits)[3:9], rtol=1e-5)


@pytest.mark.parametrize("call", [
    lambda: objectives.cross_entropy(jnp.zeros([4, 3]), jnp.zeros([3], int)),
    lambda: objectives.cross_entropy(jnp.zeros([4, 3]), jnp.zeros([4, 2])),
    lambda: objectives.cross_entropy(jnp.zeros([4, 3]), jnp.zeros([1, 3])),
    lambda: objectives.correct(jnp.zeros([4, 3]), jnp.zeros([1, 3])),
    lambda: objectives.margin(jnp.zeros([4]), jnp.zeros([4], int)),
    lambda: objectives.kl_divergence(jnp.zeros([4, 3]), jnp.zeros([1, 3])),
    lambda: objectives.l1_distance(jnp.zeros([4, 3]), jnp.zeros([4, 2])),
    lambda: objectives.correct(jnp.zeros([4, 3]), jnp.zeros([2], int)),
])
def test_shapes_that_would_broadcast_are_refused(call):
    with pytest.raises(AssertionError):
        call()


def test_labels_out_of_range_are_no_number():
    assert jnp.isnan(objectives.cross_entropy(jnp.zeros([1, 3]), jnp.array([3]))).all()


def test_parity_with_torch_losses(float64):
    torch = pytest.importorskip("torch", reason="parity with PyTorch needs torch, which jaxrd does not")
    functional = torch.nn.functional
    logits, target, labels = torch.tensor(LOGITS), torch.tensor(TARGET), torch.tensor(LABELS)

    expected = functional.cross_entropy(logits, labels, reduction="none")
    np.testing.assert_allclose(tree(objectives.cross_entropy, LOGITS, LABELS), expected.numpy(), rtol=1e-12)

    # PyTorch's first argument is the model's log-probabilities; batchmean is our mean over the batch, mean another 1/C.
    def divergence(reduction):
        return functional.kl_div(
            functional.log_softmax(logits, dim=1), functional.softmax(target, dim=1), reduction=reduction).numpy()

    got = tree(objectives.kl_divergence, TARGET, LOGITS)
    np.testing.assert_allclose(got, divergence("none").sum(axis=1), rtol=1e-10)
    np.testing.assert_allclose(got.mean(), divergence("batchmean"), rtol=1e-10)
    with pytest.warns(UserWarning, match="batchmean"):
        np.testing.assert_allclose(got.mean() / CLASSES, divergence("mean"), rtol=1e-10)


def test_parity_with_torch_gradients():
    torch = pytest.importorskip("torch", reason="parity with PyTorch needs torch, which jaxrd does not")
    logits = torch.tensor(EXTREME, requires_grad=True)
    labels = np.array([0, 0, 1, 3, 2])
    torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="sum").backward()
    ours = jax.grad(lambda z: jnp.sum(objectives.cross_entropy(z, jnp.asarray(labels))))(jnp.asarray(EXTREME))
    np.testing.assert_allclose(ours, logits.grad.numpy(), atol=1e-6)


def test_parity_with_torch_on_soft_labels(float64):
    torch = pytest.importorskip("torch", reason="parity with PyTorch needs torch, which jaxrd does not")
    q, logits = scipy.special.softmax(TARGET, axis=1), torch.tensor(LOGITS, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(q), reduction="none")
    expected.sum().backward()
    ours, gradient = jax.vjp(lambda z: objectives.cross_entropy(z, jnp.asarray(q)), jnp.asarray(LOGITS))
    np.testing.assert_allclose(ours, expected.detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(gradient(jnp.ones(BATCH))[0], logits.grad.numpy(), atol=1e-12)
