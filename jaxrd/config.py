"""The configuration of a run: frozen dataclasses that every config file is validated into.

Config files (`configs/*.py`) return an `ml_collections.ConfigDict`, which a notebook edits and the command line overrides;
`Config.from_dict` is the one door from there into the library. Every complaint is one line that names the field, the value
and the way out.
"""

import dataclasses
import difflib
import fractions
import functools
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from jaxrd import config_checks, distillation
from jaxrd.data.augment import Augmentation
from jaxrd.distillation.catalogue import MethodConfig, documented, parse_name
from jaxrd.errors import InputError
from jaxrd.threat import ThreatModel
from jaxrd.training import durations
from jaxrd.training.durations import Duration


# Fields that say how a run is watched and stored, not what it computes: a resumed run may change them.
BOOKKEEPING = (
    "data.directory", "data.resident", "training.log_every", "training.checkpoint_every", "training.keep",
    "training.keep_every", "training.joint_views", "training.cache_teacher", "training.gradient_checkpointing",
    "training.shard_state", "training.writers")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    name: str = documented("jaxrd_digits", "name of a prepared TFDS data set; jaxrd_digits prepares itself")
    arrays: str = documented("", '"train.npz,test.npz" (keys images, labels) instead of a TFDS data set')
    directory: str = documented("", "where TFDS data sets lie; empty: TFDS's own default")
    examples: int | None = documented(None, "train on this many images, as many of each class, drawn by the seed; None: all")
    validation_fraction: float = documented(0.1, "part of the training split held out where there is no validation split")
    selection: str = documented(
        "validation", 'what the best checkpoint is chosen on: "validation" (held out), "last" (nothing: trains on all images, '
        'the last epoch counts), "test" (as some papers do: trains on all images, and its best is optimistic)')
    extra: str = documented("", "further images, such as generated ones with pseudo-labels: a TFDS data set or an .npz file")
    extra_split: str = documented("train", "which split of a TFDS data set `extra` is")
    extra_fraction: float = documented(0.7, "part of every batch that comes from `extra`")
    resident: bool | None = documented(None, "keep the training images on the devices; None: on accelerators, where they fit")
    shift: int = documented(0, "random pad-and-crop, in pixels (papers: 4 on CIFAR)")
    flip: bool = documented(False, "random horizontal flips")
    cutout: int = documented(0, "side in pixels of a random square of zeros; 0: none")
    mixing: str = documented("none", '"mixup" or "cutmix": each image with another one of the batch, labels likewise; "none"')
    mixing_alpha: float = documented(1.0, "of the Beta(alpha, alpha) distribution of mixing weights")
    mixing_probability: float = documented(1.0, "probability that an image is mixed")


@dataclasses.dataclass(frozen=True)
class ThreatConfig:
    norm: str = documented("linf", '"linf" or "l2"')
    epsilon: float = documented(8 / 255, 'radius in pixel units of [0, 1], a number or a fraction such as "8/255"')

    def build(self) -> ThreatModel:
        return ThreatModel(self.norm, self.epsilon)


@dataclasses.dataclass(frozen=True)
class AttackConfig:
    steps: int = documented(10, "gradient steps of the training attack")
    step_size: float = documented(2 / 255, "length of one, in pixel units; at most 2 epsilon")
    start: str = documented("", '"uniform", "gaussian" or "none" instead of the method\'s own start; empty: its own')
    project_start: bool = documented(True, "put the start inside ball and pixel range; published code often does not")
    batch_statistics: bool = documented(False, "BatchNorm of the student by batch statistics inside the attack")
    dtype: str | None = documented(None, "compute dtype of both networks' bodies inside the attack; None: their own")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    name: str = documented("sgd", '"sgd", or for large batches "lars" or "lamb", with a learning rate of their own')
    learning_rate: float = documented(0.1, "peak learning rate, before scaling")
    scaling: str = documented("none", 'of learning_rate: "linear" (times batch_size / scaling_batch), "sqrt" (times its '
                              'square root) or "none"')
    scaling_batch: int = documented(128, "the batch size that learning_rate is meant for")
    momentum: float = documented(0.9, "momentum (sgd, lars)")
    nesterov: bool = documented(False, "Nesterov momentum (sgd, lars)")
    weight_decay: float = documented(5e-4, "weight decay: coupled, on all parameters (lars, lamb: not BatchNorm's nor biases)")
    trust_coefficient: float = documented(0.001, "factor of the trust ratio (lars)")
    betas: tuple[float, ...] = documented((0.9, 0.999), "decays of the two moments (lamb)")
    schedule: str = documented("step", '"step" (papers: divided by 10 at the milestones), "cosine" or "onecycle"')
    milestones: tuple[float, ...] = documented((0.5, 0.75), "fractions of training at which the rate is divided by 10")
    warmup: Duration = documented(0.0, 'linear warm-up to the peak: a fraction of training, or "5 epochs", "500 steps"; '
                                  "onecycle: pct_start, above 0")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    steps: int | None = documented(None, "length of training in steps; None: as `examples` or `epochs` says")
    examples: int | None = documented(None, "length of training in images; None: as `epochs` says")
    epochs: float | None = documented(200.0, "length of training in epochs, where `steps` and `examples` are None")
    batch_size: int = documented(128, "images per step, over all devices")
    accumulation: int = documented(1, "micro-batches that a batch is worked through in, for less memory, to the same update; "
                                      "BatchNorm's statistics are a micro-batch's")
    joint_views: bool = documented(True, "forward the student's views as one batch, each normalised by its own statistics")
    cache_teacher: bool | None = documented(None, "teacher's logits on the training images computed once, where nothing is "
                                            "augmented; None: where that saves time")
    gradient_checkpointing: bool = documented(False, "keep what enters each residual block for the backward pass and compute "
                                              "the rest again: less memory, more time")
    shard_state: bool = documented(False, "optimiser's state and weight average split over the devices, not a copy on each")
    weight_average: float = documented(0.0, "decay of an exponential moving average of the weights; 0: none")
    swa_start: float | None = documented(None, "fraction of training from which weights are averaged equally (SWA), in place "
                                         "of weight_average; None: never")
    swa_every: Duration | None = documented(None, "from one weight that SWA takes to the next; None: an epoch")
    label_smoothing: float = documented(0.0, "s of the labels (1 - s) y + s / classes that the loss reads; attacks read y")
    log_every: Duration = documented(50, 'between two lines of the log: steps, or "1 epoch", "100000 examples", "5%"')
    checkpoint_every: Duration | None = documented(None, "between two validations and checkpoints, likewise; None: 10 per run")
    keep: int = documented(2, "newest checkpoints kept, besides the best one by validation PGD accuracy")
    keep_every: Duration | None = documented(None, "between two checkpoints that are kept for good, likewise, rounded to a "
                                             "multiple of checkpoint_every; None: none are")
    writers: str = documented("", '"tensorboard", "wandb" or both, comma-separated, besides metrics.jsonl (each an extra)')

    @property
    def writer_names(self) -> list[str]:
        return [name.strip() for name in self.writers.split(",") if name.strip()]


@dataclasses.dataclass(frozen=True)
class Config:
    """One run, complete. Built by `Config.from_dict`, which documents what it refuses."""

    seed: int = documented(0, "of everything random in the run")
    method: MethodConfig = MethodConfig()
    student: str = documented("resnet18", "model that is trained: resnet18, wrn34_10, resnet6_w8, ...")
    bn_groups: int | None = documented(
        None, "BatchNorm statistics per group of the batch instead of the whole one (ghost or per-replica BatchNorm): number "
        "of groups; None: the whole batch")
    teacher: str = documented("", "run directory of the teacher, trained or imported (launch.weights); empty: none")
    dtype: str = documented("float32", 'compute dtype of the student\'s body: "float32" or "bfloat16"')
    teacher_dtype: str | None = documented(None, "compute dtype of the teacher's body; None: the one that it was trained with")
    data: DataConfig = DataConfig()
    threat: ThreatConfig = ThreatConfig()
    attack: AttackConfig = AttackConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """Returns the validated configuration.

        Args:
          values: nested mapping (a ConfigDict, or what `to_dict` gave); missing fields take their defaults, and a string for
            `method` stands for `method.name`.

        Raises:
          InputError: an unknown field (with the nearest known one), a value of the wrong type or out of range.
        """
        config = _build(cls, values, "")
        config_checks.check(config)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Returns nested plain dicts that `from_dict` reads back and JSON can hold."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def build_method(self) -> distillation.Method:
        options = dataclasses.asdict(self.method)
        return distillation.method(options.pop("name"), **options)

    def build_augmentation(self) -> Augmentation:
        return Augmentation(**{field.name: getattr(self.data, field.name) for field in dataclasses.fields(Augmentation)})

    def steps(self, train_examples: int) -> int:
        """Returns the length of training in steps."""
        if self.training.steps is not None:
            return self.training.steps
        if self.training.examples is not None:
            return max(1, round(self.training.examples / self.training.batch_size))
        return max(1, round(self.training.epochs * train_examples / self.training.batch_size))

    def intervals(self, train_examples: int) -> durations.Intervals:
        """Returns how often a run on so many images logs, validates, keeps and averages, in steps."""
        training, steps = self.training, self.steps(train_examples)

        def every(duration):
            return max(1, durations.in_steps(duration, steps=steps, batch_size=training.batch_size, epoch=train_examples))

        checkpoint_every = max(steps // 10, 1) if training.checkpoint_every is None else every(training.checkpoint_every)
        # Only what is saved can be kept, and 10 epochs are seldom 10 times the whole steps of one.
        keep_every = None if training.keep_every is None else checkpoint_every * max(
            1, round(every(training.keep_every) / checkpoint_every))
        return durations.Intervals(
            every(training.log_every), checkpoint_every, keep_every, every(training.swa_every or "1 epoch"))


def config_dict_of(config: Config) -> config_dict.ConfigDict:
    """Returns a ConfigDict for a config file's `get_config`, locked: no fields are added, the leaves take values of any type.

    Types are left to `Config.from_dict`, whose complaints are better: an epsilon may be given as "8/255", and None stays
    possible where a field allows it.
    """
    def convert(section):
        if dataclasses.is_dataclass(section):
            return config_dict.ConfigDict(
                {field.name: convert(getattr(section, field.name)) for field in dataclasses.fields(section)})
        return config_dict.FieldReference(section, field_type=object)

    return convert(config).lock()


def parse_argument(
    argument: str, *, default: str, presets: tuple[str, ...] = ("teacher",)
) -> tuple[str, dict[str, str]]:
    """Splits the part of `--config=FILE:ARGUMENT` after the colon.

    Args:
      argument: "rslad+igdm" or "rslad+igdm,student=resnet18": a preset's name, then field=value pairs.
      default: the name where the argument gives none.
      presets: names that are allowed besides those of methods.

    Returns:
      (name, {dotted field: text}).

    Raises:
      InputError: the name is neither a preset nor a method, or a later part is no field=value pair.
    """
    name, overrides = default, {}
    for index, part in enumerate(filter(None, argument.split(","))):
        field, equals, value = part.partition("=")
        if equals:
            overrides[field] = value
        elif index == 0:
            name = part
        else:
            raise InputError(f'config argument "{argument}": "{part}" is not field=value, such as seed=3')
    if name not in presets and (wrong := _unknown_method(name)):
        close = difflib.get_close_matches(name, presets, n=1)
        hint = f'did you mean "{close[0]}"?' if close else f"besides methods: {', '.join(presets)}"
        raise InputError(f'config argument "{argument}": {wrong}; {hint}')
    return name, overrides


def _unknown_method(name: str) -> str | None:
    try:
        parse_name(name)
    except InputError as error:
        return str(error)
    return None


def override(config: config_dict.ConfigDict, overrides: Mapping[str, Any]) -> config_dict.ConfigDict:
    """Sets dotted fields of a ConfigDict, as `parse_argument` split them off, and returns it; InputError for unknown ones.

    "method" stands for "method.name".
    """
    for path, value in overrides.items():
        if wrong := unknown_field(path):
            raise InputError(wrong)
        *sections, name = ("method.name" if path == "method" else path).split(".")
        functools.reduce(lambda section, part: section[part], sections, config)[name] = value
    return config


def describe(config: Config) -> str:
    """Returns every field with its value and meaning, one per line."""
    lines = []

    def visit(section, prefix):
        for field in dataclasses.fields(section):
            value, path = getattr(section, field.name), f"{prefix}{field.name}"
            if dataclasses.is_dataclass(value):
                visit(value, f"{path}.")
            else:
                lines.append(f"{path} = {value!r}".ljust(44) + f"  # {field.metadata['doc']}")

    visit(config, "")
    return "\n".join(lines)


def difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> tuple[str, Any, Any] | None:
    """Returns (field, old value, new value) of the first field in which two nested dicts differ, or None.

    `BOOKKEEPING` fields may differ.
    """
    for name in sorted({*old, *new}):
        a, b = old.get(name), new.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            if found := difference(a, b, f"{prefix}{name}."):
                return found
        elif a != b and f"{prefix}{name}" not in BOOKKEEPING:
            return f"{prefix}{name}", a, b
    return None


def unknown_field(path: str) -> str | None:
    """Returns what is wrong with a dotted field name, or None where it names a field of `Config` that takes a value."""
    section, prefix = Config, ""
    for name in path.split("."):
        known = _types(section) if dataclasses.is_dataclass(section) else {}
        if name not in known:
            return _unknown(f"{prefix}{name}", {f"{prefix}{field}" for field in known})
        section, prefix = known[name], f"{prefix}{name}."
    if dataclasses.is_dataclass(section) and section is not MethodConfig:  # "method" alone is the method's name
        fields = ", ".join(f"config.{prefix}{field}" for field in _types(section))
        return f"config.{path} is a section; set its fields, one by one: {fields}"
    return None


@functools.cache
def _types(section: type) -> dict[str, Any]:
    hints = typing.get_type_hints(section)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


@functools.cache
def _all_paths(section: type = Config, prefix: str = "") -> tuple[str, ...]:
    paths = []
    for name, kind in _types(section).items():
        paths += [f"{prefix}{name}"]
        paths += _all_paths(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else []
    return tuple(paths)


def _unknown(path: str, siblings: set[str]) -> str:
    """Returns the complaint about a field, with its nearest relatives among its siblings or in other sections."""
    parent, _, name = path.rpartition(".")
    by_name = {}
    for known in _all_paths():
        by_name.setdefault(known.rpartition(".")[2], []).append(known)
    # Without its section ("epsilon"), or by its initials ("lr").
    same = [other for other in by_name
            if name == other or "_" in other and name == "".join(word[0] for word in other.split("_"))]
    same = same or difflib.get_close_matches(name, by_name, n=1)
    if not siblings:
        close = [parent]  # a value, which has no fields
    else:
        # Options of one method begin alike: "ard_tau" is none of another's.
        family = {known for known in siblings if "_" in name and known.rpartition(".")[2].split("_")[0] == name.split("_")[0]}
        close = difflib.get_close_matches(path, family or siblings, n=1) or [
            known for other in same for known in by_name[other]]
    hint = (f"did you mean {' or '.join(f'config.{known}' for known in close)}?" if close
            else f"known: {', '.join(sorted(siblings))}")
    return f"config.{path}: no such field; {hint}"


def _build(section: type, values: Any, prefix: str):
    if section is MethodConfig and isinstance(values, str):
        values = {"name": values}
    if not isinstance(values, Mapping | config_dict.ConfigDict):
        raise InputError(f"{f'config.{prefix}'.rstrip('.')} is {values!r}; it must be a section of fields: a mapping")
    known = _types(section)
    for name in values:
        if name not in known:
            raise InputError(_unknown(f"{prefix}{name}", {f"{prefix}{field}" for field in known}))
    built = {}
    for name in values:
        kind, value = known[name], values[name]
        path = f"{prefix}{name}"
        built[name] = _build(kind, value, f"{path}.") if dataclasses.is_dataclass(kind) else _convert(kind, value, path)
    return section(**built)


def _convert(kind: Any, value: Any, path: str):
    """Returns `value` as `kind`, or raises InputError; no silent rounding, no truthiness."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if types.NoneType in options and (value is None or value in ("None", "none")):
        return None
    if {*typing.get_args(Duration)} <= {*options}:
        try:
            return durations.canonical(value)
        except InputError:
            raise InputError(f"config.{path} is {value!r}; it must be {durations.RULE}") from None
    kind = next(option for option in options if option is not types.NoneType)
    wanted = {int: "a whole number", float: 'a number or a fraction such as "8/255"', bool: "true or false", str: "a text",
              tuple[float, ...]: "a list of numbers, such as 0.5,0.75"}[kind]
    wrong = InputError(
        f"config.{path} is {value!r}; it must be {wanted}{' or None' if types.NoneType in options else ''}")
    if typing.get_origin(kind) is tuple:
        if isinstance(value, str):
            value = [part for part in value.strip("()[] ").split(",") if part.strip()]
        try:
            return tuple(_convert(float, item, path) for item in (value if hasattr(value, "__iter__") else [value]))
        except InputError:
            raise wrong from None
    if kind is str:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)  # a directory named 2024 reaches us as a number
        if not isinstance(value, str):
            raise wrong
        return value
    if kind is bool:
        text = str(value).lower()
        if text not in ("true", "false"):
            raise wrong
        return text == "true"
    if isinstance(value, bool):
        raise wrong
    try:
        number = fractions.Fraction(value.replace(" ", "")) if isinstance(value, str) else value
        result = kind(number)
    except (ValueError, ZeroDivisionError, TypeError, OverflowError):
        raise wrong from None
    if kind is int and result != number:
        raise wrong
    if not math.isfinite(result):
        raise wrong
    return result
