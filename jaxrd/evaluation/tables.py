"""The comparison of runs as a table: which columns it has, what its cells say, and its two plain-text forms.

The HTML page shows the same columns and cells.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from jaxrd.evaluation.names import COLUMNS, MEASURES, SMALLER_IS_BETTER, attack_name, attack_order, norm_name
from jaxrd.evaluation.runs import aggregate, images_text, radius_text, summary

_DEFAULT_COLUMNS = ("clean", "fgsm", "pgd20", "cw30", "autoattack")
MARK, CHOSEN_MARK = "†", "‡"  # of a doubtful accuracy; of a row whose checkpoint was chosen on the images it is measured on
# What the two formats take for their own.
MARKDOWN = str.maketrans({"&": "&amp;", "<": "&lt;", "|": "\\|", "*": "\\*"})
_LATEX = str.maketrans({
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "[": "{[}", "]": "{]}", "*": "{*}",  # at the beginning of a row they would be read with the \\ before it
    "±": r"$\pm$", "−": "$-$", "×": r"$\times$", "∞": r"$\infty$",
    "ε": r"$\varepsilon$", "α": r"$\alpha$", "λ": r"$\lambda$", MARK: r"$^\dagger$", CHOSEN_MARK: r"$^\ddagger$"})
CHOSEN_NOTE = f"{CHOSEN_MARK} The checkpoint was chosen on these very images, so its accuracy is optimistic."


def table(workdirs: Iterable[str | Path]) -> str:
    """Returns the comparison as aligned plain text: accuracies in percent, mean ± sd over seeds, "-" where absent.

    Args:
      workdirs: run directories.

    Returns:
      Lines without a trailing newline; the teacher, if listed, comes first. Below stand the flags of the accuracies that are
      marked with a dagger: what makes them doubtful; a double dagger marks runs whose checkpoint was chosen on the images.

    Raises:
      InputError: see `summary`.
    """
    (header, *body), left, notes = _text_table(workdirs)
    return aligned(header, body, left, notes)


def aligned(header: Sequence[str], body: Sequence[Sequence[str]], left: int, notes: Sequence[str] = ()) -> str:
    """Returns a table as lines of plain text, with a rule below its header.

    Args:
      header, body: cells.
      left: how many of the columns, the first ones, hold text; the others are numbers.
      notes: lines below the table.
    """
    # Marks hang, so that digits stay below digits.
    rows = [header, *body]
    hanging = [max((_marks(cell) for cell in column), default=0) for column in zip(*body)] if body else [0] * len(header)
    rows = [[cell + " " * (hangs - _marks(cell)) for cell, hangs in zip(cells, hanging)] for cells in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) if place < left else cell.rjust(width)
                       for place, (cell, width) in enumerate(zip(cells, widths))).rstrip() for cells in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:], *notes])


def _marks(cell: str) -> int:
    return len(cell) - len(cell.rstrip(MARK + CHOSEN_MARK))


def markdown_table(workdirs: Iterable[str | Path]) -> str:
    """Returns the comparison of `table` as a GitHub-flavoured Markdown table.

    Args:
      workdirs: run directories.

    Returns:
      Lines without a trailing newline; flags as in `table`, a paragraph each.

    Raises:
      InputError: see `summary`.
    """
    (header, *body), left, notes = _text_table(workdirs)
    return "\n".join([markdown(header, body, left), *(f"\n{note.translate(MARKDOWN)}" for note in notes)])


def markdown(header: Sequence[str], body: Sequence[Sequence[str]], text_columns: int) -> str:
    """Returns a table in GitHub-flavoured Markdown, lines without a trailing newline.

    Args:
      header, body: cells, as plain text.
      text_columns: how many of the columns, the first ones, hold text and not numbers.
    """
    rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    lines = [[cell.translate(MARKDOWN) for cell in cells] for cells in (header, *body)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (lines[0], rule, *lines[1:]))


def latex(header: Sequence[str], body: Sequence[Sequence[str]], text_columns: int) -> str:
    """Returns a table as a LaTeX `tabular` in the style of booktabs, lines without a trailing newline.

    It needs \\usepackage{booktabs} and UTF-8, LaTeX's default; letters outside ASCII stay as they are.

    Args:
      header, body, text_columns: see `markdown`.
    """
    lines = [" & ".join(map(latex_text, cells)) + r" \\" for cells in (header, *body)]
    return "\n".join([rf"\begin{{tabular}}{{{'l' * text_columns}{'r' * (len(header) - text_columns)}}}", r"\toprule", lines[0],
                      r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}"])


def latex_text(text: str) -> str:
    """Returns plain text as LaTeX prints it: special characters escaped, ± and − and the marks in mathematics."""
    return text.translate(_LATEX)


def columns(groups: Sequence[dict]) -> list[tuple[str, str]]:
    """Returns the (key, heading) of every column; model, data, threat and seeds only where rows differ in them.

    Args:
      groups: from `runs.aggregate`.
    """
    students = [group for group in groups if group["role"] == "student"]
    present = {name for group in groups for name in group["values"]}
    names = sorted(present - set(MEASURES), key=attack_order) or _DEFAULT_COLUMNS
    return [("method", "method"),
            *([("student", "model")] if len({group["student"] for group in students}) > 1 else []),
            *([("data", "data")] if len({group["data"] for group in groups}) > 1 else []),
            *([("threat", "threat")] if len({(group["norm"], group["epsilon"]) for group in groups}) > 1 else []),
            ("train_examples", "train images"),
            *([("seeds", "seeds")] if any(group["seeds"] > 1 for group in groups) else []),
            *((name, attack_name(name)) for name in names),
            *((name, MEASURES[name]) for name in COLUMNS if name in present)]


def text_columns(chosen: Sequence[tuple[str, str]]) -> int:
    """Returns how many of the `columns`, the first ones, hold text and not numbers."""
    return sum(key in ("method", "student", "data", "threat") for key, _ in chosen)


def cell(group: dict, key: str) -> str:
    """Returns what a group's cell in the column `key` says: the mean (accuracies in percent), "-" where absent."""
    if key == "method":
        variant = f" [{group['variant']}]" if group["variant"] else ""
        chosen = f" {CHOSEN_MARK}" if group["optimistic"] else ""
        return group["method"] + variant + (" (teacher)" if group["role"] == "teacher" else "") + chosen
    if key == "threat":
        return f"{norm_name(group['norm'])} {radius_text(group)}"
    if key == "train_examples":
        return images_text(group)
    if key in ("student", "data", "seeds"):
        return str(group[key])
    if key not in group["values"]:
        return "-"
    mean, sd = group["values"][key]["mean"], group["values"][key]["sd"]
    if key in MEASURES:
        decimals = 3 if mean == 0 else min(max(0, 2 - math.floor(math.log10(abs(mean)))), 8)
    else:
        mean, sd, decimals = 100 * mean, None if sd is None else 100 * sd, 1
    return f"{mean:.{decimals}f}" + ("" if sd is None else f" ± {sd:.{decimals}f}")


def mark(group: dict, key: str) -> str:
    """Returns the dagger that stands after a group's cell where some run's flags make its number doubtful, else nothing."""
    return MARK if group["flags"].get(key) and key in group["values"] else ""


def flags(groups: Sequence[dict]) -> list[tuple[str, str]]:
    """Returns (run and attack, flag) for everything that makes an accuracy of the groups doubtful."""
    attacks = {}
    for group in groups:
        for name in sorted(group["flags"], key=attack_order):
            for found in group["flags"][name]:
                attacks.setdefault(found, []).append(attack_name(name))
    return [(f"{workdir}, {' and '.join(names)}", flag) for (workdir, flag), names in attacks.items()]


def best(groups: Sequence[dict], key: str) -> set[int]:
    """Returns the places of the best students among those on the same data and threat; none where all print alike."""
    places = set()
    peers = {}
    for place, group in enumerate(groups):
        if group["role"] == "student" and key in group["values"] and key != "seconds_per_step":
            peers.setdefault((group["data"], group["norm"], group["epsilon"]), []).append(place)
    for members in peers.values():
        shown = {place: float(cell(groups[place], key).split(" ")[0]) for place in members}
        winner = (min if key in SMALLER_IS_BETTER else max)(shown.values())
        if len(set(shown.values())) > 1:
            places |= {place for place, value in shown.items() if value == winner}
    return places


def _text_table(workdirs):
    """Returns the header and the rows as text, how many of the columns, the first ones, hold text, and the flags."""
    groups = aggregate(summary(workdirs))
    chosen = columns(groups)
    body = [[cell(group, key) + mark(group, key) for key, _ in chosen] for group in groups]
    lines = [[heading for _, heading in chosen], *body]
    notes = [f"{MARK} {where}: {flag}" for where, flag in flags(groups)]
    return lines, text_columns(chosen), notes + [CHOSEN_NOTE] * any(group["optimistic"] for group in groups)
