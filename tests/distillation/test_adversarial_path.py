"""Along a path: weights and losses in closed form, anchors and targets never of the own class and drawn as they should be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import scipy.stats

from jaxrd.distillation import path_weights
from jaxrd.distillation.adversarial_path import (
    ALIGNMENTS, NORMALISATIONS, SCHEMES, draw_anchors, draw_targets, hinge, hinge_bound, jensen_shannon, weighted_path_loss)
from tests.support import assert_input_error

POINTS, BATCH, CLASSES = 4, 7, 5
GENERATOR = np.random.default_rng(0)
START = GENERATOR.normal(size=(BATCH, CLASSES)).astype(np.float32)
PATH = (START + GENERATOR.normal(size=(POINTS, BATCH, CLASSES))).astype(np.float32)
TEACHER = (2 * GENERATOR.normal(size=(BATCH, CLASSES))).astype(np.float32)
LABELS = np.array([0, 1, 2, 3, 4, 0, 1])
EXAMPLES = np.arange(BATCH)

each_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def weights(scheme, path=PATH, start=START, **options):
    if scheme == "gap":
        options = {"teacher_logits": TEACHER} | options
    return np.asarray(path_weights(jnp.asarray(start), jnp.asarray(path), jnp.asarray(LABELS), scheme, **options))


def true_class(logits):
    return scipy.special.softmax(np.float64(logits), axis=-1)[..., EXAMPLES, LABELS]


def divergence(target, logits):
    target, other = (scipy.special.softmax(np.float64(values), axis=-1) for values in (target, logits))
    return scipy.special.rel_entr(target, other).sum(axis=-1)


# Weights.


def test_drop_is_the_loss_of_true_class_probability_relative_to_the_largest_of_the_batch():
    drop = np.maximum(true_class(START) - true_class(PATH), 0)
    expected = drop / drop.max(axis=1, keepdims=True)
    found = weights("drop")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.max(axis=1), 1, rtol=1e-6)  # at every step
    assert (found == 0).any() and len(np.unique(found)) > BATCH


@pytest.mark.parametrize("certainty, size", [(12, 1e-4), (16, 1e-6), (22, 1e-8)])
def test_the_drop_of_a_confident_network_keeps_its_digits(certainty, size):
    """Its probabilities are 1 in float32; what is left for the other classes is not 0."""
    certain = certainty * np.eye(CLASSES, dtype=np.float32)[LABELS]
    start, path = certain + 0.1 * START, certain + 0.1 * START + 0.5 * (PATH - START)
    drop = np.maximum(true_class(start) - true_class(path), 0)
    assert size / 100 < drop.max() < size
    # Below 1e-8, where the division is guarded, no drop counts in full.
    expected = drop / np.maximum(drop.max(axis=1, keepdims=True), 1e-8)
    np.testing.assert_allclose(weights("drop", path, start), expected, rtol=1e-2, atol=1e-5)


def test_drop_is_the_default():
    np.testing.assert_array_equal(path_weights(START, PATH, LABELS), weights("drop"))


def test_uniform_linear_and_last_only_look_at_no_prediction():
    np.testing.assert_array_equal(weights("uniform"), np.ones((POINTS, BATCH)))
    np.testing.assert_allclose(weights("linear"), np.tile([[0.25], [0.5], [0.75], [1.0]], BATCH), rtol=1e-6)
    np.testing.assert_array_equal(weights("last_only"), np.repeat([[0.0], [0.0], [0.0], [1.0]], BATCH, axis=1))


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_boundary_is_exponential_in_the_absolute_margin(scale):
    others = np.where(np.eye(CLASSES, dtype=bool)[LABELS], -np.inf, PATH).max(axis=-1)
    margins = others - PATH[:, EXAMPLES, LABELS]
    assert (margins > 0).any() and (margins < 0).any()
    np.testing.assert_allclose(weights("boundary", scale=scale), np.exp(-np.abs(margins) / scale), rtol=1e-4)


def test_boundary_is_largest_where_two_classes_tie():
    path = PATH.copy()
    path[2, EXAMPLES, LABELS] = np.where(np.eye(CLASSES, dtype=bool)[LABELS], -np.inf, PATH[2]).max(axis=-1)
    np.testing.assert_array_equal(weights("boundary", path)[2], 1)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("at_points", [False, True])
def test_gap_is_a_softmax_over_the_path_of_the_divergence_from_the_teacher(scale, at_points):
    teacher = (TEACHER + 0.5 * PATH if at_points else TEACHER).astype(np.float32)
    expected = scipy.special.softmax(divergence(np.broadcast_to(teacher, PATH.shape), PATH) / scale, axis=0)
    found = weights("gap", teacher_logits=teacher, scale=scale)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(found.sum(axis=0), 1, rtol=1e-5)


@each_scheme
@pytest.mark.parametrize("floor", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("size", [0.01, 1.0, 1e4])
def test_weights_lie_between_the_floor_and_one(scheme, floor, size):
    found = weights(scheme, size * PATH, size * START, floor=floor)
    assert found.shape == (POINTS, BATCH) and found.dtype == np.float32
    assert floor - 1e-6 <= found.min() and found.max() <= 1


@each_scheme
def test_the_floor_raises_what_lies_below_it_and_nothing_else(scheme):
    plain = weights(scheme)
    np.testing.assert_array_equal(weights(scheme, floor=0.3), np.maximum(plain, np.float32(0.3)))


def test_a_path_that_stays_at_its_start_has_no_drop():
    still = np.broadcast_to(START, PATH.shape)
    np.testing.assert_array_equal(weights("drop", still), 0)
    # Nor has an example whose own path stays, or improves.
    path = PATH.copy()
    path[:, 2] = START[2]
    path[:, 3, LABELS[3]] = START[3].max() + 10
    found = weights("drop", path)
    np.testing.assert_array_equal(found[:, 2:4], 0)
    np.testing.assert_allclose(found.max(axis=1), 1, rtol=1e-6)


@each_scheme
def test_no_gradient_flows_into_weights(scheme):
    def total(start, path, teacher):
        options = {"teacher_logits": teacher} if scheme == "gap" else {}
        return jnp.sum(path_weights(start, path, LABELS, scheme, **options) * jnp.arange(BATCH))

    for gradient in jax.grad(total, (0, 1, 2))(START, PATH, TEACHER):
        assert (gradient == 0).all()


def test_unknown_weights_and_weights_without_their_teacher():
    with pytest.raises(ValueError, match='"dropp".*drop, uniform'):
        weights("dropp")
    with pytest.raises(ValueError, match='"gap".*teacher_logits'):
        path_weights(START, PATH, LABELS, "gap")
    with pytest.raises(AssertionError):
        path_weights(START[:3], PATH, LABELS)


# Their sum.


LOSSES = GENERATOR.uniform(0.1, 2, (POINTS, BATCH)).astype(np.float32)
WEIGHTS = GENERATOR.uniform(0, 1, (POINTS, BATCH)).astype(np.float32)
WEIGHTS[:, 3] = 0


def test_normalisations_in_closed_form():
    total = (WEIGHTS * LOSSES).sum(axis=0)
    expected = {
        "per_sample": total / (WEIGHTS.sum(axis=0) + 1e-8), "batch": total / WEIGHTS.sum(axis=0).mean(),
        "none": total / POINTS}
    for normalisation in NORMALISATIONS:
        found = weighted_path_loss(WEIGHTS, LOSSES, normalisation)
        np.testing.assert_allclose(found, expected[normalisation], rtol=1e-5)
        assert found[3] == 0  # no point of it counts
    np.testing.assert_array_equal(weighted_path_loss(WEIGHTS, LOSSES), weighted_path_loss(WEIGHTS, LOSSES, "per_sample"))


def test_points_that_were_left_out_count_in_the_mean_over_the_path():
    last = WEIGHTS * np.array([[0], [0], [0], [1]], np.float32)
    for normalisation in NORMALISATIONS:
        np.testing.assert_allclose(
            weighted_path_loss(last[-1:], LOSSES[-1:], normalisation, POINTS),
            weighted_path_loss(last, LOSSES, normalisation), rtol=1e-6)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_equal_weights_of_one_are_the_mean_over_the_path(normalisation):
    np.testing.assert_allclose(
        weighted_path_loss(jnp.ones((POINTS, BATCH)), LOSSES, normalisation), LOSSES.mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize("normalisation, factor", [("per_sample", 1), ("batch", 1), ("none", 0.01)])
def test_only_without_normalisation_does_the_scale_of_weights_matter(normalisation, factor):
    np.testing.assert_allclose(
        weighted_path_loss(0.01 * WEIGHTS, LOSSES, normalisation),
        factor * weighted_path_loss(WEIGHTS, LOSSES, normalisation), rtol=1e-4)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_no_weight_anywhere_is_no_loss_and_no_trouble(normalisation):
    value, gradient = jax.value_and_grad(
        lambda losses: jnp.sum(weighted_path_loss(jnp.zeros((POINTS, BATCH)), losses, normalisation)))(LOSSES)
    assert value == 0 and (gradient == 0).all()


def test_last_only_is_the_loss_at_the_last_point():
    np.testing.assert_allclose(weighted_path_loss(weights("last_only"), LOSSES), LOSSES[-1], rtol=1e-6)


def test_unknown_normalisation():
    with pytest.raises(ValueError, match='"sample".*per_sample, batch, none'):
        weighted_path_loss(WEIGHTS, LOSSES, "sample")
    with pytest.raises(AssertionError):
        weighted_path_loss(WEIGHTS[0], LOSSES)


# Alignment.


def test_jensen_shannon_is_that_of_scipy():
    for size in (0.1, 1.0, 5.0):
        t, s = size * TEACHER, size * START
        expected = scipy.spatial.distance.jensenshannon(
            scipy.special.softmax(np.float64(t), axis=1), scipy.special.softmax(np.float64(s), axis=1), axis=1) ** 2
        np.testing.assert_allclose(jensen_shannon(t, s), expected, rtol=1e-3, atol=1e-6)


def test_jensen_shannon_is_symmetric_and_between_zero_and_log_2():
    np.testing.assert_allclose(jensen_shannon(TEACHER, START), jensen_shannon(START, TEACHER), rtol=1e-5)
    np.testing.assert_allclose(jensen_shannon(TEACHER, TEACHER + 3), 0, atol=1e-6)
    apart = 1e4 * np.eye(CLASSES, dtype=np.float32)
    np.testing.assert_allclose(jensen_shannon(apart, np.roll(apart, 1, axis=1)), np.log(2), rtol=1e-6)
    found = jensen_shannon(10 * TEACHER, 10 * START)
    assert found.min() >= 0 and found.max() <= np.log(2) + 1e-6


def test_jensen_shannon_has_a_gradient_everywhere():
    for other in (TEACHER, TEACHER + 1, 1e3 * START):
        gradient = jax.grad(lambda logits: jnp.sum(jensen_shannon(TEACHER, logits)))(jnp.asarray(other))
        assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("distance", ALIGNMENTS)
def test_an_alignment_is_zero_between_equals_and_grows_apart(distance):
    measure = ALIGNMENTS[distance]
    np.testing.assert_allclose(measure(TEACHER, TEACHER), 0, atol=1e-6)
    near, far = (measure(TEACHER, TEACHER + size * START) for size in (0.5, 2.0))
    assert near.shape == (BATCH,) and (near > 1e-4).all() and far.mean() > 2 * near.mean()


def test_alignments_take_the_target_first():
    np.testing.assert_allclose(ALIGNMENTS["kl"](TEACHER, START), divergence(TEACHER, START), rtol=1e-4)
    difference = scipy.special.softmax(TEACHER, axis=1) - scipy.special.softmax(START, axis=1)
    np.testing.assert_allclose(ALIGNMENTS["squared_error"](TEACHER, START), (difference**2).sum(axis=1), rtol=1e-4)
    np.testing.assert_allclose(ALIGNMENTS["l2"](TEACHER, START), np.linalg.norm(difference, axis=1), rtol=1e-4)


# The hinge.


@pytest.mark.parametrize("bound", [0.0, 0.5, 1.0, 1.5, 3.0])
def test_the_mean_of_the_hinge_is_what_exceeds_the_bound(bound):
    losses = LOSSES[0]
    np.testing.assert_allclose(np.mean(hinge(losses, bound)), max(0, losses.mean() - bound), atol=1e-6)


def test_the_hinge_passes_the_gradient_above_the_bound_and_none_below():
    for bound, expected in ((LOSSES[0].mean() - 0.1, 1), (LOSSES[0].mean() + 0.1, 0)):
        gradient = jax.grad(lambda losses: jnp.sum(hinge(losses, bound)))(jnp.asarray(LOSSES[0]))
        np.testing.assert_array_equal(gradient, expected)


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("threshold", [0.01, 0.3, 0.8])
def test_hinge_bounds_in_closed_form(threshold, classes):
    one_hot = np.eye(classes)[0]
    smooth = np.full(classes, threshold / (classes - 1))
    smooth[0] = 1 - threshold
    squared = threshold**2 * (1 + 1 / (classes - 1))
    expected = {
        "kl": -np.log1p(-threshold), "squared_error": squared, "l2": np.sqrt(squared),
        "js": scipy.spatial.distance.jensenshannon(one_hot, smooth) ** 2}
    assert {*expected} == {*ALIGNMENTS}
    for distance, value in expected.items():
        np.testing.assert_allclose(hinge_bound(threshold, classes, distance), value, rtol=1e-3)


# Anchors and targets.


DRAWS = 6000
UNBALANCED = np.array([0] * 6 + [1] * 3 + [2] * 2 + [4])  # and nothing of class 3


@functools.cache
def many_anchors(labels):
    """DRAWS anchors of every image, [DRAWS, batch]."""
    keys = jax.random.split(jax.random.key(1), DRAWS)
    return np.asarray(jax.jit(jax.vmap(lambda key: draw_anchors(key, jnp.asarray(labels))))(keys))


@pytest.mark.parametrize("labels", [UNBALANCED, np.arange(12) % 4, np.array([0, 1]), np.array([2, 2, 2, 2, 2, 0])],
                         ids=["unbalanced", "balanced", "two", "all but one alike"])
def test_an_anchor_is_in_the_batch_and_never_of_the_own_class(labels):
    anchors = many_anchors(tuple(labels))
    assert anchors.min() >= 0 and anchors.max() < len(labels)
    assert (labels[anchors] != labels).all()


def test_a_batch_of_one_class_has_no_anchors():
    assert_input_error(lambda: draw_anchors(jax.random.key(0), jnp.full(4, 2)), "all 4 labels are 2", "two classes")


@pytest.mark.parametrize("labels", [UNBALANCED, np.arange(12) % 4], ids=["unbalanced", "balanced"])
def test_the_anchors_class_is_uniform_over_the_others_and_the_anchor_within_it(labels):
    anchors = many_anchors(tuple(labels))
    present = np.unique(labels)
    for image, own in enumerate(labels):
        counts = np.bincount(anchors[:, image], minlength=len(labels))
        classes = [counts[labels == other].sum() for other in present if other != own]
        # At its 0.001 % quantile: many images are asked.
        assert scipy.stats.chisquare(classes).pvalue > 1e-5
        for other in present:
            if other != own and np.sum(labels == other) > 1:
                assert scipy.stats.chisquare(counts[labels == other]).pvalue > 1e-5


def test_images_and_keys_draw_their_anchors_independently():
    labels = np.arange(12) % 4
    anchors = many_anchors(tuple(labels))
    # Two images of one class, and two draws in a row, meet as often as independent ones do: 1 in 9.
    for together in (anchors[:, 0] == anchors[:, 4], anchors[1:, 0] == anchors[:-1, 0]):
        np.testing.assert_allclose(together.mean(), 1 / 9, atol=0.02)


def test_where_classes_are_equally_frequent_pairs_are_those_of_the_published_drawing():
    """There an anchor is drawn first, then the class of its negative, then the negative."""
    labels = np.arange(12) % 4
    anchors, generator = many_anchors(tuple(labels)), np.random.default_rng(0)
    ours = np.zeros((12, 4))
    np.add.at(ours, (np.tile(np.arange(12), DRAWS), labels[anchors].ravel()), 1)
    anchor_classes = labels[generator.integers(0, 12, anchors.size)]
    negative_classes = (anchor_classes + generator.integers(1, 4, anchors.size)) % 4
    negatives = negative_classes + 4 * generator.integers(0, 3, anchors.size)
    theirs = np.zeros((12, 4))
    np.add.at(theirs, (negatives, anchor_classes), 1)
    np.testing.assert_allclose(ours / ours.sum(), theirs / theirs.sum(), atol=0.002)
    np.testing.assert_allclose(ours / ours.sum(), np.where(labels[:, None] == np.arange(4), 0, 1 / 36), atol=0.002)


@functools.cache
def many_targets(present_only):
    keys = jax.random.split(jax.random.key(2), DRAWS)
    labels = jnp.asarray(UNBALANCED)
    return np.asarray(jax.jit(jax.vmap(
        lambda key: draw_targets(key, labels, CLASSES, present_only=present_only)))(keys))


@pytest.mark.parametrize("present_only", [False, True])
def test_a_target_is_uniform_over_the_other_classes(present_only):
    targets = many_targets(present_only)
    assert (targets != UNBALANCED).all()
    candidates = np.unique(UNBALANCED) if present_only else np.arange(CLASSES)
    for image, own in enumerate(UNBALANCED):
        counts = np.bincount(targets[:, image], minlength=CLASSES)
        others = [other for other in candidates if other != own]
        assert counts.sum() == counts[others].sum()
        assert scipy.stats.chisquare(counts[others]).pvalue > 1e-5
    np.testing.assert_allclose(np.mean(targets[:, 0] == targets[:, 1]), 1 / (len(candidates) - 1), atol=0.03)


@pytest.mark.parametrize("present_only", [False, True])
def test_a_target_is_the_best_other_class_by_score(present_only):
    scores = np.random.default_rng(3).normal(size=(len(UNBALANCED), CLASSES)).astype(np.float32)
    scores[np.arange(len(UNBALANCED)), UNBALANCED] += 5  # the own class would win
    scores[::2, 3] += 3  # and then one that the batch does not hold
    allowed = scores.copy()
    allowed[np.arange(len(UNBALANCED)), UNBALANCED] = -np.inf
    if present_only:
        allowed[:, 3] = -np.inf
    for seed in (0, 1):  # no chance in it
        targets = draw_targets(jax.random.key(seed), UNBALANCED, CLASSES, scores, present_only=present_only)
        np.testing.assert_array_equal(targets, allowed.argmax(axis=1))
    assert (np.asarray(targets) == 3).any() != present_only


def test_a_target_is_never_the_label_however_low_the_other_scores():
    scores = np.full((len(UNBALANCED), CLASSES), -1e30, np.float32)
    scores[np.arange(len(UNBALANCED)), UNBALANCED] = 1e30
    for present_only in (False, True):
        targets = draw_targets(jax.random.key(0), UNBALANCED, CLASSES, scores, present_only=present_only)
        assert (targets != UNBALANCED).all()


def test_of_two_classes_the_target_is_the_other_one():
    labels = np.array([0, 1, 1, 0])
    np.testing.assert_array_equal(draw_targets(jax.random.key(0), labels, 2), 1 - labels)
