"""Published hyper-parameters as data, and `published`, which makes a configuration of them.

Three presets: "default", the recommended reading (temperature 1, batch means, RSLAD's factor 0.1, weight decay 5e-4, steps of
2/255, the rate divided by 10 after half and three quarters); "paper", what the text says; "official", what the published code
does. Text and code are those of IGDM (Lee et al. 2025, appendix B) for what is in its tables, else the method's own. Options
of methods that differ are in `distillation.catalogue.PRESETS`, all else here. What is published nowhere says so.

The alphas of the IGDM paper go with temperature 1, as its code has it: where "paper" (ARD) or "official" (AdaIAD) has 30, which
weighs the distillation far more, search alpha anew.

No published number has been reproduced with these configurations yet.
"""

import dataclasses
from typing import Any

from ml_collections import config_dict

from jaxrd import distillation
from jaxrd.config import (
    AttackConfig, Config, DataConfig, MethodConfig, OptimizerConfig, ThreatConfig, TrainingConfig, config_dict_of,
    override, parse_argument)
from jaxrd.distillation.catalogue import PRESETS, parse_name
from jaxrd.errors import InputError, choose, suggest

# Epochs, and the epochs after which the learning rate is divided by 10.
Schedule = tuple[int, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is published for a data set, whatever the method.

    Attributes:
      data: the data set and its augmentation.
      student: the student of the main tables.
      teachers: the teachers for which IGDM's alpha was searched, in the order of `ALPHA`.
      schedule: of all methods but those of `METHOD_SCHEDULES`.
      two_epochs: steps of 128 images in two epochs: how often to validate (not from a paper).
    """

    data: DataConfig
    student: str
    teachers: tuple[str, ...]
    schedule: Schedule
    two_epochs: int


# IGDM, appendix B.1 and tables 1 to 3 and 14. Teachers: "ltd" (Chen & Lee 2021), "bdm" (Wang et al. 2023) and "ikl" (Cui et al.
# 2023), "pgd_at" of a WRN-34-10 for SVHN, "rift" (Zhu et al. 2023) for Tiny-ImageNet. B.1 has crop and flip for all four data
# sets. Padding 4: the code for CIFAR-100 and its data module for Tiny-ImageNet (8 in later code of the first author).
RECIPES = {
    "cifar10": Recipe(DataConfig(name="cifar10", shift=4, flip=True, validation_fraction=0.02), "resnet18",
                      ("ltd", "bdm", "ikl"), (200, (100, 150)), 766),
    "cifar100": Recipe(DataConfig(name="cifar100", shift=4, flip=True, validation_fraction=0.02), "resnet18",
                       ("ltd", "bdm", "ikl"), (200, (100, 150)), 766),
    "svhn": Recipe(DataConfig(name="svhn_cropped", shift=4, flip=True, validation_fraction=0.02), "resnet18",
                   ("pgd_at",), (50, (40, 45)), 1122),
    "tiny_imagenet": Recipe(DataConfig(name="tiny_imagenet", shift=4, flip=True, validation_fraction=0.02), "preact_resnet18",
                            ("rift",), (100, (50, 80)), 1531),
}

# (method, data set) -> its own schedule. RSLAD: IGDM, B.1, whose 300 epochs are read as CIFAR's, not SVHN's or Tiny-ImageNet's.
# DGAD: defaults of its main.py and main_tiny.py. Path: a reconstruction, with a one-cycle rate, which knows no milestones.
METHOD_SCHEDULES: dict[tuple[str, str], Schedule] = {
    ("rslad", "cifar10"): (300, (215, 260, 285)),
    ("rslad", "cifar100"): (300, (215, 260, 285)),
    ("dgad", "cifar10"): (200, (100, 150)),
    ("dgad", "cifar100"): (200, (100, 150)),
    ("dgad", "tiny_imagenet"): (200, (100, 150)),
    **{("path", data): (200, (100, 150)) for data in RECIPES},
}

# IGDM's alpha by its authors' grid search (appendix B.2): (data set, student) -> base -> one for each teacher of the data set.
# "150 for LTD, 160 for BDM-AT, and IKL-AT" (MobileNetV2, CIFAR-100, PGD-AT) is read as 160 for both.
ALPHA: dict[tuple[str, str], dict[str, tuple[float, ...]]] = {
    ("cifar10", "resnet18"): {
        "pgd_at": (60, 70, 70), "trades": (20, 20, 20), "ard": (5, 10, 10), "iad": (50, 30, 30), "akd": (7, 10, 15),
        "rslad": (0.9, 0.9, 1), "adaad": (5, 10, 5), "adaiad": (5, 10, 5)},
    ("cifar10", "mobilenet_v2"): {
        "pgd_at": (70, 40, 50), "trades": (1, 0.5, 0.2), "ard": (10, 8, 9), "iad": (50, 50, 50), "akd": (15, 15, 15),
        "rslad": (0.5, 0.7, 0.7), "adaad": (10, 10, 10), "adaiad": (10, 10, 10)},
    ("cifar100", "resnet18"): {
        "pgd_at": (100, 220, 100), "trades": (5, 5, 5), "ard": (50, 100, 100), "iad": (20, 50, 50), "akd": (50, 25, 40),
        "rslad": (3, 10, 10), "adaad": (15, 70, 50), "adaiad": (15, 70, 50)},
    ("cifar100", "mobilenet_v2"): {
        "pgd_at": (150, 160, 160), "trades": (10, 10, 3), "ard": (70, 70, 70), "iad": (20, 50, 50), "akd": (30, 30, 30),
        "rslad": (3, 4, 10), "adaad": (20, 50, 40), "adaiad": (20, 50, 40)},
    ("svhn", "resnet18"): {
        "pgd_at": (60,), "trades": (30,), "ard": (50,), "iad": (40,), "akd": (10,), "rslad": (3,), "adaad": (9,),
        "adaiad": (9,)},
    ("tiny_imagenet", "preact_resnet18"): {
        "pgd_at": (30,), "trades": (20,), "ard": (10,), "iad": (20,), "akd": (10,), "rslad": (1,), "adaad": (10,),
        "adaiad": (10,)},
}

# NOT published: no alpha was searched for these bases. A starting point is that of a method with a like loss: DGAD distils on
# AdaAD's points, the path method on those of the cross-entropy, as ARD; MART, which has no teacher, takes ARD's too.
STARTING_POINTS = {"dgad": "adaad", "path": "ard", "mart": "ard"}

# AWP's gamma and the fraction of training without it, as its code has them (csdongxian/AWP: TRADES from the 10th of 200 epochs
# on). For other bases nothing is published, and the default stays.
AWP = {"pgd_at": (0.01, 0.0), "trades": (0.005, 9 / 200)}

# What the code of IGDM does for the methods of its tables, besides weight decay 2e-4. There are scripts for ARD, RSLAD and
# AdaAD on CIFAR-100; the other methods are taken to do alike. Its PGD steps 2/225 by default, and so in the ARD script, and
# clips its start. RSLAD, AdaAD and, in its own code, TRADES do neither. (IGDM's TRADES helper does both; no script calls it.)
IGDM_CODE: dict[str, dict[str, Any]] = {
    **{base: {"attack.step_size": 2 / 225} for base in ("pgd_at", "ard")},
    **{base: {} for base in ("iad", "akd")},  # no script, and IAD's own code steps 2/255
    **{base: {"attack.project_start": False} for base in ("trades", "adaad", "adaiad")},
    "rslad": {"attack.project_start": False, "schedule": (300, (210, 258, 285))},
}

# What the code of the methods' own authors does. The preset "official" follows it for what is not in IGDM's tables, and for
# these baselines, without gradient matching. "data.selection" is how their code chooses a checkpoint. "schedule" holds on
# CIFAR; SVHN and Tiny-ImageNet keep theirs. Where a rate drops "at epoch 75", counted from 1, it drops after 74.
_BEST_ON_TEST = {"data.selection": "test"}  # by PGD-10
_TRADES_BUDGET = {"threat.epsilon": 0.031, "attack.step_size": 0.007, "attack.project_start": False}
OWN_CODE: dict[str, dict[str, Any]] = {
    # boyellow/AdaAD: its PGD-AT, by which its teacher for CIFAR-10 is trained, and AdaAD with weight decay 5e-4. That is also
    # what IGDM's AdaAD baseline has, unlike its AdaAD+IGDM.
    "teacher": {"attack.start": "gaussian", "schedule": (110, (100, 105)), **_BEST_ON_TEST},
    "adaad": {"attack.project_start": False, **_BEST_ON_TEST},
    "adaiad": {"attack.project_start": False, **_BEST_ON_TEST},
    # ZFancy/IAD, whose attack also moves the running statistics with every forward: not reproduced.
    "iad": {"attack.project_start": False, "attack.batch_statistics": True, "optimizer.weight_decay": 2e-4,
            **_BEST_ON_TEST},
    # yaodongyu/TRADES, train_trades_cifar10.py; csdongxian/AWP, trades_AWP/train_trades_cifar.py.
    "trades": {**_TRADES_BUDGET, "optimizer.weight_decay": 2e-4, "schedule": (76, (74,))},
    "trades+awp": {"attack.project_start": False, "schedule": (200, (99, 149))},
    # YisenWang/MART, train_resnet.py and, for wide ResNets, train_wideresnet.py.
    "mart": {**_TRADES_BUDGET, "optimizer.learning_rate": 0.01, "optimizer.weight_decay": 3.5e-3,
             "schedule": (120, (74, 89, 99))},
    "mart (wide)": {**_TRADES_BUDGET, "optimizer.weight_decay": 7e-4, "schedule": (90, (74, 89))},
    # kunsaram01/DGAD.
    "dgad": {"attack.project_start": False, **_BEST_ON_TEST},
    # No code of the path method was available.
    "path": {"data.selection": "validation"},
}


def published(
    data: str, name: str, *, preset: str = "default", student: str | None = None, teacher_recipe: str | None = None,
) -> Config:
    """Returns the published configuration of a method on a data set.

    L-infinity, epsilon 8/255, 10 steps of 2/255; SGD 0.1 with momentum 0.9 and weight decay 5e-4, save where a preset differs.
    Batch size 128, as in the code of IGDM, RSLAD, AdaAD and DGAD; IGDM's text gives none, and for SVHN no code is published.

    Args:
      data: "cifar10", "cifar100", "svhn" or "tiny_imagenet".
      name: a method, "adaad+igdm", or "teacher": PGD-AT of a WRN-34-10, the run that other configurations look for.
      preset: "default", "paper" or "official": see above.
      student: model; None: that of the main tables. One without a published alpha takes the alphas of that one.
      teacher_recipe: the teacher whose alpha is taken, of "ltd", "bdm" and "ikl" on CIFAR (None: "ltd"); SVHN and
        Tiny-ImageNet have one each. It selects a number only: which model teaches is `teacher`, a run directory.

    Raises:
      InputError: an unknown data set, method, preset, student or teacher.

    Example:
      >>> published("cifar100", "ard+igdm", teacher_recipe="bdm").method.igdm
      100.0
    """
    choose("data set", data, RECIPES)
    recipe = RECIPES[data]
    if teacher_recipe not in (None, *recipe.teachers):
        raise InputError(f'published_teacher is "{teacher_recipe}"; {data}: {suggest(teacher_recipe, recipe.teachers)}')
    base, modules = parse_name("pgd_at" if name == "teacher" else name)
    student = student or ("wrn34_10" if name == "teacher" else recipe.student)

    fields = _official(data, name, base, modules, student) if preset == "official" else {}
    epochs, milestones = fields.pop("schedule", None) or METHOD_SCHEDULES.get((base, data), recipe.schedule)
    options = method_preset(preset) | _method_options(data, base, modules, student, preset, teacher_recipe)
    config = Config(
        method=MethodConfig("+".join([base, *modules]), **options),
        student=student,
        teacher=f"runs/{data}/teacher" if needs_teacher(name) else "",
        data=recipe.data,
        threat=ThreatConfig("linf", 8 / 255),
        attack=AttackConfig(steps=10, step_size=2 / 255),
        optimizer=OptimizerConfig(
            learning_rate=0.1, momentum=0.9, weight_decay=5e-4, milestones=tuple(epoch / epochs for epoch in milestones)),
        training=TrainingConfig(epochs=float(epochs), batch_size=128, checkpoint_every=recipe.two_epochs),
    )
    if base == "path":  # a reconstruction: the base trainer of later code of the same group
        fields |= {"optimizer.schedule": "onecycle", "optimizer.warmup": 0.25}
    return Config.from_dict(override(config_dict_of(config), fields))


def from_argument(data: str, argument: str, *, default: str = "rslad+igdm") -> config_dict.ConfigDict:
    """Returns what a config file's `get_config` does: `published` for "adaad+igdm,student=mobilenet_v2,preset=official".

    "preset" and "published_teacher" are arguments of `published`, and so is "student"; all else overrides fields.
    """
    name, overrides = parse_argument(argument, default=default)
    for field in ("method", "method.name"):
        if field in overrides:  # its alpha, epochs and milestones would be those of another method
            raise InputError(
                f'config argument "{argument}": {field} is what the argument begins with: "{overrides[field]},..."')
    config = published(data, name, preset=overrides.pop("preset", "default"), student=overrides.get("student"),
                       teacher_recipe=overrides.pop("published_teacher", None))
    return override(config_dict_of(config), overrides)


def method_preset(preset: str) -> dict[str, Any]:
    """Returns the options of methods in which a preset differs from the default; InputError for an unknown one."""
    choose("preset", preset, PRESETS)
    return PRESETS[preset]


def needs_teacher(name: str) -> bool:
    """Whether a run needs a teacher: all do but "teacher" itself and pgd_at, trades and mart without gradient matching."""
    return name != "teacher" and distillation.method(name).needs_teacher


def _method_options(
    data: str, base: str, modules: list[str], student: str, preset: str, teacher_recipe: str | None
) -> dict[str, Any]:
    """Returns the options of methods that depend on data set, student or teacher."""
    options: dict[str, Any] = {}
    if base == "iad" and data != "cifar10":
        options["iad_warmup"] = 0.4  # from epoch 80 of 200: later code of IGDM's first author; IAD's own has 60 throughout
    if base == "mart" and "wrn" in student:
        options["mart_beta"] = 6.0
    matching = [module for module in ("igdm", "jvp") if module in modules]  # for +jvp, its limit, a starting point
    if matching and STARTING_POINTS.get(base, base) in ALPHA[data, RECIPES[data].student]:
        rows = ALPHA.get((data, student)) or ALPHA[data, RECIPES[data].student]
        recipes = RECIPES[data].teachers
        teacher_recipe = teacher_recipe or recipes[0]
        alpha = float(rows[STARTING_POINTS.get(base, base)][recipes.index(teacher_recipe)])
        if preset == "official" and (data, student, base, teacher_recipe) == ("cifar100", "resnet18", "ard", "bdm"):
            alpha = 20.0  # cifar100.sh, the only launch file there is; the paper's is 100
        options |= dict.fromkeys(matching, alpha)
    if "awp" in modules and base in AWP:
        options["awp"], options["awp_warmup"] = AWP[base]
    if preset == "official":
        if data == "cifar10" and base == "adaad" and not _matches_gradients(modules):
            options["adaad_reduction"] = "mean"  # AdaAD's code, there only; IGDM's has the batch mean
        if data in ("cifar10", "cifar100") and base == "dgad" and student == "mobilenet_v2":
            options |= {"dgad_scale": 0.5, "dgad_product": True}
    return options


def _official(data: str, name: str, base: str, modules: list[str], student: str) -> dict[str, Any]:
    """Returns what published code does otherwise than the text: fields and their values, and a "schedule"."""
    if name == "teacher":
        own = OWN_CODE["teacher"]
    elif base in IGDM_CODE and _matches_gradients(modules):
        own = None
    elif base == "mart" and "wrn" in student:
        own = OWN_CODE["mart (wide)"]
    else:
        own = OWN_CODE.get("+".join([base, *({"awp"} & {*modules})]), OWN_CODE.get(base))
    # No published code holds images out; where none is named as the best, the last epoch counts.
    fields = {"data.selection": "last"}
    fields |= {"optimizer.weight_decay": 2e-4, **IGDM_CODE.get(base, {})} if own is None else own
    if data in ("svhn", "tiny_imagenet"):
        fields.pop("schedule", None)
    if data == "svhn":  # the data module beside IGDM's code, and later code of its first author
        fields |= {"data.shift": 0, "data.flip": False}
    return fields


def _matches_gradients(modules: list[str]) -> bool:
    return bool({"igdm", "jvp", "direct"} & {*modules})
