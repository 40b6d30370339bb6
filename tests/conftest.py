"""Four fake CPU devices for every test, before JAX starts: what runs on one device must run the same on four.

And what the tests of training and evaluation share: a cache of compiled programs, a tiny data set, a tiny teacher's run.
"""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Processes that a test starts compile nothing that it has compiled itself. One cache per pytest process (pytest-xdist runs
# several): JAX writes its files in place, and a neighbour would read half of one.
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache = tempfile.mkdtemp(prefix="jaxrd-tests-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
atexit.register(shutil.rmtree, _cache, ignore_errors=True)

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 4)


@pytest.fixture(scope="module", autouse=True)
def release_compiled_programs():
    """Each holds memory mappings, of which a process may have 65,530: the whole suite's would be more."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compilation():
    """For modules of tiny programs, which take far longer to compile than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def exact_products():
    """Accelerators round float32 products to fewer bits by default."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def one_torch_thread():
    """Several of PyTorch's wait for each other longer than small networks take."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_arrays(tmp_path_factory):
    """"train.npz,test.npz": 200 and 40 of scikit-learn's digits, as `config.data.arrays` takes them."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images, labels = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., np.newaxis], digits.target
    directory = tmp_path_factory.mktemp("tiny")
    for name, rows in (("train", slice(200)), ("test", slice(200, 240))):
        np.savez(directory / f"{name}.npz", images=images[rows], labels=labels[rows])
    return f"{directory / 'train.npz'},{directory / 'test.npz'}"


@pytest.fixture(scope="session")
def tiny_config(tiny_arrays):
    """A function from overrides, such as training={"steps": 3}, to the configuration of a run that takes seconds."""
    from jaxrd.config import Config

    def build(**overrides):
        values = {
            "method": {"name": "pgd_at"}, "student": "resnet6_w4",
            "data": {"arrays": tiny_arrays, "validation_fraction": 0.2, "shift": 1},
            "threat": {"epsilon": 0.1}, "attack": {"steps": 2, "step_size": 0.05},
            "optimizer": {"learning_rate": 0.1, "nesterov": True, "schedule": "cosine"},
            "training": {"steps": 6, "batch_size": 16, "checkpoint_every": 2, "log_every": 1, "keep": 2},
        }
        for name, value in overrides.items():
            values[name] = {**values[name], **value} if isinstance(value, dict) else value
        return Config.from_dict(values)

    return build


@pytest.fixture(scope="session")
def tiny_teacher(tiny_config, tmp_path_factory):
    """The run directory of a teacher, 200 steps old, with a checkpoint of its 100th; read only."""
    from jaxrd.training import loop

    workdir = tmp_path_factory.mktemp("teacher") / "run"
    config = tiny_config(training={"steps": 200, "checkpoint_every": 100, "log_every": 100})
    loop.train(config, workdir, devices=jax.devices()[:1])
    return workdir
