"""The parent's side of `--compare=torch`: what it makes of a configuration and of seconds, and what it says without PyTorch."""

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from jaxrd import distillation, models
from jaxrd.config import Config
from jaxrd.models import architectures
from jaxrd.training import schedule, step
from launch.pytorch import comparison, jobs
from tests.support import assert_input_error

ROOT = pathlib.Path(__file__).parents[2]
JOB = jobs.Job("rslad+igdm", "resnet18", "wrn34_10", 10, (32, 32, 3), 16)


def test_ratios_are_taken_turn_by_turn():
    # The second turn is slow for both, and in the last the variant alone is.
    seconds = {"jaxrd": [1.0, 10.0, 1.0, 1.0, 1.0], "eager": [2.0, 20.0, 2.0, 2.5, 8.0], "bf16": [0.5, 5.0, 0.5, 0.5, 0.5]}
    assert comparison.ratios(seconds) == {
        "eager": comparison.Ratio(seconds=2.5, ratio=2.0, lower=2.0, upper=2.5),
        "bf16": comparison.Ratio(seconds=0.5, ratio=0.5, lower=0.5, upper=0.5)}
    assert comparison.ratios({"jaxrd": [2.0], "eager": [3.0]})["eager"] == (3.0, 1.5, 1.5, 1.5)


def test_the_table_has_a_line_for_each_variant_and_for_each_that_failed():
    lines = comparison.table(
        {"jaxrd": [0.1, 0.1], "eager": [0.2, 0.4]}, {"eager": 1.5, "compile": "Error: no compiler"},
        {"compile": "Error: no compiler"})
    assert [line.split()[0] for line in lines[1:]] == ["jaxrd", "eager", "compile"]
    assert lines[1].split()[1:] == ["100.00", "1.00x"]
    assert lines[2].split()[1:] == ["300.00", "3.00x", "2.50", "to", "3.50", "1.5", "s"]
    assert "Error: no compiler" in lines[3]


class Steps:
    """Stands for a child: its steps are the order in which they are asked for, and one variant fails in the second turn."""

    def __init__(self, order):
        self.variants, self.order, self.times = ("eager", "bf16"), order, {}

    def step(self, variant, times):
        self.order.append(variant)
        self.times[variant] = times
        if variant == "bf16" and self.order.count("bf16") == 2:
            self.variants = ("eager",)
            raise comparison.VariantError("out of memory")
        return float(len(self.order))


def test_both_sides_step_in_turn_and_the_first_turn_is_not_measured():
    order = []
    seconds = comparison.compare(lambda times: order.append("jaxrd"), Steps(order), turns=3)
    assert order == ["jaxrd", "eager", "bf16", "jaxrd", "eager", "bf16", "jaxrd", "eager", "jaxrd", "eager"]
    assert seconds["eager"] == [5.0, 8.0, 10.0] and list(seconds) == ["jaxrd", "eager"] and len(seconds["jaxrd"]) == 3


def test_steps_of_a_turn_are_as_many_as_take_half_a_second(monkeypatch):
    clock, asked = iter(np.cumsum([0, 0.004, 1, 0.4, 1, 0.4])), []
    monkeypatch.setattr(comparison, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    child = Steps([])
    child.step = lambda variant, times: child.times.update({variant: times}) or {"eager": 0.03, "bf16": 3.0}[variant]
    seconds = comparison.compare(asked.append, child, turns=2)
    assert asked == [1, 100, 100] and child.times == {"eager": 17, "bf16": 1}
    assert seconds["jaxrd"] == pytest.approx([0.004, 0.004]) and seconds["eager"] == [0.03, 0.03]


def test_without_torch_it_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for call in (comparison.require_torch, lambda: comparison.TorchSteps(JOB)):
        assert_input_error(call, "--compare=torch needs PyTorch", "pip install -e '.[parity]'")


def test_the_parent_imports_neither_torch_nor_jax():
    code = "import sys, launch.pytorch.comparison; assert not {'jax', 'torch'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("changes, mentions", [
    ({"method": "iad"}, ['method is "iad"', "rslad+igdm"]),
    ({"method": "adaad+igmd"}, ['did you mean "adaad+igdm"']),
    ({"method": "rslad+igdm+awp"}, ['"rslad+igdm+awp"', "trades"]),
    ({"student": "mobilenet_v2"}, ['student is "mobilenet_v2"', "resnet18", "wrn{depth}_{width}"]),
    ({"teacher": "dm_wrn28_10"}, ['teacher is "dm_wrn28_10"', "resnet18"]),
    ({"teacher": None}, ["rslad+igdm needs a teacher"]),
    ({"flavour": "all"}, ['flavour is "all"', "least, published"]),
    ({"variants": ("eager", "bfloat16")}, ['variant is "bfloat16"', "channels_last"]),
    ({"variants": ()}, ["no variant", "eager"]),
    ({"start": "zero"}, ['start is "zero"', "gaussian"]),
])
def test_what_the_pytorch_side_does_not_have_is_one_line(changes, mentions, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found")
    assert jobs.fault(JOB) is None
    assert_input_error(
        lambda: comparison.TorchSteps(dataclasses.replace(JOB, **changes)), "--compare=torch", *mentions)


@pytest.mark.parametrize("name", [
    "resnet18", "resnet34", "resnet50", "resnet6_w8", "resnet50_w4", "wrn34_10", "wrn10_1", "wrn70_16", "resnet6", "resnet20",
    "resnet18_w0", "wrn11_1", "wrn4_1", "wrn34", "wrn1000_1", "dm_wrn28_10", "preact_resnet18", "mobilenet_v2", "resnet18 "])
def test_architectures_are_jaxrds_of_two_families(name):
    ours = name.startswith(("resnet", "wrn")) and architectures.is_architecture(name)
    assert (jobs.architecture(name) is not None) == ours


def config_and_recipe(**sections):
    values = {"method": {"name": "adaad+igdm", "igdm": 3.0}, "student": "resnet6_w8", "teacher": "runs/a", "seed": 5,
              "threat": {"epsilon": 0.1}, "attack": {"steps": 4, "step_size": 0.05, "start": "uniform"},
              "optimizer": {"learning_rate": 0.05, "nesterov": True}, "training": {"batch_size": 24, "steps": 10}}
    config = Config.from_dict({name: values.get(name, {}) | sections.get(name, {}) if isinstance(
        values.get(name, {}), dict) else values[name] for name in values | sections})
    method = config.build_method()
    recipe = step.Recipe(
        method, models.create(config.student, classes=7, image_shape=(8, 6, 1)),
        models.create("wrn10_1", classes=7, image_shape=(8, 6, 1)) if method.needs_teacher else None,
        distillation.InnerMaximisation(
            config.threat.build(), config.attack.step_size, config.attack.steps, config.attack.start or None),
        schedule.optimizer(config.optimizer, 10), steps=10)
    return config, recipe


def test_the_job_of_a_configuration_has_its_numbers_and_goes_through_json():
    job = comparison.job_of(*config_and_recipe(), variants=("eager",), flavour="published", threads=2)
    assert job == jobs.Job(
        "adaad+igdm", "resnet6_w8", "wrn10_1", 7, (8, 6, 1), 24, attack_steps=4, step_size=0.05, epsilon=0.1, start="uniform",
        igdm=3.0, learning_rate=0.05, nesterov=True, seed=5, flavour="published", variants=("eager",), threads=2)
    read = json.loads(json.dumps(dataclasses.asdict(job)))
    assert json.loads(json.dumps(dataclasses.asdict(jobs.Job(**read)))) == read
    job = comparison.job_of(*config_and_recipe(method={"name": "pgd_at", "igdm": 0.0}))
    assert (job.method, job.teacher, job.igdm) == ("pgd_at", None, 0.0)


@pytest.mark.parametrize("sections, mentions", [
    ({"method": {"adaad_weight": 0.5}}, ["config.method.adaad_weight is 0.5", "1.0"]),
    ({"method": {"igdm_distance": "l2"}}, ["config.method.igdm_distance is l2", "kl"]),
    ({"method": {"attack": "ce"}}, ["config.method.attack is ce"]),
    ({"threat": {"norm": "l2"}}, ["config.threat.norm is l2", "linf"]),
    ({"optimizer": {"name": "lars"}}, ["config.optimizer.name is lars", "sgd"]),
    ({"training": {"accumulation": 2}}, ["config.training.accumulation is 2"]),
    ({"attack": {"batch_statistics": True}}, ["config.attack.batch_statistics is True"]),
    ({"method": {"name": "mart", "igdm": 0.0}}, ['method is "mart"', "pgd_at"]),
])
def test_a_configuration_with_what_it_does_not_have_is_one_line(sections, mentions):
    assert_input_error(lambda: comparison.job_of(*config_and_recipe(**sections)), "--compare=torch", *mentions)


def test_options_of_other_methods_are_no_matter():
    assert comparison.job_of(*config_and_recipe(method={"trades_beta": 1.0, "igdm_ramp": "constant"})).method == "adaad+igdm"
