"""Negatives from the data in the step and in a run: whose images, whose labels, drawn and augmented on their own."""

import collections
import dataclasses
import re
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from jaxrd import data, distillation, objectives
from jaxrd.data.augment import Augmentation
from jaxrd.distillation import ADVERSARIAL, CLEAN, NEGATIVE, Method, Monitor, Term, View
from jaxrd.training import loop, opening, parallel, state as states, step
from tests.support import assert_input_error
from tests.training.test_views_in_step import BATCH, CLASSES, INNER, SHAPE, dense, gradients, setting

pytestmark = pytest.mark.usefixtures("quick_compilation")
ONE = {"devices": jax.devices()[:1]}
EVERYONE = np.arange(BATCH)


def one_device():
    return parallel.data_mesh(jax.devices()[:1])


def first_step(recipe, state, teacher_variables, batch, mesh):
    """(metrics, params, BatchNorm statistics) after one step, and the compiled program of it."""
    placed = jax.device_put((jax.tree.map(jnp.copy, state), teacher_variables), parallel.replicated(mesh))
    placed = (*placed, parallel.put_batch(batch, mesh))
    program = step.make_train_step(recipe, mesh).lower(*placed).compile()
    state, metrics = program(*placed)
    jax.block_until_ready(state)
    metrics = {name: float(value) for name, value in metrics.items()}
    return (metrics, *jax.device_get((state.params, state.batch_stats))), program


# How they come to the step.


def test_negatives_are_augmented_apart_from_the_images_that_they_are_for():
    recipe = dataclasses.replace(setting("path")[0], augmentation=Augmentation(shift=2, flip=True))
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 1), dtype=np.uint8)
    same = np.tile(image, (200, 1, 1, 1))
    batch = {"images": same, "labels": np.zeros(200, np.int32), "negatives": same, "negative_labels": np.ones(200, np.int32)}
    images, _ = step.augment(recipe, jax.random.key(0), batch)
    negatives, labels = step.augment_negatives(recipe, jax.random.key(0), batch)
    assert negatives.dtype == jnp.float32 and 0 <= negatives.min() and negatives.max() <= 1
    np.testing.assert_array_equal(labels, 1)
    # 25 crops, each flipped or not: two independent ones are alike once in 50 times.
    assert 0 < np.all(negatives == images, axis=(1, 2, 3)).sum() < 14
    assert len(np.unique(np.asarray(negatives), axis=0)) > 45
    # The same for the same key, others for another, and the images are those of a batch without negatives.
    again, other = (step.augment_negatives(recipe, jax.random.key(seed), batch)[0] for seed in (0, 1))
    np.testing.assert_array_equal(again, negatives)
    assert (other != negatives).any(axis=(1, 2, 3)).mean() > 0.9
    alone = dataclasses.replace(recipe, method=distillation.method("path", path_negatives="batch"))
    plain = {"images": same, "labels": batch["labels"]}
    np.testing.assert_array_equal(step.augment(alone, jax.random.key(0), plain)[0], images)
    assert step.augment_negatives(alone, jax.random.key(0), plain) == (None, None)


def test_negatives_are_read_as_images_are():
    recipe, *_ = setting("path")
    pixels = np.arange(BATCH * 16, dtype=np.uint8).reshape(BATCH, *SHAPE)
    batch = {"images": pixels[::-1], "labels": np.zeros(BATCH, np.int32), "negatives": pixels,
             "negative_labels": np.ones(BATCH, np.int32)}
    negatives, _ = step.augment_negatives(recipe, jax.random.key(0), batch)
    np.testing.assert_allclose(negatives, pixels / 255, rtol=1e-6)


@pytest.mark.parametrize("without", [("negatives",), ("negative_labels",), ("negatives", "negative_labels")])
def test_a_batch_without_them_is_refused_in_one_line(without):
    recipe, state, teacher_variables, batch = setting("path")
    batch = {name: rows for name, rows in batch.items() if name not in without}
    assert_input_error(
        lambda: first_step(recipe, state, teacher_variables, batch, one_device()), "path takes a negative",
        "the batch has images, labels", '"negatives" and "negative_labels"', 'path_negatives to "batch"')


# What the step computes of them.


@pytest.mark.parametrize("dual", [True, False])
def test_both_branches_are_the_plain_computation(dual):
    """The reference's pseudo-code: the image x with its label y, its negative x_n with y_n, T(x_n), the descent to y."""
    recipe, state, teacher_variables, batch = setting("path", path_dual_batch_norm=dual)
    views, gradient, _, metrics = gradients(recipe, state, teacher_variables, batch)
    # Start, its labels, its points, which way they go on CE(., y), the BatchNorm set.
    branches = [
        ("images", "labels", ["path/1", "path/2", "adversarial"], 1, 0),
        ("negatives", "negative_labels", ["targeted/1", "targeted/2", "targeted/3"], -1, int(dual))]

    def student(params, points, batch_norm_set, train=True):
        variables = {"params": params, "batch_stats": state.batch_stats}
        return recipe.student.apply(variables, points, train, batch_norm_set)[0]

    def along(params, names, batch_norm_set):
        """Logits of the points of a path, the first two forwarded together."""
        together = student(params, np.concatenate([views[name] for name in names[:2]]), batch_norm_set)
        return [together[:BATCH], together[BATCH:], student(params, views[names[2]], batch_norm_set)]

    weights, targets = [], []
    for start, labels, names, way, chosen in branches:
        points = [batch[start], *(views[name] for name in names)]
        assert max(np.abs(point - points[0]).max() for point in points) <= 0.1 + 1e-6
        passed = [float(jnp.mean(objectives.cross_entropy(student(state.params, point, chosen, False), batch["labels"])))
                  for point in points]
        assert (way * np.diff(passed) > 0).all()

        def true_class(logits, labels=batch[labels]):
            return scipy.special.softmax(np.float64(logits), axis=1)[EVERYONE, labels]

        at_start = true_class(student(state.params, batch[start], chosen))
        drop = np.stack([np.maximum(at_start - true_class(logits), 0) for logits in along(state.params, names, chosen)])
        weights.append(drop / drop.max(axis=1, keepdims=True))
        targets.append(scipy.special.softmax(np.float64(dense(6).apply(teacher_variables, batch[start], False)[0]), axis=1))

    def losses(params):
        for (_, _, names, _, chosen), weight, target in zip(branches, weights, targets, strict=True):
            apart = jnp.stack([
                jnp.sum(target * (np.log(target) - jax.nn.log_softmax(logits)), axis=1)
                for logits in along(params, names, chosen)])
            yield jnp.mean(jnp.sum(weight * apart, axis=0) / (np.sum(weight, axis=0) + 1e-8))

    untargeted, targeted = losses(state.params)
    assert targeted > 0.01
    np.testing.assert_allclose(metrics["path_untargeted"], untargeted, rtol=1e-4)
    np.testing.assert_allclose(metrics["path_targeted"], targeted, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], untargeted + targeted, rtol=1e-4)
    expected = jax.grad(lambda params: sum(losses(params)))(state.params)
    chex.assert_trees_all_close(gradient, expected, rtol=1e-3, atol=1e-5)


def test_accuracies_are_by_the_labels_of_the_images_that_a_view_follows_from():
    recipe, state, teacher_variables, batch = setting("path")
    views, _, _, metrics = gradients(recipe, state, teacher_variables, batch)
    true = {"clean": batch["labels"], "adversarial": batch["labels"], "negative": batch["negative_labels"],
            "targeted/3": batch["negative_labels"]}
    variables, apart = {"params": state.params, "batch_stats": state.batch_stats}, 0
    for name, labels in true.items():
        chosen = int(name in ("negative", "targeted/3"))
        found = np.argmax(recipe.student.apply(variables, views[name], True, chosen)[0], axis=1)
        assert metrics[f"accuracy/{name}"] == pytest.approx(np.mean(found == labels))
        apart += np.mean(found == batch["labels"]) != np.mean(found == labels)
    assert apart
    for name in ("clean", "negative"):
        found = np.argmax(recipe.teacher.apply(teacher_variables, views[name], False)[0], axis=1)
        assert metrics[f"teacher_accuracy/{name}"] == pytest.approx(np.mean(found == true[name]))


def test_other_negatives_change_their_branch_alone():
    recipe, state, teacher_variables, batch = setting("path")
    (before, _, _), program = first_step(recipe, state, teacher_variables, batch, one_device())
    others = batch | {"negatives": batch["negatives"][::-1], "negative_labels": batch["negative_labels"][::-1]}
    relabelled = batch | {"negative_labels": (batch["labels"] + batch["negative_labels"] + 1) % CLASSES}
    for changed in (others, relabelled):
        _, after = program(jax.tree.map(jnp.copy, state), teacher_variables, parallel.put_batch(changed, one_device()))
        for name in ("path_untargeted", "accuracy/clean", "accuracy/adversarial", "teacher_accuracy/clean"):
            assert after[name] == before[name]
        assert abs(after["path_targeted"] - before["path_targeted"]) > 1e-4


def test_one_device_and_four_are_the_same_step_and_exchange_sums_alone():
    recipe, state, teacher_variables, batch = setting("path")
    recipe = dataclasses.replace(recipe, augmentation=Augmentation(shift=1, flip=True))
    one, _ = first_step(recipe, state, teacher_variables, batch, one_device())
    four, program = first_step(recipe, state, teacher_variables, batch, parallel.data_mesh())
    assert one[0] == pytest.approx(four[0], rel=1e-4, abs=1e-5)
    chex.assert_trees_all_close(one[1:], four[1:], rtol=1e-4, atol=1e-5)
    kinds = collections.Counter(re.findall(
        r"= \S+ (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", program.as_text()))
    assert {*kinds} == {"all-reduce"}


# Whose labels a term, a monitor and a readout are given.


def own_method(**changes):
    """Cross-entropy of the images and of their negatives; each part notes the labels that it is given."""
    given = {}

    def noting(name, result):
        def function(*arguments):
            given[name] = arguments[-1]
            return result(*arguments)
        return function

    def cross_entropy(view):
        return lambda student, teacher, labels: objectives.cross_entropy(student[view], labels)

    readout = View(
        "read", NEGATIVE.points, labels="negative_labels",
        readout=noting("readout", lambda network, points, known, labels: network(points)))
    parts = {
        "views": (ADVERSARIAL, CLEAN, NEGATIVE, readout),
        "terms": (
            Term("own", noting("own", cross_entropy("adversarial")), student=("adversarial",)),
            Term("negatives", noting("negatives", cross_entropy("negative")), student=("negative",), labels="negative_labels"),
            Term("read", noting("read", cross_entropy("read")), student=("read",), weight=0.5)),
        "monitors": (
            Monitor("clean_gap", noting("clean_gap", lambda student, teacher, labels: student["adversarial"][:, 0])),
            Monitor("negative_gap", noting("negative_gap", lambda student, teacher, labels: student["negative"][:, 0]),
                    labels="negative_labels"))}
    return Method("mine", distillation.cross_entropy_attack(), **parts | changes), given


def test_every_part_is_given_the_labels_that_it_names():
    method, given = own_method()
    assert method.negatives and not method.attack.negatives and not distillation.method("ard").negatives
    recipe = step.Recipe(method, dense(8), None, INNER, optax.sgd(0.1), steps=4)
    state = states.create(recipe.student, recipe.optimizer, jax.random.key(0), weight_average=False)
    _, _, _, batch = setting("path")
    views, _, _, metrics = gradients(recipe, state, None, batch)
    own, negative = ("own", "read", "clean_gap"), ("negatives", "negative_gap", "readout")
    assert {*given} == {*own, *negative}
    for name in own + negative:
        np.testing.assert_array_equal(given[name], batch["negative_labels" if name in negative else "labels"], err_msg=name)
    logits = recipe.student.apply({"params": state.params, "batch_stats": state.batch_stats}, views["negative"], True)[0]
    expected = -np.asarray(jax.nn.log_softmax(logits))[EVERYONE, batch["negative_labels"]].mean()
    np.testing.assert_allclose(metrics["negatives"], expected, rtol=1e-5)
    assert metrics["accuracy/negative"] == pytest.approx(np.mean(np.argmax(logits, axis=1) == batch["negative_labels"]))


@pytest.mark.parametrize("part", ["views", "terms", "monitors"])
def test_any_part_about_negatives_makes_the_method_one_with_negatives(part):
    term = Term("own", lambda student, teacher, labels: student["clean"][:, 0], student=("clean",))
    plain = {"views": (ADVERSARIAL, CLEAN), "terms": (term,), "monitors": ()}
    assert not own_method(**plain)[0].negatives
    further = {
        "views": NEGATIVE, "terms": dataclasses.replace(term, name="further", labels="negative_labels"),
        "monitors": Monitor("further", term.loss, labels="negative_labels")}[part]
    assert own_method(**plain | {part: (*plain[part], further)})[0].negatives


def test_labels_that_no_batch_has():
    wrong = Term("own", lambda student, teacher, labels: labels, student=(), labels="negatives_labels")
    assert_input_error(
        lambda: own_method(terms=(wrong,)), 'method "mine"', 'labels of "own"', '"negatives_labels"',
        'did you mean "negative_labels"?')


def test_negatives_keep_their_class_where_images_are_mixed():
    method, given = own_method()
    views = tuple(view for view in method.views if view.readout is None)
    # One that takes no soft labels.
    true_class = Term(
        "true_class", lambda student, teacher, labels: -student["negative"][EVERYONE[:len(labels)], labels],
        student=("negative",), labels="negative_labels")
    terms = (*(term for term in method.terms if term.name != "read"), true_class)
    recipe = step.Recipe(
        dataclasses.replace(method, views=views, terms=terms), dense(8), None, INNER, optax.sgd(0.1), steps=4,
        augmentation=Augmentation(mixing="mixup"))
    state = states.create(recipe.student, recipe.optimizer, jax.random.key(0), weight_average=False)
    _, _, _, batch = setting("path")
    batch |= {"partners": batch["images"][::-1], "partner_labels": batch["labels"][::-1]}
    (metrics, _, _), _ = first_step(recipe, state, None, batch, one_device())
    assert given["own"].shape == (BATCH, CLASSES) and given["negatives"].shape == (BATCH,)
    assert all(np.isfinite(value) for value in metrics.values())
    np.testing.assert_array_equal(step.augment_negatives(recipe, jax.random.key(0), batch)[0], batch["negatives"])


# A run.


PATH = {"name": "path", "path_points": 1}


def test_a_run_trains_on_the_negatives_of_its_source_and_goes_on_like_an_uninterrupted_one(
        tiny_config, tiny_teacher, tmp_path, monkeypatch):
    config, seen = tiny_config(method=PATH, teacher=str(tiny_teacher), training={"steps": 4}), []
    make = loop.make_train_step

    def noting(recipe, mesh):
        train_step = make(recipe, mesh)

        def step_of(state, teacher_variables, batch):
            seen.append(jax.device_get(batch))
            return train_step(state, teacher_variables, batch)
        return step_of

    monkeypatch.setattr(loop, "make_train_step", noting)
    whole = loop.train(config, tmp_path / "run", **ONE)
    _, source = opening.open_data(config)
    assert len(seen) == 4
    for index, batch in enumerate(seen):
        rows = source.negatives(config.seed, index, 16)
        np.testing.assert_array_equal(batch["negatives"], source.images[rows])
        np.testing.assert_array_equal(batch["negative_labels"], source.labels[rows])
        assert (batch["negative_labels"] != batch["labels"]).all()

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    resumed = loop.train(config, tmp_path / "run", **ONE)
    assert len(seen) == 6
    for ours, theirs in zip(jax.tree.leaves(whole.params), jax.tree.leaves(resumed.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_data_of_one_class_have_no_negatives(tiny_config, tiny_teacher, tmp_path, monkeypatch):
    config = tiny_config(method=PATH, teacher=str(tiny_teacher))
    source = data.from_arrays(np.zeros((40, 8, 8, 1), np.uint8), np.full(40, 3), classes=10)
    dataset, _ = opening.open_data(config)
    one_class = dataclasses.replace(dataset, train=source, validation=source)
    monkeypatch.setattr(opening, "open_data", lambda config: (one_class, source))
    assert_input_error(
        lambda: loop.train(config, tmp_path / "run", **ONE), "all 40 images are of class 3", "two classes or more")
