"""A batch in micro-batches comes to the update of the batch at once, whose BatchNorm has a group for each of them."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from jaxrd import attacks, distillation, models
from jaxrd.config import Config, OptimizerConfig
from jaxrd.data.augment import Augmentation
from jaxrd.threat import ThreatModel
from jaxrd.training import parallel, schedule, state as states, step
from jaxrd.training.loop import train
from tests.support import assert_input_error

pytestmark = pytest.mark.usefixtures("quick_compilation")

BATCH, PARTS, STEPS = 16, 4, 3
TEACHER = models.create("resnet6_w4", classes=10, image_shape=(8, 8, 1))


def recipe(name, accumulation, bn_groups, **options):
    method = distillation.method(name)
    student = models.create("resnet6_w4", classes=10, image_shape=(8, 8, 1), batch_norm_sets=method.batch_norm_sets,
                            bn_groups=bn_groups // accumulation)
    # Steps that follow the gradient, not its sign, which rounding turns round where the gradient is next to nothing.
    threat = ThreatModel("l2", 1.0)
    return step.Recipe(
        method=method, student=student, teacher=TEACHER if method.needs_teacher else None, steps=STEPS,
        inner=distillation.InnerMaximisation(threat, 0.3, 2), accumulation=accumulation,
        optimizer=schedule.optimizer(OptimizerConfig(learning_rate=0.05), STEPS),
        augmentation=Augmentation(shift=1, flip=True), weight_average=0.9, **options)


def run(recipe, devices=1):
    mesh = parallel.data_mesh(jax.devices()[:devices])
    state = states.create(recipe.student, recipe.optimizer, jax.random.key(0), weight_average=True)
    state = parallel.replicate(state, mesh, step.shardings(recipe, mesh))
    teacher = parallel.replicate(TEACHER.init(jax.random.key(1)), mesh) if recipe.teacher else None
    train_step, metrics = step.make_train_step(recipe, mesh), []
    for index in range(STEPS):
        rows = batch(index, recipe)
        if recipe.accumulation > 1:
            rows = {name: value.reshape(recipe.accumulation, -1, *value.shape[1:]) for name, value in rows.items()}
        state, measured = train_step(state, teacher, parallel.put_batch(rows, mesh, recipe.accumulation))
        jax.block_until_ready(measured)
        metrics.append(jax.tree.map(float, measured))
    return jax.tree.map(np.asarray, (state.params, state.batch_stats, state.average, state.opt_state)), metrics


def batch(index, recipe):
    generator = np.random.default_rng(index)
    labels = generator.integers(0, 10, BATCH).astype(np.int32)
    rows = {"images": generator.integers(0, 256, (BATCH, 8, 8, 1), dtype=np.uint8), "labels": labels}
    if recipe.method.negatives:
        rows |= {"negatives": rows["images"][::-1].copy(), "negative_labels": (labels + 1) % 10}
    if recipe.augmentation.mixes:
        order = generator.permutation(BATCH)
        rows |= {"partners": rows["images"][order], "partner_labels": labels[order]}
    return rows


@pytest.mark.parametrize("name, options", [
    ("rslad+igdm", {}),
    pytest.param("pgd_at+awp", {}, marks=pytest.mark.slow),
    pytest.param("adaad", {"augmentation": Augmentation(shift=1, mixing="mixup")}, marks=pytest.mark.slow),
    pytest.param("dgad+igdm", {}, marks=pytest.mark.slow),
])
def test_four_micro_batches_are_one_batch_with_four_groups(name, options):
    whole, expected = run(dataclasses.replace(recipe(name, 1, PARTS), **options))
    parts, found = run(dataclasses.replace(recipe(name, PARTS, PARTS), **options))
    chex.assert_trees_all_close(parts, whole, rtol=1e-4, atol=1e-6)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        chex.assert_trees_all_close(one, other, rtol=1e-4, atol=1e-6)
    # What is compared has moved, and without groups it would have moved elsewhere.
    plain, _ = run(dataclasses.replace(recipe(name, 1, 1), **options))
    difference = max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), plain[0], whole[0])))
    assert difference > 1e-3


@pytest.mark.slow
def test_micro_batches_are_the_same_on_four_devices_with_a_split_state_and_in_a_loop(monkeypatch):
    """Two groups for each of two micro-batches; on accelerators they are a loop of the program, and not unrolled."""
    expected, metrics = run(recipe("rslad+igdm", 2, 4))
    monkeypatch.setattr(step, "loop_unroll", lambda: 1)
    assert attacks.loop_unroll() is True
    found, measured = run(dataclasses.replace(recipe("rslad+igdm", 2, 4), shard_state=True), devices=4)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(measured, metrics, rtol=1e-4, atol=1e-6)


def test_a_run_that_its_devices_cannot_cut_is_refused_before_it_begins(tiny_config, tmp_path):
    config = tiny_config(training={"accumulation": 2, "batch_size": 4})
    assert_input_error(lambda: train(config, tmp_path / "run", devices=jax.devices()[:4]),
                       "config.training.batch_size is 4, which 4 devices and 2 micro-batches cannot share", "such as 8")
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_cut_is_refused(tiny_config):
    def refuse(*words, method="pgd_at", **values):
        assert_input_error(lambda: tiny_config(method={"name": method}, **values), *words)

    refuse("config.training.accumulation is 3", "batch_size, 16", "15 or 18", training={"accumulation": 3})
    refuse("config.training.accumulation is 0", training={"accumulation": 0})
    refuse("config.bn_groups is 2", "multiple of config.training.accumulation, 4", training={"accumulation": 4}, bn_groups=2)
    path = {"name": "path", "path_negatives": "batch", "path_points": 2}
    assert_input_error(lambda: Config.from_dict({
        "method": path, "teacher": "runs/t", "training": {"accumulation": 2}}), "accumulation is 2", "path_negatives=data")
    mesh = parallel.data_mesh()
    assert_input_error(lambda: parallel.check_batch_size("config.training.batch_size", 24, mesh, 4, 6),
                       "config.training.batch_size is 24", "4 devices and 4 micro-batches and 6 BatchNorm groups",
                       "multiple of 48", "such as 48")
