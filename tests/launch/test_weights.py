"""`python -m launch.weights`: teachers in, students out, and one line for every file that is something else."""

import io
import json
import pickle
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest

from jaxrd.models import weights
from jaxrd.models.weights import layouts, torch_file
from tests.launch.commands import ROOT, check_one_line, run_all

IMPORT = "weights import --workdir=FILES/run --source=FILES/"


class Marker:
    """Its pickle creates a file when it is loaded by an unpickler that trusts it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    place = tmp_path_factory.mktemp("weights")
    draw = np.random.default_rng(0)
    state = {entry.key: draw.uniform(0.5, 1.5, entry.torch_shape).astype(np.float32)
             for entry in layouts.entries("wrn10_1", 10)}
    torch_file.write(str(place / "good.pt"), state)
    good = (place / "good.pt").read_bytes()
    (place / "cut.pt").write_bytes(good[:len(good) // 2])
    (place / "page.pt").write_text("<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title></html>")
    (place / "empty.pt").touch()
    (place / "notes.txt").write_text("epoch 1: 0.3\n")
    with tarfile.open(place / "renamed.pt", "w") as archive:
        archive.add(place / "notes.txt", "notes.txt")
    (place / "bare.pt").write_bytes(pickle.dumps(Marker(place / "executed")))
    with zipfile.ZipFile(place / "code.pt", "w") as archive:
        content = {"state_dict": state, "epoch": Marker(place / "executed")}
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
        archive.writestr("archive/version", "3\n")
    content = np.empty(2, object)
    content[:] = [{"x": Marker(place / "executed")}, {}]
    np.save(place / "code.npy", content, allow_pickle=True)
    np.savez(place / "data.npz", images=np.zeros((4, 8, 8, 1), np.uint8), labels=np.arange(4))
    (place / "taken").mkdir()
    (place / "taken" / "mine").touch()
    return place


# Command line -> what its one line must say.
MISTAKES = {
    "weights": ["what to do is missing", "import, export or zoo"],
    "weights imprt": ['"imprt"', 'did you mean "import"?'],
    "weights import": ["--source is missing", "--workdir"],
    "weights --workdir zoo import": ["--source is missing"],
    "weights import x.pt": ['"x.pt" is not a flag'],
    "weights export --workdir=FILES/none --format=torch --output=FILES/x --step=\u00b2": ["none", "no such run directory"],
    "weights import --source=x.pt": ["--workdir is missing"],
    "weights export --workdir=runs/a --format=torch": ["--output is missing"],
    "weights export --workdir=FILES/none --format=torch --output=FILES/x": ["none", "no such run directory"],
    "weights export --workdir=FILES/none --format=onnx --output=FILES/x": ['format is "onnx"', "stablehlo"],
    "weights export --workdir=FILES/none --format=torch --output=FILES/good.pt": ["good.pt exists already"],
    "weights import --modl=resnet18": ["--modl", "did you mean --model?"],
    IMPORT + "none.pt --model=wrn10_1": ["none.pt", "no such file"],
    IMPORT + "good.pt": ["good.pt", "architecture is missing", "--model"],
    IMPORT + "good.pt --model=wrn34_10": ["holds the weights of wrn10_1 with 10 classes", "--model=wrn10_1"],
    IMPORT + "good.pt --model=wrn10_1 --classes=100": ["fc.bias is of 10 classes, not of 100"],
    IMPORT + "good.pt --model=wrn10_1 --classes=1": ["classes"],
    IMPORT + "good.pt --model=Wang2023Beter_WRN-28-10": ['"Wang2023Beter_WRN-28-10"', "did you mean"],
    IMPORT + "good.pt --model=Wang2023Better_WRN-28-10": ["cifar10 and cifar100", "cifar100/Linf/Wang2023Better_WRN-28-10"],
    IMPORT + "good.pt --model=wrn10_1 --format=safetensors": ["good.pt is a PyTorch file", "--format=robustbench"],
    IMPORT + "good.pt --model=wrn10_1 --image_shape=32,32": ["(32, 32)", "(height, width, channels)"],
    IMPORT + "good.pt --model=wrn10_1 --image_shape=32,x,3": ["--image_shape=32,x,3", "numbers"],
    IMPORT + "good.pt --model=wrn10_1 --image_shape=32,32,1": ["3 channels, not 1"],
    IMPORT + "good.pt --model=wrn10_1 --normalization=0.5,0.5,0.5": ["3 numbers", "as many means as stds"],
    IMPORT + "good.pt --model=wrn10_1 --normalization=cifar": ['"cifar"', 'did you mean "cifar10"?'],
    IMPORT + "good.pt --model=wrn10_1 --data=FILES/data.npz,FILES/none.npz": ["none.npz", "no such file"],
    IMPORT + "good.pt --model=wrn10_1 --data=FILES/data.npz,FILES/data.npz": ["10 classes, not of 4"],
    IMPORT + "good.pt --model=wrn10_1 --epsilon=8/255": ["give both", "linf and 8/255"],
    IMPORT + "good.pt --model=wrn10_1 --norm=l1 --epsilon=8/255": ['"l1"', "linf"],
    IMPORT + "good.pt --model=wrn10_1 --norm=linf --epsilon=8/0": ["epsilon", "8/0"],
    IMPORT + "good.pt --model=wrn10_1 --entry=ema": ['"ema"', "the file itself"],
    "weights import --workdir=FILES/taken --source=FILES/good.pt --model=wrn10_1": ["taken exists already"],
    "weights import --workdir=FILES/good.pt/run --source=FILES/good.pt --model=wrn10_1": ["cannot be written"],
    IMPORT + "cut.pt --model=wrn10_1": ["cut.pt", "truncated"],
    IMPORT + "page.pt --model=wrn10_1": ["page.pt", "HTML"],
    IMPORT + "empty.pt --model=wrn10_1": ["empty.pt", "empty"],
    IMPORT + "notes.txt --model=wrn10_1": ["notes.txt", "text"],
    IMPORT + "renamed.pt --model=wrn10_1": ["renamed.pt", "tar"],
    IMPORT + "bare.pt --model=wrn10_1": ["bare.pt", "pickle"],
    IMPORT + "code.pt --model=wrn10_1": ["code.pt", "its pickle asks for", "open", "nothing of it was executed"],
    IMPORT + "code.npy --model=dm_wrn10_1": ["code.npy", "open"],
    IMPORT + "data.npz --model=wrn10_1": ["data.npz", ".npz"],
    IMPORT + "taken --model=wrn10_1": ["taken", "directory"],
}


@pytest.fixture(scope="module")
def mistakes(files):
    before = sorted(files.rglob("*"))
    lines = {line: line.replace("FILES", str(files)) for line in MISTAKES}
    results = run_all(list(lines.values()), heavy=True)
    return {line: results[typed] for line, typed in lines.items()}, before, sorted(files.rglob("*"))


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line(mistakes, line):
    check_one_line(mistakes[0][line], *MISTAKES[line])


def test_mistakes_leave_nothing_and_execute_nothing(mistakes, files):
    _, before, after = mistakes
    assert after == before and not (files / "executed").exists()


def test_from_a_file_to_an_evaluated_run_and_out_again(tiny_teacher, tiny_arrays, tmp_path):
    lines = [
        f"weights export --format=safetensors --workdir={tiny_teacher} --output={tmp_path}/t.safetensors --step=100",
        f"weights import --source={tmp_path}/t.safetensors --workdir={tmp_path}/teacher --data={tiny_arrays} --examples=20 "
        "--norm=linf --epsilon=1/10",
        f"evaluate --workdir={tmp_path}/teacher --attacks=clean,pgd20",
        f"weights export --format=torch --workdir={tmp_path}/teacher --output={tmp_path}/out/t.pt",
        f"weights export --format=stablehlo --workdir={tmp_path}/teacher --output={tmp_path}/out/t.stablehlo"]
    results = run_all(lines, heavy=True)
    for line in lines:
        assert results[line][0] == 0, results[line][2]
    assert "clean accuracy" in results[lines[1]][1] and "of 20 images" in results[lines[1]][1]
    assert "equal bit for bit" in results[lines[3]][1] and "logits within" in results[lines[4]][1]
    evaluation = json.loads((tmp_path / "teacher" / "evaluation.json").read_text())
    assert evaluation["accuracy"]["clean"] > 0.5 and (tmp_path / "teacher" / "report.html").is_file()
    assert evaluation["threat"] == {"norm": "linf", "epsilon": 0.1, "bounds": [0.0, 1.0]}
    assert "resnet6_w4" in results[lines[2]][1]
    state = {key: leaf.array() for key, leaf in torch_file.read(str(tmp_path / "out" / "t.pt")).items()}
    read = weights.read(tmp_path / "t.safetensors")
    np.testing.assert_array_equal(state["linear.weight"].T, read.variables["params"]["linear"]["kernel"])


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of memory from /proc")
def test_a_wide_resnet_28_10_comes_in_within_a_gibibyte(tmp_path):
    state = {entry.key: np.full(entry.torch_shape, 0.01, np.float32) for entry in layouts.entries("dm_wrn28_10", 10)}
    torch_file.write(str(tmp_path / "x.pt"), state)
    # Linux's own record: what getrusage says has the size of the process that started this one in it.
    code = ("import atexit, re, runpy; "
            "atexit.register(lambda: print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])); "
            "runpy.run_module('launch.weights', run_name='__main__', alter_sys=True)")
    arguments = f"import --model=cifar10/Linf/Wang2023Better_WRN-28-10 --source={tmp_path}/x.pt --workdir={tmp_path}/run"
    command = [sys.executable, "-c", code, *arguments.split()]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True)
    assert "36,479,194 parameters" in done.stdout
    assert int(done.stdout.split()[-1]) < 2**20, "kilobytes of memory, at most"


def test_pytorch_is_never_imported():
    code = "import sys, jaxrd.training.exchange, launch.weights; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True).stdout == "False\n"


def test_the_zoo_is_a_table_that_can_be_searched():
    results = run_all(["weights zoo", "weights zoo bdm-at", "weights zoo --model=dm_wrn70_16"])
    everything, some, wide = (output for _, output, *_ in results.values())
    assert all(result[0] == 0 and not result[2] for result in results.values())
    assert len(everything.splitlines()) > 60 and "cifar10/Linf/Chen2021LTD_WRN34_10" in everything
    assert "Wang2023Better_WRN-28-10" in some and "Chen2021LTD" not in some
    assert all("dm_wrn70_16" in line for line in wide.splitlines()[1:])


def test_help_has_an_example_of_each_command():
    (status, output, *_), = run_all(["weights --help"]).values()
    assert status == 0 and all(f"launch.weights {each}" in output for each in ("import", "export", "zoo"))
    assert io.StringIO(output).readline().strip()
