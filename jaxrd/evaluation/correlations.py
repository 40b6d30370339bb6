"""Alignment with the teacher against robust accuracy in a report, over all runs: after Lee et al. 2025 (IGDM), Figure 3."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from jaxrd.evaluation import page, plots
from jaxrd.evaluation.names import ALIGNMENT, attack_name, strongest
from jaxrd.evaluation.runs import Run

_FEWEST = 5  # runs


def section(groups: Sequence[dict], members: Sequence[Sequence[Run]], lines: Sequence[plots.Line], folder: Path) -> str:
    """Returns the HTML of the section "Alignment and robustness", or nothing where fewer than five runs have both.

    The accuracy is that under AutoAttack, else under the strongest attack that was measured. Runs on other data or within
    another threat model are never in one plot; teachers are in none.

    Args:
      groups: from `runs.aggregate`.
      members: the runs of each group.
      lines: the groups' lines in plots.
      folder: where its plots are saved.
    """
    peers: dict[tuple, list] = {}
    for group, runs, line in zip(groups, members, lines):
        for run in runs if group["role"] == "student" else ():
            split = run.evaluation.get("data", {}).get("split")
            peers.setdefault((group["data"], split, group["norm"], group["epsilon"]), []).append((line.label, run.evaluation))
    html = ""
    for place, found in enumerate(peers.values()):
        attack = strongest([name for _, evaluation in found for name in evaluation.get("accuracy", {})
                            if evaluation.get("alignment")])
        panels = []
        for measure, heading in ALIGNMENT.items() if attack else ():
            points = [(label, float(evaluation["alignment"][measure]), 100 * evaluation["accuracy"][attack])
                      for label, evaluation in found
                      if measure in evaluation.get("alignment", {}) and attack in evaluation.get("accuracy", {})]
            if len(points) >= _FEWEST:
                panels.append((points, heading))
        if panels:
            y_label = f"Accuracy under {attack_name(attack)}, %" if attack != "clean" else "Accuracy, %"
            wide, narrow = (plots.correlations(panels, y_label, lines, narrow=narrow) for narrow in (False, True))
            name = f"correlation{place or ''}.png"
            html += page.figure(folder / name, wide, narrow, f"{y_label}, against alignment with the teacher", (
                "One point per run; the line is that of least squares, r is Pearson’s correlation. It is of these runs and "
                "says nothing of causes.")) + _table(panels, attack)
    return page.section("Alignment and robustness", html)


def _table(panels, attack):
    body = []
    for points, heading in panels:
        _, x, y = zip(*points)
        r = plots.pearson(x, y)
        body.append([escape(heading), "-" if r is None else f"{r:+.3f}".replace("-", "−"), str(len(points)),
                     str(len({label for label, _, _ in points}))])
    return page.html_table([f"against {escape(attack_name(attack))}", "Pearson’s r", "runs", "rows"], body, 1)
