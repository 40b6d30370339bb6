"""The ball: what its projection, steps and random starts promise, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrd import ThreatModel
from jaxrd.threat import example_keys
from tests.support import assert_input_error

SHAPE = (6, 5, 2)
THREATS = [ThreatModel("linf", 8 / 255), ThreatModel("linf", 0.3), ThreatModel("l2", 0.5), ThreatModel("l2", 3.0)]
# x + epsilon - x is not epsilon in float32.
ROUNDING = 1e-6

each_threat = pytest.mark.parametrize("threat", THREATS, ids=lambda threat: f"{threat.norm}-{threat.epsilon:.2g}")
each_norm = pytest.mark.parametrize("norm", ["linf", "l2"])


def images_of(batch, seed=0, low=0.0, high=1.0):
    return jnp.asarray(np.random.default_rng(seed).uniform(low, high, (batch, *SHAPE)), jnp.float32)


def normal(batch, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, *SHAPE)), jnp.float32)


def lengths(threat, deltas):
    """The norm as NumPy computes it, in float64."""
    order = np.inf if threat.norm == "linf" else 2
    return np.linalg.norm(np.asarray(deltas, np.float64).reshape(len(deltas), -1), order, axis=1)


def assert_inside(threat, images, points):
    assert (lengths(threat, np.asarray(points) - np.asarray(images)) <= threat.epsilon * (1 + ROUNDING) + ROUNDING).all()
    assert threat.bounds[0] <= points.min() and points.max() <= threat.bounds[1]


@each_threat
@pytest.mark.parametrize("scale", [0.01, 0.3, 30.0])
def test_projection_lands_in_ball_and_box_and_stays(threat, scale):
    images = images_of(8)
    points = threat.project(images, images + scale * normal(8))
    assert_inside(threat, images, points)
    np.testing.assert_allclose(threat.project(images, points), points, atol=1e-6)


@each_norm
def test_projection_respects_other_bounds(norm):
    threat = ThreatModel(norm, 0.5, bounds=(-1.0, 2.0))
    images = images_of(4, low=-1.0, high=2.0)
    points = threat.project(images, images + 5 * normal(4))
    assert_inside(threat, images, points)
    assert points.min() < 0 and points.max() > 1


@each_threat
def test_projection_leaves_points_inside_alone(threat):
    images = images_of(8, low=0.4, high=0.6)
    deltas = normal(8)
    deltas = 0.35 * threat.epsilon * deltas / lengths(threat, deltas)[:, None, None, None]
    np.testing.assert_allclose(threat.project(images, images + deltas), images + deltas, atol=1e-7)


@each_threat
def test_projection_reaches_the_edge_along_the_way_out(threat):
    images = images_of(4, low=0.45, high=0.55)
    direction = normal(4)
    small = ThreatModel(threat.norm, 0.1 * threat.epsilon)
    moved = small.project(images, images + 10 * direction) - images
    np.testing.assert_allclose(lengths(small, moved), small.epsilon, rtol=1e-4)
    assert (jnp.sign(moved) == jnp.sign(direction)).all()


@each_norm
def test_projection_of_linf_is_the_nearest_point_and_of_l2_ball_then_box(norm):
    threat = ThreatModel(norm, 0.4)
    images, points = images_of(5), images_of(5, seed=3) + normal(5)
    delta = np.asarray(points) - np.asarray(images)
    if norm == "linf":
        expected = np.clip(images + np.clip(delta, -0.4, 0.4), 0, 1)
    else:
        expected = np.clip(images + delta * np.minimum(1, 0.4 / lengths(threat, delta))[:, None, None, None], 0, 1)
    np.testing.assert_allclose(threat.project(images, points), expected, atol=1e-6)


@each_norm
@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1.0, 1e12, 1e30])
def test_step_has_the_asked_length_however_small_or_large_the_gradient(norm, scale):
    # A confident model's cross-entropy has gradients far below 1e-12; an attack must not come to rest there.
    threat = ThreatModel(norm, 0.5)
    gradients = scale * normal(6)
    steps = threat.steepest_step(gradients, 0.2)
    np.testing.assert_allclose(lengths(threat, steps), 0.2, rtol=1e-5)
    np.testing.assert_allclose(steps, threat.steepest_step(gradients / scale, 0.2), rtol=1e-4)


@each_norm
def test_no_step_of_that_length_gains_more_on_a_linear_function(norm):
    threat = ThreatModel(norm, 0.5)
    gradients = normal(3)
    best = jnp.sum(gradients * threat.steepest_step(gradients, 0.2), axis=(1, 2, 3))
    others = np.random.default_rng(2).normal(size=(4000, 3, *SHAPE))
    if norm == "linf":
        others = np.sign(others) * np.random.default_rng(3).uniform(0, 1, others.shape) ** 0.01  # corners and near them
    others = 0.2 * others / np.stack([lengths(threat, other) for other in others])[..., None, None, None]
    gains = np.sum(np.asarray(gradients) * others, axis=(2, 3, 4))
    assert (best > gains.max(axis=0)).all()
    # Cauchy-Schwarz and its dual: the gain is step size times the dual norm.
    dual = np.linalg.norm(np.asarray(gradients).reshape(3, -1), 1 if norm == "linf" else 2, axis=1)
    np.testing.assert_allclose(best, 0.2 * dual, rtol=1e-5)


@each_norm
def test_zero_gradient_gives_a_zero_step_to_that_example_alone(norm):
    gradients = normal(3).at[1].set(0)
    steps = ThreatModel(norm, 0.5).steepest_step(gradients, 0.2)
    assert (steps[1] == 0).all() and jnp.isfinite(steps).all()
    assert jnp.abs(steps[0]).max() > 0 and jnp.abs(steps[2]).max() > 0


@each_threat
@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
def test_random_start_is_inside_and_moves_every_example_its_own_way(threat, kind):
    images = jnp.concatenate([images_of(6), jnp.zeros((1, *SHAPE)), jnp.ones((1, *SHAPE))])
    start = threat.random_start(jax.random.key(0), images, kind)
    assert start.shape == images.shape and start.dtype == jnp.float32
    assert_inside(threat, images, start)
    centred = jnp.full((8, *SHAPE), 0.5)
    deltas = np.asarray(threat.random_start(jax.random.key(0), centred, kind) - centred).reshape(8, -1)
    assert (lengths(threat, deltas) > 0).all()
    assert len(np.unique(deltas, axis=0)) == 8
    assert (threat.random_start(jax.random.key(1), centred, kind) - centred != deltas.reshape(centred.shape)).any()


def test_no_start_is_the_images_themselves():
    images = images_of(3)
    assert (ThreatModel("linf", 0.1).random_start(jax.random.key(0), images, "none") == images).all()


def test_uniform_linf_start_fills_the_ball_up_to_its_edges():
    centred = jnp.full((200, *SHAPE), 0.5)
    deltas = np.asarray(ThreatModel("linf", 0.2).random_start(jax.random.key(0), centred) - centred).ravel() / 0.2
    assert deltas.min() < -0.999 and deltas.max() > 0.999
    # U(-1, 1): mean 0, variance 1/3, a quarter of the mass in each quarter.
    assert abs(deltas.mean()) < 0.02 and abs(deltas.var() - 1 / 3) < 0.02
    np.testing.assert_allclose(np.histogram(deltas, 4, (-1, 1))[0] / deltas.size, 0.25, atol=0.02)


def test_l2_start_has_a_uniform_length_and_no_preferred_direction():
    threat = ThreatModel("l2", 0.3)
    centred = jnp.full((4000, *SHAPE), 0.5)
    deltas = np.asarray(threat.random_start(jax.random.key(0), centred) - centred)
    share = lengths(threat, deltas) / 0.3
    # Kolmogorov-Smirnov distance to U(0, 1), at its 0.1 % quantile for 4000 draws.
    assert np.abs(np.sort(share) - (np.arange(4000) + 0.5) / 4000).max() < 0.031
    units = deltas / lengths(threat, deltas)[:, None, None, None]
    size = np.prod(SHAPE)
    # The mean of unit vectors has squared length 1/n on average, and each coordinate carries 1/size of the square.
    assert np.sum(units.mean(axis=0) ** 2) < 2 / 4000
    np.testing.assert_allclose(np.mean(units**2, axis=0) * size, 1, atol=0.15)


@each_threat
def test_gaussian_start_has_standard_deviation_one_thousandth(threat):
    centred = jnp.full((8, *SHAPE), 0.5)
    deltas = threat.random_start(jax.random.key(0), centred, "gaussian") - centred
    np.testing.assert_allclose(jnp.std(deltas), 0.001, rtol=0.12)  # 480 draws: four standard errors


@each_norm
@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
def test_start_of_a_part_with_its_keys_is_that_part_of_the_whole(norm, kind):
    threat, images, keys = ThreatModel(norm, 0.2), images_of(8), example_keys(jax.random.key(5), 8)
    whole = threat.random_start(keys, images, kind)
    np.testing.assert_array_equal(threat.random_start(jax.random.key(5), images, kind), whole)
    part = np.array([7, 2, 4])
    np.testing.assert_array_equal(threat.random_start(keys[part], images[part], kind), whole[part])
    np.testing.assert_array_equal(threat.random_start(jax.random.key(5), images[:3], kind), whole[:3])


def test_example_keys_are_folds_of_one_key_and_pass_through_when_given():
    keys = example_keys(jax.random.key(3), 4)
    folds = [jax.random.fold_in(jax.random.key(3), index) for index in range(4)]
    np.testing.assert_array_equal(jax.random.key_data(keys), np.stack([jax.random.key_data(fold) for fold in folds]))
    assert example_keys(keys, 4) is keys
    assert_input_error(lambda: example_keys(keys, 3), "[4] typed keys", "3 images")
    assert_input_error(lambda: example_keys(0, 3), "key is 0", "jax.random.key(")


def test_a_raw_key_is_refused():
    # Two of its numbers would otherwise pass for the keys of a batch of two.
    raw = jax.random.PRNGKey(0)
    assert_input_error(lambda: example_keys(raw, 2), "uint32", "jax.random.key(")


@each_norm
def test_one_compilation_serves_every_radius(norm):
    traces = []

    @jax.jit
    def start_and_project(threat, key, images):
        traces.append(None)
        return threat.project(images, threat.random_start(key, images) + threat.steepest_step(images, threat.epsilon))

    images = images_of(4, low=0.45, high=0.55)
    for epsilon in [0.01, 0.02, 0.04]:
        threat = ThreatModel(norm, epsilon)
        points = start_and_project(threat, jax.random.key(0), images)
        assert_inside(threat, images, points)
        np.testing.assert_allclose(points, start_and_project.__wrapped__(threat, jax.random.key(0), images), atol=1e-6)
        traces.pop()  # the plain call's
    assert len(traces) == 1


def test_a_threat_model_is_a_pytree_of_its_radius():
    threat = ThreatModel("l2", 0.5, bounds=(-1.0, 1.0))
    assert jax.tree.leaves(threat) == [0.5]
    doubled = jax.tree.map(lambda epsilon: 2 * epsilon, threat)
    assert doubled == ThreatModel("l2", 1.0, bounds=(-1.0, 1.0))


@each_threat
def test_distance_is_the_norm(threat):
    images, points = images_of(5), images_of(5, seed=9)
    np.testing.assert_allclose(threat.distance(images, points), lengths(threat, points - images), rtol=1e-6)


@pytest.mark.parametrize("epsilon, shown", [
    (0, "0"), (0.0, "0.0"), (-0.1, "-0.1"), (float("nan"), "nan"), (float("inf"), "inf"), ("8/255", "'8/255'")])
@each_norm
def test_bad_radius(norm, epsilon, shown):
    assert_input_error(lambda: ThreatModel(norm, epsilon), "threat.epsilon", shown, "number above 0")


def test_linf_radius_in_byte_units():
    assert_input_error(lambda: ThreatModel("linf", 8), "threat.epsilon", "is 8", "8/255 instead of 8")
    assert ThreatModel("l2", 8.0).epsilon == 8.0  # an L2 ball may well be wider than a pixel's range
    assert ThreatModel("linf", 1.0).epsilon == 1.0
    assert ThreatModel("linf", 2.0, bounds=(-1.0, 1.0)).epsilon == 2.0


def test_bad_norm_and_bounds():
    assert_input_error(lambda: ThreatModel("linfty", 0.1), "threat.norm", '"linfty"', '"linf" or "l2"')
    for bounds in [(1.0, 0.0), (0.5, 0.5), (0.0, float("nan"))]:
        assert_input_error(lambda: ThreatModel("linf", 0.1, bounds), "threat.bounds", str(bounds), "(0, 1)")


def test_bad_start():
    assert_input_error(lambda: THREATS[0].random_start(jax.random.key(0), images_of(2), "random"), '"random"', '"uniform"',
                       '"gaussian"', '"none"')


@pytest.mark.parametrize("step_size", [0, -0.01, float("nan"), float("inf"), 0.0605])
def test_bad_step(step_size):
    threat = ThreatModel("linf", 0.03)
    assert_input_error(lambda: threat.check_step_size(step_size), "step_size", f"{step_size:g}", "0.06")
    threat.check_step_size(0.06)  # 2 epsilon crosses the ball


def test_swapped_step_and_radius_is_guessed():
    assert_input_error(lambda: ThreatModel("linf", 2 / 255).check_step_size(8 / 255), "swapped")


def test_radius_is_checked_outside_transformations_only():
    def radius_of(epsilon):
        threat = ThreatModel("linf", epsilon)
        threat.check_step_size(0.5)
        return threat.epsilon

    assert jax.jit(radius_of)(0.1) == jnp.float32(0.1)
    assert jax.vmap(radius_of)(jnp.array([0.1, 0.2])).shape == (2,)
