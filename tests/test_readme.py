"""What the README and the config files tell a user to type is typed here."""

import os
import pathlib
import re
import shlex
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from jaxrd import models
from jaxrd.config import unknown_field
from jaxrd.distillation import catalogue
from jaxrd.training.log import read_metrics

ROOT = pathlib.Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "configs").glob("*.py"))]


def commands(module):
    """Every `python -m launch.MODULE ...` of the documents, continuation lines joined."""
    text = "\n".join(path.read_text() for path in DOCUMENTS).replace("\\\n", " ")
    return sorted({match.group().split(" #")[0].strip() for match in re.finditer(rf"python -m launch\.{module} .*", text)
                   if "FILE" not in match.group()})


@pytest.mark.parametrize("command", commands("train"))
def test_every_training_command_is_a_valid_configuration(command):
    arguments = shlex.split(command)[3:]
    assert any(argument.startswith("--workdir=") for argument in arguments)
    done = subprocess.run([sys.executable, "-m", "launch.train", *arguments, "--print_config"], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0 and "training.batch_size = " in done.stdout, done.stderr


@pytest.mark.parametrize("module", ["evaluate", "benchmark", "weights", "prepare"])
def test_every_other_command_uses_flags_that_exist(module):
    known = subprocess.run([sys.executable, "-m", f"launch.{module}", "--help"], cwd=ROOT, text=True, capture_output=True)
    used = {word.split("=")[0] for command in commands(module) for word in shlex.split(command)[3:]}
    fields = {word.removeprefix("--config.") for word in used if word.startswith("--config.")}
    assert not list(filter(None, map(unknown_field, fields)))
    used = {word.partition(".")[0] for word in used}
    assert used and all(re.search(rf"^\s+{flag}\b|\[?{flag}", known.stdout, re.M) for flag in used), known.stdout


EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_the_notebook_example_runs(tiny_teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    code, = [example for example in EXAMPLES if "attacks.pgd(" in example]
    exec(compile(code.replace("runs/ard+igdm", str(tiny_teacher)), "README.md", "exec"), {})
    assert 0 <= float(capsys.readouterr().out) <= 1


def test_the_autoattack_example_runs(tiny_teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    code, = [example for example in EXAMPLES if "attacks.autoattack(" in example]
    names = {}
    exec(compile(code.replace("runs/ard+igdm", str(tiny_teacher)), "README.md", "exec"), names)
    result, nearest = names["result"], names["nearest"]
    assert list(result.per_attack_accuracy) == ["clean", "apgd-ce", "apgd-t"] and result.flags == []
    assert result.accuracy == result.rescored_accuracy < result.per_attack_accuracy["clean"]
    assert str(result.per_attack_accuracy) in capsys.readouterr().out
    assert (nearest.fooled == (-nearest.loss <= 0.2)).all()


def test_the_example_of_instruments_runs(tiny_teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    code, = [example for example in EXAMPLES if "alignment.in_batches" in example]
    for name in ("runs/teacher", "runs/ard+igdm"):
        assert name in code
        code = code.replace(name, str(tiny_teacher))
    exec(compile(code, "README.md", "exec"), {})
    assert [float(line) for line in capsys.readouterr().out.split()] == pytest.approx([1, 1], abs=1e-5)  # a network and itself


def test_a_method_of_ones_own_takes_a_few_lines_and_trains(tiny_config, tiny_teacher, tmp_path, monkeypatch):
    code, = [example for example in EXAMPLES if "d.register" in example]
    assert len([line for line in code.splitlines() if line.strip()]) < 15
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(catalogue, "BASES", dict(catalogue.BASES))
    # The cell as it stands, on data and a teacher that take seconds.
    before, call = code.split("loop.train(")
    assert call.startswith('Config.from_dict(digits.get_config("gentle+igdm"))')
    names = {}
    exec(compile(before, "README.md", "exec"), names)
    assert names["Config"].from_dict(names["digits"].get_config("gentle+igdm")).build_method().name == "gentle+igdm"
    config = tiny_config(method="gentle+igdm", teacher=str(tiny_teacher), training={"steps": 2})
    names["loop"].train(config, tmp_path / "run", devices=jax.devices()[:1])
    entry = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert entry["train/loss"] == pytest.approx(
        0.5 * entry["train/labels"] + 0.5 * entry["train/l1"] + 10 * 0.5 * entry["train/igdm"], rel=1e-4)


@pytest.mark.slow
def test_a_published_teacher_is_distilled_and_its_student_goes_back_to_torch(tmp_path, monkeypatch):
    """The section's commands in their order, on a stand-in of full size for the file that is to be downloaded."""
    torch = pytest.importorskip("torch", reason="parity with PyTorch needs torch, which jaxrd does not")
    from tests.models import torch_modules

    section = (ROOT / "README.md").read_text().split("## Teachers from elsewhere")[1].split("\n## ")[0]
    code, = re.findall(r"```python\n(import torch.*?)```", section, re.S)
    lines = [line for line in re.findall(r"```sh\n(.*?)```", section, re.S)[0].replace("\\\n", " ").splitlines() if line]
    torch.manual_seed(0)
    teacher = torch_modules.DMWideResNet(depth=28, width=10, classes=100)
    torch.save({"state_dict": torch.nn.DataParallel(teacher).state_dict()}, tmp_path / "Wang2023Better_WRN-28-10.pt")
    draw = np.random.default_rng(0)
    for name, count in (("train", 200), ("test", 100)):
        np.savez(tmp_path / f"{name}.npz", images=draw.integers(0, 256, (count, 32, 32, 3), np.uint8),
                 labels=np.arange(count) % 100)
    small = {
        "import": "--any_accuracy --examples=8",
        "train": "--config.training.steps=1 --config.training.batch_size=8 --config.attack.steps=1",
        "evaluate": "--attacks=clean --batch_size=20"}
    for line in lines:
        words = shlex.split(line, comments=True)
        words[0], words[3:] = sys.executable, [word.replace("configs/", f"{ROOT}/configs/") for word in words[3:]]
        more = next((options for name, options in small.items() if name in " ".join(words[2:4])), "")
        done = subprocess.run([*words, *more.split()], cwd=tmp_path, text=True, capture_output=True,
                              env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, (line, done.stdout, done.stderr)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "mobilenet_v2", types.SimpleNamespace(
        MobileNetV2=lambda num_classes: torch_modules.MobileNetV2(classes=num_classes)))
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    images = draw.uniform(size=(3, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        logits = names["student"](torch.tensor(images.transpose(0, 3, 1, 2).copy())).numpy()
    expected = models.logits_fn(*models.restore(tmp_path / "runs/cifar100/rslad+igdm"))(images)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def test_the_pictures_exist():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / path).is_file(), path
