"""Sections of a report: alignment against robustness, classes, configuration and environment."""

import json
import re
from html import unescape

import numpy as np
import pytest

from jaxrd.evaluation import classes, plots, report
from tests.evaluation.test_report import make_run, table_of


def write(workdirs, tmp_path) -> str:
    """The page of runs whose other figures, which take most of the time, have nothing to show."""
    for workdir in workdirs:
        for name in ("metrics.jsonl", "evaluation/gallery.npz"):
            (workdir / name).unlink(missing_ok=True)
        evaluation = json.loads((workdir / "evaluation.json").read_text())
        evaluation.pop("robustness_curve", None)
        (workdir / "evaluation.json").write_text(json.dumps(evaluation))
    return report.write(workdirs, tmp_path / "report.html").read_text(encoding="utf-8")


def change(workdir, name="evaluation.json", **parts):
    path = workdir / name
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | parts))
    return workdir


def aligned(tmp_path, cosines, accuracies, **settings):
    runs = [make_run(tmp_path / f"{place}", f"method{place}", 0, accuracy, **settings)
            for place, accuracy in enumerate(accuracies)]
    for run, cosine in zip(runs, cosines):
        change(run, alignment={"gradient_cosine": cosine})
    return runs


@pytest.mark.parametrize("x, y, expected", [
    ([1, 2, 3], [2, 4, 6], 1.0), ([1, 2, 3], [3, 2, 1], -1.0), ([1, 2, 3, 4], [1, -1, -1, 1], 0.0),
    ([0.1] * 3, [1, 2, 3], None), ([1, 2, 3], [0.3] * 3, None)])
def test_pearson(x, y, expected):
    assert plots.pearson(x, y) == (None if expected is None else pytest.approx(expected, abs=1e-12))


def test_a_correlation_shows_its_points_its_r_and_their_number():
    points = [("ard", 0.1, 30.0), ("ard", 0.2, 35.0), ("ard+igdm", 0.3, 52.0)]
    figure = plots.correlation(points, "grad cosine", "AutoAttack")
    (axis,) = figure.axes
    r = np.corrcoef([0.1, 0.2, 0.3], [30.0, 35.0, 52.0])[0, 1]
    assert axis.get_title(loc="left") == f"r = {r:+.2f}, n = 3"
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("grad cosine", "AutoAttack")
    drawn = {tuple(point) for line in axis.lines if line.get_linestyle() == "None" for point in line.get_xydata()}
    assert drawn == {(x, y) for _, x, y in points}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ard", "ard+igdm"]
    (line,) = [line for line in axis.lines if line.get_linestyle() != "None"]
    slope, offset = np.polyfit([0.1, 0.2, 0.3], [30.0, 35.0, 52.0], 1)
    np.testing.assert_allclose(line.get_ydata(), slope * np.array([0.1, 0.3]) + offset)


def test_alignment_is_set_against_autoattack_where_five_runs_have_both(tmp_path):
    cosines, robust = [0.1, 0.2, 0.3, 0.4, 0.6], [0.3, 0.35, 0.33, 0.5, 0.52]
    runs = aligned(tmp_path, cosines, [{"clean": 0.9, "pgd20": 0.9, "autoattack": value} for value in robust])
    runs.append(make_run(tmp_path / "without", "rslad", 0, {"clean": 0.9, "autoattack": 0.1}))
    assert table_of(write(runs, tmp_path), "Alignment and robustness") == [
        ["against AutoAttack", "Pearson’s r", "runs", "rows"],
        ["grad cosine", f"{np.corrcoef(cosines, robust)[0, 1]:+.3f}", "5", "5"]]
    assert "Alignment and robustness" not in write(runs[1:], tmp_path)
    change(runs[0], accuracy={"clean": 0.9, "pgd20": 0.4})  # Four are too few for AutoAttack; what fewer have is no substitute.
    assert "Alignment and robustness" not in write(runs, tmp_path)


def test_without_autoattack_it_is_the_strongest_attack_and_threats_are_kept_apart(tmp_path):
    runs = aligned(tmp_path, [0.1, 0.2, 0.3, 0.4, 0.6], [{"clean": 0.9, "pgd20": value} for value in (0.1, 0.2, 0.3, 0.4, 0.6)])
    header, row = table_of(write(runs, tmp_path), "Alignment and robustness")
    assert header[0] == "against PGD-20" and row[1] == "+1.000"
    change(runs[0], threat={"norm": "l2", "epsilon": 0.2, "bounds": [0, 1]})
    assert "Alignment and robustness" not in write(runs, tmp_path)


def test_measures_are_defined_in_the_words_of_the_evaluation(tmp_path):
    run = make_run(tmp_path / "run", accuracy={"clean": 0.9}, teacher="t")
    alignment = {"gradient_cosine": 0.5, "gradient_distance": 0.1, "taylor_remainder": 0.2, "definitions": {
        "gradient_cosine": "Both.", "gradient_distance": "Both.", "taylor_remainder": "The <rest>."}}
    definitions = re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", write([change(run, alignment=alignment)], tmp_path))
    assert ("grad cosine and grad distance", "Both.") in definitions
    assert ("Taylor remainder", "The &lt;rest&gt;.") in definitions


def test_classes_are_means_over_seeds_and_the_worst_is_named(tmp_path):
    runs = [change(make_run(tmp_path / str(seed), "ard", seed, {"clean": 0.9, "pgd20": 0.4}), classes={
        "examples": [2, 2, 0], "accuracy": {"clean": [1.0, 1.0, None], "pgd20": pgd}}) for seed, pgd in enumerate(
            ([0.5, 0.2, None], [0.7, 0.1, None]))]
    assert table_of(write(runs, tmp_path), "Class by class") == [
        ["method", "worst class", "its accuracy", "highest", "class 0", "class 1", "class 2"],
        ["ard", "1", "15.0", "60.0", "60.0", "15.0", "-"]]


def test_many_classes_are_summed_up(tmp_path):
    values = [place / 100 for place in range(100)]
    run = change(make_run(tmp_path / "run", accuracy={"clean": 0.9}), classes={
        "examples": [1] * 100, "accuracy": {"clean": values}})
    assert table_of(write([run], tmp_path), "Class by class") == [
        ["method", "worst class", "its accuracy", "highest", "median"], ["ard", "0", "0.0", "99.0", "49.5"]]


def test_confusion_is_in_shares_of_each_class(tmp_path):
    (axis,) = classes.confusion([("ard", np.array([[3, 1], [0, 0]]))]).axes
    np.testing.assert_allclose(axis.images[0].get_array(), [[75, 25], [0, 0]])
    assert sorted(text.get_text() for text in axis.texts) == ["25", "75"]
    runs = [change(make_run(tmp_path / str(seed), "ard", seed, {"clean": 0.9}), classes={
        "examples": [4, 0], "accuracy": {"clean": [1.0, None]},
        "confusion": {"attack": "pgd20", "true_to_adversarial": [[3, 1], [0, 0]]}}) for seed in range(2)]
    assert "What classes are mistaken for under PGD-20" in write(runs, tmp_path)
    assert (tmp_path / "evaluation" / "confusion.png").is_file()


def environments(html) -> tuple[list, dict]:
    part = html.partition("<summary>Environment</summary>")[2]
    rows = [[unescape(re.sub("<.*?>", "", cell)) for cell in re.findall("<t[hd] .*?>(.*?)</t[hd]>", row)]
            for row in re.findall("<tr>(.*?)</tr>", part, re.DOTALL)]
    return rows, dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", part))


def test_environments_are_listed_once_each(tmp_path):
    runs = [make_run(tmp_path / name, "ard", seed, {"clean": 0.9}) for seed, name in enumerate("abcd")]
    commit = "0123456789ab" + "0" * 28
    for run, its in zip(runs, (commit, commit, "f" * 40 + "-dirty")):
        change(run, "environment.json", jax="0.10.2", devices=["cpu", "cpu"], git_commit=its, xla_flags=None)
    rows, facts = environments(write(runs, tmp_path))
    assert rows == [["runs", "git commit"], ["a, b", "0123456789ab"], ["c", "ffffffffffff-dirty"]]
    assert facts == {"jax": "0.10.2", "devices": "cpu, cpu"}
    assert f"Not known: {runs[3]}." in write(runs, tmp_path)


def test_one_environment_is_facts_and_none_is_nothing(tmp_path):
    run = make_run(tmp_path / "run", accuracy={"clean": 0.9})
    assert "Environment" not in write([run], tmp_path)
    rows, facts = environments(write([change(run, "environment.json", python="3.11.7", processes=1)], tmp_path))
    assert rows == [] and facts == {"python": "3.11.7", "processes": "1"}
