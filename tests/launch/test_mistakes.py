"""A user's mistakes on the command lines: one line on stderr that names the field, the value and the way out."""

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.launch.commands import ROOT, check_one_line, environment, run_all

TINY = ("--config.student=resnet6_w4 --config.training.steps=6 --config.training.batch_size=16 --config.attack.steps=2 "
        "--config.training.checkpoint_every=1 --config.training.log_every=1")

PGD_AT = "--config=configs/digits.py:pgd_at"
# Command line -> what its one line must say. FILES stands for the directory of the fixture `files`.
EARLY = {
    "train": ["--config is missing", "--config=configs/"],
    "train --config.seed=3": ["--config is missing"],
    "train --config": ["--config is missing"],
    "train --config=": ["--config is missing"],
    f"train --config.seed=3 {PGD_AT}": ["--config.seed=3 stands before --config"],
    f"train {PGD_AT}": ["--workdir is missing", "--workdir=runs/a"],
    f"train {PGD_AT} --workdir": ["workdir"],
    f"train {PGD_AT} --wrkdir=runs/a": ["--wrkdir", "did you mean --workdir?"],
    f"train {PGD_AT} runs/a": ['"runs/a" is not a flag'],
    f"train {PGD_AT} --noprint_config=3": ["--noprint_config=3"],
    # Fields that do not exist.
    f"train {PGD_AT} --config.optimizer.lerning_rate=1": ["config.optimizer.lerning_rate", "config.optimizer.learning_rate?"],
    f"train {PGD_AT} --config.lr=1": ["config.lr", "config.optimizer.learning_rate?"],
    f"train {PGD_AT} --config.threat.epsilons=1": ["config.threat.epsilons", "config.threat.epsilon?"],
    f"train {PGD_AT} --config.optimiser.learning_rate=1": ["config.optimiser", "config.optimizer?"],
    f"train {PGD_AT} --config.epsilon=0.1": ["config.epsilon", "config.threat.epsilon?"],
    f"train {PGD_AT} --config.epsilon 0.1": ["config.epsilon", "config.threat.epsilon?"],
    f"train {PGD_AT} --config.steps=1": ["config.attack.steps or config.training.steps?"],
    f"train {PGD_AT} --config.student.name=1": ["config.student.name", "config.student?"],
    f"train {PGD_AT} --noconfig.data.flipp": ["config.data.flipp", "config.data.flip?"],
    f"train {PGD_AT} --config.xyz=1": ["config.xyz", "known: attack, bn_groups, data,"],
    f"train {PGD_AT} --config.=1": ["known: attack, bn_groups, data,"],
    # Values of the wrong type or out of range.
    f"train {PGD_AT} --config.training.steps=abc": ["config.training.steps is 'abc'", "whole number or None"],
    f"train {PGD_AT} --config.seed=1.5": ["config.seed is 1.5", "whole number"],
    f"train {PGD_AT} --config.seed -1": ["config.seed is -1", "[0, 2**32)"],
    f"train {PGD_AT} --config.seed": ["config.seed"],
    f"train {PGD_AT} --config.data.flip=maybe": ["config.data.flip is 'maybe'", "true or false"],
    f"train {PGD_AT} --config.threat.epsilon=abc": ["config.threat.epsilon is 'abc'", '"8/255"'],
    f"train {PGD_AT} --config.threat.epsilon=8/0": ["config.threat.epsilon is '8/0'"],
    f"train {PGD_AT} --config.threat.epsilon=0": ["config.threat.epsilon is 0.0", "above 0"],
    f"train {PGD_AT} --config.threat.epsilon=-0.1": ["config.threat.epsilon is -0.1", "above 0"],
    f"train {PGD_AT} --config.threat.epsilon=8": ["config.threat.epsilon is 8.0", "8/255 instead of 8"],
    f"train {PGD_AT} --config.threat=5": ["config.threat is a section", "config.threat.epsilon"],
    f"train {PGD_AT} --config.threat.norm=l7": ['config.threat.norm is "l7"', '"linf" or "l2"'],
    f"train {PGD_AT} --config.attack.step_size=0.5": ["config.attack.step_size is 0.5", "2 epsilon = 0.4"],
    f"train {PGD_AT} --config.optimizer.milestones=a,b": ["config.optimizer.milestones is 'a,b'", "0.5,0.75"],
    f"train {PGD_AT} --config.student=resnt18": ["config.student", 'did you mean "resnet18"?'],
    f"train {PGD_AT} --config.method=ardd": ['config.method.name is "ardd"', 'did you mean "ard"?'],
    f"train {PGD_AT} --config.method=ard+igmd": ['config.method.name is "ard+igmd"', '"+igdm"'],
    f"train {PGD_AT} --config.method=ard": ["config.teacher is empty", "--config.teacher=runs/teacher"],
    # Config files.
    "train --config=configs/digits.py:ardd": ['"ardd"', 'did you mean "ard"?', "known: pgd_at, trades",
                                                 "besides methods: teacher"],
    "train --config=configs/digits.py:teachr": ['"teachr"', 'did you mean "teacher"?'],
    "train --config=configs/digits.py:teacher+igdm": ['"teacher+igdm"'],
    "train --config=configs/digits.py:ard,seed": ['"seed" is not field=value', "seed=3"],
    "train --config=configs/digits.py:ard,optimiser.momentum=0": ["config.optimiser", "config.optimizer?"],
    "train --config=configs/digits.py:ard,threat=3": ["config.threat is a section"],
    "train --config=configs/digitz.py:ard": ["configs/digitz.py:ard: no such file", "did you mean configs/digits.py?"],
    "train --config=digits.py": ["no such file", "did you mean configs/digits.py?"],
    "train --config=configs": ["--config=configs: no such file"],
    "train --config=FILES/syntax.py": ["syntax.py, line 2", "never closed"],
    "train --config=FILES/no_function.py": ["no_function.py", "get_config"],
    "train --config=FILES/no_argument.py:ard": ["no_argument.py", "get_config"],
    "train --config=FILES/nothing.py": ["nothing.py", "return a ConfigDict"],
    "train --config=FILES/undefined.py": ["undefined.py, line 2: NameError", "undefined_name"],
    "train --config=FILES/import.py": ["import.py, line 1: ModuleNotFoundError", "no_such_module"],
    "train --config=FILES/open.py": ["open.py, line 2: FileNotFoundError"],
    "train --config=FILES/misspelt.py": ["misspelt.py, line 4", 'Did you mean "epsilon"'],
    # Other commands.
    "benchmark --config.threat.epsilom=0.1": ["config.threat.epsilom", "config.threat.epsilon?"],
    "evaluate": ["--workdir is missing"],
    "evaluate --workdir=FILES/nope": ["FILES/nope: no such run directory"],
    "evaluate --workdir=FILES,FILES/nope": ["FILES/nope: no such run directory"],
    "evaluate --workdir=FILES/sweep": ["FILES/sweep is no run directory but holds 2", "--workdir=FILES/sweep/a-seed0"],
    "evaluate --workdir=FILES --report=FILES": ["--report=FILES is a directory"],
    "evaluate --workdir=FILES --seed=a": ["--seed=a", "whole number"],
    "evaluate --workdir=FILES --batch_size=0": ["--batch_size=0"],
    "evaluate --workdir=FILES --atacks=clean": ["--atacks", "did you mean --attacks?"],
    "evaluate --workdir=FILES --config=configs/digits.py": ["--config", "known: --attacks"],
}
CONFIG_FILES = {
    "syntax": "def get_config():\n    return (\n",
    "no_function": "x = 1\n",
    "no_argument": "def get_config():\n    return {}\n",
    "nothing": "def get_config():\n    pass\n",
    "undefined": "def get_config():\n    return undefined_name\n",
    "import": "import no_such_module\n",
    "open": "def get_config():\n    return open('/no/such/file')\n",
    "misspelt": "from configs import digits\ndef get_config():\n    config = digits.get_config('pgd_at')\n"
                "    config.threat.epsilonn = 0.1\n    return config\n",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("files")
    for name, text in CONFIG_FILES.items():
        (directory / f"{name}.py").write_text(text)
    for name in ("a-seed0", "b-seed0"):
        (directory / "sweep" / name).mkdir(parents=True)
        (directory / "sweep" / name / "config.json").write_text("{}")
    return str(directory)


@pytest.fixture(scope="module")
def early(files):
    lines = {line: line.replace("FILES", files) for line in EARLY}
    results = run_all(list(lines.values()))
    return {line: results[filled] for line, filled in lines.items()}


@pytest.mark.parametrize("line", EARLY)
def test_a_mistake_is_one_line_before_anything_heavy_is_imported(early, files, line):
    check_one_line(early[line], *(word.replace("FILES", files) for word in EARLY[line]))
    assert not early[line][3]


def test_good_command_lines():
    expected = {
        "--config.threat.epsilon=8/255 --config.attack.step_size=2/255": ["threat.epsilon = 0.03137254901960784"],
        "--config.threat.epsilon=0.2": ["threat.epsilon = 0.2 "],
        "--config.threat.epsilon 0.1": ["threat.epsilon = 0.1 "],
        "--config.method=rslad+igdm --config.teacher=x": ["method.name = 'rslad+igdm'"],
        "--config.method rslad --config.teacher=x": ["method.name = 'rslad'"],
        "--config.method.igdm=0": ["method.igdm = 0.0"],
        "--config.data.examples=None": ["data.examples = None"],
        "--config.data.flip": ["data.flip = True"],
        "--noconfig.optimizer.nesterov": ["optimizer.nesterov = False"],
        "--config.optimizer.milestones=0.4,0.8": ["optimizer.milestones = (0.4, 0.8)"],
        "--config.optimizer.milestones=(0.4,0.8)": ["optimizer.milestones = (0.4, 0.8)"],
    }
    lines = {f"train {PGD_AT} {arguments} --print_config": words for arguments, words in expected.items()}
    argument = "rslad+igdm,seed=3,student=resnet6_w4,threat.epsilon=8/255,attack.step_size=2/255,method.igdm=3"
    lines[f"train --config configs/digits.py:{argument} --print_config"] = [
        "method.name = 'rslad+igdm'", "seed = 3", "student = 'resnet6_w4'", "threat.epsilon = 0.031", "method.igdm = 3.0"]
    lines["train --config=configs/digits.py:method=rslad --print_config"] = ["method.name = 'rslad'"]
    for line, (status, out, error, _) in run_all(list(lines)).items():
        assert (status, error) == (0, ""), line
        for word in lines[line]:
            assert word in out, line


def test_print_config_says_what_every_field_means():
    from jaxrd import config as configs

    (_, out, _, _), = run_all([f"train {PGD_AT} --print_config"]).values()
    for path in configs._all_paths():
        if configs.unknown_field(path) is None and path != "method":
            (line,) = [line for line in out.splitlines() if line.startswith(f"{path} = ")]
            assert len(line.split("# ")[1]) > 5


def test_help_shows_the_flags_and_an_example():
    for line, (status, out, error, _) in run_all([f"{name} --help" for name in ("train", "evaluate", "benchmark")]).items():
        assert (status, error) == (0, ""), line
        assert "python -m launch." in out
        assert ("--workdir" if "benchmark" not in line else "--repeats") in out
        assert "evaluate" in line or "--config.threat.epsilon=8/255" in out


def test_a_bug_keeps_its_traceback():
    done = subprocess.run([sys.executable, "-c", "from launch import command; command.run(lambda: 1 / 0)"], cwd=ROOT,
                          env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr


# Mistakes that show once data, teacher or run directory are opened. One process runs them all.

def _damaged(run, directory, damage):
    shutil.copytree(run, directory)
    for step in (directory / "checkpoints").iterdir():  # all: a run passes over a damaged one, where an earlier one is not
        damage(step)
    return directory


def _truncate_arrays(step):
    for path in (step / "state").glob("**/d/*"):
        os.truncate(path, 100)


@pytest.fixture(scope="module")
def late(tiny_teacher, tiny_arrays, tmp_path_factory):
    """{name: result} of command lines whose mistake lies in files."""
    base = tmp_path_factory.mktemp("late")
    images, labels = (np.load(tiny_arrays.split(",")[0])[name] for name in ("images", "labels"))
    bad = {
        "normalised": ((images / 255. - 0.5) / 0.3, labels), "bytes": (images * 1.0, labels), "negative": (images, labels - 1),
        "float_labels": (images, labels * 1.0), "few_classes": (images, labels % 5), "small": (images[:, :7, :7], labels)}
    for name, (x, y) in bad.items():
        np.savez(base / f"{name}.npz", images=x, labels=y)
    np.savez(base / "keys.npz", x=images, y=labels)
    (base / "file").touch()
    (base / "empty").mkdir()
    config = (f"import json, ml_collections\ndef get_config(argument=''):\n"
              f"    with open({str(tiny_teacher / 'config.json')!r}) as file:\n"
              "        return ml_collections.ConfigDict(json.load(file))\n")
    (base / "same.py").write_text(config)
    _damaged(tiny_teacher, base / "arrays", _truncate_arrays)
    _damaged(tiny_teacher, base / "manifest", lambda step: (step / "state" / "manifest.ocdbt").unlink())
    _damaged(tiny_teacher, base / "metadata", lambda step: (step / "_CHECKPOINT_METADATA").write_text(""))
    _damaged(tiny_teacher, base / "tree", lambda step: (step / "state" / "_METADATA").unlink())
    _damaged(tiny_teacher, base / "config", lambda step: (step.parents[1] / "config.json").write_text('{"seed": '))

    tiny = f"{TINY} --config.data.examples=None"
    pgd_at, ard = (f"train --config=configs/digits.py:{name} {tiny} --config.data.arrays={tiny_arrays}"
                   for name in ("pgd_at", "ard"))
    lines = {
        "data_name": f"train {PGD_AT} {tiny} --workdir={base}/w --config.data.name=cifar11 --config.data.directory={base}",
        "one_file": f"{pgd_at} --workdir={base}/w --config.data.arrays={base}/keys.npz",
        "examples": f"{pgd_at} --workdir={base}/w --config.data.examples=5000",
        **{name: f"{pgd_at} --workdir={base}/w --config.data.arrays={base}/{name}.npz,{tiny_arrays.split(',')[1]}"
           for name in ("missing", "keys", "normalised", "bytes", "negative", "float_labels")},
        "workdir_file": f"{pgd_at} --workdir={base}/file",
        "workdir_below_file": f"{pgd_at} --workdir={base}/file/run",
        "workdir_unwritable": f"{pgd_at} --workdir=/proc/run",
        "workdir_other": f"train --config={base}/same.py --workdir={tiny_teacher} --config.threat.epsilon=0.25",
        "workdir_damaged": f"train --config={base}/same.py --workdir={base}/config",
        **{f"resume_{name}": f"train --config={base}/same.py --workdir={base}/{name}"
           for name in ("arrays", "manifest", "tree")},
        **{f"teacher_{name}": f"{ard} --workdir={base}/w --config.teacher={base}/{name}"
           for name in ("nope", "empty", "file", "arrays", "manifest", "metadata", "tree")},
        "teacher_classes": f"{ard} --workdir={base}/w --config.teacher={tiny_teacher} "
                           f"--config.data.arrays={base}/few_classes.npz,{base}/few_classes.npz",
        "teacher_shape": f"{ard} --workdir={base}/w --config.teacher={tiny_teacher} "
                         f"--config.data.arrays={base}/small.npz,{base}/small.npz",
        "attack": f"evaluate --workdir={tiny_teacher} --attacks=pdg20",
        "split": f"evaluate --workdir={tiny_teacher} --split=train",
        "step": f"evaluate --workdir={tiny_teacher} --step=7",
        "evaluate_damaged": f"evaluate --workdir={base}/arrays --attacks=clean",
        "evaluate_empty": f"evaluate --workdir={base}/empty --attacks=clean",
    }
    results = run_all(list(lines.values()), heavy=True)
    return {"base": base, **{name: results[line] for name, line in lines.items()}}


LATE = {
    "data_name": ["config.data", "'cifar11'", "--config.data.arrays=train.npz,test.npz"],
    "one_file": ["config.data", "arrays=", "two files"],
    "examples": ["config.data", "examples=5000"],
    "missing": ["missing.npz", "no such file"],
    "keys": ["keys.npz", "['x', 'y']", "np.savez"],
    "normalised": ["normalised.npz", "outside [0, 1]", "look normalised"],
    "bytes": ["bytes.npz", "outside [0, 1]", "divide by 255"],
    "negative": ["negative.npz", "-1"],
    "float_labels": ["float_labels.npz", "float64", "astype"],
    "workdir_file": ["/file is a file", "another --workdir"],
    "workdir_below_file": ["/file is a file", "another --workdir"],
    "workdir_unwritable": ["--workdir=/proc/run", "another --workdir"],
    "workdir_other": ["config.threat.epsilon = 0.1, not 0.25", "another --workdir"],
    "workdir_damaged": ["config.json is damaged", "another --workdir"],
    "resume_arrays": ["checkpoints/", "damaged", "delete its directory"],
    "resume_manifest": ["checkpoints/", "damaged", "delete its directory"],
    "resume_tree": ["checkpoints/", "damaged", "delete its directory"],
    "teacher_nope": ["config.teacher", "/nope: no such run directory"],
    "teacher_empty": ["config.teacher", "/empty: no finished checkpoint"],
    "teacher_file": ["config.teacher", "/file is a file, not a run directory", "launch.weights import --source="],
    "teacher_arrays": ["config.teacher", "arrays/checkpoints/", "damaged"],
    "teacher_manifest": ["config.teacher", "manifest/checkpoints/", "damaged"],
    "teacher_metadata": ["config.teacher", "metadata/checkpoints/", "damaged"],
    "teacher_tree": ["config.teacher", "tree/checkpoints/", "damaged"],
    "teacher_classes": ["config.teacher", "10 classes", "5"],
    "teacher_shape": ["config.teacher", "(8, 8, 1)", "(7, 7, 1)"],
    "attack": ['"pdg20"', "pgd20"],
    "split": ['"train"', '"test" or "validation"'],
    "step": ["no checkpoint of step 7", "there are "],
    "evaluate_damaged": ["arrays/checkpoints/", "damaged"],
    "evaluate_empty": ["/empty: no finished checkpoint"],
}


@pytest.mark.parametrize("name", LATE)
def test_a_mistake_in_files_is_one_line(late, name):
    check_one_line(late[name], *LATE[name])


def test_mistakes_leave_no_run_directory(late):
    assert not (late["base"] / "w").exists()


def command(*arguments):
    return [sys.executable, "-m", "launch.train", "--config=configs/digits.py:pgd_at", *TINY.split(),
            "--config.data.examples=None", *arguments]


def test_a_batch_that_the_devices_cannot_share(tmp_path):
    done = subprocess.run(command(f"--workdir={tmp_path}/run", "--config.training.batch_size=18"), cwd=ROOT,
                          env=environment(JAX_NUM_CPU_DEVICES="4"), capture_output=True, text=True)
    check_one_line((done.returncode, "", done.stderr), "config.training.batch_size is 18", "4 devices", "16 or 20")


def test_a_diverging_run_stops_in_one_line_and_keeps_what_it_saved(tmp_path, tiny_arrays):
    from jaxrd import models

    done = subprocess.run(command(f"--workdir={tmp_path}", f"--config.data.arrays={tiny_arrays}",
                                  "--config.training.steps=60", "--config.optimizer.learning_rate=1e4"),
                          cwd=ROOT, env=environment(), capture_output=True, text=True)
    check_one_line((done.returncode, "", done.stderr), " is saved; lower", "config.optimizer.learning_rate (now 10000.0)")
    assert "nothing" not in done.stderr
    _, variables = models.restore(tmp_path)
    assert all(np.all(np.isfinite(leaf)) for leaf in variables["params"]["conv1"].values())


def test_interrupting_a_run_is_one_line(tmp_path, tiny_arrays):
    process = subprocess.Popen(
        command(f"--workdir={tmp_path}", f"--config.data.arrays={tiny_arrays}", "--config.training.steps=60000"), cwd=ROOT,
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "validation:" in line:
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.count("\n") == 1 and "Traceback" not in error
