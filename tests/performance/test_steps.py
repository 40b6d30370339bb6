"""Timing by its counts: how often what is called, and what the figures are of; no number of seconds is judged."""

import pathlib

import numpy as np
import pytest

from jaxrd.performance import measurement, steps, timing, workload
from jaxrd.training import parallel
from tests.performance.support import ONE_DEVICE
from tests.support import assert_input_error

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_calls_take_turns_and_the_first_turn_is_not_timed():
    calls = []
    found = timing.in_turn({name: lambda name=name: calls.append(name) for name in "ab"}, 3)
    assert calls == list("abababab")
    assert [spread.repeats for spread in found.values()] == [3, 3]


@pytest.mark.parametrize("seconds, repeats", [(0.0, 30), (1.0, 20), (100.0, 5)])
def test_repetitions_are_as_many_as_fit(seconds, repeats):
    assert timing.repeats_within(seconds, 20.0) == repeats


def test_a_spread_is_the_median_and_the_quartiles():
    spread = timing.Spread.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (spread.lower, spread.median, spread.upper, spread.repeats) == (2.0, 3.0, 4.0, 5)
    assert spread.to_dict()["median_seconds"] == 3.0


def test_a_line_goes_through_points_on_one():
    found = steps.line([1, 5, 10], [3.0, 11.0, 21.0])
    assert (found.slope, found.intercept, found.largest_deviation) == pytest.approx((2, 1, 0), abs=1e-9)
    assert steps.line([1, 2, 3], [1.0, 2.0, 6.0]).largest_deviation == pytest.approx(0.5)
    assert steps.line([4], [2.0]) is None


def opened(tiny_config, mesh=ONE_DEVICE, **overrides):
    return workload.open_workload(tiny_config(teacher="none", **overrides), mesh, random_images=(8, 8, 1), classes=7,
                                  teacher_model="resnet6_w4")


def test_a_step_runs_once_for_each_time(tiny_config):
    of = opened(tiny_config, method={"name": "ard"})
    compiled, seconds = of.compile()
    calls = []
    found = steps.step_times(of, lambda *arguments: calls.append(0) or compiled(*arguments), 3)
    assert seconds > 0 and len(calls) == 2 + 3 + (3 + 1 + steps.IN_FLIGHT)
    for spread in (found.whole, found.input_wait, found.dispatch, found.between, found.in_training):
        assert spread.repeats == 3
    assert found.whole.median >= found.dispatch.lower and found.between.lower >= 0


def test_images_may_come_as_floats(tiny_config, tiny_arrays, tmp_path):
    paths = []
    for path in map(pathlib.Path, tiny_arrays.split(",")):
        with np.load(path) as arrays:
            np.savez(tmp_path / path.name, images=(arrays["images"] / 255).astype(np.float32), labels=arrays["labels"])
        paths.append(str(tmp_path / path.name))
    of = workload.open_workload(tiny_config(data={"arrays": ",".join(paths)}), ONE_DEVICE)
    assert of.batch()["images"].dtype == np.float32
    assert steps.step_times(of, of.compile()[0], 1).whole.median > 0
    figures = measurement.measure(of, repeats=1, with_ceilings=False)
    assert figures["operations"]["agree"]


def test_steps_side_by_side_say_what_each_takes(tiny_config):
    found = steps.side_by_side({str(size): opened(tiny_config, training={"batch_size": size}) for size in (8, 16)}, 2)
    for size, one in found.items():
        assert one.images_per_second == pytest.approx(int(size) / one.seconds.median)
        assert one.planned_memory["total"] > 0 and one.compilation_seconds > 0
        assert one.to_dict()["planned_total_bytes"] == one.planned_memory["total"]


def test_random_images_are_of_every_class_and_of_the_shape(tiny_config, monkeypatch):
    source = opened(tiny_config).source
    assert len(source) == 50_000 and source.image_shape == (8, 8, 1) and source.classes == 7
    assert set(np.unique(source.labels)) == set(range(7))
    monkeypatch.setattr(workload, "_MOST_RANDOM_BYTES", 1000)
    assert len(workload.random_source((8, 8, 1))) == 20 and len(workload.random_source((4, 4, 1))) == 62
    assert_input_error(lambda: workload.random_source((8, 8, 1), 1), "--classes=1")


def test_what_does_not_fit_is_refused_before_a_batch_lies_anywhere(tiny_config, monkeypatch):
    of = opened(tiny_config, training={"batch_size": 4_000_000})
    monkeypatch.setattr(workload, "Feeder", None)
    assert_input_error(of.compile, "the train step of pgd_at (resnet6_w4, batch 4000000) needs", "GiB", "accumulation")


def test_a_missing_teacher_can_be_replaced(tiny_config):
    config = tiny_config(method={"name": "ard"}, teacher="runs/nowhere")
    assert_input_error(lambda: workload.open_workload(config, ONE_DEVICE), "config.teacher", "--teacher_model=resnet6_w4")
    assert_input_error(lambda: opened(tiny_config, parallel.data_mesh(), training={"batch_size": 6}), "4 devices")
