"""Means, spreads and paired differences against closed forms, and what tables and figures of them show."""

import csv
import math
import sys

import numpy as np
import pytest

from jaxrd.errors import InputError
from jaxrd.evaluation import figures
from jaxrd.sweeps import description as descriptions, plan as plans, plots, report, results
from jaxrd.sweeps.results import Table
from tests.support import assert_input_error

FIELD, OTHER = "method.trades_beta", "training.steps"
# By point and seed. What the seed adds is in both points and not in their differences.
LUCK = np.array([0.02, -0.01, 0.05, 0.0])
GAIN = np.array([0.030, 0.034, 0.026, 0.030])


@pytest.fixture
def table(tmp_path):
    """Two points of four seeds; the last seed of the second is missing."""
    plan = plans.build(descriptions.Description(
        config="configs/digits.py:trades", grid={FIELD: [1, 6]}, seeds=[0, 1, 2, 3], attacks="clean,pgd20",
        baseline=f"{FIELD}=1"), tmp_path)
    rows = []
    for run in plan.runs:
        second, done = run.point.endswith("6"), not (run.point.endswith("6") and run.seed == 3)
        clean = 0.8 + LUCK[run.seed] + second * GAIN[run.seed]
        rows.append({
            "point": run.point, FIELD: 6 if second else 1, "seed": run.seed, "status": "finished" if done else "failed",
            "error": "" if done else "it <diverged>", "clean": clean if done else None, "pgd20": clean / 2 if done else None,
            "gradient_cosine": 0.25 if done else None, "step_memory": 123456789 if done else None, "run": run.directory})
    return Table(plan, tuple(rows))


def test_means_and_spreads_are_over_the_finished_runs(table):
    one, two = table.summarise()
    assert (one["point"], one[FIELD], one["finished"], one["failed"]) == (f"{FIELD}=1", 1, 4, 0)
    assert (two["finished"], two["failed"], two["clean_n"]) == (3, 1, 3)
    assert one["clean_mean"] == pytest.approx(0.8 + LUCK.mean()) and one["clean_sd"] == pytest.approx(LUCK.std(ddof=1))
    assert two["clean_mean"] == pytest.approx(0.8 + np.mean((LUCK + GAIN)[:3]))
    assert (one["gradient_cosine_sd"], one["step_memory_mean"]) == (0, 123456789)


def test_a_measure_without_a_value_leaves_its_run_out_of_the_mean(table):
    table.rows[0]["gradient_cosine"] = math.inf
    one, _ = table.summarise()
    assert (one["gradient_cosine_mean"], one["gradient_cosine_n"]) == (0.25, 3)


def test_differences_are_paired_by_seed_and_free_of_its_luck(table):
    one, two = table.summarise()
    assert (one["clean_difference"], one["clean_difference_sd"], one["clean_difference_n"]) == (0, 0, 4)
    assert two["clean_difference"] == pytest.approx(GAIN[:3].mean()) and two["clean_difference_n"] == 3
    assert two["clean_difference_sd"] == pytest.approx(GAIN[:3].std(ddof=1))
    assert two["clean_difference_sd"] < two["clean_sd"] / 5
    assert two["pgd20_difference"] == pytest.approx(GAIN[:3].mean() / 2)


def test_the_interval_of_a_mean_is_students():
    # t of 2 degrees of freedom at 97.5 % is sqrt(2 * 0.95^2 / (1 - 0.95^2)), in closed form.
    t = math.sqrt(2 * 0.95**2 / (1 - 0.95**2))
    low, high = results.confidence_interval([1.0, 2.0, 3.0])
    assert (low, high) == (pytest.approx(2 - t / math.sqrt(3)), pytest.approx(2 + t / math.sqrt(3)))
    assert results.confidence_interval([1.0]) == results.confidence_interval([]) == (None, None)
    # It holds the mean that it is of in 95 of 100 cases.
    generator = np.random.default_rng(0)
    intervals = [results.confidence_interval(sample) for sample in generator.normal(5, 2, (2000, 4))]
    assert np.mean([low < 5 < high for low, high in intervals]) == pytest.approx(0.95, abs=0.015)


def test_one_seed_has_no_spread(table):
    single = Table(table.plan, tuple(row for row in table.rows if row["seed"] == 0))
    _, two = single.summarise()
    assert two["clean_sd"] is two["clean_difference_sd"] is two["clean_difference_low"] is None
    assert two["clean_difference"] == pytest.approx(GAIN[0]) and "± " not in str(single).split("\n")[2]


def test_text_shows_percent_and_points(table):
    text = str(table).splitlines()
    assert text[0].split() == ["point", "seeds", "clean", "PGD-20", "grad", "cosine", "step", "MB"]
    assert text[2].split() == [f"{FIELD}=1", "4", "81.5", "±", "2.6", "40.8", "±", "1.3", "0.250", "±", "0.000", "123"]
    assert "1 of 8 runs failed" in text[5]
    assert text[-2].split()[:4] == [f"{FIELD}=6", "3", "+3.0", "±"] and f"minus {FIELD}=1" in text[-4]
    assert "<table>" in table._repr_html_() and "+3.0" in table._repr_html_()


@pytest.mark.parametrize("values, options, cells", [
    ([(0.5, 0.01), (None, None), (1.0, None)], {"factor": 100.0, "decimals": 1}, ["50.0 ± 1.0", "-", "100.0"]),
    ([(0.0123, 0.001), (0.0001, 0.0)], {}, ["0.0123 ± 0.0010", "0.0001 ± 0.0000"]),
    ([(-0.02, None), (0.0, None), (-1e-9, None)], {"sign": True, "decimals": 1}, ["+0.0", "+0.0", "+0.0"]),
    ([(-2.0, 0.0), (3.0, 1.0)], {"sign": True, "exact": True}, ["−2.00", "+3.00 ± 1.00"]),
    ([(1234.5, None)], {}, ["1234"]), ([], {}, []), ([(0.0, 0.0)], {}, ["0.000 ± 0.000"])])
def test_the_cells_of_a_column(values, options, cells):
    assert results.column(values, **options) == cells


def test_frames_have_the_columns_of_the_files(table):
    pandas = pytest.importorskip("pandas")
    results.write(table)
    for name, frame in (("results", table.frame()), ("summary", table.summary())):
        read = pandas.read_csv(table.plan.workdir / f"{name}.csv")
        assert list(read.columns) == list(frame.columns) and len(read) == len(frame)
        np.testing.assert_allclose(read.select_dtypes("number"), frame[read.select_dtypes("number").columns].astype(float))
    assert table.frame().groupby("point")["clean"].mean().loc[f"{FIELD}=1"] == pytest.approx(table.summarise()[0]["clean_mean"])


def test_a_frame_without_pandas_is_one_line(table, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    for call in (table.frame, table.summary):
        assert_input_error(call, "pandas", 'pip install "jaxrd[notebooks]"')
    results.write(table)
    with open(table.plan.workdir / "results.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 8


# Figures.


def lines_of(figure):
    return [line for line in figure.axes[0].get_lines()]


def test_a_measure_against_a_number_shows_every_seed_and_the_mean(table):
    for narrow in (False, True):
        figure = plots.against(table, FIELD, "clean", narrow=narrow)
        mean, *seeds = lines_of(figure)
        np.testing.assert_allclose(mean.get_xydata(), [[1, 81.5], [6, 100 * (0.8 + np.mean((LUCK + GAIN)[:3]))]])
        assert sorted(len(line.get_xdata()) for line in seeds) == [3, 4]
        np.testing.assert_allclose(sorted(seeds[0].get_ydata()), sorted(100 * (0.8 + LUCK)))
        assert figure.axes[0].get_xlabel() == FIELD and figures.png(figure).startswith(b"\x89PNG")


def test_dots_and_differences_show_the_points_below_each_other(table):
    figure = plots.dots(table, "pgd20")
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [f"{FIELD}=1", f"{FIELD}=6"]
    figure = plots.differences(table, "clean")
    baseline, interval, pairs, mean = lines_of(figure)
    assert list(baseline.get_xdata()) == [0, 0]
    np.testing.assert_allclose(interval.get_xdata(), results.confidence_interval(100 * GAIN[:3]))
    np.testing.assert_allclose(pairs.get_xdata(), 100 * GAIN[:3])
    assert figure.axes[0].get_xlabel() == f"minus {FIELD}=1"


@pytest.mark.parametrize("numbers, scale", [([0, 1, 3, 10, 30], "symlog"), ([1, 100], "log"), ([0.25, 0.5, 1], "linear"),
                                            ([-1, 100], "linear"), ([0], "linear")])
def test_an_axis_is_logarithmic_where_its_numbers_are(numbers, scale):
    figure, (axis,) = figures.panels(1, 1, (4, 3))
    plots._scale(axis, numbers)
    assert axis.get_xscale() == scale and [text.get_text() for text in axis.get_xticklabels()] == [f"{x:g}" for x in numbers]
    axis.set_xlim(min(numbers), max(numbers) + 1)
    pixels = axis.transData.transform([(x, 0) for x in numbers])[:, 0]
    assert (np.diff(pixels) > 0).all() and (scale == "linear" or np.ptp(np.diff(pixels)) < 0.2 * np.diff(pixels).max())


def test_what_cannot_be_drawn_is_one_line(table):
    assert_input_error(lambda: plots.against(table, "method.igdm", "clean"), '"method.igdm" is not swept', FIELD)
    assert_input_error(lambda: plots.against(table, FIELD, "pgd21"), '"pgd21"', 'did you mean "pgd20"?')
    table.rows[0][FIELD] = "many"
    assert_input_error(lambda: plots.against(table, FIELD, "clean"), "'many'", "sweeps.plots.dots")
    empty = Table(table.plan, ())
    assert_input_error(lambda: plots.dots(empty, "clean"), "none is finished yet")
    alone = Table(plans.build(descriptions.Description(config="configs/digits.py:trades", attacks="clean"), "x"), table.rows)
    assert_input_error(lambda: plots.differences(alone, "clean"), "no baseline")


def test_no_report_where_nothing_is_finished(table):
    rows = tuple(row | {"status": "unfinished"} for row in table.rows)
    assert report.write(Table(table.plan, rows)) is None and not (table.plan.workdir / "report.html").exists()


def test_a_directory_without_a_sweep_is_one_line(tmp_path):
    with pytest.raises(InputError, match="holds no sweep.json"):
        results.read(tmp_path)
