"""What the devices tell each other in a step: gradients and BatchNorm's statistics, whatever the batch."""

import collections
import dataclasses
import math

import jax
import numpy as np
import pytest

from jaxrd import distillation, models
from jaxrd.config import OptimizerConfig
from jaxrd.data.augment import Augmentation
from jaxrd.threat import ThreatModel
from jaxrd.training import parallel, schedule, state as states, step
from jaxrd.training.collectives import Collective, collectives

MODEL = models.create("resnet6_w4", classes=10, image_shape=(8, 8, 1))


def recipe(name="rslad+igdm", **options):
    return step.Recipe(
        method=distillation.method(name), student=MODEL, teacher=MODEL, steps=5,
        inner=distillation.InnerMaximisation(ThreatModel(epsilon=0.1), 0.05, 1),
        optimizer=schedule.optimizer(OptimizerConfig(), 5), augmentation=Augmentation(shift=1, flip=True),
        weight_average=0.9, **options)


def program(recipe, devices, batch):
    mesh = parallel.data_mesh(jax.devices()[:devices])
    state = jax.eval_shape(lambda: states.create(recipe.student, recipe.optimizer, jax.random.key(0), weight_average=True))
    state = jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                         state, step.shardings(recipe, mesh))
    teacher = {"params": state.params, "batch_stats": state.batch_stats}
    split = parallel.sharded(mesh, recipe.accumulation)
    cut = (recipe.accumulation, batch // recipe.accumulation) if recipe.accumulation > 1 else (batch,)
    rows = {"images": jax.ShapeDtypeStruct((*cut, 8, 8, 1), np.uint8, sharding=split),
            "labels": jax.ShapeDtypeStruct(cut, np.int32, sharding=split)}
    return collectives(step.make_train_step(recipe, mesh).lower(state, teacher, rows).compile().as_text())


def kernels():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0))["params"]
    return [leaf.shape for leaf in jax.tree.leaves(shapes) if leaf.ndim > 1]


def kernel_bytes():
    return sum(4 * math.prod(shape) for shape in kernels())


@pytest.fixture(scope="module")
def on_four():
    return program(recipe(), 4, 16)


def test_a_program_is_read_with_its_tuples():
    text = """
      %a = f32[4,3]{1,0} all-reduce(%x), replica_groups={}
      %b = (f32[8]{0}, bf16[2,2]{1,0}, pred[]) all-reduce-start(%y), channel_id=1
      %c = f32[8]{0} all-reduce-done(%b)
      %d = u8[16]{0} all-gather(%z), dimensions={0}
      ROOT %e = f32[4]{0} add(%p, %q)"""
    assert collectives(text) == [
        Collective("all-reduce", (("f32", (4, 3)),)), Collective("all-reduce", (("f32", (8,)), ("bf16", (2, 2)), ("pred", ()))),
        Collective("all-gather", (("u8", (16,)),))]
    assert [(found.bytes, found.bytes_of([(3, 1, 4), (2, 2)])) for found in collectives(text)] == [(48, 48), (41, 8), (16, 0)]


def test_one_device_tells_nobody_anything():
    assert program(recipe("pgd_at"), 1, 16) == []


def test_gradients_are_added_up_once_and_nothing_is_gathered(on_four):
    assert {found.kind for found in on_four} == {"all-reduce"}
    assert sum(found.bytes_of(kernels()) for found in on_four) == kernel_bytes()
    # All kernels but that of the first layer, which is ready last, travel as one.
    assert max(found.bytes_of(kernels()) for found in on_four) >= 0.9 * kernel_bytes()
    assert sum(found.bytes for found in on_four) < 2 * kernel_bytes()  # what BatchNorm tells besides is less


@pytest.mark.slow
def test_a_forward_for_each_view_adds_up_a_gradient_for_each(on_four):
    apart = program(recipe(joint_views=False), 4, 16)
    assert len(apart) > 2 * len(on_four)
    assert sum(found.bytes_of(kernels()) for found in apart) == len(recipe().method.student_forwards) * kernel_bytes() == (
        3 * kernel_bytes())


def test_what_is_told_does_not_grow_with_the_batch(on_four):
    assert program(recipe(), 4, 32) == on_four


def test_of_a_split_state_the_new_kernels_alone_are_gathered(on_four):
    kinds = collections.defaultdict(int)
    for found in program(recipe(shard_state=True), 4, 16):
        kinds[found.kind] += found.bytes
    assert set(kinds) == {"all-reduce", "all-gather"}
    assert kinds["all-gather"] <= kernel_bytes()
    assert kinds["all-reduce"] <= sum(found.bytes for found in on_four)


def test_micro_batches_are_cut_without_moving_an_image():
    found = program(dataclasses.replace(recipe("ard"), accumulation=2), 4, 16)
    assert {one.kind for one in found} == {"all-reduce"}
    assert sum(one.bytes_of(kernels()) for one in found) == 2 * kernel_bytes()
