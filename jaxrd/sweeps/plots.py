"""The figures of a sweep: a measure against a swept number, and all points side by side, with every seed to be seen.

They are `matplotlib.figure.Figure` objects in the style of `jaxrd.evaluation.plots`; a notebook shows one that ends its cell.
"""

import itertools
import math
import statistics

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from jaxrd.errors import InputError, suggest
from jaxrd.evaluation import figures
from jaxrd.evaluation.figures import GRID, INK, PALETTE, SOFT, is_number, styled, tidy
from jaxrd.sweeps.results import Table, confidence_interval, heading

_LOGARITHMIC = 20.0  # from this ratio of the largest to the smallest swept number on


@styled
def against(table: Table, field: str, measure: str, narrow: bool = False) -> Figure:
    """Draws a measure against a swept number: every seed a dot, the mean a line, with a band of one standard deviation.

    Points that differ in other fields too are lines of their own. Where the numbers span a factor of 20 or more, the axis is
    logarithmic.

    Args:
      table: from `sweeps.run` or `sweeps.read`.
      field: a swept field whose values are numbers, such as "method.igdm".
      measure: a column of the table, such as "pgd20" or "gradient_cosine".
      narrow: whether to draw for a phone.

    Raises:
      InputError: the field is not swept or not a number everywhere, or no run has the measure.
    """
    _check_measure(table, measure)
    if field not in table.plan.fields:
        raise InputError(f'"{field}" is not swept here; {suggest(field, table.plan.fields)}')
    rows = [row for row in table.rows if row.get(measure) is not None]
    for row in rows:
        if not is_number(row[field]):
            raise InputError(f'{field} is {row[field]!r} in "{row["point"]}", and not a number; draw sweeps.plots.dots instead')
    others = [name for name in table.plan.fields if name != field]
    series: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        label = ", ".join(f"{name.rpartition('.')[2]}={row[name]}" for name in others)
        series.setdefault(label, {}).setdefault(float(row[field]), []).append(_factor(table, measure) * row[measure])
    figure, (axis,) = figures.panels(1, 1, (4.5, 3.3) if narrow else (7.4, 3.9), above=0.3 if len(series) > 1 else 0)
    samples = []
    for colour, (label, points) in zip(itertools.cycle(PALETTE), series.items()):
        numbers = sorted(points)
        means = np.array([statistics.fmean(points[number]) for number in numbers])
        spreads = np.array([_sd(points[number]) for number in numbers])
        if spreads.any():
            axis.fill_between(numbers, means - spreads, means + spreads, color=colour, alpha=0.14, linewidth=0, zorder=2)
        line, = axis.plot(numbers, means, color=colour, linewidth=1.8, zorder=3, marker="o", markersize=4.5)
        samples.append((label, line))
        for number in numbers:
            axis.plot([number] * len(points[number]), points[number], linestyle="", marker="o", markersize=3.4, color=colour,
                      alpha=0.45, markeredgewidth=0, zorder=4)
    tidy(axis, title_of(table, measure))
    _scale(axis, sorted({number for points in series.values() for number in points}))
    axis.set_xlabel(field)
    if len(series) > 1:
        figures.legend(figure, samples)
    return figure


@styled
def dots(table: Table, measure: str, narrow: bool = False) -> Figure:
    """Draws the points below each other: every seed a dot, the mean a bar with one standard deviation, the baseline's a line.

    Args:
      table: from `sweeps.run` or `sweeps.read`.
      measure: a column of the table, such as "pgd20" or "seconds_per_step".
      narrow: whether to draw for a phone.

    Raises:
      InputError: no run has the measure.
    """
    _check_measure(table, measure)
    factor = _factor(table, measure)
    values = {point.name: [factor * row[measure] for row in table.rows
                           if row["point"] == point.name and row.get(measure) is not None] for point in table.plan.points}
    return _side_by_side({name: found for name, found in values.items() if found}, title_of(table, measure), narrow,
                         baseline=table.plan.baseline, line=None)


@styled
def differences(table: Table, measure: str, narrow: bool = False) -> Figure:
    """Draws the differences from the baseline: each pair of one seed a dot, their mean a bar with its 95 % confidence interval.

    Args:
      table: from `sweeps.run` or `sweeps.read`, of a sweep with a baseline.
      measure: a column of the table.
      narrow: whether to draw for a phone.

    Raises:
      InputError: the sweep has no baseline, or no seed has both its run and another point's.
    """
    _check_measure(table, measure)
    if not table.plan.baseline:
        raise InputError("this sweep has no baseline to take differences from; run it again with one, which costs no new runs")
    factor = _factor(table, measure)
    by_point: dict[str, dict[int, float]] = {}
    for row in table.rows:
        if row.get(measure) is not None:
            by_point.setdefault(row["point"], {})[row["seed"]] = factor * row[measure]
    base = by_point.pop(table.plan.baseline, {})
    pairs = {name: [value - base[seed] for seed, value in found.items() if seed in base] for name, found in by_point.items()}
    pairs = {name: found for name, found in pairs.items() if found}
    if not pairs:
        raise InputError(f'no seed has both a run of "{table.plan.baseline}" and one of another point in {measure}')
    title = title_of(table, measure).removesuffix(", %") + ", difference" + (" in points" if table.is_accuracy(measure) else "")
    figure = _side_by_side(pairs, title, narrow, line=0.0, interval=confidence_interval)
    figure.axes[0].set_xlabel(f"minus {_short(table.plan.baseline, narrow)}")
    return figure


def title_of(table: Table, measure: str) -> str:
    """Returns the heading of a measure's figure."""
    if table.is_accuracy(measure):
        return "Clean accuracy, %" if measure == "clean" else f"Accuracy under {heading(measure)}, %"
    words = {"seconds_per_step": "Seconds per training step", "step_memory": "Memory of a training step, MB"}
    return words.get(measure) or heading(measure).replace("grad ", "gradient ").capitalize()


def _side_by_side(values: dict[str, list[float]], title: str, narrow: bool, *, baseline: str | None = None,
                  line: float | None = None, interval=None) -> Figure:
    figure, (axis,) = figures.panels(1, 1, (4.5 if narrow else 7.4, 0.8 + 0.34 * len(values)), above=0)
    if baseline in values:
        line = statistics.fmean(values[baseline])
    if line is not None:
        axis.axvline(line, color=SOFT, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
    for place, (name, found) in enumerate(values.items()):
        mean = statistics.fmean(found)
        low, high = (mean - _sd(found), mean + _sd(found)) if interval is None else interval(found)
        colour = SOFT if name == baseline else PALETTE[0]
        if low is not None:
            axis.plot([low, high], [place, place], color=colour, linewidth=1.6, alpha=0.55, zorder=2)
        axis.plot(found, [place] * len(found), linestyle="", marker="o", markersize=4, color=colour, alpha=0.4,
                  markeredgewidth=0, zorder=3)
        axis.plot(mean, place, marker="|", markersize=13, markeredgewidth=2.2, color=colour, zorder=4)
    tidy(axis, title)
    axis.grid(axis="y", visible=False)
    axis.grid(axis="x", color=GRID, linewidth=0.8)
    axis.locator_params(axis="x", nbins=4 if narrow else 7)
    axis.set_ylim(len(values) - 0.4, -0.6)
    axis.yaxis.set_major_locator(FixedLocator(range(len(values))))
    axis.set_yticklabels([_short(name, narrow) for name in values], color=INK, fontsize=8.5)
    return figure


def _scale(axis, numbers: list[float]) -> None:
    """Makes the axis logarithmic where the numbers want it, 0 included, with a tick at each."""
    positive = [number for number in numbers if number > 0]
    if positive and numbers[0] >= 0 and positive[-1] / positive[0] >= _LOGARITHMIC:
        if numbers[0] == 0:
            # Linear up to the smallest, which stands as far from 0 as a factor of three does from the next.
            axis.set_xscale("symlog", linthresh=positive[0], linscale=math.log10(3) if len(positive) > 1 else 1)
        else:
            axis.set_xscale("log")
    if len(numbers) <= 8:
        axis.xaxis.set_major_locator(FixedLocator(numbers))
        axis.set_xticklabels([f"{number:g}" for number in numbers])
        axis.xaxis.set_minor_locator(NullLocator())


def _short(name: str, narrow: bool) -> str:
    most = 22 if narrow else 48
    return name if len(name) <= most else f"{name[:most - 1]}…"


def _sd(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _factor(table: Table, measure: str) -> float:
    return 100.0 if table.is_accuracy(measure) else 1e-6 if measure == "step_memory" else 1.0


def _check_measure(table: Table, measure: str) -> None:
    if measure not in table.measures:
        known = suggest(measure, table.measures) if table.measures else "none is finished yet"
        raise InputError(f'no run of this sweep has "{measure}"; {known}')
