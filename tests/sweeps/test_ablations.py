"""The sweep files that are shipped: plans that fit their configurations, whose points compile to different train steps."""

import itertools
import json
import pathlib

import jax
import numpy as np
import pytest

from jaxrd import models
from jaxrd.config import Config
from jaxrd.sweeps import description, plan
from jaxrd.training import opening, parallel, state as states, step as steps, teacher_cache

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted((ROOT / "configs" / "ablations").glob("*.toml"))


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def planned(request, tmp_path, monkeypatch):
    # As a new user stands, with no runs yet: files name configurations from the root of the repository.
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return plan.build(description.read(request.param), tmp_path)


def test_a_named_ablation_compares_different_points_with_one_of_them(planned):
    assert planned.title and planned.about and planned.baseline in [point.name for point in planned.points]
    assert planned.attacks[-1] == "autoattack" and len({run.seed for run in planned.runs}) >= 3
    told = [json.dumps([run.settings, run.checkpoint], sort_keys=True) for run in planned.runs]
    assert len(set(told)) == len(told)
    # With nothing there but the repository, its own teacher is trained first.
    taught = [run for run in planned.runs if run.config.build_method().needs_teacher]
    assert taught and all(planned.teacher_of(run) for run in taught)


def test_a_named_ablation_goes_to_another_configuration_with_its_methods(planned, tmp_path, request):
    there = description.read(ROOT / "configs" / "ablations" / f"{request.node.callspec.id}.toml")
    moved = plan.build(there.with_config("configs/cifar100.py", {"training.epochs": "20"}), tmp_path)
    assert [run.config.method.name for run in moved.runs] == [run.config.method.name for run in planned.runs]
    assert {(run.config.data.name, run.config.training.epochs) for run in moved.runs} == {("cifar100", 20)}
    assert {teacher.config.student for teacher in moved.teachers} <= {"wrn34_10", "resnet6_w4"}


@pytest.mark.slow
def test_points_of_a_named_ablation_are_different_programs(planned, tiny_arrays):
    """One that its method does not look at would be one run under two names; and all of them can be trained."""
    mesh = parallel.data_mesh(jax.devices()[:1])
    first = [next(run for run in planned.runs if run.point == point.name) for point in planned.points]
    programs = [(run, _program(run.config, tiny_arrays, mesh)) for run in first]
    for (a, program_a), (b, program_b) in itertools.combinations(programs, 2):
        assert program_a != program_b or (a.teacher, a.checkpoint) != (b.teacher, b.checkpoint), (a.point, b.point)


def _program(config: Config, arrays: str, mesh) -> str:
    """The train step of a run on small images, as JAX traces it, numbers included."""
    small = config.to_dict()
    small["data"] |= {"arrays": arrays, "examples": None}
    small["student"] = "resnet6_w4"
    small["attack"] |= {"steps": 2}
    small["method"] |= {"path_points": 2}
    small["training"] |= {"batch_size": 8}
    small = Config.from_dict(small)
    dataset, source = opening.open_data(small)
    teacher = models.create("resnet6_w4", classes=10, image_shape=source.image_shape)
    recipe, teacher_variables = opening.build_recipe(small, dataset, source.epoch, mesh, teacher=teacher)
    state = states.create(recipe.student, recipe.optimizer, jax.random.key(0), weight_average=recipe.averages)
    batch = source.batch(np.arange(8))
    if recipe.method.negatives:
        batch |= {"negatives": batch["images"], "negative_labels": batch["labels"]}
    if teacher_cache.applies(recipe, small, source):
        batch |= {"teacher_clean": np.zeros((8, 10), np.float32)}
    return str(jax.make_jaxpr(steps.make_train_step(recipe, mesh))(state, teacher_variables, batch))
