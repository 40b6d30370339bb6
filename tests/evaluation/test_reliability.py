"""Seeds in a report: every seed's accuracy, and differences that are paired where rows share seeds."""

import json
import math
import re
import statistics

import numpy as np
import pytest

from jaxrd.evaluation import plots, reliability, report
from jaxrd.evaluation.names import strongest
from jaxrd.evaluation.runs import aggregate, members_of, read_runs, to_rows
from tests.evaluation.test_report import make_run, table_of

# Seed -> accuracy under PGD-20. ard+igdm lacks seed 2, rslad has others.
PGD = {"ard": {0: 0.40, 1: 0.30, 2: 0.50}, "ard+igdm": {0: 0.52, 1: 0.44}, "rslad": {7: 0.1, 8: 0.2}}


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    root = tmp_path_factory.mktemp("seeds")
    return [make_run(root / f"{method}_{seed}", method, seed, {"clean": 0.9, "pgd20": accuracy})
            for method, values in PGD.items() for seed, accuracy in values.items()]


@pytest.fixture(scope="module")
def html(workdirs, tmp_path_factory):
    return report.write(workdirs, tmp_path_factory.mktemp("reports") / "report.html").read_text(encoding="utf-8")


def compared(workdirs, places):
    runs = read_runs(workdirs)
    groups = aggregate(to_rows(runs))
    return reliability.pairs(groups, members_of(groups, runs), places)


def test_pairs_are_of_the_seeds_that_both_have(workdirs):
    paired, strangers = compared(workdirs, [(1, 0), (2, 0)])
    assert paired.label == "ard+igdm − ard"
    assert paired.values["pgd20"] == pytest.approx([0.52 - 0.40, 0.44 - 0.30])
    means = [statistics.mean(PGD[method].values()) for method in ("ard+igdm", "ard")]
    assert paired.means["pgd20"] == pytest.approx(means[0] - means[1])
    assert paired.spreads["pgd20"] == pytest.approx(
        math.sqrt(sum(statistics.variance(PGD[method].values()) for method in ("ard+igdm", "ard"))))
    assert strangers.values == {} and strangers.means["pgd20"] == pytest.approx(0.15 - 0.40)


def test_what_all_seeds_share_leaves_a_paired_difference_alone(tmp_path):
    """Seeds whose luck is the same for both rows: the difference is exact, however far the runs are apart."""
    runs = [make_run(tmp_path / f"{method}{seed}", method, seed, {"clean": 0.9, "pgd20": luck + gain})
            for method, gain in (("ard", 0.0), ("ard+igdm", 0.1)) for seed, luck in enumerate((0.1, 0.5, 0.3))]
    (pair,) = compared(runs, [(1, 0)])
    assert statistics.stdev(pair.values["pgd20"]) == pytest.approx(0, abs=1e-12)
    assert pair.spreads["pgd20"] == pytest.approx(math.sqrt(2) * statistics.stdev((0.1, 0.5, 0.3)))


def test_every_seed_is_in_the_table(html):
    header, *rows = table_of(html, "Reliability across seeds")
    assert header == ["method", "seeds", "mean", "sd", "min", "max", *(f"seed {seed}" for seed in (0, 1, 2, 7, 8))]
    for (method, values), cells in zip(PGD.items(), rows, strict=True):
        percent = [100 * value for value in values.values()]
        stated = [statistics.mean(percent), statistics.stdev(percent), min(percent), max(percent)]
        seeds = [f"{100 * values[seed]:.1f}" if seed in values else "-" for seed in (0, 1, 2, 7, 8)]
        assert cells == [method, str(len(values)), *(f"{value:.1f}" for value in stated), *seeds]
    assert "The same for clean images" in html


def test_paired_and_unpaired_differences_stand_side_by_side(html):
    section = html.partition("Differences paired by seed")[2]
    cells = [re.sub("<.*?>", "", cell) for cell in re.findall("<td.*?>(.*?)</td>", section.partition("</tbody>")[0])]
    unpaired = 100 * math.hypot(statistics.stdev(PGD["ard"].values()), statistics.stdev(PGD["ard+igdm"].values()))
    assert cells == ["ard+igdm − ard", "2", "+13.0 ± 1.4", "+12.0", "+14.0", "2 of 2", f"+8.0 ± {unpaired:.1f}"]


def test_many_seeds_have_no_columns(tmp_path):
    runs = [make_run(tmp_path / str(seed), "ard", seed, {"clean": 0.9}) for seed in range(11)]
    html = report.write(runs, tmp_path / "report.html").read_text(encoding="utf-8")
    assert table_of(html, "Reliability across seeds")[0] == ["method", "seeds", "mean", "sd", "min", "max"]


def test_one_seed_each_says_nothing_of_reliability(tmp_path):
    runs = [make_run(tmp_path / method, method, 0, {"clean": 0.9}) for method in ("ard", "ard+igdm")]
    html = report.write(runs, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Reliability across seeds" not in html and "Differences of the means above" in html


def test_dots_stand_at_the_accuracies_of_the_seeds():
    rows = [(line, [0.25, 0.5, 0.5]) for line in plots.lines([("a", "a", False, ()), ("b", "b", False, ())])]
    (axis,) = plots.seeds(rows, "Accuracy, %").axes
    dots = [line for line in axis.lines if line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in dots] == [[25.0, 50.0, 50.0]] * 2
    assert all(len(set(line.get_ydata())) == 3 for line in dots)  # equal seeds are both seen
    means = [line for line in axis.lines if line.get_marker() != "o"]
    assert all(set(line.get_xdata()) == {np.mean([25.0, 50.0, 50.0])} for line in means)


@pytest.mark.parametrize("keys, expected", [
    (("clean", "pgd20", "autoattack"), "autoattack"), (("autoattack", "autoattack_plus"), "autoattack"),
    (("clean", "pgd20", "pgd100"), "pgd100"), (("fgsm", "zoo"), "fgsm"), (("zoo",), "zoo"), ((), None)])
def test_strongest_attack(keys, expected):
    assert strongest(keys) == expected


def test_runs_without_a_seed_are_left_out(tmp_path):
    runs = [make_run(tmp_path / str(seed), "ard", seed, {"clean": 0.9}) for seed in range(2)]
    config = json.loads((runs[0] / "config.json").read_text())
    del config["seed"]
    (runs[0] / "config.json").write_text(json.dumps(config))
    assert "Reliability across seeds" not in report.write(runs, tmp_path / "report.html").read_text(encoding="utf-8")
