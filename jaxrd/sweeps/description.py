"""What a sweep is asked for, as a TOML file or the arguments of a call say it; `plan.build` makes runs of it.

A sweep file:

    title = "The weight of IGDM"
    about = "What to look at."
    config = "configs/digits.py:ard+igdm"    # FILE[:ARGUMENT], as launch.train's --config; alone necessary
    seeds = [0, 1, 2]                        # [0] by default
    attacks = "clean,pgd20,autoattack"       # the default
    baseline = "method.igdm=0"               # name of the point that others are compared with, seed by seed
    [set]                                    # fields of all points
    "training.steps" = 500
    [grid]                                   # every combination of the values of fields; method.name is but the name there,
                                             # without the options and the teacher that an argument brings (see points)
    "method.igdm" = [0, 1, 10]
    [[points]]                               # or points one by one; where there is a grid too, each is crossed with it
    name = "constant"                        # by default "method.igdm_ramp=constant"
    argument = "adaad+igdm"                  # in place of the config file's ARGUMENT, and with all that it entails
    config = "configs/other.py:ard"          # or a config of its own
    checkpoint = "best"                      # which is evaluated: "last" (the default), "best" or a step's number
    "method.igdm_ramp" = "constant"          # any fields
    [teachers.weak]                          # trained first, in WORKDIR/teachers/weak; a point says: teacher = "@weak"
    config = "configs/digits.py:teacher"
    "training.steps" = 60
"""

import dataclasses
import json
import pathlib
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrd.config_files import file_of
from jaxrd.errors import InputError, suggest

ATTACKS = "clean,pgd20,autoattack"


@dataclasses.dataclass(frozen=True)
class Description:
    """The parts of a sweep, unchecked.

    Attributes:
      config: "FILE[:ARGUMENT]", a ConfigDict, a `Config` or a mapping.
      seeds: one run of every point for each.
      attacks: of the evaluation, comma-separated or a list.
      baseline: name of the point that others are compared with.
      set: dotted field -> value, of all points.
      grid: dotted field -> list of values.
      points: mappings with "name", "config", "argument", "checkpoint" and dotted fields.
      teachers: name -> mapping with "config", "argument" and dotted fields.
      title, about: heading and introduction of the report.
      origin: part -> what messages call it: a file's key, or a flag.
    """

    config: Any = None
    seeds: Any = (0,)
    attacks: Any = ATTACKS
    baseline: Any = None
    set: Any = dataclasses.field(default_factory=dict)
    grid: Any = dataclasses.field(default_factory=dict)
    points: Any = ()
    teachers: Any = dataclasses.field(default_factory=dict)
    title: Any = ""
    about: Any = ""
    origin: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def where(self, part: str) -> str:
        return self.origin.get(part, part)

    def replaced(self, source: Mapping[str, str], **parts: Any) -> "Description":
        """Returns the description with some parts replaced; `source` says what messages call them."""
        return dataclasses.replace(self, **parts, origin={**self.origin, **{name: source.get(name, name) for name in parts}})


    def with_config(self, config: str | None, fields: Mapping[str, Any]) -> "Description":
        """Returns the description on another config file, and with fields set for all points: what a command line adds.

        Points and teachers that name the sweep's own config file with arguments of theirs take the other file with them.

        Args:
          config: "FILE[:ARGUMENT]", without ARGUMENT with that of the sweep's own; None for the sweep's own.
          fields: dotted field -> value.

        Raises:
          InputError: a field that the sweep varies.
        """
        description = self
        if config:
            old, new = file_of(self.config), file_of(config)
            if old is not None and ":" not in config:
                config += str(self.config).removeprefix(old)

            def moved(own):
                if not isinstance(own, Mapping) or old is None or file_of(own.get("config")) != old:
                    return own
                return {**own, "config": new + own["config"].removeprefix(old)}

            points, teachers = self.points, self.teachers
            if isinstance(points, Sequence) and not isinstance(points, str):
                points = [moved(point) for point in points]
            if isinstance(teachers, Mapping):
                teachers = {name: moved(own) for name, own in teachers.items()}
            description = dataclasses.replace(
                self, config=config, points=points, teachers=teachers, origin={**self.origin, "config": "--config"})
        varied = [*self.grid] if isinstance(self.grid, Mapping) else []
        varied += [name for point in description.points if isinstance(point, Mapping) for name in point]
        for field in fields:
            if field in varied:
                raise InputError(f"--config.{field} is given, but the sweep varies that field; leave it out, or write a sweep "
                                 "file of your own")
        return dataclasses.replace(description, set={**description.set, **fields}) if fields else description


_PARTS = tuple(field.name for field in dataclasses.fields(Description) if field.name != "origin")


def read(path: str | pathlib.Path) -> Description:
    """Returns what a sweep file says.

    Raises:
      InputError: no such file, no TOML, or a key that a sweep does not have.
    """
    path = pathlib.Path(path)
    try:
        with open(path, "rb") as file:
            found = tomllib.load(file)
    except OSError as error:
        raise InputError(f"--sweep={path}: {'no such file' if isinstance(error, FileNotFoundError) else error.strerror}; "
                         "give a sweep file, such as configs/ablations/alpha.toml") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no TOML: {' '.join(str(error).split())}") from None
    for name in found:
        if name not in _PARTS:
            raise InputError(f'{path}: "{name}" is no part of a sweep; {suggest(name, _PARTS)} (fields of all points stand '
                             "in [set])")
    return Description(**found, origin={name: f"{path}: {name}" for name in _PARTS})


def parse_grid(text: str, where: str = "--grid") -> dict[str, Any]:
    """Returns the grid that a flag holds as JSON: '{"method.igdm": [0, 1, 10]}'."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is no JSON ({error}); write it like "
                         """--grid='{"method.igdm": [0, 1, 10]}'""") from None


def parse_seeds(texts: Sequence[str], where: str = "--seeds") -> list[int]:
    """Returns the seeds of a flag: ["0", "1"]."""
    try:
        return [int(text) for text in texts if text.strip()]
    except ValueError:
        raise InputError(f"{where}={','.join(texts)}; it must be whole numbers, such as {where}=0,1,2") from None
