"""Reports as readers see them in Chromium: on a phone, a tablet, a desk and paper, light and dark, with a script and without.

Skips where Playwright or a Chromium of the system is not installed; nothing is downloaded.
"""

import json
import re
import shutil

import pytest

from jaxrd.evaluation import page, report
from tests.evaluation.test_report import FLAG, add_cascade, make_run
from tests.evaluation.test_shift import add_other

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install jaxrd[browser]")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")

FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")
SCREENS = [(width, scheme) for width in (390, 768, 1280) for scheme in ("light", "dark")]
PAPER = 688  # pixels of CSS between the margins of A4

# Columns in their order: what a reader expects of a press on the heading, "-" and nothing last.
ORDERED = {
    "thousands": ["0", "12", "999", "1,234", "10,000", "-"],
    "accuracies": ["9.5 ± 0.1", "10.2 ± 3.4†", "80.0", "80.1‡", "-", "-"],
    "differences": ["−12.5", "−0.5 ± 7.0", "+0.0", "+0.4", "+10.0", "-"],
    "seconds": ["2 s", "10 s", "11 s", "100 s", "200 s", "300 s"],
    "measures": ["0.0123", "0.5", "1e3", "2.5e+3", "1e5", "-"],
    "names": ["ard [igdm=2.0]", "ard [igdm=10.0]", "b", "c", "d", "-"],
    "mixed": ["1", "2", "10", "many", "more", "-"]}
SHUFFLED = (4, 1, 5, 0, 3, 2)


def number(text):
    plain = text.rstrip("†‡")
    return page.number(plain, text[len(plain):])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A report with everything in it: long names, flags, classes, corruptions, two environments, a run without results."""
    root = tmp_path_factory.mktemp("browser") / "a_directory_whose_name_is_as_long_as_those_of_clusters_tend_to_be"
    teacher = make_run(root / "teacher", "pgd_at", accuracy={"clean": 0.995, "pgd20": 0.765}, examples=1000)
    runs = [teacher, make_run(root / "not_evaluated", "trades", teacher=teacher)]
    for place, method in enumerate(("ard", "ard+igdm", "a_method_with_quite_a_long_name_of_its_own")):
        for seed in range(3):
            robust = 0.35 + 0.05 * place + 0.01 * seed
            run = make_run(root / f"{method}_seed{seed}", method, seed, {
                "clean": 0.9 + 0.01 * seed, "fgsm": 0.6, "pgd20": robust + 0.1, "cw30": robust + 0.05}, teacher,
                channels=3 if seed else 1)
            add_cascade(run, flags=[FLAG] * (seed == 2), clean=0.9, apgd_ce=robust + 0.02, square=robust)
            add_other(run, {f"cifar10_corrupted/{name}_{severity}": {"clean": 0.8 - 0.01 * severity, "pgd20": 0.3}
                            for name in ("fog", "frost", "contrast") for severity in (1, 3, 5)})
            evaluation = json.loads((run / "evaluation.json").read_text())
            evaluation["alignment"]["gradient_cosine"] = robust
            evaluation["classes"] = {
                "examples": [60] * 10, "accuracy": {"pgd20": [0.1 * place for place in range(9)] + [None]},
                "confusion": {"attack": "pgd20", "true_to_adversarial": [[6] * 10] * 10}}
            (run / "evaluation.json").write_text(json.dumps(evaluation))
            (run / "environment.json").write_text(json.dumps({
                "jax": "0.10.2", "devices": ["cpu"], "git_commit": str(seed % 2) * 40, "xla_flags": None,
                "platform": "Linux-6.18-with-a-platform-string-of-the-usual-length-x86_64-with-glibc2.36"}))
            runs.append(run)
    body = [[ORDERED[name][place] for name in ORDERED] for place in SHUFFLED]
    marked = [[f'<span class="best">{cells[0]}</span>', *map(number, cells[1:])] for cells in body]
    before = [page.section("Sweep", page.html_table(list(ORDERED), marked, 0))]
    return report.write(runs, root / "report.html", before=before)


@pytest.fixture(scope="module")
def browser():
    """Chromium, without a window."""
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, path):
    """Opens the report with the settings of a browser's context; what it asked for or complained of is in `.heard`."""
    contexts = []

    def open_it(width=1280, **settings):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **settings))
        tab = contexts[-1].new_page()
        tab.heard = []
        tab.on("console", lambda message: tab.heard.append(message.text))
        tab.on("pageerror", lambda error: tab.heard.append(str(error)))
        tab.on("request", lambda request: request.url.startswith(("data:", path.as_uri())) or tab.heard.append(request.url))
        tab.goto(path.as_uri())
        tab.evaluate("for (const folded of document.querySelectorAll('details')) folded.open = true")
        return tab

    yield open_it
    for context in contexts:
        context.close()


@pytest.mark.parametrize("width, scheme", SCREENS)
def test_nothing_is_broken_cut_or_fetched(opened, width, scheme):
    tab = opened(width, color_scheme=scheme)
    images = tab.evaluate("Promise.all([...document.images].map("
                          "image => image.decode().then(() => image.naturalWidth, () => 0)))")
    assert len(images) > 6 and min(images) > 0
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    boxes = tab.evaluate("""[...document.querySelectorAll("table")].map(table => {
        const box = table.parentElement, edges = box.getBoundingClientRect();
        return {fits: table.scrollWidth <= box.clientWidth, scrolls: getComputedStyle(box).overflowX === "auto",
                inside: edges.left >= 0 && edges.right <= innerWidth}; })""")
    assert len(boxes) > 10
    assert all(box["inside"] and (box["fits"] or box["scrolls"]) for box in boxes)
    assert not all(box["fits"] for box in boxes)  # else the tables of this report are not wide enough to tell
    for tag in ("p", "h2", "h3", "dd", "dt", "li", "summary", "figcaption", "pre", "img"):
        assert tab.evaluate("tag => [...document.querySelectorAll(tag)].every("
                            "part => part.getBoundingClientRect().right <= innerWidth)", tag), tag
    assert tab.heard == []


def test_dark_pages_are_dark_and_paper_is_white(opened):
    tab = opened(color_scheme="dark")
    read = "['color', 'backgroundColor'].map(name => getComputedStyle(document.body)[name].match(/\\d+/g)[0] * 1)"
    ink, ground = tab.evaluate(read)
    assert ground < 60 < 180 < ink
    tab.emulate_media(media="print")
    ink, ground = tab.evaluate(read)
    assert ink < 60 and ground == 255


def test_columns_sort_as_a_reader_expects(opened):
    tab = opened()
    section = tab.locator("section").first
    rows = "table => [...table.tBodies[0].rows].map(row => row.outerHTML)"
    before = section.locator("table").evaluate(rows)
    for column, (name, expected) in enumerate(ORDERED.items()):
        button = section.get_by_role("button", name=name, exact=True)
        for order, press in (("ascending", button.click), ("descending", lambda: button.press("Enter"))):
            press()
            known = [value for value in expected if value != "-"]
            wanted = (known if order == "ascending" else known[::-1]) + ["-"] * (len(expected) - len(known))
            assert section.locator(f"tbody td:nth-child({column + 1})").all_inner_texts() == wanted, (name, order)
            assert section.locator("th").evaluate_all("all => all.map(th => th.ariaSort).filter(Boolean)") == [order]
    # Rows moved as wholes, with their marks and colours.
    assert sorted(section.locator("table").evaluate(rows)) == sorted(before) and 'class="mark"' in "".join(before)


def test_rows_that_are_alike_keep_their_order(opened):
    tab = opened()
    table = tab.locator("section", has=tab.get_by_role("heading", name="Results", exact=True)).locator("table").first
    names = "table => [...table.tBodies[0].rows].map(row => row.cells[0].textContent)"
    table.get_by_role("button", name="method").click()
    by_name = table.evaluate(names)
    assert by_name == sorted(by_name)
    button = table.get_by_role("button", name="FGSM")  # 60.0 ± 0.0 for all that have it
    for _ in range(2):
        button.click()
        absent = {"pgd_at (teacher)", "trades"}
        assert table.evaluate(names) == [name for name in by_name if name not in absent] + sorted(absent)


def test_every_heading_of_every_table_sorts(opened):
    tab = opened()
    wrong, pressed = tab.evaluate("""() => {
        const wrong = [];
        let pressed = 0;
        for (const table of document.querySelectorAll("table"))
            for (const heading of table.tHead.rows[0].cells) {
                const button = heading.querySelector("button"), rows = () => [...table.tBodies[0].rows];
                if (rows().length < 2) { if (button) wrong.push("useless: " + heading.textContent); continue; }
                if (!button || !button.textContent.trim()) { wrong.push("no button: " + heading.textContent); continue; }
                const all = new Set(rows());
                for (const order of ["ascending", "descending"]) {
                    button.click();
                    pressed += 1;
                    const found = rows().map(row => row.cells[heading.cellIndex].textContent.trim());
                    const last = found.findLastIndex(text => text !== "-" && text !== "");
                    if (heading.ariaSort !== order || rows().length !== all.size || !rows().every(row => all.has(row))
                        || found.slice(0, last + 1).some(text => text === "-" || text === "")) wrong.push(heading.textContent);
                }
            }
        return [wrong, pressed]; }""")
    assert wrong == [] and pressed > 100 and tab.heard == []


def test_the_page_reads_the_same_without_a_script(opened):
    plain = opened(java_script_enabled=False)
    assert plain.locator("th button").count() == 0
    assert plain.inner_text("main") == opened().inner_text("main")


def test_paper_shows_all_of_it(opened):
    tab = opened(PAPER, color_scheme="dark")
    tab.evaluate("for (const folded of document.querySelectorAll('details')) folded.open = false")
    tab.emulate_media(media="print")
    cut = tab.evaluate("""[...document.querySelectorAll("td, th, p, pre, dd, li, img")].filter(part => {
        const edges = part.getBoundingClientRect();
        return edges.right > innerWidth + 0.5 || edges.left < -0.5 || !edges.height || part.scrollWidth > part.clientWidth + 1
            && getComputedStyle(part).display !== "inline";
        }).map(part => part.tagName + " " + part.textContent.slice(0, 60))""")
    assert cut == []
    whole = "selector => [...document.querySelectorAll(selector)].every(part => getComputedStyle(part).breakInside === 'avoid')"
    assert all(tab.evaluate(whole, selector) for selector in ("figure", "tr", ".flags"))
    assert tab.locator("th button").first.evaluate("button => getComputedStyle(button).display") == "contents"
    pdf = tab.pdf(format="A4")
    assert pdf.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", pdf)) > 3
