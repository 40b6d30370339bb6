"""evaluation.json: what several evaluations of a run keep of each other, and what a reader may expect of the file.

The file is the record of the run's own data; under "other_data" it has one more record for each other data set, by name. Each
record says of itself which checkpoint, images, threat model and seed it is of.
"""

import hashlib
import json
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxrd import files
from jaxrd.errors import InputError
from jaxrd.evaluation.names import MEASURES
from jaxrd.evaluation.plots import is_number
from jaxrd.training import processes
from jaxrd.training.log import write_json

OTHER_DATA = "other_data"
RESULTS = ("accuracy", "attacks", "seconds", "cascades")  # of a record, by attack
_TERMS = ("jaxrd", "run", "data", "threat", "seed")  # what a record is of


def read(path: pathlib.Path) -> dict[str, Any]:
    """Returns what the file holds; nothing where it is absent or damaged, which is then written anew."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}


def write(path: pathlib.Path, record: dict[str, Any], name: str = "") -> None:
    """Writes one record and leaves the others as they are in the file now, which another evaluation may just have written.

    Of a run of several processes, the main one writes.

    Args:
      path: evaluation.json.
      record: of the run's own data, which is given the records of other data; or of `name`.
      name: of other data.
    """
    if not processes.is_main():
        return
    with files.alone(path.with_name(f".{path.name}.lock")):
        content = read(path)
        others = content.get(OTHER_DATA)
        others = others if isinstance(others, dict) else {}
        if name:
            write_json(path, content | {OTHER_DATA: others | {name: record}})
            return
        if others:
            record[OTHER_DATA] = others
        write_json(path, record)


def keep_earlier(record: dict[str, Any], earlier: Any) -> None:
    """Takes over what an earlier evaluation of the same model on the same terms measured, whatever the earlier record holds.

    Args:
      record: a new record, to which results are added.
      earlier: what stands in its place.
    """
    if not isinstance(earlier, dict) or not all(isinstance(earlier.get(name, {}), dict) for name in ("data", *RESULTS)):
        return
    if "selection" in record["data"] and "data" in earlier:  # it is younger than the other terms
        default = None if record["data"]["selection"] is None else "validation"
        earlier = earlier | {"data": {"selection": default} | earlier["data"]}
    if any(earlier.get(name) != record[name] for name in _TERMS):
        return
    for name in RESULTS:
        record[name] |= earlier.get(name, {})
    record |= {name: earlier[name] for name in ("alignment", "classes", "robustness_curve")
               if isinstance(earlier.get(name), dict)}


def fingerprint(arrays: Iterable) -> str:
    """Returns the SHA-256 of arrays: their dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for array in map(np.ascontiguousarray, arrays):
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def check(evaluation: dict[str, Any], path: pathlib.Path, way_out: str) -> None:
    """Raises InputError for the first thing in an evaluation.json that a report could not show, with the `way_out`."""
    for name in ("run", "data", "threat", "accuracy", "attacks", "alignment", "classes", "training", "robustness_curve",
                 "cascades", OTHER_DATA):
        _need_object(evaluation.get(name, {}), name, path, way_out)
    curve = evaluation.get("robustness_curve") or {"epsilon": [], "accuracy": []}
    radii, accuracies = curve.get("epsilon"), curve.get("accuracy")
    if not (isinstance(radii, list) and isinstance(accuracies, list) and len(radii) == len(accuracies)):
        raise InputError(f"{path}: robustness_curve needs as many values of accuracy as of epsilon; {way_out}")
    _check_results(evaluation, "", path, way_out)
    _check_accuracies((("robustness_curve", value) for value in accuracies), path, way_out)
    numbers = [*radii, *(value for section in ("alignment", "training") for name, value in evaluation.get(section, {}).items()
                         if name in MEASURES)]
    _check_numbers(numbers, path, way_out)
    _check_classes(evaluation.get("classes", {}), path, way_out)
    for name, record in evaluation.get(OTHER_DATA, {}).items():
        where = f"{OTHER_DATA}.{name}"
        _need_object(record, where, path, way_out)
        for part in ("run", "data", "threat", *RESULTS):
            _need_object(record.get(part), f"{where}.{part}", path, way_out)
        _check_numbers([record["data"].get("examples")], path, way_out)
        _check_results(record, f"{where}.", path, way_out)


def short(value: Any) -> str:
    """Returns a value from a JSON file in 80 characters at most."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_results(record, prefix, path, way_out):
    """Checks what a record of own or other data has: accuracies, radius, cascades."""
    _check_accuracies(((f"{prefix}{name}", value) for name, value in record.get("accuracy", {}).items()), path, way_out)
    if "threat" in record:
        _check_numbers([record["threat"].get("epsilon")], path, way_out)
    for name, found in record.get("cascades", {}).items():
        _check_cascade(found, f"{prefix}cascades.{name}", path, way_out)


def _check_accuracies(named, path, way_out):
    for name, value in named:
        if not (is_number(value) and 0 <= value <= 1):
            raise InputError(f"{path}: accuracy {name} is {short(value)}, outside [0, 1]; {way_out}")


def _check_classes(classes, path, way_out):
    """Checks that every list has an entry for each class: a number, or None for the mean of a class without images."""
    count = len(classes["examples"]) if isinstance(classes.get("examples"), list) else None
    for part in ("accuracy", "confusion"):
        _need_object(classes.get(part, {}), f"classes.{part}", path, way_out)
    matrices = {f"confusion.{name}": rows for name, rows in classes.get("confusion", {}).items() if name != "attack"}
    lists = {f"accuracy.{name}": means for name, means in classes.get("accuracy", {}).items()} | {
        name: classes[name] for name in ("examples", "gradient_cosine") if name in classes}
    for name, rows in matrices.items():
        lists |= {name: rows} if not isinstance(rows, list) or len(rows) != count else {
            f"{name}[{place}]": row for place, row in enumerate(rows)}
    for name, values in lists.items():
        if not (isinstance(values, list) and len(values) == count and all(value is None or is_finite(value) for value in values)):
            raise InputError(f"{path}: classes.{name} is {short(values)} instead of one number for each class; {way_out}")


def _check_numbers(numbers, path, way_out):
    for value in numbers:
        if not is_finite(value):
            raise InputError(f"{path}: {short(value)} stands where a finite number belongs; {way_out}")


def _need_object(value, name, path, way_out):
    if not isinstance(value, dict):
        raise InputError(f"{path}: {name} is {short(value)} instead of an object; {way_out}")


def _check_cascade(found, name, path, way_out):
    def check(fits, part, value, wanted):
        if not fits:
            raise InputError(f"{path}: {name}{part} is {short(value)} instead of {wanted}; {way_out}")

    check(isinstance(found, dict), "", found, "an object")
    for part in ("stages", "seconds", "passes"):
        check(isinstance(found.get(part, {}), dict), f".{part}", found.get(part), "an object")
    check(found.get("stages"), ".stages", found.get("stages"), "the accuracy after each stage")
    for stage, value in found["stages"].items():
        check(is_finite(value) and 0 <= value <= 1, f".stages.{stage}", value, "an accuracy in [0, 1]")
    for stage, value in found.get("seconds", {}).items():
        check(is_finite(value) and value >= 0, f".seconds.{stage}", value, "a number of at least 0")
    for stage, pair in found.get("passes", {}).items():
        fits = isinstance(pair, list) and len(pair) == 2 and all(is_finite(value) and value >= 0 for value in pair)
        check(fits, f".passes.{stage}", pair, "two numbers of at least 0, forward and backward")
    flags = found.get("flags", [])
    check(isinstance(flags, list) and all(isinstance(flag, str) for flag in flags), ".flags", flags, "a list of strings")


def is_finite(value: Any) -> bool:
    """Whether a value is a number that JSON can hold."""
    return is_number(value) and math.isfinite(value)
