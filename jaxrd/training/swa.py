"""Stochastic weight averaging in a run: the BatchNorm statistics of the averaged weights.

Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization"; with adversarial training Chen et
al. 2021, "Robust Overfitting may be Mitigated by Properly Learned Smoothening". Which weights are averaged: `snapshots`. The
average of a finished run's checkpoints is `models.average_weights`.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jaxrd import models
from jaxrd.config import Config
from jaxrd.data.source import Source
from jaxrd.training import step as steps
from jaxrd.training.feeding import Feeder
from jaxrd.training.state import TrainState

Array = jax.Array

BATCHES = 50  # of the training data, at most, from which statistics are estimated

# Folded into the run's key for these batches: no step of training, whose keys are made likewise.
_STATISTICS = 2**31 - 1


def reestimate(
    recipe: steps.Recipe, state: TrainState, teacher_variables: dict | None, source: Source, config: Config,
    mesh: jax.sharding.Mesh, *, batch_size: int | None = None,
) -> TrainState:
    """Returns the state with the BatchNorm statistics of its stochastic weight average measured anew.

    Those of an average are not the average of theirs. They are the mean over at most `BATCHES` batches, or one epoch, of the
    statistics in those forwards that move the running statistics in training: of its augmented images under its own attack on
    the averaged weights. `torch.optim.swa_utils.update_bn` likewise takes what the training forwards, which without an attack
    are clean images; on an adversarially trained student, clean ones cost robust accuracy (measured: README).

    The attack normalises as in training, with the running statistics of the newest weights for those that are not there yet.
    What was estimated before is not read, so that it does not matter how often this is done on the way. Of a student with
    several sets of BatchNorm it is set 0, which is used at test.

    Args:
      recipe: one without `snapshots`, or a state before the first of them, is given back as it is.
      state: on the mesh; its average keeps its place there.
      teacher_variables: the teacher's, or None.
      source: the training images.
      config: the run's configuration: seed and batch size.
      mesh: the devices.
      batch_size: images that are forwarded at once; None: as many as in training, a micro-batch's.
    """
    if recipe.snapshots is None or int(state.step) < recipe.snapshots.first or not state.average["batch_stats"]:
        return state
    averaged = state.replace(params=state.average["params"], opt_state=(), average=None)
    batch_size = batch_size or config.training.batch_size // recipe.accumulation
    points = _forwarded(recipe, averaged, teacher_variables, source, config, mesh, batch_size)
    measured = models.estimate_statistics(recipe.student, state.average, points)["batch_stats"]
    placed = jax.tree.map(lambda leaf: leaf.sharding, state.average["batch_stats"])
    measured = jax.jit(lambda tree: tree, out_shardings=placed)(measured)
    return state.replace(average=state.average | {"batch_stats": measured})


def _forwarded(recipe, averaged, teacher_variables, source, config, mesh, batch_size) -> Iterator[Array]:
    """Yields the points of each forward of each batch."""
    count = min(BATCHES, -(-source.epoch // batch_size))
    with Feeder(source, mesh, seed=config.seed, batch_size=batch_size, last=count, resident=False,
                partners=recipe.augmentation.mixes, negatives=recipe.method.negatives) as feeder:
        for index, batch in enumerate(feeder):
            yield from _points(recipe, index, averaged, teacher_variables, batch)


@functools.partial(jax.jit, static_argnums=0)
def _points(recipe, index, averaged, teacher_variables, batch) -> list[Array]:
    """Returns what the student forwards in train mode through BatchNorm set 0, moving its statistics: one array each."""
    key = jax.random.fold_in(jax.random.fold_in(averaged.key, _STATISTICS), index)
    augment_key, attack_key = jax.random.split(key)
    images, labels = steps.augment(recipe, augment_key, batch)
    negatives = steps.augment_negatives(recipe, augment_key, batch)
    views, _ = steps.attack(recipe, attack_key, averaged, teacher_variables, images, labels, *negatives)
    forwards = [forward for forward in recipe.method.student_forwards
                if forward[0].updates_statistics and forward[0].readout is None and forward[0].batch_norm_set == 0]
    # Views of one forward side by side per example, as the step has them.
    return [jnp.stack([views[view.name] for view in forward], axis=1).reshape(-1, *images.shape[1:]) for forward in forwards]
