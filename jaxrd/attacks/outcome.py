"""What a cascade came to, point by point and stage by stage, before it is the result of all points.

Several processes may each attack a part of the points. Their outcomes, put together, are the outcome that one process has, so
everything that is a share of all points (accuracies, flags) is made of the whole and never of a part.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Tally:
    """What a stage took: points attacked, counted for each run, passes in images, points without a gradient, wall time."""

    points: int = 0
    forwards: int = 0
    backwards: int = 0
    zero_gradients: int = 0
    seconds: float = 0.0

    def add(self, record) -> None:
        """Adds a batch, a `records.Record`."""
        self.points += len(record.indices)
        self.forwards += record.forwards
        self.backwards += record.backwards
        self.zero_gradients += record.zero_gradients
        self.seconds += record.seconds

    @classmethod
    def of_all(cls, tallies: list["Tally"]) -> "Tally":
        """Returns what processes that worked at the same time took together: the sums, and the longest time."""
        return cls(*(sum(getattr(tally, name) for tally in tallies)
                     for name in ("points", "forwards", "backwards", "zero_gradients")), max(t.seconds for t in tallies))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a cascade came to on `rows` of the n points; the arrays hold nothing of the other points.

    Attributes:
      rows: [k] int, the points that were attacked.
      images: [n, h, w, c] float32, adversarial where one was found, else the clean ones.
      clean_correct: [n] bool.
      attack_index: [n] int, the place of the stage that broke the point, 0 where it was wrong already; -1: robust.
      rescored: [n] bool, whether `images` are classified correctly in a pass of their own.
      tallies: stage -> what it took; "clean" first.
      flags: what was doubtful before the attacks, of the network and of all points.
      metadata: see `AutoAttackResult`.
    """

    rows: np.ndarray
    images: np.ndarray
    clean_correct: np.ndarray
    attack_index: np.ndarray
    rescored: np.ndarray
    tallies: dict[str, Tally]
    flags: list[str]
    metadata: dict

    @property
    def robust(self) -> np.ndarray:
        return self.attack_index == -1

    @property
    def accuracy(self) -> dict[str, float]:
        """Stage -> accuracy after it; of an outcome that holds all points."""
        later = (np.where(self.robust, len(self.tallies), self.attack_index) > place for place in range(len(self.tallies)))
        return {stage: float(np.mean(left)) for stage, left in zip(self.tallies, later)}
