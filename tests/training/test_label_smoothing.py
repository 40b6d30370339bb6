"""Label smoothing: what the loss reads, what nothing else reads, and which methods have no place for it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrd import distillation, objectives
from jaxrd.config import Config
from jaxrd.data.augment import Augmentation
from jaxrd.distillation.composition import check_label_smoothing
from jaxrd.training import parallel, step, state as states
from tests.support import assert_input_error
from tests.training.test_mixing_in_step import CLASSES, batch, dense, recipe_of

pytestmark = pytest.mark.usefixtures("quick_compilation")

PLAIN = Augmentation()


def recipe(name, smoothing, augmentation=PLAIN, **options):
    return dataclasses.replace(recipe_of(name, augmentation, **options), label_smoothing=smoothing)


@functools.cache
def run(name, smoothing, augmentation=PLAIN, **options):
    """The parameters after two steps and the metrics of the first."""
    made, mesh = recipe(name, smoothing, augmentation, **options), parallel.data_mesh(jax.devices()[:1])
    state = states.create(made.student, made.optimizer, jax.random.key(0), weight_average=False)
    teacher = dense(6).init(jax.random.key(1)) if made.teacher else None
    train_step, first = step.make_train_step(made, mesh), None
    for _ in range(2):
        state, metrics = train_step(state, teacher, parallel.put_batch(batch(), mesh))
        first = first or {name: float(value) for name, value in metrics.items()}
    return jax.tree.map(np.asarray, state.params), first


def first_inputs(made):
    """Views, labels and student logits of the first step."""
    state = states.create(made.student, made.optimizer, jax.random.key(0), weight_average=False)
    teacher = dense(6).init(jax.random.key(1)) if made.teacher else None
    augment_key, attack_key = jax.random.split(jax.random.fold_in(state.key, state.step))
    images, labels = step.augment(made, augment_key, batch())
    views, _ = jax.jit(lambda: step.attack(made, attack_key, state, teacher, images, labels))()
    logits = {view.name: np.asarray(made.student.apply({"params": state.params, "batch_stats": {}}, views[view.name], True)[0])
              for view in made.method.student_views}
    return views, labels, logits


def log_softmax(logits):
    return logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))


@pytest.mark.parametrize("name, view, options", [
    ("pgd_at", "adversarial", {}), ("trades", "clean", {}), ("akd", "adversarial", {}), ("ard", "clean", {"ard_alpha": 0.5})])
def test_cross_entropy_is_that_of_the_smooth_labels(name, view, options):
    _, metrics = run(name, 0.2, **options)
    _, labels, logits = first_inputs(recipe(name, 0.2, **options))
    smooth = 0.8 * np.eye(CLASSES)[labels] + 0.2 / CLASSES
    expected = -np.mean(np.sum(smooth * log_softmax(logits[view]), axis=1))
    assert metrics["cross_entropy"] == pytest.approx(expected, rel=1e-4)


def test_without_it_everything_is_as_it_was():
    """The program is: labels stay the integers that they were."""
    labels = jnp.array([0, 1])
    assert objectives.smooth_labels(labels, 0.0, 3) is labels
    params, metrics = run("pgd_at", 0.0)
    plain = recipe_of("pgd_at", PLAIN)
    assert plain == recipe("pgd_at", 0.0) or plain.label_smoothing == 0.0
    smoothed_params, smoothed = run("pgd_at", 0.1)
    assert smoothed["cross_entropy"] != metrics["cross_entropy"]
    assert np.max(np.abs(smoothed_params["first"] - params["first"])) > 1e-5


def test_the_attack_and_what_is_counted_know_the_true_class():
    for name, options in (("pgd_at", {}), ("akd", {})):
        plain, smooth = (first_inputs(recipe(name, smoothing, **options))[0] for smoothing in (0.0, 0.9))
        np.testing.assert_array_equal(plain["adversarial"], smooth["adversarial"])
        _, metrics = run(name, 0.0, **options)
        _, smoothed = run(name, 0.9, **options)
        for metric in metrics:
            if metric.startswith(("accuracy/", "teacher_accuracy/")):
                assert smoothed[metric] == metrics[metric]


def test_labels_that_are_mixed_are_smoothed_too():
    mixed = Augmentation(mixing="mixup")
    _, metrics = run("pgd_at", 0.3, mixed)
    _, labels, logits = first_inputs(recipe("pgd_at", 0.3, mixed))
    smooth = 0.7 * np.asarray(labels) + 0.3 / CLASSES
    expected = -np.mean(np.sum(smooth * log_softmax(logits["adversarial"]), axis=1))
    assert metrics["cross_entropy"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name, options, words", [
    ("mart", {}, ['"boosted_cross_entropy" of mart needs one true class']),
    ("dgad", {}, ['"distillation_clean" of dgad needs one true class']), ("iad", {"iad_alpha": 0.5}, ["introspection"]),
    ("path", {}, ["of path needs one true class"]), ("rslad", {}, ["no term of rslad", "reads a label"]),
    ("adaad+igdm", {}, ["no term of adaad+igdm"]), ("ard", {}, ["no term of ard", "ard_alpha below 1"]),
    ("ard+jvp+direct", {}, ["no term of ard+jvp+direct"])])
def test_methods_without_a_place_for_it_refuse_it_in_one_line(name, options, words):
    method = distillation.method(name, **options)
    check_label_smoothing(method, 0.0)
    assert_input_error(lambda: check_label_smoothing(method, 0.1), "config.training.label_smoothing is 0.1", *words,
                       "--config.training.label_smoothing=0")
    assert_input_error(lambda: Config.from_dict({
        "method": {"name": name, **options}, "teacher": "t", "training": {"label_smoothing": 0.1}}), *words)


@pytest.mark.parametrize("name, options", [
    ("pgd_at", {}), ("pgd_at+awp", {}), ("trades", {}), ("akd+igdm", {}), ("ard+jvp+direct", {"ard_alpha": 0.9})])
def test_methods_with_a_cross_entropy_take_it(name, options):
    check_label_smoothing(distillation.method(name, **options), 0.1)


@pytest.mark.parametrize("loss, reason", [
    (lambda student, teacher, labels: objectives.margin(student["clean"], labels), "labels are soft"),
    (lambda student, teacher, labels: jnp.where(labels == 0, 1.0, 0.0), "[3, 2]")])
def test_a_loss_of_ones_own_that_takes_no_soft_labels_is_refused_before_it_compiles(loss, reason):
    own = dataclasses.replace(recipe("pgd_at", 0.1), method=distillation.Method(
        "own", distillation.method("pgd_at").attack, (distillation.CLEAN,),
        (distillation.Term("mine", loss, student=("clean",)),)))
    assert_input_error(lambda: step.make_train_step(own, parallel.data_mesh()), "config.training.label_smoothing is 0.1",
                       '"mine"', reason, "label_smoothing=0")
