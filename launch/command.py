"""What every command line shares: flags, the config file with its overrides, help, and one-line errors."""

import difflib
import functools
import logging
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Mapping

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_dict, config_flags

from jaxrd import config as configs, config_files
from jaxrd.errors import InputError
from launch import start

flags.disclaim_key_flags()  # --config is a flag of the command that asks for it, and stands in its help

_EXAMPLE = "--config=configs/digits.py:ard+igdm"
_base: dict[str, dict[str, str]] = {}  # filled by a command whose --config is a text
_defaults: dict[str, str] = {}  # given as an argument where there is none, for ml_collections would load it at once


def define_config(default: str | None = None) -> None:
    """Defines `--config=FILE[:ARGUMENT]` and its overrides `--config.section.field=value`."""
    config_flags.DEFINE_config_file(
        "config", None,
        f"Config file and its argument, such as {default or _EXAMPLE.partition('=')[2]}{' (the default)' if default else ''}. "
        "Overrides follow it: --config.seed=1 --config.threat.epsilon=8/255. "
        f"The fields: python -m launch.train {_EXAMPLE} --print_config")
    if default:
        _defaults["config"] = default


def define_base_config() -> None:
    """Defines `--config` and its overrides for a command that reads the file itself, many times over: see `base_config`."""
    flags.DEFINE_string(
        "config", None, f"Config file and its argument, such as {_EXAMPLE.partition('=')[2]}; of a sweep file, in place of its "
        "own (without an argument, with the sweep's). Fields for all runs follow it: --config.training.steps=50.")
    _base.update(overrides={})


def base_config() -> tuple[str | None, dict[str, str]]:
    """Returns the text of `--config` (None where it is not given) and dotted field -> text of its overrides."""
    return flags.FLAGS.config, _base["overrides"]


def config() -> configs.Config:
    """Returns the validated configuration of the command line."""
    if flags.FLAGS.config is None:
        raise InputError(f"--config is missing; give a file, such as {_EXAMPLE}")
    return configs.Config.from_dict(flags.FLAGS.config)


def run(main: Callable[..., None], arguments: bool = False) -> None:
    """Parses the command line and calls `main()`; a user's mistake ends in one line on stderr and exit status 1.

    Where the command takes `arguments`, what is no flag is given to `main` as a list; elsewhere it is a mistake. Any other
    exception is a bug and keeps its traceback. Of several processes one speaks, and all end: with the status of the one that
    failed, or 75 where one was lost.
    """
    _silence_libraries()
    try:
        app.run(lambda argv: _together(functools.partial(main, argv[1:]) if arguments else main),
                flags_parser=functools.partial(_parse, arguments=arguments))
    except InputError as error:
        alone = start.supposed_process_id() == 0 or sys.stderr.isatty()
        if getattr(error, "speaks", alone or isinstance(error, HereError)):
            print(_line(error), file=sys.stderr)
        raise SystemExit(getattr(error, "status", 1)) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


class HereError(InputError):
    """What is wrong with the files of this machine, so that every process for which it is says so."""


def _line(error: InputError, process: int | None = None) -> str:
    return f"error: {'' if process is None else f'process {process}: '}{' '.join(str(error).splitlines())}"


def _together(main: Callable[[], None]) -> None:
    """Calls `main()`; what ends it in one of several processes ends them all."""
    try:
        main()
    except BaseException as error:
        from jaxrd.training import startup

        process = startup.process_id()
        if process is None:
            raise
        if isinstance(error, InputError):
            shared = process == 0 or type(error).__name__ == "SharedInputError"
            startup.fail(1, _line(error, None if shared else process) + "\n")
        if isinstance(error, SystemExit | KeyboardInterrupt):  # a scheduler's signal, at which all of them stop
            startup.finish(patience=60)
            if process and isinstance(error, KeyboardInterrupt):
                raise SystemExit(130) from None
            if isinstance(error, SystemExit) and isinstance(error.code, int):
                startup.leave(error.code)
            raise
        if what := startup.lost_process(error):
            startup.end_as_lost(what)
        startup.fail(1, f"process {process}:\n{traceback.format_exc()}")
    if startup := sys.modules.get("jaxrd.training.startup"):
        startup.finish()
        startup.leave(0)


def _silence_libraries() -> None:
    """Leaves to the exception, which says it once, what orbax and its event loop also log."""
    # Orbax narrates every save on the first two loggers and every damaged file on the first and the last.
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("jax").setLevel(logging.ERROR)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    # Reads of a damaged checkpoint that are still under way when orbax gives up answer to a loop that is gone.
    report = sys.unraisablehook
    sys.unraisablehook = lambda event: None if str(event.exc_value) == "Event loop is closed" else report(event)


def _parse(argv: list[str], arguments: bool = False) -> list[str]:
    if {"--help", "-help", "-h"} & set(argv[1:]):
        print(f"{sys.modules['__main__'].__doc__ or ''}\n{flags.FLAGS.main_module_help()}")
        raise SystemExit(0)
    argv = _overrides(argv)
    if "config" in _defaults and not any(re.match(r"--?config(=|$)", argument) for argument in argv):
        argv.insert(1, f"--config={_defaults['config']}")
    if _base:
        argv = _split_overrides(argv)
    file = _check_config(argv) if "config" in flags.FLAGS and not _base else None
    sys.argv[:] = argv  # config_flags looks there for the overrides
    try:
        rest = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        raise InputError(_unknown_flag(error.flagname)) from None
    except Exception as error:
        raise _explained(error, file) or error
    if len(rest) > 1 and not arguments:
        raise InputError(f'"{rest[1]}" is not a flag; flags begin with -- and take their value after =')
    if file and not isinstance(flags.FLAGS.config, Mapping | config_dict.ConfigDict):
        # Where the config file itself meets an OSError, ml_collections keeps it for later.
        kept = getattr(flags.FLAGS.config, "_error", None)
        raise kept and _explained(kept, file) or _not_a_config(file)
    return rest


def _overrides(argv: list[str]) -> list[str]:
    """Writes `--config.seed 3` as `--config.seed=3`, and `--config.method=ard` as `--config.method.name=ard`."""
    result = []
    for argument in argv:
        # ml_collections takes an override without "=" for a true or false one.
        if result and re.fullmatch(r"--?config\.[^=]+", result[-1]) and not re.match(r"-\D", argument):
            result[-1] += f"={argument}"
        else:
            result.append(argument)
    return [re.sub(r"^(--?config\.method)(?==|$)", r"\1.name", argument) for argument in result]


def _split_overrides(argv: list[str]) -> list[str]:
    """Returns the command line without `--config.field=value`, which is kept for `base_config`."""
    rest = []
    for argument in argv:
        if match := re.fullmatch(r"--?(no)?config\.([^=]*)(?:=(.*))?", argument):
            negated, field, value = match.groups()
            if wrong := configs.unknown_field(field):
                raise InputError(wrong)
            _base["overrides"][field] = value if value is not None else "false" if negated else "true"
        else:
            rest.append(argument)
    return rest


def _check_config(argv: list[str]) -> str:
    """Returns the path of the config file, or raises InputError where ml_collections would say less about it."""
    file = None
    for argument, following in zip(argv[1:], [*argv[2:], ""]):
        if match := re.fullmatch(r"--?config(?:=(.*))?", argument):
            file = following if match[1] is None else match[1]
        elif match := re.fullmatch(r"--?(?:no)?config\.([^=]*)(?:=.*)?", argument):
            if wrong := configs.unknown_field(match[1]):
                raise InputError(wrong)
            if file is None and any(re.match(r"--?config(=|$)", other) for other in argv):
                raise InputError(f"{argument} stands before --config; put --config=FILE first, overrides after it")
    if not file:
        raise InputError(f"--config is missing; give a file, such as {_EXAMPLE}")
    path = pathlib.Path(file.split(":", 1)[0])
    if not path.is_file():
        close = config_files.nearest(path)
        hint = f"did you mean {close}?" if close else f"give one such as {_EXAMPLE}"
        raise HereError(f"--config={file}: no such file; {hint}")
    return str(path)


def _unknown_flag(name: str) -> str:
    known = sorted(flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0]))
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean --{close[0]}?" if close else f"known: {', '.join(f'--{other}' for other in known)}"
    return f"--{name}: no such flag; {hint}"


def _explained(error: Exception, file: str | None) -> InputError | None:
    """Returns what is wrong with the command line or the config file in one line; None where neither is to blame."""
    chain = [error]
    while below := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(below)
    for cause in reversed(chain):
        if isinstance(cause, InputError):
            return cause
    for cause in reversed(chain):
        stack = [(pathlib.Path(frame.filename).resolve(), frame.lineno)
                 for frame in traceback.extract_tb(cause.__traceback__)]
        lines = [line for path, line in stack if file and path == pathlib.Path(file).resolve()]
        if isinstance(cause, SyntaxError) and file and cause.filename and pathlib.Path(cause.filename).samefile(file):
            return InputError(f"{file}, line {cause.lineno}: {cause.msg}")
        # An exception that left the config file for jaxrd is a bug of jaxrd.
        if lines and pathlib.Path(configs.__file__).parent not in stack[-1][0].parents:
            message = cause.args[0] if cause.args and isinstance(cause.args[0], str) else str(cause)
            last = re.split(r"\n|\\n", message)[-1]  # ml_collections quotes whole tracebacks and dictionaries
            return InputError(f"{file}, line {lines[-1]}: {type(cause).__name__}: {last}")
    cause = chain[-1]
    if file and "has no attribute 'get_config'" in str(cause):
        return _not_a_config(file)
    if file and isinstance(cause, TypeError) and "get_config()" in str(cause):
        return InputError(f"{file}: {cause}; what follows the colon of --config is given to get_config(argument)")
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    if isinstance(error, flags.Error) or pathlib.Path(flags.__file__).parent in pathlib.Path(raised_in).parents:
        return InputError(re.sub("invalid literal for int.*", "it must be a whole number", str(error)))
    return None


def _not_a_config(file: str) -> InputError:
    return InputError(f"{file}: it must define get_config(argument) and return a ConfigDict there; see configs/digits.py")
