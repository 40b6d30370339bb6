"""Robust accuracy: exact on linear models, and the same whatever the batches and the devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrd import InputError, ThreatModel
from jaxrd.data import from_arrays
from jaxrd.evaluation import alignment, robustness
from jaxrd.evaluation.robustness import PROTOCOLS, Protocol, run_attack
from jaxrd.models import Model
from jaxrd.training import parallel
from tests.support import assert_input_error

N, SHAPE = 50, (4, 4, 1)
SIZE = int(np.prod(SHAPE))
GENERATOR = np.random.default_rng(0)
# Far enough from 0 and 1 that no attack of these tests feels the box.
IMAGES = GENERATOR.uniform(0.3, 0.7, size=(N, *SHAPE)).astype(np.float32)
WEIGHTS = GENERATOR.normal(size=(SIZE, 2)).astype(np.float32)
BIAS = (-0.5 * WEIGHTS.sum(axis=0)).astype(np.float32)
MARGINS = (IMAGES.reshape(N, SIZE).astype(np.float64) @ WEIGHTS + BIAS) @ [1.0, -1.0]  # of class 0 over class 1
LABELS = np.where(GENERATOR.uniform(size=N) < 0.9, MARGINS < 0, MARGINS > 0).astype(np.int32)  # a tenth wrong when clean
MARGINS = np.where(LABELS == 0, MARGINS, -MARGINS)
SOURCE = from_arrays(IMAGES, LABELS, classes=2)
LINEAR_VARIABLES = {"params": {"weights": jnp.asarray(WEIGHTS), "bias": jnp.asarray(BIAS)}, "batch_stats": {}}
LINF = ThreatModel("linf", 0.05)


def model_of(name, forward, classes=2):
    """A model as two pure functions."""
    return Model(name, classes, SHAPE, init=lambda key: {}, apply=lambda variables, images, train: (
        forward(variables["params"], images.reshape(len(images), SIZE)), variables["batch_stats"]), specification={})


LINEAR = model_of("linear", lambda params, flat: flat @ params["weights"] + params["bias"])
SMOOTH = model_of("smooth", lambda params, flat: jnp.tanh(flat @ params["hidden"]) @ params["out"], classes=4)
SMOOTH_VARIABLES = {"params": {
    "hidden": jnp.asarray(GENERATOR.normal(size=(SIZE, 12)), jnp.float32),
    "out": jnp.asarray(GENERATOR.normal(size=(12, 4)), jnp.float32)}, "batch_stats": {}}
# Labels that the smooth model mostly has right, so that there is something to lose.
SMOOTH_LABELS = np.array(jnp.argmax(SMOOTH.apply(SMOOTH_VARIABLES, jnp.asarray(IMAGES), False)[0], axis=1))
SMOOTH_LABELS[::8] = (SMOOTH_LABELS[::8] + 1) % 4
SMOOTH_SOURCE = from_arrays(IMAGES, SMOOTH_LABELS, classes=4)

SHORT = Protocol(("cross_entropy",), 3, 0.5, "uniform")
WORST = Protocol(("cross_entropy", "margin"), 3, 0.5, "uniform", restarts=2)


@functools.cache
def mesh_of(devices):
    return parallel.data_mesh(jax.devices()[:devices])


def attack(model=SMOOTH, variables=SMOOTH_VARIABLES, source=SMOOTH_SOURCE, protocol=SHORT, threat=LINF, *, devices=1,
           **options):
    return run_attack(model, variables, source, protocol, threat, mesh=mesh_of(devices), **options)


def linear(protocol, threat, **options):
    return attack(LINEAR, LINEAR_VARIABLES, SOURCE, protocol, threat, **options)


@functools.cache
def reference(protocol):
    return attack(protocol=protocol, batch_size=N)


@pytest.mark.parametrize("protocol", [SHORT, WORST], ids=["single", "worst case"])
@pytest.mark.parametrize("batch_size, devices", [(7, 1), (16, 4), (64, 4)])
def test_batches_and_devices_change_nothing(protocol, batch_size, devices):
    expected, got = reference(protocol), attack(protocol=protocol, batch_size=batch_size, devices=devices)
    assert 0.1 < expected.accuracy < 0.9  # so that a mixed-up order would show
    np.testing.assert_array_equal(got.robust, expected.robust)
    np.testing.assert_allclose(got.images, expected.images, atol=1e-5)
    assert got.accuracy == expected.accuracy == np.mean(expected.robust)


def test_another_seed_starts_elsewhere():
    assert np.abs(attack(batch_size=N, seed=1).images - reference(SHORT).images).max() > 0.01


@pytest.mark.parametrize("protocol", [SHORT, WORST], ids=["single", "worst case"])
def test_the_images_are_what_the_verdict_says_and_lie_inside_the_threat_model(protocol):
    result = reference(protocol)
    assert result.images.shape == IMAGES.shape and result.images.dtype == np.float32 and result.robust.shape == (N,)
    assert np.abs(result.images - IMAGES).max() <= LINF.epsilon + 1e-6
    np.testing.assert_array_equal(
        robustness.predictions(SMOOTH, SMOOTH_VARIABLES, result.images) == SMOOTH_LABELS, result.robust)


def test_bytes_and_floats_are_the_same_images():
    as_bytes = np.round(255 * IMAGES).astype(np.uint8)
    one = attack(source=from_arrays(as_bytes, SMOOTH_LABELS, classes=4), batch_size=N)
    other = attack(source=from_arrays(as_bytes / np.float32(255), SMOOTH_LABELS, classes=4), batch_size=N)
    np.testing.assert_array_equal(one.robust, other.robust)
    np.testing.assert_allclose(one.images, other.images, atol=1e-6)


def robust_exactly(threat):
    """A linear model's verdict in closed form: its margin against epsilon times the dual norm of its weights."""
    dual = np.linalg.norm(WEIGHTS[:, 0].astype(np.float64) - WEIGHTS[:, 1], 1 if threat.norm == "linf" else 2)
    assert np.abs(np.abs(MARGINS) - threat.epsilon * dual).min() > 1e-4  # float32 decides none of these
    return MARGINS > threat.epsilon * dual


# The L2 attack needs no start of its own: a first step of any length is along the one right direction.
@pytest.mark.parametrize("norm, name", [("linf", "fgsm"), ("linf", "pgd20"), ("linf", "cw30"), ("l2", "fgsm"), ("l2", "pgd20")])
def test_accuracy_of_a_linear_model_is_exact(norm, name):
    accuracies = [linear(PROTOCOLS["clean"], ThreatModel(norm, 0.1)).accuracy]
    for epsilon in (0.011, 0.021, 0.05) if norm == "linf" else (0.04, 0.08, 0.19):
        threat = ThreatModel(norm, epsilon)
        result = linear(PROTOCOLS[name], threat)
        np.testing.assert_array_equal(result.robust, robust_exactly(threat))
        accuracies.append(result.accuracy)
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] - accuracies[-1] > 0.3 and accuracies[-1] > 0


@pytest.mark.parametrize("steps", [1, 3, 12])
def test_an_attack_takes_the_steps_of_its_protocol(steps):
    moved = linear(Protocol(("cross_entropy",), steps, 0.05), LINF, batch_size=N).images - IMAGES
    np.testing.assert_allclose(np.abs(moved), steps * 0.05 * LINF.epsilon, atol=1e-6)


def test_clean_accuracy_leaves_the_images_alone():
    result = linear(PROTOCOLS["clean"], LINF, batch_size=16)
    np.testing.assert_array_equal(result.robust, MARGINS > 0)
    np.testing.assert_array_equal(result.images, IMAGES)
    assert 0.5 < result.accuracy < 1


def test_images_that_are_not_kept_change_no_verdict():
    kept, dropped = attack(), attack(keep_images=False)
    assert dropped.images is None and kept.images is not None
    np.testing.assert_array_equal(kept.robust, dropped.robust)


def test_the_worst_case_is_that_of_its_runs_and_of_the_clean_image():
    without_start = {name: Protocol((name,), 4, 0.5) for name in ("cross_entropy", "margin")}
    both = attack(protocol=Protocol(("cross_entropy", "margin"), 4, 0.5), batch_size=16)
    singles = [attack(protocol=protocol, batch_size=16).robust for protocol in without_start.values()]
    clean = attack(protocol=PROTOCOLS["clean"], batch_size=16).robust
    np.testing.assert_array_equal(both.robust, clean & singles[0] & singles[1])
    for robust in (*singles, clean):
        assert both.accuracy <= robust.mean()
    np.testing.assert_array_equal(both.images[~clean], IMAGES[~clean])  # wrong already: not attacked


def test_more_restarts_never_help_the_model():
    accuracies = [
        attack(protocol=Protocol(("cross_entropy",), 1, 0.1, "uniform", restarts), batch_size=N).accuracy
        for restarts in (2, 4, 8)]
    assert accuracies == sorted(accuracies, reverse=True) and accuracies[0] > accuracies[-1]


def test_one_compilation_serves_every_radius_and_every_batch():
    traces = []

    def forward(params, flat):
        traces.append(flat.shape)
        return flat @ params["weights"] + params["bias"]

    counted = model_of("counted", forward)

    def run(name, epsilon):
        attack(counted, LINEAR_VARIABLES, SOURCE, PROTOCOLS[name], ThreatModel("linf", epsilon), batch_size=16)
        return len(traces)

    first = run("pgd20", 0.01)  # four batches, the last one padded
    assert len(set(traces)) == 1 and first <= 3
    assert run("pgd20", 0.02) == first


def test_curve_starts_clean_falls_and_agrees_with_single_attacks():
    radii = [0.0, 0.011, 0.021, 0.05]
    curve = robustness.robustness_curve(
        LINEAR, LINEAR_VARIABLES, SOURCE, LINF, radii, mesh=mesh_of(1), batch_size=16, name="pgd10")
    assert curve["attack"] == "pgd10" and curve["epsilon"] == radii
    expected = [np.mean(MARGINS > 0), *(np.mean(robust_exactly(ThreatModel("linf", radius))) for radius in radii[1:])]
    np.testing.assert_allclose(curve["accuracy"], expected)


@pytest.mark.parametrize("devices, batch_size", [(1, 16), (4, 16), (1, N)])
def test_alignment_is_the_mean_over_the_images_without_the_padding(devices, batch_size):
    teacher = jax.tree.map(lambda x: x + 0.3 * jnp.roll(x, 1, axis=0), SMOOTH_VARIABLES)
    got = robustness.gradient_alignment(
        SMOOTH, SMOOTH_VARIABLES, SMOOTH, teacher, SMOOTH_SOURCE, mesh=mesh_of(devices), batch_size=batch_size)
    gradients = [
        alignment.input_gradients(
            lambda images: SMOOTH.apply(variables, images, False)[0], jnp.asarray(IMAGES), jnp.asarray(SMOOTH_LABELS))
        for variables in (SMOOTH_VARIABLES, teacher)]
    np.testing.assert_allclose(got["gradient_distance"], np.mean(alignment.gradient_distance(*gradients)), rtol=1e-5)
    np.testing.assert_allclose(got["gradient_cosine"], np.mean(alignment.gradient_cosine(*gradients)), rtol=1e-5)
    assert 0.1 < got["gradient_cosine"] < 0.99
    assert got["definition"] == alignment.DEFINITION


def test_alignment_of_a_model_with_itself():
    got = robustness.gradient_alignment(
        SMOOTH, SMOOTH_VARIABLES, SMOOTH, SMOOTH_VARIABLES, SMOOTH_SOURCE, mesh=mesh_of(1), batch_size=N)
    assert got["gradient_distance"] == 0
    np.testing.assert_allclose(got["gradient_cosine"], 1, rtol=1e-6)


@pytest.mark.parametrize("name", ["clean", "fgsm"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_no_robustness(name, value):
    broken = {"params": LINEAR_VARIABLES["params"] | {"bias": jnp.array([0.0, value])}, "batch_stats": {}}
    with pytest.raises(InputError) as caught:
        attack(LINEAR, broken, SOURCE, PROTOCOLS[name], batch_size=N)
    message = str(caught.value)
    assert "\n" not in message and "model linear" in message and "not finite" in message and "checkpoint" in message


def test_images_without_finite_logits_are_counted_without_the_padding():
    poisoned = model_of("poisoned", lambda params, flat: jnp.where(
        flat[:, :1] == IMAGES[0, 0, 0, 0], jnp.nan, flat @ params["weights"]))
    source = from_arrays(IMAGES[:5], LABELS[:5], classes=2)
    with pytest.raises(InputError, match="^1 of the 5 images "):
        attack(poisoned, LINEAR_VARIABLES, source, PROTOCOLS["clean"], devices=4, batch_size=5)


def test_protocols_by_name():
    assert list(robustness.protocols("pgd20, clean,")) == ["pgd20", "clean"]
    assert robustness.protocols(["fgsm"]) == {"fgsm": PROTOCOLS["fgsm"]}
    for names, mentions in (("pgd21", ['"pgd21"', *PROTOCOLS]), ("clean,apdg", ['"apdg"']), ("", ["none given", *PROTOCOLS])):
        assert_input_error(lambda: robustness.protocols(names), *mentions)


def test_every_protocol_names_its_objectives_and_explains_itself():
    for protocol in PROTOCOLS.values():
        assert set(protocol.objectives) <= set(robustness.OBJECTIVES) and protocol.description.endswith(".")
        assert len(protocol.runs) == len(protocol.objectives) * protocol.restarts
        if protocol.objectives:
            assert 0 < protocol.relative_step <= 1 and protocol.steps > 0
            if protocol.start != "none":  # long enough to cross the ball from any start
                assert protocol.steps * protocol.relative_step >= 2
