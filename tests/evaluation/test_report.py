"""Reports say what the run directories say: the same numbers, nothing else, and one line where a file is damaged."""

import json
import re
import statistics
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from jaxrd.errors import InputError
from jaxrd.evaluation import page, plots, report
from jaxrd.evaluation.names import attack_name
from jaxrd.evaluation.runs import read_runs

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


def add_cascade(workdir, name="autoattack", flags=(), seconds=40.0, **stages) -> Path:
    """Adds a cascade to a fabricated evaluation of 600 images: 5,000 forward and 2,000 backward passes per attack."""
    stages = {stage.replace("_", "-"): accuracy for stage, accuracy in stages.items()}
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    evaluation["accuracy"][name] = list(stages.values())[-1]
    evaluation["attacks"][name] = {"version": "standard", "description": f"The worst case over {len(stages) - 1} attacks."}
    evaluation.setdefault("cascades", {})[name] = {
        "stages": stages, "rescored_accuracy": list(stages.values())[-1], "flags": list(flags),
        "passes": {stage: [600, 0] if stage == "clean" else [5000, 2000] for stage in stages},
        "zero_gradients": {"apgd-ce": 0}, "seconds": {stage: seconds / len(stages) for stage in stages},
        "file": "evaluation/result.npz"}
    (workdir / "evaluation.json").write_text(json.dumps(evaluation))
    return workdir


FLAG = "square: without gradients, Square breaks 3% <more> than all attacks before it"
STAGES = {"ard_0": (0.93, 0.44, 0.42, 0.41, 0.40), "ard_1": (0.91, 0.42, 0.40, 0.38, 0.36),
          "igdm_0": (0.96, 0.56, 0.53, 0.52, 0.50)}


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """Two seeds of one method and one of another under AutoAttack, a flag on the second, and a run without it."""
    tmp_path = tmp_path_factory.mktemp("attacked")
    workdirs = []
    for name, accuracies in STAGES.items():
        method, seed = "ard+igdm" if "igdm" in name else "ard", int(name[-1])
        workdir = make_run(tmp_path / name, method, seed, {"clean": accuracies[0], "pgd20": accuracies[1] + 0.02})
        stages = dict(zip(("clean", "apgd_ce", "apgd_t", "fab_t", "square"), accuracies))
        workdirs.append(add_cascade(workdir, flags=[FLAG] * (name == "ard_1"), seconds=40.0 + 10 * seed, **stages))
    return [*workdirs, make_run(tmp_path / "rslad", "rslad", 0, {"clean": 0.9, "pgd20": 0.3})]


@pytest.fixture(scope="module")
def attacked_page(attacked, tmp_path_factory):
    """The text of the report of all of them."""
    return report.write(attacked, tmp_path_factory.mktemp("reports") / "report.html").read_text(encoding="utf-8")


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


def table_of(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table in the section of a page."""
    section = re.search(f"<h2>{re.escape(heading)}</h2>(.*?)</section>", page, re.DOTALL).group(1)
    rows = re.findall("<tr>(.*?)</tr>", section.partition("</table>")[0], re.DOTALL)
    return [[re.sub("<.*?>", "", cell.replace("<br>", " ")) for cell in re.findall("<t[hd] .*?>(.*?)</t[hd]>", row)]
            for row in rows]


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


@pytest.mark.parametrize("same", [True, False])
def test_teachers_that_were_imported_are_told_apart_by_their_files(tmp_path, same):
    teachers = [make_run(tmp_path / f"teacher{seed}", "pgd_at", 0, {"clean": 0.9}) for seed in range(2)]
    for seed, teacher in enumerate(teachers):
        digest = "0" if same else str(seed)
        (teacher / "import.json").write_text(json.dumps({"name": "dm_wrn28_10", "file": {"name": "x.pt", "sha256": digest}}))
    assert seeds_of_groups(
        tmp_path, lambda seed, config, _: config.update(teacher=str(teachers[seed]))) == ([2] if same else [1, 1])


def test_imported_weights_go_by_their_name_and_nobody_knows_what_they_were_trained_on(tmp_path):
    run = make_run(tmp_path / "bdm", "pgd_at")
    (run / "import.json").write_text(json.dumps({"name": "cifar10/Linf/Wang2023", "file": {"name": "x.pt"}}))
    (row,) = report.summary([run])
    assert row["method"] == "cifar10/Linf/Wang2023" and row["config"]["imported.file.name"] == "x.pt"
    evaluated = make_run(tmp_path / "evaluated", "pgd_at", accuracy={"clean": 0.9})
    evaluation = json.loads((evaluated / "evaluation.json").read_text())
    evaluation["data"]["train_examples"] = None
    (evaluated / "evaluation.json").write_text(json.dumps(evaluation))
    assert report.summary([evaluated])[0]["train_examples"] == "-" and "| - |" in report.markdown_table([evaluated])
    student = make_run(tmp_path / "ard", teacher=evaluated, accuracy={"clean": 0.8})
    page = report.write([evaluated, student], tmp_path / "report.html").read_text()
    assert "was imported; the students were trained on 100 images" in page


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


def test_attacks_stand_in_one_order_whatever_that_of_the_files(tmp_path):
    names = ["zoo", "autoattack_plus", "strong", "cw30", "autoattack", "fast", "pgd100", "apgd_t", "pgd50", "pgd7", "pgd20",
             "mim", "fgsm", "clean"]
    workdirs = [make_run(tmp_path / "a", "ard", 0, dict.fromkeys(names, 0.5)),
                make_run(tmp_path / "b", "rslad", 0, dict.fromkeys(names[::-2], 0.5))]
    assert cells(report.table(workdirs).splitlines()[0])[2:] == [
        "clean", "FGSM", "MI-FGSM", "PGD-7", "PGD-20", "PGD-50", "PGD-100", "CW-30", "strong", "APGD-CE+T", "AutoAttack",
        "AutoAttack+", "APGD-T", "zoo"]


def test_runs_without_an_evaluation_leave_the_usual_columns_empty(tmp_path):
    header, _, row = report.table([make_run(tmp_path / "run")]).splitlines()
    assert cells(header)[2:] == ["clean", "FGSM", "PGD-20", "CW-30", "AutoAttack"]
    assert cells(row)[2:] == ["-"] * 5


def test_stages_of_a_cascade_are_means_over_seeds(attacked_page):
    header, ard, igdm = table_of(attacked_page, "AutoAttack, stage by stage")
    assert header == ["method", "seeds", "clean", "after APGD-CE", "after APGD-T", "after FAB-T", "after Square", "seconds",
                      "forwards per robust image", "backwards per robust image"]
    pairs = [[100 * value for value in pair] for pair in zip(STAGES["ard_0"], STAGES["ard_1"])]
    expected = [f"{statistics.mean(pair):.1f} ± {statistics.stdev(pair):.1f}" for pair in pairs]
    # 20,600 forward and 8,000 backward passes; 240 and 216 images are robust.
    assert ard == ["ard", "2", *expected[:4], expected[4] + "†", "45", "91", "35"]
    assert igdm == ["ard+igdm", "1", "96.0", "56.0", "53.0", "52.0", "50.0", "40", "69", "27"]


def test_stages_need_neither_costs_nor_a_robust_image(tmp_path):
    workdir = add_cascade(make_run(tmp_path / "run", accuracy={"clean": 0.9}), clean=0.9, apgd_ce=0.0)
    free = add_cascade(make_run(tmp_path / "free", "rslad", accuracy={"clean": 0.9}), clean=0.9, apgd_ce=0.25)
    evaluation = json.loads((free / "evaluation.json").read_text())
    evaluation["cascades"]["autoattack"] = {"stages": evaluation["cascades"]["autoattack"]["stages"]}
    (free / "evaluation.json").write_text(json.dumps(evaluation))
    page = report.write([workdir, free], tmp_path / "report.html").read_text(encoding="utf-8")
    assert table_of(page, "AutoAttack, stage by stage") == [
        ["method", "clean", "after APGD-CE", "seconds"], ["ard", "90.0", "0.0", "40"], ["rslad", "90.0", "25.0", "-"]]


def test_two_attacks_of_autoattack_are_not_called_autoattack(tmp_path):
    workdir = add_cascade(make_run(tmp_path / "run", accuracy={"clean": 0.9}), "fast", clean=0.9, apgd_ce=0.5, apgd_t=0.45)
    page = report.write([workdir], tmp_path / "report.html").read_text(encoding="utf-8")
    assert table_of(page, "APGD-CE+T, stage by stage")[1][:4] == ["ard", "90.0", "50.0", "45.0"]
    assert "AutoAttack" not in page + report.table([workdir]) + report.markdown_table([workdir])


def test_a_flag_marks_its_number_and_names_its_run(attacked, attacked_page):
    marked = "38.0 ± 2.8†"
    header, rule, ard, igdm, rslad, note = report.table(attacked).splitlines()
    assert cells(ard)[-1] == marked and sum(line.count("†") for line in (header, rule, igdm, rslad)) == 0
    assert note == f"† {attacked[1]}, AutoAttack: {FLAG}"
    assert len(igdm) == len(ard) - len("†")  # The dagger hangs: digits stand below digits.
    *lines, empty, note = report.markdown_table(attacked).splitlines()
    assert lines[2].endswith(f"| {marked} |") and empty == "" and note.endswith("3% &lt;more> than all attacks before it")
    assert [row[-1] for row in table_of(attacked_page, "Settings")[1:3]] == ["40.0", "36.0†"]
    results = table_of(attacked_page, "Results")
    assert [row[-1] for row in results] == ["AutoAttack", marked, "50.0", "-"]
    box = re.search('<div class="flags".*?</div>', attacked_page).group(0)
    assert re.findall("<li><b>(.*?)</b>: (.*?)</li>", box) == [(f"{attacked[1]}, AutoAttack", escape(FLAG))]


def test_one_flag_on_two_cascades_is_listed_once(tmp_path):
    workdir = make_run(tmp_path / "run", accuracy={"clean": 0.9})
    add_cascade(workdir, flags=["probabilities: as after a softmax", "square: ahead"], clean=0.9, square=0.5)
    add_cascade(workdir, "fast", flags=["probabilities: as after a softmax"], clean=0.9, apgd_ce=0.6)
    lines = report.table([workdir]).splitlines()
    assert cells(lines[2])[-2:] == ["60.0†", "50.0†"]
    assert lines[3:] == [f"† {workdir}, APGD-CE+T and AutoAttack: probabilities: as after a softmax",
                         f"† {workdir}, AutoAttack: square: ahead"]


def test_evaluations_without_cascades_say_nothing_of_them(runs, comparison):
    text = comparison.read_text(encoding="utf-8")
    for absent in ("†", "stage by stage", "AutoAttack", "Stars", 'class="flags"'):
        assert absent not in text + report.table(runs) + report.markdown_table(runs)


def test_a_moved_teacher_is_still_recognised(tmp_path):
    teacher = make_run(tmp_path / "teacher", "pgd_at", accuracy={"clean": 0.9})
    student = make_run(tmp_path / "ard", teacher="elsewhere/teacher", accuracy={"clean": 0.9})
    assert [row["role"] for row in report.summary([student, teacher])] == ["teacher", "student"]


def test_page_is_self_contained_and_repeats_the_table(runs, comparison):
    page = Page(comparison)
    text = comparison.read_text(encoding="utf-8")
    assert page.addresses and all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"<script [^>]|@import|url\(|https?:|<link|fetch\(|import\(", text)
    assert "default-src 'none'" in text  # A browser would refuse what this test overlooks.
    plain = report.table(runs).splitlines()
    assert [[cell.strip() for cell in row] for row in page.rows] == [cells(line) for line in plain[:1] + plain[2:]]
    assert "Twenty steps up the loss." in text and "Not evaluated" in text


def test_differences_are_paired_by_seed(comparison):
    changes = comparison.read_text(encoding="utf-8").partition("What the added module changes")[2]
    row = re.search(r'ard\+igdm − ard</td>(.*?)</tr>', changes).group(1)
    # Seeds 0 and 1: 97 - 93 and 96 - 91; 52 - 40 and 55 - 38. The third seed of ard has no partner.
    assert [re.sub("<.*?>", "", cell) for cell in re.findall("<td.*?>(.*?)</td>", row)] == [
        "2", "+4.5 ± 0.7", "+0.0 ± 0.0", "+14.5 ± 3.5", "+0.000 ± 0.000", "+0.000 ± 0.000"]


def test_plots_are_left_beside_the_page(comparison):
    files = {file.name: file for file in (comparison.parent / "evaluation").iterdir()}
    assert set(files) == {"training_curves.png", "robust_accuracy.png", "seeds.png", "correlation.png",
                          "gallery_ard_0.png", "gallery_ard+igdm_0.png", "gallery_teacher.png"}
    assert all(file.read_bytes().startswith(PNG_SIGNATURE) for file in files.values())


def test_at_most_four_galleries(tmp_path):
    workdirs = [make_run(tmp_path / str(place), f"method{place}", accuracy={"clean": 0.9}) for place in range(6)]
    report.write(workdirs, tmp_path / "report.html")
    assert len(list((tmp_path / "evaluation").glob("gallery_*.png"))) == 4


def test_sections_of_a_caller_stand_before_the_results(tmp_path):
    workdir = make_run(tmp_path / "ard", accuracy={"clean": 0.9})
    before = [page.section(heading, "<p>plan</p>") for heading in ("Sweep & plan", "Differences")]
    text = report.write([workdir], tmp_path / "report.html", before=before).read_text(encoding="utf-8")
    assert re.findall("<h2>(.*?)</h2>", text)[:3] == ["Sweep &amp; plan", "Differences", "Results"]


@pytest.mark.parametrize("channels", [1, 3])
def test_one_run_reports_into_its_own_directory(tmp_path, channels):
    workdir = make_run(tmp_path / "ard", accuracy={"clean": 0.9, "pgd20": 0.4}, channels=channels)
    path = report.write([workdir], workdir / "report.html", title="A & B")
    assert "<h1>A &amp; B</h1>" in path.read_text(encoding="utf-8")
    assert (workdir / "evaluation" / "gallery_ard.png").read_bytes().startswith(PNG_SIGNATURE)


def test_a_report_without_results_is_refused_with_the_command_that_makes_them(tmp_path):
    workdirs = [make_run(tmp_path / name) for name in "ab"]
    command = f"python -m launch.evaluate --workdir={workdirs[0]},{workdirs[1]}"
    with pytest.raises(InputError, match=f"no results; run {command} first"):
        report.write(workdirs, tmp_path / "report.html")
    assert not (tmp_path / "evaluation").exists()
    # Beside results it is listed, and so it is where a caller has something else to say.
    evaluated = make_run(tmp_path / "c", accuracy={"clean": 0.9})
    assert f"Not evaluated: {workdirs[0]}" in report.write([workdirs[0], evaluated], tmp_path / "report.html").read_text()
    assert report.write(workdirs, tmp_path / "failed.html", before=[page.section("Sweep", "All failed.")]).is_file()


def test_a_run_that_was_only_evaluated_has_a_page(tmp_path):
    workdir = make_run(tmp_path / "new", accuracy={"clean": 0.9})
    (workdir / "metrics.jsonl").unlink()
    assert Page(report.write([workdir], tmp_path / "report.html")).rows[1][:2] == ["ard", "100"]


def test_directories_that_are_no_runs_say_what_would_be(tmp_path):
    sweep = tmp_path / "sweep"
    for name in ("a-seed0", "b-seed0"):
        make_run(sweep / name, accuracy={"clean": 0.9})
    with pytest.raises(InputError, match=r'sweep" is no run directory but holds 2, such as .*a-seed0; give these'):
        report.table([sweep])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match='empty" holds no config.json; give a run directory'):
        report.table([tmp_path / "empty"])


def test_half_a_line_of_metrics_is_passed_over(tmp_path):
    workdir = make_run(tmp_path / "killed", accuracy={"clean": 0.9})
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
    lambda run: (run / "evaluation.json").write_text('{"cascades": ["autoattack"]}'),
    lambda run: (run / "evaluation.json").write_text('{"cascades": {"autoattack": 0.4}}'),
    *(lambda run, part=part: (run / "evaluation.json").write_text(
        '{"cascades": {"autoattack": {"stages": {"clean": 0.9}, %s}}}' % part) for part in (
            '"stages": {}', '"stages": [0.9]', '"stages": {"clean": 93}', '"stages": {"clean": NaN}',
            '"stages": {"clean": true}', '"stages": null', '"flags": "square: ahead"', '"flags": [1]', '"flags": null',
            '"passes": [600, 0]', '"passes": {"clean": 600}', '"passes": {"clean": [600]}', '"passes": {"clean": [600, -1]}',
            '"passes": {"clean": [600, Infinity]}', '"seconds": 3', '"seconds": {"clean": "long"}',
            '"seconds": {"clean": -1}')),
    lambda run: (run / "config.json").write_text("{"),
    lambda run: (run / "config.json").unlink(),
    lambda run: (run / "environment.json").write_text("{"),
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
        report.write([make_run(tmp_path / "run", accuracy={"clean": 0.9})], tmp_path)


@pytest.mark.parametrize("key, name", [("clean", "clean"), ("fgsm", "FGSM"), ("pgd20", "PGD-20"), ("cw30", "CW-30"),
                                       ("apgd_ce", "APGD-CE"), ("autoattack", "AutoAttack"), ("strong", "strong"),
                                       ("mim", "MI-FGSM"), ("fast", "APGD-CE+T"), ("autoattack_plus", "AutoAttack+"),
                                       ("fab_t", "FAB-T"), ("apgd_dlr", "APGD-DLR"), ("square", "Square")])
def test_attack_names(key, name):
    assert attack_name(key) == name


def curves_of(workdirs) -> list[plots.Line]:
    groups = report.aggregate(report.summary(workdirs))
    runs = {str(run.workdir): run for run in read_runs(workdirs)}
    return plots.lines([(group["label"], group["method"], False, tuple(runs[workdir] for workdir in group["workdirs"]))
                        for group in groups])


def stars_of(axis) -> dict[str, tuple[float, float]]:
    """The colour of each star in a panel -> where it stands."""
    return {line.get_color(): (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
            for line in axis.lines if line.get_marker() == "*"}


@pytest.mark.parametrize("narrow", [False, True])
def test_stars_stand_at_the_mean_under_autoattack(attacked, narrow):
    ard, igdm, rslad = rows = curves_of(attacked)
    figure = plots.robust_accuracy(rows, narrow)
    axis, = figure.axes
    assert axis.get_title(loc="left") == "Accuracy under PGD-20, %"
    assert stars_of(axis) == {ard.colour: (0.2, pytest.approx(38.0)), igdm.colour: (0.2, pytest.approx(50.0))}
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["ard", "ard+igdm", "rslad", "AutoAttack"]


def test_one_row_with_a_star_has_a_legend_for_it(attacked, tmp_path):
    figure = plots.robust_accuracy(curves_of(attacked[2:3]))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["AutoAttack"]
    assert not plots.robust_accuracy(curves_of(attacked[3:])).legends


def test_a_curve_of_autoattack_needs_no_star(tmp_path):
    workdir = add_cascade(make_run(tmp_path / "run", accuracy={"clean": 0.9}), clean=0.9, square=0.4)
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    evaluation["robustness_curve"]["attack"] = "autoattack"
    (workdir / "evaluation.json").write_text(json.dumps(evaluation))
    figure = plots.robust_accuracy(curves_of([workdir]))
    assert figure.axes[0].get_title(loc="left") == "Accuracy under AutoAttack, %"
    assert stars_of(figure.axes[0]) == {} and not figure.legends


def test_a_method_has_one_colour_and_its_rows_differ_in_style():
    teacher, *rows = plots.lines([("t", "pgd_at", True, ()), ("a", "pgd_at", False, ()), ("b", "ard", False, ()),
                                  ("c", "ard", False, ())])
    assert teacher.colour not in {row.colour for row in rows}
    assert rows[1].colour == rows[2].colour != rows[0].colour and rows[1].style != rows[2].style


def test_perturbations_share_the_scale_of_the_threat():
    arrays = {"images": np.zeros((1, 2, 2, 1), np.float32), "adversarial": np.full((1, 2, 2, 1), 0.1, np.float32)}
    assert plots.gallery_scale(arrays, {"norm": "linf", "epsilon": 0.2}) == 0.2
    assert plots.gallery_scale(arrays, {"norm": "l2", "epsilon": 0.5}) == pytest.approx(0.1)
