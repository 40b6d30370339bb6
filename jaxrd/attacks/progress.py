"""What a cascade says while it runs: a bar for each attack on a terminal, one line per batch elsewhere."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm


class Progress:
    """The progress of one attack over its runs (targets, restarts).

    Args:
      say: is given the lines; None: neither lines nor a bar.
      name: of the attack.
      runs: number of its runs.
      total: number of points evaluated, of which the robust ones are a part.
    """

    def __init__(self, say: Callable[[str], None] | None, name: str, runs: int, total: int):
        self._say, self._name, self._runs, self._total = say, name, runs, total
        self._bar = tqdm(desc=name, unit=" points", leave=False, disable=not (say and sys.stderr.isatty()))
        self._began, self._done, self._run, self._left, self._size = time.perf_counter(), 0, 0, 0, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()

    def begin(self, run: int, points: int) -> None:
        """A run of the attack begins on so many points."""
        self._run, self._left, self._size = run, points, points
        self._bar.total = self._bar.n + points * (self._runs - run)
        self._bar.set_description(self._title())

    def batch(self, points: int, robust: int, recorded: bool = False) -> None:
        """A batch of so many points is finished, or was `recorded` earlier; so many points of all are robust so far."""
        self._left -= points
        if recorded:  # says nothing about the pace
            self._began = time.perf_counter()
        else:
            self._done += points
        ahead = self._left + (self._runs - self._run - 1) * robust  # at most: each run loses some
        if not self._bar.disable:
            self._bar.total = self._bar.n + points + ahead
            self._bar.set_postfix_str(f"{self._left} points left in this run, robust {robust / self._total:.1%}", refresh=False)
            self._bar.update(points)
        elif self._say:
            seconds = 0.0 if recorded else ahead * (time.perf_counter() - self._began) / max(self._done, 1)
            self._say(f"{self._title()}: {self._size - self._left} of {self._size} points, "
                      f"{robust} of {self._total} robust so far" + (
                          ", on record" if recorded else f", about {duration(seconds)} left" if ahead else ""))

    def _title(self) -> str:
        return self._name + (f" {self._run + 1}/{self._runs}" if self._runs > 1 else "")


def duration(seconds: float) -> str:
    """Returns seconds as minutes:seconds, or hours:minutes:seconds."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
