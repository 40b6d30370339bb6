"""What evaluation.json says around the images: the means of the functions of `alignment`, and class by class."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrd import ThreatModel
from jaxrd.data import from_arrays
from jaxrd.errors import InputError
from jaxrd.evaluation import alignment, measures, names, record
from jaxrd.evaluation.robustness import Result
from jaxrd.models import Model
from jaxrd.threat import example_keys
from jaxrd.training import parallel
from tests.evaluation.test_shares import Crew

pytestmark = pytest.mark.usefixtures("quick_compilation")

N, SHAPE, CLASSES = 21, (3, 3, 1), 4
GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.uniform(size=(N, *SHAPE)).astype(np.float32)
LABELS = GENERATOR.integers(0, CLASSES - 1, N).astype(np.int32)  # no image of the last class
SOURCE = from_arrays(IMAGES, LABELS, classes=CLASSES)
THREAT = ThreatModel("linf", 0.2)
ADVERSARIAL = np.clip(IMAGES + 0.2 * GENERATOR.choice([-1, 1], IMAGES.shape), 0, 1).astype(np.float32)


def forward(variables, images, train):
    return jnp.tanh(images.reshape(len(images), -1) @ variables["params"]) @ jnp.eye(CLASSES), variables["batch_stats"]


MODEL = Model("smooth", CLASSES, SHAPE, init=lambda key: {}, apply=forward, specification={})
STUDENT, TEACHER = ({"params": GENERATOR.normal(size=(9, CLASSES)).astype(np.float32), "batch_stats": {}} for _ in range(2))
LOGITS_FN, TEACHER_FN = (
    lambda images, weights=variables: forward(weights, images, False)[0] for variables in (STUDENT, TEACHER))
MODELS = {"teacher": (MODEL, TEACHER), "adversarial": ADVERSARIAL}


def measured(devices=1, seed=0, **options):
    mesh = parallel.data_mesh(jax.devices()[:devices])
    return measures.around_images(MODEL, STUDENT, SOURCE, THREAT, mesh=mesh, seed=seed, **{"batch_size": 5} | options)


@pytest.fixture(scope="module")
def whole():
    return measured(**MODELS)


def test_what_is_measured_are_the_functions_of_alignment(whole):
    keys = example_keys(jax.random.fold_in(jax.random.key(0), measures._NOISE), N)
    deltas = THREAT.random_start(keys, IMAGES, project=False) - IMAGES
    assert np.abs(deltas).max() <= 0.2 + 1e-6 and 0.08 < np.abs(deltas).mean() < 0.12  # uniform in the ball
    assert (IMAGES + deltas).min() < 0 and (IMAGES + deltas).max() > 1  # and out of the bounds
    gradients = [alignment.input_gradients(network, IMAGES, LABELS) for network in (LOGITS_FN, TEACHER_FN)]
    expected = {
        "taylor_remainder": alignment.taylor_remainder(LOGITS_FN, IMAGES, deltas),
        "central_remainder": alignment.central_remainder(LOGITS_FN, IMAGES, ADVERSARIAL - IMAGES),
        "gradient_distance": alignment.gradient_distance(*gradients),
        "gradient_cosine": alignment.gradient_cosine(*gradients),
        "point_distance_uniform": alignment.point_distance(TEACHER_FN, LOGITS_FN, IMAGES + deltas),
        "point_distance_adversarial": alignment.point_distance(TEACHER_FN, LOGITS_FN, ADVERSARIAL),
        "prediction": np.argmax(LOGITS_FN(IMAGES), axis=1),
        "adversarial_prediction": np.argmax(LOGITS_FN(ADVERSARIAL), axis=1)}
    assert whole.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(whole[name], values, rtol=1e-3, atol=1e-6, err_msg=name)
        assert np.std(values) > 0


@pytest.mark.parametrize("options", [{"batch_size": 100}, {"devices": 4, "batch_size": 8}])
def test_neither_batch_size_nor_devices_change_it(whole, options):
    for name, values in measured(**MODELS | options).items():
        np.testing.assert_allclose(values, whole[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("count", [2, N + 2])
def test_every_process_returns_what_one_measures(whole, count, monkeypatch):
    for found in Crew(count, monkeypatch)(lambda _: measured(**MODELS)):
        assert found.keys() == whole.keys()
        for name, values in found.items():
            assert values.dtype == whole[name].dtype
            np.testing.assert_allclose(values, whole[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_without_a_teacher_and_images_there_is_the_network_itself(whole):
    alone = measured()
    assert alone.keys() == {"taylor_remainder", "prediction"}
    np.testing.assert_allclose(alone["taylor_remainder"], whole["taylor_remainder"], rtol=1e-4)
    other = measured(seed=1)["taylor_remainder"]
    assert not np.allclose(other, alone["taylor_remainder"], rtol=0.01)
    own = measures.alignment_record(alone, {}, None)
    assert own.keys() == {"taylor_remainder", "definitions"}
    assert measured(adversarial=ADVERSARIAL).keys() - alone.keys() == {"central_remainder", "adversarial_prediction"}


def test_the_record_has_means_and_what_they_are(whole):
    found = measures.alignment_record(whole, {}, {"teacher": "runs/t", "teacher_step": 7})
    assert json.loads(json.dumps(found)) == found
    assert found.keys() == {*names.ALIGNMENT, "teacher", "teacher_step", "definition", "definitions"}
    for name in names.ALIGNMENT:
        average = np.median if found["definitions"][name].startswith("median of") else np.mean
        assert found[name] == pytest.approx(average(whole[name]), rel=1e-6)
    assert found["definitions"].keys() == set(names.ALIGNMENT) == set(measures.DEFINITIONS)
    assert found["definition"] == alignment.DEFINITION


def test_an_image_without_a_difference_is_not_the_record_and_a_measure_without_a_value_is_not_in_it(whole):
    constant = whole | {"central_remainder": np.append(whole["central_remainder"][1:], np.inf).astype(np.float32),
                        "taylor_remainder": np.full(N, np.nan, np.float32)}
    found = measures.alignment_record(constant, {}, None)
    assert found["central_remainder"] == pytest.approx(np.median(constant["central_remainder"]))
    assert "taylor_remainder" not in found and "taylor_remainder" not in found["definitions"]


def test_what_was_not_measured_again_is_kept_unless_it_was_of_another_teacher(whole):
    teacher = {"teacher": "runs/t", "teacher_step": 7}
    earlier = measures.alignment_record(whole, {}, teacher) | {"taylor_remainder": -1.0}
    less = {name: values for name, values in whole.items() if "adversarial" not in name}
    kept = measures.alignment_record(less, earlier, teacher)
    assert kept["point_distance_adversarial"] == earlier["point_distance_adversarial"] and kept["taylor_remainder"] > 0
    other = measures.alignment_record(less, earlier, teacher | {"teacher_step": 8})
    assert "point_distance_adversarial" not in other and "point_distance_adversarial" not in other["definitions"]
    gone = measures.alignment_record({name: whole[name] for name in ("taylor_remainder",)}, earlier, None)
    assert gone["teacher"] == "runs/t" and gone["gradient_cosine"] == earlier["gradient_cosine"]


def result(robust):
    return Result(np.asarray(robust), None, 0.0)


def test_class_by_class(whole):
    results = {"clean": result(whole["prediction"] == LABELS), "pgd20": result(whole["adversarial_prediction"] == LABELS)}
    found = measures.classes_record(whole, results, SOURCE, {})
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["examples"] == np.bincount(LABELS, minlength=CLASSES).tolist() and found["examples"][-1] == 0
    for name, values in (("clean", results["clean"].robust), ("pgd20", results["pgd20"].robust)):
        means = found["accuracy"][name]
        expected = [values[LABELS == label].mean() for label in range(CLASSES - 1)]
        assert means[-1] is None and means[:-1] == pytest.approx(expected)
    assert found["gradient_cosine"][0] == pytest.approx(whole["gradient_cosine"][LABELS == 0].mean(), rel=1e-5)
    moved = np.array(found["confusion"]["true_to_adversarial"])
    assert moved.sum(axis=1).tolist() == found["examples"] and np.trace(moved) == results["pgd20"].robust.sum()
    stayed = np.array(found["confusion"]["clean_to_adversarial"])
    assert np.trace(stayed) == np.sum(whole["prediction"] == whole["adversarial_prediction"])
    assert found["confusion"]["attack"] == "pgd20"
    more = measures.classes_record(
        {"prediction": whole["prediction"]}, {"fgsm": results["clean"]}, SOURCE, found)  # another call, without pgd20
    assert more["accuracy"].keys() == {"clean", "pgd20", "fgsm"} and more["confusion"] == found["confusion"]
    record.check({"classes": found}, "evaluation.json", "")


def test_many_classes_have_no_matrices(whole):
    source = dataclasses.replace(SOURCE, classes=21)
    found = measures.classes_record(whole, {"clean": result(whole["prediction"] == LABELS)}, source, {})
    assert "confusion" not in found and len(found["accuracy"]["clean"]) == 21


@pytest.mark.parametrize("broken, message", [
    ([], "classes is [] instead of an object"),
    ({"examples": [1, 2], "accuracy": {"clean": [0.5]}}, "classes.accuracy.clean is [0.5]"),
    ({"examples": [1, 2], "accuracy": {"clean": [0.5, "a"]}}, "classes.accuracy.clean"),
    ({"examples": 3}, "classes.examples is 3"),
    ({"examples": [1, 2], "confusion": {"attack": "pgd20", "true_to_adversarial": [[1, 2]]}}, "classes.confusion.true_to"),
    ({"examples": [1, 2], "confusion": {"attack": "pgd20", "true_to_adversarial": [[1, 2], [3]]}}, "adversarial[1] is [3]"),
    ({"examples": [1, 2], "accuracy": 5}, "classes.accuracy is 5"),
])
def test_a_damaged_record_is_one_line(broken, message):
    with pytest.raises(InputError) as caught:
        record.check({"classes": broken}, "evaluation.json", "delete it")
    assert message in str(caught.value) and "delete it" in str(caught.value) and "\n" not in str(caught.value)
