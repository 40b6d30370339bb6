"""An evaluation by several processes is that by one: every process returns it, whatever its share of the points.

Threads stand for processes where only what they tell each other matters; two real ones, with two devices each, do all at once.
"""

import dataclasses
import functools
import importlib
import json
import pathlib
import shutil
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from jaxrd import InputError
from jaxrd.attacks import AutoAttackResult
from jaxrd.attacks.records import Records
from jaxrd.data import from_arrays
from jaxrd.evaluation import robustness, shares
from jaxrd.evaluation.evaluate import evaluate
from jaxrd.evaluation.robustness import Cascade, Protocol, run_attack
from jaxrd.models import Model
from jaxrd.threat import ThreatModel
from jaxrd.training import checkpoint, parallel, processes
from tests.support import assert_input_error

cascades = importlib.import_module("jaxrd.attacks.autoattack")  # the name in the package is the function

pytestmark = pytest.mark.usefixtures("quick_compilation")

CLEAN = robustness.PROTOCOLS["clean"]
ONE_RUN = Protocol(("cross_entropy",), 3, 0.5, "uniform")
WORST = Protocol(("cross_entropy", "margin"), 3, 0.5, "uniform", restarts=2)
CASCADE = Cascade(("apgd-t", "square"), "")
CONSTANTS = {"_STEPS": 3, "_QUERIES": 10, "_TARGETS": 2}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in CONSTANTS.items():
        monkeypatch.setattr(cascades, name, value)


# Threads as processes.

N, SHAPE, CLASSES = 13, (4, 4, 1), 4
GENERATOR = np.random.default_rng(0)
WEIGHTS = GENERATOR.normal(size=(16, CLASSES)).astype(np.float32)
IMAGES = GENERATOR.uniform(0.3, 0.7, size=(N, *SHAPE)).astype(np.float32)
IMAGES[4::4, 0, 0, 0] = 0.9  # where the model below has no gradient: in some shares more than in others
LABELS = np.argmax((IMAGES.reshape(N, -1) - 0.5) @ WEIGHTS, axis=1).astype(np.int32)
LABELS[5] = (LABELS[5] + 1) % CLASSES
SOURCE = from_arrays(IMAGES, LABELS, classes=CLASSES)
THREAT = ThreatModel("linf", 0.02)


def forward(variables, images, train):
    flat = images.reshape(len(images), -1) - 0.5
    logits = flat @ variables["params"]
    logits = jax.numpy.where(flat[:, :1] > 0.3, jax.lax.stop_gradient(logits), logits)
    return jax.numpy.where(flat[:, :1] > 0.45, np.nan, logits), variables["batch_stats"]


MODEL = Model("linear", CLASSES, SHAPE, init=lambda key: {}, apply=forward, specification={})
VARIABLES = {"params": WEIGHTS, "batch_stats": {}}


class Crew:
    """Threads that take each other for processes of one run."""

    def __init__(self, count, monkeypatch):
        self.count, self.own = count, threading.local()
        self.barrier, self.slots = threading.Barrier(count, timeout=100), [None] * count
        monkeypatch.setattr(jax, "process_count", lambda: count)
        monkeypatch.setattr(jax, "process_index", lambda: self.own.index)
        monkeypatch.setattr(processes, "gather", self.gather)
        monkeypatch.setattr(shares, "local_mesh", lambda mesh: mesh)  # which has nobody else's devices

    def gather(self, values):
        self.slots[self.own.index] = np.asarray(values)
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        assert len({(value.shape, value.dtype) for value in found}) == 1  # as real processes need it
        return np.stack(found)

    def __call__(self, work):
        """Returns what `work(index)` returns, or the exception that it raises, of each."""
        results = [None] * self.count

        def run(index):
            self.own.index = index
            try:
                results[index] = work(index)
            except Exception as error:
                results[index] = error
                if not isinstance(error, InputError):
                    self.barrier.abort()

        threads = [threading.Thread(target=run, args=(index,)) for index in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, InputError):
                raise result
        return results


def attack(protocol, source=SOURCE, **options):
    return run_attack(MODEL, VARIABLES, source, protocol, THREAT, mesh=parallel.data_mesh(jax.devices()[:1]), **options)


@functools.cache
def alone(protocol):
    return attack(protocol, batch_size=3)


def assert_same(found, expected, atol=1e-6):
    assert found.accuracy == expected.accuracy
    np.testing.assert_array_equal(found.robust, expected.robust)
    np.testing.assert_allclose(found.images, expected.images, atol=atol)
    if expected.cascade is not None:
        for field in dataclasses.fields(AutoAttackResult):
            value, wanted = getattr(found.cascade, field.name), getattr(expected.cascade, field.name)
            if field.name in ("images", "distances"):
                np.testing.assert_allclose(value, wanted, atol=atol)
            elif isinstance(wanted, np.ndarray):
                assert value.dtype == wanted.dtype
                np.testing.assert_array_equal(value, wanted, field.name)
            elif field.name == "metadata":  # has logits, which are rounded
                assert {**value, "logits": None} == {**wanted, "logits": None}
            elif field.name == "seconds":
                assert value.keys() == wanted.keys()
            else:
                assert value == wanted, field.name


@pytest.mark.parametrize("protocol", [CLEAN, ONE_RUN, WORST, CASCADE], ids=["clean", "one run", "worst case", "cascade"])
@pytest.mark.parametrize("count", [2, N + 2])
def test_every_process_returns_what_one_finds_alone(protocol, count, monkeypatch):
    """Also where some have no point at all."""
    expected = alone(protocol)
    assert 0 < expected.accuracy < 1
    if protocol is CASCADE:  # whether it is raised depends on the share of all points, which is none of a process's
        assert any(flag.startswith("gradients") for flag in expected.cascade.flags)
        assert {-1, 0, 1, 2} == set(expected.cascade.attack_index)
    for found in Crew(count, monkeypatch)(lambda _: attack(protocol, batch_size=3)):
        assert_same(found, expected)


def test_images_are_not_sent_where_they_are_not_kept(monkeypatch):
    crew = Crew(3, monkeypatch)
    sent, gather = [], crew.gather
    monkeypatch.setattr(processes, "gather", lambda values: sent.append(values.size) or gather(values))
    assert all(found.images is None for found in crew(lambda _: attack(ONE_RUN, keep_images=False)))
    assert max(sent) <= 1000  # the bytes of a message


def test_large_arrays_travel_in_pieces(monkeypatch):
    values = GENERATOR.normal(size=(N, 5, 7))  # float64, which stays
    monkeypatch.setattr(shares, "_AT_ONCE", 2 * 5 * 7 * 8)
    crew = Crew(2, monkeypatch)
    sent, gather = [], crew.gather
    monkeypatch.setattr(processes, "gather", lambda part: sent.append(part.size) or gather(part))

    def work(index):
        own = np.full_like(values, np.nan)
        own[index::2] = values[index::2]
        return shares.complete(own)

    for found in crew(work):
        np.testing.assert_array_equal(found, values)
    assert set(sent) == {2 * 5 * 7 * 8} and len(sent) == 2 * 4


@pytest.mark.parametrize("protocol", [CLEAN, ONE_RUN, CASCADE])
def test_logits_that_are_not_finite_in_one_process_end_all(protocol, monkeypatch):
    images = IMAGES.copy()
    images[1, 0, 0, 0] = 1.0
    source = dataclasses.replace(SOURCE, images=images)
    results = Crew(3, monkeypatch)(lambda _: attack(protocol, source, batch_size=3))
    assert {type(error) for error in results} == {processes.SharedInputError}
    message, = {str(error) for error in results}
    assert message.startswith("process 1: ") and "not finite" in message and "(model linear)" in message


def test_what_the_main_process_reads_is_what_all_go_by(monkeypatch):
    read = {"a": [1, 2.5, None, "ß" * 3000], "b": {}}
    assert Crew(3, monkeypatch)(lambda index: processes.from_main(lambda: read if index == 0 else 1 / 0)) == [read] * 3

    def refuse():
        raise InputError("the file is damaged")

    for error in Crew(3, monkeypatch)(lambda _: processes.from_main(refuse)):
        assert isinstance(error, InputError) and "the file is damaged" in str(error)


# Records that any number of processes share.


class Killed(Exception):
    """Stands for whatever ends a process."""


def killed_after(stage, monkeypatch):
    """Has every process die when it has put its first batch after `stage` on record."""
    add = Records.add

    def dying(records, record):
        add(records, record)
        if record.stage != stage:
            raise Killed

    return monkeypatch.setattr(Records, "add", dying)


def attacked_points(directory):
    """{(stage, run): points}, of all records."""
    points = {}
    for path in pathlib.Path(directory).glob("*.npz"):
        if path.stem != "result":
            with np.load(path) as record:
                points.setdefault((str(record["stage"]), int(record["run"])), []).extend(record["indices"].tolist())
    return points


def run_by(count, call):
    """Runs `call()` as so many processes and returns what each returns; an exception of one is raised."""
    with pytest.MonkeyPatch.context() as patch:
        if count == 1:
            return [call()]
        return Crew(count, patch)(lambda _: call())


@pytest.mark.parametrize("before, after", [(2, 2), (2, 1), (1, 2), (2, 3)])
def test_a_killed_cascade_goes_on_in_any_number_of_processes(before, after, tmp_path):
    def call():
        return attack(CASCADE, batch_size=3, resume=tmp_path / "records")

    with pytest.MonkeyPatch.context() as patch, pytest.raises((Killed, threading.BrokenBarrierError)):
        killed_after("apgd-t", patch)
        run_by(before, call)
    known = attacked_points(tmp_path / "records")
    assert known.keys() == {("apgd-t", 0), ("apgd-t", 1), ("square", 0)}
    for found in run_by(after, call):
        assert_same(found, alone(CASCADE))
    finished = attacked_points(tmp_path / "records")
    for run, points in finished.items():
        assert len(set(points)) == len(points), run  # none twice, whoever attacked it
        assert set(known.get(run, [])) <= set(points)
    for found in run_by(3, call):  # all of it is on record, and costs are counted once
        assert_same(found, alone(CASCADE))
    assert attacked_points(tmp_path / "records") == finished


def test_processes_that_begin_at_once_share_the_directory(tmp_path):
    for found in run_by(3, lambda: attack(CASCADE, batch_size=3, resume=tmp_path / "records")):
        assert_same(found, alone(CASCADE))
    names = {path.name for path in (tmp_path / "records").iterdir()}
    assert "run.json" in names
    assert {name[:-len("-000001.npz")] for name in names if name.endswith(".npz")} == {"process-0", "process-1", "process-2"}
    other = dataclasses.replace(SOURCE, labels=(LABELS + 1) % CLASSES)
    for error in run_by(2, lambda: attack(CASCADE, source=other, resume=tmp_path / "records")):
        assert_input_error(functools.partial(_raise, error), "another data", "delete it")


def _raise(error):
    raise error


# Two processes.

STRONG = Protocol(("cross_entropy", "margin"), 20, 0.25, "uniform", restarts=2)  # the steps of pgd20

_PROCESS = """
import sys
import jax
process, port = map(int, sys.argv[1:3])
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_disable_most_optimizations", True)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
from tests.evaluation import test_shares
test_shares.as_a_process(*sys.argv[3:])
"""


@jax.default_matmul_precision("highest")  # as `evaluate` has it: what is compiled for one serves the other
def direct(model, variables, teacher, teacher_variables, source, mesh):
    """What validation in training and more of its kind call, with variables that lie on `mesh`."""
    attacked = functools.partial(run_attack, model, variables, source, threat=ThreatModel("linf", 0.1), mesh=mesh)
    return {
        "clean": attacked(protocol=CLEAN), "pgd20": attacked(protocol=robustness.PROTOCOLS["pgd20"]),
        "strong": attacked(protocol=STRONG), "fast": attacked(protocol=Cascade("fast", "")),
    }, robustness.gradient_alignment(model, variables, teacher, teacher_variables, source, mesh=mesh)


def divided(variables, mesh):
    """As the weight average may lie: the first axis split where the devices can share it."""
    def lies(leaf):
        return parallel.sharded(mesh) if leaf.ndim and leaf.shape[0] % mesh.size == 0 else parallel.replicated(mesh)

    return jax.tree.map(lambda leaf: jax.device_put(leaf, lies(leaf)), variables)


def as_a_process(teacher_directory, workdir, killed_directory, arrays, out):
    """What each of the two processes does; pytest's own process is compared with."""
    for name, value in CONSTANTS.items():
        setattr(cascades, name, value)
    process, mesh, found = jax.process_index(), parallel.data_mesh(), {}
    source, model, variables, teacher, teacher_variables = opened(teacher_directory, workdir, arrays)
    variables, teacher_variables = jax.tree.map(np.asarray, (variables, teacher_variables))
    replicated = jax.device_put((variables, teacher_variables), parallel.replicated(mesh))
    assert not jax.tree.leaves(replicated)[0].is_fully_addressable
    results, found["alignment"] = direct(model, replicated[0], teacher, replicated[1], source, mesh)
    for name, result in results.items():
        np.savez(f"{out}/{name}-{process}.npz", robust=result.robust, images=result.images)
    found["fast"] = summary(results["fast"])

    split = divided(variables, mesh)
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(split))
    found["divided"] = run_attack(model, split, source, CLEAN, THREAT, mesh=mesh, keep_images=False).robust.tolist()
    found["predicted"] = robustness.predictions(model, split, robustness.float_images(source.images)).tolist()
    one = dataclasses.replace(source, images=source.images[:1], labels=source.labels[:1])
    found["one"] = run_attack(model, split, one, CLEAN, THREAT, mesh=mesh).robust.tolist()
    images = robustness.float_images(source.images)
    images[1] = np.nan  # of process 1
    try:
        run_attack(model, replicated[0], dataclasses.replace(source, images=images), CLEAN, THREAT, mesh=mesh)
    except InputError as error:
        found["error"] = str(error)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_after("apgd-ce", patch)
        evaluate(killed_directory, "fast", curve="none", say=lambda line: None)
    lines, again, add = [], [], Records.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Records, "add", lambda records, record: again.append(record.stage) or add(records, record))
        evaluate(killed_directory, "fast", curve="none", say=lambda line: None)
    found["again"] = again
    found["evaluated"] = evaluate(workdir, "clean,pgd20,fast", curve="pgd20", say=lines.append)
    found["other"] = evaluate(workdir, data=arrays.split(",")[0], examples=40, say=lines.append)
    found["on record"] = evaluate(workdir, data=arrays.split(",")[0], examples=40, say=lines.append)
    found["lines"] = lines
    try:
        evaluate(f"{workdir}-missing", "clean", say=lines.append)
    except InputError as error:
        found["missing"] = str(error)
    print(json.dumps(found))


def opened(teacher_directory, workdir, arrays):
    with np.load(arrays.split(",")[1]) as test:
        source = from_arrays(test["images"], test["labels"], classes=10)
    model, variables, _ = checkpoint.restore_model(workdir)
    teacher, teacher_variables, _ = checkpoint.restore_model(teacher_directory, 100)
    return source, model, variables, teacher, teacher_variables


def summary(result):
    cascade = result.cascade
    return json.loads(json.dumps([
        cascade.per_attack_accuracy, cascade.flags, cascade.passes, cascade.zero_gradients, cascade.attack_index.tolist(),
        cascade.rescored_accuracy, cascade.version]))


@pytest.fixture(scope="module")
def ran(tiny_teacher, tiny_arrays, tmp_path_factory):
    """(directory, what each of two processes printed, each one's stderr)."""
    directory = tmp_path_factory.mktemp("processes")
    for name in ("run", "killed"):
        shutil.copytree(tiny_teacher, directory / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, str(process), str(port), str(tiny_teacher), str(directory / "run"),
             str(directory / "killed"), tiny_arrays, str(directory)],
            cwd=pathlib.Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for process in range(2)]
    try:
        for process in running:
            process.wait(timeout=300)
    except subprocess.TimeoutExpired:
        for process in running:
            process.kill()
    told = [process.communicate() for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(err[-3000:] for _, err in told)
    return directory, [json.loads(out.splitlines()[-1]) for out, _ in told]


def test_two_processes_validate_as_one(ran, tiny_teacher, tiny_arrays):
    directory, found = ran
    source, model, variables, teacher, teacher_variables = opened(tiny_teacher, directory / "run", tiny_arrays)
    mesh = parallel.data_mesh(jax.devices()[:1])
    expected, alignment = direct(model, variables, teacher, teacher_variables, source, mesh)
    assert 0 < expected["strong"].accuracy <= expected["pgd20"].accuracy < 1 and 0 < expected["fast"].accuracy < 1
    for process in range(2):
        for name, result in expected.items():
            with np.load(directory / f"{name}-{process}.npz") as file:
                np.testing.assert_array_equal(file["robust"], result.robust, name)
                np.testing.assert_allclose(file["images"], result.images, atol=1e-6, err_msg=name)
        for name in ("gradient_distance", "gradient_cosine"):
            assert found[process]["alignment"][name] == pytest.approx(alignment[name], rel=1e-5)
        assert found[process]["fast"] == summary(expected["fast"])
        assert found[process]["divided"] == expected["clean"].robust.tolist()
        assert (np.array(found[process]["predicted"]) == source.labels).tolist() == expected["clean"].robust.tolist()
        assert found[process]["one"] == expected["clean"].robust[:1].tolist()
        assert found[process]["error"].startswith("process 1: ") and "not finite" in found[process]["error"]
        assert found[process]["missing"].startswith(f"{directory / 'run'}-missing: no such run directory")
    assert found[0]["alignment"] == found[1]["alignment"]


def test_two_processes_evaluate_a_run_directory_as_one(ran, tiny_teacher, tmp_path):
    directory, found = ran
    shutil.copytree(tiny_teacher, tmp_path / "run")
    expected = evaluate(tmp_path / "run", "clean,pgd20,fast", devices=jax.devices()[:1], say=lambda line: None)
    written = json.loads((directory / "run" / "evaluation.json").read_text())
    assert written["accuracy"] == expected["accuracy"] and written["robustness_curve"] == expected["robustness_curve"]
    for name in ("stages", "flags", "passes", "zero_gradients", "rescored_accuracy", "file"):
        assert written["cascades"]["fast"][name] == expected["cascades"]["fast"][name]
    file = expected["cascades"]["fast"]["file"]
    result, own = (AutoAttackResult.load(path / "run" / file) for path in (directory, tmp_path))
    np.testing.assert_array_equal(result.attack_index, own.attack_index)
    with np.load(directory / "run/evaluation/gallery.npz") as gallery, np.load(tmp_path / "run/evaluation/gallery.npz") as own:
        for name in ("images", "adversarial", "adversarial_prediction"):
            np.testing.assert_allclose(gallery[name], own[name], atol=1e-6)
    other, = found[0]["other"]
    assert written["other_data"][other]["accuracy"] == found[0]["other"][other]["accuracy"]
    assert found[0]["evaluated"] == found[1]["evaluated"] == {name: written[name] for name in found[0]["evaluated"]}
    assert found[0]["other"] == found[1]["other"] and found[0]["on record"] == found[1]["on record"]
    assert found[1]["lines"] == [] and found[0]["lines"][-1].endswith("(on record)")
    assert len([line for line in found[0]["lines"] if " pgd20 " in line and "%" in line]) == 3


def test_two_killed_processes_go_on_after_what_each_had_finished(ran):
    directory, found = ran
    assert all(process["again"] and "apgd-ce" not in process["again"] for process in found)
    evaluation = json.loads((directory / "killed" / "evaluation.json").read_text())
    assert evaluation["accuracy"]["fast"] == found[0]["evaluated"]["accuracy"]["fast"]
    assert evaluation["cascades"]["fast"]["passes"] == found[0]["evaluated"]["cascades"]["fast"]["passes"]
