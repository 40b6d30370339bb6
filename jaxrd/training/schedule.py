"""Learning-rate schedules and the optimiser, all durations in fractions of training."""

import jax.numpy as jnp
import optax

from jaxrd.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns step -> learning rate.

    "step": the papers' schedule, divided by 10 at each milestone (fractions of training; 100 and 150 of 200 epochs are
    0.5 and 0.75). "cosine": to 0 over training. Either after a linear warm-up over the first `warmup` of training,
    whose first step is not 0. "onecycle": PyTorch's OneCycleLR, see `one_cycle`.

    Args:
      config: the validated section `optimizer`.
      steps: length of training.
    """
    if config.schedule == "onecycle":
        return one_cycle(config.learning_rate, steps, config.warmup)
    warmup_steps = round(config.warmup * steps)
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(config.learning_rate, max(steps - warmup_steps, 1))
    else:
        # Several milestones of a short run can fall on one step, and each has its division.
        boundaries = {}
        for fraction in config.milestones:
            boundary = round(fraction * steps) - warmup_steps
            boundaries[boundary] = 0.1 * boundaries.get(boundary, 1.0)
        main = optax.piecewise_constant_schedule(config.learning_rate, boundaries)
    if not warmup_steps:
        return main
    warmup = optax.linear_schedule(config.learning_rate / warmup_steps, config.learning_rate, warmup_steps - 1)
    return optax.join_schedules([warmup, main], [warmup_steps])


def one_cycle(peak: float, steps: int, rising: float) -> optax.Schedule:
    """Returns PyTorch's OneCycleLR: a half wave from peak / 25 up to the peak, and one down to peak / 250,000.

    The peak is at step `rising * steps - 1`, a fraction kept, and the end at `steps - 1`; `optax.cosine_onecycle_schedule`
    has them a step later. Without OneCycleLR's cycle of the momentum.

    Args:
      peak: highest learning rate.
      steps: length of training.
      rising: part of it spent on the way up (`pct_start`), in (0, 1).
    """
    low, end = peak / 25, peak / 25 / 1e4
    top, last = max(rising * steps - 1, 0.0), steps - 1

    def wave(start, stop, position):
        return stop + (start - stop) / 2 * (1 + jnp.cos(jnp.pi * position))

    def rate(step):
        down = wave(peak, end, (step - top) / (last - top or 1))  # one step has no way down
        return jnp.where(step <= top, wave(low, peak, step / max(top, 1)), down)

    return rate


def optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Returns SGD with momentum and coupled weight decay (added to the gradient, on all parameters), as PyTorch's."""
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(learning_rate(config, steps), momentum=config.momentum, nesterov=config.nesterov),
    )
