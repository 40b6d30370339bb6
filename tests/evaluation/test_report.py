"""Reports say what the run directories say: the same numbers, nothing else, and one line where a file is damaged."""

import json
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from jaxrd.errors import InputError
from jaxrd.evaluation import plots, report

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def make_run(workdir, method="ard", seed=0, accuracy=None, teacher="", examples=100, channels=1, **settings) -> Path:
    """Fabricates a run directory; without `accuracy` the run was not evaluated."""
    (workdir / "evaluation").mkdir(parents=True)
    config = {
        "seed": seed, "student": "resnet6_w8", "teacher": str(teacher), "method": {"name": method, **settings},
        "threat": {"norm": "linf", "epsilon": 0.2}, "training": {"steps": 100},
        "data": {"name": "jaxrd_digits", "examples": examples}}
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "metrics.jsonl").write_text("\n".join([
        '{"step": 50, "seconds": 3.2, "train/loss": 1.2, "train/distillation": 1.0, "train/accuracy/adversarial": 0.4}',
        '{"step": 100, "seconds": 6.1, "train/loss": 0.7, "train/distillation": 0.5}',
        '{"step": 100, "validation/clean_accuracy": 0.9, "validation/pgd_accuracy": 0.35}']) + "\n")
    if accuracy is None:
        return workdir
    evaluation = {
        "jaxrd": "0.1.0",
        "run": {"workdir": str(workdir), "method": method, "parameters": 5000, "step": 100, "checkpoint": "last"},
        "data": {"name": "jaxrd_digits", "split": "test", "examples": 600, "train_examples": examples},
        "threat": {"norm": "linf", "epsilon": 0.2, "bounds": [0, 1]}, "accuracy": accuracy,
        "attacks": {"pgd20": {"objective": "cross_entropy", "steps": 20, "description": "Twenty steps up the loss."}},
        "robustness_curve": {"attack": "pgd20", "epsilon": [0.0, 0.1, 0.2], "accuracy": [0.9, 0.7, 0.4]}}
    if teacher:
        evaluation["alignment"] = {"gradient_distance": 0.0123, "gradient_cosine": 0.5, "definition": "Of gradients."}
    (workdir / "evaluation.json").write_text(json.dumps(evaluation))
    images = np.linspace(0, 1, 3 * 64 * channels, dtype=np.float32).reshape(3, 8, 8, channels)
    np.savez(workdir / "evaluation" / "gallery.npz", images=images, adversarial=np.clip(images + 0.2, 0, 1),
             labels=np.array([1, 2, 3]), clean_prediction=np.array([1, 2, 0]),
             adversarial_prediction=np.array([1, 0, 0]), attack="pgd20")
    return workdir


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A teacher, two methods with several seeds (listed before it), and a run that was not evaluated."""
    tmp_path = tmp_path_factory.mktemp("runs")
    teacher = make_run(tmp_path / "teacher", "pgd_at", accuracy={"clean": 0.995, "pgd20": 0.765}, examples=1000)
    results = {"ard": [(0.93, 0.40), (0.91, 0.38), (0.95, 0.45)], "ard+igdm": [(0.97, 0.52), (0.96, 0.55)]}
    students = [make_run(tmp_path / f"{method}_{seed}", method, seed,
                         {"clean": clean, "fgsm": 0.5, "pgd20": pgd}, teacher)
                for method, pairs in results.items() for seed, (clean, pgd) in enumerate(pairs)]
    return [*students, make_run(tmp_path / "rslad", "rslad", teacher=teacher), teacher]


@pytest.fixture(scope="module")
def comparison(runs, tmp_path_factory):
    """The report of all of them."""
    return report.write(runs, tmp_path_factory.mktemp("reports") / "comparison" / "report.html")


class Page(HTMLParser):
    """The rows of the first table, and every address that the page refers to."""

    def __init__(self, path: Path):
        super().__init__()
        self.addresses, self.rows, self.tables = [], [], 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset")]
        self.tables += tag == "table"
        if self.tables == 1 and tag == "tr":
            self.rows.append([])
        if self.tables == 1 and tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.tables += 100 * (tag == "table")

    def handle_data(self, data):
        if self.tables == 1 and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def cells(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())


def test_summary_repeats_the_files(runs):
    rows = report.summary(runs)
    assert [row["role"] for row in rows] == ["teacher"] + ["student"] * 6
    for row in rows:
        file = Path(row["workdir"]) / "evaluation.json"
        evaluation = json.loads(file.read_text()) if file.exists() else {"accuracy": {}}
        assert row["accuracy"] == evaluation["accuracy"]
        assert row["train_examples"] == (1000 if row["role"] == "teacher" else 100)


def test_seeds_collapse_to_mean_and_sample_deviation(runs):
    groups = {group["label"]: group for group in report.aggregate(report.summary(runs))}
    assert list(groups) == ["pgd_at (teacher)", "ard", "ard+igdm", "rslad"]
    pgd = groups["ard"]["values"]["pgd20"]
    assert pgd["mean"] == pytest.approx(statistics.mean([0.40, 0.38, 0.45]))
    assert pgd["sd"] == pytest.approx(statistics.stdev([0.40, 0.38, 0.45]))
    assert pgd["n"] == groups["ard"]["seeds"] == 3
    assert groups["pgd_at (teacher)"]["values"]["pgd20"] == {"mean": 0.765, "sd": None, "n": 1}
    assert groups["rslad"]["values"] == {} and groups["rslad"]["seeds"] == 0


def test_runs_that_differ_in_more_than_their_seed_stay_apart(tmp_path):
    swept = [make_run(tmp_path / f"igdm_{weight}_{seed}", "ard+igdm", seed, {"clean": 0.9}, igdm=weight)
             for weight in (1.0, 10.0) for seed in (0, 1)]
    again = [make_run(tmp_path / name, "ard", 0, {"clean": 0.9}) for name in ("first", "second")]
    sizes = [make_run(tmp_path / f"examples_{examples}", "trades", 0, {"clean": 0.9}, examples=examples)
             for examples in (100, 200)]
    groups = report.aggregate(report.summary(swept + again + sizes))
    assert [(group["label"], group["seeds"]) for group in groups] == [
        ("ard+igdm [method.igdm=1.0]", 2), ("ard+igdm [method.igdm=10.0]", 2), ("ard [first]", 1), ("ard [second]", 1),
        ("trades, 100 images", 1), ("trades, 200 images", 1)]


def seeds_of_groups(tmp_path, edit):
    """How many seeds each row holds, of two runs of different seeds whose files `edit(seed, config, evaluation)` changes."""
    workdirs = [make_run(tmp_path / str(seed), seed=seed, accuracy={"clean": 0.9}) for seed in range(2)]
    for seed, workdir in enumerate(workdirs):
        files = {name: json.loads((workdir / name).read_text()) for name in ("config.json", "evaluation.json")}
        edit(seed, *files.values())
        for name, content in files.items():
            (workdir / name).write_text(json.dumps(content))
    return [group["seeds"] for group in report.aggregate(report.summary(workdirs))]


def test_how_a_run_is_watched_does_not_set_it_apart(tmp_path):
    assert seeds_of_groups(tmp_path, lambda seed, config, _: config["training"].update(log_every=10 + seed)) == [2]


@pytest.mark.parametrize("edit", [
    lambda seed, config, _: config["data"].update(shift=seed),
    lambda seed, config, evaluation: evaluation["data"].update(split=("test", "validation")[seed]),
    lambda seed, config, evaluation: evaluation["run"].update(checkpoint=("last", "best")[seed])])
def test_other_data_splits_and_checkpoints_are_not_another_seed(tmp_path, edit):
    assert seeds_of_groups(tmp_path, edit) == [1, 1]


@pytest.mark.parametrize("steps, expected", [(600, [2]), (700, [1, 1])])
def test_teachers_may_follow_the_seed_where_nothing_else_differs(tmp_path, steps, expected):
    teachers = [make_run(tmp_path / f"teacher{seed}", "pgd_at", seed, {"clean": 0.9}) for seed in range(2)]
    for teacher, length in zip(teachers, (600, steps)):
        config = json.loads((teacher / "config.json").read_text())
        config["training"]["steps"] = length
        (teacher / "config.json").write_text(json.dumps(config))
    assert seeds_of_groups(tmp_path, lambda seed, config, _: config.update(teacher=str(teachers[seed]))) == expected


def test_the_method_is_what_was_built_and_not_what_it_was_asked_for_as(tmp_path):
    workdir = make_run(tmp_path / "run", "ard", 0, {"clean": 0.9})
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    evaluation["run"]["method"] = "ard+igdm"
    (workdir / "evaluation.json").write_text(json.dumps(evaluation))
    assert report.summary([workdir])[0]["method"] == "ard+igdm"


def test_table(runs):
    header, rule, teacher, ard, igdm, rslad = report.table(runs).splitlines()
    assert cells(header) == ["method", "train images", "seeds", "clean", "FGSM", "PGD-20", "grad cosine",
                             "grad distance"]
    assert set(rule) == {"-"}
    assert cells(teacher) == ["pgd_at (teacher)", "1,000", "1", "99.5", "-", "76.5", "-", "-"]
    assert cells(ard) == ["ard", "100", "3", "93.0 ± 2.0", "50.0 ± 0.0", "41.0 ± 3.6", "0.500 ± 0.000",
                          "0.0123 ± 0.0000"]
    assert cells(igdm)[:4] == ["ard+igdm", "100", "2", "96.5 ± 0.7"]
    assert cells(rslad) == ["rslad", "100", "0", *"-----"]
    assert len({len(line) for line in (header, rule, teacher, ard, igdm, rslad)}) == 1


def test_one_seed_each_needs_no_seeds_column(runs):
    assert "seeds" not in report.table([runs[0], runs[3], runs[-1]])


def test_markdown_table_holds_the_same_cells(runs):
    lines = report.markdown_table(runs).splitlines()
    plain = report.table(runs).splitlines()
    assert re.fullmatch(r"\| --- (\| ---: )+\|", lines.pop(1)) and set(plain.pop(1)) == {"-"}
    assert [line.strip("| ").split(" | ") for line in lines] == [cells(line) for line in plain]


def test_a_moved_teacher_is_still_recognised(tmp_path):
    teacher = make_run(tmp_path / "teacher", "pgd_at", accuracy={"clean": 0.9})
    student = make_run(tmp_path / "ard", teacher="elsewhere/teacher", accuracy={"clean": 0.9})
    assert [row["role"] for row in report.summary([student, teacher])] == ["teacher", "student"]


def test_page_is_self_contained_and_repeats_the_table(runs, comparison):
    page = Page(comparison)
    text = comparison.read_text(encoding="utf-8")
    assert page.addresses and all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"<script|@import|url\(|https?:", text)
    plain = report.table(runs).splitlines()
    assert [[cell.strip() for cell in row] for row in page.rows] == [cells(line) for line in plain[:1] + plain[2:]]
    assert "Twenty steps up the loss." in text and "Not evaluated" in text


def test_differences_are_those_of_the_means(comparison):
    text = comparison.read_text(encoding="utf-8")
    row = re.search(r'ard\+igdm − ard</td>(.*?)</tr>', text).group(1)
    assert re.findall(r">([^<]+)<", row) == ["+3.5", "+0.0", "+12.5", "+0.000", "+0.000"]


def test_plots_are_left_beside_the_page(comparison):
    files = {file.name: file for file in (comparison.parent / "evaluation").iterdir()}
    assert set(files) == {"training_curves.png", "robust_accuracy.png", "gallery_ard_0.png", "gallery_ard+igdm_0.png",
                          "gallery_teacher.png"}
    assert all(file.read_bytes().startswith(PNG_SIGNATURE) for file in files.values())


def test_at_most_four_galleries(tmp_path):
    workdirs = [make_run(tmp_path / str(place), f"method{place}", accuracy={"clean": 0.9}) for place in range(6)]
    report.write(workdirs, tmp_path / "report.html")
    assert len(list((tmp_path / "evaluation").glob("gallery_*.png"))) == 4


@pytest.mark.parametrize("channels", [1, 3])
def test_one_run_reports_into_its_own_directory(tmp_path, channels):
    workdir = make_run(tmp_path / "ard", accuracy={"clean": 0.9, "pgd20": 0.4}, channels=channels)
    path = report.write([workdir], workdir / "report.html", title="A & B")
    assert "<h1>A &amp; B</h1>" in path.read_text(encoding="utf-8")
    assert (workdir / "evaluation" / "gallery_ard.png").read_bytes().startswith(PNG_SIGNATURE)


def test_a_run_with_nothing_but_its_config_has_a_page(tmp_path):
    workdir = make_run(tmp_path / "new")
    (workdir / "metrics.jsonl").unlink()
    assert Page(report.write([workdir], tmp_path / "report.html")).rows[1][:3] == ["ard", "100", "-"]


def test_half_a_line_of_metrics_is_passed_over(tmp_path):
    workdir = make_run(tmp_path / "killed")
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 150, "train/lo')
    report.write([workdir], tmp_path / "report.html")


def test_names_are_escaped(tmp_path):
    workdir = make_run(tmp_path / "odd", "<b>$a|*b_", accuracy={"clean": 0.9, "<i>": 0.1})
    text = report.write([workdir], tmp_path / "report.html", title="<i>").read_text(encoding="utf-8")
    assert "<b>" not in text and "<i>" not in text and "&lt;b&gt;$a|*b_" in text
    assert "&lt;b>$a\\|\\*b_" in report.markdown_table([workdir])


def test_best_student_is_marked_and_the_teacher_is_not(comparison):
    text = comparison.read_text(encoding="utf-8")
    marked = re.findall(r'<span class="best">([\d.]+)', text)
    assert marked == ["96.5", "53.5"]  # Not FGSM and the gradients: they are equal.


@pytest.mark.parametrize("damage", [
    lambda run: (run / "evaluation.json").write_text('{"accuracy": {"clean": 0.9'),
    lambda run: (run / "evaluation.json").write_text("[]"),
    lambda run: (run / "evaluation.json").write_text('{"accuracy": {"clean": 93.0}}'),
    lambda run: (run / "evaluation.json").write_text('{"accuracy": {"clean": NaN}}'),
    lambda run: (run / "evaluation.json").write_text('{"accuracy": {"clean": "high"}}'),
    lambda run: (run / "evaluation.json").write_text('{"robustness_curve": {"epsilon": [0, 0.1], "accuracy": [0.9]}}'),
    lambda run: (run / "evaluation.json").write_bytes(b"\xff\xfe\x00"),
    lambda run: (run / "config.json").write_text("{"),
    lambda run: (run / "config.json").unlink(),
    lambda run: (run / "evaluation" / "gallery.npz").write_bytes(b"PK\x03\x04 cut"),
    lambda run: np.savez(run / "evaluation" / "gallery.npz", images=np.zeros((1, 2, 2, 1))),
])
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, damage):
    workdir = make_run(tmp_path / "damaged", accuracy={"clean": 0.9})
    damage(workdir)
    with pytest.raises(InputError, match="damaged") as caught:
        report.write([workdir], tmp_path / "report.html")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "evaluation").exists() and not (tmp_path / "report.html").exists()


def test_missing_directories_are_one_line(tmp_path):
    with pytest.raises(InputError, match="does not exist") as caught:
        report.table([tmp_path / "nowhere"])
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="at least one"):
        report.table([])
    with pytest.raises(InputError, match="is a directory"):
        report.write([make_run(tmp_path / "run")], tmp_path)


@pytest.mark.parametrize("key, name", [("clean", "clean"), ("fgsm", "FGSM"), ("pgd20", "PGD-20"), ("cw30", "CW-30"),
                                       ("apgd_ce", "APGD-CE"), ("autoattack", "AutoAttack"), ("strong", "strong")])
def test_attack_names(key, name):
    assert plots.attack_name(key) == name


def test_a_method_has_one_colour_and_its_rows_differ_in_style():
    teacher, *rows = plots.lines([("t", "pgd_at", True, ()), ("a", "pgd_at", False, ()), ("b", "ard", False, ()),
                                  ("c", "ard", False, ())])
    assert teacher.colour not in {row.colour for row in rows}
    assert rows[1].colour == rows[2].colour != rows[0].colour and rows[1].style != rows[2].style


def test_perturbations_share_the_scale_of_the_threat():
    arrays = {"images": np.zeros((1, 2, 2, 1), np.float32), "adversarial": np.full((1, 2, 2, 1), 0.1, np.float32)}
    assert plots.gallery_scale(arrays, {"norm": "linf", "epsilon": 0.2}) == 0.2
    assert plots.gallery_scale(arrays, {"norm": "l2", "epsilon": 0.5}) == pytest.approx(0.1)
