"""Published hyper-parameters: the numbers of the papers, what presets change, and that every config file gives valid runs."""

import dataclasses
import importlib

import pytest

from jaxrd import distillation, presets
from jaxrd.config import Config
from jaxrd.distillation import catalogue
from jaxrd.distillation.catalogue import BASES, PRESETS
from jaxrd.presets import from_argument, published
from tests.support import assert_input_error

DATA = ["cifar10", "cifar100", "svhn", "tiny_imagenet"]
FILES = {name: importlib.import_module(f"configs.{name}") for name in ("digits", *DATA)}
NAMES = [*BASES, *(f"{base}+igdm" for base in BASES)]
TEACHERLESS = {"teacher", "pgd_at", "trades", "mart"}


def config_of(file, argument):
    return Config.from_dict(FILES[file].get_config(argument))


@pytest.mark.parametrize("data, student, base, alphas", [
    # IGDM, appendix B.2; with the teachers LTD, BDM-AT, IKL-AT on CIFAR.
    ("cifar100", "resnet18", "pgd_at", [100, 220, 100]), ("cifar100", "resnet18", "ard", [50, 100, 100]),
    ("cifar100", "resnet18", "akd", [50, 25, 40]), ("cifar100", "resnet18", "rslad", [3, 10, 10]),
    ("cifar100", "resnet18", "adaad", [15, 70, 50]), ("cifar100", "resnet18", "adaiad", [15, 70, 50]),
    ("cifar10", "resnet18", "pgd_at", [60, 70, 70]), ("cifar10", "resnet18", "iad", [50, 30, 30]),
    ("cifar10", "resnet18", "akd", [7, 10, 15]), ("cifar10", "resnet18", "rslad", [0.9, 0.9, 1]),
    ("cifar10", "resnet18", "adaad", [5, 10, 5]),
    ("cifar100", "mobilenet_v2", "pgd_at", [150, 160, 160]), ("cifar100", "mobilenet_v2", "trades", [10, 10, 3]),
    ("cifar100", "mobilenet_v2", "rslad", [3, 4, 10]), ("cifar100", "mobilenet_v2", "adaad", [20, 50, 40]),
    ("cifar10", "mobilenet_v2", "trades", [1, 0.5, 0.2]), ("cifar10", "mobilenet_v2", "ard", [10, 8, 9]),
    ("cifar10", "mobilenet_v2", "rslad", [0.5, 0.7, 0.7]),
    ("svhn", "resnet18", "pgd_at", [60]), ("svhn", "resnet18", "adaad", [9]), ("svhn", "resnet18", "akd", [10]),
    ("tiny_imagenet", "preact_resnet18", "pgd_at", [30]), ("tiny_imagenet", "preact_resnet18", "rslad", [1]),
    ("tiny_imagenet", "preact_resnet18", "iad", [20])])
def test_alpha_is_the_published_one(data, student, base, alphas):
    teachers = presets.RECIPES[data].teachers
    found = [published(data, f"{base}+igdm", student=student, teacher_recipe=teacher).method.igdm for teacher in teachers]
    assert found == alphas
    assert published(data, f"{base}+igdm", student=student).method.igdm == alphas[0]
    assert published(data, base, student=student).method.igdm is None


def test_the_alpha_tables_are_complete():
    bases = set(BASES) - set(presets.STARTING_POINTS)
    for (data, _), rows in presets.ALPHA.items():
        assert set(rows) == bases
        assert {len(row) for row in rows.values()} == {len(presets.RECIPES[data].teachers)}
    assert {data for data, _ in presets.ALPHA} == set(presets.RECIPES) == set(DATA)


def test_what_has_no_alpha_takes_that_of_its_nearest_relative():
    def alpha(name, **options):
        return published("cifar100", f"{name}+igdm", **options).method.igdm

    assert (alpha("dgad"), alpha("path"), alpha("mart")) == (alpha("adaad"), alpha("ard"), alpha("ard"))
    assert alpha("ard", student="wrn16_4") == alpha("ard", student="resnet18") != alpha("ard", student="mobilenet_v2")
    assert published("tiny_imagenet", "akd+igdm", student="resnet18").method.igdm == 10


@pytest.mark.parametrize("data, name, preset, epochs, drops", [
    ("cifar10", "ard", "default", 200, [100, 150]), ("cifar100", "adaad+igdm", "paper", 200, [100, 150]),
    ("cifar10", "rslad", "default", 300, [215, 260, 285]), ("cifar100", "rslad+igdm", "paper", 300, [215, 260, 285]),
    ("cifar100", "rslad+igdm", "official", 300, [210, 258, 285]), ("svhn", "ard", "default", 50, [40, 45]),
    ("svhn", "rslad", "official", 50, [40, 45]), ("tiny_imagenet", "ard+igdm", "paper", 100, [50, 80]),
    ("tiny_imagenet", "dgad", "default", 200, [100, 150]), ("cifar10", "trades", "official", 76, [74]),
    ("cifar10", "trades+igdm", "official", 200, [100, 150]), ("tiny_imagenet", "trades", "official", 100, [50, 80]),
    ("cifar10", "mart", "official", 120, [74, 89, 99]), ("cifar10", "teacher", "default", 200, [100, 150]),
    ("cifar10", "teacher", "official", 110, [100, 105])])
def test_length_and_milestones(data, name, preset, epochs, drops):
    config = published(data, name, preset=preset)
    assert config.training.epochs == epochs
    assert [at * epochs for at in config.optimizer.milestones] == pytest.approx(drops)
    assert config.optimizer.schedule == "step"


@pytest.mark.parametrize("data", DATA)
def test_the_text_is_one_protocol_for_all_methods(data):
    for name in (*NAMES, "teacher"):
        for preset in ("default", "paper"):
            config = published(data, name, preset=preset)
            assert (config.threat.norm, config.threat.epsilon) == ("linf", 8 / 255)
            assert (config.attack.steps, config.attack.step_size) == (10, 2 / 255)
            assert (config.attack.start, config.attack.project_start, config.attack.batch_statistics) == ("", True, False)
            optimizer = config.optimizer
            assert (optimizer.learning_rate, optimizer.momentum, optimizer.weight_decay) == (0.1, 0.9, 5e-4)
            assert (config.training.batch_size, config.data.shift, config.data.flip) == (128, 4, True)


@pytest.mark.parametrize("name, weight_decay, step, projected", [
    ("pgd_at", 2e-4, 2 / 225, True), ("ard", 2e-4, 2 / 225, True), ("ard+igdm", 2e-4, 2 / 225, True),
    ("iad+igdm", 2e-4, 2 / 255, True), ("akd", 2e-4, 2 / 255, True), ("iad", 2e-4, 2 / 255, False),
    ("rslad", 2e-4, 2 / 255, False),
    ("rslad+igdm", 2e-4, 2 / 255, False), ("adaad", 5e-4, 2 / 255, False), ("adaad+igdm", 2e-4, 2 / 255, False),
    ("adaiad", 5e-4, 2 / 255, False), ("adaiad+jvp", 2e-4, 2 / 255, False), ("trades", 2e-4, 0.007, False),
    ("trades+igdm", 2e-4, 2 / 255, False), ("trades+awp", 5e-4, 2 / 255, False), ("mart", 3.5e-3, 0.007, False),
    ("mart+igdm", 3.5e-3, 0.007, False), ("dgad", 5e-4, 2 / 255, False), ("dgad+igdm", 5e-4, 2 / 255, False),
    ("path", 5e-4, 2 / 255, True), ("teacher", 5e-4, 2 / 255, True)])
def test_weight_decay_and_attack_of_published_code(name, weight_decay, step, projected):
    config = published("cifar100", name, preset="official")
    assert (config.optimizer.weight_decay, config.attack.step_size, config.attack.project_start) == (
        weight_decay, step, projected)


def test_trades_and_mart_of_published_code_have_their_own_radius_and_rate():
    trades, mart = (published("cifar10", name, preset="official") for name in ("trades", "mart"))
    assert (trades.threat.epsilon, trades.optimizer.learning_rate, trades.method.trades_beta) == (0.031, 0.1, 6)
    assert (mart.threat.epsilon, mart.optimizer.learning_rate, mart.method.mart_beta) == (0.031, 0.01, 5)
    wide = published("cifar10", "mart", preset="official", student="wrn34_10")
    assert (wide.training.epochs, wide.optimizer.learning_rate, wide.optimizer.weight_decay, wide.method.mart_beta) == (
        90, 0.1, 7e-4, 6)
    assert published("cifar10", "trades+igdm", preset="official").threat.epsilon == 8 / 255


@pytest.mark.parametrize("preset", PRESETS)
def test_options_of_methods_are_those_of_the_catalogue(preset):
    for name in ("ard+igdm", "adaiad", "dgad"):
        method = published("cifar100", name, preset=preset).method
        for option, value in PRESETS[preset].items():
            assert getattr(method, option) == value


def test_options_that_depend_on_data_set_and_student():
    def method(data, name, **options):
        return published(data, name, **options).method

    reductions = {(data, name): method(data, name, preset="official").adaad_reduction
                  for data in DATA for name in ("adaad", "adaad+igdm")}
    assert [key for key, value in reductions.items() if value == "mean"] == [("cifar10", "adaad")]
    assert {method("cifar10", "adaad", preset=preset).adaad_reduction for preset in ("default", "paper")} == {"batchmean"}
    assert [method(data, "iad").iad_warmup for data in DATA] == [0.3, 0.4, 0.4, 0.4]
    assert method("cifar100", "adaiad").adaiad_warmup == 0.3
    for data, name, preset, quirk in (
            ("cifar10", "mobilenet_v2", "official", True), ("cifar10", "mobilenet_v2", "default", False),
            ("cifar10", "resnet18", "official", False), ("tiny_imagenet", "mobilenet_v2", "official", False)):
        dgad = method(data, "dgad", student=name, preset=preset)
        assert (dgad.dgad_product, dgad.dgad_scale) == (quirk, 0.5 if quirk else 1)
    assert (method("cifar10", "pgd_at+awp").awp, method("cifar10", "trades+awp").awp) == (0.01, 0.005)
    assert method("cifar10", "trades+igdm+awp").awp_warmup == pytest.approx(9 / 200)
    assert method("cifar10", "ard+awp").awp is method("cifar10", "trades").awp is None
    assert [method("cifar100", "ard+igdm", preset=preset, teacher_recipe="bdm").igdm for preset in PRESETS] == [100, 100, 20]


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_path_method_has_a_one_cycle_rate(data, preset):
    config = published(data, "path+igdm", preset=preset)
    assert (config.training.epochs, config.optimizer.schedule, config.optimizer.warmup) == (200, "onecycle", 0.25)


def test_students_teachers_and_data_sets():
    assert [published(data, "ard").student for data in DATA] == ["resnet18", "resnet18", "resnet18", "preact_resnet18"]
    assert {published(data, "teacher").student for data in DATA} == {"wrn34_10"}
    assert published("svhn", "teacher").method == published("svhn", "pgd_at").method
    assert published("svhn", "ard").teacher == "runs/svhn/teacher"
    assert [published(data, "ard").data.name for data in DATA] == ["cifar10", "cifar100", "svhn_cropped", "tiny_imagenet"]
    augmented = {data: published(data, "ard", preset="official").data.flip for data in DATA}
    assert [data for data in DATA if not augmented[data]] == ["svhn"]


@pytest.mark.parametrize("file", FILES)
def test_every_method_has_a_valid_configuration(file):
    arguments = [(name, "") for name in (*NAMES, "teacher", "trades+igdm+awp", "ard+direct", "pgd_at+awp")]
    if file != "digits":
        arguments = [(name, f",preset={preset}") for name, _ in arguments for preset in PRESETS]
    for name, preset in arguments:
        config = config_of(file, name + preset)
        assert config.build_method().name == ("pgd_at" if name == "teacher" else name)
        assert bool(config.teacher) == (name.removesuffix("+awp") not in TEACHERLESS)
        assert bool(config.teacher) == presets.needs_teacher(name)


@pytest.mark.parametrize("base", BASES)
def test_a_teacher_is_needed_by_all_but_three_bases_alone(base):
    assert presets.needs_teacher(base) == distillation.method(base).needs_teacher == (base not in TEACHERLESS)
    assert presets.needs_teacher(f"{base}+igdm") and not presets.needs_teacher("teacher")


def test_an_argument_chooses_a_row_and_overrides_fields():
    argument = "adaad+igdm,student=mobilenet_v2,preset=official,published_teacher=ikl,seed=3,teacher=runs/t"
    config = config_of("cifar100", argument)
    assert (config.method.igdm, config.student, config.optimizer.weight_decay) == (40, "mobilenet_v2", 2e-4)
    assert (config.seed, config.teacher, config.method.adaiad_temperature) == (3, "runs/t", 30)
    assert config_of("cifar10", "ard+igdm,method.igdm=4,attack.step_size=1/255").method.igdm == 4
    assert FILES["svhn"].get_config("") == FILES["svhn"].get_config()
    assert FILES["svhn"].get_config().method.name == "rslad+igdm"


@pytest.mark.parametrize("file, argument, words", [
    ("cifar10", "ard,preset=offical", ['preset is "offical"', 'did you mean "official"?']),
    ("cifar10", "ard+igdm,published_teacher=ltdd", ['published_teacher is "ltdd"', 'did you mean "ltd"?', "ltd, bdm, ikl"]),
    ("svhn", "ard+igdm,published_teacher=bdm", ['published_teacher is "bdm"', "known: pgd_at"]),
    ("cifar100", "ard,student=resnt18", ["config.student", 'did you mean "resnet18"?']),
    ("tiny_imagenet", "ardd", ['did you mean "ard"?', "teacher"]), ("svhn", "ard,sead=3", ["config.seed?"])])
def test_a_bad_argument_is_answered_in_one_line(file, argument, words):
    assert_input_error(lambda: FILES[file].get_config(argument), *words)


def test_an_unknown_data_set_or_method_is_answered_in_one_line():
    assert_input_error(lambda: published("cifar1O", "ard"), 'data set is "cifar1O"', 'did you mean "cifar10"?')
    assert_input_error(lambda: published("cifar10", "ardd"), 'did you mean "ard"?')


def test_a_registered_method_takes_what_is_published_for_all(monkeypatch):
    monkeypatch.setattr(catalogue, "BASES", dict(BASES))

    @distillation.register
    def gentle():
        return dataclasses.replace(BASES["ard"](), attack=distillation.trades_attack())

    for preset in PRESETS:
        config = published("cifar10", "gentle+igdm", preset=preset)
        assert config.method.igdm is None and config.training.epochs == 200
        assert published("svhn", "gentle", preset=preset).training.epochs == 50


def test_exact_matching_starts_from_the_alpha_of_its_approximation():
    assert published("cifar100", "ard+jvp").method.jvp == published("cifar100", "ard+igdm").method.igdm == 50
    assert published("cifar100", "ard+direct").method.direct is None


@pytest.mark.parametrize("field", ["method", "method.name"])
def test_the_method_is_named_once(field):
    assert_input_error(lambda: from_argument("cifar10", f"ard,{field}=rslad+igdm"), field, '"rslad+igdm,..."')


def test_digits_take_the_method_options_of_a_preset():
    values = FILES["digits"].get_config("ard,preset=paper")
    assert (values.method.ard_temperature, values.method.rslad_scale) == (30.0, 1.0)
    assert_input_error(lambda: FILES["digits"].get_config("ard,preset=offical"), "preset", 'did you mean "official"?')


@pytest.mark.parametrize("name, selection", [
    ("teacher", "test"), ("pgd_at+igdm", "last"), ("trades", "last"), ("ard+igdm", "last"), ("iad", "test"),
    ("iad+igdm", "last"), ("rslad", "last"), ("adaad", "test"), ("adaad+igdm", "last"), ("adaiad", "test"), ("dgad", "test"),
    ("dgad+igdm", "test"), ("mart", "last"), ("path", "validation")])
def test_official_chooses_the_checkpoint_as_the_published_code_does_and_nothing_else_does(name, selection):
    assert published("cifar10", name, preset="official").data.selection == selection
    assert published("cifar10", name, preset="paper").data.selection == "validation"
    assert published("cifar10", name).data.selection == "validation"
