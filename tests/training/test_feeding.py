"""The feeder: the batches of its source, in order, on any number of devices and processes, resident or not."""

import hashlib
import itertools
import json
import pathlib
import socket
import subprocess
import sys
import threading
import types

import jax
import numpy as np
import pytest

from jaxrd.data import from_arrays, mixture
from jaxrd.errors import InputError
from jaxrd.training import feeding, parallel
from jaxrd.training.feeding import Feeder


def source_of(n, classes=3, seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    return from_arrays(images, np.random.default_rng(seed + 1).permutation(np.arange(n) % classes), classes=classes)


def mesh_of(devices):
    return parallel.data_mesh(jax.devices()[:devices])


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("mixed", [False, True])
def test_batches_are_those_of_the_source(devices, resident, mixed):
    source = mixture(source_of(21), source_of(35, seed=5), 0.5) if mixed else source_of(30)
    with Feeder(source, mesh_of(devices), seed=7, batch_size=8, first=3, last=12, partners=True, negatives=True,
                resident=resident) as feeder:
        batches = list(feeder)
    assert len(batches) == 9 and feeder.resident == resident
    for step, batch in enumerate(batches, 3):
        for prefix, draw in (("", source.indices), ("partner", source.partners), ("negative", source.negatives)):
            images, labels = (f"{prefix}s", f"{prefix}_labels") if prefix else ("images", "labels")
            expected = source.batch(draw(7, step, 8))
            for name, value in ((images, expected["images"]), (labels, expected["labels"])):
                np.testing.assert_array_equal(batch[name], value)
                assert batch[name].dtype == value.dtype
                assert batch[name].sharding.is_equivalent_to(parallel.sharded(mesh_of(devices)), value.ndim)
                assert {shard.data.shape[0] for shard in batch[name].addressable_shards} == {8 // devices}


def test_without_partners_and_negatives_a_batch_has_neither():
    with Feeder(source_of(10), mesh_of(1), seed=0, batch_size=2, last=1) as feeder:
        (batch,) = feeder
    assert set(batch) == {"images", "labels"}


def test_a_feeder_without_a_last_batch_goes_on_and_ends_when_it_is_closed():
    source = source_of(10)
    with Feeder(source, mesh_of(1), seed=0, batch_size=4) as feeder:
        for step, batch in zip(range(20), feeder):
            np.testing.assert_array_equal(batch["labels"], source.labels[source.indices(0, step, 4)])
    assert not any(thread.name.startswith("jaxrd-feeder") for thread in threading.enumerate())


def test_nothing_is_left_after_the_last_batch():
    with Feeder(source_of(10), mesh_of(1), seed=0, batch_size=4, first=5, last=5) as feeder:
        assert list(feeder) == []


def test_batches_are_made_ahead_of_the_step_that_asks_for_them():
    source, made = source_of(10), []
    ready = threading.Event()

    class Watched:
        shape, dtype, nbytes = source.images.shape, source.images.dtype, source.images.nbytes

        def __getitem__(self, positions):
            made.append(positions)
            if len(made) == feeding.AHEAD + 1:
                ready.set()
            return source.images[positions]

    watched = type(source)(Watched(), source.labels, source.classes, source.name)
    with Feeder(watched, mesh_of(1), seed=0, batch_size=4) as feeder:
        next(feeder)
        assert ready.wait(30)  # without another call
    assert len(made) == feeding.AHEAD + 1


def test_waiting_is_measured_and_nothing_else(monkeypatch):
    clock = itertools.count(step=10.0)  # each look takes ten seconds
    monkeypatch.setattr(feeding, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    with Feeder(source_of(10), mesh_of(1), seed=0, batch_size=4, last=3) as feeder:
        for count, _ in enumerate(feeder, 1):
            assert feeder.waited == 10.0 * count
        feeder.waited = 0.0
        assert list(feeder) == [] and feeder.waited == 0


def test_an_error_of_the_thread_reaches_the_loop():
    source = from_arrays(np.zeros((6, 4, 4, 3), np.uint8), np.zeros(6, int), name="mine")
    with Feeder(source, mesh_of(1), seed=0, batch_size=4, negatives=True) as feeder:
        with pytest.raises(InputError, match="two classes"):
            next(feeder)


def test_a_resident_batch_is_gathered_without_collectives():
    source, mesh = source_of(64), mesh_of(4)
    gather = feeding.ResidentGather(source, mesh)
    positions = parallel.put_batch({"positions": np.arange(16, dtype=np.int32)}, mesh)["positions"]
    text = gather.lowered(positions).compile().as_text()
    assert not [name for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if name in text]


def test_only_accelerators_keep_the_source_by_default():
    class Device:
        platform = "gpu"

        def __init__(self, limit):
            self.limit = limit

        def memory_stats(self):
            return self.limit and {"bytes_limit": self.limit}

    source = source_of(100)  # 4,800 bytes
    assert not feeding.fits_on(jax.devices()[0], source)
    assert feeding.fits_on(Device(48_000), source) and not feeding.fits_on(Device(47_999), source)
    assert not feeding.fits_on(Device(None), source)


_PROCESS = """
import hashlib, json, sys
import jax
process, processes, devices, port, resident = *map(int, sys.argv[1:5]), sys.argv[5] == "True"
jax.config.update("jax_num_cpu_devices", devices)
if processes > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
from jaxrd.training.feeding import Feeder
from jaxrd.training.parallel import data_mesh
from tests.training.test_feeding import Counted, source_of
source = Counted(source_of(40))
with Feeder(source.counting, data_mesh(), seed=3, batch_size=16, last=6, partners=True, negatives=True,
            resident=resident) as feeder:
    found = [{f"{name} {shard.index[0].start or 0}": hashlib.sha256(bytes(shard.data.__array__().data)).hexdigest()
              for name, value in batch.items() for shard in value.addressable_shards} for batch in feeder]
print(json.dumps({"batches": found, "rows": source.rows, "devices": jax.device_count(), "processes": jax.process_count()}))
"""


class Counted:
    """A source that counts the rows of images that are gathered from it."""

    def __init__(self, source):
        self.rows, images, counted = 0, source.images, self

        class Rows:
            shape, dtype, nbytes = images.shape, images.dtype, images.nbytes

            def __getitem__(self, positions):
                counted.rows += len(positions)
                return images[positions]

            def __array__(self, dtype=None, copy=None):
                return images

        self.counting = type(source)(Rows(), source.labels, source.classes, source.name)


def run_processes(processes, devices, resident):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, *map(str, (process, processes, devices, port, resident))],
            cwd=pathlib.Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for process in range(processes)]
    results = []
    for process in running:
        out, err = process.communicate(timeout=180)
        assert process.returncode == 0, err[-2000:]
        results.append(json.loads(out.splitlines()[-1]))
    return results


@pytest.mark.parametrize("resident", [False, True])
def test_one_two_and_four_processes_see_the_same_global_batches(resident):
    """Each row of every batch, by where it lies in the batch, with four devices shared by 1, 2 and 4 processes."""
    source, expected = source_of(40), []
    for step in range(6):
        batch = {}
        for prefix, draw in (("", source.indices), ("partner", source.partners), ("negative", source.negatives)):
            rows = source.batch(draw(3, step, 16))
            for name, value in ((f"{prefix}s" if prefix else "images", rows["images"]),
                                (f"{prefix}_labels" if prefix else "labels", rows["labels"])):
                for start in range(0, 16, 4):
                    batch[f"{name} {start}"] = hashlib.sha256(np.ascontiguousarray(value[start:start + 4]).data).hexdigest()
        expected.append(batch)
    for processes in (1, 2, 4):
        results = run_processes(processes, 4 // processes, resident)
        assert all((found["devices"], found["processes"]) == (4, processes) for found in results)
        together = [{} for _ in range(6)]
        for found in results:
            for step, batch in enumerate(found["batches"]):
                assert not set(batch) & set(together[step])  # each row on one process only
                together[step] |= batch
            if not resident:  # and gathered there only
                assert found["rows"] == 6 * 3 * 16 // processes
        assert together == expected
