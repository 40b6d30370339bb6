"""Learning-rate schedules and the optimisers, all durations in fractions of training unless they say otherwise."""

import math

import jax
import jax.numpy as jnp
import optax

from jaxrd.config import OptimizerConfig
from jaxrd.errors import InputError
from jaxrd.training import durations


def learning_rate(
    config: OptimizerConfig, steps: int, *, batch_size: int | None = None, epoch: int | None = None,
) -> optax.Schedule:
    """Returns step -> learning rate.

    "step": the papers' schedule, divided by 10 at each milestone (fractions of training; 100 and 150 of 200 epochs are
    0.5 and 0.75). "cosine": to 0 over training. Either after a linear warm-up over the first `warmup` of training,
    whose first step is not 0. "onecycle": PyTorch's OneCycleLR, see `one_cycle`. Its highest value is `peak`.

    Args:
      config: the validated section `optimizer`.
      steps: length of training.
      batch_size: images per step, over all devices; for a scaled rate, and for a warm-up in epochs or examples.
      epoch: images per epoch, for a warm-up in epochs.

    Raises:
      InputError: a warm-up that is not shorter than training, or an argument is missing.
    """
    highest = peak(config, batch_size)
    warmup_steps = durations.in_steps(config.warmup, steps=steps, batch_size=batch_size, epoch=epoch)
    fraction = durations.parse(config.warmup)[1] == "fraction"
    if not fraction and warmup_steps >= steps:
        raise InputError(
            f"config.optimizer.warmup is {config.warmup!r}, {warmup_steps} steps of {steps}; shorten it, or train for longer")
    if config.schedule == "onecycle":
        return one_cycle(highest, steps, config.warmup if fraction else warmup_steps / steps)
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(highest, max(steps - warmup_steps, 1))
    else:
        # Several milestones of a short run can fall on one step, and each has its division.
        boundaries = {}
        for milestone in config.milestones:
            boundary = round(milestone * steps) - warmup_steps
            boundaries[boundary] = 0.1 * boundaries.get(boundary, 1.0)
        main = optax.piecewise_constant_schedule(highest, boundaries)
    if not warmup_steps:
        return main
    warmup = optax.linear_schedule(highest / warmup_steps, highest, warmup_steps - 1)
    return optax.join_schedules([warmup, main], [warmup_steps])


def peak(config: OptimizerConfig, batch_size: int | None = None) -> float:
    """Returns the peak learning rate: `learning_rate`, times what `scaling` says of the batch size.

    "linear": times batch_size / scaling_batch (Goyal et al. 2017, "Accurate, Large Minibatch SGD", after 5 epochs of warm-up).
    "sqrt": times its square root (Krizhevsky 2014, "One weird trick for parallelizing convolutional neural networks"; You et
    al. 2020 for LAMB). "none": as it is.

    Args:
      config: the validated section `optimizer`.
      batch_size: images per step, over all devices; for "none" it need not be given.
    """
    if config.scaling == "none":
        return config.learning_rate
    if batch_size is None:
        raise InputError(
            f'config.optimizer.scaling is "{config.scaling}", which depends on the batch size; pass batch_size=...')
    ratio = batch_size / config.scaling_batch
    return config.learning_rate * (ratio if config.scaling == "linear" else math.sqrt(ratio))


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


def optimizer(
    config: OptimizerConfig, steps: int, *, batch_size: int | None = None, epoch: int | None = None,
) -> optax.GradientTransformation:
    """Returns the optimiser that `config.name` names, at the rates of `learning_rate`, whose arguments it takes.

    With eta the rate, w one parameter array, g its gradient, lambda the weight decay and |.| the Euclidean norm over an array:

    "sgd": with momentum and coupled weight decay (added to the gradient, on all parameters), as PyTorch's.

    "lars" (You et al. 2017, "Large Batch Training of Convolutional Networks"), for one learning rate of its own per array:
    u = g + lambda w; v <- momentum v + eta * trust_coefficient |w| / |u| u; w <- w - v. As in optax and much published code
    the ratio has |g + lambda w| where the paper has |g| + lambda |w|.

    "lamb" (You et al. 2020, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes"), the same for Adam:
    u = m / (sqrt v + 1e-6) + lambda w, with the bias-corrected moments m and v of g; w <- w - eta |w| / |u| u. No momentum
    besides.

    For these two, arrays of one axis, which are BatchNorm's scales and biases and all other biases, have neither weight decay
    nor trust ratio (it is 1), as in the papers' code; it is 1 too where |w| or |u| is 0.
    """
    rate = learning_rate(config, steps, batch_size=batch_size, epoch=epoch)
    if config.name == "lars":
        return optax.lars(
            rate, config.weight_decay, weight_decay_mask=_has_axes, trust_coefficient=config.trust_coefficient,
            trust_ratio_mask=_has_axes, momentum=config.momentum, nesterov=config.nesterov)
    if config.name == "lamb":
        # The parts of `optax.lamb`, whose trust ratio knows no mask.
        return optax.chain(
            optax.scale_by_adam(*config.betas, eps=1e-6),
            optax.add_decayed_weights(config.weight_decay, mask=_has_axes),
            optax.masked(optax.scale_by_trust_ratio(), _has_axes),
            optax.scale_by_learning_rate(rate))
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(rate, momentum=config.momentum, nesterov=config.nesterov),
    )


def _has_axes(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
