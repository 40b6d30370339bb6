"""Reports of runs: one self-contained HTML page, with the rows (`runs`) and tables (`tables`) that it is made of.

Every number is read from the run directories (`config.json`, `metrics.jsonl`, `evaluation.json`,
`evaluation/gallery.npz`); what a run does not hold is left out, or "-" in a table.
"""

import re
from collections.abc import Iterable
from html import escape
from pathlib import Path

from jaxrd.errors import InputError
from jaxrd.evaluation import cascades, classes, correlations, exports, page, plots, reliability, settings, shift, tables
from jaxrd.evaluation.names import ALIGNMENT, attack_name, attack_order, epsilon_text, norm_name
from jaxrd.evaluation.record import OTHER_DATA, short
from jaxrd.evaluation.runs import (
    aggregate, count_text, images_text, is_number, members_of, radius_text, read_gallery, read_runs, summary, to_rows)
from jaxrd.evaluation.shift import table as other_data_table
from jaxrd.evaluation.tables import markdown_table, table

__all__ = ["aggregate", "markdown_table", "other_data_table", "summary", "table", "write"]

_GALLERIES = 4


def write(workdirs: Iterable[str | Path], path: str | Path, title: str | None = None, before: Iterable[str] = ()) -> Path:
    """Writes a self-contained HTML report; beside it its plots in `evaluation/` (PNG), its tables in `tables/` (see `exports`).

    Args:
      workdirs: one run directory, or those to compare.
      path: the HTML file; its directory is made if need be.
      title: heading of the page; by default it names the run, or the data that the runs share.
      before: HTML of sections that stand before the results, from `page.section`.

    Returns:
      The path written.

    Raises:
      InputError: see `summary`; no run was evaluated and nothing stands `before`; or `path` is a directory.
    """
    runs = read_runs(workdirs)
    path, before = Path(path), tuple(before)
    if not before and not any(run.evaluation.get(part) for run in runs for part in ("accuracy", OTHER_DATA)):
        names = [str(run.workdir) for run in runs]
        raise InputError(f"nothing to report, for {_listed(names)} {'has' if len(names) == 1 else 'have'} no results; run "
                         f"python -m launch.evaluate --workdir={','.join(names)} first")
    if path.is_dir():
        raise InputError(f'report path "{path}" is a directory; name a file in it, such as {path / "report.html"}')
    groups = aggregate(to_rows(runs))
    members = members_of(groups, runs)
    lines = plots.lines([(group["label"], group["method"], group["role"] == "teacher", tuple(part))
                         for group, part in zip(groups, members)])
    chosen, left_out = _choose_galleries(groups, members)
    folder = path.parent / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    if title is None:
        names = [name for name in dict.fromkeys(row["data"] for row in groups) if name != "?"]
        on = f" on {', '.join(names)}" if names else ""
        title = f"{groups[0]['method']}: {groups[0]['student']}{on}" if len(groups) == 1 else f"Robust accuracy{on}"

    # Imported weights may have been evaluated on other data alone.
    other_only = not any("accuracy" in run.evaluation for run in runs) and any(OTHER_DATA in run.evaluation for run in runs)
    results = "" if other_only else _results(groups, members, lines, runs)
    sections = [*before, page.section("Results", results), shift.section(groups, members),
                *cascades.sections(groups, members, lines), reliability.section(groups, members, lines, folder)]
    several = any(group["seeds"] > 1 for group in groups)
    loss_note = "Losses of different methods sum different terms, so their heights are not comparable."
    curve_note = "Means over seeds; bands are one standard deviation. " if several else ""
    star_note = " Stars: accuracy under AutoAttack." if any(plots.has_star(run.evaluation) for run in runs) else ""
    for name, heading, draw, note in (
            ("robust_accuracy", "Accuracy against the attack’s radius", plots.robust_accuracy,
             curve_note + "The vertical line is the radius of the attack in training." + star_note),
            ("training_curves", "Training", plots.training_curves,
             curve_note + (loss_note if len({group["method"] for group in groups}) > 1 else ""))):
        wide = draw(lines)
        if wide is not None:
            narrow = draw(lines, narrow=True)
            sections.append(page.section(heading, page.figure(folder / f"{name}.png", wide, narrow, heading, note)))
    sections += [correlations.section(groups, members, lines, folder),
                 classes.section(groups, members, lines, folder),
                 page.section("Adversarial images", _galleries(chosen, left_out, folder)),
                 page.section("Definitions", _definitions(groups, runs)), settings.section(runs)]
    records = [record for run in runs for record in (run.evaluation, *run.evaluation.get(OTHER_DATA, {}).values())]
    versions = sorted({str(record["jaxrd"]) for record in records if "jaxrd" in record})
    footer = f"Evaluated with jaxrd {', '.join(versions)}. " if versions else ""
    footer += "The tables lie in tables/ beside this page too, as Markdown, LaTeX and CSV."
    html = page.document(title, _statement(groups, runs), sections, footer)
    exports.write(html, path.parent / "tables")
    path.write_text(html, encoding="utf-8")
    return path


def _statement(groups, runs):
    students = [group for group in groups if group["role"] == "student"] or groups
    teachers = [group for group in groups if group["role"] == "teacher" and group not in students]
    methods = _distinct(group["method"] for group in students)
    sizes = {group["student"]: f" ({count_text(group['parameters'])} parameters)"
             for group in students if group["parameters"]}
    models = _distinct(group["student"] + sizes.get(group["student"], "") for group in students)
    data = _listed(_distinct(group["data"] for group in groups))
    named = _listed(f"<code>{escape(method)}</code>" for method in methods)
    if all(group["data"] == "?" for group in groups):  # imported weights that know of no data
        text = [f"{escape(_listed(models))}: imported weights, {named}."]
    elif len(methods) == 1:
        text = [f"{escape(_listed(models))}, trained with {named} on {escape(data)}."]
    else:
        text = [f"{len(methods)} methods of training {escape(_listed(models))} on {escape(data)}: {named}."]
    if any(group["values"] for group in groups):
        parts = [run.evaluation.get("data", {}) for run in runs]
        measured = _distinct(f"{part['examples']:,} {part.get('split', '')} images" for part in parts
                             if is_number(part.get("examples")))
        threats = _distinct(f"ε = {radius_text(group)} in {norm_name(group['norm'])}" for group in groups)
        images = f"on {escape(_listed(measured))}, " if measured else ""
        text.append(f"Accuracy is measured {images}unchanged and under attacks within "
                    f"{escape(_listed(threats))} (pixels in [0, 1]).")
    own = _distinct(images_text(group) for group in students)
    if teachers:
        seen = _distinct(images_text(group) for group in teachers)
        who = escape(_listed(_distinct(f"{group['student']} ({group['method']})" for group in teachers)))
        if seen == ["-"]:
            text.append(f"The teacher, {who}, was imported; the students were trained on {_listed(own)} images.")
        else:
            text.append(f"The teacher, {who}, was trained on {_listed(seen)} images and the students on "
                        + (f"{_listed(own)}." if seen != own else "as many."))
    else:
        named = _distinct(teacher for group in students for teacher in group["teachers"])
        if named:
            text.append(f"Teacher (not listed here): {_listed(f'<code>{escape(name)}</code>' for name in named)}.")
        if own != ["-"]:
            text.append(f"Training used {_listed(own)} images.")
    counts = sorted({group["seeds"] for group in students if group["seeds"]})
    if counts and counts[-1] > 1:
        many = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        text.append(f"Values are means over {many} seeds ± one standard deviation of a single run.")
    elif counts and len(students) > 1:
        text.append("One seed each, so a difference between rows includes the luck of the seed.")
    return " ".join(text)


def _results(groups, members, lines, runs):
    columns = tables.columns(groups)
    meanings = {"method": "name of the method in the configuration", "train_examples": "images it was trained on",
                "seeds": "evaluated runs that differ only in their seed",
                "clean": "accuracy in percent on unchanged images"}
    for run in runs:
        for name, attack in run.evaluation.get("attacks", {}).items():
            if isinstance(attack, dict) and attack.get("description"):
                meanings.setdefault(name, f"accuracy in percent. {attack['description']}")
        for name, text in _measured(run).items():
            meanings.setdefault(name, text)
    header = [f'<abbr title="{escape(str(meanings[key]))}">{escape(heading)}</abbr>' if key in meanings
              else escape(heading) for key, heading in columns]
    best = {key: tables.best(groups, key) for key, _ in columns}
    body = []
    for place, (group, line) in enumerate(zip(groups, lines)):
        cells = []
        for key, _ in columns:
            text = page.number(tables.cell(group, key), tables.mark(group, key))
            if key == "method":
                text = page.key(line.colour) + text.replace(
                    " (teacher)", ' <span class="sd">(teacher)</span>')
            cells.append(f'<span class="best">{text}</span>' if place in best[key] else text)
        body.append(cells)
    notes = ["Accuracies in percent."]
    if any("seconds_per_step" in group["values"] for group in groups):
        notes.append("s/step: seconds of one training step, the median of each run's log.")
    if any(best.values()):
        notes.append("Marked: the best mean among the students" + (
            " (highest; for the gradient distance, lowest)." if best.get("gradient_distance") else "."))
    missing = [str(run.workdir) for run in runs if "accuracy" not in run.evaluation]
    if missing:
        notes.append(f"Not evaluated: {_listed(missing)}.")
    notes += _selection_notes(groups)
    shown = page.html_table(header, body, tables.text_columns(columns))
    note = f'<p class="note">{escape(" ".join(notes))}</p>'
    return shown + cascades.flag_box(groups) + note + reliability.changes(groups, members)


def _selection_notes(groups):
    """Returns what the readers of a table must know where no images were held out of training to choose a checkpoint on."""
    notes = []
    for chosen, text in (("last", "trained on all training images, none held out; the last checkpoint counts"),
                         ("test", "checkpoints were compared on the test images during training")):
        those = [group for group in groups if group["config"]["data.selection"] == chosen]
        if those:
            who = "All runs" if those == groups else _listed(group["label"] for group in those)
            last = chosen == "test" and not any(group["optimistic"] for group in those)
            notes.append(f"{who}: {text}{'; what is evaluated is the last' if last else ''}.")
    return notes + [tables.CHOSEN_NOTE] * any(group["optimistic"] for group in groups)


def _choose_galleries(groups, members):
    """Returns (row, run, arrays) of each row's first run with a gallery, students first, and the number left out."""
    chosen = []
    for group, runs in sorted(zip(groups, members), key=lambda pair: pair[0]["role"] == "teacher"):
        run = next((run for run in runs if (run.workdir / "evaluation" / "gallery.npz").is_file()), None)
        if run is not None:
            chosen.append((group, run))
    read = [(group, run, read_gallery(run)) for group, run in chosen[:_GALLERIES]]
    return [entry for entry in read if len(entry[2]["images"])], len(chosen) - len(read)


def _galleries(chosen, left_out, folder):
    html = []
    used = set()
    for group, run, arrays in chosen:
        threat = {"norm": group["norm"], "epsilon": group["epsilon"] if is_number(group["epsilon"]) else 0.0}
        threat |= run.evaluation.get("threat", {})
        name = re.sub(r"[^\w.+-]+", "_", run.workdir.resolve().name)
        while name in used:
            name += "_"
        used.add(name)
        scale = epsilon_text(plots.gallery_scale(arrays, threat))
        colours = (f"red at +{scale}, blue at −{scale}" if arrays["images"].shape[-1] == 1
                   else f"magnified around mid-grey, full at ±{scale}")
        attack = attack_name(arrays["attack"]) if arrays["attack"] else "Adversarial images"
        seed = run.config.get("seed")
        radius = f"ε = {epsilon_text(threat['epsilon'])} in {norm_name(threat['norm'])}"
        note = f"{attack}, {radius}. Below each image stands the prediction: ✓ right, ✗ wrong. Perturbation: {colours}."
        html.append(f"<h3>{escape(group['label'] + ('' if seed is None else f', seed {seed}'))}</h3>")
        wide, narrow = (plots.gallery(arrays, threat, narrow=narrow) for narrow in (False, True))
        html.append(page.figure(folder / f"gallery_{name}.png", wide, narrow,
                            f"Clean images, perturbations and adversarial images of {group['label']}", note))
    if left_out:
        rows = "row" if left_out == 1 else "rows"
        html.append(f'<p class="note">Images of {left_out} more {rows} are not shown.</p>')
    return "\n".join(html)


def _definitions(groups, runs):
    entries = {}
    for run in runs:
        attacks = [*run.evaluation.get("attacks", {}).items(), *(
            pair for other in run.evaluation.get(OTHER_DATA, {}).values() for pair in other["attacks"].items())]
        for name, attack in sorted(attacks, key=lambda pair: attack_order(pair[0])):
            owners = entries.setdefault((attack_name(name), _attack_text(attack)), [])
            owners += [run] * (run not in owners)
        texts: dict[str, list] = {}
        for name, text in _measured(run).items():
            texts.setdefault(text, []).append(ALIGNMENT[name])
        for text, headings in texts.items():
            entries.setdefault((_listed(headings), escape(text)), []).append(run)
    names = [name for name, _ in entries]
    html = ""
    for (name, text), owners in entries.items():
        # Definitions that differ between runs are kept apart, and say whose they are.
        whose = f" ({_listed(str(run.workdir) for run in owners)})" if names.count(name) > 1 else ""
        html += f"<dt>{escape(name + whose)}</dt><dd>{text}</dd>"
    return f"<dl>{html}</dl>" if html else ""


def _measured(run):
    """Returns measure of alignment -> what it is, as far as the evaluation says so."""
    found = run.evaluation.get("alignment", {})
    definitions = found.get("definitions")
    if not isinstance(definitions, dict):  # of an older evaluation
        definitions = {name: found.get("definition") for name in ("gradient_cosine", "gradient_distance")}
    return {name: str(definitions[name]) for name in ALIGNMENT if name in found and definitions.get(name)}


def _attack_text(attack):
    if not isinstance(attack, dict):
        return escape(str(attack))
    settings = ", ".join(f"{key.replace('_', ' ')} {short(value)}" for key, value in attack.items()
                         if key != "description")
    description = escape(str(attack.get("description", "")))
    return description + (f' <span class="settings">{escape(settings)}</span>' if settings else "")


def _distinct(values):
    return list(dict.fromkeys(values))


def _listed(values):
    *first, last = list(values)
    return f"{', '.join(first)} and {last}" if first else last
