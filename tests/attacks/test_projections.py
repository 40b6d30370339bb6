"""The projection onto a hyperplane inside the box: a convex solver's, and its properties on anything that can be drawn."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import strategies
from hypothesis.extra import numpy as arrays

from jaxrd.attacks.projections import onto_hyperplane

NORMS, SIZES, CASES = ("linf", "l2"), (1, 2, 10, 50), 24
BOUNDS = (-0.5, 1.25)
KINDS = ("inside", "border", "sparse", "one sign", "graded", "touching a corner")

project = jax.jit(onto_hyperplane, static_argnums=(3, 4))
each_norm = pytest.mark.parametrize("norm", NORMS)
each_size = pytest.mark.parametrize("size", SIZES)


def away(points, normal, excess, bounds=BOUNDS):
    """How far each coordinate may move towards the hyperplane."""
    down = (normal > 0) == (excess >= 0)[..., None]
    return np.where(normal == 0, 0, np.where(down, points - bounds[0], bounds[1] - points))


@functools.cache
def cases(kind, size):
    """(points, normals, excess) of CASES hyperplanes that the box reaches, in numbers that float32 holds."""
    generator = np.random.default_rng([KINDS.index(kind), size])
    points = generator.uniform(*BOUNDS, (CASES, size))
    normal = generator.normal(size=(CASES, size)) * 10.0 ** generator.integers(-3, 3, (CASES, 1))
    share = generator.uniform(0.01, 0.9, CASES)
    if kind == "border":
        points = np.where(generator.random((CASES, size)) < 0.6, generator.choice(BOUNDS, (CASES, size)), points)
    elif kind == "sparse":
        normal *= generator.random((CASES, size)) < 0.2
    elif kind == "one sign":
        normal = -np.abs(normal)
    elif kind == "touching a corner":  # in eighths, whose sums of products are exact
        points, share = np.clip(np.round(8 * points) / 8, *BOUNDS), np.ones(CASES)
        normal = np.round(8 * generator.uniform(-1, 1, (CASES, size))) / 8
    elif kind == "graded":  # one coordinate after the other arrives at the border
        normal = generator.choice([-1, 1], (CASES, size)) * 1.2 ** -np.arange(size)
        room = 1.15 ** -np.arange(size, 0, -1)
        points, share = np.where(normal > 0, BOUNDS[0] + room, BOUNDS[1] - room), np.full(CASES, 0.8)
    points, normal = points.astype(np.float32).astype(float), normal.astype(np.float32).astype(float)
    sign = np.where(np.arange(CASES) % 2 == 0, 1.0, -1.0) if kind != "graded" else np.ones(CASES)
    excess = sign * share * np.sum(np.abs(normal) * away(points, normal, sign), axis=1)
    return points, normal, excess.astype(np.float32).astype(float)


def projected(points, normal, excess, norm, bounds=BOUNDS):
    given = (jnp.asarray(value, jnp.float32) for value in (points, normal, excess))
    displacement = project(*given, norm, bounds)
    assert displacement.dtype == jnp.float32 and displacement.shape == np.shape(points)
    return np.asarray(displacement, float)


def solved(point, normal, excess, norm):
    """The least length and, for L2, where it is unique, the displacement, by SciPy."""
    size = len(point)
    room = [(BOUNDS[0] - value, BOUNDS[1] - value) for value in point]
    if norm == "linf":  # min s: -s <= d_i <= s
        one = np.ones((size, 1))
        found = scipy.optimize.linprog(
            np.r_[np.zeros(size), 1], A_ub=np.block([[np.eye(size), -one], [-np.eye(size), -one]]), b_ub=np.zeros(2 * size),
            A_eq=np.r_[normal, 0][None], b_eq=[-excess], bounds=[*room, (0, None)])
        assert found.success, found.message
        return found.fun, None
    if not (length := np.linalg.norm(normal)):
        return 0.0, np.zeros(size)
    found = scipy.optimize.minimize(
        lambda d: d @ d / 2, np.zeros(size), jac=lambda d: d, bounds=room, method="SLSQP", tol=1e-14, options={"maxiter": 500},
        constraints={"type": "eq", "fun": lambda d: (normal @ d + excess) / length, "jac": lambda d: normal / length})
    assert found.success, found.message
    return np.linalg.norm(found.x), found.x


@each_norm
@each_size
@pytest.mark.parametrize("kind", KINDS[:-1])
def test_the_displacement_is_a_convex_solvers(kind, size, norm):
    points, normal, excess = cases(kind, size)
    displacement = projected(points, normal, excess, norm)
    moved = points + displacement
    assert moved.min() >= BOUNDS[0] - 1e-6 and moved.max() <= BOUNDS[1] + 1e-6
    left = excess + np.sum(normal * displacement, axis=1)
    np.testing.assert_array_less(np.abs(left), 1e-6 * (np.sum(np.abs(normal), axis=1) + 1e-9))
    order = np.inf if norm == "linf" else 2
    for i in range(CASES):
        length, best = solved(points[i], normal[i], excess[i], norm)
        np.testing.assert_allclose(np.linalg.norm(displacement[i], order), length, rtol=1e-5, atol=2e-6)
        if best is not None:
            np.testing.assert_allclose(displacement[i], best, atol=2e-5)


@each_norm
@each_size
def test_where_the_box_just_reaches_or_does_not_every_coordinate_that_counts_goes_to_its_border(size, norm):
    points, normal, touching = cases("touching a corner", size)
    sign = np.where(np.arange(CASES) % 2 == 0, 1.0, -1.0)
    room = away(points, normal, sign)
    for excess in (touching, 1.001 * touching + sign * 1e-30, 2 * touching + sign, sign * 1e30):
        displacement = projected(points, normal, excess, norm)
        np.testing.assert_allclose(displacement, -sign[:, None] * np.sign(normal) * room, atol=5e-6)


@each_norm
def test_in_linf_all_coordinates_that_can_move_equally_far_and_in_l2_in_proportion_to_the_normal(norm):
    displacement = projected([[0.5, 0.5, 0.5, 0.1]], [[3.0, -1.0, 0.0, 2.0]], [1.0], norm, (0.0, 1.0))
    # The last coordinate meets the border; of the others, linf: 3 s + s + 2 * 0.1 = 1; l2: 9 u + u + 2 * 0.1 = 1.
    expected = [[-0.2, 0.2, 0, -0.1]] if norm == "linf" else [[-0.24, 0.08, 0, -0.1]]
    np.testing.assert_allclose(displacement, expected, atol=1e-7)


@each_norm
def test_the_length_of_the_normal_does_not_matter(norm):
    """Confident networks have gradients far below what float32 can square."""
    points, normal, excess = cases("border", 10)
    expected = projected(points, normal, excess, norm)
    for scale in (2.0**-100, 2.0**80):
        np.testing.assert_array_equal(projected(points, scale * normal, scale * excess, norm), expected)


@each_norm
def test_a_point_is_projected_alike_in_any_company_and_shape(norm):
    points, normal, excess = (np.concatenate(parts) for parts in zip(cases("border", 10), cases("sparse", 10)))
    expected = projected(points, normal, excess, norm)
    np.testing.assert_array_equal(projected(points[7:9], normal[7:9], excess[7:9], norm), expected[7:9])
    both, = project(*(jnp.asarray(value, jnp.float32)[None] for value in (points, normal, excess)), norm, BOUNDS)
    np.testing.assert_array_equal(both, expected)


@each_norm
def test_a_vanishing_normal_neither_overflows_nor_moves_what_it_does_not_point_along(norm):
    displacement = projected([[0.25, 0.5, 0.5]] * 2, [[1e-37, 0.0, -1e-37], [0.0, 0.0, 0.0]], [1e3, 1.0], norm, (0.0, 1.0))
    np.testing.assert_allclose(displacement, [[-0.25, 0, 0.5], [0, 0, 0]])


@each_norm
def test_a_coordinate_that_adds_less_than_rounding_does_not_move_to_make_up_for_it(norm):
    touching = np.nextafter(np.float32(0.3), np.float32(1))  # the last bit is beyond the first coordinate's border
    displacement = projected([[0.3, 0.5]], [[1.0, 1e-10]], [touching], norm, (0.0, 1.0))
    np.testing.assert_allclose(displacement, [[-0.3, 0]], rtol=1e-6)


coordinates = arrays.arrays(np.float32, (3, 6), elements=strategies.one_of(
    strategies.sampled_from([*BOUNDS, 0.0]), strategies.floats(*BOUNDS, width=32)))
magnitudes = strategies.floats(-20, 20).map(lambda exponent: 10.0**exponent)
any_normal = arrays.arrays(np.float32, (3, 6), elements=strategies.one_of(
    strategies.just(0.0), strategies.floats(-2, 2, width=32), magnitudes.map(np.float32),
    magnitudes.map(lambda magnitude: np.float32(-magnitude))))
even_normal = arrays.arrays(np.float32, (3, 6), elements=strategies.one_of(
    strategies.just(0.0), strategies.floats(0.125, 1, width=32), strategies.floats(-1, -0.125, width=32)))
shares = arrays.arrays(np.float64, 3, elements=strategies.one_of(
    strategies.sampled_from([-1.0, 0.0, 1.0]), strategies.floats(-2, 2)))
# The first example compiles.
thorough = hypothesis.settings(max_examples=150, deadline=None, derandomize=True)


@each_norm
@thorough
@hypothesis.given(coordinates, any_normal, shares)
def test_the_nearest_point_is_in_the_box_and_as_near_the_hyperplane_as_the_box_reaches(norm, points, normal, share):
    points, normal = points.astype(float), normal.astype(float)
    reach = np.sum(np.abs(normal) * away(points, normal, share), axis=1)
    excess = share * reach
    displacement = projected(points, normal, excess, norm)
    assert np.isfinite(displacement).all()
    moved = points + displacement
    assert moved.min() >= BOUNDS[0] - 1e-6 and moved.max() <= BOUNDS[1] + 1e-6
    assert (displacement[normal == 0] == 0).all()
    assert (displacement[share == 0] == 0).all()
    left = np.abs(excess + np.sum(normal * displacement, axis=1))
    unreached = np.maximum(np.abs(excess) - reach, 0)
    np.testing.assert_array_less(np.abs(left - unreached), 2e-6 * np.sum(np.abs(normal), axis=1) + 1e-30)


@each_norm
@thorough
@hypothesis.given(coordinates, even_normal, shares)
def test_the_projection_of_a_projection_is_itself(norm, points, normal, share):
    points, normal = points.astype(float), normal.astype(float)
    excess = share * np.sum(np.abs(normal) * away(points, normal, share), axis=1)
    displacement = projected(points, normal, excess, norm)
    again = projected(
        np.clip(points + displacement, *BOUNDS), normal, excess + np.sum(normal * displacement, axis=1), norm)
    np.testing.assert_allclose(again, 0, atol=2e-5)
