"""Views forwarded as one batch come to the step that a forward for each comes to."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from jaxrd import distillation, models
from jaxrd.config import OptimizerConfig
from jaxrd.data.augment import Augmentation
from jaxrd.threat import ThreatModel
from jaxrd.training import parallel, schedule, state as states, step

pytestmark = pytest.mark.usefixtures("quick_compilation")

TEACHER = models.create("resnet6_w4", classes=10, image_shape=(8, 8, 1))
METHODS = [("rslad+igdm", {}), *(pytest.param(name, options, marks=pytest.mark.slow) for name, options in (
    ("rslad+igdm", {"mirrored_statistics": True}), ("trades+awp", {}), ("dgad+igdm", {}), ("path+igdm", {"path_points": 2}),
    ("ard+igdm+jvp", {}), ("iad", {"published_forwards": True})))]


def recipe(name, options, bn_groups=2):
    method = distillation.method(name, **options)
    student = models.create(
        "resnet6_w4", classes=10, image_shape=(8, 8, 1), batch_norm_sets=method.batch_norm_sets, bn_groups=bn_groups)
    return step.Recipe(
        method=method, student=student, teacher=TEACHER if method.needs_teacher else None, steps=3,
        inner=distillation.InnerMaximisation(ThreatModel("l2", 1.0), 0.3, 2),
        optimizer=schedule.optimizer(OptimizerConfig(learning_rate=0.05), 3), augmentation=Augmentation(shift=1))


def run(recipe):
    mesh = parallel.data_mesh(jax.devices()[:1])
    state = parallel.replicate(
        states.create(recipe.student, recipe.optimizer, jax.random.key(0), weight_average=False), mesh)
    teacher = TEACHER.init(jax.random.key(1)) if recipe.teacher else None
    train_step = step.make_train_step(recipe, mesh)
    for index in range(2):
        generator = np.random.default_rng(index)
        labels = generator.integers(0, 10, 8).astype(np.int32)
        rows = {"images": generator.integers(0, 256, (8, 8, 8, 1), dtype=np.uint8), "labels": labels}
        if recipe.method.negatives:
            rows |= {"negatives": rows["images"][::-1].copy(), "negative_labels": (labels + 1) % 10}
        state, metrics = train_step(state, teacher, parallel.put_batch(rows, mesh))
    return jax.tree.map(np.asarray, (state.params, state.batch_stats)), jax.tree.map(float, metrics)


@pytest.mark.parametrize("name, options", METHODS)
def test_views_in_one_forward_are_views_in_one_each(name, options):
    joint = recipe(name, options)
    assert any(len(forwards) > 1 for forwards in step.joint_forwards(joint))
    state, metrics = run(joint)
    expected, measured = run(dataclasses.replace(joint, joint_views=False))
    chex.assert_trees_all_close(state, expected, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(metrics, measured, rtol=1e-4, atol=1e-5)


def test_each_view_is_normalised_by_itself_and_moves_the_statistics_in_its_turn():
    model = models.create("resnet6_w4", classes=10, image_shape=(8, 8, 1), bn_groups=2)
    variables = model.init(jax.random.key(0))
    # Views of unlike scales: common statistics would be those of neither.
    first, second, third = (np.random.default_rng(view).uniform(0, scale, (4, 8, 8, 1)).astype(np.float32)
                            for view, scale in enumerate((1.0, 0.2, 0.5)))
    stacked = np.stack([first, second, third], axis=1).reshape(12, 8, 8, 1)
    logits, moved = model.apply(variables, stacked, True, views=(True, False, True))
    after_first = model.apply(variables, first, True)
    after_second = model.apply(variables, second, True)  # moves nothing
    after_third = model.apply(variables | {"batch_stats": after_first[1]}, third, True)
    for view, (expected, _) in enumerate((after_first, after_second, after_third)):
        np.testing.assert_allclose(logits[view::3], expected, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(moved, after_third[1], rtol=1e-4, atol=1e-6)


def test_a_model_that_takes_one_view_at_a_time_is_given_one():
    of = recipe("rslad+igdm", {})
    single = dataclasses.replace(of, student=dataclasses.replace(of.student, joint_views=False))
    assert [len(forwards) for forwards in step.joint_forwards(single)] == [1, 1, 1]
    assert [len(forwards) for forwards in step.joint_forwards(of)] == [3]
