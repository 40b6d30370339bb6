"""What a sweep came to: one row per run, and per point the mean, the spread and the paired differences from a baseline.

A difference is paired: of two runs with the same seed. What the seed does to both (which images it draws, how it initialises)
is not in it, so that the differences often spread less than the values.
"""

import csv
import dataclasses
import math
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from jaxrd.errors import InputError
from jaxrd.evaluation import names, page, tables
from jaxrd.evaluation.figures import is_number
from jaxrd.evaluation.record import is_finite
from jaxrd.evaluation.runs import flat, spread
from jaxrd.files import replacing
from jaxrd.sweeps import plan as plans, runs
from jaxrd.sweeps.plan import Plan, Run
from jaxrd.training.log import read_metrics

# Of a run, besides accuracies and `names.MEASURES`. Column -> (heading, unit of the heading).
STEP_MEMORY = "step_memory"
TIMINGS = ("seconds_per_step", "training_seconds", "evaluation_seconds")  # what two sweeps alike differ in
_HEADINGS = {STEP_MEMORY: ("step MB", 1e6)}
_CONFIDENCE = 0.95
# Besides accuracies, what the text tables show; the report and the CSV files have all.
_IN_TEXT = ("gradient_cosine", "taylor_remainder", "seconds_per_step", STEP_MEMORY)


@dataclasses.dataclass(frozen=True)
class Table:
    """The results of a sweep.

    Attributes:
      plan: what was run.
      rows: a dict per run, in the order of the points, then of the seeds: "point", every swept field, "method", "seed",
        "checkpoint", "status" ("finished", "failed" or "unfinished"), "error", "step" (that was evaluated), the accuracy under
        each attack (in [0, 1]), alignment measures, "seconds_per_step", "step_memory" (bytes), "training_seconds",
        "evaluation_seconds" and "run" (its directory, below the sweep's). None where a run has no such value.
    """

    plan: Plan
    rows: tuple[dict[str, Any], ...]

    @property
    def measures(self) -> list[str]:
        """Columns that are averaged over seeds: attacks, alignment measures, cost; those that some run has."""
        present = {name for row in self.rows for name, value in row.items() if value is not None}
        attacks = sorted(set(self.plan.attacks) & present, key=names.attack_order)
        return attacks + [name for name in (*names.MEASURES, STEP_MEMORY) if name in present]

    @property
    def failed(self) -> list[dict[str, Any]]:
        """Rows of runs that failed."""
        return [row for row in self.rows if row["status"] == "failed"]

    def frame(self):
        """Returns the rows as a pandas DataFrame, whose columns are those of results.csv.

        Raises:
          InputError: pandas is not installed.
        """
        return _pandas().DataFrame(list(self.rows))

    def summary(self):
        """Returns one row per point as a pandas DataFrame, whose columns are those of `summarise`.

        Raises:
          InputError: pandas is not installed.
        """
        return _pandas().DataFrame(self.summarise())

    def summarise(self) -> list[dict[str, Any]]:
        """Returns a dict per point: its mean, spread and difference from the baseline in every measure.

        For a measure m (an attack, "gradient_cosine", "seconds_per_step", ...): "m_mean", "m_sd" (ddof=1; None for one run) and
        "m_n" over the runs that are finished; with a baseline also "m_difference", the mean over seeds of the point's value
        minus the baseline's of the same seed, its "m_difference_sd" and "m_difference_n", and the limits of its 95 % confidence
        interval by Student's t, "m_difference_low" and "m_difference_high" (None for one pair).

        Returns:
          Dicts with "point", the swept fields, "finished" and "failed" (how many runs), and these.
        """
        fields, measures = self.plan.fields, self.measures
        by_point = {point.name: [row for row in self.rows if row["point"] == point.name] for point in self.plan.points}
        summaries = []
        for name, rows in by_point.items():
            found = {"point": name, **{field: rows[0][field] for field in fields},
                     "finished": sum(row["status"] == "finished" for row in rows),
                     "failed": sum(row["status"] == "failed" for row in rows)}
            for measure in measures:
                values = _by_seed(rows, measure)
                found |= _spread(measure, values.values())
                if self.plan.baseline:
                    base = _by_seed(by_point[self.plan.baseline], measure)
                    pairs = [values[seed] - base[seed] for seed in values if seed in base]
                    paired = _spread(f"{measure}_difference", pairs)
                    found |= {f"{measure}_difference": paired.pop(f"{measure}_difference_mean"), **paired}
                    low, high = confidence_interval(pairs)
                    found |= {f"{measure}_difference_low": low, f"{measure}_difference_high": high}
            summaries.append(found)
        return summaries

    def means(self, measures: Sequence[str] | None = None) -> tuple[list[str], list[list[str]]]:
        """Returns (header, cells) of the table of means over seeds, accuracies in percent.

        Args:
          measures: columns; all by default.
        """
        rows, measures = self.summarise(), self.measures if measures is None else measures
        columns = [self._column(name, [(row[f"{name}_mean"], row[f"{name}_sd"]) for row in rows]) for name in measures]
        return (["point", "seeds", *map(heading, measures)],
                [[row["point"], str(row["finished"]), *cells] for row, *cells in zip(rows, *columns)])

    def differences(self, measures: Sequence[str] | None = None) -> tuple[list[str], list[list[str]]]:
        """Returns (header, cells) of the table of paired differences, accuracies in percentage points.

        There are no rows without a baseline.

        Args:
          measures: columns; all by default.
        """
        if not self.plan.baseline:
            return [], []
        measures = self.measures if measures is None else measures
        rows = [row for row in self.summarise() if row["point"] != self.plan.baseline]
        pairs = [max((row[f"{name}_difference_n"] for name in measures), default=0) for row in rows]
        columns = [self._column(name, [(row[f"{name}_difference"], row[f"{name}_difference_sd"]) for row in rows], sign=True)
                   for name in measures]
        body = [[row["point"], str(count), *cells] for row, count, *cells in zip(rows, pairs, *columns)]
        return [f"minus {self.plan.baseline}", "pairs", *map(heading, measures)], body if any(pairs) else []

    def _column(self, measure: str, values: list[tuple[float | None, float | None]], sign: bool = False) -> list[str]:
        return column(values, factor=100.0 if self.is_accuracy(measure) else 1 / _HEADINGS.get(measure, ("", 1.0))[1],
                      decimals=1 if self.is_accuracy(measure) else None, sign=sign, exact=measure == STEP_MEMORY)

    def is_accuracy(self, name: str) -> bool:
        return name in self.plan.attacks

    @property
    def in_text(self) -> list[str]:
        """The measures that a text table has room for."""
        return [name for name in self.measures if self.is_accuracy(name) or name in _IN_TEXT]

    def __str__(self) -> str:
        """The means, and the paired differences below them, as aligned text."""
        header, body = self.means(self.in_text)
        several = any(row["finished"] > 1 for row in self.summarise())
        notes = ["accuracies in percent; " + ("mean ± standard deviation over seeds" if several else "one seed")]
        unfinished = sum(row["status"] == "unfinished" for row in self.rows)
        notes += [f"{len(self.failed)} of {len(self.rows)} runs failed"] * bool(self.failed)
        notes += [f"{unfinished} of {len(self.rows)} runs are not finished"] * bool(unfinished)
        text = tables.aligned(header, body, 1, notes)
        header, body = self.differences(self.in_text)
        if body:
            text += "\n\n" + tables.aligned(header, body, 1, [
                "mean ± standard deviation of the differences of runs with the same seed, accuracies in percentage points"])
        return text

    def _repr_html_(self) -> str:
        return "<br>".join(html(header, body) for header, body in (self.means(self.in_text), self.differences(self.in_text))
                           if body)


def read(workdir: str | pathlib.Path) -> Table:
    """Returns the table of a sweep's directory, as far as its runs have come.

    Raises:
      InputError: the directory holds no sweep.
    """
    return collect(plans.read(workdir))


def collect(plan: Plan) -> Table:
    """Returns the table of a plan, as far as its runs have come."""
    fields = {point.name: point.fields for point in plan.points}
    rows = [_row(plan, run, fields[run.point]) for run in plan.runs]
    # A measure that no run has is no column.
    empty = [name for name in (*names.MEASURES, STEP_MEMORY)
             if name not in TIMINGS and all(row[name] is None for row in rows)]
    return Table(plan, tuple({name: value for name, value in row.items() if name not in empty} for row in rows))


def write(table: Table) -> None:
    """Writes results.csv and summary.csv into the sweep's directory."""
    for name, rows in (("results.csv", table.rows), ("summary.csv", table.summarise())):
        with replacing(table.plan.workdir / name, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def confidence_interval(values: Sequence[float], confidence: float = _CONFIDENCE) -> tuple[float | None, float | None]:
    """Returns the limits of the confidence interval of a mean; (None, None) for fewer than two values.

    They are mean ± t sd / sqrt(n), where t is Student's with n - 1 degrees of freedom.
    """
    values = list(values)
    if len(values) < 2:
        return None, None
    from scipy import stats

    mean = statistics.fmean(values)
    reach = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - reach, mean + reach


def html(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Returns a table of means or differences as HTML."""
    return page.html_table([escape(cell) for cell in header], [[escape(row[0]), *map(page.number, row[1:])] for row in body], 1)


def heading(measure: str) -> str:
    """Returns a measure's name in the header of a table."""
    if measure in _HEADINGS:
        return _HEADINGS[measure][0]
    return names.MEASURES.get(measure) or names.attack_name(measure)


def column(values: Sequence[tuple[float | None, float | None]], *, factor: float = 1.0, decimals: int | None = None,
           sign: bool = False, exact: bool = False) -> list[str]:
    """Returns the cells of a column: "55.3 ± 1.2", all with as many decimals.

    Args:
      values: (mean, sd) of each row, None where there is none.
      factor: what they are multiplied by.
      decimals: None for three digits of the largest.
      sign: whether positive ones have one too.
      exact: whether a spread of 0 goes without saying, as of what does not depend on chance.
    """
    if decimals is None:
        largest = max((factor * abs(mean) for mean, _ in values if mean is not None), default=0.0)
        decimals = 3 if largest == 0 else min(max(0, 2 - math.floor(math.log10(largest))), 6)
    cells = []
    for mean, sd in values:
        # Adding 0.0 turns a rounded -0.0 into 0.0.
        text = "-" if mean is None else f"{round(factor * mean, decimals) + 0.0:{'+' if sign else ''}.{decimals}f}"
        cells.append((text.replace("-", "−") if sign and mean is not None else text)
                     + ("" if sd is None or exact and sd == 0 else f" ± {factor * sd:.{decimals}f}"))
    return cells


def _row(plan: Plan, run: Run, fields: dict[str, Any]) -> dict[str, Any]:
    settings, done = flat(run.settings), runs.is_finished(plan, run)
    evaluation = runs.evaluation_of(plan, run) if done else {}
    error = runs.error_of(plan, run)
    training = evaluation.get("training") or {}
    measured = {**(evaluation.get("alignment") or {}), **training}
    seconds = [entry["seconds"] for entry in read_metrics(plan.path(run) / "metrics.jsonl") if is_number(entry.get("seconds"))]
    return {
        "point": run.point, **{field: _as_given(fields.get(field, settings[field]), settings[field]) for field in plan.fields},
        "method": (evaluation.get("run") or {}).get("method", settings["method.name"]), "seed": run.seed,
        "checkpoint": run.checkpoint, "status": "finished" if done else "failed" if error else "unfinished", "error": error,
        "step": (evaluation.get("run") or {}).get("step"),
        **{name: evaluation.get("accuracy", {}).get(name) for name in plan.attacks},
        **{name: measured.get(name) for name in names.MEASURES}, STEP_MEMORY: training.get(STEP_MEMORY),
        "training_seconds": max(seconds) if done and seconds else None,
        "evaluation_seconds": round(sum(evaluation["seconds"].values()), 3) if done else None, "run": run.directory}


def _as_given(given: Any, meant: Any) -> Any:
    """Returns a swept value as it was given ("@weak", 10), but the number that a text stands for ("8/255")."""
    return meant if isinstance(given, str) and is_number(meant) else given


def _by_seed(rows: Iterable[dict], measure: str) -> dict[int, float]:
    return {row["seed"]: row[measure] for row in rows if is_finite(row.get(measure))}


def _spread(name: str, values: Iterable[float]) -> dict[str, Any]:
    found = spread([{name: value} for value in values]).get(name, {"mean": None, "sd": None, "n": 0})
    return {f"{name}_{part}": found[part] for part in ("mean", "sd", "n")}


def _pandas():
    try:
        import pandas
    except ImportError:
        raise InputError('a DataFrame needs pandas, which is not installed: pip install "jaxrd[notebooks]" (results.csv and '
                         "Table.rows hold the same)") from None
    return pandas
