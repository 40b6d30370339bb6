"""The run directories that a report is about: read, checked, and collapsed over seeds into the rows of its tables.

A `Run` is what the files say; a row is one run; a group is the mean of the rows that differ in their seed only.
"""

import dataclasses
import json
import math
import statistics
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrd.config import BOOKKEEPING, Config
from jaxrd.errors import InputError
from jaxrd.evaluation import record
from jaxrd.evaluation.names import MEASURES, epsilon_text, norm_name
from jaxrd.evaluation.plots import is_number
from jaxrd.training.log import read_metrics

_IDENTITY = ("role", "method", "student", "data", "norm", "epsilon", "train_examples")
_GALLERY_ARRAYS = ("images", "adversarial", "labels", "clean_prediction", "adversarial_prediction")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run directory holds, as its files say it.

    Attributes:
      workdir: the directory, as it was given.
      config: `config.json`.
      metrics: the lines of `metrics.jsonl`; empty where the file is absent.
      evaluation: `evaluation.json`; empty where the file is absent.
      environment: `environment.json`; empty where the file is absent.
    """

    workdir: Path
    config: dict
    metrics: tuple
    evaluation: dict
    environment: dict = dataclasses.field(default_factory=dict)


def summary(workdirs: Iterable[str | Path]) -> list[dict]:
    """Reads run directories into one row each, the teachers of other listed runs first.

    Args:
      workdirs: run directories; one that is listed twice counts once.

    Returns:
      Rows with "workdir", "role" ("teacher" or "student"), "method", "student", "parameters", "data", "train_examples"
      (None: all, or unknown), "norm", "epsilon", "seed", "teacher", "accuracy", "measures" and "flags" (cascade -> what makes
      its accuracy doubtful; from `evaluation.json`, empty where it is absent), "optimistic" (see `chosen_on_test`) and "config"
      (flat: "method.igdm" -> value).

    Raises:
      InputError: a directory is missing or is no run directory, or one of its files is damaged.
    """
    return to_rows(read_runs(workdirs))


def aggregate(rows: Sequence[dict]) -> list[dict]:
    """Collapses rows that differ in their seed only into mean, standard deviation and count.

    Runs whose other settings differ (a swept weight, say) stay apart, and so do repeated runs of one seed; "variant"
    then names the difference.

    Args:
      rows: from `summary`.

    Returns:
      Rows in the order of first appearance: the common fields, "variant", "label", "workdirs", "seeds" (how many are
      evaluated), "values" (see `spread`) and "flags": cascade -> [(workdir, flag)].
    """
    collected = {}
    for row in rows:
        settings = {key: value for key, value in row["config"].items() if key not in ("seed", "teacher", *BOOKKEEPING)}
        key = (row["role"], row["method"], row["student"], row["data"], row["norm"], row["epsilon"], row["evaluated"],
               _teacher_settings(row["teacher"]), json.dumps(settings, sort_keys=True, default=str))
        collected.setdefault(key, []).append(row)
    groups = [collapse(sorted(part, key=lambda row: row["seed"] if is_number(row["seed"]) else math.inf))
              for members in collected.values() for part in _apart(members, (_other_settings, _workdir))]
    for group in groups:
        twins = [other for other in groups if all(other[key] == group[key] for key in _IDENTITY)]
        group["variant"] = _variant(group, twins) if len(twins) > 1 else ""
    for group in groups:
        group["label"] = _label(group, groups)
    return groups


def read_runs(workdirs: Iterable[str | Path]) -> list[Run]:
    """Reads and checks run directories.

    Args:
      workdirs: run directories; one that is listed twice counts once.

    Returns:
      The runs, in the order of the first mention of each.

    Raises:
      InputError: see `summary`; or `workdirs` is empty.
    """
    unique = {Path(workdir).resolve(): Path(workdir) for workdir in reversed(list(workdirs))}
    if not unique:
        raise InputError("workdirs is empty; name at least one run directory, such as runs/a")
    return [_read(workdir) for workdir in reversed(unique.values())]


def read_gallery(run: Run) -> dict[str, Any]:
    """Reads a run's `evaluation/gallery.npz`.

    Returns:
      "images" and "adversarial" [k, height, width, channel], "labels", "clean_prediction" and "adversarial_prediction"
      [k], and "attack", its key or "".

    Raises:
      InputError: the file is missing or damaged.
    """
    path = run.workdir / "evaluation" / "gallery.npz"
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in _GALLERY_ARRAYS}
            arrays["attack"] = str(file["attack"]) if "attack" in file else ""
        count = {len(arrays[name]) for name in _GALLERY_ARRAYS}
        if len(count) != 1 or arrays["images"].ndim != 4 or arrays["images"].shape != arrays["adversarial"].shape:
            raise ValueError("its arrays have different lengths or shapes")
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is damaged ({str(error).splitlines()[0] if str(error) else type(error).__name__}); "
                         f"run python -m launch.evaluate --workdir={run.workdir} again") from None
    return arrays


def to_rows(runs: Iterable[Run]) -> list[dict]:
    """Returns the rows of `summary` for runs that were read."""
    rows = []
    for run in runs:
        config, evaluation = run.config, run.evaluation
        others = list(evaluation.get(record.OTHER_DATA, {}).values())
        described, data = evaluation.get("run", {}), evaluation.get("data", {})
        anyhow = described or next((other["run"] for other in others), {})  # what holds for all that was measured
        threat = evaluation.get("threat") or _part(config, "threat")
        examples = data.get("train_examples")
        measured = {**evaluation.get("alignment", {}), **evaluation.get("training", {})}
        rows.append({
            "workdir": str(run.workdir), "role": "student",
            # What was built: an IGDM weight of its own may add the module to the name in the configuration, or remove it.
            "method": str(anyhow.get("method") or _part(config, "imported").get("name") or
                          _part(config, "method").get("name") or "?"),
            "evaluated": (data.get("split"), described.get("checkpoint")),
            "student": str(config.get("student") or anyhow.get("student") or "?"),
            "parameters": anyhow.get("parameters"),
            "data": str(data.get("name") or _part(config, "data").get("name") or "?"),
            # An evaluation that leaves it open is of imported weights, whose training nobody here has seen.
            "train_examples": examples or ("-" if "train_examples" in data or "imported" in config
                                           else _part(config, "data").get("examples")),
            "norm": str(threat.get("norm", "?")), "epsilon": threat.get("epsilon"),
            "seed": config.get("seed", anyhow.get("seed")),
            "teacher": str(config.get("teacher") or anyhow.get("teacher") or ""),
            "accuracy": evaluation.get("accuracy", {}),
            "measures": {name: measured[name] for name in MEASURES if name in measured},
            "flags": {name: found.get("flags", []) for name, found in evaluation.get("cascades", {}).items()},
            "optimistic": chosen_on_test(config, evaluation), "config": _with_defaults(flat(config)),
        })
    named = {Path(row["teacher"]) for row in rows if row["teacher"]}
    resolved = {teacher.resolve() for teacher in named}
    # A teacher that moved with its students is still the run of that name without a teacher of its own.
    moved = {teacher.name for teacher in named if not teacher.exists()}
    for row in rows:
        directory = Path(row["workdir"]).resolve()
        if directory in resolved or row["method"] == "teacher" or (not row["teacher"] and directory.name in moved):
            row["role"] = "teacher"
    return sorted(rows, key=lambda row: row["role"] != "teacher")


def members_of(groups: Iterable[dict], runs: Iterable[Run]) -> list[list[Run]]:
    """Returns the runs of each group."""
    by_directory = {str(run.workdir): run for run in runs}
    return [[by_directory[workdir] for workdir in group["workdirs"]] for group in groups]


def collapse(rows: Sequence[dict]) -> dict:
    """Returns the group of rows that differ in their seed only: what `aggregate` returns, but "variant" and "label"."""
    group = {key: rows[0][key] for key in ("role", "method", "student", "data", "norm", "epsilon")}
    for key in ("train_examples", "parameters"):
        group[key] = next((row[key] for row in rows if row[key] is not None), None)
    results = [{**row["accuracy"], **row["measures"]} for row in rows]
    group["values"], group["flags"] = spread(results), {}
    for row in rows:
        for name, flags in row["flags"].items():
            group["flags"].setdefault(name, []).extend((row["workdir"], flag) for flag in flags)
    group["optimistic"] = any(row["optimistic"] for row in rows)
    return group | {"workdirs": [row["workdir"] for row in rows], "seeds": sum(map(bool, results)),
                    "teachers": sorted({row["teacher"] for row in rows} - {""}), "config": rows[0]["config"]}


def selection(config: dict) -> str:
    """Returns what chose a run's best checkpoint, "validation", "last" or "test"; older configurations do not say so."""
    return _part(config, "data").get("selection") or "validation"


def chosen_on_test(config: dict, found: dict) -> bool:
    """Returns whether a record is of a checkpoint that may have been chosen on the run's own test images.

    Args:
      config: `config.json`.
      found: a record of evaluation.json; of the run's own data, where it stands for accuracies on those images.
    """
    checkpoint = found.get("run", {}).get("checkpoint", "last")
    return selection(config) == "test" and checkpoint != "last" and found.get("data", {}).get("split", "test") == "test"


def spread(results: Sequence[dict]) -> dict[str, dict]:
    """Returns name -> {"mean", "sd" (ddof=1; None for one value), "n"} of numbers by name, over those that have the name."""
    spreads = {}
    for name in dict.fromkeys(name for result in results for name in result):
        values = [float(result[name]) for result in results if name in result]
        spreads[name] = {"mean": statistics.fmean(values), "n": len(values),
                         "sd": statistics.stdev(values) if len(values) > 1 else None}
    return spreads


def images_text(group: dict) -> str:
    """Returns how many images the group was trained on, "all" where that is not known."""
    return "all" if group["train_examples"] is None else count_text(group["train_examples"])


def radius_text(group: dict) -> str:
    """Returns the radius of the group's threat model, as it is usually written."""
    return epsilon_text(group["epsilon"]) if is_number(group["epsilon"]) else str(group["epsilon"])


def count_text(value: Any) -> str:
    """Returns a number with its thousands set apart, and anything else as it is."""
    return f"{value:,}" if is_number(value) else str(value)


def flat(config: dict, prefix: str = "") -> dict[str, Any]:
    """Returns a nested configuration as "section.field" -> value."""
    fields = {}
    for key, value in config.items():
        fields.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return fields


def _read(workdir):
    if not workdir.is_dir():
        raise InputError(f'run directory "{workdir}" does not exist; train it first, or correct the path')
    if not (workdir / "config.json").is_file():
        inside = sorted(path.parent for path in workdir.glob("*/config.json"))
        if inside:  # of a sweep, say
            raise InputError(f'"{workdir}" is no run directory but holds {len(inside)}, such as {inside[0]}; give these')
        raise InputError(f'"{workdir}" holds no config.json; give a run directory, as python -m launch.train makes it')
    config = _json(workdir / "config.json", "restore the file or train the run again") | _imported(workdir)
    evaluation = {}
    # Delete it: an evaluation keeps what earlier ones have measured.
    again = f"delete it and run python -m launch.evaluate --workdir={workdir} again"
    if (workdir / "evaluation.json").is_file():
        evaluation = _json(workdir / "evaluation.json", again)
        evaluation = {name: value for name, value in evaluation.items() if value is not None}
        record.check(evaluation, workdir / "evaluation.json", again)
    environment = workdir / "environment.json"
    return Run(workdir, config, tuple(read_metrics(workdir / "metrics.jsonl")), evaluation,
               _json(environment, "delete it, and the report leaves it out") if environment.is_file() else {})


def _imported(workdir):
    """Returns {"imported": name and file} of a directory of imported weights, which tells two of one architecture apart."""
    path = workdir / "import.json"
    if not path.is_file():
        return {}
    imported = _json(path, "import the weights again")
    return {"imported": {"name": imported.get("name"), "file": imported.get("file")}}


def _json(path, way_out):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({str(error).splitlines()[0]}); {way_out}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__} instead of an object; {way_out}")
    return content


def _apart(rows, differences):
    """Splits rows by the first of `differences`, and so on, until no seed occurs twice in a part."""
    if not differences or len({str(row["seed"]) for row in rows}) == len(rows):
        return [rows]
    parts = {}
    for row in rows:
        parts.setdefault(differences[0](row), []).append(row)
    return [part for members in parts.values() for part in _apart(members, differences[1:])]


def _with_defaults(fields):
    """Adds what a configuration of an older version does not say, because there was no choice: runs of both may be alike."""
    return flat(Config().to_dict()) | fields


def _teacher_settings(teacher):
    """Returns what tells one teacher from another of another seed: its configuration, or its path where that is gone."""
    path = Path(teacher) / "config.json"
    if not (teacher and path.is_file()):
        return teacher
    config = _json(path, "restore the file") | _imported(path.parent)
    settings = {key: value for key, value in flat(config).items() if key not in ("seed", "teacher")}
    return json.dumps(settings, sort_keys=True, default=str)


def _other_settings(row):
    return json.dumps(sorted(item for item in row["config"].items() if item[0] != "seed"), default=str)


def _workdir(row):
    return row["workdir"]


def _variant(group, twins):
    fields = sorted({key for twin in twins for key in twin["config"]} - {"seed"})
    differing = [key for key in fields if len({str(twin["config"].get(key, "unset")) for twin in twins}) > 1]
    settings = [[str(twin["config"].get(key, "unset")) for key in differing] for twin in twins]
    own = [str(group["config"].get(key, "unset")) for key in differing]
    if not differing or len(differing) > 3 or settings.count(own) > 1:
        return ", ".join(Path(workdir).name for workdir in group["workdirs"])
    return ", ".join(f"{key}={value}" for key, value in zip(differing, own))


def _label(group, groups):
    """Returns the row's name in plots: its method, and as much else as tells it from the other rows."""
    peers = [other for other in groups if (other["role"], other["method"]) == (group["role"], group["method"])]
    label = group["method"]
    for key, text in (("variant", f"[{group['variant']}]"), ("train_examples", f"{images_text(group)} images"),
                      ("student", group["student"]), ("data", group["data"]), ("norm", norm_name(group["norm"])),
                      ("epsilon", f"ε {radius_text(group)}")):
        same = [other for other in peers if other[key] == group[key]]
        if len(same) < len(peers) and (key != "variant" or group["variant"]):
            label += f" {text}" if key == "variant" else f", {text}"
            peers = same
    return label + (" (teacher)" if group["role"] == "teacher" else "")


def _part(config, name):
    value = config.get(name)
    return value if isinstance(value, dict) else {}
