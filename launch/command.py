"""What every command line shares: flags, the config file with its overrides, and one-line errors."""

import logging
import sys
from collections.abc import Callable

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from jaxrd import config as configs
from jaxrd.errors import InputError


def define_config(default: str | None = None) -> None:
    """Defines `--config=FILE[:ARGUMENT]` and its overrides `--config.section.field=value`."""
    config_flags.DEFINE_config_file(
        "config", default, "Config file, such as configs/digits.py:ard+igdm; override with --config.seed=1.")


def config() -> configs.Config:
    """Returns the validated configuration of the command line."""
    if flags.FLAGS.config is None:
        raise InputError("--config is missing; give a file, such as --config=configs/digits.py:ard+igdm")
    return configs.Config.from_dict(flags.FLAGS.config)


def run(main: Callable[[], None]) -> None:
    """Parses the command line and calls `main()`; a user's mistake ends in one line on stderr and exit status 1."""
    # Orbax narrates every save on these two loggers.
    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.getLogger("jax").setLevel(logging.ERROR)
    try:
        app.run(lambda _: main(), flags_parser=_parse)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _parse(argv: list[str]) -> list[str]:
    argv = [_shorthand(argument) for argument in argv]
    for argument in argv[1:]:
        if argument.startswith(("--config.", "-config.")):
            path = argument.lstrip("-").removeprefix("config.").split("=", 1)[0]
            # Here, because ml_collections answers a misspelt section with a traceback.
            if wrong := configs.unknown_field(path):
                raise InputError(wrong)
    sys.argv[:] = argv  # config_flags looks there for the overrides
    try:
        rest = flags.FLAGS(argv)
        flags.FLAGS.config if "config" in flags.FLAGS else None
    except (flags.Error, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(_last_line(error)) from None
    if len(rest) > 1:
        raise InputError(f'"{rest[1]}" is not a flag; flags begin with -- and take their value after =')
    return rest


def _shorthand(argument: str) -> str:
    """`--config.method=ard` stands for `--config.method.name=ard`."""
    return argument.replace("--config.method=", "--config.method.name=", 1)


def _last_line(error: Exception) -> str:
    """The line of an error that names the mistake: absl quotes whole tracebacks of config files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("jaxrd.errors.InputError: ") if lines else repr(error)
