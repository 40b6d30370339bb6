"""The HTML of a report: its frame with the style sheet, and the parts that every section is made of."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from jaxrd.evaluation import plots


def document(title: str, statement: str, sections: Sequence[str], footer: str) -> str:
    """Returns the whole page.

    Args:
      title: heading, as plain text.
      statement: HTML of the paragraph below it.
      sections: HTML, from `section`.
      footer: plain text.
    """
    return _PAGE.format(title=escape(title), style=_CSS, statement=statement, footer=escape(footer),
                        sections="\n".join(sections))


def section(heading: str, content: str) -> str:
    """Returns a section with its heading (plain text), or nothing where its content (HTML) is empty."""
    return f"<section><h2>{escape(heading)}</h2>{content}</section>" if content else ""


def html_table(header: Sequence[str], body: Sequence[Sequence[str]], text_columns: int) -> str:
    """Returns a table in a box that scrolls; cells are HTML, the first `text_columns` left-aligned."""
    side = ["text" if place < text_columns else "number" for place in range(len(header))]
    head = "".join(f'<th class="{kind}">{cell}</th>' for kind, cell in zip(side, header))
    rows = "\n".join("<tr>" + "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in zip(side, cells)) + "</tr>"
                     for cells in body)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'


def number(text: str, mark: str = "") -> str:
    """Returns the HTML of a cell: its standard deviation, if it has one, in small print, and a dagger behind it."""
    mean, plus_minus, sd = escape(text).partition(" ± ")
    return (mean + (f' <span class="sd">± {sd}</span>' if plus_minus else "")
            + (f'<sup class="mark">{escape(mark)}</sup>' if mark else ""))


def figure(path: Path, wide: Figure, narrow: Figure, alternative: str, note: str) -> str:
    """Saves the wide figure at `path` and returns the HTML that shows it, or the narrow one on a phone."""
    image = plots.png(wide)
    path.write_bytes(image)
    width = min(wide.get_figwidth() / 10, 1)
    return (f'<figure><picture><source media="(max-width: 640px)" srcset="{plots.data_uri(plots.png(narrow))}">'
            f'<img src="{plots.data_uri(image)}" alt="{escape(alternative)}" style="max-width:{width:.0%}"></picture>'
            f"<figcaption>{escape(note)}</figcaption></figure>")


_CSS = """
:root { color-scheme: light dark;
  --page: #fafaf8; --card: #fff; --ink: #1f2429; --soft: #626b74; --line: #e2e5e8; --best: #e8f1f8;
  --flag: #a83412; --flagged: #fdf1ea; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15181b; --card: #1c2024; --ink: #e4e7ea; --soft: #9aa4ad; --line: #32383e; --best: #20384a;
    --flag: #ff9d75; --flagged: #33221b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 -apple-system, "Segoe UI", Inter, Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 56px 28px 72px; }
h1 { font-size: 2rem; line-height: 1.2; font-weight: 650; letter-spacing: -0.015em; margin: 0 0 14px; }
h1, p, dd, figcaption { overflow-wrap: anywhere; }
h2 { font-size: 1.22rem; font-weight: 650; letter-spacing: -0.005em; margin: 52px 0 14px; }
h3 { font-size: 1rem; font-weight: 650; margin: 28px 0 10px; }
p.lead { max-width: 46em; margin: 0; font-size: 1.06rem; }
p.note, figcaption { color: var(--soft); font-size: 0.875rem; max-width: 56em; margin: 10px 0 0; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; font-size: 0.9em; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 0.9375rem; font-variant-numeric: tabular-nums; }
th, td { padding: 9px 12px; white-space: nowrap; text-align: right; }
th.text, td.text { text-align: left; }
th { vertical-align: bottom; font-weight: 500; font-size: 0.8125rem; color: var(--soft); border-bottom: 1px solid var(--line); }
tbody tr + tr td { border-top: 1px solid var(--line); }
abbr { text-decoration: underline dotted var(--line); text-underline-offset: 4px; cursor: help; }
.sd { color: var(--soft); font-weight: 400; font-size: 0.875em; }
.wrap { display: inline-block; white-space: normal; overflow-wrap: break-word; min-width: 8em; }
.best { background: var(--best); font-weight: 650; border-radius: 4px; padding: 3px 5px; margin: 0 -5px; }
.mark { color: var(--flag); font-weight: 650; line-height: 0; width: 0; display: inline-block;
  position: relative; left: 1px; }
.best .mark { left: 5px; }
.flags { background: var(--flagged); border: 1px solid var(--line); border-left: 4px solid var(--flag); border-radius: 8px;
  padding: 12px 16px; margin: 14px 0 0; font-size: 0.9375rem; }
.flags p { margin: 0; font-weight: 650; }
.flags ul { margin: 6px 0 0; padding-left: 1.2em; overflow-wrap: anywhere; }
.flags li + li { margin-top: 4px; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 9px; }
figure { margin: 0 0 28px; }
picture { display: block; background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 14px; }
img { display: block; width: 100%; height: auto; margin: 0 auto; }
dl { margin: 0; max-width: 56em; }
dt { font-weight: 600; margin-top: 14px; }
dd { margin: 2px 0 0; }
.settings { display: block; color: var(--soft); font-size: 0.875rem; }
details { border-top: 1px solid var(--line); padding: 12px 0; }
summary { cursor: pointer; font-weight: 600; }
details > :not(summary) { margin-top: 12px; }
details table { font-size: 0.8125rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; overflow: auto; }
footer { margin-top: 44px; color: var(--soft); font-size: 0.8125rem; }
@media (max-width: 640px) {
  main { padding: 30px 16px 48px; } h1 { font-size: 1.5rem; } p.lead { font-size: 1rem; } h2 { margin-top: 40px; }
  th, td { padding: 8px 11px; } picture { padding: 8px; } img { max-width: 100% !important; } }
@media print { .scroll { overflow: visible; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header>
<h1>{title}</h1>
<p class="lead">{statement}</p>
</header>
{sections}
<footer>{footer}</footer>
</main>
</body>
</html>
"""
