"""Names and options become methods, and nonsense becomes one line."""

import dataclasses
import inspect

import jax.numpy as jnp
import pytest

from jaxrd import distillation
from jaxrd.distillation import catalogue, method, methods, modules
from jaxrd.distillation.catalogue import BASES, MODULES, PRESETS, MethodConfig
from tests.support import assert_input_error

FIELDS = {field.name: field.default for field in dataclasses.fields(MethodConfig)}


def test_every_argument_of_a_builder_is_an_option_with_the_same_default():
    taken = {"name", "attack", *MODULES, "igdm_ramp", "mirrored_statistics", "published_forwards"}
    builders = [*BASES.items(), *((module, getattr(modules, f"with_{module}")) for module in MODULES)]
    for prefix, builder in builders:
        for name, parameter in inspect.signature(builder).parameters.items():
            if name in ("base", "weight") and prefix in MODULES or name in ("ramp", "mirrored_statistics") or (
                    prefix == "awp" and name == "gamma"):
                continue
            assert FIELDS[f"{prefix}_{name}"] == parameter.default, (prefix, name)
            taken.add(f"{prefix}_{name}")
    assert taken == set(FIELDS)


def test_options_reach_their_builder():
    assert method("trades", trades_beta=3.0).terms[1].weight == 3
    assert method("rslad", rslad_scale=1.0).terms[0].weight == pytest.approx(5 / 6)
    assert len(method("path", path_points=4).student_views) == 10
    assert method("ard+awp", awp_warmup=0.2).weight_perturbation.warmup == 0.2


def test_presets_name_options_that_exist():
    for values in PRESETS.values():
        assert set(values) <= set(FIELDS)


def test_what_is_given_outweighs_the_preset():
    mirrored = {view.name: view for view in method("pgd_at+igdm", preset="official", mirrored_statistics=False).views}
    assert not mirrored["mirrored"].updates_statistics
    assert {view.name: view for view in method("pgd_at+igdm", preset="official").views}["mirrored"].updates_statistics


def test_a_number_decides_whatever_the_name_says():
    assert method("ard+igdm", igdm=0).name == "ard"
    assert method("ard", jvp=1.0, direct=2.0).name == "ard+jvp+direct"
    assert method("ard+awp+igdm").name == "ard+igdm+awp"  # one order, so that one method has one name
    assert method("ard+awp").weight_perturbation.gamma == MODULES["awp"]


def test_an_attack_of_another_method():
    swapped = method("adaad+igdm", attack="ce")
    assert swapped.name == "adaad+igdm" and not swapped.attack.teacher
    assert [term.name for term in swapped.terms] == [term.name for term in method("adaad+igdm").terms]


@pytest.mark.parametrize("name, options, words", [
    ("adaadd", {}, ['"adaadd"', 'did you mean "adaad"?']),
    ("adaad+igmd", {}, ['did you mean "adaad+igdm"?', '"+awp"']),
    ("adaad+awp+awp", {}, ["once each"]),
    ("adaad+trades", {}, ['"adaad+trades"', '"+igdm"']),
    ("", {}, ['method.name is ""', "known: pgd_at"]),
    ("ard", {"preset": "offical"}, ["preset", 'did you mean "official"?']),
    ("ard", {"ard_temprature": 1}, ["method.ard_temprature", 'did you mean "ard_temperature"?']),
    ("ard", {"ard_temperature": 0.0}, ["method.ard_temperature is 0.0", "above 0"]),
    ("ard", {"ard_alpha": 1.5}, ["method.ard_alpha", "[0, 1]"]),
    ("ard", {"ard_reduction": "sum"}, ["method.ard_reduction", "batchmean"]),
    ("ard", {"attack": "pgd"}, ["method.attack", "known: ce"]),
    ("path", {"attack": "ce"}, ["method.attack", "method.path_inner_loss"]),
    ("ard+awp", {"awp": -1.0}, ["method.awp is -1.0"]),
    ("ard+awp", {"awp_warmup": 1.0}, ["method.awp_warmup", "[0, 1)"]),
    ("ard+igdm", {"igdm_distance": "l3"}, ["method.igdm_distance", "known: kl, l1, l2"]),
    ("ard+igdm", {"igdm_direction": "up"}, ["method.igdm_direction", "attack, random"]),
    ("ard+igdm", {"igdm_control": "one"}, ["method.igdm_control", "zero"]),
    ("ard+igdm", {"igdm_beta": -1.0}, ["method.igdm_beta", "0 or above"]),
    ("ard+igdm", {"igdm_beta": 0.0, "igdm_control": "trades"}, ["method.igdm_beta", "trades"]),
    ("ard", {"igdm": "10"}, ["method.igdm is '10'", "a number or None"]),
    ("path", {"path_points": 2.5}, ["method.path_points is 2.5", "whole number"]),
    ("trades", {"trades_detach": 1}, ["method.trades_detach is 1", "True or False"]),
    ("trades", {"trades_beta": float("inf")}, ["method.trades_beta is inf"]),
    ("ard", {"ard_temperature": float("nan")}, ["method.ard_temperature is nan"]),
    ("ard+igdm", {"igdm_beta": 0.0, "igdm_gamma": 0.0}, ["method.igdm_beta", "method.igdm_gamma", "raise one"]),
    ("ard+direct", {"direct_scalar": "loss"}, ["method.direct_scalar", "probability"]),
    ("ard+direct", {"direct_at": "mirrored"}, ["method.direct_at", "clean"]),
    ("iad", {"iad_weighting": "none"}, ["method.iad_weighting", "self, both"]),
    ("iad", {"iad_warmup": 1.0}, ["method.iad_warmup", "[0, 1)"]),
    ("adaiad", {"adaiad_beta": -0.1}, ["method.adaiad_beta", "0 or above"]),
    ("akd", {"akd_weight": 2.0}, ["method.akd_weight", "[0, 1]"]),
    ("dgad", {"dgad_correction": "els"}, ["method.dgad_correction", "known: swap, smooth, mix, none"]),
    ("dgad", {"dgad_beta": -1.0}, ["method.dgad_beta", "0 or above"]),
    ("path", {"path_weights": "dorp"}, ["method.path_weights", 'did you mean "drop"?']),
    ("path", {"path_alpha": 0.0}, ["method.path_alpha", "(0, 1]"]),
    ("path", {"path_points": 0}, ["method.path_points", "1 or above"]),
    # Options that contradict each other.
    ("path", {"path_weights": "uniform", "path_weight_model": "teacher"}, ["method.path_weights", "path_weight_model"]),
    ("path", {"path_weights": "last_only", "path_floor": 0.1}, ["method.path_weights", "path_floor", "path_weights=uniform"]),
    ("path", {"path_targeted_start": "anchor_runner_up", "path_target_class": "teacher"},
     ["method.path_targeted_start", "path_target_class"]),
    ("path", {"path_gamma": 0.0, "path_targeted_start": "anchor_image"}, ["method.path_gamma is 0", "raise it"]),
    ("path", {"path_gamma": 0.0, "path_target_class": "teacher"}, ["method.path_gamma is 0", "raise it"]),
    ("path", {"path_scale": 2.0}, ["method.path_scale", '"drop"']),
    ("path", {"path_floor": 1.0}, ["method.path_floor", "path_weights=uniform"]),
    ("path", {"path_natural": "both"}, ["method.path_natural", "path_alpha below 1"]),
])
def test_nonsense_is_one_line(name, options, words):
    assert_input_error(lambda: method(name, **options), *words)


def test_modules_that_are_given_twice():
    assert_input_error(lambda: distillation.with_awp(method("ard+awp"), 0.1), '"ard+awp"', "already")
    assert_input_error(lambda: distillation.with_jvp(method("ard+jvp"), 1.0), '"ard+jvp+jvp"')


def test_a_registered_method_takes_the_modules_and_no_name_of_ours(monkeypatch):
    monkeypatch.setattr(catalogue, "BASES", dict(BASES))

    @distillation.register
    def gentle():
        return dataclasses.replace(methods.ard(), attack=distillation.trades_attack())

    assert method("gentle+igdm").name == "gentle+igdm" and method("gentle").name == "gentle"

    def ard():
        return methods.ard()

    assert_input_error(lambda: distillation.register(ard), '"ard"', "under another")
    assert_input_error(lambda: distillation.register(lambda: methods.ard()), "lambda", "def")
    for taken in ("teacher", "igdm"):
        ard.__name__ = taken
        assert_input_error(lambda: distillation.register(ard), f'"{taken}"', "under another")


@pytest.mark.parametrize("name, options", [
    ("ard", {"ard_alpha": 0.0}), ("akd", {"akd_weight": 0.0}), ("trades", {"trades_beta": 0.0}), ("mart", {"mart_beta": 0.0})])
def test_a_term_of_weight_0_is_left_out(name, options):
    built = method(name, **options)
    assert not built.needs_teacher and len(built.terms) == len(built.student_views) == 1


def test_a_term_may_not_take_the_name_of_another_metric():
    for name in ("loss", "gradient_norm", "accuracy/clean", "weight/igdm"):
        term = dataclasses.replace(methods.ard().terms[0], name=name)
        assert_input_error(lambda: dataclasses.replace(methods.ard(), terms=(term,)), f'"{name}"', "otherwise")


@pytest.mark.parametrize("network", ["student", "teacher"])
def test_a_term_that_reads_what_it_did_not_ask_for_is_told_how_to(network):
    reads = {"student": lambda s, t, y: s["clean"][:, 0], "teacher": lambda s, t, y: t["mirrored"][:, 0]}[network]
    built = dataclasses.replace(methods.ard(), terms=(
        distillation.Term("mine", reads, student=("adversarial",), teacher=("clean",)),))
    logits = {name: jnp.zeros((2, 3)) for name in ("clean", "adversarial", "mirrored")}
    view = {"student": "clean", "teacher": "mirrored"}[network]
    assert_input_error(
        lambda: built.loss(logits, logits, jnp.zeros(2, int), jnp.float32(1)), '"mine"', f'"{view}"', f"{network}=")


def test_who_differentiates_the_teacher():
    differentiating = {"adaad", "adaiad", "dgad", "ard+jvp", "ard+direct"}
    for name in (*BASES, "ard+igdm", "ard+jvp", "ard+direct"):
        assert method(name).needs_teacher_gradient == (name in differentiating)


def test_unknown_names_at_the_primitives():
    logits, images, labels = jnp.zeros((2, 3)), jnp.zeros((2, 2, 2, 1)), jnp.zeros(2, int)

    def network(images):
        return images.reshape(len(images), -1)[:, :3]

    assert_input_error(lambda: distillation.igdm(logits, logits, logits, logits, "l3"), '"l3"', "known: kl, l1, l2")
    for options in ({"scalar": "loss"}, {"distance": "l1"}):
        assert_input_error(
            lambda: distillation.gradient_matching(network, network, images, labels, **options), "gradient_matching", "known:")
    assert_input_error(lambda: distillation.path_weights(logits, logits[None], labels, "dropp"), '"dropp"', '"drop"')
