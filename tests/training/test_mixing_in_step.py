"""Augmentation and soft labels in the compiled step: which methods take them, on any number of devices, and what they cost."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrd import ThreatModel, distillation, models, objectives
from jaxrd.data.augment import MIXINGS, Augmentation
from jaxrd.distillation.catalogue import BASES
from jaxrd.errors import InputError
from jaxrd.training import parallel, step, state as states
from tests.support import assert_input_error

pytestmark = pytest.mark.usefixtures("quick_compilation")

BATCH, SHAPE, CLASSES = 16, (6, 6, 1), 4
INNER = distillation.InnerMaximisation(ThreatModel("linf", 0.1), 0.05, 1)
EVERYTHING = {mixing: Augmentation(shift=1, flip=True, cutout=2, mixing=mixing) for mixing in MIXINGS}
# Those that are defined for one true class per image only.
HARD = {"mart", "iad", "adaiad", "dgad", "path"}


def dense(width) -> models.Model:
    """A two-layer network without BatchNorm: quick to compile."""

    def init(key):
        first, second = jax.random.split(key)
        return {"params": {"first": jax.random.normal(first, (36, width)) / 4,
                           "second": jax.random.normal(second, (width, CLASSES)) / 2}, "batch_stats": {}}

    def apply(variables, images, train):
        params = variables["params"]
        return jnp.tanh(images.reshape(len(images), -1) @ params["first"]) @ params["second"], variables["batch_stats"]

    return models.Model(f"dense{width}", CLASSES, SHAPE, init, apply, {})


def recipe_of(name, augmentation, **options) -> step.Recipe:
    method = distillation.method(name, **options)
    return step.Recipe(
        method, dense(8), dense(6) if method.needs_teacher else None, INNER, optax.sgd(0.1), steps=4,
        augmentation=augmentation)


def batch() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (BATCH, *SHAPE), dtype=np.uint8)
    labels, other = generator.integers(0, CLASSES, BATCH).astype(np.int32), generator.permutation(BATCH)
    return {"images": images, "labels": labels, "partners": images[other], "partner_labels": labels[other]}


@functools.cache
def run(name, augmentation, devices=1, steps=2, **options):
    """The parameters and metrics after some steps, and the program of one."""
    recipe, mesh = recipe_of(name, augmentation, **options), parallel.data_mesh(jax.devices()[:devices])
    state = states.create(recipe.student, recipe.optimizer, jax.random.key(0), weight_average=False)
    state = jax.device_put(state, parallel.replicated(mesh))
    teacher = jax.device_put(dense(6).init(jax.random.key(1)), parallel.replicated(mesh)) if recipe.teacher else None
    placed = parallel.put_batch(batch(), mesh)
    train_step = step.make_train_step(recipe, mesh).lower(state, teacher, placed).compile()
    for _ in range(steps):
        state, metrics = train_step(state, teacher, placed)
        jax.block_until_ready((state, metrics))
    return (jax.tree.map(np.asarray, state.params), {name: float(value) for name, value in metrics.items()},
            train_step.as_text())


@pytest.mark.parametrize("name", ["pgd_at", "rslad+igdm", pytest.param("trades", marks=pytest.mark.slow)])
def test_every_mixing_trains_and_each_differently(name):
    first = {}
    for mixing in MIXINGS:
        params, metrics, _ = run(name, EVERYTHING[mixing])
        assert all(np.isfinite(value) for value in metrics.values())
        assert all(0 <= value <= 1 for metric, value in metrics.items() if metric.startswith("accuracy/"))
        first[mixing] = params["first"]
    for one, other in (("none", "mixup"), ("none", "cutmix"), ("mixup", "cutmix")):
        assert np.max(np.abs(first[one] - first[other])) > 1e-4


def test_a_batch_of_which_nothing_happens_to_be_mixed_trains_as_without_mixing():
    """Soft labels that are one-hot are the labels, and mixing leaves every other draw as it was."""
    params, metrics, _ = run("pgd_at", EVERYTHING["none"])
    same_params, same_metrics, _ = run("pgd_at", dataclasses.replace(EVERYTHING["cutmix"], mixing_probability=1e-9))
    assert same_metrics == pytest.approx(metrics, rel=1e-5)
    np.testing.assert_allclose(same_params["first"], params["first"], atol=1e-6)


@pytest.mark.parametrize("name, mixing", [("pgd_at", "cutmix"), ("rslad+igdm", "mixup")])
def test_four_devices_are_one_and_exchange_sums_only(name, mixing):
    one, one_metrics, _ = run(name, EVERYTHING[mixing])
    four, four_metrics, program = run(name, EVERYTHING[mixing], devices=4)
    assert four_metrics == pytest.approx(one_metrics, rel=1e-4, abs=1e-5)
    np.testing.assert_allclose(four["first"], one["first"], atol=1e-5)
    exchanged = set(re.findall(
        r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", program))
    assert exchanged == {"all-reduce"}


def test_what_the_step_makes_of_a_batch():
    key, rows = jax.random.key(5), batch()
    for mixing, augmentation in EVERYTHING.items():
        recipe = recipe_of("pgd_at", augmentation)
        images, labels = jax.jit(lambda key, rows: step.augment(recipe, key, rows))(key, rows)
        assert images.dtype == np.float32 and images.shape == (BATCH, *SHAPE)
        if mixing == "none":
            np.testing.assert_array_equal(labels, rows["labels"])
            assert labels.dtype == np.int32
            alone = jax.jit(lambda key, images: step.augment_one_view(recipe, key, images))(key, rows["images"])
            np.testing.assert_array_equal(images, alone)
            continue
        assert labels.dtype == np.float32 and labels.shape == (BATCH, CLASSES)
        np.testing.assert_allclose(labels.sum(axis=1), 1, atol=1e-6)
        allowed = np.eye(CLASSES)[rows["labels"]] + np.eye(CLASSES)[rows["partner_labels"]] > 0
        assert not np.any(np.asarray(labels)[~allowed])
        others = rows["labels"] != rows["partner_labels"]
        share = np.asarray(labels)[np.arange(BATCH), rows["partner_labels"]][others]
        assert np.mean(share > 0) > 0.7 and 0.1 < share.mean() < 0.9


# Which methods take soft labels.


@pytest.mark.parametrize("name", BASES)
def test_methods_say_whether_they_take_soft_labels(name):
    """And those that say so do: every term and monitor gives finite numbers for them, which for one-hot ones are the same."""
    method = distillation.method(name, igdm=1.0)
    assert method.hard_labels == (name in HARD)
    step.check_mixing(method, Augmentation(cutout=4))
    step.check_mixing(method, Augmentation(mixing="mixup", mixing_probability=0.0))
    mixing = Augmentation(mixing="cutmix")
    if name in HARD:
        assert_input_error(
            lambda: step.check_mixing(method, mixing), 'config.data.mixing "cutmix"', f"{name}+igdm needs one true class",
            "--config.data.mixing=none")
        return
    step.check_mixing(method, mixing)
    generator = np.random.default_rng(0)
    student, teacher = ({view.name: jnp.asarray(generator.normal(size=(5, 3)), jnp.float32) for view in method.views}
                        for _ in range(2))
    labels, soft = jnp.array([0, 2, 1, 1, 0]), jnp.asarray(generator.dirichlet(np.ones(3), 5), jnp.float32)
    hard_loss, hard_terms = method.loss(student, teacher, labels, 1.0)
    one_hot_loss, one_hot_terms = method.loss(student, teacher, jax.nn.one_hot(labels, 3), 1.0)
    soft_loss, _ = method.loss(student, teacher, soft, 1.0)
    assert soft_loss.shape == (5,) and np.all(np.isfinite(soft_loss))
    np.testing.assert_allclose(one_hot_loss, hard_loss, rtol=1e-6)
    assert set(one_hot_terms) == set(hard_terms)


def test_the_way_out_that_the_refusal_names_is_one():
    with pytest.raises(InputError) as caught:
        step.check_mixing(distillation.method("dgad"), Augmentation(mixing="mixup"))
    names = re.findall(r"[a-z_]+", str(caught.value).partition(" or use ")[2].replace(" or ", " "))
    assert len(names) >= 4
    for name in names:
        step.check_mixing(distillation.method(name), Augmentation(mixing="mixup"))


@pytest.mark.parametrize("options, hard", [
    ({"path_gamma": 0.0}, True), ({"path_weights": "linear"}, True), ({"path_gamma": 0.0, "path_weights": "linear"}, False),
    ({"path_gamma": 0.0, "path_weights": "gap"}, False), ({"path_gamma": 0.0, "path_weights": "boundary"}, True)])
def test_path_needs_a_true_class_for_its_targets_and_for_weights_that_look_at_it(options, hard):
    assert distillation.method("path", **options).hard_labels == hard


@pytest.mark.parametrize("name, options", [
    ("ard+jvp+direct", {}), ("trades+direct", {"direct_scalar": "logit"}), ("pgd_at+awp", {}),
    ("path", {"path_gamma": 0.0, "path_weights": "linear", "path_points": 1})])
def test_modules_take_soft_labels(name, options):
    recipe = recipe_of(name, EVERYTHING["mixup"], **options)
    _, metrics, _ = run(name, recipe.augmentation, steps=1, **options)
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("loss, reason", [
    (lambda student, teacher, labels: objectives.margin(student["clean"], labels), "labels are soft"),
    (lambda student, teacher, labels: -jax.nn.log_softmax(student["clean"])[jnp.arange(len(labels)), labels], "TypeError"),
    (lambda student, teacher, labels: jnp.where(labels == 0, 1.0, 0.0), f"[{CLASSES + 1}, {CLASSES}]")])
def test_a_loss_of_ones_own_that_does_not_take_soft_labels_is_refused_in_one_line(loss, reason):
    base = distillation.method("pgd_at")
    own = dataclasses.replace(
        base, name="own", views=(*base.views, distillation.CLEAN),
        terms=(*base.terms, distillation.Term("mine", loss, student=("clean",))))
    mesh = parallel.data_mesh(jax.devices()[:1])
    step.make_train_step(dataclasses.replace(recipe_of("pgd_at", EVERYTHING["none"]), method=own), mesh)
    recipe = dataclasses.replace(recipe_of("pgd_at", EVERYTHING["mixup"]), method=own)
    assert_input_error(
        lambda: step.make_train_step(recipe, mesh), 'config.data.mixing "mixup"', '"mine"', reason, "--config.data.mixing=none")


def test_a_batch_without_partners_is_refused():
    rows = {name: value for name, value in batch().items() if "partner" not in name}
    recipe = recipe_of("pgd_at", EVERYTHING["cutmix"])
    assert_input_error(
        lambda: step.augment(recipe, jax.random.key(0), rows), 'mixing "cutmix"', "has images, labels", '"partner_labels"')


def test_the_step_refuses_a_method_of_hard_labels_before_it_compiles():
    recipe = recipe_of("mart", EVERYTHING["cutmix"])
    assert_input_error(lambda: step.make_train_step(recipe, parallel.data_mesh()), "mart needs one true class per image")
