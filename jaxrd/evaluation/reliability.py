"""Reliability across seeds in a report: each seed's accuracy, how far they spread, and differences paired by seed.

Two rows that were trained with the same seeds share their starting weights and the order of their images, so the differences of
runs of one seed may spread less than the runs themselves: their mean and standard deviation are what tells two rows apart.
"""

import math
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from jaxrd.evaluation import page, plots, tables
from jaxrd.evaluation.names import MEASURES, attack_name, attack_order, strongest
from jaxrd.evaluation.runs import Run, to_rows

_LISTED = 10  # seeds that have columns of their own, at most
_ALL_PAIRS = 4  # rows of which each is compared with each; of more, those that a module tells apart


class Pair(NamedTuple):
    """Two rows of the table to compare: by seed, where they share at least two.

    Attributes:
      label: what is subtracted from what.
      values: measure -> differences of the runs of each shared seed, in the order of the seeds.
      means: measure -> difference of the means over all runs of both rows.
      spreads: measure -> standard deviation of the difference of two runs of any seeds; only where both rows have several.
    """

    label: str
    values: dict[str, list[float]]
    means: dict[str, float]
    spreads: dict[str, float]


def section(groups: Sequence[dict], members: Sequence[Sequence[Run]], lines: Sequence[plots.Line], folder: Path) -> str:
    """Returns the HTML of the section "Reliability across seeds", or nothing where no row has several seeds.

    Args:
      groups: from `runs.aggregate`.
      members: the runs of each group.
      lines: the groups' lines in plots.
      folder: where its plot is saved.
    """
    results = [_by_seed(runs) for runs in members]
    shown = [place for place, group in enumerate(groups) if group["seeds"] > 1 and len(results[place]) > 1]
    attacks = sorted({name for place in shown for found in results[place].values() for name in found} - set(MEASURES),
                     key=attack_order)
    if not attacks:
        return ""
    main = strongest(attacks)
    several = [place for place in shown if len(_values(results[place], main)) > 1]
    drawn = [(lines[place], list(_values(results[place], main).values())) for place in several]
    title = f"Accuracy under {attack_name(main)}, %" if main != "clean" else "Accuracy, %"
    html = page.figure(folder / "seeds.png", plots.seeds(drawn, title), plots.seeds(drawn, title, narrow=True),
                       f"{title}, of each seed", "One dot per seed; the bar is the mean.")
    seeds = sorted({seed for place in shown for seed in results[place]})
    columns = seeds if len(seeds) <= _LISTED else []
    html += f"<h3>{escape(_heading(main))}</h3>" + _seed_table(main, groups, results, shown, lines, columns)
    note = "Accuracies in percent; sd: the standard deviation of a single run."
    html += f'<p class="note">{note}{"" if columns else " The values of each seed stand under “Every run”."}</p>'
    if rest := [name for name in reversed(attacks) if name != main]:
        parts = "".join(f"<h3>{escape(_heading(name))}</h3>" + _seed_table(name, groups, results, shown, lines, columns)
                        for name in rest)
        rest_names = ["clean images" if name == "clean" else attack_name(name) for name in rest]
        html += f"<details><summary>The same for {escape(', '.join(rest_names))}</summary>{parts}</details>"
    places = [(one, other) for one in several for other in several if other < one] if len(several) <= _ALL_PAIRS else (
        module_pairs(groups))
    return page.section("Reliability across seeds", html + _pair_table(main, pairs(groups, members, places)))


def changes(groups: Sequence[dict], members: Sequence[Sequence[Run]]) -> str:
    """Returns the HTML of a table of "method+module" minus "method" for each pair that is listed, or nothing.

    Differences are paired by seed where the rows share at least two, else they are those of the means.
    """
    compared = pairs(groups, members, module_pairs(groups))
    if not compared:
        return ""
    names = [(key, heading) for key, heading in tables.columns(groups) if any(key in group["values"] for group in groups)]
    by_seed = any(_shared(pair) for pair in compared)
    body = []
    for pair in compared:
        cells = []
        for key, _ in names:
            found = pair.values.get(key, [])
            if len(found) > 1:
                cells.append(page.number(_difference(key, statistics.fmean(found), statistics.stdev(found))))
            else:
                cells.append(_difference(key, pair.means[key]) if key in pair.means else "-")
        body.append([escape(pair.label), *([str(_shared(pair) or "-")] if by_seed else []), *cells])
    note = "Accuracies in percentage points. " + (
        "Pairs: seeds that both rows were trained with; of these, mean ± standard deviation of the differences between runs of "
        "the same seed. Without pairs: differences of the means above." if by_seed else
        "Differences of the means above. Compare them with the standard deviations.")
    header = ["difference", *(["pairs"] if by_seed else []), *(escape(heading) for _, heading in names)]
    return f'<h3>What the added module changes</h3>{page.html_table(header, body, 1)}<p class="note">{note}</p>'


def module_pairs(groups: Sequence[dict]) -> list[tuple[int, int]]:
    """Returns the places of "method+module" and "method" for each two rows that nothing else tells apart."""
    alike = ("role", "student", "data", "norm", "epsilon", "train_examples")
    found = []
    for place, group in enumerate(groups):
        base = group["method"].rpartition("+")[0]
        bases = [other for other, candidate in enumerate(groups) if base and candidate["method"] == base
                 and all(candidate[key] == group[key] for key in alike)]
        if len(bases) == 1:
            found.append((place, bases[0]))
    return found


def pairs(groups: Sequence[dict], members: Sequence[Sequence[Run]], places: Sequence[tuple[int, int]]) -> list[Pair]:
    """Returns the differences of pairs of rows.

    Args:
      groups: from `runs.aggregate`.
      members: the runs of each group.
      places: (of the row, of the one that is subtracted from it) each.
    """
    compared = []
    for one, other in places:
        results = _by_seed(members[one]), _by_seed(members[other])
        values = {}
        for key in dict.fromkeys((*groups[one]["values"], *groups[other]["values"])):
            mine, its = (_values(result, key) for result in results)
            if shared := sorted(mine.keys() & its.keys()):
                values[key] = [mine[seed] - its[seed] for seed in shared]
        first, second = groups[one]["values"], groups[other]["values"]
        both = [key for key in first if key in second]
        compared.append(Pair(
            f"{groups[one]['label']} − {groups[other]['label']}", values,
            {key: first[key]["mean"] - second[key]["mean"] for key in both},
            {key: math.hypot(first[key]["sd"], second[key]["sd"]) for key in both
             if first[key]["sd"] is not None and second[key]["sd"] is not None}))
    return compared


def _by_seed(runs):
    """Returns seed -> all results by name, of the evaluated runs; runs without a seed are left out."""
    return {row["seed"]: row["accuracy"] | row["measures"] for row in to_rows(runs)
            if plots.is_number(row["seed"]) and (row["accuracy"] or row["measures"])}


def _values(results, key):
    return {seed: found[key] for seed, found in results.items() if key in found}


def _shared(pair):
    counts = [len(found) for found in pair.values.values() if len(found) > 1]
    return max(counts, default=0)


def _heading(key):
    return "Clean" if key == "clean" else attack_name(key)


def _seed_table(key, groups, results, shown, lines, columns):
    body = []
    for place in shown:
        values = {seed: 100 * value for seed, value in _values(results[place], key).items()}
        if not values:
            continue
        found = list(values.values())
        stated = (statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, min(found), max(found))
        body.append([page.key(lines[place].colour) + escape(groups[place]["label"]), str(len(found)),
                     *("-" if value is None else f"{value:.1f}" for value in stated),
                     *(f"{values[seed]:.1f}" if seed in values else "-" for seed in columns)])
    header = ["method", "seeds", "mean", "sd", "min", "max", *(f"seed {seed}" for seed in columns)]
    return page.html_table(header, body, 1)


def _pair_table(key, compared):
    body = []
    for pair in compared:
        found = pair.values.get(key, [])
        if len(found) < 2:
            continue
        higher = sum(value > 0 for value in found)
        body.append([
            escape(pair.label), str(len(found)),
            page.number(_difference(key, statistics.fmean(found), statistics.stdev(found))),
            _difference(key, min(found)), _difference(key, max(found)), f"{higher} of {len(found)}",
            page.number(_difference(key, pair.means[key], pair.spreads.get(key)))])
    if not body:
        return ""
    header = ["difference", "pairs", "paired", "min", "max", "higher", "unpaired"]
    note = (
        f"{_heading(key)}, percentage points. Paired: mean ± standard deviation of the differences between runs of the same "
        "seed; higher: in how many of them the first is higher. Unpaired: the difference of the two means ± the standard "
        "deviation that the difference of two runs has if seeds have nothing to do with each other.")
    return f'<h3>Differences paired by seed</h3>{page.html_table(header, body, 1)}<p class="note">{escape(note)}</p>'


def _difference(key, mean, sd=None):
    factor, decimals = (1, 3) if key in MEASURES else (100, 1)
    # Adding 0.0 turns a rounded -0.0 into 0.0.
    text = f"{round(factor * mean, decimals) + 0.0:+.{decimals}f}".replace("-", "−")
    return text + ("" if sd is None else f" ± {factor * sd:.{decimals}f}")
