"""Stochastic weight averages: one model from several checkpoints of a run.

Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization"; Chen et al. 2021, "Robust Overfitting
may be Mitigated by Properly Learned Smoothening", for adversarial training. The moving average that training keeps beside the
weights is `training.weight_average`.
"""

from collections.abc import Iterable, Sequence
import functools

import jax
import jax.numpy as jnp

from jaxrd.errors import InputError
from jaxrd.models.batch_norm_sets import replace_statistics, select_set
from jaxrd.models.normalization import MOMENTUM
from jaxrd.models.zoo import Model, Variables

Array = jax.Array


def average_weights(checkpoints: Sequence[Variables]) -> Variables:
    """Returns the mean of the variables of several checkpoints, BatchNorm statistics included.

    Those of an average are not the average of theirs: `estimate_statistics` measures them anew.

    Args:
      checkpoints: variables of one model, at least one of them.

    Raises:
      InputError: there are none, or they are of different models.
    """
    if not checkpoints:
        raise InputError("average_weights was given no checkpoints; give variables of one model, such as models.restore gives")
    for variables in checkpoints[1:]:
        if jax.tree.map(jnp.shape, variables) != jax.tree.map(jnp.shape, checkpoints[0]):
            raise InputError("average_weights was given variables of different models; give those of one architecture")
    return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]) / len(leaves), *checkpoints)


def estimate_statistics(model: Model, variables: Variables, batches: Iterable[Array], *, batch_norm_set: int = 0) -> Variables:
    """Returns the variables with BatchNorm statistics that are the mean of those of the batches, forwarded in train mode.

    What `torch.optim.swa_utils.update_bn` does, up to the running variance: the biased one of a batch, as everywhere in jaxrd.

    Args:
      model: the model.
      variables: its variables, whose statistics are not read.
      batches: images [batch, height, width, channels] float in [0, 1], at least one; of one shape, or each new one compiles.
      batch_norm_set: which statistics are measured.

    Raises:
      InputError: there are no batches.
    """
    total, count = None, 0
    for images in batches:
        statistics = _batch_statistics(model, batch_norm_set, variables, images)
        # Waited for: of batches in flight each takes memory, and on fake devices they would wait for each other for ever.
        total = jax.block_until_ready(statistics if total is None else jax.tree.map(jnp.add, total, statistics))
        count += 1
    if total is None:
        raise InputError("estimate_statistics was given no batches; give images, such as those that the model was trained on")
    measured = jax.tree.map(lambda leaf: leaf / count, total)
    old = variables["batch_stats"]
    if model.batch_norm_sets == 1:
        return variables | {"batch_stats": measured}
    # Of the other sets nothing was measured.
    chosen = select_set(variables | {"batch_stats": measured}, batch_norm_set, model.batch_norm_sets)["batch_stats"]
    return variables | {"batch_stats": replace_statistics(old, batch_norm_set, chosen)}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _batch_statistics(model, batch_norm_set, variables, images):
    # From zeros the moving average takes a fraction of the batch's statistics, and nothing of what was there.
    zeros = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    _, moved = model.apply(variables | {"batch_stats": zeros}, images, True, batch_norm_set)
    return jax.tree.map(lambda leaf: leaf / (1 - MOMENTUM), moved)
