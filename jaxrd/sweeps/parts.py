"""Parts of a sweep's description, checked and named: fields and their values, seeds, names fit for directories."""

import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jaxrd import config as configs
from jaxrd.errors import InputError

_LONGEST_VALUE, _LONGEST_NAME = 40, 100  # characters


def fields(given: Any, where: str, seed: bool = False) -> dict[str, Any]:
    """Returns dotted field -> value, of a mapping that may be nested as TOML's unquoted keys are; refuses unknown fields."""
    need(isinstance(given, Mapping), where, given, "fields and their values")
    found = {}
    for field, value in _flat(given).items():
        if wrong := configs.unknown_field(field):
            raise InputError(f"{where}: {wrong}")
        if field == "seed" and not seed:
            raise InputError(f"{where}: seed is not swept as other fields are; list the seeds in seeds = [0, 1, 2] "
                             "(--seeds=0,1,2)")
        found["method.name" if field == "method" else field] = value
    return found


def set_field(values: dict[str, Any], field: str, value: Any) -> None:
    """Sets a dotted field of nested dicts, whose sections need not be there."""
    *sections, name = field.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):  # method: "ard"
            inner = values[section] = {"name": inner}
        values = inner
    values[name] = value


def seeds(given: Any, where: str) -> list[int]:
    """Returns the seeds of a sweep; refuses what is no list of different seeds."""
    way_out = "a list of different whole numbers, one or more, such as [0, 1, 2]"
    need(is_list(given), where, given, way_out)
    listed = list(given)
    need(bool(listed), where, listed, way_out)
    for seed in listed:
        need(isinstance(seed, int) and not isinstance(seed, bool), where, listed, way_out)
        need(0 <= seed < 2**32, where, listed, "whole numbers in [0, 2**32)")
    if repeated := [seed for seed, count in Counter(listed).items() if count > 1]:
        raise InputError(f"{where} names {repeated[0]} twice; a seed run twice gives the same run")
    return listed


def text(value: Any) -> str:
    """Returns a value as it stands in a point's name: short, on one line."""
    shown = str(value) if isinstance(value, str | float | None) else json.dumps(value, default=str)
    shown = " ".join(shown.split())
    return shown if len(shown) <= _LONGEST_VALUE else f"{shown[:_LONGEST_VALUE - 10]}~{_digest(shown)}"


def slugs(names: list[str]) -> list[str]:
    """Returns names fit for directories, each another."""
    found: list[str] = []
    for name in names:
        slug = re.sub(r"[^\w.+=@~-]+", "_", name).strip("_.-")[:_LONGEST_NAME]
        # Some file systems do not tell "A" from "a".
        if not slug or slug.lower() in {other.lower() for other in found} or len(name) > _LONGEST_NAME:
            slug = f"{slug}-{_digest(name)}".lstrip("-")
        found.append(slug)
    return found


def is_list(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)


def need(ok: bool, where: str, value: Any, rule: str) -> None:
    if not ok:
        raise InputError(f"{where} is {value!r}; it must be {rule}")


@contextlib.contextmanager
def saying_where(where: str, instead_of: str = "") -> Iterator[None]:
    """Begins the message of an InputError with where its cause stands, in place of a beginning that says less."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {str(error).removeprefix(instead_of)}") from None


def _flat(given: Mapping, prefix: str = "") -> dict[str, Any]:
    fields = {}
    for name, value in given.items():
        fields |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return fields


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
