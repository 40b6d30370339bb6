"""Batches are split over the devices in their order, and states are copied to each."""

import os
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxrd.errors import InputError
from jaxrd.training import parallel


def test_a_batch_is_split_over_the_devices_in_order():
    mesh = parallel.data_mesh()
    assert mesh.axis_names == ("data",) and mesh.axis_types == (AxisType.Auto,)
    images = np.arange(8 * 4, dtype=np.float32).reshape(8, 2, 2, 1)
    placed = parallel.put_batch({"images": images, "labels": np.arange(8)}, mesh)
    assert [shard.device for shard in placed["images"].addressable_shards] == jax.devices()
    for part, shard in zip(np.split(images, 4), placed["images"].addressable_shards, strict=True):
        np.testing.assert_array_equal(shard.data, part)
    np.testing.assert_array_equal(placed["labels"], np.arange(8))


def test_what_is_replicated_is_whole_on_every_device():
    value = np.arange(6.0)
    placed = jax.device_put(value, parallel.replicated(parallel.data_mesh()))
    assert len(placed.addressable_shards) == 4
    assert all(np.array_equal(shard.data, value) for shard in placed.addressable_shards)


@pytest.mark.parametrize("batch_size, better", [(10, "such as 8 or 12"), (3, "such as 4"), (1, "such as 4")])
def test_a_batch_that_the_devices_cannot_share_is_refused_with_one_that_they_can(batch_size, better):
    mesh = parallel.data_mesh()
    with pytest.raises(InputError, match=f"training.batch_size is {batch_size}, .*4 devices.*{better}$"):
        parallel.check_batch_size("config.training.batch_size", batch_size, mesh)
    parallel.check_batch_size("config.training.batch_size", 12, mesh)


def test_the_compilation_cache_has_a_home_and_gives_way_to_the_users(monkeypatch, tmp_path):
    name = "jax_compilation_cache_dir"
    before = getattr(jax.config, name)
    try:
        parallel.enable_compilation_cache()
        assert getattr(jax.config, name) == before == os.environ["JAX_COMPILATION_CACHE_DIR"]
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        parallel.enable_compilation_cache()
        assert getattr(jax.config, name) == str(tmp_path / "jaxrd" / "xla")
    finally:
        jax.config.update(name, before)


def test_a_state_is_split_by_its_kernels_along_their_longest_axis():
    mesh = parallel.data_mesh()
    tree = {"kernel": np.zeros((3, 3, 8, 16)), "dense": np.zeros((12, 10)), "odd": np.zeros((3, 5)), "bias": np.zeros(16),
            "count": np.zeros(())}
    found = {name: sharding.spec for name, sharding in parallel.state_shardings(tree, mesh).items()}
    assert found == {
        "kernel": PartitionSpec(None, None, None, "data"), "dense": PartitionSpec("data"), "odd": PartitionSpec(),
        "bias": PartitionSpec(), "count": PartitionSpec()}
    placed = parallel.replicate(tree, mesh, parallel.state_shardings(tree, mesh))
    assert [shard.data.shape for shard in placed["kernel"].addressable_shards] == [(3, 3, 8, 4)] * 4
    one = parallel.data_mesh(jax.devices()[:1])
    assert all(sharding.spec == PartitionSpec() for sharding in parallel.state_shardings(tree, one).values())


def test_a_process_is_fed_at_full_speed_and_the_users_settings_stand(monkeypatch):
    calls, before = [], sys.getswitchinterval()

    class Library:
        @staticmethod
        def mallopt(*arguments):
            calls.append(arguments)

    monkeypatch.setattr(parallel.ctypes, "CDLL", lambda _: Library)
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    try:
        parallel.prepare_process()
        assert sys.getswitchinterval() == pytest.approx(1e-4)
        assert calls == [(-3, 32 << 20), (-1, 1 << 30)]
        monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
        parallel.prepare_process()
        monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
        monkeypatch.setattr(parallel.ctypes, "CDLL", lambda _: object())  # another C library than glibc
        parallel.prepare_process()
        assert len(calls) == 2
    finally:
        sys.setswitchinterval(before)
