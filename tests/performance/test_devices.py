"""Published peaks by the names that JAX gives devices, and utilisation against them."""

import pytest

from jaxrd.performance import devices
from tests.support import assert_input_error


@pytest.mark.parametrize("kind, bfloat16", [
    ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A100 80GB PCIe", 312e12), ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12), ("NVIDIA H200", 989e12), ("NVIDIA L4", 121e12),
    ("NVIDIA L40S", 362e12), ("NVIDIA A10", 125e12), ("NVIDIA GeForce RTX 4090", 165e12), ("Tesla V100-SXM2-16GB", None),
    ("TPU v3", 61.5e12), ("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("TPU v5p", 459e12),
    ("TPU v6 lite", 918e12)])
def test_a_device_has_the_peak_of_its_own_name(kind, bfloat16):
    assert devices.published_peak(kind).bfloat16 == bfloat16


@pytest.mark.parametrize("kind", [
    "cpu", "NVIDIA L40", "NVIDIA A10G", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "TPU v9", ""])
def test_a_device_whose_name_only_begins_alike_has_none(kind):
    assert devices.published_peak(kind) is None and devices.peaks_of(kind) is None


def test_no_peak_is_above_that_of_a_lesser_precision():
    for peak in devices.PEAKS:
        known = [value for value in (peak.bfloat16, peak.tensorfloat32, peak.float32) if value]
        assert known == sorted(known, reverse=True) and known
        if peak.bfloat16 and peak.tensorfloat32:
            assert peak.bfloat16 / peak.tensorfloat32 == pytest.approx(2, rel=0.02)


def test_a_given_peak_counts_for_every_precision():
    assert devices.peaks_of("NVIDIA H200", 5e12) == dict.fromkeys(devices.PRECISIONS, 5e12)
    assert devices.peaks_of("Tesla V100-SXM2-16GB") == {"float32": 15.7e12}
    for given in (0.0, -1.0, 989.0, 1e30, float("nan"), float("inf")):
        assert_input_error(lambda given=given: devices.peaks_of("cpu", given), "--peak_flops", "989e12")


def test_the_least_time_adds_up_over_precisions():
    peaks = {"bfloat16": 1e12, "float32": 1e11}
    assert devices.least_seconds({"bfloat16": 1e12, "float32": 1e11}, peaks) == pytest.approx(2.0)
    assert devices.least_seconds({"tensorfloat32": 1.0}, peaks) is None
    assert devices.least_seconds({"bfloat16": 1e12, "tensorfloat32": 0.0}, peaks) == pytest.approx(1.0)
