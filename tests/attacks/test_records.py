"""Records of a cascade: whatever kills it, it goes on where it was, with the same outcome, or says in one line why not.

And its saved result, which can be read without jaxrd.
"""

import dataclasses
import functools
import importlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxrd import InputError, ThreatModel, attacks
from jaxrd.attacks import AutoAttackResult
from jaxrd.attacks.records import Records
from tests.support import assert_input_error

cascades = importlib.import_module("jaxrd.attacks.autoattack")  # the name in the package is the function

COUNT, SHAPE, CLASSES, SIZE = 12, (4, 4, 1), 4, 16
KEY = jax.random.key(0)
GENERATOR = np.random.default_rng(0)
WEIGHTS = GENERATOR.normal(size=(SIZE, CLASSES)).astype(np.float32)
IMAGES = GENERATOR.uniform(0.2, 0.8, size=(COUNT, *SHAPE)).astype(np.float32)
LABELS = np.argmax((IMAGES.reshape(COUNT, -1) - 0.5) @ WEIGHTS, axis=1).astype(np.int32)
LABELS[5] = (LABELS[5] + 1) % CLASSES
THREAT = ThreatModel("linf", 0.02)
VERSION = ("square", "apgd-t")
CONSTANTS = {"_STEPS": 3, "_QUERIES": 10, "_TARGETS": 2}


def linear(weights, images):
    return (images.reshape(len(images), -1) - 0.5) @ weights


def another(weights, images):
    return 1.02 * linear(weights, images)


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in CONSTANTS.items():
        monkeypatch.setattr(cascades, name, value)


def attacked(resume=None, **changes):
    arguments = dict(key=KEY, logits_fn=Partial(linear, WEIGHTS), images=IMAGES, labels=LABELS, threat=THREAT, version=VERSION,
                     batch_size=8, say=None)
    return attacks.autoattack(resume=resume, **arguments | changes)


@functools.cache
def reference():
    result = attacked()
    assert 2 < result.robust.sum() < COUNT - 4 and {0, 1, 2} < set(result.attack_index)
    return result


def assert_same(result, expected, atol=0.0):
    """All but the seconds."""
    for field in dataclasses.fields(AutoAttackResult):
        found, wanted = getattr(result, field.name), getattr(expected, field.name)
        if field.name in ("images", "distances"):
            np.testing.assert_allclose(found, wanted, atol=atol, rtol=0)
        elif isinstance(wanted, np.ndarray):
            assert found.dtype == wanted.dtype
            np.testing.assert_array_equal(found, wanted)
        elif field.name == "metadata":  # where logits are rounded
            assert found.keys() == wanted.keys() and found["configuration"] == wanted["configuration"]
        elif field.name != "seconds":
            assert found == wanted, field.name


def contents(directory):
    return {path.name: path.read_bytes() for path in pathlib.Path(directory).iterdir()}


def record_files(directory):
    return sorted(path for path in pathlib.Path(directory).iterdir() if path.suffix == ".npz")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The records of a whole evaluation; read only."""
    directory = tmp_path_factory.mktemp("records") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CONSTANTS.items():
            patch.setattr(cascades, name, value)
        assert_same(attacked(directory), reference())
    return directory


@pytest.fixture
def copy(finished, tmp_path):
    return pathlib.Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture
def computed(monkeypatch):
    """(rank of the target, points) of the batches that were attacked, and not read from records."""
    batches = []
    run_search = cascades.run_search

    def watched(search, network, points, keys, indices, *arguments, **options):
        for found in run_search(search, network, points, keys, indices, *arguments, **options):
            batches.append((int(points["rank"][0]), *found.indices.tolist()))
            yield found

    monkeypatch.setattr(cascades, "run_search", watched)
    return batches


class Killed(Exception):
    """Stands for whatever ends a process."""


def killer(after):
    lines = []

    def say(line):
        lines.append(line)
        if sum("points" in line for line in lines) == after:
            raise Killed

    return say


# Going on.


def test_an_evaluation_goes_on_after_any_batch(finished, tmp_path, computed):
    batches = len(record_files(finished))
    assert batches >= 5  # of two attacks, one of them with two runs
    attacked()
    whole = computed.copy()
    assert len(whole) == batches
    for after in range(1, batches + 1):
        directory = tmp_path / str(after)
        computed.clear()
        with pytest.raises(Killed):
            attacked(directory, say=killer(after))
        assert computed == whole[:after] and len(record_files(directory)) == after
        computed.clear()
        assert_same(attacked(directory), reference())
        assert computed == whole[after:]  # nothing twice


def test_a_batch_that_was_not_put_on_record_is_attacked_again(tmp_path, monkeypatch, computed):
    add, added = Records.add, []

    def fail(records, record):
        if len(added) == 2:
            raise Killed
        added.append(add(records, record))

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Records, "add", fail)
        attacked(tmp_path / "records")
    lost = computed[2]
    computed.clear()
    assert_same(attacked(tmp_path / "records"), reference())
    assert computed[0] == lost


@pytest.mark.parametrize("batch_sizes", [(8, 100), (100, 8)])
def test_an_evaluation_may_go_on_with_another_batch_size(batch_sizes, tmp_path, computed):
    reference()
    computed.clear()
    with pytest.raises(Killed):
        attacked(tmp_path / "records", batch_size=batch_sizes[0], say=killer(1))
    finished = len(computed[0]) - 1
    assert_same(attacked(tmp_path / "records", batch_size=batch_sizes[1]), reference(), atol=1e-5)
    square = sum(len(batch) - 1 for batch in computed if batch[0] == 0)
    assert finished in (8, COUNT - 1) and square == COUNT - 1  # once each but for the wrong one


def test_a_finished_evaluation_is_read_without_an_attack(copy, computed):
    before, lines = contents(copy), []
    result = attacked(copy, say=lines.append)
    assert_same(result, reference())
    assert computed == [] and contents(copy) == before
    assert f"{len(record_files(copy))} finished batches" in lines[0]
    # Its wall time is that of all sittings.
    with np.load(record_files(copy)[0]) as record:
        assert result.seconds["square"] >= round(float(record["seconds"]), 3) > 0


def test_any_one_file_may_be_lost(finished, tmp_path, computed):
    for path in record_files(finished):
        directory = pathlib.Path(shutil.copytree(finished, tmp_path / path.stem))
        (directory / path.name).unlink()
        computed.clear()
        assert_same(attacked(directory), reference())
        with np.load(path) as record:
            assert computed == [(computed[0][0], *record["indices"].tolist())]


@pytest.mark.parametrize("leftovers", [["000002.tmp", "000099.npz.tmp", "run.json.tmp"], []])
def test_files_that_a_kill_left_half_written_do_no_harm(leftovers, copy):
    record_files(copy)[1].unlink()
    for name in leftovers:
        (copy / name).write_bytes(b"PK\x03\x04 half")
    assert_same(attacked(copy), reference())


def test_a_kill_in_the_first_moment_does_no_harm(tmp_path):
    (tmp_path / "run.json.tmp").write_bytes(b"{")
    assert_same(attacked(tmp_path), reference())


SCRIPT = """
import importlib, os, signal, sys
import jax
import numpy as np
from jaxrd import attacks
sys.path.insert(0, {root!r})
from tests.attacks import test_records as here
jax.config.update("jax_disable_most_optimizations", True)
for name, value in here.CONSTANTS.items():
    setattr(here.cascades, name, value)
lines = []
def say(line):
    lines.append(line)
    if sum("points" in line for line in lines) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
here.attacked({directory!r}, say=say)
"""


def test_an_evaluation_that_was_killed_goes_on(tmp_path, computed):
    root = str(pathlib.Path(__file__).parents[2])
    script = SCRIPT.format(root=root, directory=str(tmp_path / "records"))
    ended = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, env=os.environ | {
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])})
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    assert len(record_files(tmp_path / "records")) == 3
    assert_same(attacked(tmp_path / "records"), reference(), atol=1e-6)
    assert 0 < len(computed) <= len(record_files(tmp_path / "records")) - 3


# Another evaluation.


def changed_images():
    images = IMAGES.copy()
    images[-1, 2, 2, 0] += 1 / 255
    return images


def changed_labels():
    labels = LABELS.copy()
    labels[-1] = (labels[-1] + 1) % CLASSES
    return labels


@pytest.mark.parametrize("changes, mentions", [
    ({"logits_fn": Partial(linear, WEIGHTS + np.float32(1e-6))}, ["another model"]),
    ({"logits_fn": Partial(another, WEIGHTS)}, ["another model"]),
    ({"logits_fn": Partial(lambda weights, images: -linear(weights, images), WEIGHTS)}, ["another model"]),
    ({"images": changed_images()}, ["another", "data"]),
    ({"images": IMAGES[:-1], "labels": LABELS[:-1]}, ["another", "data"]),
    ({"labels": changed_labels()}, ["another", "data"]),
    ({"key": jax.random.key(1)}, ["another", "key"]),
    ({"index": np.arange(COUNT) + 1}, ["another", "key"]),
    ({"threat": ThreatModel("linf", 0.03)}, ["another", "epsilon is 0.02 there and 0.03 here"]),
    ({"threat": ThreatModel("l2", 0.02)}, ["another", "norm", "linf", "l2"]),
    ({"threat": ThreatModel("linf", 0.02, (-1.0, 1.0))}, ["another", "bounds"]),
    ({"version": ("apgd-t", "square")}, ["another", "version is square+apgd-t there and apgd-t+square here"]),
    ({"version": "fast"}, ["another", "version", "fast"]),
])
def test_another_evaluation_is_refused_and_the_directory_left_as_it_was(changes, mentions, copy):
    before = contents(copy)
    assert_input_error(lambda: attacked(copy, **changes), str(copy), *mentions, "name another directory")
    assert contents(copy) == before


def test_other_numbers_of_steps_are_another_evaluation(copy, monkeypatch):
    monkeypatch.setattr(cascades, "_STEPS", 4)
    assert_input_error(lambda: attacked(copy), "another", "configuration")


def test_a_model_of_small_logits_is_told_from_another(tmp_path):
    def cold(scale):
        return Partial(lambda weights, images: scale * linear(weights, images), WEIGHTS)

    attacked(tmp_path / "records", logits_fn=cold(1e-4), version=("square",))
    assert_input_error(lambda: attacked(tmp_path / "records", logits_fn=cold(2e-4), version=("square",)), "another model")


# Damage.


def damaged(path, how):
    content = path.read_bytes()
    arrays = dict(np.load(path)) if path.suffix == ".npz" else {}
    if how == "truncated":
        path.write_bytes(content[:len(content) // 2])
    elif how == "garbage":
        path.write_bytes(np.random.default_rng(0).bytes(300))
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("1,2,3\n")
    elif how == "a single array":
        with open(path, "wb") as file:
            np.save(file, np.arange(3))
    elif how == "another archive":
        np.savez(path, images=np.zeros(3))
    elif how == "pickled":
        np.savez(path, **arrays | {"indices": np.array([{}, []], object)})
    elif how == "images of another shape":
        np.savez(path, **arrays | {"images": arrays["images"][:, :2]})
    elif how == "too few images":
        np.savez(path, **arrays | {"images": arrays["images"][:0]})
    elif how == "too few flags":
        np.savez(path, **arrays | {"fooled": arrays["fooled"][:-1]})
    elif how == "numbers for flags":
        np.savez(path, **arrays | {"fooled": arrays["fooled"].astype(int)})
    elif how == "points beyond the data":
        np.savez(path, **arrays | {"indices": arrays["indices"] + COUNT})
    elif how == "points as decimals":
        np.savez(path, **arrays | {"indices": arrays["indices"].astype(np.float32)})
    elif how == "a list":
        path.write_text("[]")
    elif how == "another object":
        path.write_text('{"format": 1}')
    elif how == "a number for logits":
        path.write_text(json.dumps(json.loads(content) | {"logits": "many"}))
    assert path.read_bytes() != content


@pytest.mark.parametrize("how", [
    "truncated", "garbage", "empty", "text", "a single array", "another archive", "pickled", "images of another shape",
    "too few images", "too few flags", "numbers for flags", "points beyond the data", "points as decimals"])
def test_a_damaged_record_is_one_line_and_can_be_deleted(how, copy):
    path = next(path for path in record_files(copy) if np.load(path)["fooled"].any())
    damaged(path, how)
    before = contents(copy)
    assert_input_error(lambda: attacked(copy), str(path), "damaged", "delete this file")
    assert contents(copy) == before
    path.unlink()
    assert_same(attacked(copy), reference())


@pytest.mark.parametrize("how", ["truncated", "garbage", "empty", "text", "a list", "another object", "a number for logits"])
def test_a_damaged_header_is_one_line(how, copy):
    damaged(copy / "run.json", how)
    before = contents(copy)
    assert_input_error(lambda: attacked(copy), "run.json", "damaged", "delete", str(copy))
    assert contents(copy) == before


def test_records_of_another_format_are_refused(copy):
    header = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(header | {"format": header["format"] + 1}))
    before = contents(copy)
    assert_input_error(lambda: attacked(copy), str(copy), "another format")
    assert contents(copy) == before


def test_one_damaged_byte_is_noticed_or_does_no_harm(finished, tmp_path):
    """Wherever it is: in what a zip file says of its parts too."""
    source = record_files(finished)[0]
    content = source.read_bytes()
    identity, points = reference().metadata, np.arange(COUNT)
    kept = Records.open(finished, identity, COUNT, SHAPE).of("square", 0, points)[0]
    directory = tmp_path / "one"
    directory.mkdir()
    shutil.copy(finished / "run.json", directory)
    noticed = 0
    for place in range(0, len(content), 3):
        for flip in (0x01, 0x80):
            (directory / source.name).write_bytes(content[:place] + bytes([content[place] ^ flip]) + content[place + 1:])
            try:
                found, = Records.open(directory, identity, COUNT, SHAPE).of("square", 0, points)
            except InputError as error:
                assert "\n" not in str(error)
                noticed += 1
            else:
                for field in dataclasses.fields(found):
                    np.testing.assert_array_equal(getattr(found, field.name), getattr(kept, field.name))
    assert noticed > len(content) / 3


def test_batches_that_cannot_both_be_are_refused(copy):
    shutil.copy(record_files(copy)[0], copy / "000077.npz")
    before = contents(copy)
    assert_input_error(lambda: attacked(copy), str(copy), "square, run 1", "do not fit")
    assert contents(copy) == before


@pytest.mark.parametrize("name", ["notes.txt", "model.npz", "run", "000001.npz"])
def test_a_directory_with_other_things_in_it_is_refused(name, tmp_path):
    (tmp_path / name).write_text("mine")
    assert_input_error(lambda: attacked(tmp_path), str(tmp_path), "other things", "name an empty or a new one")
    assert contents(tmp_path) == {name: b"mine"}


def test_a_file_is_no_directory_to_resume_from(tmp_path):
    (tmp_path / "file").write_text("mine")
    assert_input_error(lambda: attacked(tmp_path / "file"), str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_an_empty_or_missing_directory_is_begun_whatever_its_type(tmp_path):
    (tmp_path / "empty").mkdir()
    assert_same(attacked(str(tmp_path / "empty")), reference())
    assert_same(attacked(tmp_path / "deep" / "er"), reference())
    assert set(contents(tmp_path / "empty")) == {"run.json", *(path.name for path in record_files(tmp_path / "deep" / "er"))}


def test_arguments_that_make_no_sense_leave_no_directory(tmp_path):
    for changes in ({"version": "none"}, {"labels": LABELS[:-1]}, {"images": 255 * IMAGES}, {"batch_size": 0},
                    {"logits_fn": Partial(linear, WEIGHTS * np.nan)}):
        assert_input_error(lambda changes=changes: attacked(tmp_path / "records", **changes))
    assert not (tmp_path / "records").exists()


# The saved result.


def test_a_result_is_read_as_it_was_saved(tmp_path):
    result = reference()
    path = result.save(tmp_path / "deep" / "result.npz")
    assert path == tmp_path / "deep" / "result.npz" and [path] == list(path.parent.iterdir())
    read = AutoAttackResult.load(str(path))
    assert_same(read, result)
    for field in dataclasses.fields(result):
        found, wanted = getattr(read, field.name), getattr(result, field.name)
        assert type(found) is type(wanted) and (isinstance(wanted, np.ndarray) or found == wanted)
    assert read.accuracy == result.accuracy
    result.save(path)  # again, over the old one
    assert_same(AutoAttackResult.load(path), result)


def test_a_saved_result_can_be_read_without_this_library(tmp_path):
    result = reference()
    with np.load(result.save(tmp_path / "result.npz"), allow_pickle=False) as file:
        assert file["images"].dtype == np.float32  # eight bits would undo the attack
        np.testing.assert_array_equal(file["images"], result.images)
        np.testing.assert_array_equal(file["robust"], result.robust)
        metadata = json.loads(str(file["metadata"]))
    assert metadata["threat"] == {"norm": "linf", "epsilon": 0.02, "bounds": [0.0, 1.0]}
    assert metadata["per_attack_accuracy"] == result.per_attack_accuracy and metadata["version"] == "square+apgd-t"


@pytest.mark.parametrize("threat", [
    ThreatModel("linf", np.float32(0.02)), ThreatModel("linf", 0.02, (np.float32(0), np.float32(1))),
    ThreatModel("linf", jnp.float32(0.02)), ThreatModel("linf", 0.02, (0, 1))])
def test_a_radius_may_be_a_number_of_any_kind(threat, tmp_path):
    result = attacked(tmp_path / "records", threat=threat, version=("square",))
    read = AutoAttackResult.load(result.save(tmp_path / "result.npz"))
    assert read.threat.norm == "linf" and read.threat.epsilon == pytest.approx(0.02) and tuple(read.threat.bounds) == (0, 1)


@pytest.mark.parametrize("name", ["result", "result.npy", "result.npz.zip", ".npz"])
def test_a_result_is_an_npz_file(name, tmp_path):
    assert_input_error(lambda: reference().save(tmp_path / name), str(tmp_path / name), "must end in .npz")
    assert not list(tmp_path.iterdir())


def test_a_missing_or_damaged_result_is_one_line(tmp_path):
    path = tmp_path / "result.npz"
    assert_input_error(lambda: AutoAttackResult.load(path), str(path), "does not exist")
    assert_input_error(lambda: AutoAttackResult.load(tmp_path), str(tmp_path))
    for how in ("truncated", "garbage", "empty", "text", "a single array", "another archive"):
        reference().save(path)
        damaged(path, how)
        assert_input_error(lambda: AutoAttackResult.load(path), str(path), "damaged")
    reference().save(path)
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {"robust": np.array([None] * COUNT)})  # which only unpickling could read
    assert_input_error(lambda: AutoAttackResult.load(path), str(path), "damaged")
    for broken in ("", "[]", "{}", json.dumps(json.loads(str(arrays["metadata"])) | {"threat": {"norm": "l7"}})):
        np.savez(path, **arrays | {"metadata": broken})
        assert_input_error(lambda: AutoAttackResult.load(path), str(path), "damaged")


def test_a_kill_while_saving_leaves_the_old_result(tmp_path, monkeypatch):
    path = reference().save(tmp_path / "result.npz")
    before = path.read_bytes()

    def killed(file, **arrays):
        file.write(b"half")
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(np, "savez", killed)
        reference().save(path)
    assert path.read_bytes() == before
    reference().save(path)
    assert_same(AutoAttackResult.load(path), reference())
