"""The tables of a report as files for papers and scripts: Markdown, LaTeX and CSV, with the cells that the page shows."""

import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from jaxrd.evaluation import tables


class Table(NamedTuple):
    """A table of a page.

    Attributes:
      title: headings above it, from the section's down.
      header: of its columns.
      body: its rows, cells as plain text.
      text_columns: how many of the columns, the first ones, hold text and not numbers.
    """

    title: tuple[str, ...]
    header: list[str]
    body: list[list[str]]
    text_columns: int

    @property
    def name(self) -> str:
        """Of its files: "AutoAttack, stage by stage" as "autoattack_stage_by_stage"; a part's follows its section's."""
        title = " ".join(dict.fromkeys(self.title[:1] + self.title[-1:]))
        return re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_") or "table"


def write(html: str, folder: Path) -> list[Path]:
    """Writes every table of a page as NAME.md, NAME.tex and NAME.csv, named after the headings above it.

    Args:
      html: the page.
      folder: where to; made if need be.

    Returns:
      The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written, used = [], {}
    for table in tables_of(html):
        used[table.name] = used.get(table.name, 0) + 1
        name = table.name + (f"_{used[table.name]}" if used[table.name] > 1 else "")
        title = ": ".join(table.title)
        parts = table.header, table.body, table.text_columns
        for ending, text in (("md", f"**{title.translate(tables.MARKDOWN)}**\n\n{tables.markdown(*parts)}\n"),
                             ("tex", f"% {title}. Needs \\usepackage{{booktabs}}.\n{tables.latex(*parts)}\n"),
                             ("csv", _csv(table))):
            written.append(folder / f"{name}.{ending}")
            written[-1].write_text(text, encoding="utf-8", newline="\n")
    return written


def tables_of(html: str) -> list[Table]:
    """Returns the tables of a page, or of a part of one, in its order."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    return reader.tables


def _csv(table):
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(table.header)
    # A minus sign as programs read it.
    writer.writerows([cell.replace("−", "-") if place >= table.text_columns else cell for place, cell in enumerate(cells)]
                     for cells in table.body)
    return buffer.getvalue()


class _Reader(HTMLParser):
    """Collects tables, and the headings that stand above them."""

    _HEADINGS = ("h2", "h3", "summary")

    def __init__(self):
        super().__init__()
        self.tables, self._titles, self._text = [], {}, None

    def handle_starttag(self, tag, attributes):
        if tag == "table":
            self.tables.append(Table(tuple(self._titles.values()), [], [], 0))
        elif tag == "tr" and self.tables[-1].header:
            self.tables[-1].body.append([])
        elif tag in ("th", "td", *self._HEADINGS):
            self._text = ""
            if tag == "th" and ("class", "text") in attributes:
                self.tables[-1] = self.tables[-1]._replace(text_columns=self.tables[-1].text_columns + 1)
        elif tag == "br":
            self.handle_data(" ")

    def handle_data(self, data):
        if self._text is not None:
            self._text += data

    def handle_endtag(self, tag):
        if tag == "section":
            self._titles = {}
        if tag == "details":
            self._titles = {level: title for level, title in self._titles.items() if level == "h2"}
        if tag not in ("th", "td", *self._HEADINGS):
            return
        text, self._text = " ".join((self._text or "").split()), None
        if tag == "th":
            self.tables[-1].header.append(text)
        elif tag == "td":
            self.tables[-1].body[-1].append(text)
        else:  # a heading ends what stood below those of its own level
            above = {"h2": (), "summary": ("h2",), "h3": ("h2", "summary")}[tag]
            self._titles = {level: title for level, title in self._titles.items() if level in above} | {tag: text}
