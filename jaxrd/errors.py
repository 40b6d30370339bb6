"""The one exception type that means "your input", not "our bug"."""


class InputError(ValueError):
    """A bad value from the user: one line that names the field, the value and the way out.

    The command lines print it without a traceback and exit with status 1; a library user sees an ordinary `ValueError`.
    """
