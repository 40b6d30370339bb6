"""What does not fit is refused in one line before it is run, and what a backend complains of becomes one."""

import types

import jax
import pytest

from jaxrd.performance import memory
from jaxrd.training import step
from tests.performance.support import ONE_DEVICE, recipe, shapes
from tests.support import assert_input_error

GPU = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", memory_stats=lambda: {
    "bytes_limit": 100 * 2**30, "peak_bytes_in_use": 7 * 2**30})
MUTE = types.SimpleNamespace(platform="tpu", device_kind="TPU v9", memory_stats=lambda: None)


def test_what_fits_passes_and_what_does_not_says_what_it_needs():
    memory.check_fits(100 * 2**30, GPU, "the step")
    assert_input_error(lambda: memory.check_fits(150 * 2**30, GPU, "the step"), "the step needs 150.0 GiB",
                       "NVIDIA H200 has 100.0", "batch_size", "accumulation", "gradient_checkpointing=true")
    memory.check_fits(None, GPU, "the step")
    memory.check_fits(2**60, MUTE, "the step")  # nobody knows


def test_fake_devices_share_the_memory_of_the_machine():
    cpu, available = jax.devices()[0], memory.host_memory()
    assert cpu.platform == "cpu" and memory.memory_of(cpu) == available > 2**28
    memory.check_fits(available // 2, cpu, "the step")
    assert_input_error(lambda: memory.check_fits(available // 2, cpu, "the step", devices=3), "3 CPU devices",
                       "this machine has")
    memory.check_fits(60 * 2**30, GPU, "the step", devices=3)  # each has its own


def test_a_control_group_may_have_less(tmp_path):
    machine = memory.host_memory(tmp_path)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job/step\n")
    group = tmp_path / "sys/fs/cgroup/job"
    (group / "step").mkdir(parents=True)
    (group / "step/memory.max").write_text("max\n")
    assert memory.host_memory(tmp_path) == machine
    (group / "memory.max").write_text("1000000\n")
    assert memory.host_memory(tmp_path) == 1_000_000
    older = tmp_path / "sys/fs/cgroup/memory"
    older.mkdir()
    (older / "memory.limit_in_bytes").write_text("500000\n")
    assert memory.host_memory(tmp_path) == 500_000


def test_the_most_that_was_in_use():
    assert memory.peak_in_use(GPU) == (7 * 2**30, "device") and memory.peak_in_use(MUTE) is None
    size, whose = memory.peak_in_use(jax.devices()[0])
    assert whose == "process" and 2**26 < size < memory.host_memory()


@pytest.mark.parametrize("message, size", [
    ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 3221225472 bytes.", "3.0 GiB"),
    ("RESOURCE_EXHAUSTED: Failed to allocate 12.5GiB", "12.5GiB"),
    ("INTERNAL: Out of Memory allocating things\nin lines", "of 100.0 GiB of NVIDIA H200")])
def test_a_backend_that_is_out_of_memory_says_so_in_one_line(message, size):
    def run():
        with memory.shortage_explained(GPU, "the step"):
            raise jax.errors.JaxRuntimeError(message)

    assert_input_error(run, "the step does not fit", size, "batch_size")


def test_other_complaints_keep_their_traceback():
    with pytest.raises(jax.errors.JaxRuntimeError), memory.shortage_explained(GPU, "the step"):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: wrong shapes")


def test_memory_does_not_grow_with_attack_steps():
    """Each step of an attack takes the place of the one before, though all of them are written out one after another."""
    def planned(steps):
        of = recipe("pgd_at", steps=steps)
        return memory.planned(step.make_train_step(of, ONE_DEVICE).lower(*shapes(of, 32)).compile())["temporary"]

    assert planned(8) < 1.1 * planned(2)
