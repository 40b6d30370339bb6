"""evaluation.json says what the checkpoint does: its numbers can be computed again from the run directory."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest

from jaxrd import attacks, models
from jaxrd.errors import InputError
from jaxrd.evaluation import alignment, names
from jaxrd.evaluation import evaluate as evaluation
from jaxrd.training import loop

ATTACKS = "clean,fgsm,pgd20"


@pytest.fixture(scope="module")
def student(tiny_config, tiny_teacher, tmp_path_factory):
    """A run that has learnt something, and whose teacher is at hand."""
    workdir = tmp_path_factory.mktemp("student") / "run"
    config = tiny_config(method={"name": "ard"}, teacher=str(tiny_teacher),
                         training={"steps": 200, "checkpoint_every": 100, "log_every": 100})
    loop.train(config, workdir, devices=jax.devices()[:1])
    return workdir


@pytest.fixture(scope="module")
def evaluated(student):
    """(workdir, record, lines said)."""
    lines = []
    return student, evaluate(student, say=lines.append), lines


def evaluate(workdir, attacks=ATTACKS, **options):
    return evaluation.evaluate(workdir, attacks, **{"devices": jax.devices()[:1], "say": lambda _: None} | options)


def test_the_record_is_what_stands_in_the_file(evaluated):
    workdir, record, _ = evaluated
    assert json.loads((workdir / "evaluation.json").read_text()) == record


def test_the_record_names_the_run_the_data_and_the_attacks(evaluated, tiny_teacher):
    workdir, record, lines = evaluated
    assert set(record) == {"jaxrd", "run", "data", "threat", "seed", "accuracy", "attacks", "alignment", "classes",
                           "training", "robustness_curve", "seconds", "cascades"}
    assert record["run"] == {
        "workdir": str(workdir), "method": "ard", "student": "resnet6_w4", "teacher": str(tiny_teacher), "seed": 0,
        "parameters": models.parameter_count(models.restore(workdir)[1]), "step": 200, "checkpoint": "last",
        "weights": "newest", "dtype": "float32"}
    assert record["data"] == {
        "name": "arrays", "split": "test", "examples": 40, "train_examples": 160, "selection": "validation"}
    assert record["threat"] == {"norm": "linf", "epsilon": 0.1, "bounds": [0.0, 1.0]}
    assert set(record["accuracy"]) == set(record["attacks"]) == set(record["seconds"]) == {"clean", "fgsm", "pgd20"}
    assert record["attacks"]["pgd20"]["steps"] == 20
    assert record["attacks"]["pgd20"]["step_size"] == pytest.approx(0.025)
    assert [line.split()[1] for line in lines] == ["clean", "fgsm", "pgd20"]
    assert (record["alignment"]["teacher"], record["alignment"]["teacher_step"]) == (str(tiny_teacher), 200)
    curve = record["robustness_curve"]
    assert curve["attack"] == "pgd20" and curve["epsilon"][0] == 0 and 0.1 in curve["epsilon"]
    at = dict(zip(curve["epsilon"], curve["accuracy"], strict=True))
    assert at[0] == record["accuracy"]["clean"] and at[0.1] == record["accuracy"]["pgd20"]


def test_the_accuracy_is_that_of_the_restored_model(evaluated, tiny_arrays):
    workdir, record, _ = evaluated
    logits_fn = models.logits_fn(*models.restore(workdir))
    with np.load(tiny_arrays.split(",")[1]) as test:
        correct = np.argmax(logits_fn(test["images"].astype(np.float32) / 255), axis=-1) == test["labels"]
    assert record["accuracy"]["clean"] == pytest.approx(correct.mean())
    assert 0.2 < record["accuracy"]["pgd20"] + 0.1 < record["accuracy"]["clean"]  # the attack has something to take


def test_the_gallery_shows_one_image_of_each_class_and_what_the_model_says_of_it(evaluated, tiny_arrays):
    workdir, record, _ = evaluated
    logits_fn = models.logits_fn(*models.restore(workdir))
    with np.load(workdir / "evaluation" / "gallery.npz") as gallery:
        assert sorted(gallery["labels"]) == list(range(10))
        for images, predicted in (("images", "clean_prediction"), ("adversarial", "adversarial_prediction")):
            np.testing.assert_array_equal(np.argmax(logits_fn(gallery[images]), axis=-1), gallery[predicted])
        distance = np.abs(gallery["adversarial"] - gallery["images"]).max(axis=(1, 2, 3))
        assert np.all(distance <= 0.1 + 1e-6) and np.all(distance > 0.05)
        assert gallery["adversarial"].min() >= 0 and gallery["adversarial"].max() <= 1
        assert str(gallery["attack"]) == "pgd20"
        with np.load(tiny_arrays.split(",")[1]) as test:
            for image, label in zip(gallery["images"], gallery["labels"], strict=True):
                alike = np.all(np.isclose(test["images"] / 255, image, atol=1e-6), axis=(1, 2, 3))
                assert label in test["labels"][alike]


@pytest.mark.parametrize("options", [{"batch_size": 7}, {"devices": None, "batch_size": 16}])
def test_neither_batch_size_nor_devices_change_a_number(evaluated, tmp_path, options):
    workdir, record, _ = evaluated
    shutil.copytree(workdir, tmp_path / "run")
    found = evaluate(tmp_path / "run", **options)
    assert found["accuracy"] == record["accuracy"]
    assert found["robustness_curve"] == record["robustness_curve"]
    for name in names.ALIGNMENT:
        assert found["alignment"][name] == pytest.approx(record["alignment"][name], rel=1e-3)
    for name in ("examples", "accuracy", "confusion"):
        assert found["classes"][name] == record["classes"][name]


def test_the_record_says_how_linear_the_student_is_and_how_near_to_its_teacher(evaluated, tiny_teacher, tiny_arrays):
    workdir, record, _ = evaluated
    found = record["alignment"]
    assert 0 < found["central_remainder"] < 1 and 0 < found["taylor_remainder"] < 1
    student, teacher = (models.logits_fn(*models.restore(directory)) for directory in (workdir, tiny_teacher))
    with np.load(tiny_arrays.split(",")[1]) as test:
        labels = test["labels"]
        images = test["images"].astype(np.float32) / 255
    clean = np.mean(alignment.point_distance(teacher, student, images))
    assert abs(found["point_distance_uniform"] - clean) < 0.15 < found["point_distance_adversarial"]
    classes = record["classes"]
    assert np.dot(classes["examples"], classes["accuracy"]["clean"]) / 40 == pytest.approx(record["accuracy"]["clean"])
    moved = np.array(classes["confusion"]["true_to_adversarial"])
    assert np.trace(moved) / 40 == pytest.approx(record["accuracy"]["pgd20"])
    assert moved.sum(axis=1).tolist() == np.bincount(labels, minlength=10).tolist()


def test_a_student_that_is_its_teacher_is_aligned_with_it(evaluated, tiny_teacher, tmp_path):
    shutil.copytree(tiny_teacher, tmp_path / "run")
    found = evaluate(tmp_path / "run", "clean", teacher=str(tiny_teacher))["alignment"]
    assert found["gradient_cosine"] == pytest.approx(1, abs=1e-5)
    assert found["gradient_distance"] == pytest.approx(0, abs=1e-6)
    other = evaluated[1]["alignment"]
    assert other["gradient_cosine"] < 0.95 and other["gradient_distance"] > 1e-3


def test_without_a_teacher_there_is_the_network_alone_and_without_pgd_a_gallery_all_the_same(tiny_teacher, tmp_path):
    shutil.copytree(tiny_teacher, tmp_path / "run")
    record = evaluate(tmp_path / "run", ["clean"], split="validation", step=100)
    assert record["alignment"].keys() == {"taylor_remainder", "definitions"}
    assert record["classes"].keys() == {"examples", "accuracy"}
    assert (record["run"]["step"], record["run"]["checkpoint"]) == (100, "100")
    assert (record["data"]["split"], record["data"]["examples"]) == ("validation", 40)
    with np.load(tmp_path / "run" / "evaluation" / "gallery.npz") as gallery:
        assert np.abs(gallery["adversarial"] - gallery["images"]).max() <= 0.1 + 1e-6


@pytest.mark.parametrize("options, message", [
    ({"attacks": "clean,pdg20"}, "pdg20"),
    ({"split": "train"}, '"train"'),
    ({"step": 77}, "step 77"),
])
def test_what_cannot_be_evaluated_is_one_line_and_leaves_the_file_alone(evaluated, options, message):
    workdir, record, _ = evaluated
    with pytest.raises(InputError, match=message) as caught:
        evaluate(workdir, **options)
    assert "\n" not in str(caught.value)
    assert json.loads((workdir / "evaluation.json").read_text()) == record


def test_a_bfloat16_student_is_scored_in_float32(tiny_config, tmp_path):
    loop.train(tiny_config(dtype="bfloat16", training={"steps": 2}), tmp_path / "run", devices=jax.devices()[:1])
    model, _ = models.restore(tmp_path / "run")
    assert model.specification["dtype"] == "bfloat16"
    record = evaluate(tmp_path / "run", "clean")
    assert record["run"]["dtype"] == "float32" and "robustness_curve" not in record
    file = np.load(tmp_path / "run" / "evaluation" / "gallery.npz")
    exact = models.create(**model.specification | {"dtype": "float32"})
    logits = models.logits_fn(exact, models.restore(tmp_path / "run")[1])(file["images"])
    np.testing.assert_array_equal(np.argmax(logits, axis=-1), file["clean_prediction"])


def test_a_teacher_that_is_gone_costs_the_alignment_and_nothing_else(student, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(student, workdir)
    config = json.loads((workdir / "config.json").read_text())
    for path in workdir.glob("checkpoints/*/_CHECKPOINT_METADATA"):
        path.write_text(path.read_text().replace(config["teacher"], str(tmp_path / "gone")))
    lines = []
    record = evaluate(workdir, "clean", say=lines.append)
    assert "gradient_cosine" not in record["alignment"] and "teacher" not in record["alignment"]
    assert record["alignment"]["taylor_remainder"] > 0 and record["accuracy"]["clean"] > 0
    assert "no such run directory" in lines[0] and "--teacher" in lines[0]
    with pytest.raises(InputError, match="^--teacher: .*no such run directory"):
        evaluate(workdir, "clean", teacher=str(tmp_path / "gone"))


@pytest.fixture
def short_cascade(monkeypatch):
    """AutoAttack of few steps: its stages and not its strength are what counts here."""
    module = sys.modules["jaxrd.attacks.autoattack"]
    for name, value in (("_STEPS", 5), ("_QUERIES", 20), ("_TARGETS", 2)):
        monkeypatch.setattr(module, name, value)


def test_a_cascade_is_recorded_stage_by_stage_with_its_images(student, tmp_path, short_cascade):
    workdir = tmp_path / "run"
    shutil.copytree(student, workdir)
    lines = []
    record = evaluate(workdir, "clean,autoattack", say=lines.append)
    found = record["cascades"]["autoattack"]
    assert list(found["stages"]) == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert found["stages"]["clean"] == record["accuracy"]["clean"] > found["stages"]["square"] > 0
    assert record["accuracy"]["autoattack"] == found["stages"]["square"] == found["rescored_accuracy"]
    assert found["passes"]["clean"] == [40, 0] and found["passes"]["apgd-ce"][1] == 6 * round(record["accuracy"]["clean"] * 40)
    assert found["flags"] == [] and set(found["seconds"]) == set(found["stages"])
    assert "AutoAttack, version standard" in record["attacks"]["autoattack"]["description"]
    assert found["file"] == "evaluation/autoattack-test-step200-seed0/result.npz"
    saved = attacks.AutoAttackResult.load(workdir / found["file"])
    logits_fn = models.logits_fn(*models.restore(workdir))
    right = np.argmax(np.asarray(logits_fn(saved.images)), axis=-1) == saved.labels
    np.testing.assert_array_equal(right, saved.robust)
    assert right.mean() == record["accuracy"]["autoattack"]
    assert any(line.startswith(f"{workdir}: apgd-t 1/2: ") for line in lines)


def test_a_killed_cascade_goes_on_and_comes_to_the_same(student, tmp_path, short_cascade):
    workdir, whole = tmp_path / "run", tmp_path / "whole"
    shutil.copytree(student, workdir)
    shutil.copytree(student, whole)
    expected = evaluate(whole, "clean,fast", batch_size=16)

    class Killed(Exception):
        pass

    def die(line):
        if "apgd-t 2/2" in line:
            raise Killed

    with pytest.raises(Killed):
        evaluate(workdir, "clean,fast", batch_size=16, say=die)
    kept = json.loads((workdir / "evaluation.json").read_text())
    assert kept["accuracy"] == {"clean": expected["accuracy"]["clean"]}  # what was finished is in the file
    lines = []
    record = evaluate(workdir, "clean,fast", batch_size=16, say=lines.append)
    assert any("going on after" in line for line in lines)
    for name in ("stages", "passes", "flags"):
        assert record["cascades"]["fast"][name] == expected["cascades"]["fast"][name]
    assert not any("AutoAttack" in str(value) for value in record["cascades"].values())


def test_attacks_of_several_calls_stand_side_by_side_while_their_terms_are_the_same(evaluated, tmp_path):
    workdir, record, _ = evaluated
    shutil.copytree(workdir, tmp_path / "run")
    # The directory's name is one of the terms.
    path = tmp_path / "run" / "evaluation.json"
    path.write_text(path.read_text().replace(str(workdir), str(tmp_path / "run")))
    more = evaluate(tmp_path / "run", "mim")
    assert set(more["accuracy"]) == set(more["attacks"]) == {*record["accuracy"], "mim"}
    assert {name: more["accuracy"][name] for name in record["accuracy"]} == record["accuracy"]
    assert more["robustness_curve"] == record["robustness_curve"] and more["alignment"] == record["alignment"]
    assert set(more["classes"]["accuracy"]) == set(more["accuracy"])
    assert more["classes"]["confusion"] == record["classes"]["confusion"]
    assert set(evaluate(tmp_path / "run", "mim", seed=1)["accuracy"]) == {"mim"}
    path.write_text("{")
    assert set(evaluate(tmp_path / "run", "mim")["accuracy"]) == {"mim"}


def test_the_curve_may_be_of_another_attack_or_of_none(student, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(student, workdir)
    assert "robustness_curve" not in evaluate(workdir, "clean,pgd20", curve="none")
    curve = evaluate(workdir, "fgsm", curve="fgsm")["robustness_curve"]
    assert curve["attack"] == "fgsm" and curve["accuracy"][0] >= curve["accuracy"][-1]
    with pytest.raises(InputError, match="fgms"):
        evaluate(workdir, "fgsm", curve="fgms")
