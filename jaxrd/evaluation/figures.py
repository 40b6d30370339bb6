"""What the figures of a report share: colours and fonts, the look of each row of its table, panels, legends, and PNG files.

Figures are built as `matplotlib.figure.Figure` objects, which draw with Agg and leave pyplot's global state alone.
"""

import base64
import dataclasses
import io
import math
from collections.abc import Sequence

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# Okabe and Ito's colour-blind-safe palette, less its black (near the teacher's grey) and its yellow (faint on white).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
TEACHER_COLOUR = "#5F6368"
INK, SOFT, GRID = "#23282E", "#66707A", "#E6E9EC"
_STYLES = ("-", (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.5, 1.2, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_INSTALLED = set(font_manager.get_font_names())
_FONTS = [name for name in ("Inter", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans") if name in _INSTALLED]
styled = matplotlib.rc_context({
    "font.family": _FONTS, "font.size": 9.5, "text.color": INK, "text.parse_math": False, "axes.labelcolor": SOFT,
    "axes.edgecolor": "#B9C0C7", "axes.linewidth": 0.8, "xtick.color": SOFT, "ytick.color": SOFT})


@dataclasses.dataclass(frozen=True, eq=False)
class Line:
    """What one row of the table looks like in every plot.

    Attributes:
      label: its name in legends.
      colour: one per method; the teacher's is grey.
      style: matplotlib's line style, which tells rows of one colour apart.
      runs: the row's runs (one per seed), each with `config`, `metrics` and `evaluation`.
      marker: matplotlib's marker, which tells rows of one colour apart among points.
    """

    label: str
    colour: str
    style: object
    runs: tuple
    marker: str = "o"


def lines(rows: Sequence[tuple[str, str, bool, tuple]]) -> list[Line]:
    """Gives each row its colour, line style and marker.

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
        place = used[colour] = used.get(colour, -1) + 1
        result.append(Line(label, colour, _STYLES[(place + teacher) % len(_STYLES)], tuple(runs),
                           _MARKERS[place % len(_MARKERS)]))
    return result


@styled
def png(figure: Figure) -> bytes:
    """Returns the figure as a PNG on white, at twice the pixels of its size on the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=170)
    return buffer.getvalue()


def data_uri(image: bytes) -> str:
    """Returns a PNG as a `data:` address, so that a page needs no other file."""
    return "data:image/png;base64," + base64.b64encode(image).decode("ascii")


def panels(count: int, columns: int, size: tuple[float, float], above: float = 0.3) -> tuple[Figure, Sequence[Axes]]:
    """Returns a figure with `count` panels in so many columns, each of a size in inches, with room for a legend above."""
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(columns * size[0], rows * size[1] + above), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def tidy(axis: Axes, title: str) -> None:
    """Gives a panel its title and takes away what does not help to read it."""
    axis.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK, pad=8)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.grid(axis="y", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, labelsize=8.5)
    axis.tick_params(axis="x", length=3)
    axis.locator_params(axis="both", nbins=6)


def legend(figure: Figure, entries: Sequence[tuple[str, Line2D]]) -> None:
    """Puts a legend of (label, sample) above the panels, in as many columns as there is room for."""
    if not entries:
        return
    labels, handles = zip(*entries)
    figure.legend(handles, labels, loc="outside upper left", ncols=legend_columns(figure.get_figwidth(), labels), frameon=False,
                  fontsize=9, handlelength=2.2, columnspacing=1.6, borderaxespad=0.2)


def legend_columns(width: float, labels: Sequence[str]) -> int:
    """Returns in how many columns a legend fits above a figure of so many inches."""
    # In inches, about: a character at this size, and the sample line with its space.
    widths = [0.65 + 0.065 * len(label) for label in labels]
    return len(labels) if sum(widths) <= width else max(1, int(width / max(widths)))


def is_number(value: object) -> bool:
    """Whether a value from a JSON file is a number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
