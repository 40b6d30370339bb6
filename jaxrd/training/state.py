"""The training state: everything that a step reads and replaces, arrays only."""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxrd.models.zoo import Model

Array = jax.Array


@flax.struct.dataclass
class TrainState:
    """Attributes:
      step: scalar int32, the number of steps taken.
      params: the student's parameters.
      batch_stats: the student's BatchNorm running statistics.
      opt_state: the optimiser's state.
      average: {"params", "batch_stats"}, their exponential moving averages; None when not asked for.
      key: the run's typed key; step k draws from fold_in(key, k), so no key is ever split and carried.
    """

    step: Array
    params: dict
    batch_stats: dict
    opt_state: optax.OptState
    average: dict | None
    key: Array

    @property
    def variables(self) -> dict:
        """What the model is applied with: the average where there is one, else the newest weights."""
        return self.average or {"params": self.params, "batch_stats": self.batch_stats}


def create(model: Model, optimizer: optax.GradientTransformation, key: Array, *, weight_average: bool) -> TrainState:
    """Returns the state before the first step, drawn from `key`."""
    init_key, run_key = jax.random.split(key)
    variables = model.init(init_key)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    # A copy, not an alias: a donated step refuses one buffer that stands in two places.
    average = jax.tree.map(jnp.copy, {"params": params, "batch_stats": batch_stats}) if weight_average else None
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params), average, run_key)
