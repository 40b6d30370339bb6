"""Run directories from weights and files from run directories: whole or not at all, and the same weights on both sides."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import types

import jax
import jax.export
import numpy as np
import pytest

from jaxrd import data, models
from jaxrd.evaluation import evaluate
from jaxrd.files import appearing, signals_deferred
from jaxrd.models import weights
from jaxrd.models.weights import layouts, safetensors_file, torch_file
from jaxrd.training import checkpoint, exchange, loop
from jaxrd.training.log import read_metrics
from tests.support import assert_input_error

DIGITS = {"image_shape": (8, 8, 1)}


def everything(directory):
    return sorted(str(path.relative_to(directory)) for path in pathlib.Path(directory).rglob("*"))


def quiet(_):
    pass


@pytest.fixture(scope="module")
def there_and_back(tiny_teacher, tiny_arrays, tmp_path_factory):
    """The tiny teacher's weights as a torch file, and the run directory that this file becomes again."""
    place = tmp_path_factory.mktemp("exchange")
    exchange.export_weights(tiny_teacher, place / "teacher.pt", "torch", say=quiet)
    exchange.import_weights(place / "teacher.pt", place / "teacher", "resnet6_w4", data=tiny_arrays, say=quiet)
    return place / "teacher.pt", place / "teacher"


def equal_trees(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, a), jax.tree.map(np.asarray, b))


def test_weights_that_went_out_and_came_back_are_the_same(tiny_teacher, there_and_back):
    model, variables = models.restore(tiny_teacher)
    again, others = models.restore(there_and_back[1])
    assert again == model
    equal_trees(others, variables)


@pytest.mark.parametrize("name", ["torch", "safetensors"])
def test_a_file_that_came_in_goes_out_bit_for_bit(there_and_back, tmp_path, name):
    source, _ = there_and_back
    state = {key: leaf.array() for key, leaf in torch_file.read(str(source)).items()}
    state = {key: np.asarray(5, np.int64) if key.endswith("num_batches_tracked") else value for key, value in state.items()}
    torch_file.write(str(tmp_path / "in.pt"), state)
    exchange.import_weights(tmp_path / "in.pt", tmp_path / "run", "resnet6_w4", say=quiet, **DIGITS)
    exchange.export_weights(tmp_path / "run", tmp_path / "out", name, say=quiet)
    if name == "torch":
        assert (tmp_path / "out").read_bytes() == (tmp_path / "in.pt").read_bytes(), "the whole file, counters and order too"
    else:
        exchange.import_weights(tmp_path / "out", tmp_path / "again", say=quiet)
        exchange.export_weights(tmp_path / "again", tmp_path / "again.safetensors", name, say=quiet)
        (arrays, metadata), (others, other_metadata) = (
            safetensors_file.read(str(tmp_path / file)) for file in ("again.safetensors", "out"))
        assert metadata == other_metadata and list(arrays) == list(others)
        assert all(arrays[key].tobytes() == others[key].tobytes() == state[key].tobytes() for key in state)
        equal_trees(models.restore(tmp_path / "again")[1], models.restore(tmp_path / "run")[1])


def test_the_program_gives_the_same_logits_at_any_batch_size(tiny_teacher, tmp_path):
    exchange.export_weights(tiny_teacher, tmp_path / "x.stablehlo", "stablehlo", say=quiet)
    program = jax.export.deserialize(bytearray((tmp_path / "x.stablehlo").read_bytes()))
    assert set(program.platforms) >= {"cpu", "cuda", "tpu"}
    logits_fn = models.logits_fn(*models.restore(tiny_teacher))
    for batch in (1, 7, 64):
        images = np.random.default_rng(batch).uniform(size=(batch, 8, 8, 1)).astype(np.float32)
        logits = program.call(images)
        assert logits.shape == (batch, 10) and np.ptp(logits) > 1
        np.testing.assert_allclose(logits, logits_fn(images), rtol=0, atol=1e-5)


def test_a_student_of_a_teacher_that_travelled_has_the_same_losses(tiny_teacher, there_and_back, tiny_config, tmp_path):
    metrics = []
    for index, teacher in enumerate((tiny_teacher, there_and_back[1])):
        config = tiny_config(method="adaad+igdm", teacher=str(teacher), training={"steps": 3})
        loop.train(config, tmp_path / str(index), devices=jax.devices()[:1])
        metrics.append(read_metrics(tmp_path / str(index) / "metrics.jsonl"))
    for one, other in zip(*metrics, strict=True):
        for name in one:
            if not name.startswith(("time", "seconds", "images_per", "input_wait", "epoch_")) and "second" not in name:
                assert one[name] == other[name], name
    assert any("train/igdm" in entry for entry in metrics[0])


def test_an_imported_directory_says_where_it_is_from_and_is_evaluated(there_and_back, tiny_arrays):
    source, workdir = there_and_back
    record = json.loads((workdir / "import.json").read_text())
    assert record["file"]["name"] == "teacher.pt" and record["file"]["bytes"] == source.stat().st_size
    assert record["clean_accuracy"]["examples"] == 40 and record["clean_accuracy"]["percent"] > 50
    result = evaluate.evaluate(workdir, "clean", say=quiet)
    assert result["run"]["method"] == "resnet6_w4" and result["run"]["step"] == 0
    assert result["accuracy"]["clean"] == pytest.approx(record["clean_accuracy"]["percent"] / 100)
    assert result["data"]["train_examples"] is None


def test_another_teacher_in_the_same_place_is_noticed(there_and_back, tiny_arrays, tiny_config, tmp_path):
    source, _ = there_and_back
    exchange.import_weights(source, tmp_path / "t", "resnet6_w4", data=tiny_arrays, say=quiet)
    config = tiny_config(method="ard", teacher=str(tmp_path / "t"), training={"steps": 2, "checkpoint_every": 1})
    loop.train(config, tmp_path / "run", devices=jax.devices()[:1])
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    shutil.rmtree(tmp_path / "t")
    state = {key: leaf.array() for key, leaf in torch_file.read(str(source)).items()}
    torch_file.write(str(tmp_path / "other.pt"), state | {"linear.bias": state["linear.bias"] + 1})
    exchange.import_weights(tmp_path / "other.pt", tmp_path / "t", "resnet6_w4", data=tiny_arrays, say=quiet)
    assert_input_error(lambda: loop.train(config, tmp_path / "run", devices=jax.devices()[:1]),
                       "another teacher", "import those")
    lines = []
    evaluate.evaluate(tmp_path / "run", "clean", say=lines.append)
    assert any("no gradient alignment" in line and "other weights now" in line for line in lines)
    shutil.rmtree(tmp_path / "t")
    exchange.import_weights(source, tmp_path / "t", "resnet6_w4", data=tiny_arrays, say=quiet)
    assert int(loop.train(config, tmp_path / "run", devices=jax.devices()[:1]).step) == 2


def test_a_model_of_unknown_images_is_imported_and_evaluated_once_they_are_named(tmp_path):
    state = {entry.key: np.ones(entry.torch_shape, np.float32) for entry in layouts.entries("resnet6_w4", 43)}
    torch_file.write(str(tmp_path / "x.pt"), state)
    lines = []
    exchange.import_weights(tmp_path / "x.pt", tmp_path / "run", "resnet6_w4", say=lines.append)
    assert any("images that --data names" in line for line in lines)
    assert_input_error(lambda: evaluate.evaluate(tmp_path / "run", "clean", say=quiet), "nothing says which images", "--data")
    assert models.restore(tmp_path / "run")[0].classes == 43


@pytest.mark.parametrize("classes, shape, name", [
    (10, (32, 32, 3), "cifar10 (assumed)"), (10, (28, 28, 1), "images that --data names"),
    (10, (8, 8, 1), "jaxrd_digits (assumed)"),
    (100, (32, 32, 3), "cifar100 (assumed)"), (200, (64, 64, 3), "tiny_imagenet (assumed)"),
    (200, (32, 32, 3), "images that --data names")])
def test_the_data_set_that_is_assumed_is_told(tmp_path, classes, shape, name):
    state = {entry.key: np.ones(entry.torch_shape, np.float32) for entry in layouts.entries("resnet6_w4", classes, shape[2])}
    torch_file.write(str(tmp_path / "x.pt"), state)
    lines = []
    exchange.import_weights(tmp_path / "x.pt", tmp_path / "run", "resnet6_w4", image_shape=shape, say=lines.append)
    assert any(f"will attack {name}" in line for line in lines), lines


def test_an_imported_directory_is_no_run_to_go_on_with(there_and_back, tiny_config):
    _, workdir = there_and_back
    assert_input_error(lambda: loop.train(tiny_config(), workdir, devices=jax.devices()[:1]),
                       "imported weights", "--config.teacher")


def test_the_findings_name_what_was_read(there_and_back, tmp_path):
    lines = []
    exchange.import_weights(there_and_back[0], tmp_path / "run", "resnet6_w4", say=lines.append, **DIGITS)
    text = "\n".join(lines)
    for part in ("teacher.pt: 32 arrays", "the weights of resnet6_w4", "images in [0, 1] as they are", "6 counters",
                 "10 classes", f"--config.teacher={tmp_path / 'run'}"):
        assert part in text, text




def test_a_refused_import_leaves_nothing(there_and_back, tiny_arrays, tmp_path):
    source, _ = there_and_back
    truncated = tmp_path / "cut.pt"
    truncated.write_bytes(source.read_bytes()[:-100])
    before = everything(tmp_path)
    for call in (
            lambda: exchange.import_weights(truncated, tmp_path / "run", "resnet6_w4", say=quiet),
            lambda: exchange.import_weights(source, tmp_path / "run", "resnet8_w4", say=quiet),
            lambda: exchange.import_weights(source, tmp_path / "a" / "run", "resnet6_w4", data="no,such", say=quiet),
            lambda: exchange.import_weights(source, tmp_path / "run", "resnet6_w4", data=tiny_arrays, classes=5, say=quiet),
            lambda: exchange.import_weights(tmp_path / "none.pt", tmp_path / "run", "resnet6_w4", say=quiet)):
        assert_input_error(call)
        assert everything(tmp_path) == before


def test_an_import_that_fails_while_it_writes_leaves_nothing(there_and_back, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_variables", full)
    assert_input_error(lambda: exchange.import_weights(there_and_back[0], tmp_path / "run", "resnet6_w4", say=quiet, **DIGITS),
                       "run cannot be written", "No space left")
    assert everything(tmp_path) == []

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_variables", interrupted)
    with pytest.raises(KeyboardInterrupt):
        exchange.import_weights(there_and_back[0], tmp_path / "run", "resnet6_w4", say=quiet, **DIGITS)
    assert everything(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_import_leaves_no_directory_and_the_next_one_cleans_up(there_and_back, tmp_path, number):
    code = f"""
import os, signal
from jaxrd.training import checkpoint, exchange
checkpoint.save_variables = lambda *_: (os.kill(os.getpid(), {int(number)}), __import__("time").sleep(60))
exchange.import_weights({str(there_and_back[0])!r}, {str(tmp_path / "run")!r}, "resnet6_w4", image_shape=(8, 8, 1))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=pathlib.Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == (143 if number == signal.SIGTERM else -9), done.stderr
    assert not (tmp_path / "run").exists()
    assert (everything(tmp_path) == []) == (number == signal.SIGTERM)
    exchange.import_weights(there_and_back[0], tmp_path / "run", "resnet6_w4", say=quiet, **DIGITS)
    assert os.listdir(tmp_path) == ["run"]


def test_a_leftover_of_an_earlier_process_with_our_number_is_removed(there_and_back, tmp_path):
    # As in a container that was started again: the same host name, the same process id.
    left = tmp_path / f".run.unfinished-{socket.gethostname()}-{os.getpid()}-x"
    left.mkdir()
    os.utime(left, (0, 0))
    exchange.import_weights(there_and_back[0], tmp_path / "run", "resnet6_w4", say=quiet, **DIGITS)
    assert os.listdir(tmp_path) == ["run"]


def test_what_appears_during_an_export_is_not_overwritten(tiny_teacher, tmp_path, monkeypatch):
    def slow(path, state):
        torch_file.write(str(path), state)
        (tmp_path / "x.pt").write_text("mine")

    monkeypatch.setattr(weights, "write_torch", slow)
    assert_input_error(lambda: exchange.export_weights(tiny_teacher, tmp_path / "x.pt", "torch", say=quiet),
                       "x.pt has come to exist meanwhile")
    assert everything(tmp_path) == ["x.pt"] and (tmp_path / "x.pt").read_text() == "mine"


def test_a_link_to_an_empty_directory_is_filled(there_and_back, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    exchange.import_weights(there_and_back[0], tmp_path / "run", "resnet6_w4", say=quiet, **DIGITS)
    assert (tmp_path / "run").is_symlink() and (tmp_path / "elsewhere" / "config.json").is_file()


def test_exported_files_have_the_rights_of_other_new_files(tiny_teacher, tmp_path):
    (tmp_path / "usual").touch()
    for name in exchange.EXPORT_FORMATS:
        exchange.export_weights(tiny_teacher, tmp_path / name, name, say=quiet)
        assert (tmp_path / name).stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_student_of_bfloat16_is_exported_as_it_is_evaluated(tmp_path, tiny_config):
    model = models.create("resnet6_w4", classes=10, image_shape=(8, 8, 1), dtype="bfloat16")
    variables = jax.tree.map(np.asarray, model.init(jax.random.key(0)))
    checkpoint.save_variables(tmp_path / "run", variables, {
        "config": tiny_config().to_dict(), "model": dict(model.specification), "teacher_step": None})
    exchange.export_weights(tmp_path / "run", tmp_path / "x", "stablehlo", say=quiet)
    program = jax.export.deserialize(bytearray((tmp_path / "x").read_bytes()))
    images = np.random.default_rng(0).uniform(size=(5, 8, 8, 1)).astype(np.float32)
    exact = models.create("resnet6_w4", classes=10, image_shape=(8, 8, 1))
    np.testing.assert_allclose(program.call(images), exact.apply(variables, images, False)[0], rtol=0, atol=1e-5)


def test_a_network_without_the_normalisation_of_its_class_says_so(tmp_path, tiny_config):
    lines = []
    for name, mean in (("dm_wrn10_1", None), ("wrn10_1", None), ("dm_wrn10_1", (0.1, 0.2, 0.3))):
        model = models.create(name, classes=10, mean=mean, std=mean)
        checkpoint.save_variables(tmp_path / f"run{len(lines)}", jax.tree.map(np.asarray, model.init(jax.random.key(0))), {
            "config": tiny_config().to_dict(), "model": dict(model.specification), "teacher_step": None})
        exchange.export_weights(tmp_path / f"run{len(lines)}", tmp_path / f"{len(lines)}.pt", "torch", say=lines.append)
    assert "mean=(0, 0, 0), std=(1, 1, 1)" in lines[1] and "--normalization=none" in lines[1]
    assert "as they are" in lines[3] and "subtract mean (0.1, 0.2, 0.3)" in lines[5]


def test_a_part_of_the_test_images_is_a_sample(tmp_path, monkeypatch):
    """93.1 % of 1,000 images do not contradict 92.44 % of 10,000, and 91 % of all 10,000 do."""
    images, measured = np.zeros((10_000, 1, 1, 3), np.uint8), 0.0
    found = types.SimpleNamespace(published=types.SimpleNamespace(clean=92.44), name="x", model=None, variables=None)
    monkeypatch.setattr(exchange.robustness, "run_attack", lambda *_, **__: types.SimpleNamespace(accuracy=measured))

    def check(count, examples):
        source = data.from_arrays(images[:count], np.arange(count) % 10)
        dataset = types.SimpleNamespace(test=source)
        return exchange._clean_accuracy(found, dataset, examples, False, quiet)["examples"]

    measured = 0.931
    assert check(1000, 1000) == check(1000, 0) == check(10_000, 1000) == 1000
    assert_input_error(lambda: check(10_000, 0), "93.10 %", "92.44 %", "0.20 away")
    measured = 0.85
    assert_input_error(lambda: check(1000, 0), "85.00 %", "3.5")
    measured = 0.9250
    assert check(10_000, 0) == 10_000


def test_what_is_there_is_never_overwritten(there_and_back, tiny_teacher, tmp_path):
    source, workdir = there_and_back
    before = everything(workdir)
    assert_input_error(lambda: exchange.import_weights(source, workdir, "resnet6_w4", say=quiet), "holds a run already")
    (tmp_path / "notes.txt").write_text("mine")
    assert_input_error(lambda: exchange.import_weights(source, tmp_path, "resnet6_w4", say=quiet), "exists already")
    for name in exchange.EXPORT_FORMATS:
        assert_input_error(lambda: exchange.export_weights(tiny_teacher, tmp_path / "notes.txt", name, say=quiet),
                           "notes.txt exists already")
        assert_input_error(lambda: exchange.export_weights(tiny_teacher, tmp_path, name, say=quiet), "is a directory")
    assert (tmp_path / "notes.txt").read_text() == "mine" and everything(workdir) == before


def test_the_current_directory_is_not_replaced(there_and_back, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_input_error(lambda: exchange.import_weights(there_and_back[0], ".", "resnet6_w4", say=quiet, **DIGITS),
                       "current directory")


def test_a_signal_waits_for_the_end_of_a_checkpoint(tmp_path):
    order = []
    with pytest.raises(KeyboardInterrupt):
        with signals_deferred():
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                order.append("written")
        order.append("never")
    assert order == ["written"] * 1000
    with pytest.raises(SystemExit, match="143"):
        with appearing(tmp_path / "x", directory=True) as place:
            with signals_deferred():
                os.kill(os.getpid(), signal.SIGTERM)
                (place / "file").touch()
            order.append("never")
    assert everything(tmp_path) == [] and "never" not in order


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits its own process")
def test_a_full_disk_is_one_line_and_leaves_nothing(there_and_back, tiny_teacher, tmp_path):
    code = f"""
import resource, sys
from jaxrd.errors import InputError
from jaxrd.training import exchange
def quiet(_): pass
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
for call in (
        lambda: exchange.import_weights({str(there_and_back[0])!r}, "run", "resnet6_w4", image_shape=(8, 8, 1), say=quiet),
        *(lambda name=name: exchange.export_weights({str(tiny_teacher)!r}, "x." + name, name, say=quiet)
          for name in exchange.EXPORT_FORMATS)):
    try:
        call()
    except InputError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])})
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "x.torch", "x.safetensors", "x.stablehlo"], done.stderr
    assert all("cannot be written" in line for line in lines) and everything(tmp_path) == []


def test_an_empty_directory_is_free(there_and_back, tmp_path):
    (tmp_path / "run").mkdir()
    exchange.import_weights(there_and_back[0], tmp_path / "run", "resnet6_w4", say=quiet, **DIGITS)
    assert (tmp_path / "run" / "config.json").is_file()


def test_a_file_that_reads_back_otherwise_is_not_kept(tiny_teacher, tmp_path, monkeypatch):
    def faulty(path, state):
        torch_file.write(str(path), state | {"linear.bias": state["linear.bias"] + 1})

    monkeypatch.setattr(weights, "write_torch", faulty)
    assert_input_error(lambda: exchange.export_weights(tiny_teacher, tmp_path / "x.pt", "torch", say=quiet), "linear.bias")
    other_model, other = models.create("resnet6_w4", classes=10, image_shape=(8, 8, 1)), None
    other = other_model.init(jax.random.key(5))
    program = weights.stablehlo(other_model, other)
    monkeypatch.setattr(weights, "stablehlo", lambda *_, **__: program)
    assert_input_error(lambda: exchange.export_weights(tiny_teacher, tmp_path / "x.hlo", "stablehlo", say=quiet),
                       "logits differ")
    assert everything(tmp_path) == []


def test_an_accuracy_far_from_the_published_one_is_refused(tmp_path):
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (40, 32, 32, 3), np.uint8), np.arange(40) % 10
    for name in ("train", "test"):
        np.savez(tmp_path / f"{name}.npz", images=images, labels=labels)
    state = {entry.key: draw.normal(size=entry.torch_shape).astype(np.float32) ** 2 * 0.1
             for entry in layouts.entries("preact_resnet18", 10)}
    torch_file.write(str(tmp_path / "x.pt"), state)
    data = f"{tmp_path / 'train.npz'},{tmp_path / 'test.npz'}"
    before, lines = everything(tmp_path), []
    assert_input_error(
        lambda: exchange.import_weights(
            tmp_path / "x.pt", tmp_path / "run", "cifar10/L2/Rice2020Overfitting", data=data, say=lines.append),
        "clean accuracy is", "published with 88.67 %", "nothing was written", "--any_accuracy")
    assert everything(tmp_path) == before
    exchange.import_weights(tmp_path / "x.pt", tmp_path / "run", "cifar10/L2/Rice2020Overfitting", data=data,
                            any_accuracy=True, say=lines.append)
    record = json.loads((tmp_path / "run" / "import.json").read_text())
    assert record["published"]["clean"] == 88.67 and record["clean_accuracy"]["percent"] < 50
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["threat"] == {"norm": "l2", "epsilon": 0.5} and config["data"]["arrays"] == data


def test_each_batch_norm_set_is_exported(tmp_path, tiny_config):
    model = models.create("resnet6_w4", classes=10, image_shape=(8, 8, 1), batch_norm_sets=2)
    variables = model.init(jax.random.key(0))
    variables["params"]["batch_norm_1"] = jax.tree.map(lambda leaf: leaf + 1, variables["params"]["batch_norm_1"])
    variables = jax.tree.map(np.asarray, variables)
    checkpoint.save_variables(tmp_path / "run", variables, {
        "config": tiny_config().to_dict(), "model": dict(model.specification), "teacher_step": None})
    images = np.random.default_rng(0).uniform(size=(5, 8, 8, 1)).astype(np.float32)
    for chosen in (0, 1):
        exchange.export_weights(tmp_path / "run", tmp_path / f"{chosen}.pt", "torch", batch_norm_set=chosen, say=quiet)
        found = weights.read(tmp_path / f"{chosen}.pt", "resnet6_w4", image_shape=(8, 8, 1))
        expected, _ = model.apply(variables, images, False, chosen)
        np.testing.assert_allclose(models.logits_fn(found.model, found.variables)(images), expected, atol=1e-6)
    assert_input_error(
        lambda: exchange.export_weights(tmp_path / "run", tmp_path / "2.pt", "torch", batch_norm_set=2, say=quiet),
        "batch_norm_set is 2", "has 2")


def test_an_unknown_format_or_step_is_one_line(tiny_teacher, tmp_path):
    assert_input_error(lambda: exchange.export_weights(tiny_teacher, tmp_path / "x", "onnx", say=quiet), '"onnx"', "stablehlo")
    assert_input_error(lambda: exchange.export_weights(tiny_teacher, tmp_path / "x", "torch", step=7, say=quiet), "step 7")
    assert_input_error(lambda: exchange.export_weights(tmp_path / "none", tmp_path / "x", "torch", say=quiet), "no such run")
    assert everything(tmp_path) == []
