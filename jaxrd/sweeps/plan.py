"""The plan of a sweep: its points, and one run of each for every seed, all checked before anything runs."""

import dataclasses
import difflib
import itertools
import json
import pathlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jaxrd import config as configs, config_files
from jaxrd.config import Config
from jaxrd.errors import InputError, suggest
from jaxrd.files import replacing
from jaxrd.sweeps import parts
from jaxrd.sweeps.description import Description

FILE = "sweep.json"
_POINT_KEYS = ("name", "config", "argument", "checkpoint")
_TEACHER_KEYS = ("config", "argument")
# Of the fields that all points share, a teacher takes those that say which images there are.
_OF_TEACHERS_TOO = ("data.name", "data.arrays", "data.directory")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
      point: name of its point; of a teacher, "@" and its name.
      seed: its seed.
      directory: its run directory, below the sweep's.
      checkpoint: which checkpoint is evaluated: "last", "best" or a step's number.
      settings: its complete configuration, as `Config.to_dict` gives it.
      teacher: "@" and the name of its teacher where that is one of this sweep.
    """

    point: str
    seed: int
    directory: str
    checkpoint: str
    settings: dict[str, Any]
    teacher: str = ""

    @property
    def config(self) -> Config:
        return Config.from_dict(self.settings)

    @property
    def label(self) -> str:
        return f"{self.point}, seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Point:
    """What one row of a sweep's table sets: dotted field -> value, as it was given."""

    name: str
    fields: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A sweep that was checked.

    Attributes:
      workdir: the sweep's directory.
      points: in the order of the table.
      runs: of the points, each with all its seeds.
      teachers: runs that come before them.
      attacks: names of the evaluation's attacks.
      baseline: name of the point that others are compared with, or None.
      title, about: heading and introduction of the report.
    """

    workdir: pathlib.Path
    points: tuple[Point, ...]
    runs: tuple[Run, ...]
    teachers: tuple[Run, ...]
    attacks: tuple[str, ...]
    baseline: str | None
    title: str
    about: str

    @property
    def fields(self) -> list[str]:
        """The fields that some point sets."""
        return list(dict.fromkeys(field for point in self.points for field in point.fields))

    def path(self, run: Run) -> pathlib.Path:
        return self.workdir / run.directory

    def jobs(self, runs: Iterable[Run]) -> list[list[Run]]:
        """Groups runs that train alike, and differ in what is evaluated: the first of a group trains for all.

        Seed by seed, so that a sweep that is stopped has compared all points on its first seeds.
        """
        groups: dict[str, list[Run]] = {}
        seeds = list(dict.fromkeys(run.seed for run in runs))
        for run in sorted(runs, key=lambda run: seeds.index(run.seed)):
            groups.setdefault(json.dumps(run.settings, sort_keys=True), []).append(run)
        return list(groups.values())

    def twins(self, run: Run) -> list[Run]:
        """Returns the other runs of the same complete configuration."""
        return [other for other in self.runs if other.settings == run.settings and other != run]

    def teacher_of(self, run: Run) -> Run | None:
        """Returns the run of this sweep that is the teacher of `run`."""
        return next((teacher for teacher in self.teachers if teacher.point == run.teacher), None)

    def write(self) -> None:
        """Writes sweep.json."""
        self.workdir.mkdir(parents=True, exist_ok=True)
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "workdir"}
        with replacing(self.workdir / FILE, "w") as file:
            json.dump(content, file, indent=1, default=dataclasses.asdict)
            file.write("\n")


def read(workdir: str | pathlib.Path) -> Plan:
    """Returns the plan that a sweep directory holds.

    Raises:
      InputError: there is none, or it is damaged.
    """
    workdir = pathlib.Path(workdir)
    path = workdir / FILE
    if not path.is_file():
        raise InputError(f"{workdir} holds no {FILE}; give the directory of a sweep, as python -m launch.sweep makes it")
    try:
        found = json.loads(path.read_text())
        return Plan(
            workdir, points=tuple(Point(**point) for point in found["points"]),
            runs=tuple(Run(**run) for run in found["runs"]), teachers=tuple(Run(**run) for run in found["teachers"]),
            attacks=tuple(found["attacks"]), baseline=found["baseline"], title=found["title"], about=found["about"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is damaged; give the command of the sweep again, which writes it anew") from None


def build(description: Description, workdir: str | pathlib.Path) -> Plan:
    """Returns the plan of a description; nothing is written, and no run directory is looked at.

    Raises:
      InputError: for the first thing that is wrong, with where it stands.
    """
    from jaxrd.evaluation import robustness

    where, workdir = description.where, pathlib.Path(workdir)
    for part in ("title", "about"):
        parts.need(isinstance(getattr(description, part), str), where(part), getattr(description, part), "a text")
    if description.config is None:
        raise InputError("config is missing; give a config file, such as configs/digits.py:ard+igdm")
    seeds = parts.seeds(description.seeds, where("seeds"))
    attacks = description.attacks
    named = isinstance(attacks, str) or parts.is_list(attacks) and all(isinstance(name, str) for name in attacks)
    parts.need(named, where("attacks"), attacks, 'names, such as "clean,pgd20"')
    with parts.saying_where(where("attacks"), instead_of="attacks: "):
        attacks = tuple(robustness.protocols(attacks if isinstance(attacks, str) else list(attacks)))
    shared = parts.fields(description.set, where("set"))
    teachers = _teachers(description, shared)
    points, settings = [], []
    for name, fields, options, origin in _points(description):
        with parts.saying_where(f'{origin}: point "{name}"' if name else origin):
            values = config_files.load(options.get("config", description.config), options.get("argument"))
            for field, value in {**shared, **fields}.items():
                parts.set_field(values, field, value)
            config = Config.from_dict(values | {"seed": seeds[0]})
            teacher = _teacher_of(config, teachers)
            if teacher:
                config = dataclasses.replace(config, teacher=str(workdir / teacher.directory))
            checkpoint = _checkpoint(options.get("checkpoint", "last"), config)
        points.append(Point(name or config.build_method().name, fields))
        settings.append((config.to_dict(), checkpoint, teacher.point if teacher else ""))
    _check_names(points, where)
    runs = []
    for point, slug, (values, checkpoint, teacher) in zip(points, parts.slugs([point.name for point in points]), settings):
        runs += [Run(point.name, seed, f"{slug}-seed{seed}", checkpoint, values | {"seed": seed}, teacher) for seed in seeds]
    baseline = description.baseline
    if baseline is not None and baseline not in [point.name for point in points]:
        raise InputError(f'{where("baseline")} is "{baseline}", which is no point; '
                         + suggest(str(baseline), [f'"{point.name}"' for point in points]))
    needed = tuple(teacher for teacher in teachers.values() if teacher.point in {run.teacher for run in runs})
    return Plan(workdir, tuple(points), tuple(runs), needed, attacks, baseline, description.title, description.about)


def _points(description: Description) -> Iterator[tuple[str, dict, dict, str]]:
    """Yields (name, fields, options, where it stands) of every point."""
    where = description.where
    listed = parts.is_list(description.points) and all(isinstance(point, Mapping) for point in description.points)
    parts.need(listed, where("points"), description.points, "a list of points, each with fields")
    grid = parts.fields(description.grid, where("grid"))
    for field, values in grid.items():
        if not parts.is_list(values) or not len(values):
            raise InputError(f"{where('grid')}: {field} is {values!r}; it must be a list of one value or more, such as "
                             "[0, 1, 10]")
        texts = [parts.text(value) for value in values]
        if repeated := [text for text, count in Counter(texts).items() if count > 1]:
            raise InputError(f"{where('grid')}: {field} lists {repeated[0]} twice; name each value once")
    for point in description.points or [{}]:
        options = {name: point[name] for name in _POINT_KEYS if name in point}
        own = {name: value for name, value in point.items() if name not in options}
        for name in own:
            if "." not in name and (close := difflib.get_close_matches(name, _POINT_KEYS, n=1)) and configs.unknown_field(name):
                raise InputError(f'{where("points")}: "{name}" is neither a field nor a part of a point; did you mean '
                                 f'"{close[0]}"?')
        for name in ("name", "argument"):
            parts.need(isinstance(options.get(name, ""), str), f"{where('points')}: {name}", options.get(name), "a text")
        own = parts.fields(own, where("points"))
        if both := [field for field in own if field in grid]:
            raise InputError(f"{where('points')}: {both[0]} stands in the grid as well; leave it out of one of them")
        for combination in itertools.product(*grid.values()):
            chosen = dict(zip(grid, combination))
            words = [options["name"]] if options.get("name") else _own_name(own, options)
            name = " ".join(words + [f"{field}={parts.text(value)}" for field, value in chosen.items()])
            yield name, own | chosen, options, where("points" if description.points else "grid" if grid else "config")


def _own_name(fields: dict, options: dict) -> list[str]:
    """Returns the words by which a point without a name is called: what is its own."""
    words = [options["argument"]] if options.get("argument") else []
    if not words and isinstance(options.get("config"), str):
        words = [options["config"].partition(":")[2] or pathlib.Path(options["config"]).stem]
    words += [f"{field}={parts.text(value)}" for field, value in fields.items()]
    return words + ([f"checkpoint={options['checkpoint']}"] if "checkpoint" in options else [])


def _teachers(description: Description, shared: dict) -> dict[str, Run]:
    where, teachers = description.where("teachers"), {}
    named = isinstance(description.teachers, Mapping) and all(isinstance(own, Mapping) for own in description.teachers.values())
    parts.need(named, where, description.teachers, "teachers by name, each with its config and fields")
    for name, own in description.teachers.items():
        with parts.saying_where(f"{where}.{name}"):
            options = {key: own[key] for key in _TEACHER_KEYS if key in own}
            if not options:
                raise InputError('config is missing; give a config file, such as config = "configs/digits.py:teacher"')
            # Its seed is one setting more: there is one teacher for all seeds of its students.
            fields = parts.fields({key: value for key, value in own.items() if key not in options}, "fields", seed=True)
            values = config_files.load(options.get("config", description.config), options.get("argument"))
            for field, value in ({field: shared[field] for field in _OF_TEACHERS_TOO if field in shared} | fields).items():
                parts.set_field(values, field, value)
            config = Config.from_dict(values)
        slug, = parts.slugs([name])
        teachers[name] = Run(f"@{name}", config.seed, f"teachers/{slug}", "last", config.to_dict())
    return teachers


def _teacher_of(config: Config, teachers: dict[str, Run]) -> Run | None:
    """Returns the teacher of this sweep that a point's `teacher` stands for."""
    given = config.teacher
    if given.startswith("@"):
        if given[1:] not in teachers:
            known = suggest(given, [f"@{name}" for name in teachers]) if teachers else "it has none"
            raise InputError(f'config.teacher is "{given}", which is no [teachers.{given[1:]}] of this sweep; {known}')
        return teachers[given[1:]]
    if given and not pathlib.Path(given).exists():
        return teachers.get(given) or teachers.get(pathlib.Path(given).name)
    return None


def _checkpoint(given: Any, config: Config) -> str:
    is_step = isinstance(given, int) and not isinstance(given, bool) and given > 0
    parts.need(given in ("last", "best") or is_step, "checkpoint", given, '"last", "best" or the number of a step that is kept')
    if given == "best" and config.data.selection == "last":
        raise InputError('checkpoint is "best", but config.data.selection is "last", which chooses none; set '
                         'data.selection to "validation"')
    return str(given)


def _check_names(points: list[Point], where) -> None:
    part = where("points")
    for name, count in Counter(point.name for point in points).items():
        if count > 1:
            raise InputError(f'{part}: {count} points are called "{name}"; give each a name of its own')
