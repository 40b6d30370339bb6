"""What holds class by class in a report: accuracies under the strongest attack, and what each class is mistaken for."""

import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from jaxrd.evaluation import figures, page, plots
from jaxrd.evaluation.names import attack_name, strongest
from jaxrd.evaluation.runs import Run

_LISTED = 20  # classes that have columns of their own, at most
_DRAWN = 4  # rows whose confusion is drawn


def section(groups: Sequence[dict], members: Sequence[Sequence[Run]], lines: Sequence[plots.Line], folder: Path) -> str:
    """Returns the HTML of the section "Class by class", or nothing where no evaluation says anything of classes.

    Args:
      groups: from `runs.aggregate`.
      members: the runs of each group.
      lines: the groups' lines in plots.
      folder: where its plot is saved.
    """
    found = [[run.evaluation["classes"] for run in runs if run.evaluation.get("classes")] for runs in members]
    attack = strongest([name for records in found for record in records for name in record.get("accuracy", {})])
    if attack is None:
        return ""
    rows = []
    for records, line in zip(found, lines):
        values = _means([record["accuracy"][attack] for record in records if attack in record.get("accuracy", {})])
        if values:
            rows.append((line, values))
    accuracy = "Accuracy" if attack == "clean" else f"Accuracy under {attack_name(attack)}"
    note = f"{accuracy} in each class, percent, over the seeds of a row. The worst class is what a mean hides."
    html = f'{_table(rows)}<p class="note">{escape(note)}</p>' + _confusions(groups, found, lines, folder)
    return page.section("Class by class", f"<details><summary>{escape(accuracy)}</summary>{html}</details>")


@figures.styled
def confusion(panels: Sequence[tuple[str, np.ndarray]], narrow: bool = False) -> Figure:
    """Draws what each class is taken for: a row for each true class, with shares of its images in percent.

    Args:
      panels: (title, counts [classes, classes]) each; a row is a true class, a column a prediction.
      narrow: whether to draw for a phone.

    Returns:
      The figure.
    """
    figure, axes = figures.panels(len(panels), 1 if narrow else min(2, len(panels)), (4.5, 4.3), above=0)
    for axis, (title, counts) in zip(axes, panels):
        counts = np.asarray(counts, float)
        shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
        axis.set_title(title, loc="left", fontsize=10, fontweight="bold", color=figures.INK, pad=8)
        axis.set(xlabel="prediction under attack", ylabel="class")
        if len(counts) <= 12:
            axis.set(xticks=range(len(counts)), yticks=range(len(counts)))
            for (row, column), share in np.ndenumerate(shares):
                if share >= 0.5:
                    axis.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=7.5,
                              color="white" if share > 55 else figures.INK)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0, labelsize=8.5)
    return figure


def _means(records):
    """Returns the mean of each class over records that have it, or None for a class without images."""
    columns = zip(*records) if len({len(record) for record in records}) == 1 else ()
    by_class = [[value for value in column if value is not None] for column in columns]
    return [100 * statistics.fmean(values) if values else None for values in by_class]


def _table(rows):
    body = []
    for line, values in rows:
        known = [value for value in values if value is not None]
        worst = min(known, default=None)
        summary = [page.key(line.colour) + escape(line.label), *(_text(value) for value in (worst, max(known, default=None)))]
        summary.insert(1, "-" if worst is None else str(values.index(worst)))
        body.append(summary + ([_text(value) for value in values] if len(values) <= _LISTED else [
            _text(statistics.median(known) if known else None)]))
    classes = max(len(values) for _, values in rows)
    named = [f"class {place}" for place in range(classes)] if classes <= _LISTED else ["median"]
    header = ["method", "worst class", "its accuracy", "highest", *named]
    return page.html_table(header, [[*cells, *["-"] * (len(header) - len(cells))] for cells in body], 1)


def _text(value):
    return "-" if value is None else f"{value:.1f}"


def _confusions(groups, found, lines, folder):
    panels, attacks = [], set()
    for group, records, line in sorted(zip(groups, found, lines), key=lambda entry: entry[0]["role"] == "teacher"):
        counted = [record["confusion"] for record in records if "true_to_adversarial" in record.get("confusion", {})]
        if counted and len({len(confused["true_to_adversarial"]) for confused in counted}) == 1:
            panels.append((line.label, sum(np.asarray(confused["true_to_adversarial"]) for confused in counted)))
            attacks |= {attack_name(confused["attack"]) for confused in counted if confused.get("attack")}
    if not panels:
        return ""
    under = f" under {' and '.join(sorted(attacks))}" if attacks else ""
    left_out = len(panels) - _DRAWN
    note = f"Of each class, how many percent of its images{under} are taken for which." + (
        f" {left_out} more {'row is' if left_out == 1 else 'rows are'} not shown." if left_out > 0 else "")
    wide, narrow = (confusion(panels[:_DRAWN], narrow) for narrow in (False, True))
    return f"<h3>What classes are mistaken for{escape(under)}</h3>" + page.figure(
        folder / "confusion.png", wide, narrow, f"Confusion of classes{under}", note)
