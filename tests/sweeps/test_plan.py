"""A sweep is checked as a whole before anything runs, and what is wrong with it is said in one line with where it stands."""

import dataclasses
import itertools
import json
import pathlib

import pytest

from jaxrd import config_files
from jaxrd.errors import InputError
from jaxrd.sweeps import description as descriptions, plan as plans
from jaxrd.sweeps.description import Description
from tests.support import assert_input_error

ROOT = pathlib.Path(__file__).parents[2]
TRADES = f"{ROOT}/configs/digits.py:trades"
BETA = "method.trades_beta"


def build(workdir="runs/x", config=TRADES, **parts):
    return plans.build(Description(config=config, **parts), workdir)


# What a plan is.


def test_a_grid_is_the_product_of_its_values_and_the_seeds():
    plan = build(grid={BETA: [1, 6], "training.steps": [10, 20, 30]}, seeds=[4, 7], attacks="clean,pgd20")
    assert [point.fields for point in plan.points] == [
        {BETA: beta, "training.steps": steps} for beta, steps in itertools.product([1, 6], [10, 20, 30])]
    assert [(run.point, run.seed) for run in plan.runs] == [(point.name, seed) for point in plan.points for seed in (4, 7)]
    assert plan.fields == [BETA, "training.steps"] and plan.attacks == ("clean", "pgd20")
    for run in plan.runs:
        beta, steps = run.config.method.trades_beta, run.config.training.steps
        assert run.point == f"{BETA}={beta:g} training.steps={steps}" and run.config.seed == run.seed
    assert len({run.directory for run in plan.runs}) == len(plan.runs) == 12


def test_points_set_what_they_say_on_top_of_what_all_have():
    plan = build(set={"training.steps": 10, BETA: 3}, points=[{"name": "a"}, {"name": "b", BETA: 1}, {BETA: 2}])
    assert [(run.point, run.config.method.trades_beta, run.config.training.steps) for run in plan.runs] == [
        ("a", 3, 10), ("b", 1, 10), (f"{BETA}=2", 2, 10)]


def test_points_are_crossed_with_the_grid():
    plan = build(points=[{"name": "short", "training.steps": 1}, {"name": "long", "training.steps": 9}], grid={BETA: [1, 2]})
    assert [point.name for point in plan.points] == [f"{name} {BETA}={beta}" for name in ("short", "long") for beta in (1, 2)]


def test_nested_tables_are_dotted_fields(tmp_path):
    (tmp_path / "nested.toml").write_text(
        f'config = "{TRADES}"\n[set]\ntraining.steps = 3\n[grid.method]\ntrades_beta = [1, 2]\n')
    plan = plans.build(descriptions.read(tmp_path / "nested.toml"), "runs/x")
    assert [(run.config.training.steps, run.config.method.trades_beta) for run in plan.runs] == [(3, 1), (3, 2)]


def test_a_point_with_an_argument_is_what_the_config_file_makes_of_it():
    """Its options and its teacher too, which the method's name alone would not change."""
    file = f"{ROOT}/configs/cifar10.py"
    plan = build(config=file, points=[{"argument": "adaad+igdm"}, {"argument": "rslad+igdm", "training.steps": 5}])
    for run, argument in zip(plan.runs, ("adaad+igdm", "rslad+igdm")):
        expected = config_files.load(f"{file}:{argument}")
        assert run.config.method.igdm == expected["method"]["igdm"]
        assert run.config.training.epochs == expected["training"]["epochs"]
    assert plan.runs[0].config.method.igdm != plan.runs[1].config.method.igdm
    assert [run.point for run in plan.runs] == ["adaad+igdm", "rslad+igdm training.steps=5"]


def test_a_point_without_fields_is_called_after_its_method():
    assert [point.name for point in build().points] == ["trades"]


@pytest.mark.parametrize("value, text", [(0, "0"), (1.0, "1.0"), (True, "true"), (None, "None"), ("drop", "drop")])
def test_values_in_names(value, text):
    field = {bool: "data.flip", str: "method.path_weights", type(None): "training.epochs"}.get(type(value), BETA)
    assert build(grid={field: [value]}, set={"training.steps": 1}).points[0].name == f"{field}={text}"


def test_directories_are_safe_and_different_whatever_points_are_called():
    names = ["x+d/2 and x-d/2", "x+d 2 and x-d 2", "..", "A", "a", "ä, β", "x" * 300, "x" * 299 + "y", "../../etc", "a:b*c?"]
    plan = build(points=[{"name": name} for name in names])
    directories = [run.directory for run in plan.runs]
    assert len({name.lower() for name in directories}) == len(names)
    for name in directories:
        assert not set(name) & set('/\\:*?"<>|, ') and len(name) < 150 and not name.startswith((".", "-"))
    assert directories == [run.directory for run in build(points=[{"name": name} for name in names]).runs]
    assert directories[0] == "x+d_2_and_x-d_2-seed0"


def test_a_plan_is_read_as_it_was_written(tmp_path):
    plan = build(tmp_path, grid={BETA: [1, 6]}, seeds=[1, 2], baseline=f"{BETA}=1", title="t", about="a")
    plan.write()
    assert plans.read(tmp_path) == plan
    assert [run["settings"] for run in json.loads((tmp_path / "sweep.json").read_text())["runs"]] == [
        run.config.to_dict() for run in plan.runs]


def test_every_shipped_ablation_is_a_plan():
    files = sorted((ROOT / "configs" / "ablations").glob("*.toml"))
    assert len(files) >= 10
    for file in files:
        plan = plans.build(dataclasses.replace(descriptions.read(file)), "runs/x")
        assert plan.title and plan.about and plan.baseline in [point.name for point in plan.points]
        assert len({json.dumps(run.settings) + run.checkpoint for run in plan.runs}) == len(plan.runs), file


# Runs that train alike, and teachers.


def test_runs_that_differ_in_the_checkpoint_alone_are_one_job():
    plan = build(points=[{"name": "last"}, {"name": "best", "checkpoint": "best"}, {"name": "other", BETA: 1}], seeds=[0, 1])
    assert [[(run.point, run.seed) for run in job] for job in plan.jobs(plan.runs)] == [
        [("last", 0), ("best", 0)], [("other", 0)], [("last", 1), ("best", 1)], [("other", 1)]]
    assert plan.twins(plan.runs[0]) == [plan.runs[2]]


def test_teachers_are_planned_first_and_once():
    teachers = {"weak": {"config": f"{ROOT}/configs/digits.py:teacher", "training.steps": 60}, "unused": {"config": TRADES}}
    plan = build(config=f"{ROOT}/configs/digits.py:ard", grid={"teacher": ["@weak"]}, seeds=[0, 1], teachers=teachers)
    (teacher,) = plan.teachers
    assert (teacher.point, teacher.directory, teacher.config.training.steps) == ("@weak", "teachers/weak", 60)
    assert {run.config.teacher for run in plan.runs} == {str(plan.path(teacher))}
    assert [plan.teacher_of(run) for run in plan.runs] == [teacher] * 2
    assert plan.points[0].fields == {"teacher": "@weak"}


def test_a_teacher_that_does_not_exist_is_one_of_the_sweeps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"config": f"{ROOT}/configs/digits.py:ard",
             "teachers": {"teacher": {"config": f"{ROOT}/configs/digits.py:teacher"}}}
    assert build(**given).runs[0].config.teacher == "runs/x/teachers/teacher"
    (tmp_path / "runs" / "teacher").mkdir(parents=True)
    plan = build(**given)
    assert plan.runs[0].config.teacher == "runs/teacher" and not plan.teachers


def test_teachers_take_the_images_that_all_points_have():
    plan = build(config=f"{ROOT}/configs/digits.py:ard", set={"data.arrays": "a.npz,b.npz", "training.steps": 7}, teachers={
        "weak": {"config": f"{ROOT}/configs/digits.py:teacher"}}, points=[{"teacher": "@weak"}])
    assert plan.teachers[0].config.data.arrays == "a.npz,b.npz" and plan.teachers[0].config.training.steps == 600


# What a command line adds.


def test_another_config_file_takes_its_place_wherever_the_sweep_names_the_old_one():
    old, new = f"{ROOT}/configs/cifar10.py", f"{ROOT}/configs/cifar100.py"
    description = Description(
        config=old, points=[{"argument": "ard"}, {"config": f"{old}:rslad", "name": "b"}, {"config": TRADES, "name": "c"}],
        teachers={"weak": {"config": f"{old}:teacher"}}, set={"teacher": "@weak"}).with_config(new, {"training.steps": "50"})
    plan = plans.build(description, "runs/x")
    assert [run.config.data.name for run in plan.runs] == ["cifar100", "cifar100", "jaxrd_digits"]
    assert plan.teachers[0].config.data.name == "cifar100"
    assert {run.config.training.steps for run in plan.runs} == {50}


def test_a_field_that_the_sweep_varies_is_not_set_for_all():
    for parts in ({"grid": {BETA: [1]}}, {"points": [{BETA: 1}]}):
        assert_input_error(
            lambda: Description(config=TRADES, **parts).with_config(None, {BETA: "2"}), f"--config.{BETA}", "varies")


# Bad input.

BAD = {
    "grid": [
        ({"method.igmd": [1]}, "config.method.igmd: no such field", "config.method.igdm?"),
        ({"igdm": [1]}, "config.igdm", "config.method.igdm?"),
        ({"method.igdm": []}, "method.igdm is []", "one value or more"),
        ({"method.igdm": 3}, "method.igdm is 3", "a list"),
        ({"method.igdm": "0,1"}, "method.igdm is '0,1'", "a list"),
        ({BETA: [1, 2, 1]}, "lists 1 twice"),
        ({"seed": [0, 1]}, "seed", "seeds = [0, 1, 2]", "--seeds=0,1,2"),
        ({"training": [1]}, "config.training is a section"),
        ([1], "[1]", "fields and their values"),
        ({BETA: [-1]}, f'point "{BETA}=-1"', "method.trades_beta is -1"),
        ({"training.steps": ["many"]}, 'point "training.steps=many"', "config.training.steps is 'many'"),
    ],
    "seeds": [
        ([], "seeds is []", "one or more"), ([0, 1, 0], "names 0 twice"), ([0, "1"], "whole numbers"),
        ([True], "whole numbers"), (3, "seeds is 3", "a list"), ([-1], "[0, 2**32)"), ("0,1", "a list"),
    ],
    "attacks": [
        ("clean,pgd21", '"pgd21"', "pgd20"), ("", "none given"), ([], "none given"), (3, "attacks is 3"),
        ([3], "attacks is [3]")],
    "baseline": [("alpha=0", 'baseline is "alpha=0", which is no point', '"trades"')],
    "set": [({"trainng.steps": 3}, "config.trainng", "config.training?"), ({"seed": 3}, "seeds = ")],
    "points": [
        ([{"name": "a"}, {"name": "a"}], '2 points are called "a"'),
        ([{"nmae": "a"}], '"nmae"', '"name"?'), ([{"checkpont": "best"}], '"checkpoint"?'),
        ([{"checkpoint": "first"}], "checkpoint is 'first'", '"best"'), ([{"checkpoint": True}], "checkpoint is True"),
        ([{"name": 3}], "name is 3"), ([3], "a list of points"), ({"a": {}}, "a list of points"),
        ([{"name": "a", "checkpoint": "best", "data.selection": "last"}], 'config.data.selection is "last"'),
        ([{"method": "tradse"}], 'method.name is "tradse"', '"trades"?'),
        ([{"argument": "tradse"}], '"tradse"', '"trades"?'),
        ([{"config": "configs/digit.py:ard"}], "configs/digit.py: no such config file", "digits.py?"),
        ([{"teacher": "@weka"}], '"@weka"', "it has none"),
    ],
    "teachers": [({"weak": {"training.steps": 3}}, "teachers.weak: config is missing"), ([1], "teachers by name"),
                 ({"weak": {"config": TRADES, "training.stpes": 3}}, "teachers.weak: ", "config.training.steps?")],
    "title": [(3, "title is 3", "a text")],
    "config": [(None, "config is missing"), (3, "config is 3"), ("nothing.py", "nothing.py: no such config file")],
}


@pytest.mark.parametrize("part, value, words", [
    (part, value, words) for part, cases in BAD.items() for value, *words in cases], ids=str)
def test_bad_input_is_one_line(part, value, words):
    assert_input_error(lambda: plans.build(Description(**({"config": TRADES} | {part: value})), "runs/x"), *words)


def test_a_field_in_a_point_and_in_the_grid_is_refused():
    assert_input_error(lambda: build(points=[{BETA: 1}], grid={BETA: [1, 2]}), f"points: {BETA} stands in the grid as well")


def test_a_misspelt_teacher_has_its_nearest():
    given = {"config": f"{ROOT}/configs/digits.py:ard", "teachers": {"weak": {"config": f"{ROOT}/configs/digits.py:teacher"}}}
    assert_input_error(lambda: build(points=[{"teacher": "@weka"}], **given), '"@weka"', 'did you mean "@weak"?')


@pytest.mark.parametrize("text, words", [
    ("seeds = [0,", ("is no TOML",)), ("sedes = [0]", ('"sedes" is no part of a sweep', '"seeds"?')),
    ("seeds = []", (": seeds is []",)), ('[grid]\n"method.igmd" = [0]', (": grid: config.method.igmd", "config.method.igdm?")),
    ("\xff", ("is no TOML",))])
def test_bad_sweep_files_are_one_line_with_their_name(tmp_path, text, words):
    file = tmp_path / "my.toml"
    file.write_bytes((f'config = "{TRADES}"\n' + text).encode("latin-1"))
    assert_input_error(lambda: plans.build(descriptions.read(file), "runs/x"), str(file), *words)


def test_a_sweep_file_that_is_not_there(tmp_path):
    assert_input_error(lambda: descriptions.read(tmp_path / "my.toml"), "my.toml: no such file", "configs/ablations")


@pytest.mark.parametrize("text, words", [
    ("def get_config(argument):\n    return 1/0", ("line 2", "ZeroDivisionError")), ("def get_config(:", ("line 1",)),
    ("x = 1", ("it must define get_config",)), ("import no_such_module", ("line 1", "ModuleNotFoundError"))])
def test_what_is_wrong_in_a_config_file_is_one_line(tmp_path, text, words):
    (tmp_path / "mine.py").write_text(text)
    assert_input_error(lambda: build(config=f"{tmp_path}/mine.py"), "mine.py", *words)


@pytest.mark.parametrize("content", ["{", "[]", '{"points": []}', '{"points": [3]}'])
def test_a_damaged_plan_is_one_line(tmp_path, content):
    (tmp_path / "sweep.json").write_text(content)
    assert_input_error(lambda: plans.read(tmp_path), "sweep.json is damaged")
    with pytest.raises(InputError, match="holds no sweep.json"):
        plans.read(tmp_path / "elsewhere")
