"""What the runs of a report were: each on a line of its own, their configuration, and the machines and versions they ran on."""

import json
import re
from collections.abc import Sequence
from html import escape

from jaxrd.evaluation import page, tables
from jaxrd.evaluation.record import short
from jaxrd.evaluation.runs import Run, aggregate, collapse, flat, is_number, to_rows

_HASH = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{28}\b")  # of a git commit, of which the beginning is enough
_WORDS = {"git_commit": "git commit", "xla_flags": "XLA flags"}


def section(runs: Sequence[Run]) -> str:
    """Returns the HTML of the section "Settings"."""
    return page.section("Settings", _every_run(runs) + _configuration(runs) + _environment(runs))


def _every_run(runs):
    if len(runs) < 2:
        return ""
    rows = to_rows(runs)
    directories = {str(run.workdir): run for run in runs}
    names = [(key, heading) for key, heading in tables.columns(aggregate(rows))
             if any(key in row["accuracy"] or key in row["measures"] for row in rows)]
    body = []
    for row in rows:
        run = directories[row["workdir"]]
        described = run.evaluation.get("run", {})
        single = collapse([row])
        seconds = [line["seconds"] for line in run.metrics if is_number(line.get("seconds"))]
        body.append([_breakable(row["workdir"]), *(escape("-" if value is None else str(value)) for value in (
            row["seed"], described.get("step"), described.get("checkpoint"), described.get("weights"),
            f"{max(seconds):,.0f} s" if seconds else None)), *(
            page.number(tables.cell(single, key), tables.mark(single, key)) for key, _ in names)])
    header = ["run", "seed", "step", "checkpoint", "weights", "training", *(escape(heading) for _, heading in names)]
    return f"<details><summary>Every run</summary>{page.html_table(header, body, 1)}</details>"


def _configuration(runs):
    if len(runs) == 1:
        text = escape(json.dumps(runs[0].config, indent=2, ensure_ascii=False))
        return f"<details><summary>Configuration</summary><pre>{text}</pre></details>"
    common, differing, shown = _compared([flat(run.config) for run in runs])
    body = [[*map(_breakable, (str(run.workdir), *cells))] for run, cells in zip(runs, shown)]
    differences = page.html_table(["run", *map(_breakable, differing)], body, len(differing) + 1)
    same = escape("\n".join(f"{key} = {value}" for key, value in common.items()))
    return (f"<details><summary>Configuration</summary><p>What differs:</p>{differences}"
            f"<p>What all share:</p><pre>{same}</pre></details>")


def _environment(runs):
    """Returns the environments in which the runs were trained: what differs as a table, a row each, and what all share."""
    named: dict[str, list] = {}
    for run in runs:
        if run.environment:
            named.setdefault(json.dumps(run.environment, sort_keys=True), []).append(run)
    if not named:
        return ""
    common, differing, shown = _compared([flat(members[0].environment) for members in named.values()])
    html = ""
    if differing:
        names = {run.workdir: run.workdir.name for run in runs}
        if len(set(names.values())) < len(names):
            names = {workdir: str(workdir) for workdir in names}
        body = [[f'<span class="wrap">{escape(", ".join(names[run.workdir] for run in members))}</span>', *map(escape, cells)]
                for members, cells in zip(named.values(), shown)]
        html = page.html_table(["runs", *(escape(_word(key)) for key in differing)], body, len(differing) + 1)
    facts = "".join(f"<dt>{escape(_word(key))}</dt><dd>{escape(value)}</dd>" for key, value in common.items()
                    if value != "null")
    without = [str(run.workdir) for run in runs if not run.environment]
    note = f'<p class="note">Not known: {escape(", ".join(without))}.</p>' if without else ""
    return f'<details><summary>Environment</summary>{html}<dl class="facts">{facts}</dl>{note}</details>'


def _compared(records):
    """Returns what flat records share, the names of what differs, and the values of these for each record, as text."""
    names = sorted({key for record in records for key in record}) if len(records) > 1 else list(records[0])
    shown = {key: [short(_text(record[key])) if key in record else "-" for record in records] for key in names}
    differing = [key for key in names if len(set(shown[key])) > 1]
    return ({key: shown[key][0] for key in names if key not in differing}, differing,
            [[shown[key][place] for key in differing] for place in range(len(records))])


def _text(value):
    """Writes a list of names as these, and a commit in short."""
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        value = ", ".join(value)
    return _HASH.sub(r"\1", value) if isinstance(value, str) else value


def _breakable(text):
    """Lets a path or the name of a field go on in the next line after its parts."""
    return re.sub(r"([./_+])", r"\1<wbr>", escape(text))


def _word(key):
    return _WORDS.get(key, key)
