"""The child process that times PyTorch: a line in, a line out, whatever goes wrong."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from launch.pytorch import comparison, jobs
from tests.support import assert_input_error

torch = pytest.importorskip("torch", reason="the PyTorch side of the benchmark needs torch, which jaxrd does not")

ROOT = pathlib.Path(__file__).parents[2]
JOB = jobs.Job("rslad+igdm", "resnet6_w4", "resnet6_w8", 3, (8, 8, 1), 4, attack_steps=1, variants=("eager", "bf16"),
               device="cpu", threads=1)


def answers(*lines):
    """What the child answers to these lines; it ends with its input."""
    done = subprocess.run(
        [sys.executable, "-m", "launch.pytorch.worker"], cwd=ROOT, input="".join(f"{line}\n" for line in lines), text=True,
        capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_line_is_answered_and_an_error_ends_nothing():
    job = json.dumps(dataclasses.asdict(JOB))
    facts, *rest = answers(job, "warm_up eager", "eager", "nonsense", "", "bf16", "channels_last", "eager 3")
    assert facts == {"torch": torch.__version__, "device": "cpu", "threads": 1}
    assert [list(answer) for answer in rest] == [
        ["seconds"], ["seconds"], ["error"], ["error"], ["seconds"], ["seconds"], ["seconds"]]
    assert all(answer["seconds"] > 0 for answer in rest if "seconds" in answer)
    assert 'variant "nonsense" is not known; known: eager' in rest[2]["error"]
    for answer in rest[2:4]:
        assert "\n" not in answer["error"]


def test_a_job_that_cannot_be_is_answered_too():
    assert list(answers("{}")[0]) == ["error"]
    if not torch.cuda.is_available():
        assert "no GPU" in answers(json.dumps(dataclasses.asdict(dataclasses.replace(JOB, device="cuda"))))[0]["error"]
        assert_input_error(
            comparison.TorchSteps(dataclasses.replace(JOB, device="cuda")).__enter__, "--compare=torch", "no GPU")


def test_a_variant_that_fails_leaves_the_others(tmp_path):
    job = dataclasses.replace(JOB, method="pgd_at", teacher=None, variants=("compile", "eager"))
    without_compiler = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    with comparison.TorchSteps(job, without_compiler) as steps:
        warm_up = steps.warm_up()
        assert list(warm_up) == ["compile", "eager"] and warm_up["eager"] > 0
        assert "compiler" in warm_up["compile"] and "\n" not in warm_up["compile"]
        assert steps.errors == {"compile": warm_up["compile"]} and steps.variants == ("eager",)
        seconds = comparison.compare(lambda times: None, steps, turns=2)
        assert [len(values) for values in seconds.values()] == [2, 2] and list(seconds) == ["jaxrd", "eager"]
        with pytest.raises(comparison.VariantError, match="compiler"):
            steps.step("compile")


def test_the_child_is_gone_when_the_parent_is_done_with_it():
    for failure in (None, ValueError("of the parent")):
        try:
            with comparison.TorchSteps(JOB) as steps:
                child = steps._child
                assert steps.step("eager") > 0
                if failure:
                    raise failure
        except ValueError as error:
            assert error is failure
        assert child.returncode is not None
        with pytest.raises(ProcessLookupError):
            os.kill(child.pid, 0)
        with pytest.raises(RuntimeError, match="with statement"):
            steps.step("eager")


def test_a_child_that_dies_is_one_line():
    with comparison.TorchSteps(JOB) as steps:
        steps._child.kill()
        assert_input_error(lambda: steps.step("eager"), "the PyTorch process has ended", "status -9")
