"""`python -m launch.sweep` as its users run it: killed and started again, in one process or several, and wrongly typed."""

import csv
import importlib.util
import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from jaxrd.sweeps.results import TIMINGS
from tests.launch import slurm_cluster
from tests.launch.commands import ROOT, check_one_line, environment, run_all

RATE = "optimizer.learning_rate"
# The programs take longer to compile than to run.
FAST = environment(JAX_DISABLE_MOST_OPTIMIZATIONS="1")


def arguments(tiny_arrays, workdir, *more, rates=(0.05, 0.1), seeds="0,1,2,3,4,5"):
    return ["--config=configs/digits.py:pgd_at", f"--config.data.arrays={tiny_arrays}", "--config.data.examples=None",
            "--config.student=resnet6_w4", "--config.training.batch_size=16", "--config.attack.steps=1",
            "--config.training.steps=4", "--config.training.checkpoint_every=4", "--attacks=clean,fgsm",
            f"--grid={json.dumps({RATE: rates})}", f"--seeds={seeds}", f"--baseline={RATE}={rates[0]}",
            f"--workdir={workdir}", *more]


def command(*given):
    return [sys.executable, "-m", "launch.sweep", *given]


def sweep(*given, **variables):
    return subprocess.run(command(*given), cwd=ROOT, env=FAST | variables, capture_output=True, text=True, timeout=280)


def table(workdir):
    """The rows of results.csv without what depends on the clock."""
    with open(workdir / "results.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name not in TIMINGS} for row in csv.DictReader(file)]


def files_of(directories):
    return {path: path.stat().st_mtime_ns for directory in directories for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tiny_arrays, tmp_path_factory):
    """A sweep of 12 runs that nobody disturbed: (workdir, what it printed)."""
    workdir = tmp_path_factory.mktemp("whole") / "sweep"
    done = sweep(*arguments(tiny_arrays, workdir))
    assert (done.returncode, done.stderr) == (0, "")
    return workdir, done.stdout


def test_a_sweep_trains_compares_and_reports(whole):
    workdir, out = whole
    lines = out.splitlines()
    assert lines[0].startswith("12 runs, one after another")
    assert [line.split(":")[0] for line in lines[1:13]] == [
        f"[{2 * seed + place + 1:>2}/12] {RATE}={rate}, seed {seed}"
        for seed in range(6) for place, rate in enumerate((0.05, 0.1))]
    assert out.count(" ± ") > 8 and f"minus {RATE}=0.05" in out and out.endswith(f"report: {workdir}/report.html\n")
    rows = table(workdir)
    assert len(rows) == 12 and {row["status"] for row in rows} == {"finished"} and {row["step"] for row in rows} == {"4"}
    assert len({row["clean"] for row in rows}) > 1 and all(0 <= float(row["fgsm"]) <= 1 for row in rows)
    assert {int(row["step_memory"]) for row in rows} and all(int(row["step_memory"]) > 100_000 for row in rows)
    assert "Differences from the baseline" in (workdir / "report.html").read_text()
    with open(workdir / "summary.csv", newline="") as file:
        base, other = csv.DictReader(file)
    values = [[float(row["clean"]) for row in rows if row["point"] == f"{RATE}={rate}"] for rate in (0.05, 0.1)]
    assert float(base["clean_mean"]) == pytest.approx(sum(values[0]) / 6) and base["clean_difference"] == "0.0"
    assert float(other["clean_difference"]) == pytest.approx(sum(b - a for a, b in zip(*values)) / 6)


def test_a_sweep_that_was_killed_runs_only_what_is_missing_and_comes_to_the_same_table(whole, tiny_arrays, tmp_path):
    workdir = tmp_path / "sweep"
    given = command(*arguments(tiny_arrays, workdir))
    process = subprocess.Popen(given, cwd=ROOT, env=FAST, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("[ 5/12]"):
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    # The sixth directory may be there without a status yet.
    finished = [file.parent for file in workdir.glob("*-seed*/status.json") if '"finished"' in file.read_text()]
    assert 5 <= len(finished) < 12 and not (workdir / "results.csv").exists()
    before = files_of(finished)

    again = subprocess.run(given, cwd=ROOT, env=FAST, capture_output=True, text=True, timeout=280)
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.startswith(f"{len(finished)} of 12 runs are finished already\n{12 - len(finished)} runs, ")
    assert len(re.findall(r"^\[ ?\d+/\d+\]", again.stdout, re.M)) == 12 - len(finished)
    assert files_of(finished) == before
    assert table(workdir) == table(whole[0])


def test_a_pool_comes_to_the_same_table_and_a_failing_run_stops_nobody(whole, tiny_arrays, tmp_path):
    workdir = tmp_path / "sweep"
    # The largest rate makes the loss overflow.
    done = sweep(*arguments(tiny_arrays, workdir, "--backend=processes", "--processes=2", rates=(0.05, 0.1, 1e30), seeds="3"))
    check_one_line((done.returncode, done.stdout, done.stderr), f"1 of 3 runs failed; {RATE}=1e+30-seed3: ", "learning_rate")
    assert "3 runs, 2 at once" in done.stdout and len(re.findall(r"^\[\d/3\]", done.stdout, re.M)) == 3
    rows = table(workdir)
    expected = {(row["point"], row["seed"]): row for row in table(whole[0])}
    good = [row for row in rows if row["status"] == "finished"]
    assert len(good) == 2 and good == [expected[row["point"], row["seed"]] for row in good]
    assert all("learning_rate" in row["error"] and not row["clean"] for row in rows if row["status"] == "failed")
    report = (workdir / "report.html").read_text()
    assert "Runs that failed" in report and f"{RATE}=1e+30-seed3" in report
    # It alone is tried again, and fails.
    done = sweep(*arguments(tiny_arrays, workdir, rates=(0.05, 0.1, 1e30), seeds="3"))
    assert done.stdout.startswith("2 of 3 runs are finished already\n1 runs, ") and done.returncode == 1


def test_sigterm_saves_the_run_at_hand_and_the_same_command_goes_on(tiny_arrays, tmp_path):
    workdir = tmp_path / "sweep"
    given = command(*arguments(tiny_arrays, workdir, "--config.training.steps=100000",
                               "--config.training.checkpoint_every=100000", "--config.training.log_every=10", rates=(0.05,),
                               seeds="0"))
    process = subprocess.Popen(given, cwd=ROOT, env=FAST, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = workdir / f"{RATE}=0.05-seed0"
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    steps = [int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal()]
    assert len(steps) == 1 and steps[0] >= 10 and '"stopped"' in (run / "status.json").read_text()
    assert f"stopped by SIGTERM after step {steps[0]}" in (run / "log.txt").read_text()


needs_submitit = pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is not installed")


@needs_submitit
@pytest.mark.slow
def test_jobs_of_submitit_come_to_the_same_table(whole, tiny_arrays, tmp_path):
    workdir = tmp_path / "sweep"
    given = arguments(tiny_arrays, workdir, "--backend=slurm", '--slurm={"cluster": "local"}', seeds="0", rates=(0.05, 0.1))
    done = sweep(*given)
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 runs, as SLURM jobs" in done.stdout and "submitted 2 jobs" in done.stdout
    assert table(workdir) == [row for row in table(whole[0]) if row["seed"] == "0"]
    (workdir / "results.csv").unlink()
    done = sweep(*given, "--collect")
    assert done.stdout.startswith("\npoint") and table(workdir) == [row for row in table(whole[0]) if row["seed"] == "0"]


@needs_submitit
@pytest.mark.slow
def test_an_array_of_slurm_jobs_survives_one_that_fails_and_one_that_is_killed(tiny_arrays, tmp_path, tmp_path_factory):
    try:
        with slurm_cluster.running(tmp_path_factory.mktemp("slurm")) as variables:
            workdir = tmp_path / "sweep"
            given = arguments(tiny_arrays, workdir, "--backend=slurm", '--slurm={"cpus_per_task": 1, "timeout_min": 20}',
                              rates=(0.05, 0.1, 1e30), seeds="0,1")
            process = subprocess.Popen(command(*given), cwd=ROOT, env=FAST | variables, stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE, text=True)
            job = next(line for line in process.stdout if line.startswith("submitted 6 jobs")).split(" from ")[1].split("_")[0]
            subprocess.run(["scancel", f"{job}_5"], env=FAST | variables, check=True)
            out, error = process.communicate(timeout=400)
            assert process.returncode == 1 and error.startswith("error: 2 of 6 runs failed"), error
            rows = {row["run"]: row for row in table(workdir)}
            assert sum(row["status"] == "finished" for row in rows.values()) == 4
            assert f"its SLURM job {job}_5 ended before it" in rows[f"{RATE}=1e+30-seed1"]["error"]
            assert "learning_rate" in rows[f"{RATE}=1e+30-seed0"]["error"]
            again = sweep(*given, **variables)
            assert again.stdout.startswith("4 of 6 runs are finished already\n2 runs, as SLURM jobs")
    except slurm_cluster.NoCluster as why:
        pytest.skip(f"no SLURM: {why}")


# Mistakes.

ALPHA = "--sweep=configs/ablations/alpha.toml --workdir=DIRECTORY"
TRADES = "--config=configs/digits.py:trades --workdir=DIRECTORY"
MISTAKES = {
    "": ["--workdir is missing"],
    "--workdir=DIRECTORY": ["--sweep and --config are missing", "configs/ablations/alpha.toml"],
    "--workdir=DIRECTORY --sweep=alhpa.toml": ["--sweep=alhpa.toml: no such file"],
    "--workdir=DIRECTORY --swep=alpha.toml": ["--swep", "did you mean --sweep?"],
    f"{TRADES} --grid={{": ["--grid is no JSON"],
    f"{TRADES} --grid=[1]": ["--grid is [1]"],
    f'{TRADES} --grid={{"method.igmd":[1]}}': ["--grid: config.method.igmd: no such field", "config.method.igdm?"],
    f'{TRADES} --grid={{"method.igdm":[]}}': ["--grid: method.igdm is []"],
    f'{TRADES} --grid={{"seed":[0,1]}}': ["--grid: seed", "--seeds=0,1,2"],
    f"{TRADES} --seeds=": ["--seeds is []"],
    f"{TRADES} --seeds=0,a": ["--seeds=0,a", "--seeds=0,1,2"],
    f"{TRADES} --seeds=0,0": ["--seeds names 0 twice"],
    f"{TRADES} --attacks=pgd21": ["--attacks: ", '"pgd21"'],
    f"{TRADES} --baseline=a": ['--baseline is "a", which is no point', '"trades"'],
    f"{TRADES} --backend=slrum": ['backend is "slrum"', '"slurm"'],
    f"{TRADES} --backend=slurm --slurm=[1]": ["--slurm=[1]"],
    f"{TRADES} --slurm={{": ["--slurm is no JSON"],
    f"{TRADES} --collect": ["none of the 1 runs of this sweep is finished yet", "without --collect"],
    f"{TRADES} --processes=0": ["--processes=0"],
    f"{TRADES} --config.trainng.steps=3": ["config.trainng", "config.training?"],
    f"{TRADES} --config.training.steps=abc": ["config.training.steps is 'abc'"],
    f"{ALPHA} --config.method.igdm=3": ["--config.method.igdm is given, but the sweep varies that field"],
    f"{ALPHA} --config=configs/digit.py:ard": ["configs/digit.py: no such config file", "did you mean configs/digits.py?"],
    f"{ALPHA} --config.teacher=nowhere": ["nowhere: no such run directory"],
    f"{TRADES} --config.training.steps=3 more": ['"more" is not a flag'],
}


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mistakes") / "sweep"
    lines = {line: f"sweep {line}".strip().replace("DIRECTORY", str(directory)) for line in MISTAKES}
    results = run_all(lines.values())
    assert not directory.exists()
    return {line: results[typed] for line, typed in lines.items()}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_answered_with_one_line_before_anything_runs(mistakes, line):
    check_one_line(mistakes[line], *MISTAKES[line])


def test_help_names_every_flag():
    done = subprocess.run(command("--help"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and pathlib.Path("launch/sweep.py").name not in done.stderr
    for flag in ("config", "sweep", "grid", "seeds", "attacks", "baseline", "backend", "processes", "slurm", "collect",
                 "workdir"):
        assert re.search(rf"^\s+--(\[no\])?{flag}\b", done.stdout, re.M), flag
