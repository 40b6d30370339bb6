"""Whole steps, timed: one alone, as a loop of training sees it, and several side by side."""

import collections
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from jaxrd.performance import memory, timing
from jaxrd.performance.timing import Spread
from jaxrd.performance.workload import Workload

IN_FLIGHT = 2  # steps that training starts before it waits for the first of them


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """What a step took, part by part of the host's loop.

    Attributes:
      whole: from the one step's results to the next one's, each awaited before the next is begun.
      input_wait: of it, waiting for a batch.
      dispatch: of it, until the call of the step returns; where devices work on their own, they go on meanwhile.
      between: of it, what else the host does between two steps.
      in_training: from the one step's results to the next one's with two in flight, as training has them.
    """

    whole: Spread
    input_wait: Spread
    dispatch: Spread
    between: Spread
    in_training: Spread


def step_times(workload: Workload, step: Callable, repeats: int | None = None) -> StepTimes:
    """Returns what the compiled step of a workload takes.

    Args:
      workload: whose step it is.
      step: compiled.
      repeats: how many steps of either kind; None for as many as fit into a time, see `timing.repeats_within`.
    """
    state, teacher = workload.state(), workload.teacher_variables
    taken = collections.defaultdict(list)
    with workload.feeder() as batches:
        def one():
            nonlocal state
            before, waited = time.perf_counter(), batches.waited
            batch = next(batches)
            called = time.perf_counter()
            state, metrics = step(state, teacher, batch)
            returned = time.perf_counter()
            jax.block_until_ready((state, metrics))
            waited = batches.waited - waited
            return {"whole": time.perf_counter() - before, "input_wait": waited, "dispatch": returned - called,
                    "between": called - before - waited}

        one()
        first = one()  # the first one warms caches of all kinds
        if repeats is None:
            repeats = timing.repeats_within(first["whole"])
        for _ in range(repeats):
            for name, seconds in one().items():
                taken[name].append(seconds)

        pending, done = collections.deque(), []
        # XLA's in-process collectives deadlock where several steps are in flight on fake devices.
        in_flight = 0 if workload.mesh.size > 1 and jax.default_backend() == "cpu" else IN_FLIGHT
        for _ in range(repeats + 1 + in_flight):
            state, metrics = step(state, teacher, next(batches))
            pending.append(metrics)
            if len(pending) > in_flight:
                jax.block_until_ready(pending.popleft())
                done.append(time.perf_counter())
        jax.block_until_ready((state, list(pending)))
    return StepTimes(**{name: Spread.of(seconds) for name, seconds in taken.items()}, in_training=Spread.of(np.diff(done)))


@dataclasses.dataclass(frozen=True)
class SideBySide:
    """One step of several that were timed in turn.

    Attributes:
      seconds: of a step.
      images_per_second: at the median.
      planned_memory: bytes on each device, see `memory.planned`; None where the backend does not say.
      compilation_seconds: of the step.
    """

    seconds: Spread
    images_per_second: float
    planned_memory: dict[str, int] | None
    compilation_seconds: float

    def to_dict(self) -> dict:
        """Returns it with units in its keys, for JSON."""
        memory = self.planned_memory or {}
        return self.seconds.to_dict() | {
            "images_per_second": self.images_per_second, "compilation_seconds": self.compilation_seconds,
            **{f"planned_{name}_bytes": size for name, size in memory.items()}}


def side_by_side(workloads: Mapping[str, Workload], repeats: int | None = None) -> dict[str, SideBySide]:
    """Returns how long the steps of several workloads take, timed in turn, each on its first batch.

    All are compiled, and refused where one does not fit, before the first is run.
    """
    compiled = {name: workload.compile() for name, workload in workloads.items()}

    def runner(name):
        workload = workloads[name]
        state, batch = workload.state(), workload.batch()

        def run():
            nonlocal state
            state, metrics = compiled[name][0](state, workload.teacher_variables, batch)
            return state, metrics

        return run

    seconds = timing.in_turn({name: runner(name) for name in workloads}, repeats)
    return {name: SideBySide(seconds[name], workload.batch_size / seconds[name].median, memory.planned(compiled[name][0]),
                             compiled[name][1])
            for name, workload in workloads.items()}


@dataclasses.dataclass(frozen=True)
class Line:
    """A straight line through points, by least squares.

    Attributes:
      slope: per unit.
      intercept: at 0.
      largest_deviation: of a point from it, in parts of the point.
    """

    slope: float
    intercept: float
    largest_deviation: float


def line(places: Sequence[float], values: Sequence[float]) -> Line | None:
    """Returns the line through (place, value); None of fewer than two places."""
    if len(set(places)) < 2:
        return None
    slope, intercept = np.polyfit(places, values, 1)
    fitted = slope * np.asarray(places) + intercept
    return Line(float(slope), float(intercept), float(np.max(np.abs(fitted - values) / np.abs(values))))
