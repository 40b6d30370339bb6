"""Everything but preparing a data set of TFDS's catalogue works where TensorFlow is not installed."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Runs a command line in a process that does not find TensorFlow, installed or not.
_WITHOUT = """
import importlib.machinery, runpy, sys

find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = lambda name, *rest: None if name.startswith("tensorflow") and not name.startswith(
    "tensorflow_") else find(name, *rest)
sys.argv = sys.argv[1:]
sys.path.insert(0, ".")
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""

SMALL = ("--config.student=resnet6_w4", "--config.attack.steps=1", "--config.training.steps=2",
         "--config.training.batch_size=16", "--config.data.validation_fraction=0.2")


def walk_through(run, tiny_arrays, directory):
    """Prepares, trains, distils, evaluates on own and on other data, exports; then asks for what does need TensorFlow."""
    data = f"--config.data.directory={directory / 'tfds'}"
    run("launch.prepare", f"--npz={tiny_arrays}", "--name=mine", f"--data_dir={directory / 'tfds'}")
    run("launch.train", "--config=configs/digits.py:teacher", "--config.data.name=mine", data, *SMALL,
        f"--workdir={directory / 'teacher'}")
    run("launch.train", "--config=configs/digits.py:rslad+igdm", "--config.data.name=mine", data, *SMALL,
        "--config.data.examples=100", f"--config.teacher={directory / 'teacher'}", f"--workdir={directory / 'student'}")
    said = run("launch.evaluate", f"--workdir={directory / 'student'}", "--attacks=clean,fgsm", "--curve=none")
    assert "clean" in said and "of 40 test images" in said
    said = run("launch.evaluate", f"--workdir={directory / 'student'}", "--data=mine", "--attacks=clean")
    assert "mine" in said
    run("launch.weights", "export", "--format=safetensors", f"--workdir={directory / 'student'}",
        f"--output={directory / 'student.safetensors'}")
    run("launch.train", "--config=configs/digits.py:teacher", data, *SMALL, f"--workdir={directory / 'digits'}")
    said = run("launch.prepare", "--dataset=cifar10", f"--data_dir={directory / 'tfds'}", fails=True)
    assert said.startswith("error: ") and "pip install" in said and "[prepare]" in said and said.count("\n") == 1
    assert not (directory / "tfds" / "cifar10").exists()


def command(python, *arguments, cwd=ROOT, fails=False):
    done = subprocess.run([python, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=900)
    assert (done.returncode == 1) if fails else (done.returncode == 0), done.stderr[-2000:]
    return done.stderr if fails else done.stdout


def test_in_a_process_that_cannot_import_it(tiny_arrays, tmp_path):
    def run(*arguments, **options):
        return command(sys.executable, "-c", _WITHOUT, *arguments, **options)

    walk_through(run, tiny_arrays, tmp_path)


@pytest.mark.slow
def test_in_an_environment_of_its_own(tiny_arrays, tmp_path):
    project = tmp_path / "project"  # pip leaves files where it builds
    shutil.copytree(ROOT / "jaxrd", project / "jaxrd")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    installed = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", project], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": ""}, timeout=900)
    if installed.returncode:
        pytest.skip(f"jaxrd could not be installed into a new environment: {installed.stderr[-300:]}")
    assert subprocess.run([python, "-c", "import tensorflow"], capture_output=True).returncode
    walk_through(lambda *arguments, **options: command(python, "-m", *arguments, **options), tiny_arrays, tmp_path)
