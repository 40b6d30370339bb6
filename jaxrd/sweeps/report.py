"""The report of a sweep: what it asked, its table with the differences from the baseline, its figures, and its runs.

The sections of `jaxrd.evaluation.report` follow, for the runs that are finished.
"""

from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from jaxrd.evaluation import page, report
from jaxrd.evaluation.figures import is_number
from jaxrd.evaluation.names import attack_order
from jaxrd.sweeps import plots
from jaxrd.sweeps.results import Table, heading, html

_FIGURES = ("gradient_cosine", "taylor_remainder", "seconds_per_step")  # drawn besides accuracies


def write(table: Table) -> Path | None:
    """Writes report.html into the sweep's directory, with its tables in tables/; returns its path.

    None, and writes nothing, where no run is finished yet.
    """
    plan = table.plan
    finished = [plan.workdir / row["run"] for row in table.rows if row["status"] == "finished"]
    if not finished:
        return None
    folder = plan.workdir / "evaluation"
    folder.mkdir(exist_ok=True)
    sections = [page.section("What this sweep compares", _about(table)), page.section("Points", _means(table)),
                page.section("Differences from the baseline", _differences(table)),
                page.section("Figures", _figures(table, folder)), page.section("Runs that failed", _failed(table))]
    teachers = [plan.path(run) for run in plan.teachers if (plan.path(run) / "evaluation.json").is_file()]
    title = plan.title or f"Sweep of {', '.join(plan.fields) or 'seeds'}"
    return report.write([*teachers, *finished], plan.workdir / "report.html", title, before=list(filter(None, sections)))


def _about(table: Table) -> str:
    plan = table.plan
    seeds = sorted({row["seed"] for row in table.rows})
    finished = sum(row["status"] == "finished" for row in table.rows)
    facts = (f"{len(plan.points)} points, seeds {', '.join(map(str, seeds))}: {finished} of {len(table.rows)} runs are "
             "finished." + (f" Varied: {', '.join(plan.fields)}." if plan.fields else ""))
    return "".join(f"<p>{escape(text)}</p>" for text in (plan.about, facts) if text)


def _means(table: Table) -> str:
    header, body = table.means()
    note = "Accuracies in percent; means over seeds ± one standard deviation of a single run."
    if "seconds_per_step" in table.measures:
        note += " s/step: seconds of one training step, the median of each run's log."
    if "step_memory" in table.measures:
        note += (" step MB: memory of the compiled training step on each device, as XLA has planned it: temporary arrays, "
                 "arguments and outputs, in millions of bytes.")
    return html(header, body) + f'<p class="note">{escape(note)}</p>'


def _differences(table: Table) -> str:
    header, body = table.differences()
    if not body:
        return ""
    note = (f"Each run minus the run of {table.plan.baseline} with the same seed, mean ± standard deviation of these "
            "differences; accuracies in percentage points. The figures show 95 % confidence intervals of the mean (Student's t), "
            "for each point and measure by itself.")
    return html(header, body) + f'<p class="note">{escape(note)}</p>'


def _figures(table: Table, folder: Path) -> str:
    accuracies = sorted((name for name in table.measures if table.is_accuracy(name)), key=attack_order)
    swept = [field for field in table.plan.fields if _numeric(table, field)]
    # One line per value of all other fields: that many are no figure any more.
    against = swept[0] if len(swept) == 1 and len({row[swept[0]] for row in table.rows}) > 2 else None
    parts = []
    for measure in [*accuracies, *(name for name in _FIGURES if name in table.measures)]:
        drawn = [("against", lambda narrow, m=measure: plots.against(table, against, m, narrow))] if against else [
            ("dots", lambda narrow, m=measure: plots.dots(table, m, narrow))]
        if measure in accuracies and table.plan.baseline and table.differences([measure])[1]:
            drawn.append(("differences", lambda narrow, m=measure: plots.differences(table, m, narrow)))
        for kind, draw in drawn:
            parts.append(_figure(folder / f"sweep_{kind}_{measure}.png", draw(False), draw(True), kind, heading(measure)))
    return "".join(parts)


def _numeric(table: Table, field: str) -> bool:
    return all(is_number(row[field]) for row in table.rows)


def _figure(path: Path, wide: Figure, narrow: Figure, kind: str, measure: str) -> str:
    notes = {
        "against": "Dots are seeds, the line their mean, the band one standard deviation.",
        "dots": "Dots are seeds, bars their means with one standard deviation; the dashed line is the baseline's mean.",
        "differences": "Dots are pairs of one seed, bars their means with a 95 % confidence interval."}
    return page.figure(path, wide, narrow, f"{measure}: {kind}", notes[kind])


def _failed(table: Table) -> str:
    if not table.failed:
        return ""
    return page.html_table(["run", "what happened"], [
        [escape(row["run"]), f'<span class="wrap">{escape(row["error"])}</span>'] for row in table.failed], 2)
