"""The figures of a report: training curves, robust accuracy against epsilon, and galleries of adversarial images.

Figures are built as `matplotlib.figure.Figure` objects, which draw with Agg and leave pyplot's global state alone. Each
has a wide layout and a narrow one, since a wide figure shrunk to a phone is unreadable.
"""

import base64
import dataclasses
import io
import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jaxrd.evaluation.names import attack_name, epsilon_text, norm_name

# Okabe and Ito's colour-blind-safe palette, less its black (near the teacher's grey) and its yellow (faint on white).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
TEACHER_COLOUR = "#5F6368"
RIGHT, WRONG = "#00805D", "#C8351B"
_INK, _SOFT, _GRID = "#23282E", "#66707A", "#E6E9EC"
_STYLES = ("-", (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.5, 1.2, 1.5)))
_STAR = {"linestyle": "", "marker": "*", "markersize": 11, "markeredgecolor": "white", "markeredgewidth": 0.8}

_INSTALLED = set(font_manager.get_font_names())
_FONTS = [name for name in ("Inter", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans") if name in _INSTALLED]
_styled = matplotlib.rc_context({
    "font.family": _FONTS, "font.size": 9.5, "text.color": _INK, "text.parse_math": False, "axes.labelcolor": _SOFT,
    "axes.edgecolor": "#B9C0C7", "axes.linewidth": 0.8, "xtick.color": _SOFT, "ytick.color": _SOFT})


@dataclasses.dataclass(frozen=True, eq=False)
class Line:
    """What one row of the table looks like in every plot.

    Attributes:
      label: its name in legends.
      colour: one per method; the teacher's is grey.
      style: matplotlib's line style, which tells rows of one colour apart.
      runs: the row's runs (one per seed), each with `config`, `metrics` and `evaluation`.
    """

    label: str
    colour: str
    style: object
    runs: tuple


def lines(rows: Sequence[tuple[str, str, bool, tuple]]) -> list[Line]:
    """Gives each row its colour and line style.

    Args:
      rows: (label, method, is the teacher, runs), in the order of the table.

    Returns:
      One line per row; rows of one method share its colour.
    """
    methods = list(dict.fromkeys(method for _, method, teacher, _ in rows if not teacher))
    used = {}
    result = []
    for label, method, teacher, runs in rows:
        colour = TEACHER_COLOUR if teacher else PALETTE[methods.index(method) % len(PALETTE)]
        used[colour] = used.get(colour, -1) + 1
        result.append(Line(label, colour, _STYLES[(used[colour] + teacher) % len(_STYLES)], tuple(runs)))
    return result


@_styled
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

    figure, axes = _grid(len(panels), 1 if narrow else min(len(panels), 2), (4.5, 3.5) if narrow else (
        7.4 if len(panels) == 1 else 4.4, 3.9))
    for axis, ((data, norm, attack), panel) in zip(axes, panels.items()):
        for epsilon in sorted(panel["trained"]):
            axis.axvline(epsilon, color=_SOFT, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
            left = epsilon > 0.75 * max(x for series in panel["series"].values() for points in series for x in points)
            axis.annotate(f"training ε = {epsilon_text(epsilon)}", (epsilon, 100), xytext=(-4 if left else 4, -1),
                          textcoords="offset points", ha="right" if left else "left", va="top", color=_SOFT,
                          fontsize=8.5)
        for row, series in panel["series"].items():
            _draw(axis, row, series, percent=True, marker="o")
        for (row, epsilon), accuracies in panel["stars"].items():
            axis.plot(epsilon, 100 * np.mean(accuracies), color=row.colour, zorder=4, clip_on=False, **_STAR)
        _tidy(axis, f"Accuracy under {attack_name(attack)}, %" + (f": {data}" if len(panels) > 1 else ""))
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


@_styled
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

    figure, axes = _grid(len(panels), 1 if narrow else min(3, len(panels)), (4.5, 2.5) if narrow else (3.3, 2.7))
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
        _tidy(axis, title + (", %" if accuracy else ""))
        axis.set_xlabel("step")
        if accuracy:
            axis.set_ylim(0, 101)
        elif axis.dataLim.ymin >= 0:
            axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
    _legend(figure, [row for row in rows if any(run.metrics for run in row.runs)])
    return figure


def gallery_scale(gallery: dict, threat: dict) -> float:
    """Returns the change of a pixel that a gallery shows in full colour: an L-inf radius, else the largest change."""
    largest = float(np.abs(gallery["adversarial"] - gallery["images"]).max(initial=0.0))
    epsilon = threat.get("epsilon", 0.0)
    return float(epsilon) if threat.get("norm") == "linf" and largest <= epsilon * 1.001 else largest or 1.0


@_styled
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
                axis.set_title(f"label {label}", fontsize=8.5, color=_SOFT, pad=4)
            if column == 0:
                axis.set_ylabel(("clean", "perturbation", "adversarial")[place], color=_INK, **(
                    {"fontsize": 7.5, "labelpad": 4} if narrow else
                    {"fontsize": 9, "labelpad": 9, "rotation": 0, "ha": "right", "va": "center"}))
    return figure


@_styled
def png(figure: Figure) -> bytes:
    """Returns the figure as a PNG on white, at twice the pixels of its size on the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=170)
    return buffer.getvalue()


def data_uri(image: bytes) -> str:
    """Returns a PNG as a `data:` address, so that a page needs no other file."""
    return "data:image/png;base64," + base64.b64encode(image).decode("ascii")


def _grid(count, columns, size):
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(columns * size[0], rows * size[1] + 0.3), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


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


def _tidy(axis, title):
    axis.set_title(title, loc="left", fontsize=10, fontweight="bold", color=_INK, pad=8)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.grid(axis="y", color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, labelsize=8.5)
    axis.tick_params(axis="x", length=3)
    axis.locator_params(axis="both", nbins=6)


def _legend(figure, rows, stars=False):
    entries = [(row.label, Line2D([], [], color=row.colour, linestyle=row.style, linewidth=2)) for row in rows if len(rows) > 1]
    if stars:
        entries.append((attack_name("autoattack"), Line2D([], [], color=_INK, **_STAR)))
    if not entries:
        return
    labels, handles = zip(*entries)
    # In inches, about: a character at this size, and the sample line with its space.
    widths = [0.65 + 0.065 * len(label) for label in labels]
    width = figure.get_figwidth()
    columns = len(labels) if sum(widths) <= width else max(1, int(width / max(widths)))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False, fontsize=9, handlelength=2.2,
                  columnspacing=1.6, borderaxespad=0.2)


def _show(axis, pixels, colours, low, high):
    if pixels.shape[-1] == 1:
        axis.imshow(pixels[..., 0], cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    else:
        axis.imshow(np.clip((pixels - low) / (high - low), 0, 1), interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color=_GRID, linewidth=0.8)


def is_number(value: object) -> bool:
    """Whether a value from a JSON file is a number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
