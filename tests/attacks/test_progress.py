"""What a cascade says while it runs: lines to read later, or a bar to look at, and no nonsense about the time that is left."""

import contextlib
import importlib
import io
import re
import sys
import types

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies
from jax.tree_util import Partial

from jaxrd import ThreatModel, attacks
from jaxrd.attacks import progress as module
from jaxrd.attacks.progress import Progress

cascades = importlib.import_module("jaxrd.attacks.autoattack")  # the name in the package is the function

LINE = re.compile(r"[a-z-]+( \d+/\d+)?: (\d+) of (\d+) points, (\d+) of (\d+) robust so far(, about (\d+:)?\d+:\d\d left)?")


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


class Screen(io.StringIO):
    """A terminal, on which each state of a line ends with a return to its beginning."""

    def isatty(self):
        return True


@contextlib.contextmanager
def terminal():
    """Inside the test's own call: pytest puts a file of its own in place before it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", screen := Screen())
        yield screen


def test_one_line_per_batch_with_the_time_that_is_left_at_most(clock):
    lines = []
    with Progress(lines.append, "apgd-t", 3, 20) as progress:
        progress.begin(0, 12)
        clock.now += 16
        progress.batch(8, 10)  # two seconds each: four points are left here, and ten at most in either of the other runs
        clock.now += 8
        progress.batch(4, 9)
        progress.begin(2, 9)
        clock.now += 10
        progress.batch(8, 7)
        progress.batch(1, 6)
    assert lines == [
        "apgd-t 1/3: 8 of 12 points, 10 of 20 robust so far, about 0:48 left",
        "apgd-t 1/3: 12 of 12 points, 9 of 20 robust so far, about 0:36 left",
        "apgd-t 3/3: 8 of 9 points, 7 of 20 robust so far, about 0:02 left",
        "apgd-t 3/3: 9 of 9 points, 6 of 20 robust so far"]


def test_a_single_run_has_no_number_and_long_times_have_hours(clock):
    lines = []
    with Progress(lines.append, "square", 1, 10000) as progress:
        progress.begin(0, 5000)
        clock.now += 61
        progress.batch(61, 4990)
        clock.now += 1400
        progress.batch(1400, 4000)
    assert lines == ["square: 61 of 5000 points, 4990 of 10000 robust so far, about 1:22:19 left",
                     "square: 1461 of 5000 points, 4000 of 10000 robust so far, about 58:59 left"]


@hypothesis.given(strategies.lists(strategies.lists(strategies.integers(0, 40), max_size=4), min_size=1, max_size=4),
                  strategies.lists(strategies.floats(0, 1e6), min_size=16, max_size=16), strategies.integers(0, 200))
@hypothesis.settings(deadline=None, database=None)
def test_whatever_the_batches_are_the_lines_are_sound(runs, durations, others):
    """No points at all, too."""
    total = 1 + others + max(map(sum, runs))
    lines, clock = [], Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "time", types.SimpleNamespace(perf_counter=clock.perf_counter))
        with Progress(lines.append, "fab-t", len(runs), total) as progress:
            for number, batches in enumerate(runs):
                progress.begin(number, sum(batches))
                for batch, duration in zip(batches, durations):
                    clock.now += duration
                    progress.batch(batch, min(sum(batches), total))
    assert len(lines) == sum(map(len, runs))
    for line in lines:
        found = LINE.fullmatch(line)
        assert found and int(found[2]) <= int(found[3]) <= int(found[5]) == total


def test_nothing_is_said_to_nobody(capsys):
    with Progress(None, "square", 1, 4) as progress:
        progress.begin(0, 4)
        progress.batch(4, 2)
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_there_is_a_bar_instead(monkeypatch):
    lines, bar = [], module.tqdm
    monkeypatch.setattr(module, "tqdm", lambda **options: bar(**options | {"mininterval": 0, "miniters": 1, "ncols": 120}))
    with terminal() as screen, Progress(lines.append, "apgd-t", 2, 20) as progress:
        progress.begin(0, 12)
        progress.batch(8, 10)
        progress.batch(4, 9)
        progress.begin(1, 9)
        progress.batch(9, 5)
    states = screen.getvalue().split("\r")
    assert lines == []
    for state in (["apgd-t 1/2", "8/22", "robust 50.0%"], ["apgd-t 1/2", "12/21", "robust 45.0%"],
                  ["apgd-t 2/2", "21/21", "robust 25.0%"]):
        assert any(all(part in text for part in state) for text in states), (state, states)
    assert states[-1].strip() == "" and states[-2].strip() == ""  # and nothing of it stays


def test_on_a_terminal_nothing_is_shown_to_nobody():
    with terminal() as screen, Progress(None, "square", 1, 4) as progress:
        progress.begin(0, 4)
        progress.batch(4, 2)
    assert screen.getvalue() == ""


# The cascade's own.


WEIGHTS = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
IMAGES = np.random.default_rng(1).uniform(0.2, 0.8, size=(20, 4, 4, 1)).astype(np.float32)
LABELS = np.argmax((IMAGES.reshape(20, -1) - 0.5) @ WEIGHTS, axis=1)
PROBABILITIES = Partial(lambda weights, images: jax.nn.softmax((images.reshape(len(images), -1) - 0.5) @ weights), WEIGHTS)


def attacked(say):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cascades, "_STEPS", 3)
        patch.setattr(cascades, "_TARGETS", 2)
        return attacks.autoattack(jax.random.key(0), PROBABILITIES, IMAGES, LABELS, threat=ThreatModel("linf", 0.02),
                                  version=["apgd-ce", "apgd-t"], batch_size=8, say=say)


def test_a_cascade_says_a_line_per_batch_and_each_flag():
    lines = []
    result = attacked(lines.append)
    flags, batches = lines[:len(result.flags)], lines[len(result.flags):]
    assert result.flags and flags == [f"warning: {flag}" for flag in result.flags]
    found = [LINE.fullmatch(line) for line in batches]
    assert all(found) and [line.split(":")[0] for line in batches[:4]] == ["apgd-ce"] * 3 + ["apgd-t 1/2"]
    assert [int(match[2]) for match in found[:4]] == [8, 16, 20, min(8, int(found[3][3]))]
    robust = [int(match[4]) for match in found]
    assert robust == sorted(robust, reverse=True) and robust[-1] == result.robust.sum() and robust[2] == int(found[3][3])


def test_a_cascade_without_say_is_silent_and_one_on_a_terminal_shows_bars(capsys):
    with terminal() as screen:
        quiet = attacked(None)
    assert screen.getvalue() == "" and capsys.readouterr() == ("", "")
    lines = []
    with terminal() as screen:
        result = attacked(lines.append)
    assert lines == [f"warning: {flag}" for flag in quiet.flags] and lines  # which a bar cannot show
    assert "apgd-ce" in screen.getvalue() and "apgd-t 2/2" in screen.getvalue()
    np.testing.assert_array_equal(result.images, quiet.images)
