"""The figures of a report: training curves, robust accuracy against epsilon, seeds, correlations, adversarial images.

Each has a wide layout and a narrow one, since a wide figure shrunk to a phone is unreadable.
"""

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jaxrd.evaluation import figures
from jaxrd.evaluation.figures import (
    GRID, INK, PALETTE, SOFT, TEACHER_COLOUR, Line, data_uri, is_number, lines, png, styled, tidy)
from jaxrd.evaluation.names import attack_name, epsilon_text, norm_name

__all__ = [
    "PALETTE", "TEACHER_COLOUR", "Line", "correlation", "correlations", "data_uri", "gallery", "gallery_scale", "has_star",
    "is_number", "lines", "pearson", "png", "robust_accuracy", "seeds", "training_curves"]

RIGHT, WRONG = "#00805D", "#C8351B"
_STAR = {"linestyle": "", "marker": "*", "markersize": 11, "markeredgecolor": "white", "markeredgewidth": 0.8}


@styled
def robust_accuracy(rows: Sequence[Line], narrow: bool = False) -> Figure | None:
    """Draws accuracy against the radius of the attack, one panel per data set, norm and attack.

    Stars are accuracies under AutoAttack at the radius of the evaluation, where the curve is another attack's.

    Args:
      rows: one line each, the mean over its runs with a band of one standard deviation.
      narrow: whether to draw for a phone.

    Returns:
      The figure, or None where no run has a `robustness_curve`.
    """
    panels = {}
    for row in rows:
        for run in row.runs:
            curve = run.evaluation.get("robustness_curve")
            if curve:
                key = (run.evaluation.get("data", {}).get("name", ""), run.evaluation.get("threat", {}).get("norm", ""),
                       curve.get("attack", ""))
                panel = panels.setdefault(key, {"series": {}, "trained": set(), "stars": {}})
                panel["series"].setdefault(row, []).append(dict(zip(curve["epsilon"], curve["accuracy"])))
                threat = run.config.get("threat") or {}
                if threat.get("norm") == key[1] and is_number(threat.get("epsilon")):
                    panel["trained"].add(float(threat["epsilon"]))
                if has_star(run.evaluation):
                    star = (row, float(run.evaluation["threat"]["epsilon"]))
                    panel["stars"].setdefault(star, []).append(run.evaluation["accuracy"]["autoattack"])
    if not panels:
        return None

    figure, axes = figures.panels(len(panels), 1 if narrow else min(len(panels), 2), (4.5, 3.5) if narrow else (
        7.4 if len(panels) == 1 else 4.4, 3.9))
    for axis, ((data, norm, attack), panel) in zip(axes, panels.items()):
        for epsilon in sorted(panel["trained"]):
            axis.axvline(epsilon, color=SOFT, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
            left = epsilon > 0.75 * max(x for series in panel["series"].values() for points in series for x in points)
            axis.annotate(f"training ε = {epsilon_text(epsilon)}", (epsilon, 100), xytext=(-4 if left else 4, -1),
                          textcoords="offset points", ha="right" if left else "left", va="top", color=SOFT,
                          fontsize=8.5)
        for row, series in panel["series"].items():
            _draw(axis, row, series, percent=True, marker="o")
        for (row, epsilon), accuracies in panel["stars"].items():
            axis.plot(epsilon, 100 * np.mean(accuracies), color=row.colour, zorder=4, clip_on=False, **_STAR)
        tidy(axis, f"Accuracy under {attack_name(attack)}, %" + (f": {data}" if len(panels) > 1 else ""))
        axis.set_xlabel(f"ε of the attack ({norm_name(norm)})")
        axis.set_ylim(0, 101)
        axis.set_xlim(left=0)
    _legend(figure, [row for row in rows if any(row in panel["series"] for panel in panels.values())],
            stars=any(panel["stars"] for panel in panels.values()))
    return figure


def has_star(evaluation: dict) -> bool:
    """Whether `robust_accuracy` has a star for this evaluation: an accuracy under AutoAttack beside another attack's curve."""
    curve, threat = evaluation.get("robustness_curve"), evaluation.get("threat", {})
    return (bool(curve) and curve.get("attack") != "autoattack" and is_number(threat.get("epsilon"))
            and "autoattack" in evaluation.get("accuracy", {}))


@styled
def training_curves(rows: Sequence[Line], narrow: bool = False) -> Figure | None:
    """Draws validation accuracies, the training loss, each of its terms and what methods watch besides against the step.

    Args:
      rows: one line each, the mean over its runs with a band of one standard deviation.
      narrow: whether to draw for a phone.

    Returns:
      The figure, or None where no run has such metrics.
    """
    keys = dict.fromkeys(key for row in rows for run in row.runs for line in run.metrics for key in line)
    # The clean accuracy of a teacher does not change while a student trains.
    validation = [key for key in keys if key.startswith("validation/") and key != "validation/teacher_clean_accuracy"]
    terms = [key for key in keys if key.startswith("train/") and not key.startswith(
        ("train/accuracy", "train/teacher_accuracy", "train/weight", "train/loss"))]
    panels = validation + [key for key in ("train/loss",) if key in keys] + terms
    if not panels:
        return None

    figure, axes = figures.panels(len(panels), 1 if narrow else min(3, len(panels)), (4.5, 2.5) if narrow else (3.3, 2.7))
    for axis, key in zip(axes, panels):
        accuracy = key.endswith("accuracy")
        for row in rows:
            series = [{line["step"]: line[key] for line in run.metrics if is_number(line.get(key)) and "step" in line}
                      for run in row.runs]
            _draw(axis, row, series, percent=accuracy)
        kind, _, name = key.partition("/")
        name = name.replace("_", " ").replace("pgd", "PGD")
        if key == "train/gradient_norm":
            title = "Gradient norm of the loss"
        else:
            # Terms of the loss have a weight beside them (older logs: none has); what a method watches has not.
            term = f"train/weight/{key.partition('/')[2]}" in keys or not any(key.startswith("train/weight/") for key in keys)
            kind = "Validation " if kind == "validation" else "Training " if name == "loss" else "Loss term: " if term else ""
            title = kind + name if kind else name.capitalize()
        tidy(axis, title + (", %" if accuracy else ""))
        axis.set_xlabel("step")
        if accuracy:
            axis.set_ylim(0, 101)
        elif axis.dataLim.ymin >= 0:
            axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
    _legend(figure, [row for row in rows if any(run.metrics for run in row.runs)])
    return figure


@styled
def seeds(rows: Sequence[tuple[Line, Sequence[float]]], x_label: str, narrow: bool = False) -> Figure:
    """Draws the accuracy of each seed as a dot, a row below another, with a bar at the row's mean.

    Args:
      rows: each with its runs' accuracies, in [0, 1].
      x_label: what the accuracy is.
      narrow: whether to draw for a phone.

    Returns:
      The figure.
    """
    labels = [textwrap.fill(row.label, 24 if narrow else 48, break_long_words=False) for row, _ in rows]
    height = max(0.3, 0.16 * max(1 + label.count("\n") for label in labels))
    figure, (axis,) = figures.panels(1, 1, (4.5 if narrow else 7.4, 0.62 + height * len(rows)), above=0)
    for place, (row, values) in enumerate(rows):
        percent = 100 * np.asarray(values, float)
        # Seeds stand a little below each other, the first at the top, so that equal ones are seen.
        offsets = np.linspace(-0.22, 0.22, len(percent)) if len(percent) > 1 else [0.0]
        axis.plot(percent, place + np.asarray(offsets), color=row.colour, linestyle="", marker="o", markersize=4.6, alpha=0.75,
                  markeredgewidth=0, zorder=3)
        axis.plot([percent.mean()] * 2, [place - 0.36, place + 0.36], color=row.colour, linewidth=2.2, zorder=2)
    tidy(axis, "")
    axis.grid(axis="x", color=GRID, linewidth=0.8)
    axis.set_xlabel(x_label)
    axis.set_yticks(range(len(rows)), labels, fontsize=8.5, color=INK)
    axis.set_ylim(len(rows) - 0.45, -0.55)
    axis.spines["bottom"].set_visible(False)
    return figure


def correlation(points: Sequence[tuple[str, float, float]], x_label: str, y_label: str, rows: Sequence[Line] = (),
                narrow: bool = False) -> Figure:
    """Draws points with the line of least squares through them, their number and Pearson's r; see `correlations`.

    Args:
      points: (label, x, y); points of one label share a colour and a marker.
      x_label, y_label: what x and y are.
      rows: what labels look like; others are given colours in the order of their appearance.
      narrow: whether to draw for a phone.

    Returns:
      The figure.
    """
    return correlations([(points, x_label)], y_label, rows, narrow)


@styled
def correlations(panels: Sequence[tuple[Sequence[tuple[str, float, float]], str]], y_label: str, rows: Sequence[Line] = (),
                 narrow: bool = False) -> Figure:
    """Draws one panel for each thing that y is set against.

    Args:
      panels: (points, x_label) each; see `correlation`.
      y_label, rows, narrow: see `correlation`.

    Returns:
      The figure; above it a legend where there is more than one label.
    """
    labels = list(dict.fromkeys(label for points, _ in panels for label, _, _ in points))
    looks = {row.label: row for row in (*lines([(label, label, False, ()) for label in labels]), *rows)}
    columns = 1 if narrow else min(len(panels), 3)
    width, height = (4.5, 3.3) if narrow else (6.0, 3.9) if len(panels) == 1 else (4.4, 3.6) if len(panels) == 2 else (3.3, 3.1)
    legend_rows = math.ceil(len(labels) / figures.legend_columns(columns * width, labels)) if len(labels) > 1 else 0
    figure, axes = figures.panels(len(panels), columns, (width, height), above=0.1 + 0.19 * legend_rows)
    for axis, (points, x_label) in zip(axes, panels):
        _, x, y = zip(*points)
        r = pearson(x, y)
        if r is not None:
            ends = np.array([min(x), max(x)])
            axis.plot(ends, np.polyval(np.polyfit(x, y, 1), ends), color=SOFT, linewidth=1.1, linestyle=(0, (4, 2)), zorder=1)
        for label in labels:
            its = [point[1:] for point in points if point[0] == label]
            if its:
                axis.plot(*zip(*its), color=looks[label].colour, marker=looks[label].marker, linestyle="", markersize=6.2,
                          markeredgecolor="white", markeredgewidth=0.6, alpha=0.9, zorder=3)
        tidy(axis, f"r = {'undefined' if r is None else f'{r:+.2f}'.replace('-', '−')}, n = {len(points)}")
        axis.set_xlabel(x_label)
    for axis in axes[::columns]:
        axis.set_ylabel(y_label)
    if len(labels) > 1:
        figures.legend(figure, [(label, Line2D([], [], color=looks[label].colour, marker=looks[label].marker, linestyle="",
                                               markersize=6)) for label in labels])
    return figure


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Returns Pearson's r of two sequences of the same length, or None where one of them does not vary."""
    return None if np.ptp(x) == 0 or np.ptp(y) == 0 else float(np.corrcoef(x, y)[0, 1])


def gallery_scale(gallery: dict, threat: dict) -> float:
    """Returns the change of a pixel that a gallery shows in full colour: an L-inf radius, else the largest change."""
    largest = float(np.abs(gallery["adversarial"] - gallery["images"]).max(initial=0.0))
    epsilon = threat.get("epsilon", 0.0)
    return float(epsilon) if threat.get("norm") == "linf" and largest <= epsilon * 1.001 else largest or 1.0


@styled
def gallery(arrays: dict, threat: dict, narrow: bool = False, most: int = 10) -> Figure:
    """Draws clean images, their perturbations and the adversarial images below each other.

    Args:
      arrays: what `gallery.npz` holds: images and adversarial [k, h, w, c], labels, clean_prediction and
        adversarial_prediction [k].
      threat: the evaluation's norm, epsilon and bounds.
      narrow: whether to draw for a phone.
      most: images shown at most.

    Returns:
      The figure.
    """
    count = min(len(arrays["images"]), most)
    columns = min(count, 5) if narrow else count
    blocks = math.ceil(count / columns)
    low, high = threat.get("bounds") or (0.0, 1.0)
    scale = gallery_scale(arrays, threat)
    # In inches: an image, the space at the left for row labels, and the tops of the three rows within a block.
    side, margin = (0.76, 0.34) if narrow else (min(0.88, 8.8 / max(columns, 6)), 1.0)
    tops = (0.24, 0.24 + side + 0.25, 0.24 + 2 * side + 0.35)
    block_height = tops[2] + side + 0.34
    width, height = margin + columns * (side + 0.07), blocks * block_height
    figure = Figure(figsize=(width, height), facecolor="white")
    for index in range(count):
        block, column = divmod(index, columns)
        clean, adversarial = arrays["images"][index], arrays["adversarial"][index]
        label = arrays["labels"][index]
        for place, pixels in enumerate((clean, adversarial - clean, adversarial)):
            bottom = height - block * block_height - tops[place] - side
            left = margin + column * (side + 0.07)
            axis = figure.add_axes((left / width, bottom / height, side / width, side / height))
            if place == 1 and pixels.shape[-1] == 1:
                # Wider than the scale: the ends of the colour map are nearly black.
                _show(axis, pixels, "RdBu_r", -1.3 * scale, 1.3 * scale)
            elif place == 1:
                # Colour images keep their channels, each around mid-grey: a colour map would need their mean.
                _show(axis, 0.5 + pixels / (2 * scale), None, 0.0, 1.0)
            else:
                prediction = arrays["clean_prediction" if place == 0 else "adversarial_prediction"][index]
                colour, mark = (RIGHT, "✓") if prediction == label else (WRONG, "✗")
                _show(axis, pixels, "gray", low, high)
                axis.set_xlabel(f"{prediction} {mark}", color=colour, fontsize=9, labelpad=3)
                for spine in axis.spines.values():
                    spine.set(color=colour, linewidth=2.0)
            if place == 0:
                axis.set_title(f"label {label}", fontsize=8.5, color=SOFT, pad=4)
            if column == 0:
                axis.set_ylabel(("clean", "perturbation", "adversarial")[place], color=INK, **(
                    {"fontsize": 7.5, "labelpad": 4} if narrow else
                    {"fontsize": 9, "labelpad": 9, "rotation": 0, "ha": "right", "va": "center"}))
    return figure


def _legend(figure, rows, stars=False):
    entries = [(row.label, Line2D([], [], color=row.colour, linestyle=row.style, linewidth=2)) for row in rows if len(rows) > 1]
    if stars:
        entries.append((attack_name("autoattack"), Line2D([], [], color=INK, **_STAR)))
    figures.legend(figure, entries)


def _draw(axis, row, series, percent, marker=None):
    series = [points for points in series if points]
    if not series:
        return
    shared = sorted(set.intersection(*map(set, series)))
    if not shared:
        series = [max(series, key=len)]
        shared = sorted(series[0])
    values = np.array([[points[x] for x in shared] for points in series], float) * (100 if percent else 1)
    mean = values.mean(0)
    if len(series) > 1:
        sd = values.std(0, ddof=1)
        axis.fill_between(shared, mean - sd, mean + sd, color=row.colour, alpha=0.14, linewidth=0, zorder=2)
    axis.plot(shared, mean, color=row.colour, linestyle=row.style, linewidth=1.8, zorder=3,
              marker=marker or ("o" if len(shared) == 1 else None), markersize=3.6, clip_on=not marker)


def _show(axis, pixels, colours, low, high):
    if pixels.shape[-1] == 1:
        axis.imshow(pixels[..., 0], cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    else:
        axis.imshow(np.clip((pixels - low) / (high - low), 0, 1), interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color=GRID, linewidth=0.8)
