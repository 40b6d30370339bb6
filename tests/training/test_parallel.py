"""Batches are split over the devices in their order, and states are copied to each."""

import os

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

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
