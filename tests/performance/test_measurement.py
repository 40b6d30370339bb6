"""All figures of a workload: they are of its configuration, consistent with each other, and JSON can hold them."""

import json

import jax
import pytest

from jaxrd.performance import ceilings, counting, measurement, operations, workload
from jaxrd.training import parallel
from launch import benchmark_tables as tables
from tests.performance.support import recipe
from tests.support import assert_input_error


@pytest.fixture(scope="module")
def figures(tiny_config, quick_compilation):
    config = tiny_config(teacher="none", method={"name": "rslad+igdm"}, training={"batch_size": 16, "accumulation": 2})
    of = workload.open_workload(config, parallel.data_mesh(), random_images=(8, 8, 1), teacher_model="resnet6_w8")
    return measurement.measure(of, repeats=1, peak_flops=1e12, with_ceilings=False)


def test_every_part_is_there_and_adds_up(figures):
    assert json.loads(json.dumps(figures)) == figures
    parts, step = figures["parts"], figures["step"]
    assert list(parts) == ["augmentation", "attack", "teacher", "student forward", "student", "optimiser", "student backward"]
    assert parts["student backward"]["median_seconds"] == pytest.approx(
        parts["student"]["median_seconds"] - parts["student forward"]["median_seconds"])
    assert step["whole"]["median_seconds"] == pytest.approx(
        step["whole"]["upper_quartile_seconds"])  # of one
    assert figures["images_per_second"] == pytest.approx(16 / step["in_training"]["median_seconds"])
    assert figures["devices"] == 4 and figures["micro_batches"] == 2 and figures["config"]["method"]["name"] == "rslad+igdm"
    assert figures["memory"]["planned_total_bytes"] > 0 and figures["memory"]["peak_of_process_bytes"] > 0


def test_operations_are_those_of_the_whole_batch_and_utilisation_of_a_device(figures):
    counted, use = figures["operations"], figures["utilisation"]
    assert counted["agree"] and abs(counted["difference"]) < 1e-3
    assert counted["closed_form"]["flop"] == pytest.approx(sum(counted["closed_form"]["by_part_flop"].values()))
    assert counted["xla"]["matrix_flop"] + counted["xla"]["other_flop"] == pytest.approx(counted["xla"]["total_flop"])
    alone = operations.closed_form(recipe("rslad+igdm"), {
        name: shape for name, shape in measurement.scaling.batch_shapes(recipe("rslad+igdm"), (4,)).items()})
    assert counted["closed_form"]["flop"] == pytest.approx(16 * alone.total)
    # The parts are timed on one micro-batch of two.
    assert figures["parts"]["attack"]["closed_form_flop"] == pytest.approx(8 * alone.flop["attack"])
    seconds = figures["step"]["in_training"]["median_seconds"]
    assert use["flop_per_second_of_a_device"] == pytest.approx(counted["xla"]["matrix_flop"] / 4 / seconds)
    assert use["of_peak"] == pytest.approx(use["flop_per_second_of_a_device"] / 1e12)
    assert use["precisions"] == ["float32"] and figures["dtypes"] == dict.fromkeys(
        ("student", "attacked student", "teacher"), "float32")


@pytest.mark.parametrize("options, precisions", [({}, ["float32"]), ({"attack": {"dtype": "bfloat16"}}, [])])
def test_without_a_cpu_to_count_on_the_closed_form_counts(tiny_config, monkeypatch, capsys, options, precisions):
    """As on accelerators that are the only ones in JAX_PLATFORMS; what is computed in two ways has no one peak."""
    of = workload.open_workload(tiny_config(**options), parallel.data_mesh(jax.devices()[:1]), random_images=(8, 8, 1))

    def none(backend=None):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(counting.jax, "local_devices", none)
    found = measurement.measure(of, repeats=1, peak_flops=1e12, with_ceilings=False)
    monkeypatch.undo()
    counted, use = found["operations"], found["utilisation"]
    assert counted["xla"] is None and counted["agree"] is None and use["precisions"] == precisions
    if precisions:
        seconds = found["step"]["in_training"]["median_seconds"]
        assert use["of_peak"] == pytest.approx(counted["closed_form"]["flop"] / seconds / 1e12)
    tables.parts(found)
    assert "JAX_PLATFORMS leaves out the CPU" in capsys.readouterr().out


def test_an_impossible_peak_is_refused_before_anything_is_compiled(tiny_config, monkeypatch):
    of = workload.open_workload(tiny_config(), parallel.data_mesh(), random_images=(8, 8, 1))
    monkeypatch.setattr(workload.Workload, "compile", None)
    assert_input_error(lambda: measurement.measure(of, peak_flops=1e40), "--peak_flops=1e+40")


def test_ceilings_are_of_the_convolution_that_dominates():
    layers = operations.layers_of(recipe("pgd_at", "resnet18", image_shape=(32, 32, 3)).student)
    chosen = ceilings.dominating(layers)
    # Five convolutions of 64 channels at full size, the stem not among them.
    assert chosen.shape == (3, 3, 64, 64) and chosen.images == (1, 32, 32, 64)
    small = operations.layers_of(recipe("pgd_at").student)
    found = ceilings.ceilings(small, 2, precisions=("float32",), flop=1e6, seconds=0.0)
    assert [one.operation for one in found] == [
        "matrix product", "convolution", "its image gradient", "its kernel gradient"]
    assert all(one.flop_per_second > 0 for one in found) and found[1].size == "2 x 8x8, 4 to 4 channels, 3x3"
    assert ceilings.dominating([]) is None
    assert len(ceilings.ceilings([], 2, precisions=("float32",), flop=1e6, seconds=0.0)) == 1
