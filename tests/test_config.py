"""Configurations: what `Config.from_dict` takes, what it refuses and in which words, and the way through files and JSON."""

import dataclasses
import json

import numpy as np
import pytest
from ml_collections import config_dict

from configs import cifar10, digits
from jaxrd import InputError, config as configs
from jaxrd.config import Config
from tests.support import assert_input_error


def refuse(values, *words):
    with pytest.raises(InputError) as raised:
        Config.from_dict(values)
    message = str(raised.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("groups, batch_size, words", [
    (0, 128, ["above 0, or None"]), (-1, 128, ["above 0, or None"]), (2.5, 128, ["whole number or None"]),
    (3, 128, ["training.batch_size, 128", "126 or 129"]), (256, 128, ["training.batch_size, 128", "256"])])
def test_batch_norm_groups_divide_the_batch(groups, batch_size, words):
    refuse({"bn_groups": groups, "training": {"batch_size": batch_size}}, "config.bn_groups", str(groups), *words)


@pytest.mark.parametrize("groups, expected", [(None, None), ("None", None), (1, 1), ("8", 8), (128, 128)])
def test_batch_norm_groups_are_a_number_or_the_whole_batch(groups, expected):
    assert Config.from_dict({"bn_groups": groups}).bn_groups == expected


def test_nothing_given_is_the_default():
    assert Config.from_dict({}) == Config()


def test_round_trip_through_dict_and_json():
    config = Config.from_dict({
        "method": "rslad+igdm", "teacher": "runs/t", "threat": {"epsilon": "8/255"}, "data": {"examples": 7, "flip": True},
        "optimizer": {"milestones": "0.4,0.8", "name": "lamb", "betas": "0.9,0.99", "scaling": "sqrt", "scaling_batch": 64,
                      "warmup": "5 epochs"},
        "training": {"steps": None, "examples": 1e6, "batch_size": 4096, "swa_start": "3/4", "swa_every": "2 epochs",
                     "checkpoint_every": "5%", "log_every": "1e5 examples", "keep_every": "10 epochs"}})
    assert config.optimizer.betas == (0.9, 0.99) and config.training.log_every == "100000 examples"
    assert Config.from_dict(config.to_dict()) == config
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert Config.from_dict(configs.config_dict_of(config)) == config
    assert configs.difference(config.to_dict(), json.loads(json.dumps(config.to_dict()))) is None


@pytest.mark.parametrize("value, expected", [("8/255", 8 / 255), (" 8 / 255", 8 / 255), (0.1, 0.1), ("0.1", 0.1), (1, 1.0),
                                             ("1e-1", 0.1), (np.float64(0.1), 0.1)])
def test_epsilon_is_a_number_or_a_fraction(value, expected):
    built = Config.from_dict({"threat": {"epsilon": value}, "attack": {"step_size": 0.01}}).threat.epsilon
    assert built == expected and type(built) is float


@pytest.mark.parametrize("value", ["0.4,0.8", "(0.4, 0.8)", "[0.4,0.8]", "2/5,4/5", (0.4, 0.8), [0.4, "0.8"]])
def test_milestones_are_a_list_of_numbers(value):
    assert Config.from_dict({"optimizer": {"milestones": value}}).optimizer.milestones == (0.4, 0.8)


@pytest.mark.parametrize("path, value, expected", [
    ("data.examples", "None", None), ("data.examples", "none", None), ("data.examples", "12", 12), ("data.flip", "true", True),
    ("data.flip", "False", False), ("training.epochs", 3, 3.0), ("training.steps", 1e3, 1000), ("method.igdm", 0, 0.0),
    ("seed", np.int64(3), 3)])
def test_values_of_another_type_that_mean_the_same(path, value, expected):
    built = config_with(path, value)
    for name in path.split("."):
        built = getattr(built, name)
    assert built == expected and type(built) is type(expected)


def config_with(path, value):
    return Config.from_dict(configs.override(configs.config_dict_of(Config()), {path: value}))


@pytest.mark.parametrize("path, value, words", [
    ("seed", 1.5, "whole number"), ("seed", True, "whole number"), ("seed", -1, "[0, 2**32)"), ("seed", 2**32, "[0, 2**32)"),
    ("seed", None, "whole number"), ("student", 5.5, "text"), ("student", "resnt18", 'did you mean "resnet18"?'),
    ("dtype", "float16", "bfloat16"), ("data.flip", 1, "true or false"), ("data.flip", "maybe", "true or false"),
    ("data.examples", 0, "above 0"), ("data.examples", "8/3", "whole number or None"),
    ("data.validation_fraction", 1, "between 0 and 1"), ("data.shift", -1, "0 (none) or above"),
    ("threat.norm", "l7", '"linf" or "l2"'), ("threat.epsilon", 0, "above 0"), ("threat.epsilon", -0.1, "above 0"),
    ("threat.epsilon", 8, "8/255 instead of 8"), ("threat.epsilon", "8/0", "8/255"), ("threat.epsilon", "nan", "8/255"),
    ("threat.epsilon", float("inf"), "8/255"), ("threat.epsilon", None, "8/255"), ("threat.epsilon", [0.1], "8/255"),
    ("attack.steps", 0, "above 0"), ("attack.step_size", 0.2, "2 epsilon"), ("attack.step_size", 0, "above 0"),
    ("method.name", "ardd", 'did you mean "ard"?'), ("method.igdm", -1, "0 or above"), ("method.igdm_ramp", "cubic", "linear"),
    ("optimizer.name", "adam", '"sgd", "lars" or "lamb"'), ("optimizer.scaling", "square", '"none", "linear" or "sqrt"'),
    ("optimizer.scaling_batch", 0, "above 0"), ("optimizer.trust_coefficient", 0, "above 0"),
    ("optimizer.betas", "0.9", "two decays"), ("optimizer.betas", (0.9, 1), "two decays"),
    ("optimizer.warmup", "2 weeks", '"2 epochs"'), ("optimizer.warmup", "100%", "[0, 1)"),
    ("optimizer.warmup", "200 epochs", "shorter than training"), ("optimizer.warmup", None, "a duration"),
    ("training.examples", 0, "above 0"), ("training.examples", "1 epoch", "whole number or None"),
    ("training.checkpoint_every", "often", '"2 epochs"'), ("training.checkpoint_every", 1.5, "500"),
    ("training.log_every", "0 steps", "above 0"), ("training.log_every", None, "a duration"),
    ("training.keep_every", "0%", "above 0 or None"), ("training.swa_every", -1, "a duration"),
    ("training.swa_start", 0, "(0, 1]"), ("training.swa_start", 1.5, "(0, 1]"),
    ("training.label_smoothing", 1, "[0, 1)"), ("training.label_smoothing", -0.1, "[0, 1)"),
    ("optimizer.learning_rate", 0, "above 0"), ("optimizer.momentum", 1, "[0, 1)"),
    ("optimizer.schedule", "steps", '"step" or "cosine"'), ("optimizer.milestones", (0.5, 80), "fractions"),
    ("optimizer.milestones", "a,b", "list of numbers"), ("optimizer.milestones", None, "list of numbers"),
    ("optimizer.milestones", True, "list of numbers"), ("optimizer.warmup", 1, "[0, 1)"),
    ("training.steps", 0, "above 0"), ("training.epochs", None, "above 0"), ("training.batch_size", 0, "above 0"),
    ("training.weight_average", 1, "[0, 1)"), ("training.log_every", 0, "above 0"),
    ("training.checkpoint_every", 0, "above 0 or None"), ("training.keep", 0, "above 0")])
def test_a_bad_value_is_named_with_its_field_and_what_it_must_be(path, value, words):
    with pytest.raises(InputError) as raised:
        config_with(path, value)
    message = str(raised.value)
    assert message.startswith(f"config.{path}") and words in message and "\n" not in message
    if isinstance(value, int | float):
        assert repr(value) in message or f"{value:g}" in message


def test_every_field_is_checked_for_its_type():
    for path in configs._all_paths():
        if configs.unknown_field(path) is None and path != "method":
            with pytest.raises(InputError, match=f"^config.{path} is "):
                config_with(path, {"a": 1})


def test_l2_radii_may_exceed_one():
    assert Config.from_dict({"threat": {"norm": "l2", "epsilon": 2}}).threat.epsilon == 2


@pytest.mark.parametrize("values, words", [
    ({"optimizer": {"lerning_rate": 1}}, ["config.optimizer.lerning_rate", "did you mean config.optimizer.learning_rate?"]),
    ({"method": {"ard_tau": 1}}, ["config.method.ard_tau", "did you mean config.method.ard_"]),
    ({"method": {"dgad_corection": "mix"}}, ["did you mean config.method.dgad_correction?"]),
    ({"lr": 1}, ["config.lr", "config.optimizer.learning_rate?"]),
    ({"epsilon": 1}, ["config.epsilon", "config.threat.epsilon?"]),
    ({"steps": 1}, ["config.steps", "config.attack.steps or config.training.steps?"]),
    ({"thread": {"epsilon": 1}}, ["config.thread", "config.threat?"]),
    ({"xyz": 1}, ["config.xyz", "known: attack, bn_groups, data"]),
    ({1: 1}, ["config.1", "known: attack, bn_groups, data"]),
    ({"threat": 5}, ["config.threat is 5", "section"]),
    ({"data": None}, ["config.data is None", "section"]),
    (5, ["config is 5"])])
def test_an_unknown_field_is_named_with_the_nearest_known_one(values, words):
    refuse(values, *words)


def test_a_method_that_distils_needs_a_teacher():
    refuse({"method": "ard"}, "config.teacher is empty", "--config.teacher=runs/teacher")
    refuse({"method": "pgd_at+igdm"}, "config.teacher is empty")
    refuse({"method": {"igdm": 3}}, "config.teacher is empty")
    assert not Config.from_dict({"method": {"name": "pgd_at+igdm", "igdm": 0}}).build_method().needs_teacher


def test_length_of_training():
    def steps(**training):
        return Config.from_dict({"training": {"batch_size": 50, **training}}).steps(1000)

    assert steps(epochs=3) == 60
    assert steps(epochs=3, steps=7) == 7
    assert steps(epochs=0.001) == 1
    assert steps(examples=140) == 3
    assert steps(examples=1000, epochs=None) == 20
    assert steps(examples=1) == 1
    refuse({"training": {"steps": 3, "examples": 100}}, "config.training.examples is 100", "--config.training.steps=None")


def test_a_config_dict_is_edited_as_in_a_notebook():
    config = digits.get_config("pgd_at")
    config.threat.epsilon = 0.1
    assert Config.from_dict(config).threat.epsilon == 0.1
    config.threat.epsilon = "8/255"
    config.attack.step_size = "2/255"
    config.data.examples = None
    built = Config.from_dict(config)
    assert (built.threat.epsilon, built.data.examples) == (8 / 255, None)
    config.data.examples = 50
    assert Config.from_dict(config).data.examples == 50
    with pytest.raises(AttributeError, match="epsilon"):
        config.threat.epsilonn = 0.1
    with pytest.raises(AttributeError, match="epsilon"):
        _ = config.threat.epsilonn


def test_a_config_dict_of_ones_own():
    config = config_dict.ConfigDict({"seed": 3, "method": "pgd_at", "threat": {"epsilon": 0.1}})
    assert Config.from_dict(config) == Config.from_dict({"seed": 3, "threat": {"epsilon": 0.1}})


def test_sections_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().threat.epsilon = 1


PRESETS = ["teacher", *(base + module for base in ("pgd_at", "ard", "rslad") for module in ("", "+igdm"))]


@pytest.mark.parametrize("module", [digits, cifar10])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid(module, preset):
    config = Config.from_dict(module.get_config(preset))
    assert config.build_method().name == ("pgd_at" if preset == "teacher" else preset)
    assert bool(config.teacher) == (preset not in ("teacher", "pgd_at"))


@pytest.mark.parametrize("module", [digits, cifar10])
@pytest.mark.parametrize("argument, words", [
    ("ardd", ['"ardd"', 'did you mean "ard"?', "teacher"]), ("teachr", ['did you mean "teacher"?']),
    ("teacher+igdm", ['"teacher+igdm"']), ("ard+igmd", ['did you mean "ard+igdm"?']), ("ard,seed", ['"seed"', "field=value"]),
    ("ard,sead=3", ["config.sead", "config.seed?"]), ("ard,threat=3", ["config.threat is a section"]),
    ("ard,threat.x.y=3", ["config.threat.x"]), ("ard,=3", ["no such field"])])
def test_a_bad_argument_of_a_config_file(module, argument, words):
    assert_input_error(lambda: module.get_config(argument), *words)


def test_an_argument_overrides_fields():
    argument = "rslad+igdm,seed=3,student=resnet6_w4,threat.epsilon=8/255,attack.step_size=2/255,method.igdm=4"
    config = Config.from_dict(digits.get_config(argument))
    assert (config.seed, config.student, config.threat.epsilon) == (3, "resnet6_w4", 8 / 255)
    assert (config.method.name, config.method.igdm) == ("rslad+igdm", 4.0)
    assert Config.from_dict(digits.get_config("ard,method=rslad")).method.name == "rslad"
    assert digits.get_config("") == digits.get_config() == digits.get_config("ard+igdm")


def test_difference_names_the_first_field_and_both_values():
    old, new = (Config.from_dict({"threat": {"epsilon": epsilon}}).to_dict() for epsilon in (0.1, 0.2))
    assert configs.difference(old, new) == ("threat.epsilon", 0.1, 0.2)
    assert configs.difference(old, {**old, "extra": 1}) == ("extra", None, 1)
    assert configs.difference({**old, "threat": 5}, old)[0] == "threat"


def test_describe_gives_every_field_once():
    lines = configs.describe(Config()).splitlines()
    leaves = [path for path in configs._all_paths() if not any(other.startswith(f"{path}.") for other in configs._all_paths())]
    assert [line.split(" = ")[0] for line in lines] == leaves
