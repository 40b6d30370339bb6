"""Reports of runs: rows and their means over seeds, tables for console and Markdown, one self-contained HTML page.

Every number is read from the run directories (`config.json`, `metrics.jsonl`, `evaluation.json`,
`evaluation/gallery.npz`); what a run does not hold is left out, or "-" in a table.
"""

import dataclasses
import json
import math
import re
import statistics
import zipfile
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np

from jaxrd.errors import InputError
from jaxrd.evaluation import plots

_GALLERIES = 4
_IDENTITY = ("role", "method", "student", "data", "norm", "epsilon", "train_examples")
_ALIGNMENT = {"gradient_cosine": "grad cosine", "gradient_distance": "grad distance"}
_DEFAULT_COLUMNS = ("clean", "fgsm", "pgd20", "cw30", "strong")
_GALLERY_ARRAYS = ("images", "adversarial", "labels", "clean_prediction", "adversarial_prediction")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run directory holds, as its files say it.

    Attributes:
      workdir: the directory, as it was given.
      config: `config.json`.
      metrics: the lines of `metrics.jsonl`; empty where the file is absent.
      evaluation: `evaluation.json`; empty where the file is absent.
    """

    workdir: Path
    config: dict
    metrics: tuple
    evaluation: dict


def summary(workdirs: Iterable[str | Path]) -> list[dict]:
    """Reads run directories into one row each, the teachers of other listed runs first.

    Args:
      workdirs: run directories; one that is listed twice counts once.

    Returns:
      Rows with "workdir", "role" ("teacher" or "student"), "method", "student", "parameters", "data", "train_examples"
      (None: all, or unknown), "norm", "epsilon", "seed", "teacher", "accuracy" and "alignment" (from `evaluation.json`,
      empty where it is absent) and "config" (flat: "method.igdm" -> value).

    Raises:
      InputError: a directory is missing or is no run directory, or one of its files is damaged.
    """
    return _rows(_read_all(workdirs))


def aggregate(rows: Sequence[dict]) -> list[dict]:
    """Collapses rows that differ in their seed only into mean, standard deviation and count.

    Runs whose other settings differ (a swept weight, say) stay apart, and so do repeated runs of one seed; "variant"
    then names the difference.

    Args:
      rows: from `summary`.

    Returns:
      Rows in the order of first appearance: the common fields, "variant", "label", "workdirs", "seeds" (how many are
      evaluated) and "values": name -> {"mean", "sd" (ddof=1; None for one value), "n"}.
    """
    collected = {}
    for row in rows:
        # Data fields other than these two (the slice of the training images, say) may follow the seed.
        settings = {key: value for key, value in row["config"].items() if key not in ("seed", "teacher", "workdir")
                    and (not key.startswith("data.") or key in ("data.name", "data.examples"))}
        key = (row["role"], row["method"], row["student"], row["data"], row["norm"], row["epsilon"],
               json.dumps(settings, sort_keys=True, default=str))
        collected.setdefault(key, []).append(row)
    groups = [_group(sorted(part, key=lambda row: row["seed"] if _is_number(row["seed"]) else math.inf))
              for members in collected.values() for part in _apart(members, (_other_settings, _workdir))]
    for group in groups:
        twins = [other for other in groups if all(other[key] == group[key] for key in _IDENTITY)]
        group["variant"] = _variant(group, twins) if len(twins) > 1 else ""
    for group in groups:
        group["label"] = _label(group, groups)
    return groups


def table(workdirs: Iterable[str | Path]) -> str:
    """Returns the comparison as aligned plain text: accuracies in percent, mean ± sd over seeds, "-" where absent.

    Args:
      workdirs: run directories.

    Returns:
      Lines without a trailing newline; the teacher, if listed, comes first.

    Raises:
      InputError: see `summary`.
    """
    header, *body = _text_table(aggregate(summary(workdirs)))
    widths = [max(map(len, column)) for column in zip(header, *body)]
    left = sum(name in ("method", "model", "data", "threat") for name in header)
    lines = ["  ".join(cell.ljust(width) if place < left else cell.rjust(width)
                       for place, (cell, width) in enumerate(zip(cells, widths))).rstrip() for cells in (header, *body)]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])


def markdown_table(workdirs: Iterable[str | Path]) -> str:
    """Returns the comparison of `table` as a GitHub-flavoured Markdown table.

    Args:
      workdirs: run directories.

    Returns:
      Lines without a trailing newline.

    Raises:
      InputError: see `summary`.
    """
    special = str.maketrans({"&": "&amp;", "<": "&lt;", "|": "\\|", "*": "\\*"})
    header, *body = [[cell.translate(special) for cell in cells] for cells in _text_table(aggregate(summary(workdirs)))]
    rule = ["---" if name in ("method", "model", "data", "threat") else "---:" for name in header]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *body))


def write(workdirs: Iterable[str | Path], path: str | Path, title: str | None = None) -> Path:
    """Writes a self-contained HTML report, and its plots as PNG files in `evaluation/` beside it.

    Args:
      workdirs: one run directory, or those to compare.
      path: the HTML file; its directory is made if need be.
      title: heading of the page; by default it names the run, or the data that the runs share.

    Returns:
      The path written.

    Raises:
      InputError: see `summary`; or `path` is a directory.
    """
    runs = _read_all(workdirs)
    path = Path(path)
    if path.is_dir():
        raise InputError(f'report path "{path}" is a directory; name a file in it, such as {path / "report.html"}')
    groups = aggregate(_rows(runs))
    by_directory = {str(run.workdir): run for run in runs}
    members = [[by_directory[workdir] for workdir in group["workdirs"]] for group in groups]
    lines = plots.lines([(group["label"], group["method"], group["role"] == "teacher", tuple(part))
                         for group, part in zip(groups, members)])
    chosen, left_out = _choose_galleries(groups, members)
    folder = path.parent / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    if title is None:
        names = list(dict.fromkeys(row["data"] for row in groups))
        title = (f"{groups[0]['method']}: {groups[0]['student']} on {groups[0]['data']}" if len(groups) == 1
                 else f"Robust accuracy on {', '.join(names)}")

    sections = [_section("Results", _results(groups, lines, runs))]
    several = any(group["seeds"] > 1 for group in groups)
    loss_note = "Losses of different methods sum different terms, so their heights are not comparable."
    curve_note = "Means over seeds; bands are one standard deviation. " if several else ""
    for name, heading, draw, note in (
            ("robust_accuracy", "Accuracy against the attack’s radius", plots.robust_accuracy,
             curve_note + "The vertical line is the radius of the attack in training."),
            ("training_curves", "Training", plots.training_curves,
             curve_note + (loss_note if len({group["method"] for group in groups}) > 1 else ""))):
        wide = draw(lines)
        if wide is not None:
            narrow = draw(lines, narrow=True)
            sections.append(_section(heading, _figure(folder / f"{name}.png", wide, narrow, heading, note)))
    sections += [_section("Adversarial images", _galleries(chosen, left_out, folder)),
                 _section("Definitions", _definitions(groups, runs)),
                 _section("Settings", _every_run(runs) + _configuration(runs))]
    versions = sorted({str(run.evaluation["jaxrd"]) for run in runs if "jaxrd" in run.evaluation})
    footer = f"Evaluated with jaxrd {', '.join(versions)}." if versions else ""
    page = _PAGE.format(title=escape(title), style=_CSS, statement=_statement(groups, runs), footer=escape(footer),
                        sections="\n".join(sections))
    path.write_text(page, encoding="utf-8")
    return path


# Reading


def _read_all(workdirs):
    unique = {Path(workdir).resolve(): Path(workdir) for workdir in reversed(list(workdirs))}
    if not unique:
        raise InputError("workdirs is empty; name at least one run directory, such as runs/a")
    return [_read(workdir) for workdir in reversed(unique.values())]


def _read(workdir):
    if not workdir.is_dir():
        raise InputError(f'run directory "{workdir}" does not exist; train it first, or correct the path')
    if not (workdir / "config.json").is_file():
        raise InputError(f'"{workdir}" holds no config.json; give a run directory, as python -m launch.train makes it')
    config = _json(workdir / "config.json", "restore the file or train the run again")
    evaluation = {}
    again = f"run python -m launch.evaluate --workdir={workdir} again"
    if (workdir / "evaluation.json").is_file():
        evaluation = _json(workdir / "evaluation.json", again)
        evaluation = {name: value for name, value in evaluation.items() if value is not None}
        _check(evaluation, workdir / "evaluation.json", again)
    metrics = []
    if (workdir / "metrics.jsonl").is_file():
        for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                metrics.append(json.loads(line))
            except ValueError:
                continue  # A run that was killed leaves half a line behind; the resumed one writes that step again.
    return Run(workdir, config, tuple(line for line in metrics if isinstance(line, dict)), evaluation)


def _json(path, way_out):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({str(error).splitlines()[0]}); {way_out}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__} instead of an object; {way_out}")
    return content


def _check(evaluation, path, way_out):
    for name in ("run", "data", "threat", "accuracy", "attacks", "alignment", "robustness_curve"):
        if not isinstance(evaluation.get(name, {}), dict):
            raise InputError(f"{path}: {name} is {_short(evaluation[name])} instead of an object; {way_out}")
    curve = evaluation.get("robustness_curve") or {"epsilon": [], "accuracy": []}
    radii, accuracies = curve.get("epsilon"), curve.get("accuracy")
    if not (isinstance(radii, list) and isinstance(accuracies, list) and len(radii) == len(accuracies)):
        raise InputError(f"{path}: robustness_curve needs as many values of accuracy as of epsilon; {way_out}")
    named = [*evaluation.get("accuracy", {}).items(), *(("robustness_curve", value) for value in accuracies)]
    for name, value in named:
        if not (_is_number(value) and 0 <= value <= 1):
            raise InputError(f"{path}: accuracy {name} is {_short(value)}, outside [0, 1]; {way_out}")
    numbers = [*radii, *(value for name, value in evaluation.get("alignment", {}).items() if name in _ALIGNMENT)]
    for value in numbers + [evaluation["threat"].get("epsilon")] * ("threat" in evaluation):
        if not (_is_number(value) and math.isfinite(value)):
            raise InputError(f"{path}: {_short(value)} stands where a finite number belongs; {way_out}")


def _read_gallery(run):
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


# Rows


def _rows(runs):
    rows = []
    for run in runs:
        config, evaluation = run.config, run.evaluation
        described, data = evaluation.get("run", {}), evaluation.get("data", {})
        threat = evaluation.get("threat") or _part(config, "threat")
        examples = data.get("train_examples")
        alignment = evaluation.get("alignment", {})
        rows.append({
            "workdir": str(run.workdir), "role": "student",
            "method": str(_part(config, "method").get("name") or described.get("method") or "?"),
            "student": str(config.get("student") or described.get("student") or "?"),
            "parameters": described.get("parameters"),
            "data": str(data.get("name") or _part(config, "data").get("name") or "?"),
            "train_examples": _part(config, "data").get("examples") if examples is None else examples,
            "norm": str(threat.get("norm", "?")), "epsilon": threat.get("epsilon"),
            "seed": config.get("seed", described.get("seed")),
            "teacher": str(config.get("teacher") or described.get("teacher") or ""),
            "accuracy": evaluation.get("accuracy", {}),
            "alignment": {name: alignment[name] for name in _ALIGNMENT if name in alignment},
            "config": _flat(config),
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


def _apart(rows, differences):
    """Splits rows by the first of `differences`, and so on, until no seed occurs twice in a part."""
    if not differences or len({str(row["seed"]) for row in rows}) == len(rows):
        return [rows]
    parts = {}
    for row in rows:
        parts.setdefault(differences[0](row), []).append(row)
    return [part for members in parts.values() for part in _apart(members, differences[1:])]


def _other_settings(row):
    return json.dumps(sorted(item for item in row["config"].items() if item[0] != "seed"), default=str)


def _workdir(row):
    return row["workdir"]


def _group(rows):
    group = {key: rows[0][key] for key in ("role", "method", "student", "data", "norm", "epsilon")}
    for key in ("train_examples", "parameters"):
        group[key] = next((row[key] for row in rows if row[key] is not None), None)
    results = [{**row["accuracy"], **row["alignment"]} for row in rows]
    group["values"] = {}
    for name in dict.fromkeys(name for result in sorted(results, key=len, reverse=True) for name in result):
        values = [float(result[name]) for result in results if name in result]
        group["values"][name] = {"mean": statistics.fmean(values), "n": len(values),
                                 "sd": statistics.stdev(values) if len(values) > 1 else None}
    return group | {"workdirs": [row["workdir"] for row in rows], "seeds": sum(map(bool, results)),
                    "teachers": sorted({row["teacher"] for row in rows} - {""}), "config": rows[0]["config"]}


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
    for key, text in (("variant", f"[{group['variant']}]"), ("train_examples", f"{_images(group)} images"),
                      ("student", group["student"]), ("data", group["data"]), ("norm", plots.norm_name(group["norm"])),
                      ("epsilon", f"ε {_epsilon(group)}")):
        same = [other for other in peers if other[key] == group[key]]
        if len(same) < len(peers) and (key != "variant" or group["variant"]):
            label += f" {text}" if key == "variant" else f", {text}"
            peers = same
    return label + (" (teacher)" if group["role"] == "teacher" else "")


# Cells


def _columns(groups):
    """Returns the (key, heading) of every column; model, data, threat and seeds only where rows differ in them."""
    students = [group for group in groups if group["role"] == "student"]
    fullest_first = sorted(groups, key=lambda group: -len(group["values"]))
    present = _distinct(name for group in fullest_first for name in group["values"])
    names = [name for name in present if name not in _ALIGNMENT] or _DEFAULT_COLUMNS
    return [("method", "method"),
            *([("student", "model")] if len({group["student"] for group in students}) > 1 else []),
            *([("data", "data")] if len({group["data"] for group in groups}) > 1 else []),
            *([("threat", "threat")] if len({(group["norm"], group["epsilon"]) for group in groups}) > 1 else []),
            ("train_examples", "train images"),
            *([("seeds", "seeds")] if any(group["seeds"] > 1 for group in groups) else []),
            *((name, plots.attack_name(name)) for name in names),
            *((name, heading) for name, heading in _ALIGNMENT.items() if name in present)]


def _cell(group, key):
    if key == "method":
        variant = f" [{group['variant']}]" if group["variant"] else ""
        return group["method"] + variant + (" (teacher)" if group["role"] == "teacher" else "")
    if key == "threat":
        return f"{plots.norm_name(group['norm'])} {_epsilon(group)}"
    if key == "train_examples":
        return _images(group)
    if key in ("student", "data", "seeds"):
        return str(group[key])
    if key not in group["values"]:
        return "-"
    mean, sd = group["values"][key]["mean"], group["values"][key]["sd"]
    if key in _ALIGNMENT:
        decimals = 3 if mean == 0 else min(max(0, 2 - math.floor(math.log10(abs(mean)))), 8)
    else:
        mean, sd, decimals = 100 * mean, None if sd is None else 100 * sd, 1
    return f"{mean:.{decimals}f}" + ("" if sd is None else f" ± {sd:.{decimals}f}")


def _text_table(groups):
    columns = _columns(groups)
    return [[heading for _, heading in columns], *([_cell(group, key) for key, _ in columns] for group in groups)]


def _images(group):
    return "all" if group["train_examples"] is None else _count(group["train_examples"])


def _count(value):
    return f"{value:,}" if _is_number(value) else str(value)


def _epsilon(group):
    return plots.epsilon_text(group["epsilon"]) if _is_number(group["epsilon"]) else str(group["epsilon"])


def _best(groups, key):
    """Returns the places of the best students among those on the same data and threat; none where all print alike."""
    places = set()
    peers = {}
    for place, group in enumerate(groups):
        if group["role"] == "student" and key in group["values"]:
            peers.setdefault((group["data"], group["norm"], group["epsilon"]), []).append(place)
    for members in peers.values():
        shown = {place: float(_cell(groups[place], key).split(" ")[0]) for place in members}
        best = (min if key == "gradient_distance" else max)(shown.values())
        if len(set(shown.values())) > 1:
            places |= {place for place, value in shown.items() if value == best}
    return places


# The page


def _statement(groups, runs):
    students = [group for group in groups if group["role"] == "student"] or groups
    teachers = [group for group in groups if group["role"] == "teacher" and group not in students]
    methods = _distinct(group["method"] for group in students)
    sizes = {group["student"]: f" ({_count(group['parameters'])} parameters)"
             for group in students if group["parameters"]}
    models = _distinct(group["student"] + sizes.get(group["student"], "") for group in students)
    data = _listed(_distinct(group["data"] for group in groups))
    named = _listed(f"<code>{escape(method)}</code>" for method in methods)
    if len(methods) == 1:
        text = [f"{escape(_listed(models))}, trained with {named} on {escape(data)}."]
    else:
        text = [f"{len(methods)} methods of training {escape(_listed(models))} on {escape(data)}: {named}."]
    if any(group["values"] for group in groups):
        parts = [run.evaluation.get("data", {}) for run in runs]
        measured = _distinct(f"{part['examples']:,} {part.get('split', '')} images" for part in parts
                             if _is_number(part.get("examples")))
        threats = _distinct(f"ε = {_epsilon(group)} in {plots.norm_name(group['norm'])}" for group in groups)
        images = f"on {escape(_listed(measured))}, " if measured else ""
        text.append(f"Accuracy is measured {images}unchanged and under attacks within "
                    f"{escape(_listed(threats))} (pixels in [0, 1]).")
    own = _distinct(_images(group) for group in students)
    if teachers:
        seen = _distinct(_images(group) for group in teachers)
        who = escape(_listed(_distinct(f"{group['student']} ({group['method']})" for group in teachers)))
        text.append(f"The teacher, {who}, was trained on {_listed(seen)} images and the students on "
                    + (f"{_listed(own)}." if seen != own else "as many."))
    else:
        named = _distinct(teacher for group in students for teacher in group["teachers"])
        if named:
            text.append(f"Teacher (not listed here): {_listed(f'<code>{escape(name)}</code>' for name in named)}.")
        text.append(f"Training used {_listed(own)} images.")
    counts = sorted({group["seeds"] for group in students if group["seeds"]})
    if counts and counts[-1] > 1:
        many = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        text.append(f"Values are means over {many} seeds ± one standard deviation of a single run.")
    elif counts and len(students) > 1:
        text.append("One seed each, so a difference between rows includes the luck of the seed.")
    return " ".join(text)


def _results(groups, lines, runs):
    columns = _columns(groups)
    meanings = {"method": "name of the method in the configuration", "train_examples": "images it was trained on",
                "seeds": "evaluated runs that differ only in their seed",
                "clean": "accuracy in percent on unchanged images"}
    for run in runs:
        for name, attack in run.evaluation.get("attacks", {}).items():
            if isinstance(attack, dict) and attack.get("description"):
                meanings.setdefault(name, f"accuracy in percent. {attack['description']}")
        for name in _ALIGNMENT:
            if run.evaluation.get("alignment", {}).get("definition"):
                meanings.setdefault(name, run.evaluation["alignment"]["definition"])
    header = [f'<abbr title="{escape(str(meanings[key]))}">{escape(heading)}</abbr>' if key in meanings
              else escape(heading) for key, heading in columns]
    best = {key: _best(groups, key) for key, _ in columns}
    body = []
    for place, (group, line) in enumerate(zip(groups, lines)):
        cells = []
        for key, _ in columns:
            mean, plus_minus, sd = escape(_cell(group, key)).partition(" ± ")
            text = mean + (f' <span class="sd">± {sd}</span>' if plus_minus else "")
            if key == "method":
                text = f'<span class="key" style="background:{line.colour}"></span>' + text.replace(
                    " (teacher)", ' <span class="sd">(teacher)</span>')
            cells.append(f'<span class="best">{text}</span>' if place in best[key] else text)
        body.append(cells)
    text = sum(key in ("method", "student", "data", "threat") for key, _ in columns)
    notes = ["Accuracies in percent."]
    if any(best.values()):
        notes.append("Marked: the best mean among the students" + (
            " (highest; for the gradient distance, lowest)." if best.get("gradient_distance") else "."))
    missing = [str(run.workdir) for run in runs if not run.evaluation]
    if missing:
        notes.append(f"Not evaluated: {_listed(missing)}.")
    return _html_table(header, body, text) + f'<p class="note">{escape(" ".join(notes))}</p>' + _differences(groups)


def _differences(groups):
    """Returns a table of "method+module" minus "method" for each pair that is listed, or nothing."""
    alike = ("role", "student", "data", "norm", "epsilon", "train_examples")
    names = [(key, heading) for key, heading in _columns(groups) if any(key in group["values"] for group in groups)]
    body = []
    for group in groups:
        base = group["method"].rpartition("+")[0]
        bases = [other for other in groups if base and other["method"] == base
                 and all(other[key] == group[key] for key in alike)]
        if len(bases) != 1:
            continue
        cells = []
        for key, _ in names:
            if key not in group["values"] or key not in bases[0]["values"]:
                cells.append("-")
                continue
            difference = group["values"][key]["mean"] - bases[0]["values"][key]["mean"]
            factor, decimals = (1, 3) if key in _ALIGNMENT else (100, 1)
            # Adding 0.0 turns a rounded -0.0 into 0.0.
            cells.append(f"{round(factor * difference, decimals) + 0.0:+.{decimals}f}")
        body.append([escape(f"{group['label']} − {bases[0]['label']}"), *(cell.replace("-", "−") for cell in cells)])
    if not body:
        return ""
    note = "Differences of the means above; accuracies in percentage points. Compare them with the standard deviations."
    header = ["", *(escape(heading) for _, heading in names)]
    return f'<h3>What the added module changes</h3>{_html_table(header, body, 1)}<p class="note">{note}</p>'


def _choose_galleries(groups, members):
    """Returns (row, run, arrays) of each row's first run with a gallery, students first, and the number left out."""
    chosen = []
    for group, runs in sorted(zip(groups, members), key=lambda pair: pair[0]["role"] == "teacher"):
        run = next((run for run in runs if (run.workdir / "evaluation" / "gallery.npz").is_file()), None)
        if run is not None:
            chosen.append((group, run))
    read = [(group, run, _read_gallery(run)) for group, run in chosen[:_GALLERIES]]
    return [entry for entry in read if len(entry[2]["images"])], len(chosen) - len(read)


def _galleries(chosen, left_out, folder):
    html = []
    used = set()
    for group, run, arrays in chosen:
        threat = {"norm": group["norm"], "epsilon": group["epsilon"] if _is_number(group["epsilon"]) else 0.0}
        threat |= run.evaluation.get("threat", {})
        name = re.sub(r"[^\w.+-]+", "_", run.workdir.resolve().name)
        while name in used:
            name += "_"
        used.add(name)
        scale = plots.epsilon_text(plots.gallery_scale(arrays, threat))
        colours = (f"red at +{scale}, blue at −{scale}" if arrays["images"].shape[-1] == 1
                   else f"magnified around mid-grey, full at ±{scale}")
        attack = plots.attack_name(arrays["attack"]) if arrays["attack"] else "Adversarial images"
        seed = run.config.get("seed")
        radius = f"ε = {plots.epsilon_text(threat['epsilon'])} in {plots.norm_name(threat['norm'])}"
        note = f"{attack}, {radius}. Below each image stands the prediction: ✓ right, ✗ wrong. Perturbation: {colours}."
        html.append(f"<h3>{escape(group['label'] + ('' if seed is None else f', seed {seed}'))}</h3>")
        wide, narrow = (plots.gallery(arrays, threat, narrow=narrow) for narrow in (False, True))
        html.append(_figure(folder / f"gallery_{name}.png", wide, narrow,
                            f"Clean images, perturbations and adversarial images of {group['label']}", note))
    if left_out:
        rows = "row" if left_out == 1 else "rows"
        html.append(f'<p class="note">Images of {left_out} more {rows} are not shown.</p>')
    return "\n".join(html)


def _definitions(groups, runs):
    entries = {}
    for run in runs:
        for name, attack in run.evaluation.get("attacks", {}).items():
            entries.setdefault((plots.attack_name(name), _attack_text(attack)), []).append(run)
        definition = run.evaluation.get("alignment", {}).get("definition")
        if definition:
            entries.setdefault(("Gradient cosine and distance", escape(str(definition))), []).append(run)
    names = [name for name, _ in entries]
    html = ""
    for (name, text), owners in entries.items():
        # Definitions that differ between runs are kept apart, and say whose they are.
        whose = f" ({_listed(str(run.workdir) for run in owners)})" if names.count(name) > 1 else ""
        html += f"<dt>{escape(name + whose)}</dt><dd>{text}</dd>"
    return f"<dl>{html}</dl>" if html else ""


def _attack_text(attack):
    if not isinstance(attack, dict):
        return escape(str(attack))
    settings = ", ".join(f"{key.replace('_', ' ')} {_short(value)}" for key, value in attack.items()
                         if key != "description")
    description = escape(str(attack.get("description", "")))
    return description + (f' <span class="settings">{escape(settings)}</span>' if settings else "")


def _every_run(runs):
    if len(runs) < 2:
        return ""
    rows = _rows(runs)
    directories = {str(run.workdir): run for run in runs}
    names = [(key, heading) for key, heading in _columns(aggregate(rows))
             if any(key in row["accuracy"] or key in row["alignment"] for row in rows)]
    body = []
    for row in rows:
        run = directories[row["workdir"]]
        described = run.evaluation.get("run", {})
        single = _group([row])
        seconds = [line["seconds"] for line in run.metrics if _is_number(line.get("seconds"))]
        body.append([escape(row["workdir"]), *(escape("-" if value is None else str(value)) for value in (
            row["seed"], described.get("step"), described.get("checkpoint"), described.get("weights"),
            f"{max(seconds):,.0f} s" if seconds else None)), *(escape(_cell(single, key)) for key, _ in names)])
    header = ["run", "seed", "step", "checkpoint", "weights", "training", *(escape(heading) for _, heading in names)]
    return f"<details><summary>Every run</summary>{_html_table(header, body, 1)}</details>"


def _configuration(runs):
    if len(runs) == 1:
        text = escape(json.dumps(runs[0].config, indent=2, ensure_ascii=False))
        return f"<details><summary>Configuration</summary><pre>{text}</pre></details>"
    flat = [_flat(run.config) for run in runs]
    fields = sorted({key for config in flat for key in config})
    shown = {key: [_short(config[key]) if key in config else "-" for config in flat] for key in fields}
    differing = [key for key in fields if len(set(shown[key])) > 1]
    common = "\n".join(f"{key} = {shown[key][0]}" for key in fields if key not in differing)
    body = [[escape(str(run.workdir)), *(escape(shown[key][place]) for key in differing)]
            for place, run in enumerate(runs)]
    differences = _html_table(["run", *map(escape, differing)], body, len(differing) + 1)
    return (f"<details><summary>Configuration</summary><p>What differs:</p>{differences}"
            f"<p>What all share:</p><pre>{escape(common)}</pre></details>")


def _section(heading, content):
    return f"<section><h2>{escape(heading)}</h2>{content}</section>" if content else ""


def _html_table(header, body, text_columns):
    """Returns a table in a box that scrolls; cells are HTML, the first `text_columns` left-aligned."""
    side = ["text" if place < text_columns else "number" for place in range(len(header))]
    head = "".join(f'<th class="{kind}">{cell}</th>' for kind, cell in zip(side, header))
    rows = "\n".join("<tr>" + "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in zip(side, cells)) + "</tr>"
                     for cells in body)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'


def _figure(path, wide, narrow, alternative, note):
    """Saves the wide figure at `path` and returns the HTML that shows it, or the narrow one on a phone."""
    image = plots.png(wide)
    path.write_bytes(image)
    width = min(wide.get_figwidth() / 10, 1)
    return (f'<figure><picture><source media="(max-width: 640px)" srcset="{plots.data_uri(plots.png(narrow))}">'
            f'<img src="{plots.data_uri(image)}" alt="{escape(alternative)}" style="max-width:{width:.0%}"></picture>'
            f"<figcaption>{escape(note)}</figcaption></figure>")


def _part(config, name):
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def _flat(config, prefix=""):
    flat = {}
    for key, value in config.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _distinct(values):
    return list(dict.fromkeys(values))


def _listed(values):
    *first, last = list(values)
    return f"{', '.join(first)} and {last}" if first else last


def _short(value):
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_CSS = """
:root { color-scheme: light dark;
  --page: #fafaf8; --card: #fff; --ink: #1f2429; --soft: #626b74; --line: #e2e5e8; --best: #e8f1f8; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15181b; --card: #1c2024; --ink: #e4e7ea; --soft: #9aa4ad; --line: #32383e; --best: #20384a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 -apple-system, "Segoe UI", Inter, Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 56px 28px 72px; }
h1 { font-size: 2rem; line-height: 1.2; font-weight: 650; letter-spacing: -0.015em; margin: 0 0 14px; }
h1, p, dd, figcaption { overflow-wrap: anywhere; }
h2 { font-size: 1.22rem; font-weight: 650; letter-spacing: -0.005em; margin: 52px 0 14px; }
h3 { font-size: 1rem; font-weight: 650; margin: 28px 0 10px; }
p.lead { max-width: 46em; margin: 0; font-size: 1.06rem; }
p.note, figcaption { color: var(--soft); font-size: 0.875rem; max-width: 56em; margin: 10px 0 0; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; font-size: 0.9em; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 0.9375rem; font-variant-numeric: tabular-nums; }
th, td { padding: 9px 12px; white-space: nowrap; text-align: right; }
th.text, td.text { text-align: left; }
th { font-weight: 500; font-size: 0.8125rem; color: var(--soft); border-bottom: 1px solid var(--line); }
tbody tr + tr td { border-top: 1px solid var(--line); }
abbr { text-decoration: underline dotted var(--line); text-underline-offset: 4px; cursor: help; }
.sd { color: var(--soft); font-weight: 400; font-size: 0.875em; }
.best { background: var(--best); font-weight: 650; border-radius: 4px; padding: 3px 5px; margin: 0 -5px; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 9px; }
figure { margin: 0 0 28px; }
picture { display: block; background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 14px; }
img { display: block; width: 100%; height: auto; margin: 0 auto; }
dl { margin: 0; max-width: 56em; }
dt { font-weight: 600; margin-top: 14px; }
dd { margin: 2px 0 0; }
.settings { display: block; color: var(--soft); font-size: 0.875rem; }
details { border-top: 1px solid var(--line); padding: 12px 0; }
summary { cursor: pointer; font-weight: 600; }
details > :not(summary) { margin-top: 12px; }
details table { font-size: 0.8125rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; overflow: auto; }
footer { margin-top: 44px; color: var(--soft); font-size: 0.8125rem; }
@media (max-width: 640px) {
  main { padding: 30px 16px 48px; } h1 { font-size: 1.5rem; } p.lead { font-size: 1rem; } h2 { margin-top: 40px; }
  th, td { padding: 8px 11px; } picture { padding: 8px; } img { max-width: 100% !important; } }
@media print { .scroll { overflow: visible; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header>
<h1>{title}</h1>
<p class="lead">{statement}</p>
</header>
{sections}
<footer>{footer}</footer>
</main>
</body>
</html>
"""
