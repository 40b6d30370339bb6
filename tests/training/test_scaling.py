"""What a step costs and how devices would do on paper, against counts made otherwise and closed forms."""

import dataclasses
import importlib

import jax
import numpy as np
import pytest

from jaxrd import distillation, models
from jaxrd.config import OptimizerConfig
from jaxrd.threat import ThreatModel
from jaxrd.training import parallel, scaling, schedule, state as states, step
from tests.support import assert_input_error

MODEL = models.create("resnet6_w4", classes=10, image_shape=(8, 8, 1))
COST = scaling.StepCost(flops=6e9, last_flops=3e9, gradient_bytes=40_000_000, state_bytes=80_000_000, image_bytes=3076)


def recipe(name, steps):
    method = distillation.method(name)
    return step.Recipe(
        method=method, student=MODEL, teacher=MODEL if method.needs_teacher else None, steps=5,
        inner=distillation.InnerMaximisation(ThreatModel(epsilon=0.1), 0.05, steps),
        optimizer=schedule.optimizer(OptimizerConfig(), 5))


def test_a_step_is_counted_as_its_whole_program_counts():
    of = recipe("rslad+igdm", 4)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0))
    cost = scaling.step_cost(of, parallel.data_mesh(jax.devices()[:1]), shapes, batch=4)
    state = jax.eval_shape(lambda: states.create(MODEL, of.optimizer, jax.random.key(0), weight_average=False))
    rows = {"images": jax.ShapeDtypeStruct((4, 8, 8, 1), np.uint8), "labels": jax.ShapeDtypeStruct((4,), np.int32)}
    whole = step.make_train_step(of, parallel.data_mesh(jax.devices()[:1])).lower(state, shapes, rows).cost_analysis()["flops"]
    assert cost.flops == pytest.approx(whole / 4, rel=1e-3)
    # Three views, each a forward pass and one backward to the weights: most of a step with one attack step only.
    alone = scaling.step_cost(recipe("pgd_at", 1), parallel.data_mesh(jax.devices()[:1]), None, batch=4)
    assert cost.last_flops == pytest.approx(3 * alone.last_flops, rel=1e-6)
    assert alone.last_flops < alone.flops < 3 * alone.last_flops
    parameters = models.parameter_count(shapes)
    assert cost.gradient_bytes == 4 * parameters
    # Weights and momentum, statistics, and the optimiser's counters.
    statistics = sum(leaf.size for leaf in jax.tree.leaves(shapes["batch_stats"]))
    assert 0 <= cost.state_bytes - 4 * (2 * parameters + statistics) <= 16
    assert cost.image_bytes == 8 * 8 + 4
    floats = scaling.step_cost(recipe("pgd_at", 1), parallel.data_mesh(jax.devices()[:1]), None, batch=4, pixels=np.float32)
    assert floats.image_bytes == 4 * 8 * 8 + 4
    layers = len(jax.tree.leaves(shapes["batch_stats"])) // 2
    assert cost.exchanges == 3 * layers and scaling.StepCost(1, 1, 1, 1, 1).exchanges == 0


def test_one_device_has_nobody_to_tell():
    alone = scaling.on_paper(COST, 1, 100, flops=1e14, link=1e10, latency=1e-5)
    assert alone.reduce_seconds == 0 and alone.hidden and alone.least_batch == 1
    assert alone.images_per_second == pytest.approx(1e14 / 6e9)
    assert alone.compute_seconds == pytest.approx(100 * 6e9 / 1e14)


def test_many_devices_by_hand():
    # 2 * 7/8 * 40 MB at 10 GB/s, and 2 * 3 hops of 10 us.
    reduce = 2 * 7 / 8 * 40e6 / 1e10 + 6 * 1e-5
    backward = 2 / 3 * 3e9 / 1e14
    few, many = (scaling.on_paper(COST, 8, batch, flops=1e14, link=1e10, latency=1e-5) for batch in (100, 1000))
    assert few.reduce_seconds == pytest.approx(reduce) and few.least_batch == int(np.ceil(reduce / backward)) == 353
    assert (few.hidden, many.hidden) == (False, True)
    assert few.images_per_second == pytest.approx(800 / (100 * 6e9 / 1e14 + reduce - 100 * backward))
    assert many.images_per_second == pytest.approx(8 * 1e14 / 6e9)
    waiting = scaling.on_paper(dataclasses.replace(COST, exchanges=60), 8, 1000, flops=1e14, link=1e10, latency=1e-5)
    assert waiting.wait_seconds == pytest.approx(60 * 6 * 1e-5) and waiting.least_batch == many.least_batch
    assert waiting.images_per_second == pytest.approx(8000 / (1000 * 6e9 / 1e14 + 60 * 6 * 1e-5))
    assert few.input_bytes_per_second == pytest.approx(3076 * few.images_per_second / 8)
    border = [scaling.on_paper(COST, 8, batch, flops=1e14, link=1e10, latency=1e-5).hidden for batch in (352, 353)]
    assert border == [False, True]


def test_the_table_of_collectives_adds_up():
    table = scaling.collectives_table(recipe("pgd_at", 1), None, [1, 4], 8).splitlines()
    kernels = sum(4 * leaf.size for leaf in jax.tree.leaves(jax.eval_shape(MODEL.init, jax.random.key(0))["params"])
                  if leaf.ndim > 1)
    assert f"kernels {kernels:,}" in table[0]
    assert table[-2] == "| 1 | 0 | 0 | 0 | none |"
    assert table[-1].startswith("| 4 | ") and table[-1].endswith(f"| {kernels:,} | all-reduce |")


def test_loops_that_stay_loops_are_counted_in_full(monkeypatch):
    """As on accelerators; and a method whose attack cannot be shortened to a step."""
    mesh, shapes = parallel.data_mesh(jax.devices()[:1]), jax.eval_shape(MODEL.init, jax.random.key(0))
    unrolled = scaling.step_cost(recipe("rslad", 4), mesh, shapes).flops
    monkeypatch.setattr(importlib.import_module("jaxrd.attacks.pgd"), "loop_unroll", lambda: 1)
    assert scaling.step_cost(recipe("rslad", 4), mesh, shapes).flops == pytest.approx(unrolled, rel=1e-6)
    model = models.create("resnet6_w4", classes=10, image_shape=(8, 8, 1), batch_norm_sets=2)
    costs = [scaling.step_cost(dataclasses.replace(
        recipe("path", steps), student=model, method=distillation.method("path", path_points=2)), mesh, shapes).flops
        for steps in (2, 3)]
    assert costs[1] > 1.05 * costs[0]


def test_a_backend_that_does_not_count_is_named_in_one_line(monkeypatch):
    monkeypatch.setattr(scaling.counting, "operations", lambda *_: None)
    assert_input_error(lambda: scaling.step_cost(recipe("pgd_at", 1), parallel.data_mesh(), None), "--cpu_devices=1")
