"""Which weights a stochastic weight average of a run takes, and how far it moves towards them (see `swa`)."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxrd.config import Config

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Snapshots:
    """The steps whose weights are averaged, all with one weight: first, first + every, first + 2 every, ...

    Attributes:
      first: the first of them, at least 1.
      every: steps from one to the next.
    """

    first: int
    every: int

    @classmethod
    def of(cls, config: Config, train_examples: int) -> "Snapshots | None":
        """Returns those of a configuration on so many images, or None where it averages none in this way."""
        if config.training.swa_start is None:
            return None
        return cls.until(config.steps(train_examples), config.training.swa_start, config.intervals(train_examples).swa_every)

    @classmethod
    def until(cls, steps: int, start: float, every: int) -> "Snapshots":
        """Returns the steps from `start` on, counted back from the last so that the weights training ends with are among them.

        Args:
          steps: length of training.
          start: fraction of training, in (0, 1].
          every: steps from one to the next, at least 1.
        """
        earliest = max(1, round(start * steps))
        return cls(steps - (steps - earliest) // every * every, every)

    def rate(self, step: Array) -> Array:
        """Returns how far the average moves towards the weights after `step` (1 is the first): 1/k at the k-th that it takes.

        Before the first it is 1, so that the average is the newest weights until then, and between two of them 0.
        """
        taken = (step - self.first) // self.every + 1
        due = (step - self.first) % self.every == 0
        return jnp.where(step < self.first, 1.0, jnp.where(due, 1.0 / jnp.maximum(taken, 1), 0.0))
