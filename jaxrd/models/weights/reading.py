"""Weights from the files of others to a model and its variables, without PyTorch and without executing what a file holds."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrd.errors import InputError, choose
from jaxrd.models import architectures, published, zoo
from jaxrd.models.deepmind import DeepMindPreActResNet, DeepMindWideResNet
from jaxrd.models.weights import haiku_file, layouts, recognition, safetensors_file, torch_file
from jaxrd.models.weights.accounting import Accounts, account, contents, some
from jaxrd.models.weights.accounting import read as values_of
from jaxrd.models.weights.unpickling import printable

# What --format takes -> what `recognition.kind` may find.
FORMATS = {
    "robustbench": ("torch", "torch_legacy"), "official": ("torch", "torch_legacy"), "torch": ("torch", "torch_legacy"),
    "safetensors": ("safetensors",), "haiku": ("haiku",), "deepmind": ("haiku",)}
_KINDS = {
    "torch": "a PyTorch file", "torch_legacy": "a PyTorch file of the format before 1.6", "safetensors": "a safetensors file",
    "haiku": "a Haiku checkpoint of DeepMind (.npy)"}
# Mean and std by name. CIFAR's are those of DeepMind's and RobustBench's classes, the others those of Wang et al. 2023.
NORMALIZATIONS = {
    "none": None,
    "cifar10": published.CIFAR10,
    "cifar100": published.CIFAR100,
    "svhn": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "tiny_imagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
}
# Classes -> the data set that a model without a name is of.
_BY_CLASSES = {10: "cifar10", 100: "cifar100", 200: "tiny_imagenet"}
SPECIFICATION = "jaxrd_model"  # key of the metadata in which `writing` leaves the model's specification


@dataclasses.dataclass(frozen=True)
class Imported:
    """A model read from a file.

    Attributes:
      model: its specification has the normalisation.
      variables: {"params", "batch_stats"} of float32 NumPy arrays.
      name: published identifier, or architecture.
      published: what is published about it, or None.
      kind: what the file is: see `recognition.kind`.
      accounts: what became of every key of the file.
      dtypes: those other than float32 that were converted, such as ("float16",).
      normalization: where mean and std are from, in words.
    """

    model: zoo.Model
    variables: dict
    name: str
    published: published.Published | None
    kind: str
    accounts: Accounts
    dtypes: tuple[str, ...]
    normalization: str


def read(
    source: str | os.PathLike,
    name: str = "",
    *,
    format: str = "",
    classes: int | None = None,
    image_shape: Sequence[int] | None = None,
    normalization: str | tuple[Sequence[float], Sequence[float]] = "",
    data: str = "",
    container: str | None = None,
    allow_unused: bool = False,
) -> Imported:
    """Returns the model whose weights lie in a file.

    Args:
      source: a PyTorch file (zip or legacy format; a state_dict, or a checkpoint that contains one), a safetensors file with
        the keys of the public PyTorch class, or one of DeepMind's Haiku files. All are data to this function: their pickles
        are read by an unpickler that builds tensors and containers and refuses everything else.
      name: architecture, as `models.create` takes it, or an identifier of `jaxrd.models.published`. "" where the file is a
        safetensors file that jaxrd has written, which names its own.
      format: "robustbench", "official" or "torch" (three names of one), "safetensors", "haiku" or "deepmind"; "": what the file
        turns out to be.
      classes: what the last layer must have; None: what it has.
      image_shape: (height, width, channels); None: 32x32, or 64x64 for 200 classes, and the channels of the first layer.
      normalization: a key of `NORMALIZATIONS`, or (mean, std); "": that of the published model, or of the file, or, for the
        DeepMind family, whose public classes have one, that of the data set.
      data: name of the data set that the model is of; "": assumed by the number of classes.
      container: which dictionary of a checkpoint to take; None: see `accounting.account`.
      allow_unused: whether the file may hold arrays that the model has no use for.

    Raises:
      InputError: the file is none of these, is damaged or asks for code; or its arrays are not those of the model. One line
        that names the bytes or the key, and the way out.

    Example:
      >>> found = read("Wang2023Better_WRN-28-10.pt", "cifar10/Linf/Wang2023Better_WRN-28-10")
      >>> logits_fn = models.logits_fn(found.model, found.variables)
    """
    file = os.fspath(source)
    if format:
        choose("format", format, FORMATS)
    kind = recognition.kind(file)
    if format and kind not in FORMATS[format]:
        right = next(known for known, kinds in FORMATS.items() if kind in kinds)
        raise InputError(f"{file} is {_KINDS[kind]}, not what format {format} names; give --format={right}")
    content, metadata = _content(file, kind, named=bool(name))
    entry = None
    if not name:
        if not metadata:
            raise InputError(f"{file}: the architecture is missing, and this file does not name it; give it: --model")
        name = metadata["name"]
    elif not architectures.is_architecture(name):
        entry = published.find(name, classes=classes)
    architecture = entry.model if entry else name
    architectures.module(architecture, 2)  # where there is no such name, its own line says so
    specification = metadata if metadata.get("name") == architecture else {}
    expected_classes = classes if classes is not None else entry.classes if entry else None
    if entry and image_shape is not None and tuple(image_shape) != (32, 32, 3):
        raise InputError(
            f"{entry.identifier} is published for images of 32x32x3, not {'x'.join(map(str, image_shape))}; "
            f'name the architecture instead to use its weights for others: --model={entry.model}')

    accounts, state, layout, dtypes = _weights(
        file, kind, content, architecture, expected_classes, container, allow_unused)
    found_classes, channels = layout[-1].shape[0], layout[0].shape[2]
    side = 64 if found_classes == 200 else 32  # Tiny-ImageNet's, or CIFAR's
    shape = tuple(image_shape or specification.get("image_shape") or (side, side, channels))
    if len(shape) == 3 and shape[2] != channels:
        raise InputError(
            f"{file}: its first layer takes images of {channels} channels, not {shape[2]}; give --image_shape=H,W,{channels}")
    statistics, origin = _normalization(
        file, normalization, accounts, entry, specification, architecture, found_classes, channels, data)
    mean, std = statistics or (None, None)
    model = zoo.create(architecture, classes=found_classes, image_shape=shape, mean=mean, std=std)
    variables = (layouts.from_haiku if kind == "haiku" else layouts.from_torch)(state, layout)
    _check_finite(file, variables)
    return Imported(
        model, variables, entry.identifier if entry else name, entry, kind, accounts, dtypes, origin)


def _content(file: str, kind: str, named: bool) -> tuple[Any, dict]:
    """Returns what a file holds, and the model's specification where jaxrd left one."""
    if kind == "safetensors":
        arrays, metadata = safetensors_file.read(file)
        return arrays, _specification(file, metadata, named)
    if kind == "haiku":
        return {f"{module}:{leaf}": array for (module, leaf), array in _haiku_arrays(file).items()}, {}
    return torch_file.read(file), {}


def _haiku_arrays(file: str) -> dict[tuple[str, str], np.ndarray]:
    """Returns {(module, leaf): array} of parameters and state, modules without their root and the "~" in their paths."""
    arrays = {}
    for tree in haiku_file.read(file):
        for module, leaves in tree.items():
            path = "/".join(part for part in str(module).split("/") if part != "~").partition("/")[2]
            if not isinstance(leaves, Mapping):
                raise InputError(f"{file}: {module} is a {type(leaves).__name__}, not the arrays of a Haiku module")
            arrays |= {(path, str(leaf)): array for leaf, array in leaves.items()}
    return arrays


def _specification(file: str, metadata: Mapping[str, str], named: bool) -> dict:
    """Returns the model's specification that `writing.write_safetensors` has left in the metadata, or {}.

    Raises:
      InputError: it is damaged, and nobody has named the model.
    """
    if SPECIFICATION not in metadata:
        return {}
    try:
        specification = json.loads(metadata[SPECIFICATION])
        model = zoo.create(**{name: specification[name] for name in ("name", "classes", "image_shape", "mean", "std")})
        return dict(model.specification)
    except (ValueError, KeyError, TypeError, RecursionError):
        if named:
            return {}
        raise InputError(f"{file}: its metadata {SPECIFICATION} is damaged; name the architecture: --model") from None


def _weights(file, kind, content, architecture, classes, container, allow_unused):
    """Returns (accounts, {key: array}, layout, converted dtypes), or raises InputError where the file is of another model."""
    if kind == "haiku" and not isinstance(architectures.module(architecture, 2), DeepMindWideResNet):
        raise InputError(f"{file} is {_KINDS[kind]}, which holds a dm_wrn{{depth}}_{{width}}, not a {architecture}")

    def key_of(entry):
        return ":".join(layouts.haiku_name(entry)) if kind == "haiku" else entry.key

    def says(text):
        other = None if kind == "haiku" else layouts.identify(contents(content))
        if other is not None and other[0] != architecture:
            return InputError(
                f"{file} holds the weights of {other[0]} with {other[1]} classes, not of {architecture}; "
                f"give --model={other[0]}, or another file")
        return InputError(f"{file} does not hold the weights of {architecture}: {text}")

    layout = layouts.entries(architecture, 2)  # as many keys whatever the classes
    accounts = account(file, content, [key_of(entry) for entry in layout], container)
    missing = [key for key in map(key_of, layout) if key not in accounts.arrays]
    if missing:
        unused = f", while it has {some(accounts.unused)}" if accounts.unused else ""
        raise says(
            f"{len(missing)} of {len(layout)} arrays are missing, {some(missing)}{unused}; name its architecture: --model")
    head, stem = layout[-1], layout[0]
    found_classes = accounts.arrays[key_of(head)].shape[0] if len(accounts.arrays[key_of(head)].shape) == 1 else 0
    stem_shape = accounts.arrays[key_of(stem)].shape
    channels = stem_shape[2 if kind == "haiku" else 1] if len(stem_shape) == 4 else 3
    if classes is not None and found_classes != classes:
        raise InputError(
            f"{file}: {key_of(head)} is of {found_classes} classes, not of {classes}; give the file for {classes} classes, or "
            f"the name and --classes of a model for {found_classes}")
    if found_classes < 2:
        found = list(accounts.arrays[key_of(head)].shape)
        raise says(f"{key_of(head)} has shape {found}; give a classifier of two classes or more")
    layout = layouts.entries(architecture, found_classes, channels)
    for entry in layout:
        expected = entry.haiku_shape if kind == "haiku" else entry.torch_shape
        if tuple(accounts.arrays[key_of(entry)].shape) != expected:
            raise says(
                f"{key_of(entry)} has shape {list(accounts.arrays[key_of(entry)].shape)} instead of {list(expected)}; "
                "name its architecture: --model")
    if kind == "haiku":  # moving averages without the correction for their start, and its counter: read by nobody
        accounts = dataclasses.replace(accounts, unused=tuple(
            key for key in accounts.unused if not re.fullmatch(r".*(mean|var)_ema:(hidden|counter)", key)))
    if accounts.unused and not allow_unused:
        raise says(
            f"{architecture} has no use for its {some(accounts.unused)}; name its architecture, or leave them: --allow_unused")
    dtypes = {key: np.dtype(leaf.dtype) for key, leaf in accounts.arrays.items()}
    for key, dtype in dtypes.items():
        if dtype.kind != "f" and dtype.name != "bfloat16":
            raise InputError(f"{file}: {key} is {dtype.name}, not floating-point numbers; give a file of unquantised weights")
    name_of = layouts.haiku_name if kind == "haiku" else lambda entry: entry.key
    state = {name_of(entry): values_of(accounts.arrays[key_of(entry)]) for entry in layout}
    return accounts, state, layout, tuple(sorted({dtype.name for dtype in dtypes.values()} - {"float32"}))


def _normalization(file, asked, accounts, entry, specification, architecture, classes, channels, data):
    """Returns ((mean, std) or None, where it is from)."""
    if not isinstance(asked, str):
        return (tuple(asked[0]), tuple(asked[1])), "as asked for"
    if asked:
        choose("normalization", asked, NORMALIZATIONS)
        return NORMALIZATIONS[asked], f"{asked}, as asked for"
    way_out = "say which: --normalization=none, a data set, or MEAN,MEAN,MEAN,STD,STD,STD"
    known = (entry.mean, entry.std) if entry and entry.mean is not None else None
    normalises = isinstance(architectures.module(architecture, 2), DeepMindWideResNet | DeepMindPreActResNet)
    inside = (specification["mean"], specification["std"]) if specification else accounts.normalization
    if specification and inside[0] is None:
        if known is not None:
            raise InputError(
                f"{file} says that its model has no normalisation, {entry.identifier} is published with {known}; {way_out}")
        return None, "none, as the file's metadata say"
    if inside is not None:
        if len(inside[0]) == 1:
            inside = tuple(value * channels for value in inside)
        if accounts.in_front and normalises and not specification:
            raise InputError(
                f"{file} normalises by mean and std {inside} in front of the network, and the public class of {architecture} "
                "inside too; give both in one, mean m + s M and std s S for m, s in front and M, S inside: --normalization")
        if entry and (known is None or not np.allclose(inside, known, rtol=0, atol=1e-3)):
            raise InputError(
                f"{file} normalises by mean and std {inside}, {entry.identifier} is published with {known}; {way_out}")
        return inside, "that in the file's metadata" if specification else "mean and std in the file"
    if entry:
        return known, f"that of {entry.identifier}"
    if re.fullmatch(r"(.*\.)?[1-9]\d*\.", accounts.prefix):
        raise InputError(
            f'{file}: its keys begin with "{printable(accounts.prefix)}", so a layer without weights stands in front of the '
            f"network, such as a normalisation that is not in the file; {way_out}")
    if not normalises:
        return None, "none, as for most models of this architecture"
    name = max((name for name in NORMALIZATIONS if data.startswith(name)), key=len, default=None)
    name = name if data else _BY_CLASSES.get(classes)
    if name is None:
        raise InputError(
            f"{file}: the public classes of {architecture} normalise their images, and for {data or f'{classes} classes'} "
            f"nothing says how; {way_out}")
    assumed = "" if data else f", assumed by its {classes} classes"
    return NORMALIZATIONS[name], f"{name}, as the public class of {architecture} has{assumed}"


def _check_finite(file: str, variables: Mapping, path: str = "") -> None:
    for name, value in variables.items():
        if isinstance(value, Mapping):
            _check_finite(file, value, f"{path}{name}.")
        elif not np.isfinite(value).all():
            raise InputError(f"{file}: {path}{name} holds values that are not finite; its training diverged, take another file")
        elif name == "var" and value.min() < 0:
            raise InputError(f"{file}: {path}var, a running variance, reaches {value.min():g}; take another file")
