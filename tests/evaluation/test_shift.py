"""Tables of other data say what the records say: each accuracy beside its own test images', means of like with like only."""

import itertools
import json
import re
import statistics

import numpy as np
import pytest

from jaxrd.errors import InputError
from jaxrd.evaluation import report
from jaxrd.evaluation.corruptions import CORRUPTIONS, MAIN, SEVERITIES
from tests.evaluation.test_report import FLAG, cells, make_run, table_of

ALL = [f"cifar10_corrupted/{corruption}_{severity}" for corruption, severity in itertools.product(CORRUPTIONS, SEVERITIES)]


def add_other(workdir, accuracies, *, images=2000, of=None, checkpoint="last", step=100, epsilon=0.2, flags=(), sha256="0"):
    """Adds records of other data, {name: {attack: accuracy}}, to a fabricated run."""
    path = workdir / "evaluation.json"
    evaluation = json.loads(path.read_text()) if path.is_file() else {}
    method = json.loads((workdir / "config.json").read_text())["method"]["name"]
    for name, accuracy in accuracies.items():
        cascades = {"autoattack": {"stages": {"clean": 0.9, "square": accuracy.get("autoattack", 0)}, "flags": list(flags)}}
        evaluation.setdefault("other_data", {})[name] = {
            "jaxrd": "0.1.0", "run": {"workdir": str(workdir), "method": method, "parameters": 5000, "step": step,
                                      "checkpoint": checkpoint},
            "data": {"name": name, "split": "test", "examples": images, "of": of or images, "sha256": sha256},
            "threat": {"norm": "linf", "epsilon": epsilon, "bounds": [0, 1]}, "seed": 0, "accuracy": accuracy,
            "attacks": {attack: {"description": f"What {attack} is."} for attack in accuracy},
            "seconds": dict.fromkeys(accuracy, 1.0), "cascades": cascades if "autoattack" in accuracy else {}}
    path.write_text(json.dumps(evaluation))
    return workdir


def rows_of(text):
    """The cells of the first table in plain text."""
    header, _, *body = text.split("\n\n")[0].splitlines()
    return [cells(header), *(cells(line) for line in body)]


def set_config(workdir, **data):
    config = json.loads((workdir / "config.json").read_text())
    config["data"].update(data)
    (workdir / "config.json").write_text(json.dumps(config))
    return workdir


def test_without_other_data_there_is_nothing(tmp_path):
    workdir = make_run(tmp_path / "run", accuracy={"clean": 0.9})
    assert report.other_data_table([workdir]) == ""
    assert "Other data" not in report.write([workdir], tmp_path / "report.html").read_text()


def test_a_row_has_the_accuracy_and_that_on_the_own_test_images(tmp_path):
    workdir = make_run(tmp_path / "run", accuracy={"clean": 0.95, "pgd20": 0.5})
    add_other(workdir, {"cifar10_1": {"pgd20": 0.4, "clean": 0.9}, "svhn_cropped": {"clean": 0.25, "fgsm": 0.125}})
    expected = [["data", "images", "clean", "own test", "FGSM", "PGD-20", "own test"],
                ["cifar10_1", "2,000", "90.0", "95.0", "-", "40.0", "50.0"],
                ["svhn_cropped", "2,000", "25.0", "95.0", "12.5", "-", "-"]]
    assert rows_of(report.other_data_table([workdir])) == expected
    page = report.write([workdir], tmp_path / "report.html").read_text()
    assert table_of(page, "Other data") == expected
    assert "What fgsm is." in page  # an attack that the own data have not seen is defined too


def test_seeds_share_a_row_and_methods_do_not(tmp_path):
    clean = {"ard": (0.9, 0.8, 0.7), "rslad": (0.5,)}
    workdirs = [add_other(make_run(tmp_path / f"{method}{seed}", method, seed, {"clean": value + 0.05}),
                          {"cifar10_1": {"clean": value}})
                for method, values in clean.items() for seed, value in enumerate(values)]
    assert rows_of(report.other_data_table(workdirs)) == [
        ["data", "method", "images", "seeds", "clean", "own test"],
        ["cifar10_1", "ard", "2,000", "3", "80.0 ± 10.0", "85.0 ± 10.0"], ["cifar10_1", "rslad", "2,000", "1", "50.0", "55.0"]]


@pytest.mark.parametrize("change", [{"checkpoint": "best"}, {"epsilon": 0.1}, {"sha256": "1"}, {"of": 10000}])
def test_what_was_measured_otherwise_does_not_share_a_row(tmp_path, change):
    workdirs = [add_other(make_run(tmp_path / str(seed), seed=seed, accuracy={"clean": 0.95}), {
        "cifar10_1": {"clean": 0.9 - 0.1 * seed}}, **change if seed else {}) for seed in range(2)]
    header, first, second = rows_of(report.other_data_table(workdirs))
    if "of" in change:
        assert first[header.index("images")] != second[header.index("images")] == "first 2,000 of 10,000"
    assert (first[header.index("clean")], second[header.index("clean")]) == ("90.0", "80.0")
    if "checkpoint" in change:
        assert (first[1], second[1]) == ("last", "best")
    if "epsilon" in change:
        assert (first[1], second[1]) == ("L∞ 0.2", "L∞ 0.1") and first[-1] == "95.0" and second[-1] == "-"


@pytest.mark.parametrize("edit", [
    lambda own: own["run"].update(step=50), lambda own: own["threat"].update(epsilon=0.1),
    lambda own: own["data"].update(split="validation"), lambda own: [own.pop(name) for name in ("run", "accuracy", "threat")]])
def test_only_the_same_checkpoint_and_threat_on_test_images_are_beside(tmp_path, edit):
    workdir = add_other(make_run(tmp_path / "run", accuracy={"clean": 0.95}), {"cifar10_1": {"clean": 0.9}})
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    edit(evaluation)
    (workdir / "evaluation.json").write_text(json.dumps(evaluation))
    assert rows_of(report.other_data_table([workdir])) == [["data", "images", "clean"], ["cifar10_1", "2,000", "90.0"]]


def test_runs_of_other_data_alone_have_a_page_and_are_named_after_their_weights(tmp_path):
    workdir = make_run(tmp_path / "imported", "cifar10/Linf/Somebody")
    add_other(workdir, {"cifar10_1": {"clean": 0.9}, "a/x.npz": {"clean": 0.8}})
    (workdir / "import.json").write_text(json.dumps({"name": "cifar10/Linf/Somebody", "file": {"sha256": "0"}}))
    set_config(workdir, name="")
    page = report.write([workdir], tmp_path / "report.html").read_text()
    assert table_of(page, "Other data")[1:] == [["cifar10_1", "2,000", "90.0"], ["x.npz", "2,000", "80.0"]]
    assert "<h2>Results</h2>" not in page and "Not evaluated" not in page and "5,000 parameters" in page
    assert "<h1>cifar10/Linf/Somebody: resnet6_w8</h1>" in page and "Training used" not in page
    evaluated = make_run(tmp_path / "run", accuracy={"clean": 0.9})
    page = report.write([workdir, evaluated], tmp_path / "report.html").read_text()
    assert sorted(row[-1] for row in table_of(page, "Results")[1:]) == ["-", "90.0"] and f"Not evaluated: {workdir}." in page


def test_files_of_one_name_are_told_apart(tmp_path):
    names = ["a/x.npz", "b/x.npz", "b/y.npz"]
    workdir = add_other(make_run(tmp_path / "run"), {name: {"clean": 0.9} for name in names})
    assert [row[0] for row in rows_of(report.other_data_table([workdir]))[1:]] == ["a/x.npz", "b/x.npz", "y.npz"]


def test_a_few_corrupted_sets_are_listed_with_their_mean(tmp_path):
    names = ("fog_1", "fog_5", "brightness_1")
    accuracy = {f"cifar10_corrupted/{name}": {"clean": value} for name, value in zip(names, (0.9, 0.5, 0.8))}
    workdir = add_other(make_run(tmp_path / "run", accuracy={"clean": 0.95}), accuracy)
    text = report.other_data_table([workdir])
    assert rows_of(text)[1:] == [[*row, "95.0"] for row in (
        ["cifar10_corrupted/fog_1", "2,000", "90.0"], ["cifar10_corrupted/fog_5", "2,000", "50.0"],
        ["cifar10_corrupted/brightness_1", "2,000", "80.0"], ["cifar10_corrupted, mean of 3 of 95", "3 × 2,000", "73.3"])]
    assert "severity" not in text + report.write([workdir], tmp_path / "report.html").read_text()


def test_many_are_means_and_a_table_of_corruptions_by_severities(tmp_path):
    values = np.random.default_rng(0).uniform(size=(2, 2, 95))  # seed, attack, data set
    workdirs = [add_other(make_run(tmp_path / str(seed), seed=seed), {
        name: {"clean": values[seed, 0, place], "pgd20": values[seed, 1, place]} for place, name in enumerate(ALL)})
        for seed in range(2)]
    text = report.other_data_table(workdirs)
    names = {f"cifar10_corrupted/{corruption}_{severity}" for corruption, severity in MAIN}
    main = [place for place, name in enumerate(ALL) if name in names]
    expected = []
    for name, chosen in (("all 95", range(95)), ("75 of 95 (the 15 main corruptions)", main)):
        means = 100 * values[:, :, list(chosen)].mean(-1)
        expected.append([f"cifar10_corrupted, mean of {name}", f"{len(chosen)} × 2,000", "2", *(
            f"{statistics.mean(pair):.1f} ± {statistics.stdev(pair):.1f}" for pair in means.T)])
    assert rows_of(text)[1:] == expected
    _, clean, pgd = text.split("\n\n")
    for table, heading, attack in ((clean, "cifar10_corrupted, clean", 0), (pgd, "cifar10_corrupted, PGD-20", 1)):
        first, header, _, *body = table.splitlines()
        assert first == heading and cells(header) == ["severity", *"12345", "mean"] and len(body) == 20
        grid = 100 * values[:, attack].mean(0).reshape(19, 5)
        fog = next(cells(line) for line in body if line.startswith("fog"))
        np.testing.assert_allclose([float(cell) for cell in fog[1:6]], grid[CORRUPTIONS.index("fog")], atol=0.051)
        np.testing.assert_allclose([float(cell) for cell in cells(body[-1])[1:6]], grid.mean(0), atol=0.051)
        assert cells(body[-1])[6] == f"{grid.mean():.1f}"
    page = report.write(workdirs, tmp_path / "report.html").read_text()
    assert page.count("<th class=\"text\">severity</th>") == 2 and "<h3>cifar10_corrupted, clean</h3>" in page


def test_means_over_other_corruptions_do_not_share_a_row(tmp_path):
    counts = {"ard": (95, 94, 95), "rslad": (7,)}
    workdirs = [add_other(make_run(tmp_path / f"{method}{seed}", method, seed), {
        name: {"clean": 0.5} | ({"autoattack": 0.1} if place < 6 and not seed else {})
        for place, name in enumerate(ALL[:count])}) for method, own in counts.items() for seed, count in enumerate(own)]
    rows = rows_of(report.other_data_table(workdirs))
    assert rows[0] == ["data", "method", "images", "seeds", "clean", "AutoAttack"]
    assert [row[0].split(" ")[3] for row in rows[1:]] == ["all", "94", "75", "7", "6", "6"]
    found = {(row[0].removeprefix("cifar10_corrupted, mean of "), row[1]): row[3:] for row in rows[1:]}
    short = "75 of 95 (the 15 main corruptions)"
    assert found == {
        ("all 95", "ard"): ["2", "50.0 ± 0.0", "-"], ("94 of 95", "ard"): ["1", "50.0", "-"],
        ("6 of 95", "ard"): ["1", "-", "10.0"], ("6 of 95", "rslad"): ["1", "-", "10.0"],
        ("7 of 95", "rslad"): ["1", "50.0", "-"], (short, "ard"): ["3", "50.0 ± 0.0", "-"]}
    page = report.write(workdirs, tmp_path / "report.html").read_text()
    assert "<summary>cifar10_corrupted, clean, ard, 95 × 2,000 images</summary>" in page
    assert "severity" not in report.other_data_table(workdirs)  # of several rows of runs the report has them


def test_flags_of_cascades_mark_their_numbers(tmp_path):
    names = ALL[:6]
    workdir = add_other(make_run(tmp_path / "run"), {"cifar10_1": {"clean": 0.9, "autoattack": 0.3}}, flags=["doubtful"])
    add_other(workdir, {"svhn_cropped": {"autoattack": 0.2}})
    add_other(workdir, {name: {"autoattack": 0.25} for name in names}, flags=[FLAG])
    assert [row[-1] for row in rows_of(report.other_data_table([workdir]))[1:4]] == ["30.0†", "20.0", "25.0†"]
    text = report.other_data_table([workdir])
    assert text.count(f"† {workdir}, AutoAttack: {FLAG}") == text.count(f"† {workdir}, AutoAttack: doubtful") == 1
    page = report.write([workdir], tmp_path / "report.html").read_text()
    assert table_of(page, "Other data")[3][-1] == "25.0†" and page.count("square: without gradients") == 1


def test_names_are_escaped(tmp_path):
    workdir = add_other(make_run(tmp_path / "odd", "<b>"), {"<i>.npz": {"clean": 0.9}})
    page = report.write([workdir], tmp_path / "report.html").read_text()
    assert "<i>" not in page and "&lt;i&gt;.npz" in page


@pytest.mark.parametrize("selection, checkpoint, marked, said", [
    ("validation", "best", False, None), (None, "best", False, None), ("last", "last", False, "none held out"),
    ("test", "best", True, "checkpoints were compared on the test images during training."),
    ("test", "100", True, "checkpoints were compared on the test images during training."),
    ("test", "last", False, "checkpoints were compared on the test images during training; what is evaluated is the last.")])
def test_a_checkpoint_that_was_chosen_on_the_test_images_is_marked(tmp_path, selection, checkpoint, marked, said):
    workdir = make_run(tmp_path / "run", accuracy={"clean": 0.95})
    if selection:
        set_config(workdir, selection=selection)
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    evaluation["run"]["checkpoint"] = checkpoint
    (workdir / "evaluation.json").write_text(json.dumps(evaluation))
    add_other(workdir, {"cifar10_1": {"clean": 0.9}} | {name: {"clean": 0.5} for name in ALL[:2]}, checkpoint=checkpoint)
    sentence = "‡ The checkpoint was chosen on these very images, so its accuracy is optimistic."
    for text in (report.table([workdir]), report.other_data_table([workdir]), report.markdown_table([workdir])):
        assert (sentence in text) == marked and ("95.0‡" in text or "ard ‡" in text) == marked
    assert ("cifar10_corrupted holds the test images" in report.other_data_table([workdir])) == marked
    page = report.write([workdir], tmp_path / "report.html").read_text()
    assert table_of(page, "Results")[1][0] == ("ard ‡" if marked else "ard")
    assert table_of(page, "Other data")[1][-2:] == ["90.0", "95.0‡" if marked else "95.0"]
    assert (said is None) == ("held out" not in page and "during training" not in page)
    assert said is None or said in page
    assert page.count("chosen on these very images") == 2 * marked  # below either table


def test_the_mark_does_not_stand_for_validation_images(tmp_path):
    workdir = set_config(make_run(tmp_path / "run", accuracy={"clean": 0.95}), selection="test")
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    evaluation["run"]["checkpoint"], evaluation["data"]["split"] = "best", "validation"
    (workdir / "evaluation.json").write_text(json.dumps(evaluation))
    assert "‡" not in report.table([workdir])


def test_runs_of_several_selections_are_told_apart_and_older_ones_are_validation(tmp_path):
    workdirs = [make_run(tmp_path / str(seed), seed=seed, accuracy={"clean": 0.9}) for seed in range(3)]
    set_config(workdirs[1], selection="validation")
    set_config(workdirs[2], selection="last")
    assert [group["seeds"] for group in report.aggregate(report.summary(workdirs))] == [2, 1]
    page = report.write(workdirs, tmp_path / "report.html").read_text()
    assert "ard [data.selection=last]: trained on all training images" in page


@pytest.mark.parametrize("damage", [
    '"x"', '[]', '{"a": 1}', '{"a": {}}', '{"a": {"accuracy": {"clean": 2}}}',
    *('{"a": {"run": {}, "data": %s, "threat": %s, "accuracy": %s, "attacks": {}, "seconds": {}, "cascades": %s}}' % parts
      for parts in (('{}', '{"epsilon": 0.1}', '{}', '{}'), ('{"examples": 5}', '{}', '{}', '{}'),
                    ('{"examples": 5}', '{"epsilon": 0.1}', '{"clean": 2}', '{}'),
                    ('{"examples": 5}', '{"epsilon": 0.1}', '{"clean": NaN}', '{}'),
                    ('{"examples": 5}', '{"epsilon": 0.1}', '{}', '{"autoattack": {}}')))])
def test_damaged_records_are_one_line(tmp_path, damage):
    workdir = make_run(tmp_path / "damaged")
    (workdir / "evaluation.json").write_text('{"other_data": %s}' % damage)
    with pytest.raises(InputError, match="damaged/evaluation.json") as caught:
        report.write([workdir], tmp_path / "report.html")
    assert "\n" not in str(caught.value) and re.search("other_data|finite number", str(caught.value))
