"""Exported tables have the cells of the page, in the form that Markdown, LaTeX and CSV ask for."""

import csv
import re

import pytest

from jaxrd.evaluation import exports, page, report, tables
from tests.evaluation.test_report import make_run

HEADER = ["method", "AA", "grad"]
BODY = [["ard+igdm [method.igdm=10.0]", "50.0 ± 3.5†", "−0.5"], [r"a_b & 100% $x$ #1 {y} ~ ^ \ <z> |w| *", "-", "1,000‡"]]


def unescaped(latex: str) -> str:
    """Reads LaTeX text as it is printed."""
    named = {r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^", r"\textless{}": "<",
             r"\textgreater{}": ">", r"\textbar{}": "|", "{[}": "[", "{]}": "]", "{*}": "*", r"$\pm$": "±", "$-$": "−",
             r"$^\dagger$": "†", r"$^\ddagger$": "‡", **{f"\\{character}": character for character in "&%$#_{}"}}
    return re.sub("|".join(map(re.escape, sorted(named, key=len, reverse=True))), lambda match: named[match[0]], latex)


def test_latex_prints_what_the_cells_say():
    lines = tables.latex(HEADER, BODY, 1).splitlines()
    assert lines[0] == r"\begin{tabular}{lrr}" and lines[-1] == r"\end{tabular}"
    assert [line for line in lines if line.startswith(r"\toprule") or "rule" in line[:11]] == [
        r"\toprule", r"\midrule", r"\bottomrule"]
    rows = [line.removesuffix(r" \\") for line in lines if line.endswith(r"\\")]
    assert len(rows) == 3
    assert [[unescaped(cell) for cell in re.split(r"(?<!\\) & ", row)] for row in rows] == [HEADER, *BODY]


@pytest.mark.parametrize("text", ["{", "}}{", "100%", "$", "a_b^c", "# & ~", "\\", "x[1]*"])
def test_latex_text_is_balanced_and_leaves_no_special_character(text):
    shown = tables.latex_text(text)
    plain = re.sub(r"\\[&%$#_{}]", "", shown)  # without what is escaped by a backslash
    assert plain.count("{") == plain.count("}") and plain.count("$") % 2 == 0
    assert not re.search(r"[%#&_~]|\^(?!\\)", plain)
    assert unescaped(shown) == text


def test_markdown_has_a_rule_that_aligns_numbers():
    lines = tables.markdown(HEADER, BODY, 1).splitlines()
    assert lines[0] == "| method | AA | grad |" and lines[1] == "| --- | ---: | ---: |"
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 4 for line in lines)


def test_tables_are_found_with_their_headings_and_cells():
    html = page.section("Results & more", page.html_table(["method", "for<br>ward"], [
        [page.key("#fff") + "a &lt; b", f'<span class="best">{page.number("1.0 ± 0.5", "†")}</span>']], 1)
        + "<h3>Part</h3>" + page.html_table(["x"], [["1"]], 0)
        + f"<details><summary>Folded</summary><h3>Inner</h3>{page.html_table(['y'], [['2']], 0)}</details>"
        + page.html_table(["z"], [["3"]], 1)) + page.html_table(["alone"], [["4"]], 0)
    assert exports.tables_of(html) == [
        (("Results & more",), ["method", "for ward"], [["a < b", "1.0 ± 0.5†"]], 1),
        (("Results & more", "Part"), ["x"], [["1"]], 0), (("Results & more", "Folded", "Inner"), ["y"], [["2"]], 0),
        (("Results & more",), ["z"], [["3"]], 1), ((), ["alone"], [["4"]], 0)]
    assert [table.name for table in exports.tables_of(html)] == [
        "results_more", "results_more_part", "results_more_inner", "results_more", "table"]


def test_tables_of_one_name_have_files_of_their_own(tmp_path):
    html = page.section("Results", page.html_table(["x"], [["1"]], 0) + page.html_table(["y"], [["−2"]], 0))
    assert [file.name for file in exports.write(html, tmp_path / "new")] == [
        "results.md", "results.tex", "results.csv", "results_2.md", "results_2.tex", "results_2.csv"]
    assert (tmp_path / "new" / "results_2.csv").read_text() == "y\n-2\n"


def test_a_report_leaves_its_tables_beside_it(tmp_path):
    runs = [make_run(tmp_path / f"{method}{seed}", method, seed, {"clean": 0.9 + 0.01 * seed, "pgd20": 0.4})
            for method in ("ard", "ard+igdm") for seed in range(2)]
    html = report.write(runs, tmp_path / "report.html").read_text(encoding="utf-8")
    folder = tmp_path / "tables"
    found = exports.tables_of(html)
    assert {file.name for file in folder.iterdir()} == {
        f"{table.name}.{ending}" for table in found for ending in ("md", "tex", "csv")}
    header, rule, *body = (folder / "results.md").read_text(encoding="utf-8").splitlines()[2:]
    assert [header, rule, *body] == report.markdown_table(runs).splitlines()
    for table in found:
        with open(folder / f"{table.name}.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        assert rows[0] == table.header and [row[0] for row in rows[1:]] == [row[0] for row in table.body]
        latex = (folder / f"{table.name}.tex").read_text(encoding="utf-8")
        assert latex.count(r"\\" + "\n") == len(table.body) + 1
