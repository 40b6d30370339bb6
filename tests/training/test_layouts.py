"""One run is the same on 1 device, on 4, and in 2 processes of 2 devices each; so is one that changes between them on the way.

All runs in two processes are made by the same two, one after the other: see `as_a_process`.
"""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

import jax
import pytest

from jaxrd.config import Config
from jaxrd.evaluation.evaluate import evaluate
from jaxrd.training import loop
from jaxrd.training.log import Log, read_metrics

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
METHODS = ["rslad+igdm", "adaad", "dgad"]
STEPS, HALF = 10, 5
OPTIONS = {
    "swa": {"training": {"steps": 6, "swa_start": 0.5, "swa_every": 1}},
    "shard_state": {"training": {"steps": 6, "shard_state": True, "weight_average": 0.9}},
    "accumulation": {"training": {"steps": 6, "accumulation": 2}, "bn_groups": 4},
}

_PROCESS = """
import sys
from jaxrd.training import parallel, startup
process, port, jobs = sys.argv[1:]
startup.initialize(f"127.0.0.1:{port}", 2, int(process), local_devices=2)
parallel.enable_compilation_cache()
from tests.training import test_layouts
test_layouts.as_a_process(jobs)
startup.finish()
startup.leave(0)
"""


def as_a_process(jobs):
    """What each of the two does: [[run directory, step to stop after or None, whether to evaluate it], ...]"""
    for directory, stop_after, evaluated in json.loads(pathlib.Path(jobs).read_text()):
        workdir = pathlib.Path(directory)
        config = Config.from_dict(json.loads((workdir / "job.json").read_text()))
        run(config, workdir, None, stop_after)
        if evaluated:
            evaluate(workdir, "clean,pgd20", curve="none", say=lambda line: None)


def run(config, workdir, devices, stop_after=None):
    """Trains; stops by a signal after a step, where one is given."""
    with pytest.MonkeyPatch.context() as patch:
        if stop_after is None:
            loop.train(config, workdir, devices=devices)
            return
        advance = Log.advance

        def stopping(log, step):
            advance(log, step)
            if step == stop_after and jax.process_index() == jax.process_count() - 1:
                signal.raise_signal(signal.SIGTERM)

        patch.setattr(Log, "advance", stopping)
        with pytest.raises(SystemExit):
            loop.train(config, workdir, devices=devices)


@pytest.fixture(scope="module")
def ran(tiny_config, tiny_teacher, tmp_path_factory):
    """The directory of all runs: {name}-1, -4 (devices of one process) and -2x2 (two processes)."""
    directory, jobs = tmp_path_factory.mktemp("layouts"), []

    def prepared(name, layout, config):
        workdir = directory / f"{name}-{layout}"
        workdir.mkdir()
        (workdir / "job.json").write_text(json.dumps(config.to_dict()))
        return workdir

    configs = {method: tiny_config(method={"name": method}, teacher=str(tiny_teacher),
                                   training={"steps": STEPS, "checkpoint_every": HALF, "keep": 3}) for method in METHODS}
    configs |= {name: tiny_config(**options) for name, options in OPTIONS.items()}
    for name, config in configs.items():
        run(config, prepared(name, "1", config), jax.devices()[:1])
        if name in METHODS:
            run(config, prepared(name, "4", config), jax.devices())
        jobs.append((prepared(name, "2x2", config), None, name in OPTIONS))
    config = configs[METHODS[0]]
    jobs.append((prepared("changing", "2x2-4", config), HALF + 1, False))
    jobs.append((prepared("changing", "1-2x2", config), None, False))
    run(config, directory / "changing-1-2x2", jax.devices()[:1], HALF + 1)
    in_two_processes(jobs, directory)
    run(config, directory / "changing-2x2-4", jax.devices())
    return directory


def in_two_processes(jobs, directory):
    (directory / "jobs.json").write_text(json.dumps([[str(workdir), *rest] for workdir, *rest in jobs]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = [subprocess.Popen([sys.executable, "-c", _PROCESS, str(process), str(port), str(directory / "jobs.json")],
                                cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True) for process in range(2)]
    try:
        told = [process.communicate(timeout=400)[0] for process in running]
        assert [process.returncode for process in running] == [0, 0], "\n".join(text[-3000:] for text in told)
    finally:
        for process in running:
            process.kill()


def logged(workdir):
    """{step: the numbers of that step that are no timings}"""
    steps = {}
    for entry in read_metrics(workdir / "metrics.jsonl"):
        numbers = {name: value for name, value in entry.items() if name.startswith(("train/", "validation/"))}
        assert not numbers.keys() & steps.get(entry["step"], {}).keys()  # each once
        steps.setdefault(entry["step"], {}).update(numbers)
    return steps


def check_same(found, expected):
    seen = json.loads((found / "environment.json").read_text())
    assert seen["processes"] == (2 if found.name.endswith("2x2") else 1)  # of its last part
    found, expected = logged(found), logged(expected)
    assert list(found) == list(expected)
    for step, numbers in expected.items():
        assert found[step].keys() == numbers.keys()
        for name, value in numbers.items():
            # Accuracies are counts, but those of adversarial images may hang on the last bit of one.
            assert found[step][name] == pytest.approx(value, rel=1e-4, abs=1e-5), (step, name)
        assert found[step]["train/loss"] == pytest.approx(numbers["train/loss"], abs=1e-5), step


@pytest.mark.parametrize("method", METHODS)
def test_one_run_is_the_same_on_every_layout(ran, method):
    numbers = logged(ran / f"{method}-1")
    losses = [numbers[step]["train/loss"] for step in range(1, STEPS + 1)]
    assert max(losses) - min(losses) > 0.05 * max(losses)  # it trains: what differed would show
    assert "validation/pgd_accuracy" in numbers[HALF] and "validation/gradient_cosine" in numbers[STEPS]
    for layout in ("4", "2x2"):
        check_same(ran / f"{method}-{layout}", ran / f"{method}-1")


@pytest.mark.parametrize("layouts", ["2x2-4", "1-2x2"])
def test_a_run_that_goes_on_in_another_layout_is_the_uninterrupted_one(ran, layouts):
    check_same(ran / f"changing-{layouts}", ran / f"{METHODS[0]}-1")


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_training_are_the_same_in_two_processes(ran, name, tmp_path):
    check_same(ran / f"{name}-2x2", ran / f"{name}-1")
    shutil.copytree(ran / f"{name}-2x2", tmp_path / "run", ignore=shutil.ignore_patterns("evaluation*", "report.html"))
    alone = evaluate(tmp_path / "run", "clean,pgd20", curve="none", devices=jax.devices()[:1], say=lambda line: None)
    together = json.loads((ran / f"{name}-2x2" / "evaluation.json").read_text())
    assert together["accuracy"] == alone["accuracy"]
