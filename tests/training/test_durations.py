"""Durations: what they mean, in whichever way they are said, and that nonsense is refused in one line."""

import jax
import numpy as np
import pytest

from jaxrd.config import Config
from jaxrd.training import checkpoint, durations, loop
from jaxrd.training.log import read_metrics
from tests.support import assert_input_error

RUN = {"steps": 1000, "batch_size": 32, "epoch": 500}


@pytest.mark.parametrize("value, steps", [
    (1, 1), (500, 500), (500.0, 500), ("500", 500), ("1e3", 1000), ("500 steps", 500), ("1 step", 1), ("500steps", 500),
    ("2 epochs", 31), ("1 epoch", 16), ("0.5 epochs", 8), ("1/2 epoch", 8), ("640 examples", 20), ("1 example", 0),
    ("1e5 Examples ", 3125), (0.05, 50), ("0.05", 50), ("1/20", 50), ("5%", 50), ("0.1 %", 1), ("100%", 1000), (0, 0),
    ("0 epochs", 0)])
def test_a_duration_in_steps(value, steps):
    assert durations.in_steps(value, **RUN) == steps
    said_once = durations.canonical(value)
    assert durations.canonical(said_once) == said_once
    assert durations.in_steps(said_once, **RUN) == steps


def test_what_means_the_same_is_kept_as_the_same():
    for alike in ([500, 500.0, "500", "500 steps"], [0.05, "0.05", "5%", "1/20"], ["2 epochs", "2epoch", " 2.0 EPOCHS "],
                  ["100%", "100.0 %"], ["100000 examples", "1e5 examples"]):
        assert len({(type(durations.canonical(value)), durations.canonical(value)) for value in alike}) == 1
    assert durations.canonical("100%") != durations.canonical(1)  # the whole training is not one step


@pytest.mark.parametrize("value", [
    "", "epochs", "2 weeks", "two epochs", "-1", -0.5, 1.5, "1.5", "1.5 steps", "101%", "-5%", "nan", float("nan"),
    "inf epochs", float("inf"), "1/0", True, None, [1], {"steps": 1}, "2 epochs and 5 steps",
    "5 % epochs", "0x10 steps", "2\nepochs\n1"])
def test_nonsense_is_refused_with_all_that_it_could_be(value):
    assert_input_error(lambda: durations.parse(value), repr(value)[:20], "500 steps", "2 epochs", "100000 examples", "5%")


def test_a_duration_that_depends_on_the_data_asks_for_it():
    for missing in ({}, {"batch_size": 4}):
        assert_input_error(lambda: durations.in_steps("2 epochs", steps=9, **missing), '"2 epochs"', "epoch=")
    assert durations.in_steps("8 examples", steps=9, batch_size=4) == 2


def test_fields_of_a_configuration_keep_what_was_said():
    training = Config.from_dict({
        "training": {"checkpoint_every": "2epochs", "log_every": "100", "keep_every": "10%", "swa_every": "64 examples"},
        "optimizer": {"warmup": "5 epochs"}})
    assert (training.optimizer.warmup, training.training.checkpoint_every, training.training.log_every) == (
        "5 epochs", "2 epochs", 100)
    assert Config.from_dict(training.to_dict()) == training


def intervals(**training):
    return Config.from_dict({"training": {"batch_size": 50, "steps": 200, **training}}).intervals(1000)


def test_intervals_of_a_run():
    assert intervals() == durations.Intervals(log_every=50, checkpoint_every=20, keep_every=None, swa_every=20)
    assert intervals(log_every="500 examples", checkpoint_every="2 epochs", swa_every="10%") == durations.Intervals(
        10, 40, None, 20)
    # Never 0, whatever is short.
    assert intervals(log_every="1 example", checkpoint_every=1e-6, swa_every=1e-6) == durations.Intervals(1, 1, None, 1)
    assert intervals(steps=3).checkpoint_every == 1


@pytest.mark.parametrize("checkpoint_every, keep_every, expected", [
    (20, "2 epochs", 40), (20, 50, 40), (20, 51, 60), (20, 1, 20), ("0.31 epochs", "3 epochs", 60), (None, "50%", 100)])
def test_what_is_kept_for_good_is_something_that_is_saved(checkpoint_every, keep_every, expected):
    found = intervals(checkpoint_every=checkpoint_every, keep_every=keep_every)
    assert found.keep_every == expected and found.keep_every % found.checkpoint_every == 0


@pytest.mark.parametrize("length", [{"epochs": 4, "steps": None}, {"steps": 40}, {"examples": 4000, "steps": None}])
@pytest.mark.parametrize("warmup, fits", [
    ("3 epochs", True), ("39 steps", True), ("3999 examples", True), (0.99, True), ("4 epochs", False), ("40 steps", False),
    ("4000 examples", False), (40, False)])
def test_a_warm_up_is_shorter_than_training_as_far_as_that_is_known(length, warmup, fits):
    values = {"optimizer": {"warmup": warmup}, "training": {"batch_size": 100, **length}}
    known = ("epochs" in length) == ("epochs" in str(warmup))
    if fits or not known:
        assert Config.from_dict(values).optimizer.warmup == durations.canonical(warmup)
    else:
        assert_input_error(lambda: Config.from_dict(values), "config.optimizer.warmup is", "shorter than training")


def test_a_run_logs_checkpoints_keeps_and_warms_up_as_its_durations_say(tiny_config, tmp_path, monkeypatch):
    """With a step that computes nothing: 200 images in batches of 16 are 12.5 steps an epoch."""
    def make_train_step(recipe, mesh):
        return lambda state, teacher_variables, batch: (
            state.replace(step=state.step + 1), {"loss": np.float32(1), "gradient_norm": np.float32(1)})

    monkeypatch.setattr(loop, "make_train_step", make_train_step)
    config = tiny_config(
        data={"selection": "last"},
        optimizer={"schedule": "step", "milestones": (0.9,), "warmup": "1 epoch", "scaling": "linear"},
        training={"steps": None, "examples": 640, "checkpoint_every": "10%", "log_every": "64 examples", "keep": 1,
                  "keep_every": "1 epoch"})
    loop.train(config, tmp_path / "run", devices=jax.devices()[:1])
    entries = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == list(range(4, 41, 4))
    peak = 0.1 * 16 / 128
    warming = [peak * min(entry["step"] / 12, 1) * (0.1 if entry["step"] > 36 else 1) for entry in entries]
    assert [entry["learning_rate"] for entry in entries] == pytest.approx(warming, rel=1e-5)
    assert checkpoint.steps_of(tmp_path / "run") == [12, 24, 36, 40]
