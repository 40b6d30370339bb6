"""A run is a function of its configuration: whatever interrupts it, it ends in the same parameters and the same log."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import textwrap

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrd import models
from jaxrd.distillation.catalogue import BASES
from jaxrd.errors import InputError
from jaxrd.evaluation.evaluate import evaluate
from jaxrd.performance import memory
from jaxrd.training import checkpoint, checks, loop, opening, parallel, validation
from jaxrd.training.log import read_metrics
from tests.support import assert_input_error

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config(tiny_config, tiny_teacher):
    """ARD + IGDM, six steps, a checkpoint after every second; `keep` spares them all, so that tests can go back to any."""
    return tiny_config(
        method={"name": "ard+igdm"}, teacher=str(tiny_teacher), training={"weight_average": 0.9, "keep": 9})


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """The uninterrupted run: (workdir, last state). Read only."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, comparable(train(config, workdir))


def train(config, workdir, devices=1):
    return loop.train(config, workdir, devices=jax.devices()[:devices])


def comparable(state):
    """A state, or the one that a workdir's last checkpoint holds, as host arrays."""
    return jax.tree.map(np.asarray, state.replace(key=jax.random.key_data(state.key)))


def numbers(workdir):
    """The entries of metrics.jsonl without what depends on the clock."""
    clock = ("seconds", "images_per_second", "input_wait")
    return [{name: value for name, value in entry.items() if name not in clock}
            for entry in read_metrics(workdir / "metrics.jsonl")]


def back_to(source, workdir, step):
    """A copy of a run as it stood when it was killed some time after its checkpoint of `step`."""
    shutil.copytree(source, workdir)
    for path in (workdir / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    return workdir


def at_step(monkeypatch, number, act):
    """Makes the loop call `act(state, metrics)` after step `number` of this process and go on with what it returns."""
    make = loop.make_train_step

    def make_train_step(recipe, mesh):
        train_step, calls = make(recipe, mesh), []

        def wrapped(state, *rest):
            calls.append(1)
            state, metrics = train_step(state, *rest)
            return act(state, metrics) if len(calls) == number else (state, metrics)
        return wrapped

    monkeypatch.setattr(loop, "make_train_step", make_train_step)


# What a run leaves.


def test_metrics_hold_every_step_once_and_what_each_was_worth(finished, config):
    entries = read_metrics(finished[0] / "metrics.jsonl")
    training = [entry for entry in entries if "train/loss" in entry]
    assert [entry["step"] for entry in training] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in entries if "train/loss" not in entry] == [2, 4, 6]
    for entry in training:
        assert {"step", "seconds", "train/loss", "train/distillation", "train/igdm", "train/weight/distillation",
                "train/weight/igdm", "train/accuracy/adversarial", "train/accuracy/mirrored", "train/gradient_norm",
                "train/teacher_accuracy/clean", "train/teacher_accuracy/adversarial", "train/teacher_accuracy/mirrored",
                "learning_rate"} == set(entry) - {"images_per_second", "input_wait"}
        assert entry["train/weight/distillation"] == 1
        assert entry["train/weight/igdm"] == pytest.approx(10 * entry["step"] / 6, rel=1e-5)
        # The first step is compiled and therefore not timed.
        assert ("images_per_second" in entry) == ("input_wait" in entry) == (entry["step"] > 1)
        assert 0 <= entry.get("input_wait", 0) <= 1
        expected = entry["train/distillation"] + 10 * entry["step"] / 6 * entry["train/igdm"]
        assert entry["train/loss"] == pytest.approx(expected, rel=1e-4)
        assert entry["learning_rate"] == pytest.approx(0.05 * (1 + np.cos(np.pi * (entry["step"] - 1) / 6)), rel=1e-5)
    for entry in entries:
        if "train/loss" not in entry:
            assert {"step", "validation/clean_accuracy", "validation/pgd_accuracy", "validation/teacher_clean_accuracy",
                    "validation/teacher_pgd_accuracy", "validation/gradient_cosine"} == set(entry)
            assert entry["validation/teacher_pgd_accuracy"] <= entry["validation/teacher_clean_accuracy"] <= 1
            assert 0 < abs(entry["validation/gradient_cosine"]) < 1
            assert 0 <= entry["validation/pgd_accuracy"] <= entry["validation/clean_accuracy"] <= 1
    seconds = [entry["seconds"] for entry in training]
    assert seconds == sorted(seconds)


def test_an_entry_is_the_mean_of_the_steps_since_the_last(config, finished, tiny_config, tmp_path):
    sparse = tiny_config(method={"name": "ard+igdm"}, teacher=config.teacher,
                         training={"weight_average": 0.9, "keep": 9, "log_every": 4, "checkpoint_every": 6})
    train(sparse, tmp_path / "run")
    losses = {entry["step"]: entry["train/loss"] for entry in numbers(finished[0]) if "train/loss" in entry}
    found = {entry["step"]: entry["train/loss"] for entry in numbers(tmp_path / "run") if "train/loss" in entry}
    assert found == pytest.approx({4: np.mean([losses[k] for k in (1, 2, 3, 4)]), 6: np.mean([losses[5], losses[6]])})


def test_the_configuration_and_the_environment_are_complete(finished, config):
    from jaxrd.config import Config

    assert Config.from_dict(json.loads((finished[0] / "config.json").read_text())) == config
    environment = json.loads((finished[0] / "environment.json").read_text())
    assert environment["jax"] == jax.__version__ and environment["numpy"] == np.__version__
    assert {"jaxrd", "flax", "optax", "python", "platform", "devices", "processes", "xla_flags",
            "git_commit"} <= set(environment)
    assert len(environment["devices"]) == len(jax.devices())


def test_the_memory_of_a_step_is_noted(finished):
    memory = json.loads((finished[0] / "environment.json").read_text())["step_memory"]
    assert memory["total"] == memory["temporary"] + memory["arguments"] + memory["outputs"] - memory["aliased"]
    # The state, which is donated, goes in and comes out, and the activations of a batch are there in between.
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(finished[1]))
    assert memory["arguments"] >= state and 0 < memory["aliased"] <= memory["outputs"]
    assert memory["temporary"] > 16 * 8 * 8 * 4 * 4  # one map of the narrowest layer


def test_the_console_says_how_it_goes(tiny_config, tmp_path, capsys):
    train(tiny_config(), tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    assert re.search(r"run: pgd_at, resnet6_w4, seed 0, 6 steps on 1 cpu device\(s\)$", lines[0])
    assert re.fullmatch(
        r"trains on 160 images of \S+train.npz,\S+test.npz; the best checkpoint is chosen on 40 held-out images", lines[1])
    number = r"\d+\.\d{4}"
    progress = [line for line in lines if re.match(
        rf"step [1-6]/6  loss {number} \(cross_entropy \d+\.\d+\)  adversarial \d+\.\d%.*  "
        r"(?:[\d,]+ images/s  ETA |first step, compilation included$)", line)]
    assert len(progress) == 6 and [line.endswith("included") for line in progress] == [True] + 5 * [False]
    assert progress[-1].endswith("ETA 0:00")
    assert "clean" not in progress[0] and re.search(r"clean \d+\.\d% \(validation\)", progress[-1])
    assert sum(bool(re.match(r"step \d/6  validation: clean \S+%, PGD-10 \S+%$", line)) for line in lines) == 3


def test_the_newest_checkpoints_and_the_best_are_kept(tiny_config, tmp_path, monkeypatch):
    accuracy = iter([0.1, 0.6, 0.2, 0.3, 0.5])

    def validate(*_, **__):
        return {"validation/clean_accuracy": 1.0, "validation/pgd_accuracy": next(accuracy)}

    monkeypatch.setattr(loop, "validate", validate)
    train(tiny_config(training={"steps": 10}), tmp_path / "run")
    assert checkpoint.steps_of(tmp_path / "run") == [4, 8, 10]
    assert checkpoint.restore_model(tmp_path / "run", "best")[2]["step"] == 4


def test_validation_is_that_of_the_weights_that_are_kept(finished, config):
    workdir, state = finished
    dataset, _ = opening.open_data(config)
    model, variables, origin = checkpoint.restore_model(workdir, 6)
    assert origin["weights"] == "average"
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, variables), state.average)
    mesh = parallel.data_mesh(jax.devices()[:1])
    teacher, teacher_variables, _ = checkpoint.restore_model(config.teacher)
    expected = validation.validate(
        model, variables, dataset.validation, config.threat.build(), mesh, teacher=teacher,
        teacher_variables=teacher_variables)
    assert len(expected) == 5
    assert expected.items() <= numbers(workdir)[-1].items()


# The same configuration, the same run.


def test_every_step_trains_on_its_own_batch_of_the_seed(tiny_config, tmp_path, monkeypatch):
    seen = []

    def make_train_step(recipe, mesh):
        def train_step(state, teacher_variables, batch):
            seen.append({name: np.asarray(value) for name, value in batch.items()})
            return state.replace(step=state.step + 1), {"loss": np.float32(1), "gradient_norm": np.float32(1)}
        return train_step

    monkeypatch.setattr(loop, "make_train_step", make_train_step)
    config = tiny_config(seed=3, data={"examples": 50})
    train(config, tmp_path / "run")
    _, source = opening.open_data(config)
    assert len(source) == 50 and len(seen) == 6
    for step, batch in enumerate(seen):
        chex.assert_trees_all_equal(batch, source.batch(source.indices(3, step, 16)))


def test_two_runs_are_the_same(config, finished, tmp_path):
    chex.assert_trees_all_equal(comparable(train(config, tmp_path / "run")), finished[1])
    assert numbers(tmp_path / "run") == numbers(finished[0])


@pytest.mark.parametrize("step", [0, 2, 4])
def test_a_resumed_run_is_the_uninterrupted_one(config, finished, tmp_path, capsys, step):
    workdir = back_to(finished[0], tmp_path / "run", step)
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "train/lo')  # a kill in the middle of a line
    state = train(config, workdir)
    assert (f"resumed after step {step} of 6" if step else ", 6 steps on") in capsys.readouterr().out
    chex.assert_trees_all_equal(comparable(state), finished[1])
    assert numbers(workdir) == numbers(finished[0])
    assert checkpoint.steps_of(workdir) == [2, 4, 6]
    seconds = [entry["seconds"] for entry in read_metrics(workdir / "metrics.jsonl") if "seconds" in entry]
    assert seconds == sorted(seconds)


def test_a_run_goes_on_with_other_devices(config, finished, tmp_path):
    workdir = back_to(finished[0], tmp_path / "run", 4)
    state = train(config, workdir, devices=4)
    assert state.step.sharding.num_devices == 4
    for found, expected in zip(numbers(workdir), numbers(finished[0]), strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    chex.assert_trees_all_close(comparable(state), finished[1], rtol=1e-4, atol=1e-5)


def test_a_finished_run_called_again_says_so_and_changes_nothing(config, finished, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    (workdir / "environment.json").write_text('{"jax": "of that day"}\n')

    def contents():
        return {path.relative_to(workdir): path.read_bytes() for path in workdir.rglob("*") if path.is_file()}

    before = contents()
    state = train(config, workdir)
    assert f"{workdir} is finished: step 6 of 6" in capsys.readouterr().out
    chex.assert_trees_all_equal(comparable(state), finished[1])
    assert contents() == before


def test_a_checkpoint_that_a_kill_left_half_saved_is_cleaned_up(config, finished, tmp_path):
    workdir = back_to(finished[0], tmp_path / "run", 4)
    for step in (5, 6):  # one that is saved again, and one that is not
        shutil.copytree(workdir / "checkpoints" / "4", workdir / "checkpoints" / f"{step}.orbax-checkpoint-tmp")
    chex.assert_trees_all_equal(comparable(train(config, workdir)), finished[1])
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4", "6"]


def test_a_resumed_run_keeps_the_teacher_that_it_began_with(config, finished, tiny_teacher, tiny_config, tmp_path):
    # The teacher's newest checkpoint was its first when this student began.
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, teacher)
    later = teacher / "checkpoints" / "200"
    shutil.move(later, tmp_path / "later")
    moved = tiny_config(method={"name": "ard+igdm"}, teacher=str(teacher), training={"weight_average": 0.9, "keep": 9})
    whole = comparable(train(moved, tmp_path / "whole"))
    assert checkpoint.restore_model(tmp_path / "whole")[2]["teacher_step"] == 100

    workdir = back_to(tmp_path / "whole", tmp_path / "run", 2)
    shutil.move(tmp_path / "later", later)
    chex.assert_trees_all_equal(comparable(train(moved, workdir)), whole)
    assert not np.allclose(whole.params["linear"]["kernel"], finished[1].params["linear"]["kernel"], atol=1e-4)

    workdir = back_to(tmp_path / "whole", tmp_path / "lost", 2)
    shutil.rmtree(teacher / "checkpoints" / "100")
    with pytest.raises(InputError, match="begun with step 100 of its teacher .* now holds 200"):
        train(moved, workdir)


# Interruptions.


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", pytest.param("SIGUSR1", marks=pytest.mark.slow)])
def test_a_signal_saves_and_stops_and_the_same_call_goes_on(config, finished, tmp_path, monkeypatch, capsys, name):
    workdir, number = tmp_path / "run", signal.Signals[name]

    def act(state, metrics):
        os.kill(os.getpid(), number)
        return state, metrics

    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt if name == "SIGINT" else SystemExit) as stopped:
        at_step(patch, 3, act)
        train(config, workdir)
    assert name == "SIGINT" or stopped.value.code == 128 + number
    assert f"stopped by {name} after step 3" in capsys.readouterr().out
    assert signal.getsignal(number) == before
    assert checkpoint.steps_of(workdir) == [2, 3]

    chex.assert_trees_all_equal(comparable(train(config, workdir)), finished[1])
    assert numbers(workdir) == numbers(finished[0])
    # The step that was saved on the way out was not validated, and is not the best one.
    assert checkpoint.restore_model(workdir, "best")[2]["step"] != 3


def test_a_signal_in_the_last_step_lets_the_run_finish(tiny_config, tmp_path, monkeypatch):
    def act(state, metrics):
        os.kill(os.getpid(), signal.SIGTERM)
        return state, metrics

    at_step(monkeypatch, 6, act)
    assert int(train(tiny_config(), tmp_path / "run").step) == 6
    assert checkpoint.steps_of(tmp_path / "run")[-1] == 6


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_the_run_and_leaves_the_last_checkpoint(tiny_config, tmp_path, monkeypatch, what):
    config = tiny_config(training={"log_every": 10})  # found when the next checkpoint is due at the latest

    def poison(state, metrics):
        if what == "gradient":
            return state, metrics | {"gradient_norm": jnp.nan * metrics["gradient_norm"]}
        return state.replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params)), metrics

    with monkeypatch.context() as patch, pytest.raises(InputError) as stopped:
        at_step(patch, 3, poison)
        train(config, tmp_path / "run")
    message = str(stopped.value)
    where = {"loss": "loss of step 4", "gradient": "gradient of step 3"}[what]
    assert message.startswith(f"the {where} is nan; step 2 is saved; lower config.optimizer.learning_rate (now 0.1)")
    assert "\n" not in message
    assert checkpoint.steps_of(tmp_path / "run") == [2]
    assert np.isfinite(train(config, tmp_path / "run").params["linear"]["kernel"]).all()


def test_a_loss_that_is_not_finite_before_the_first_checkpoint_says_that_nothing_is_saved(tiny_config, tmp_path):
    config = tiny_config(optimizer={"learning_rate": 1e30})
    with pytest.raises(InputError, match=r"of step [12] is (nan|inf); nothing is saved yet; .*\(now 1e\+30\)"):
        train(config, tmp_path / "run")


KILL = {
    "during training": """
        make = loop.make_train_step
        def make_train_step(*args):
            train_step = make(*args)
            def wrapped(state, *rest):
                if int(state.step) == 4:
                    kill()
                return train_step(state, *rest)
            return wrapped
        loop.make_train_step = make_train_step
        """,
    "during a save": """
        save = checkpoint.Checkpoints.save
        def killed(self, step, *rest):
            save(self, step, *rest)
            if step == 4:
                kill()
        checkpoint.Checkpoints.save = killed
        """,
    "before the first checkpoint": """
        save = checkpoint.Checkpoints.save
        checkpoint.Checkpoints.save = lambda *_: kill()
        """,
}


@pytest.mark.parametrize("moment", [
    "during a save", *(pytest.param(moment, marks=pytest.mark.slow) for moment in KILL if moment != "during a save")])
def test_a_killed_process_loses_at_most_the_work_since_its_last_checkpoint(config, finished, tmp_path, moment):
    workdir = tmp_path / "run"
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    program = textwrap.dedent("""
        import json, os, signal
        import jax
        from jaxrd.config import Config
        from jaxrd.training import checkpoint, loop, parallel
        parallel.enable_compilation_cache()
        def kill():
            os.kill(os.getpid(), signal.SIGKILL)
        """) + textwrap.dedent(KILL[moment]) + textwrap.dedent(f"""
        config = Config.from_dict(json.load(open({str(tmp_path / "config.json")!r})))
        loop.train(config, {str(workdir)!r}, devices=jax.devices()[:1])
        """)
    killed = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    there = sorted(path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    assert there in {"during training": (["2"], ["2", "4"]), "during a save": (["2"],),
                     "before the first checkpoint": ([],)}[moment]

    chex.assert_trees_all_close(comparable(train(config, workdir)), finished[1], rtol=1e-6, atol=1e-6)
    found = numbers(workdir)
    assert [entry["step"] for entry in found] == [entry["step"] for entry in numbers(finished[0])]
    for entry, expected in zip(found, numbers(finished[0]), strict=True):
        assert entry == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4", "6"]


@pytest.mark.slow
def test_the_command_ends_on_sigterm_with_its_status_and_goes_on_when_called_again(tiny_arrays, tmp_path):
    command = [
        sys.executable, "-m", "launch.train", "--config=configs/digits.py:pgd_at,student=resnet6_w4",
        f"--config.data.arrays={tiny_arrays}", "--config.data.examples=None", "--config.training.steps=1000000",
        "--config.training.batch_size=16", "--config.training.log_every=1", f"--workdir={tmp_path / 'run'}"]
    steps = []
    for _ in range(2):
        with subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if re.match(r"step +\d+/1000000  loss", line):
                    process.terminate()
                    break
            out, error = process.communicate(timeout=120)
        assert process.returncode == 128 + signal.SIGTERM
        assert error == ""
        steps.append(int(re.search(r"stopped by SIGTERM after step (\d+);", out)[1]))
        assert checkpoint.steps_of(tmp_path / "run")[-1] == steps[-1]
    assert steps[1] > steps[0] > 0
    logged = [entry["step"] for entry in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert logged == list(range(1, steps[1] + 1))


def environment():
    """For processes of our own: as many devices as here, so that they find the programs that this one has compiled."""
    return os.environ | {"JAX_NUM_CPU_DEVICES": str(len(jax.devices())), "PYTHONPATH": str(ROOT)}


# What a method asks of its teacher and its batches.


def test_negatives_need_a_second_class_in_the_batch(tiny_config, tiny_teacher, tmp_path):
    path = {"name": "path", "path_points": 2, "path_negatives": "batch"}
    config = tiny_config(method=path, teacher=str(tiny_teacher), training={"batch_size": 1, "steps": 2})
    assert_input_error(
        lambda: train(config, tmp_path / "run"), "batch of step 1", "class", "path", "config.training.batch_size",
        "config.method.path_targeted_start=anchor_image")
    anchors = tiny_config(method=path | {"path_targeted_start": "anchor_image"}, teacher=str(tiny_teacher))
    checks.check_batch(anchors.build_method(), np.zeros(8, int), 1)
    checks.check_batch(config.build_method(), np.array([1, 1, 0]), 1)
    from_data = tiny_config(method=path | {"path_negatives": "data"}, teacher=str(tiny_teacher))
    checks.check_batch(from_data.build_method(), np.zeros(8, int), 1)


def test_a_run_that_does_not_fit_leaves_its_directory_to_the_next_attempt(tiny_config, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(memory, "memory_of", lambda device: 2**16)
        for _ in range(2):
            assert_input_error(
                lambda: train(tiny_config(), workdir), "the train step needs", "has 0.1 MiB", "config.training.batch_size")
    smaller = tiny_config(training={"batch_size": 8, "steps": 2, "checkpoint_every": 1})
    train(smaller, workdir)
    assert checkpoint.steps_of(workdir) == [1, 2]

    shutil.rmtree(workdir / "checkpoints" / "2")
    with monkeypatch.context() as patched:
        patched.setattr(memory, "memory_of", lambda device: 2**16)
        assert_input_error(lambda: train(smaller, workdir), "the train step needs")
    assert_input_error(lambda: train(tiny_config(), workdir), "config.training", "choose another --workdir")  # it has begun
    assert int(train(smaller, workdir).step) == 2


def test_a_run_of_a_method_that_is_not_registered_here_is_not_called_damaged(tiny_config, tmp_path):
    config = tiny_config()
    checks.claim(tmp_path, config)
    values = json.loads((tmp_path / "config.json").read_text())
    values["method"]["name"] = "gentle"
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError) as raised:
        checks.check_claim(tmp_path, config)
    assert '"gentle"' in str(raised.value) and "register it" in str(raised.value) and "damaged" not in str(raised.value)


@pytest.mark.parametrize("blocked, what", [
    (lambda logits: jax.lax.stop_gradient(logits), "0 everywhere"), (lambda logits: jnp.round(logits), "0 everywhere"),
    (lambda logits: 0 * logits, "0 everywhere"), (lambda logits: logits * jnp.inf, "nan")])
def test_a_teacher_without_an_input_gradient_is_noticed_before_training(blocked, what, tiny_config, tiny_teacher):
    teacher, variables = models.restore(tiny_teacher)

    def apply(variables, images, train):
        logits, moved = teacher.apply(variables, images, train)
        return blocked(logits), moved

    config = tiny_config(method="adaad", teacher=str(tiny_teacher))
    dataset, source = opening.open_data(config)

    def build(teacher):
        return opening.build_recipe(
            config, dataset, len(source), parallel.data_mesh(jax.devices()[:1]), teacher=teacher)

    assert_input_error(
        lambda: build(dataclasses.replace(teacher, apply=apply)), "config.teacher", str(tiny_teacher), what, "adaad",
        "--config.method.attack=rslad")
    build(teacher)
    # So is one whose gradient is to be matched; path has an option of its own.
    for method, words in (({"name": "ard+direct"}, ["matches its gradients", "without +jvp and +direct"]), (
            {"name": "path", "path_points": 2, "path_inner_loss": "teacher_moving"}, ["path_inner_loss=cross_entropy"])):
        config = tiny_config(method=method, teacher=str(tiny_teacher))
        assert_input_error(lambda: build(dataclasses.replace(teacher, apply=apply)), "config.teacher", *words)
    # An attack that leaves the teacher alone does not mind.
    config = tiny_config(method={"name": "adaad", "attack": "rslad"}, teacher=str(tiny_teacher))
    build(dataclasses.replace(teacher, apply=apply))


@pytest.mark.slow
@pytest.mark.parametrize("module", ["", "+igdm"])
@pytest.mark.parametrize("base", sorted(BASES))
def test_every_method_trains_and_evaluates(base, module, tiny_config, tiny_teacher, tmp_path):
    config = tiny_config(
        method={"name": base + module, "path_points": 2}, teacher=str(tiny_teacher),
        training={"steps": 2, "checkpoint_every": 2})
    train(config, tmp_path / "run")
    record = evaluate(tmp_path / "run", "clean,pgd20", teacher=str(tiny_teacher))
    assert 0 <= record["accuracy"]["pgd20"] <= record["accuracy"]["clean"] <= 1
    assert record["run"]["method"] == base + module
