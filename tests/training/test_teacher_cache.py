"""The teacher's logits from a table are the teacher's logits, and save the forwards that they stand for."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrd import ThreatModel, data, distillation, models
from jaxrd.data.augment import Augmentation, to_float
from jaxrd.training import loop, parallel, state as states, step, teacher_cache
from jaxrd.training.feeding import Feeder
from tests.support import assert_input_error
from tests.training.test_cost import BATCH, K, SHAPE, Counter

pytestmark = pytest.mark.usefixtures("quick_compilation")

IMAGES = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), dtype=np.uint8)
SOURCE = data.from_arrays(IMAGES, np.arange(30) % 10, classes=10)
TEACHER = models.create("resnet6_w4", classes=10, image_shape=(8, 8, 1))


def recipe(name="rslad", **options):
    method = distillation.method(name)
    values = {"method": method, "student": TEACHER, "teacher": TEACHER if method.needs_teacher else None, "steps": 100,
              "inner": distillation.InnerMaximisation(ThreatModel("linf", 0.1), 0.05, 2), "optimizer": optax.sgd(0.1)}
    return step.Recipe(**values | options)


@pytest.mark.parametrize("devices", [1, 4])
def test_the_table_holds_the_teachers_logits(devices):
    mesh = parallel.data_mesh(jax.devices()[:devices])
    variables = parallel.replicate(TEACHER.init(jax.random.key(0)), mesh)
    table = teacher_cache.clean_logits(recipe(), variables, SOURCE, mesh, batch_size=8)
    expected = TEACHER.apply(TEACHER.init(jax.random.key(0)), to_float(jnp.asarray(IMAGES)), False)[0]
    assert table.dtype == np.float32 and np.ptp(table, axis=0).min() > 0
    np.testing.assert_allclose(table, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_image_of_a_batch_comes_with_its_own_row(resident, accumulation):
    table = np.arange(300, dtype=np.float32).reshape(30, 10)
    mesh = parallel.data_mesh(jax.devices()[:2])
    with Feeder(SOURCE, mesh, seed=1, batch_size=8, last=5, resident=resident, accumulation=accumulation, negatives=True,
                teacher_clean=table) as feeder:
        for number, batch in enumerate(feeder):
            positions = SOURCE.indices(1, number, 8)
            rows, images = (np.asarray(batch[name]) for name in ("teacher_clean", "images"))
            np.testing.assert_array_equal(rows.reshape(8, 10), table[positions])
            np.testing.assert_array_equal(images.reshape(8, 8, 8, 1), IMAGES[positions])
            assert batch["teacher_clean"].sharding == batch["labels"].sharding
            assert set(batch) == {"images", "labels", "negatives", "negative_labels", "teacher_clean"}
    with Feeder(SOURCE, mesh, seed=1, batch_size=8, last=1, resident=resident) as feeder:
        assert set(next(feeder)) == {"images", "labels"}


@pytest.mark.parametrize("name, without, with_table", [
    ("ard", 1, 0), ("rslad", 1, 0), ("rslad+igdm", 3, 2), ("dgad", K + 2, K + 1), ("adaad", K + 1, K + 1)])
def test_forwards_of_the_teacher(name, without, with_table):
    """What is executed, batch by batch; AdaAD never asks the teacher about clean images."""
    method, found = distillation.method(name), []
    for given in (False, True):
        student, teacher = Counter(), Counter()
        of = recipe(name, method=method, student=student.model, teacher=teacher.model,
                    inner=distillation.InnerMaximisation(ThreatModel("linf", 0.1), 0.03, K))
        state = states.create(student.model, of.optimizer, jax.random.key(0), weight_average=False)
        images = jnp.asarray(np.random.default_rng(0).uniform(size=(BATCH, *SHAPE)), jnp.float32)
        rows = {"teacher_clean": teacher.model.apply(variables := teacher.model.init(jax.random.key(1)), images, False)[0]}
        teacher.forwards[False] = 0
        with jax.disable_jit():
            views, clean = step.attack(of, jax.random.key(2), state, variables, images, jnp.asarray([0, 1, 2, 1]),
                                       **(rows if given and of.reads_teacher_on_clean else {}))
            logits = step.teacher_logits(of, variables, views, clean, jnp.asarray([0, 1, 2, 1]))
        found.append((teacher.forwards[False], logits))
    assert (found[0][0], found[1][0]) == (without, with_table)
    for name, value in found[0][1].items():
        np.testing.assert_allclose(found[1][1][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["rslad+igdm", pytest.param("dgad", marks=pytest.mark.slow)])
def test_a_run_with_the_table_is_the_run_without(name, tiny_config, tiny_teacher, tmp_path, capsys):
    losses = {}
    for asked in (None, False):
        config = tiny_config(method={"name": name}, teacher=str(tiny_teacher), data={"shift": 0},
                             training={"steps": 24, "cache_teacher": asked, "checkpoint_every": 24})
        loop.train(config, tmp_path / str(asked), devices=jax.devices()[:2])
        lines = map(json.loads, (tmp_path / str(asked) / "metrics.jsonl").read_text().splitlines())
        losses[asked] = [line["train/loss"] for line in lines if "train/loss" in line]
        assert ("once" in capsys.readouterr().out) == (asked is None)
    assert len(losses[None]) == 24
    np.testing.assert_allclose(losses[None][:10], losses[False][:10], rtol=1e-4)
    np.testing.assert_allclose(losses[None], losses[False], rtol=0.05)  # rounding, amplified step by step


def test_where_it_applies(tiny_config):
    config = tiny_config(method={"name": "rslad"}, teacher="runs/teacher", training={"batch_size": 8, "steps": 100})

    def applies(of=recipe(), config=config, **training):
        return teacher_cache.applies(of, dataclasses.replace(
            config, training=dataclasses.replace(config.training, **training)), SOURCE)

    assert applies() and applies(cache_teacher=True) and not applies(cache_teacher=False)
    for augmentation in (Augmentation(shift=1), Augmentation(flip=True), Augmentation(cutout=2), Augmentation(mixing="mixup")):
        changing = recipe(augmentation=augmentation)
        assert not applies(changing)
        assert_input_error(lambda: applies(changing, cache_teacher=True), "config.training.cache_teacher", "augmented", "data.shift=0")
    assert not applies(recipe("adaad")) and not applies(recipe("pgd_at")), "nothing reads T(x)"
    once = recipe(steps=5)
    assert not applies(once) and applies(once, cache_teacher=True), "in one epoch the table costs what it saves"
    extra = dataclasses.replace(config, data=dataclasses.replace(config.data, extra="1m.npz"))
    assert not applies(config=extra) and applies(config=extra, cache_teacher=True)
