"""Seconds of calls, timed in turn, so that what disturbs one disturbs all; the median and the quartiles count."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxrd import compilation

SECONDS = 20.0  # that a comparison may take where nobody says how often to repeat
LEAST, MOST = 5, 30  # repetitions then


@dataclasses.dataclass(frozen=True)
class Spread:
    """What repetitions took.

    Attributes:
      median, lower, upper: the median and the quartiles, in seconds.
      repeats: how many there were.
    """

    median: float
    lower: float
    upper: float
    repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Spread":
        lower, median, upper = (float(value) for value in np.quantile(seconds, (0.25, 0.5, 0.75)))
        return cls(median, lower, upper, len(seconds))

    def to_dict(self) -> dict[str, float]:
        """Returns it with units in its keys, for JSON."""
        return {"median_seconds": self.median, "lower_quartile_seconds": self.lower, "upper_quartile_seconds": self.upper,
                "repeats": self.repeats}


def compiled(function: Callable, *arguments: Any) -> Callable:
    """Returns a part of a step, compiled as the step is, for arguments like these."""
    return jax.jit(function, compiler_options=compilation.options()).lower(*arguments).compile()


def in_turn(
    calls: Mapping[str, Callable[[], Any]], repeats: int | None = None, seconds: float = SECONDS,
) -> dict[str, Spread]:
    """Returns how long each call takes until all that it gives is there, over as many turns; a first turn is not timed.

    Args:
      calls: functions by name, each called once in a turn.
      repeats: how many turns; None for as many as fit into `seconds`, 5 at least and 30 at most.
      seconds: see `repeats`.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    began, turns = time.perf_counter(), 0
    while repeats is None or turns < repeats:
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            taken[name].append(time.perf_counter() - start)
        turns += 1
        if repeats is None:
            repeats = repeats_within(time.perf_counter() - began, seconds)
    return {name: Spread.of(values) for name, values in taken.items()}


def repeats_within(one: float, seconds: float = SECONDS) -> int:
    """Returns how many repetitions of `one` second fit into `seconds`, 5 at least and 30 at most."""
    return int(np.clip(seconds / max(one, 1e-9), LEAST, MOST))
