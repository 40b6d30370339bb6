"""A sweep runs what is missing and nothing else, whatever became of it before, and a failure is that run's alone."""

import json
import os
import pathlib
import threading

import pytest

from jaxrd import sweeps
from jaxrd.errors import InputError
from jaxrd.sweeps import execution, runs
from tests.support import assert_input_error

ROOT = pathlib.Path(__file__).parents[2]
DIGITS = f"{ROOT}/configs/digits.py"
BETA = "method.trades_beta"


@pytest.fixture
def sweep(tmp_path, capsys):
    """Runs a sweep of trades in `tmp_path`, and returns its table and the lines that it said."""
    def run(**options):
        lines = []
        given = {"config": f"{DIGITS}:trades", "workdir": tmp_path / "sweep", "grid": {BETA: [1, 6]}, "seeds": [0, 1],
                 "attacks": "clean,pgd20", "fields": {"training.steps": 4}, "report": False, "say": lines.append}
        table = sweeps.run(**given | options)
        assert capsys.readouterr() == ("", "")
        return table, lines

    return run


def test_points_and_seeds_are_trained_evaluated_and_told(sweep, fakes, tmp_path):
    table, lines = sweep()
    # Seed by seed, so that a sweep that is stopped compares all points on the first ones.
    assert fakes.trained == [f"{BETA}={beta}-seed{seed}" for seed in (0, 1) for beta in (1, 6)]
    assert {attacks for _, attacks in fakes.evaluated} == {("clean", "pgd20")}
    assert [(row["point"], row["seed"], row["status"]) for row in table.rows] == [
        (f"{BETA}={beta}", seed, "finished") for beta in (1, 6) for seed in (0, 1)]
    assert table.rows[3] == {
        "point": f"{BETA}=6", BETA: 6, "method": "trades", "seed": 1, "checkpoint": "last", "status": "finished", "error": "",
        "step": 4, "clean": pytest.approx(0.66), "pgd20": pytest.approx(0.33), "gradient_cosine": 0.1, "seconds_per_step": 0.5,
        "step_memory": 1000000, "training_seconds": 2.0, "evaluation_seconds": 2.0, "run": f"{BETA}=6-seed1"}
    said = [line for line in lines if line.startswith("[")]
    assert said[0].startswith(f"[1/4] {BETA}=1, seed 0: clean 51.0%, PGD-20 25.5%  ETA ")
    assert said[3] == f"[4/4] {BETA}=6, seed 1: clean 66.0%, PGD-20 33.0%"
    assert sweeps.read(tmp_path / "sweep").rows == table.rows


def test_a_finished_sweep_is_left_alone(sweep, fakes, tmp_path):
    first, _ = sweep()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").glob("*-seed*/*")}
    fakes.trained.clear(), fakes.evaluated.clear()
    second, lines = sweep()
    assert (fakes.trained, fakes.evaluated, second.rows) == ([], [], first.rows)
    assert lines == ["4 of 4 runs are finished already"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").glob("*-seed*/*")} == before


def test_added_points_and_seeds_alone_are_run(sweep, fakes):
    sweep()
    fakes.trained.clear()
    table, lines = sweep(grid={BETA: [1, 3, 6]}, seeds=[0, 1, 2])
    assert sorted(fakes.trained) == sorted([f"{BETA}=3-seed0", f"{BETA}=3-seed1", *(f"{BETA}={b}-seed2" for b in (1, 3, 6))])
    assert lines[0] == "4 of 9 runs are finished already" and len(table.rows) == 9


def test_added_attacks_are_evaluated_without_training(sweep, fakes):
    sweep()
    fakes.trained.clear(), fakes.evaluated.clear()
    table, _ = sweep(attacks="clean,pgd20,fgsm")
    assert fakes.trained == [] and {attacks for _, attacks in fakes.evaluated} == {("fgsm",)} and len(fakes.evaluated) == 4
    assert all(row["fgsm"] == row["pgd20"] for row in table.rows)


def test_removed_points_stay_on_disk_and_out_of_the_table(sweep, fakes, tmp_path):
    sweep()
    table, lines = sweep(grid={BETA: [6]})
    assert lines[0] == f"2 runs of an earlier plan are not in this one, and are left alone: {BETA}=1-seed0, {BETA}=1-seed1"
    assert {row["point"] for row in table.rows} == {f"{BETA}=6"}
    assert (tmp_path / "sweep" / f"{BETA}=1-seed0" / "evaluation.json").exists()


def test_a_run_that_was_stopped_in_its_evaluation_is_not_trained_again(sweep, fakes, tmp_path):
    sweep()
    run = tmp_path / "sweep" / f"{BETA}=6-seed1"
    evaluation = json.loads((run / "evaluation.json").read_text())
    del evaluation["accuracy"]["pgd20"]
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    (run / "status.json").write_text('{"status": "running", "steps": 4}')
    assert {row["run"]: row["status"] for row in sweeps.read(tmp_path / "sweep").rows}[run.name] == "unfinished"
    fakes.trained.clear(), fakes.evaluated.clear()
    table, _ = sweep()
    assert (fakes.trained, fakes.evaluated) == ([], [(run.name, ("pgd20",))])
    assert {row["status"] for row in table.rows} == {"finished"}


def test_a_run_that_was_stopped_after_its_attacks_gets_what_is_measured_besides(sweep, fakes, tmp_path):
    sweep()
    run = tmp_path / "sweep" / f"{BETA}=6-seed1"
    (run / "status.json").write_text('{"status": "running", "steps": 4}')
    fakes.evaluated.clear()
    sweep()
    assert fakes.evaluated == [(run.name, ("clean",))]


def test_an_evaluation_of_another_checkpoint_or_seed_does_not_count(sweep, fakes, tmp_path):
    sweep()
    for change in ({"seed": 3}, {"run": {"checkpoint": "best", "step": 4}}, {"run": {"checkpoint": "last", "step": 3}},
                   {"data": {"split": "validation"}}, None):
        path = tmp_path / "sweep" / f"{BETA}=6-seed1" / "evaluation.json"
        path.write_text(json.dumps(change and json.loads(path.read_text()) | change))
        fakes.evaluated.clear()
        table, _ = sweep()
        assert fakes.evaluated == [(f"{BETA}=6-seed1", ("clean", "pgd20"))], change
        assert table.rows[3]["clean"] == pytest.approx(0.66)


# Failures.


@pytest.mark.parametrize("error, says", [
    (InputError("the loss of step 3 is nan; lower it"), "the loss of step 3 is nan; lower it"),
    (ArithmeticError("a bug\nof two lines"), "ArithmeticError: a bug of two lines"), (MemoryError(), "MemoryError:")])
def test_a_failed_run_stops_nobody_and_is_tried_again(sweep, fakes, tmp_path, error, says):
    def act(config):
        if (config.method.trades_beta, config.seed) == (6, 0):
            raise error

    fakes.act = act
    table, lines = sweep(baseline=f"{BETA}=1")
    assert [(row["run"], row["error"]) for row in table.failed] == [(f"{BETA}=6-seed0", says)]
    assert sum(row["status"] == "finished" for row in table.rows) == 3
    told, = [line for line in lines if "failed: " in line]
    assert f"{BETA}=6, seed 0: failed: {says}" in told
    assert "Traceback" in (tmp_path / "sweep" / f"{BETA}=6-seed0" / "log.txt").read_text()
    # It is out of the mean, and its seed out of the pairs.
    one, six = table.summarise()
    assert (six["finished"], six["failed"], six["clean_mean"]) == (1, 1, pytest.approx(0.66))
    assert (six["clean_difference_n"], six["clean_difference"]) == (1, pytest.approx(0.05))
    assert "1 of 4 runs failed" in str(table)

    fakes.act = lambda config: None
    fakes.trained.clear()
    table, lines = sweep(baseline=f"{BETA}=1")
    assert fakes.trained == [f"{BETA}=6-seed0"] and not table.failed and lines[0] == "3 of 4 runs are finished already"
    assert table.rows[2]["error"] == ""


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_signal_stops_the_sweep_and_the_same_call_goes_on(sweep, fakes, stop, tmp_path):
    def act(config):
        if config.seed == 1:
            raise stop

    fakes.act = act
    with pytest.raises(stop):
        sweep()
    assert [row["status"] for row in sweeps.read(tmp_path / "sweep").rows] == ["finished", "unfinished"] * 2
    fakes.act = lambda config: None
    fakes.trained.clear()
    table, lines = sweep()
    assert lines[0] == "2 of 4 runs are finished already" and len(fakes.trained) == 2
    assert {row["status"] for row in table.rows} == {"finished"}


def test_what_another_sweep_is_at_work_on_is_refused(sweep, fakes):
    errors = []

    def act(_):
        try:
            sweep()
        except InputError as error:
            errors.append(str(error))

    fakes.act = act
    sweep()
    assert len(errors) == 4
    assert all(f"process {os.getpid()} on" in error and "is at work on this sweep" in error for error in errors)


def test_a_run_that_another_process_is_at_work_on_is_passed_over(sweep, fakes, tmp_path):
    directory = tmp_path / "sweep" / f"{BETA}=6-seed0"
    directory.mkdir(parents=True)
    from jaxrd import files

    inside, done = threading.Event(), threading.Event()

    def hold():
        with files.alone(directory / ".sweep.lock"):
            inside.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    try:
        table, lines = sweep()
    finally:
        done.set()
        thread.join()
    assert len(fakes.trained) == 3 and [row["run"] for row in table.rows if row["status"] == "unfinished"] == [directory.name]
    assert any("is at work on it" in line for line in lines)


# Runs that disagree.


def test_another_base_configuration_is_refused_before_anything_runs(sweep, fakes):
    sweep()
    fakes.trained.clear()
    for change, words in (({"fields": {"training.steps": 5}}, ("config.training.steps = 4, not 5",)),
                          ({"fields": {"training.steps": 4, "attack.steps": 3}}, ("config.attack.steps = 10, not 3",)),
                          ({"config": f"{DIGITS}:pgd_at", "points": [{BETA: 6}], "grid": {}}, ("config.method.name",))):
        assert_input_error(lambda: sweep(seeds=[5, 0], **change), "choose another --workdir", *words)
    assert not fakes.trained
    sweep(fields={"training.steps": 4, "training.log_every": 3})  # what computes nothing may change


def test_a_directory_that_cannot_be_one(sweep, fakes, tmp_path):
    (tmp_path / "sweep").write_text("")
    assert_input_error(sweep, "sweep is a file", "choose another --workdir")


@pytest.mark.parametrize("options, words", [
    ({"backend": "slrum"}, ('backend is "slrum"', '"slurm"')), ({"processes": 0}, ("processes is 0",)),
    ({"slurm": {"gpus_per_node": 1}}, ("--slurm is given",))])
def test_bad_options_are_one_line(sweep, fakes, options, words):
    assert_input_error(lambda: sweep(**options), *words)


# Teachers, and runs that train alike.


def test_the_best_and_the_last_checkpoint_are_of_one_training(sweep, fakes, tmp_path):
    points = [{"name": "last"}, {"name": "best", "checkpoint": "best"}]
    table, _ = sweep(points=points, grid={})
    assert fakes.trained == ["last-seed0", "last-seed1"] and len(fakes.evaluated) == 4
    assert [(row["checkpoint"], row["step"]) for row in table.rows] == [("last", 4), ("last", 4), ("best", 1), ("best", 1)]
    assert (tmp_path / "sweep" / "best-seed0" / "checkpoints" / "4").is_dir()
    copied = json.loads((tmp_path / "sweep" / "best-seed0" / "config.json").read_text())
    assert copied == json.loads((tmp_path / "sweep" / "last-seed0" / "config.json").read_text())
    fakes.trained.clear()
    sweep(points=[*points, {"name": "best again", "checkpoint": "best"}], grid={})
    assert not fakes.trained


TEACHERS = {"weak": {"config": f"{DIGITS}:teacher", "training.steps": 3}}


def test_teachers_come_first_and_once(sweep, fakes):
    points = [{"name": "a", "teacher": "@weak"}, {"name": "b", "teacher": "@weak", "method.igdm": 1}]
    table, lines = sweep(config=f"{DIGITS}:ard", points=points, grid={}, teachers=TEACHERS)
    assert fakes.trained == ["weak", "a-seed0", "b-seed0", "a-seed1", "b-seed1"]
    assert any(line.startswith("[1/1] @weak, seed 0: clean") for line in lines)
    assert {row["teacher"] for row in table.rows} == {"@weak"} and len(table.rows) == 4
    fakes.trained.clear()
    sweep(config=f"{DIGITS}:ard", points=points, grid={}, teachers=TEACHERS)
    assert not fakes.trained


def test_a_teacher_that_fails_is_the_reason_of_its_students_alone(sweep, fakes):
    def act(config):
        if config.training.steps == 3:
            raise InputError("it diverged")

    fakes.act = act
    points = [{"name": "a", "teacher": "@weak"}, {"name": "b", "argument": "trades"}]
    table, _ = sweep(config=f"{DIGITS}:ard", points=points, grid={}, teachers=TEACHERS)
    assert [(row["point"], row["error"]) for row in table.failed] == [
        ("a", "its teacher @weak has not been trained (it diverged)")] * 2
    assert sum(row["status"] == "finished" for row in table.rows) == 2


def test_a_teacher_that_does_not_exist_is_said_once_and_before_anything_runs(sweep, fakes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_input_error(lambda: sweep(config=f"{DIGITS}:ard"),
                       f'config.teacher of point "{BETA}=1": runs/teacher: no such run directory')
    assert not (tmp_path / "sweep").exists() and not fakes.trained


# The pool, with processes that only say what they are given.

WORKER = """
import json, os, pathlib, signal, sys, time
workdir = pathlib.Path(sys.argv[1])
for line in sys.stdin:
    name = json.loads(line)
    with open(workdir / "calls.txt", "a") as file:
        file.write(f"{name} {os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
    if "=6-" in name and "seed0" in name:
        KIND
    (workdir / name).mkdir(exist_ok=True)
    (workdir / name / "status.json").write_text('{"status": "failed", "error": "not a real one"}')
    print('""', flush=True)
"""


def pool(monkeypatch, kind):
    monkeypatch.setattr(execution, "_WORKER", ("-c", WORKER.replace("KIND", kind)))


@pytest.mark.parametrize("kind, says", [
    ("os.kill(os.getpid(), signal.SIGKILL)", "its process was killed by SIGKILL (out of memory, perhaps)"),
    ("sys.exit(3)", "its process ended with status 3"), ("1/0", "its process ended with status 1")])
def test_a_process_that_dies_costs_its_run_alone(sweep, tmp_path, monkeypatch, kind, says):
    pool(monkeypatch, kind)
    table, lines = sweep(backend="processes", processes=2)
    errors = {row["run"]: row["error"] for row in table.rows}
    assert errors.pop(f"{BETA}=6-seed0").startswith(says)
    assert [*errors.values()] == ["not a real one"] * 3 and len(lines) == 5
    calls = [line.split() for line in (tmp_path / "sweep" / "calls.txt").read_text().splitlines()]
    assert len(calls) == 4 and 2 <= len({process for _, process, _ in calls}) <= 3


def test_a_signal_has_the_processes_stop_and_save(sweep, tmp_path, monkeypatch):
    pool(monkeypatch, """
        def stop(*_):
            (workdir / "saved").write_text(name)
            sys.exit(143)
        signal.signal(signal.SIGTERM, stop)
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)
""".strip())
    with pytest.raises(KeyboardInterrupt):
        sweep(backend="processes", processes=1)
    assert (tmp_path / "sweep" / "saved").read_text() == f"{BETA}=6-seed0"
    assert len((tmp_path / "sweep" / "calls.txt").read_text().splitlines()) == 2
    assert [row["status"] for row in sweeps.read(tmp_path / "sweep").rows] == ["failed", *["unfinished"] * 3]


def test_each_process_has_its_share_of_the_gpus(monkeypatch):
    assert execution.devices_of(0, 2, []) == {}
    assert [execution.devices_of(k, 2, ["0", "1", "2", "3"]) for k in range(2)] == [
        {"CUDA_VISIBLE_DEVICES": "0,2"}, {"CUDA_VISIBLE_DEVICES": "1,3"}]
    assert [execution.devices_of(k, 2, ["a", "b"])["CUDA_VISIBLE_DEVICES"] for k in range(2)] == ["a", "b"]
    shared = [execution.devices_of(k, 3, ["5", "7"]) for k in range(3)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in shared] == ["5", "7", "5"]
    assert {each["XLA_PYTHON_CLIENT_PREALLOCATE"] for each in shared} == {"false"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    assert execution.visible_gpus() == ["3", "4"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert execution.visible_gpus() == []


# SLURM, short of a cluster.


def test_slurm_without_submitit_or_with_parameters_that_it_does_not_have(sweep, fakes, monkeypatch, tmp_path):
    assert_input_error(lambda: sweep(backend="slurm", slurm={"cluster": "lcoal"}), 'cluster is "lcoal"', '"local"')
    assert_input_error(lambda: sweep(backend="slurm", slurm={"cluster": "local", "slrum_partition": "a"}), "slrum_partition")
    monkeypatch.setitem(__import__("sys").modules, "submitit", None)
    assert_input_error(lambda: sweep(backend="slurm"), "needs submitit", 'pip install "jaxrd[slurm]"')
    assert not fakes.trained and not (tmp_path / "sweep" / "sweep.json").exists()


def test_a_job_that_is_preempted_is_submitted_again_with_its_runs():
    pytest.importorskip("submitit")
    execution._submitit()
    task = execution.Task("runs/a")
    again = task.checkpoint(["b", "c"])
    assert (again.function, again.args) == (task, (["b", "c"],))


def test_fractions_are_numbers_in_the_table(sweep, fakes):
    table, _ = sweep(grid={"threat.epsilon": ["51/255", "102/255"]}, seeds=[0])
    assert [row["threat.epsilon"] for row in table.rows] == pytest.approx([0.2, 0.4])
    assert [row["point"] for row in table.rows] == ["threat.epsilon=51/255", "threat.epsilon=102/255"]
    assert sweeps.plots.against(table, "threat.epsilon", "clean").axes


def test_a_report_opens_with_what_was_asked_and_has_its_tables_as_files(sweep, fakes, tmp_path):
    def act(config):
        if (config.method.trades_beta, config.seed) == (6, 1):
            raise InputError("it <diverged>")

    fakes.act = act
    sweep(title="The weight of TRADES", about="Look at <clean>.", baseline=f"{BETA}=1", report=True, grid={BETA: [1, 3, 6]})
    html = (tmp_path / "sweep" / "report.html").read_text()
    parts = ["<h1>The weight of TRADES</h1>", "Look at &lt;clean&gt;.", "5 of 6 runs are finished", "<h2>Points</h2>",
             "<h2>Differences from the baseline</h2>", "<h2>Figures</h2>", "it &lt;diverged&gt;", "<h2>Results</h2>"]
    assert sorted(parts, key=html.index) == parts
    assert html.count("sweep_") == 0 and {path.name for path in (tmp_path / "sweep" / "evaluation").glob("sweep_*")} >= {
        "sweep_against_clean.png", "sweep_differences_pgd20.png"}
    text = (tmp_path / "sweep" / "tables" / "differences_from_the_baseline.md").read_text()
    assert f"minus {BETA}=1".replace("_", "\\_") in text or f"minus {BETA}=1" in text


def test_a_status_that_is_damaged_is_none(tmp_path):
    (tmp_path / "status.json").write_text("{")
    assert runs.read_status(tmp_path) == {}
    runs.write_status(tmp_path, status="running")
    assert runs.read_status(tmp_path) == {"error": "", "status": "running"}
