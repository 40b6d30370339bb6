"""The HTML of a report: its frame, and the parts that every section is made of."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from jaxrd.evaluation import figures, style


def document(title: str, statement: str, sections: Sequence[str], footer: str) -> str:
    """Returns the whole page.

    Args:
      title: heading, as plain text.
      statement: HTML of the paragraph below it.
      sections: HTML, from `section`.
      footer: plain text.
    """
    return _PAGE.format(title=escape(title), style=style.CSS, script=style.SCRIPT, statement=statement, footer=escape(footer),
                        sections="\n".join(sections))


def section(heading: str, content: str) -> str:
    """Returns a section with its heading (plain text), or nothing where its content (HTML) is empty."""
    return f"<section><h2>{escape(heading)}</h2>{content}</section>" if content else ""


def html_table(header: Sequence[str], body: Sequence[Sequence[str]], text_columns: int) -> str:
    """Returns a table in a box that scrolls; a press on a heading sorts its rows.

    Columns of numbers sort by these: 1,234, 93.0 ± 2.0†, −0.5; others by their text. "-" stands last.

    Args:
      header: HTML of each heading.
      body: HTML of the cells of each row.
      text_columns: how many of the columns, the first ones, are left-aligned text.
    """
    side = ["text" if place < text_columns else "number" for place in range(len(header))]
    head = "".join(f'<th class="{kind}">{cell}</th>' for kind, cell in zip(side, header))
    rows = "\n".join("<tr>" + "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in zip(side, cells)) + "</tr>"
                     for cells in body)
    width = ' class="wider"' if len(header) > 14 else ' class="wide"' if len(header) > 8 else ""  # on paper
    return f'<div class="scroll"><table{width}><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'


def number(text: str, mark: str = "") -> str:
    """Returns the HTML of a cell: its standard deviation, if it has one, in small print, and a dagger behind it."""
    mean, plus_minus, sd = escape(text).partition(" ± ")
    return (mean + (f' <span class="sd">± {sd}</span>' if plus_minus else "")
            + (f'<sup class="mark">{escape(mark)}</sup>' if mark else ""))


def key(colour: str) -> str:
    """Returns the HTML of the small square that says which colour a row has in plots."""
    return f'<span class="key" style="background:{colour}"></span>'


def figure(path: Path, wide: Figure, narrow: Figure, alternative: str, note: str) -> str:
    """Saves the wide figure at `path` and returns the HTML that shows it, or the narrow one on a phone."""
    image = figures.png(wide)
    path.write_bytes(image)
    width = min(wide.get_figwidth() / 10, 1)
    return (f'<figure><picture><source media="(max-width: 640px)" srcset="{figures.data_uri(figures.png(narrow))}">'
            f'<img src="{figures.data_uri(image)}" alt="{escape(alternative)}" style="max-width:{width:.0%}"></picture>'
            f"<figcaption>{escape(note)}</figcaption></figure>")


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'">
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
<script>{script}</script>
</body>
</html>
"""
