"""Distribution shift in a report: accuracy on other data, beside that on a run's own test images, and over corruptions."""

import math
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from jaxrd.evaluation import corruptions, page, tables
from jaxrd.evaluation.names import attack_name, attack_order, epsilon_text, norm_name
from jaxrd.evaluation.record import OTHER_DATA
from jaxrd.evaluation.runs import Run, aggregate, chosen_on_test, count_text, members_of, read_runs, spread, to_rows

_FEW = 5  # corrupted data sets that are listed one by one; more are means and a table of their own


class Row(NamedTuple):
    """A line of the table: runs that differ in their seed only, on one data set, or their mean over corrupted ones.

    Attributes:
      data: the data set, as it is shown.
      group: place of the runs' group, see `runs.aggregate`.
      images: how many.
      checkpoint, threat: of the records, as they are shown.
      cells: tables' group: "values", "flags", "seeds", "workdirs".
      own: spread of the accuracies on the own test images of the same checkpoint, within the same threat model.
      optimistic: whether the checkpoint was chosen on those.
      grids: attack -> (corruption, severity) -> accuracy, for a mean.
      tabled: whether these are shown in a table of their own.
    """

    data: str
    group: int
    images: str
    checkpoint: str
    threat: str
    cells: dict
    own: dict
    optimistic: bool
    grids: dict
    tabled: bool = False

    @property
    def places(self) -> int:
        """Of how many data sets it is the mean."""
        return max(map(len, self.grids.values()), default=1)


def table(workdirs: Iterable[str | Path]) -> str:
    """Returns accuracies on other data as aligned plain text, in percent; nothing where no run has any.

    Args:
      workdirs: run directories.

    Returns:
      Lines without a trailing newline: a row for each data set and each row of `tables.table`; beside an accuracy that on the
      run's own test images, where it is known. For one row of runs, corruptions stand below by severity.

    Raises:
      InputError: see `runs.summary`.
    """
    runs = read_runs(workdirs)
    groups = aggregate(to_rows(runs))
    found = rows(groups, members_of(groups, runs))
    if not found:
        return ""
    header, body, left, notes = _lines(found, groups)
    parts = [tables.aligned(header, body, left, notes)]
    if len({row.group for row in found}) == 1:
        for heading, grid_header, grid_body in _grids(found, groups):
            parts.append(f"{heading}\n" + tables.aligned(grid_header, grid_body, 1))
    return "\n\n".join(parts)


def section(groups: Sequence[dict], members: Sequence[Sequence[Run]]) -> str:
    """Returns the HTML of the section "Other data", or nothing where no run has any.

    Args:
      groups: from `runs.aggregate`.
      members: the runs of each group.
    """
    found = rows(groups, members)
    if not found:
        return ""
    header, body, left, notes = _lines(found, groups)
    flagged = [note for note in notes if note.startswith(tables.MARK)]
    shown = page.html_table([*map(escape, header)], [
        [f'<span class="wrap">{escape(cells[0])}</span>', *map(escape, cells[1:left]), *map(_number, cells[left:])]
        for cells in body], left)
    text = ["Accuracies in percent.", *(note for note in notes if note not in flagged)]
    if "own test" in header:
        text.insert(1, "Own test: the same checkpoint and attack on the test images of the data that it was trained on.")
    if any(row.cells["seeds"] > 1 for row in found):
        text.append("Values are means over seeds ± one standard deviation of a single run.")
    shown += "".join(f'<p class="note">{escape(" ".join(lines))}</p>' for lines in (text, flagged) if lines)
    grids = _grids(found, groups)
    few = len(grids) <= 2
    if not few:
        shown += f"<h3>{corruptions.BASE} by corruption and severity</h3>"
    for heading, grid_header, grid_body in grids:
        grid = page.html_table([*map(escape, grid_header)], [[*map(escape, cells)] for cells in grid_body], 1)
        shown += (f"<h3>{escape(heading)}</h3>{grid}" if few else
                  f"<details><summary>{escape(heading)}</summary>{grid}</details>")
    return page.section("Other data", shown)


def rows(groups: Sequence[dict], members: Sequence[Sequence[Run]]) -> list[Row]:
    """Returns the rows of the table, data set by data set.

    Records that differ in checkpoint, threat model or images never share a row, nor do means over different corruptions.

    Args:
      groups, members: see `section`.
    """
    corrupted = {corruptions.place_of(name) for runs in members for run in runs for name in run.evaluation.get(OTHER_DATA, {})}
    listed = len(corrupted - {None}) <= _FEW
    found = []
    for place, runs in enumerate(members):
        single, several = {}, {}
        for run in runs:
            sets = {}
            for name, record in run.evaluation.get(OTHER_DATA, {}).items():
                where = corruptions.place_of(name)
                if where is None or listed:
                    key = (record["data"].get("name", name), record["data"].get("sha256"), _size(record), *_terms(record))
                    single.setdefault(key, []).append((run, record))
                if where is not None:
                    for attack in record["accuracy"]:
                        sets.setdefault((_size(record), *_terms(record), attack), {})[where] = record
            for (*key, attack), by_place in sets.items():
                for chosen, tabled in _parts(by_place):
                    if len(chosen) > 1 or not listed:
                        means = several.setdefault((*key, frozenset(chosen), tabled), {})
                        means.setdefault(id(run), (run, {}))[1][attack] = chosen
        found += [_single(place, entries) for entries in single.values()]
        found += [_mean(place, list(entries.values()), key[-1]) for key, entries in several.items()]
    order = list(dict.fromkeys(row.data for row in found))
    return sorted(found, key=lambda row: (-row.places if row.grids else -math.inf, order.index(row.data), row.group))


def _parts(by_place):
    """Yields what to take means of: all (and whether to table it), and where the 15 main corruptions are among more, those."""
    yield by_place, len(by_place) > _FEW
    if corruptions.MAIN < set(by_place):
        yield {place: by_place[place] for place in corruptions.MAIN}, False


def _terms(record):
    run, threat = record["run"], record["threat"]
    return str(run.get("checkpoint")), norm_name(str(threat.get("norm"))), threat.get("epsilon")


def _size(record):
    """Returns (images taken, images there)."""
    data = record["data"]
    return data["examples"], data.get("of", data["examples"])


def _single(place, entries) -> Row:
    cells = {
        "values": spread([record["accuracy"] for _, record in entries]), "flags": {}, "seeds": len(entries),
        "workdirs": [str(run.workdir) for run, _ in entries]}
    for run, record in entries:
        _add_flags(cells, run, record["cascades"])
    run, record = entries[0]
    data = str(record["data"].get("name", "?")).removesuffix(f"[:{record['data']['examples']}]")
    return _row(data, place, _images(_size(record)), record, cells, entries, {})


def _mean(place, entries, tabled) -> Row:
    """Makes the row of a mean from [(run, attack -> (corruption, severity) -> record)], of the same places for all."""
    values, cells = [], {"flags": {}, "seeds": len(entries), "workdirs": [str(run.workdir) for run, _ in entries]}
    by_attack: dict[str, list] = {}
    for run, attacks in entries:
        values.append({})
        for attack, by_place in attacks.items():
            accuracy = {where: record["accuracy"][attack] for where, record in by_place.items()}
            values[-1][attack] = statistics.fmean(accuracy.values())
            by_attack.setdefault(attack, []).append(accuracy)
            for record in by_place.values():
                _add_flags(cells, run, {attack: record["cascades"].get(attack, {})})
    cells["values"] = spread(values)
    by_place = next(iter(entries[0][1].values()))
    record = next(iter(by_place.values()))
    grids = {attack: {where: statistics.fmean(accuracy[where] for accuracy in found) for where in by_place}
             for attack, found in by_attack.items()}
    images = f"{len(by_place)} × {_images(_size(record))}"
    pairs = [(run, next(iter(next(iter(attacks.values())).values()))) for run, attacks in entries]
    return _row(corruptions.mean_name(by_place), place, images, record, cells, pairs, grids, tabled)


def _row(data, place, images, record, cells, entries, grids, tabled=False) -> Row:
    checkpoint, norm, epsilon = _terms(record)
    return Row(data, place, images, checkpoint, f"{norm} {epsilon_text(epsilon)}", cells,
               spread([_own(run, record) for run, record in entries]),
               any(_own(run, record) and chosen_on_test(run.config, record) for run, record in entries), grids, tabled)


def _own(run: Run, record) -> dict[str, float]:
    """Returns the accuracies of a record's checkpoint on the run's own test images, where they are known."""
    own = run.evaluation
    alike = all(own.get("run", {}).get(key) == record["run"].get(key) for key in ("step", "weights", "parameters"))
    same_threat = own.get("threat") == record["threat"]
    return own.get("accuracy", {}) if alike and same_threat and own.get("data", {}).get("split") == "test" else {}


def _add_flags(cells, run, cascades):
    for attack, found in cascades.items():
        flags = cells["flags"].setdefault(attack, [])
        flags += [entry for flag in found.get("flags", []) if (entry := (str(run.workdir), flag)) not in flags]


def _images(size) -> str:
    taken, there = size
    return count_text(taken) if taken == there else f"first {count_text(taken)} of {count_text(there)}"


def _lines(found: Sequence[Row], groups) -> tuple[list[str], list[list[str]], int, list[str]]:
    """Returns header and rows as text, how many columns, the first ones, hold text, and what stands below."""
    attacks = sorted({name for row in found for name in row.cells["values"]}, key=attack_order)
    own = {name for row in found for name in row.own if name in row.cells["values"]}
    short = _short_names(row.data for row in found)
    columns: list[tuple[str, Any]] = [("data", lambda row: short[row.data])]
    if len(groups) > 1:
        columns.append(("method", lambda row: groups[row.group]["label"]))
    for heading, value in (("checkpoint", lambda row: row.checkpoint), ("threat", lambda row: row.threat)):
        if len({value(row) for row in found}) > 1:
            columns.append((heading, value))
    left = len(columns)
    columns.append(("images", lambda row: row.images))
    if any(row.cells["seeds"] > 1 for row in found):
        columns.append(("seeds", lambda row: str(row.cells["seeds"])))
    for name in attacks:
        columns.append((attack_name(name), lambda row, name=name: tables.cell(row.cells, name) + tables.mark(row.cells, name)))
        if name in own:
            columns.append(("own test", lambda row, name=name: _own_cell(row, name)))
    notes = [f"{tables.MARK} {where}: {flag}" for where, flag in tables.flags([row.cells for row in found])]
    if any(row.optimistic for row in found):
        notes.append(tables.CHOSEN_NOTE)
        if any(row.grids or row.data.startswith(corruptions.BASE) for row in found if row.optimistic):
            notes.append(f"{corruptions.BASE} holds the test images of cifar10, corrupted.")
    return [heading for heading, _ in columns], [[value(row) for _, value in columns] for row in found], left, notes


def _own_cell(row: Row, name: str) -> str:
    if name not in row.own or name not in row.cells["values"]:
        return "-"
    return tables.cell({"values": row.own}, name) + tables.CHOSEN_MARK * row.optimistic


def _grids(found: Sequence[Row], groups) -> list[tuple[str, list[str], list[list[str]]]]:
    """Returns (heading, header, rows) of a table of corruptions by severities for each mean that is of many."""
    shown = []
    for row in found:
        for attack in sorted(row.grids if row.tabled else (), key=attack_order):
            words = [corruptions.BASE, attack_name(attack)]
            if len(groups) > 1:
                words.append(groups[row.group]["label"])
            for text in (lambda row: row.checkpoint, lambda row: row.threat, lambda row: f"{row.images} images"):
                if len({text(other) for other in found if other.tabled}) > 1:
                    words.append(text(row))
            shown.append((", ".join(words), *corruptions.grid(row.grids[attack])))
    return shown


def _number(cell: str) -> str:
    plain = cell.rstrip(tables.MARK + tables.CHOSEN_MARK)
    return page.number(plain, cell[len(plain):])


def _short_names(names: Iterable[str]) -> dict[str, str]:
    """Returns the name of each file without its directory, where that is enough to tell it from the others."""
    names = list(dict.fromkeys(names))
    last = {name: Path(name).name if name.endswith(".npz") else name for name in names}
    return {name: short if list(last.values()).count(short) == 1 else name for name, short in last.items()}
