"""The one exception type that means "your input", not "our bug", and the checks whose one line several rooms need."""

import difflib
import math
import numbers
from collections.abc import Collection


class InputError(ValueError):
    """A bad value from the user: one line that names the field, the value and the way out.

    The command lines print it without a traceback and exit with status 1; a notebook shows the line alone (%debug still has
    the stack); a library user sees an ordinary `ValueError`.
    """

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of the traceback, by its own protocol."""
        return [f"{type(self).__name__}: {self}"]


def need(ok: bool, field: str, value, rule: str) -> None:
    """Raises InputError unless `ok`, or where a number is not finite: "{field} is {value}; it must be {rule}"."""
    if not ok or isinstance(value, numbers.Real) and not math.isfinite(value):
        raise InputError(f"{field} is {value}; it must be {rule}")


def need_positive(field: str, value) -> None:
    """Raises InputError for a number that is not above 0; of a traced one there is no value to read."""
    if isinstance(value, numbers.Real):
        need(value > 0, field, value, "above 0")


def choose(field: str, value: str, known: Collection[str]) -> None:
    """Raises InputError unless the value is among the known ones, with the nearest of them."""
    if value not in known:
        raise InputError(f'{field} is "{value}"; {suggest(value, known)}')


def suggest(name: str, known: Collection[str]) -> str:
    """Returns "did you mean ...? known: ..."."""
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f'did you mean "{close[0]}"? ' if close else ""
    return f"{hint}known: {', '.join(known)}"


def nearest_multiples(size: int, factor: int) -> str:
    """Returns the nearest multiples of `factor` below and above a `size` that is none: "96 or 128", or "128", but never 0."""
    below = size // factor * factor
    return f"{below} or {below + factor}" if below else f"{factor}"


def one_line(error: Exception) -> str:
    """Returns an error's type and message on one line of 200 characters at most, for a message of our own."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
