"""Durations of a run as one says them, and what they are in steps.

A number below 1 is a fraction of training, a whole number a number of steps; a text may name its unit: "500 steps",
"2 epochs", "100000 examples", "5%". What it comes to depends on the batch size and the data, so that a configuration keeps
what was said (`canonical`) and a run asks for steps (`in_steps`).
"""

import dataclasses
import fractions
import numbers
import re

from jaxrd.errors import InputError

Duration = int | float | str  # the type of a configuration's field that takes one

RULE = 'a duration: steps (500 or "500 steps"), "2 epochs", "100000 examples", or a part of training (0.05 or "5%")'

_UNITS = {name: f"{name.removesuffix('s')}s" for name in ("step", "steps", "epoch", "epochs", "example", "examples")}


@dataclasses.dataclass(frozen=True)
class Intervals:
    """How often a run does what it does besides training, in steps, each at least 1.

    Attributes:
      log_every: between two lines of the log.
      checkpoint_every: between two validations and checkpoints.
      keep_every: between two checkpoints that stay, a multiple of `checkpoint_every`; None: none stay for that.
      swa_every: between two weights that a stochastic weight average takes.
    """

    log_every: int
    checkpoint_every: int
    keep_every: int | None
    swa_every: int


def parse(value: Duration) -> tuple[int | float, str]:
    """Returns (amount, unit), the unit one of "steps", "epochs", "examples" and "fraction" (of training).

    Args:
      value: a number below 1 (a fraction), a whole number (of steps), or a text: such a number, or one with a unit.

    Raises:
      InputError: none of these, or below 0, or more than the whole training.
    """
    wrong = InputError(f"{value!r} is not {RULE}")
    unit, text = "", value
    if isinstance(value, str):
        text, unit = re.fullmatch(r"(.*?)\s*(%|[a-z]*)", value.strip().lower(), re.DOTALL).groups()
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise wrong
    try:
        amount = fractions.Fraction(text if isinstance(text, str) else float(text))
        exact = int(amount) if amount.denominator == 1 else float(amount)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise wrong from None
    if unit == "%":
        exact, unit = float(amount / 100), "fraction"
    elif not unit:
        unit = "fraction" if exact < 1 else "steps"
    elif unit not in _UNITS:
        raise wrong
    unit = _UNITS.get(unit, unit)
    if exact < 0 or unit == "fraction" and exact > 1 or unit == "steps" and not isinstance(exact, int):
        raise wrong
    return exact, unit


def canonical(value: Duration) -> Duration:
    """Returns one way to write each duration: 500 for "500 steps", 0.05 for "5%", "2 epochs" for "2epoch".

    Raises:
      InputError: as `parse`.
    """
    amount, unit = parse(value)
    if unit == "steps" and amount:
        return amount
    if unit == "fraction" or not amount:
        return float(amount) if amount < 1 else "100%"
    return f"{amount} {unit.removesuffix('s') if amount == 1 else unit}"


def in_steps(value: Duration, *, steps: int, batch_size: int | None = None, epoch: int | None = None) -> int:
    """Returns a duration in steps, to the nearest whole one, which may be 0.

    Args:
      value: see `parse`.
      steps: length of training.
      batch_size: images per step; for epochs and examples.
      epoch: images per epoch; for epochs.

    Raises:
      InputError: as `parse`, or an argument is missing that the unit needs.
    """
    amount, unit = parse(value)
    if unit == "steps":
        return amount
    if unit == "fraction":
        return round(amount * steps)
    if batch_size is None or unit == "epochs" and epoch is None:
        raise InputError(f'"{value}" depends on the batch size and the images per epoch; pass batch_size=... and epoch=...')
    return round(amount * (epoch if unit == "epochs" else 1) / batch_size)


def shorter(value: Duration, *, batch_size: int, steps: int | None, examples: int | None, epochs: float | None) -> bool:
    """Returns whether a duration is shorter than a training of so many steps, examples or epochs (the first that is given).

    True too where that depends on how many images there are.
    """
    amount, unit = parse(value)
    if unit == "fraction":
        return amount < 1
    if steps is None and examples is None:
        return unit != "epochs" or amount < epochs
    images = {"steps": amount * batch_size, "examples": amount}.get(unit, 0)
    return images < (examples if steps is None else steps * batch_size)
