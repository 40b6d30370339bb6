"""The edge where names and numbers of a configuration become a method: "adaad+igdm" and its options.

Every option is a field of `MethodConfig`, named after the builder that takes it: `trades_beta` is `trades(beta=...)`.
"""

import dataclasses
import difflib
import inspect
import numbers
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxrd.distillation import methods, modules
from jaxrd.distillation.composition import Method, Ramp
from jaxrd.distillation.inner_maximisation import (
    Attack, cross_entropy_attack, teacher_fixed_attack, teacher_moving_attack, trades_attack)
from jaxrd.distillation.path_method import path
from jaxrd.errors import InputError, choose, need, suggest


def documented(default, doc: str):
    """A configuration field with its documentation."""
    return dataclasses.field(default=default, metadata={"doc": doc})


@dataclasses.dataclass(frozen=True)
class MethodConfig:
    """Which method, and every option of every method: those of others than `name` are not looked at."""

    name: str = documented("pgd_at", "pgd_at, trades, mart, ard, iad, akd, rslad, adaad, adaiad, dgad or path, then any of "
                                     "+igdm, +jvp, +direct, +awp")
    attack: str = documented("", 'inner loss and start of another method (not for path): "ce", "trades", "rslad" or "adaad"')
    # What the modules weigh: a number adds the module (0: leaves it out), whatever the name says.
    igdm: float | None = documented(None, 'weight alpha of the IGDM term; None: 10 with "+igdm" in the name, else 0')
    jvp: float | None = documented(None, 'weight of exact directional matching; None: 10 with "+jvp" in the name, else 0')
    direct: float | None = documented(None, 'weight of direct gradient matching; None: 10 with "+direct" in the name, else 0')
    awp: float | None = documented(None, 'gamma of weight perturbation; None: 0.005 with "+awp" in the name, else 0')
    igdm_ramp: str = documented("linear", '"linear" (alpha * e/E) or "constant", of igdm, jvp and direct alike')
    igdm_distance: str = documented("kl", '"kl" of the softmax of the logit differences, or their "l1" or "l2" distance')
    igdm_direction: str = documented("attack", 'delta: the "attack"\'s perturbation or a "random" one')
    igdm_beta: float = documented(1.0, "forward point x + beta delta")
    igdm_gamma: float = documented(1.0, "mirrored point x - gamma delta; 0, as with igdm_control=trades: S(x) itself")
    igdm_control: str = documented("none", 'controls without a teacher: "zero", "mirror" or "trades" (IGDM, appendix A.5)')
    mirrored_statistics: bool = documented(False, "let S(x - delta) move the BatchNorm running statistics (published code)")
    published_forwards: bool = documented(False, "repeat published student forwards, for running statistics: ard, trades, "
                                                 "adaad, and ard, rslad and adaad with +igdm")
    direct_scalar: str = documented(
        "probability", 'what is differentiated: "probability", "logit", "cross_entropy" or "margin"')
    direct_distance: str = documented("l2", '"l2", "squared_l2" or "cosine"')
    direct_at: str = documented("clean", 'where: "clean" or "adversarial"')
    awp_warmup: float = documented(0.0, "fraction of training without weight perturbation")
    trades_beta: float = documented(6.0, "weight of KL(S(x) || S(x'))")
    trades_detach: bool = documented(False, "no gradient into the target S(x)")
    mart_beta: float = documented(5.0, "weight of the divergence: 5 for ResNets, 6 for wide ones as published")
    ard_temperature: float = documented(1.0, "tau; the original paper's is 30")
    ard_alpha: float = documented(1.0, "weight of the teacher against the hard label")
    ard_reduction: str = documented("batchmean", '"batchmean", or "mean": over classes too, as the original code')
    iad_temperature: float = documented(1.0, "tau of the teacher's term")
    iad_alpha: float = documented(1.0, "weight of teacher and introspection against the hard label")
    iad_beta: float = documented(0.1, "exponent of the reliability p_T(x')[y]^beta")
    iad_warmup: float = documented(0.3, "fraction of training before introspection begins (published: epoch 60 of 200)")
    iad_weighting: str = documented("self", 'reliability weighs the "self"-target (code), or "both": the teacher too (text)')
    akd_weight: float = documented(0.5, "weight of the teacher against the hard label (unpublished)")
    akd_target: str = documented("adversarial", 'where the teacher is asked: "adversarial" or "clean" (unpublished)')
    rslad_scale: float = documented(0.1, "factor of the RSLAD loss: 0.1 as published, 1 for the plain batch mean")
    adaad_weight: float = documented(1.0, "lambda: weight of x' against x")
    adaad_reduction: str = documented("batchmean", '"batchmean", or "mean": over classes too, as published on CIFAR-10')
    adaiad_temperature: float = documented(1.0, "tau; 30 in the published code")
    adaiad_alpha: float = documented(1.0, "weight of teacher and introspection against the hard label")
    adaiad_beta: float = documented(0.1, "exponent of the reliability")
    adaiad_warmup: float = documented(0.3, "fraction of training before introspection begins")
    adaiad_weighting: str = documented("self", '"self" or "both", as iad_weighting')
    dgad_beta: float = documented(1.0, "weight of predictive consistency")
    dgad_consistency: str = documented("mse", '"mse" of the probabilities (code) or their "l2" distance (text)')
    dgad_correction: str = documented("swap", 'of a wrong teacher: "swap" (ELS), or the controls "smooth", "mix", "none"')
    dgad_attack: str = documented("adaad", '"adaad", or "rslad": its attack and its target T(x)')
    dgad_scale: float = documented(1.0, "factor of the distillation part (0.5 in the published code for MobileNetV2)")
    dgad_product: bool = documented(False, "multiply the two parts, as a misplaced parenthesis does in that code")
    dgad_partition: bool = documented(True, "distil on the clean image where the teacher is wrong about it (MAP); false: never")
    # The path method is a reconstruction from the abstract of its paper and later work of the group: see path_method.
    path_alpha: float = documented(1.0, "weight of the paths against KL(T(x) || S(x)) (reconstruction, as all path options)")
    path_gamma: float = documented(1.0, "weight of the targeted path; 0: none")
    path_points: int = documented(10, "points of each path, evenly spaced, the last included; at most attack.steps")
    path_weights: str = documented("drop", '"drop", "uniform", "linear", "last_only", "boundary" or "gap"')
    path_weight_model: str = documented("student", 'whose predictions "drop" and "boundary" look at: "student" or "teacher"')
    path_normalisation: str = documented("per_sample", '"per_sample", "batch" or "none"')
    path_floor: float = documented(0.0, "least weight of a point")
    path_scale: float = documented(1.0, 'scale of the weights "boundary" (in logits) and "gap" (in nats), above 0')
    path_inner_loss: str = documented("cross_entropy", 'climbed: "cross_entropy", "teacher_clean" or "teacher_moving"')
    path_targeted_start: str = documented("negative_image", '"negative_image", "anchor_image" or "anchor_runner_up"')
    path_target_class: str = documented("uniform", 'a random other class, the best other one by "teacher" or "student", or the '
                                               '"least_likely" by the teacher')
    path_align_target: str = documented("teacher_clean", '"teacher_clean" or "teacher_at_point"')
    path_align_distance: str = documented("kl", '"kl", "squared_error", "js" or "l2"')
    path_dual_batch_norm: bool = documented(True, "a BatchNorm set for each branch; the untargeted one's is used at test")
    path_batching: str = documented("joint", 'intermediate points of a branch in one forward, "joint", or "separate" ones')
    path_statistics: bool = documented(False, "let intermediate points move the BatchNorm running statistics")
    path_natural: str = documented("anchor", 'what 1 - path_alpha weighs: the "anchor", or "both" branches\' starts')
    path_hinge: float = documented(0.0, "train a branch only while its mean is above that of this label smoothing; 0: always")
    path_negatives: str = documented("data", 'where negative images of uniform classes come from: the "data", an image of '
                                             'another class for each of the batch, or the "batch" itself')


BASES: dict[str, Callable[..., Method]] = {
    builder.__name__: builder for builder in (
        methods.pgd_at, methods.trades, methods.mart, methods.ard, methods.iad, methods.akd, methods.rslad, methods.adaad,
        methods.adaiad, methods.dgad, path)}
_PUBLISHED = frozenset(BASES)
MODULES: dict[str, float] = {"igdm": 10.0, "jvp": 10.0, "direct": 10.0, "awp": 0.005}  # in this order, with their defaults
RAMPS: dict[str, Ramp] = {"linear": modules.linear_ramp, "constant": jnp.ones_like}
ATTACKS: dict[str, Callable[[], Attack]] = {
    "ce": cross_entropy_attack, "trades": trades_attack, "rslad": teacher_fixed_attack, "adaad": teacher_moving_attack}

# What the text says and what the published code does, where that is not the default (a recommendation). The IGDM paper and
# its code for what is in its tables, else the method's own. What differs outside of the method: `jaxrd.presets`.
# A temperature of 30 weighs its divergence 900 times (ARD: with "mean", by the number of classes less). The alphas of the IGDM
# paper go with temperature 1, as its code has it, although its text says "as the original": search alpha anew with 30.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"ard_temperature": 30.0, "ard_reduction": "mean", "iad_weighting": "both", "dgad_consistency": "l2"},
    "official": {"adaiad_temperature": 30.0, "mirrored_statistics": True, "published_forwards": True},
}

# The student's train-mode forwards of published code, in their order, where they are more than the loss needs. (Not here: IAD
# and AdaIAD forward S(x) once more after their warm-up.)
_PUBLISHED_FORWARDS = {
    "ard": ("adversarial", "clean"),
    "trades": ("clean", "adversarial", "clean"),
    "adaad": ("clean", "adversarial"),
    "ard+igdm": ("adversarial", "clean", "mirrored"),
    "rslad+igdm": ("adversarial", "adversarial", "clean", "mirrored"),
    "adaad+igdm": ("adversarial", "clean", "mirrored", "adversarial"),
}


def method(name: str, *, preset: str = "default", **options) -> Method:
    """Returns a method by its name.

    Args:
      name: a base, then modules: "rslad", "adaad+igdm", "trades+igdm+awp".
      preset: "default", "paper" or "official": what the options below take where they are not given.
      **options: fields of `MethodConfig`. `igdm`, `jvp`, `direct` and `awp` decide by themselves: a number above 0 adds the
        module, 0 leaves it out, None does as the name says, with the weight 10 (awp: 0.005).

    Raises:
      InputError: an unknown name, preset or option, a value out of range, or options that contradict each other.

    Example:
      >>> method("rslad", igdm=10.0).name
      'rslad+igdm'
    """
    base_name, named = parse_name(name)
    choose("method preset", preset, PRESETS)
    known = {field.name: field.default for field in dataclasses.fields(MethodConfig)}
    for option in options:
        if option not in known:
            raise InputError(f"method.{option}: no such option; {suggest(option, known)}")
        _check_type(option, options[option], known[option])
    values = known | PRESETS[preset] | options

    built = dataclasses.replace(BASES[base_name](**_arguments(BASES[base_name], base_name, values)), name=base_name)
    if values["attack"]:
        if base_name == "path":
            raise InputError("method.attack does not fit path, whose attack generates paths; set method.path_inner_loss")
        choose("method.attack", values["attack"], ATTACKS)
        built = dataclasses.replace(built, attack=ATTACKS[values["attack"]]())
    choose("method.igdm_ramp", values["igdm_ramp"], RAMPS)
    ramp = RAMPS[values["igdm_ramp"]]
    for module, default in MODULES.items():
        weight = values[module]
        if weight is None:
            weight = default if module in named else 0.0
        need(weight >= 0, f"method.{module}", weight, "a number of 0 or above")
        if weight == 0:
            continue
        add = getattr(modules, f"with_{module}")
        own = _arguments(add, module, values)
        if module == "igdm":
            own["mirrored_statistics"] = values["mirrored_statistics"]
        if module != "awp":
            own["ramp"] = ramp
        built = add(built, weight, **own)
    if values["published_forwards"]:
        # What the other modules do leaves the running statistics alone, in published code and here.
        plain = "+".join(part for part in built.name.split("+") if part not in ("jvp", "direct", "awp"))
        order = _PUBLISHED_FORWARDS.get(plain, ())
        if {*order} <= {view.name for view in built.views} | {"clean"}:
            built = modules.with_forwards(built, order)
    return built


def register(builder: Callable[..., Method]) -> Callable[..., Method]:
    """Makes a method of one's own known by the name of its function, to configurations and modules too; a decorator.

    In a notebook's process only: whoever reads the run elsewhere, to evaluate it for instance, registers it there first.

    Args:
      builder: called without arguments, returns the method.

    Raises:
      InputError: the name is that of a method of jaxrd, or cannot stand before "+igdm".

    Example:
      >>> @register
      ... def gentle():
      ...     return dataclasses.replace(methods.ard(), attack=trades_attack())
      >>> method("gentle+igdm").name
      'gentle+igdm'
    """
    name = builder.__name__
    if name in (*_PUBLISHED, *MODULES, "teacher") or not name.isidentifier():
        raise InputError(f'method "{name}" cannot be registered: the name is taken or none; define it with def, under another')
    BASES[name] = builder
    return builder


def parse_name(name: str) -> tuple[str, list[str]]:
    """Splits "adaad+igdm" into ("adaad", ["igdm"]); InputError for an unknown base or module, or one given twice."""
    base_name, *named = str(name).split("+")
    if base_name not in BASES:
        raise InputError(
            f'method.name is "{name}"; {suggest(base_name, BASES)} (one of your own: register it in this process first)')
    for module in named:
        if module not in MODULES or named.count(module) > 1:
            known = ", ".join(f'"+{known}"' for known in MODULES)
            close = difflib.get_close_matches(module, MODULES, n=1)
            meant = "+".join(dict.fromkeys([base_name, *(close[0] if other == module else other for other in named)])
                             ) if close else ""
            hint = f'did you mean "{meant}"? ' if meant else ""
            raise InputError(f'method.name is "{name}"; {hint}the modules that can follow a base, once each, are {known}')
    return base_name, named


def _check_type(option: str, value: Any, default: Any) -> None:
    """Raises InputError for a value that the option cannot hold; configurations have been checked before."""
    kind, wanted = {
        bool: (bool, "True or False"), int: (numbers.Integral, "a whole number"), float: (numbers.Real, "a number"),
        str: (str, "a text"), type(None): (numbers.Real | None, "a number or None")}[type(default)]
    if not isinstance(value, kind) or isinstance(value, bool) != isinstance(default, bool):
        raise InputError(f"method.{option} is {value!r}; it must be {wanted}")


def _arguments(builder: Callable, prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    """Returns the options that a builder takes: its argument `beta` is the option "{prefix}_beta"."""
    names = inspect.signature(builder).parameters
    return {name: values[f"{prefix}_{name}"] for name in names if f"{prefix}_{name}" in values and name != "ramp"}
