"""SGD is PyTorch's, LARS and LAMB are their papers', and schedules are fractions of training at any length."""

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrd import models
from jaxrd.config import Config, OptimizerConfig
from jaxrd.training import schedule
from tests.support import assert_input_error

VARIANTS = [(0.0, False, 0.0), (0.9, False, 0.0), (0.9, False, 0.01), (0.9, True, 0.01)]
MATRIX = np.array([[2.0, 0.5], [0.5, 1.0]])
START = np.array([1.0, -2.0])


def rates(steps, **options):
    rate = schedule.learning_rate(OptimizerConfig(learning_rate=1.0, **options), steps)
    return np.array([rate(step) for step in range(steps)])


def minimise(momentum, nesterov, weight_decay, steps=6):
    """Iterates of the optimiser on x' A x / 2, under a schedule that changes on the way."""
    config = OptimizerConfig(
        learning_rate=0.1, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, schedule="step")
    optimizer, params = schedule.optimizer(config, steps), jnp.asarray(START, jnp.float32)
    state, path = optimizer.init(params), []
    for _ in range(steps):
        updates, state = optimizer.update(jnp.asarray(MATRIX, jnp.float32) @ params, state, params)
        params = optax.apply_updates(params, updates)
        path.append(np.asarray(params))
    return np.array(path), [0.1, 0.1, 0.1, 0.01, 0.001, 0.001]  # milestones at round(3.0) and round(4.5)


@pytest.mark.parametrize("momentum, nesterov, weight_decay", VARIANTS)
def test_sgd_is_the_published_recursion(momentum, nesterov, weight_decay):
    path, learning_rates = minimise(momentum, nesterov, weight_decay)
    x, velocity = START, np.zeros(2)
    for learning_rate, found in zip(learning_rates, path, strict=True):
        gradient = MATRIX @ x + weight_decay * x
        velocity = momentum * velocity + gradient
        x = x - learning_rate * (gradient + momentum * velocity if nesterov else velocity)
        np.testing.assert_allclose(found, x, rtol=1e-5)


@pytest.mark.parametrize("momentum, nesterov, weight_decay", VARIANTS)
def test_sgd_is_that_of_pytorch(momentum, nesterov, weight_decay):
    torch = pytest.importorskip("torch", reason="torch is not installed (extra parity)")
    path, learning_rates = minimise(momentum, nesterov, weight_decay)
    x, matrix = torch.tensor(START, requires_grad=True), torch.tensor(MATRIX)
    optimizer = torch.optim.SGD([x], lr=1.0, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
    for learning_rate, found in zip(learning_rates, path, strict=True):
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.zero_grad()
        (x @ matrix @ x / 2).backward()
        optimizer.step()
        np.testing.assert_allclose(found, x.detach().numpy(), rtol=1e-5)


def test_the_step_schedule_divides_by_ten_at_its_milestones():
    found = rates(200, schedule="step", milestones=(0.5, 0.75))
    np.testing.assert_allclose(found, np.repeat([1, 0.1, 0.01], [100, 50, 50]), rtol=1e-6)


def test_the_cosine_schedule_is_a_half_wave_to_zero():
    found = rates(100, schedule="cosine")
    np.testing.assert_allclose(found[[0, 25, 50, 75]], [1, 0.5 + np.sqrt(0.125), 0.5, 0.5 - np.sqrt(0.125)], rtol=1e-5)
    assert 0 < found[-1] < 1e-3
    assert np.all(np.diff(found) < 0)


@pytest.mark.parametrize("name", ["step", "cosine"])
def test_the_warm_up_climbs_from_above_zero_to_the_peak(name):
    found = rates(100, schedule=name, warmup=0.1)
    np.testing.assert_allclose(found[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert found[10] == 1 == found.max()
    if name == "step":  # the milestones are still fractions of the whole training
        np.testing.assert_allclose(found[[49, 50, 74, 75]], [1, 0.1, 0.1, 0.01], rtol=1e-6)
    else:
        np.testing.assert_allclose(found[55], 0.5, rtol=1e-6)  # half-way between the end of the warm-up and of training


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["step", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 0.9])
def test_short_runs_have_a_rate_for_every_step(steps, name, warmup):
    found = rates(steps, schedule=name, warmup=warmup)
    assert np.all((found > 0) & (found <= 1))
    assert found[0] > 0.09


def one_cycle(steps, rising):
    """The formula of PyTorch's OneCycleLR for a peak of 1."""
    top, last, step = rising * steps - 1, steps - 1, np.arange(steps)
    up, down = step / top, (step - top) / (last - top)
    return np.where(step <= top, 1 + (1 / 25 - 1) / 2 * (1 + np.cos(np.pi * up)),
                    4e-6 + (1 - 4e-6) / 2 * (1 + np.cos(np.pi * down)))


CYCLES = [(100, 0.25), (1000, 0.3), (37, 0.25), (11, 0.6), (5, 0.9)]


@pytest.mark.parametrize("steps, rising", CYCLES)
def test_one_cycle_climbs_from_a_25th_to_the_peak_and_falls_to_nearly_nothing(steps, rising):
    found = rates(steps, schedule="onecycle", warmup=rising)
    np.testing.assert_allclose(found, one_cycle(steps, rising), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found[[0, -1]], [1 / 25, 4e-6], rtol=0.1)
    if (rising * steps).is_integer():
        assert np.argmax(found) == rising * steps - 1 and found.max() == pytest.approx(1)


@pytest.mark.parametrize("steps, rising", CYCLES)
def test_one_cycle_is_that_of_pytorch(steps, rising):
    torch = pytest.importorskip("torch", reason="torch is not installed (extra parity)")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0, momentum=0.9)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=steps, pct_start=rising)
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(expected) < steps:
            cycle.step()
    np.testing.assert_allclose(rates(steps, schedule="onecycle", warmup=rising), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("rising", [0.01, 0.25, 0.5, 0.9])
def test_one_cycle_has_a_rate_for_every_step_of_a_short_run(steps, rising):
    found = rates(steps, schedule="onecycle", warmup=rising)
    assert np.all((found > 0) & (found <= 1)) and found[0] == pytest.approx(1 / 25)


def test_one_cycle_needs_to_know_when_its_peak_comes():
    assert_input_error(lambda: Config.from_dict({"optimizer": {"schedule": "onecycle"}}),
                       "config.optimizer.warmup is 0.0", "above 0", "0.25")


def test_milestones_that_fall_on_one_step_all_count():
    np.testing.assert_allclose(rates(3, schedule="step", milestones=(0.5, 0.75)), [1, 1, 0.01], rtol=1e-6)


# Warm-ups that are no fraction, and rates scaled to the batch.


@pytest.mark.parametrize("name", ["step", "cosine", "onecycle"])
@pytest.mark.parametrize("warmup", [10, "10 steps", "2 epochs", "80 examples"])
def test_a_warm_up_in_any_unit_is_the_fraction_that_it_is(name, warmup):
    config = OptimizerConfig(learning_rate=1.0, schedule=name, warmup=warmup)
    rate = schedule.learning_rate(config, 100, batch_size=8, epoch=40)
    np.testing.assert_array_equal([rate(step) for step in range(100)], rates(100, schedule=name, warmup=0.1))


def test_a_warm_up_longer_than_training_is_refused():
    config = OptimizerConfig(warmup="5 epochs")
    assert_input_error(lambda: schedule.learning_rate(config, 20, batch_size=8, epoch=40),
                       "config.optimizer.warmup is '5 epochs'", "25 steps of 20")
    assert_input_error(lambda: schedule.learning_rate(config, 20), '"5 epochs"', "epoch=")


@pytest.mark.parametrize("scaling, factor", [("none", 1), ("linear", 32), ("sqrt", np.sqrt(32))])
def test_the_rate_scales_with_the_batch_as_published(scaling, factor):
    config = OptimizerConfig(learning_rate=0.1, scaling=scaling, schedule="cosine", warmup=0.1)
    large, meant = (schedule.learning_rate(config, 100, batch_size=size) for size in (4096, 128))
    unscaled = schedule.learning_rate(OptimizerConfig(learning_rate=0.1, schedule="cosine", warmup=0.1), 100)
    for step in (0, 5, 10, 60):
        assert meant(step) == unscaled(step)
        assert float(large(step)) == pytest.approx(factor * float(unscaled(step)), rel=1e-6)
    # The updates, too: SGD's first is the rate times the gradient.
    optimizer = schedule.optimizer(OptimizerConfig(learning_rate=0.1, scaling=scaling, weight_decay=0), 100, batch_size=4096)
    updates, _ = optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)), jnp.ones(2))
    np.testing.assert_allclose(updates, -0.1 * factor, rtol=1e-6)


def test_the_batch_that_the_rate_is_meant_for_can_be_another():
    config = OptimizerConfig(learning_rate=0.3, scaling="linear", scaling_batch=256)
    assert schedule.peak(config, 64) == pytest.approx(0.075)
    assert_input_error(lambda: schedule.peak(config), 'config.optimizer.scaling is "linear"', "batch_size=")


# Optimisers for large batches, against their formulas in NumPy.

TREE = {"conv": {"kernel": np.array([[1.0, -2.0, 0.5], [0.3, 0.7, -1.1]]), "bias": np.array([0.1, 0.0, -0.3])},
        "norm": {"scale": np.array([1.0, 0.9, 1.1])}, "zero": {"kernel": np.zeros((2, 2))}}


def gradients(tree):
    """Those of sum_i (i + 1) (w_i - 1)^2 / 2 over each array, which no two entries share."""
    return jax.tree.map(lambda w: (w - 1) * np.arange(1.0, w.size + 1, dtype=np.float32).reshape(w.shape), tree)


def path_of(config, steps=6):
    """Iterates of an optimiser on that, by flat name, in float64 as NumPy sees them."""
    optimizer, params = schedule.optimizer(config, steps), jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), TREE)
    update, state, path = jax.jit(optimizer.update), optimizer.init(params), []
    for _ in range(steps):
        updates, state = update(gradients(params), state, params)
        params = optax.apply_updates(params, updates)
        path.append({name: np.asarray(w) for name, w in flatten_dict(params, sep="/").items()})
    return path


def ratio(w, update):
    """|w| / |update|, or 1 where either is 0 or for arrays of one axis."""
    norms = np.sqrt(np.sum(w**2)), np.sqrt(np.sum(update**2))
    return norms[0] / norms[1] if w.ndim > 1 and all(norms) else 1.0


RATES = [0.1, 0.1, 0.1, 0.01, 0.001, 0.001]  # as in `minimise`


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_lars_is_the_published_recursion(nesterov, weight_decay):
    found = path_of(OptimizerConfig(name="lars", learning_rate=0.1, momentum=0.8, nesterov=nesterov, trust_coefficient=0.02,
                                    weight_decay=weight_decay, schedule="step"))
    for name, w in flatten_dict(TREE, sep="/").items():
        velocity = np.zeros_like(w)
        for eta, after in zip(RATES, found, strict=True):
            decayed = np.asarray(gradients(w)) + (weight_decay * w if w.ndim > 1 else 0)
            trust = ratio(w, decayed) * (0.02 if w.ndim > 1 and np.any(w) else 1)
            step = eta * trust * decayed
            velocity = 0.8 * velocity + step
            w = w - (step + 0.8 * velocity if nesterov else velocity)
            np.testing.assert_allclose(after[name], w, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_lamb_is_the_published_recursion(weight_decay):
    found = path_of(OptimizerConfig(
        name="lamb", learning_rate=0.1, betas=(0.8, 0.95), weight_decay=weight_decay, schedule="step"))
    for name, w in flatten_dict(TREE, sep="/").items():
        first = second = np.zeros_like(w)
        for count, (eta, after) in enumerate(zip(RATES, found, strict=True), 1):
            gradient = np.asarray(gradients(w))
            first, second = 0.8 * first + 0.2 * gradient, 0.95 * second + 0.05 * gradient**2
            update = first / (1 - 0.8**count) / (np.sqrt(second / (1 - 0.95**count)) + 1e-6)
            update = update + (weight_decay * w if w.ndim > 1 else 0)
            w = w - eta * ratio(w, update) * update
            np.testing.assert_allclose(after[name], w, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_scales_and_biases_of_a_model_and_nothing_else_are_left_out(name):
    """With a gradient of zero only weight decay moves anything, and that of their arrays leaves them where they are."""
    model = models.create("resnet6_w4", classes=10, image_shape=(8, 8, 1), batch_norm_sets=2)
    params = model.init(jax.random.key(0))["params"]
    optimizer = schedule.optimizer(OptimizerConfig(name=name, weight_decay=0.1), 10)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    for path, update in flatten_dict(updates, sep="/").items():
        assert np.any(update) == path.endswith("kernel"), path
