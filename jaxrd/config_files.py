"""Configurations by the name of their file, "configs/digits.py:ard+igdm", outside of a command line's own `--config`."""

import difflib
import pathlib
import runpy
import traceback
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from jaxrd.config import Config
from jaxrd.errors import InputError


def load(config: Any, argument: str | None = None) -> dict[str, Any]:
    """Returns a configuration as nested plain dicts, which are nobody else's; it is not validated.

    Args:
      config: "FILE" or "FILE:ARGUMENT" of a config file, a ConfigDict, a `Config`, or a mapping.
      argument: for the config file, in place of its own.

    Raises:
      InputError: no such file, an error in it, or an argument for what is no file.
    """
    if isinstance(config, str | pathlib.Path):
        file, _, own = str(config).partition(":")
        return _plain(_call(file, own if argument is None else argument))
    if argument is not None:
        raise InputError(f'argument "{argument}" needs a config file, which it is given to; this sweep\'s config is '
                         f"a {type(config).__name__}")
    return _plain(config)


def file_of(config: Any) -> str | None:
    """Returns the path of the config file in "FILE:ARGUMENT"; None where `config` is a configuration itself."""
    return str(config).partition(":")[0] if isinstance(config, str | pathlib.Path) else None


def nearest(path: pathlib.Path) -> str | None:
    """Returns the config file that was meant by a path at which there is none: beside it, or in configs/."""
    names = [str(other) for folder in (path.parent, pathlib.Path("configs")) for other in folder.glob("*.py")]
    return next(iter(difflib.get_close_matches(str(path), names, n=1)), None)


def _plain(config: Any) -> dict[str, Any]:
    if isinstance(config, Config):
        return config.to_dict()
    if isinstance(config, config_dict.ConfigDict):
        return config.copy_and_resolve_references().to_dict()
    if not isinstance(config, Mapping):
        raise InputError(f"config is {config!r}; give a file such as configs/digits.py:ard+igdm, or a configuration")
    return {name: _plain(value) if isinstance(value, Mapping | config_dict.ConfigDict) else value
            for name, value in config.items()}


def _call(file: str, argument: str) -> Any:
    path = pathlib.Path(file)
    if not path.is_file():
        close = nearest(path)
        raise InputError(f"{file}: no such config file; "
                         + (f"did you mean {close}?" if close else "give one such as configs/digits.py:ard+igdm"))
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        found = get_config(argument) if callable(get_config) else None
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except SyntaxError as error:
        raise InputError(f"{file}, line {error.lineno}: {error.msg}") from None
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{file}, line {lines[-1]}" if lines else file
        raise InputError(f"{where}: {type(error).__name__}: {' '.join(str(error).split())}") from None
    if not isinstance(found, Mapping | config_dict.ConfigDict):
        raise InputError(f"{file}: it must define get_config(argument) and return a ConfigDict there; see configs/digits.py")
    return found
