"""Run directories from the weights of others, and files for others from run directories.

An imported directory is one that restoring, distillation (`--config.teacher`) and evaluation take for a run: config.json, a
checkpoint of step 0, and import.json, which says where the weights are from. It appears whole or not at all, and so does an
exported file, which has been read again and compared before it takes its name.
"""

import dataclasses
import hashlib
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.export
import numpy as np

import jaxrd
from jaxrd import models
from jaxrd.config import Config, DataConfig, MethodConfig, ThreatConfig
from jaxrd.data.opening import DataSet
from jaxrd.errors import InputError, choose
from jaxrd.evaluation import robustness
from jaxrd.files import appearing
from jaxrd.models import weights
from jaxrd.models.weights import safetensors_file, torch_file
from jaxrd.models.weights.accounting import some
from jaxrd.models.weights.unpickling import printable
from jaxrd.training import checkpoint, parallel
from jaxrd.training.log import write_json
from jaxrd.training.opening import open_own_data

EXPORT_FORMATS = ("torch", "safetensors", "stablehlo")


def import_weights(
    source: str | pathlib.Path,
    workdir: str | pathlib.Path,
    name: str = "",
    *,
    data: str = "",
    examples: int = 1000,
    any_accuracy: bool = False,
    norm: str = "",
    epsilon: float | str | None = None,
    image_shape: Sequence[int] | None = None,
    classes: int | None = None,
    say: Callable[[str], None] = print,
    **options: Any,
) -> weights.Imported:
    """Makes a run directory of a file of weights, and returns what was read.

    Args:
      source: see `models.weights.read`.
      workdir: the directory; it does not exist yet, or is empty.
      name: architecture or published identifier; see `models.weights.read`.
      data: name of a prepared TFDS data set, or "train.npz,test.npz": its test images, on which the clean accuracy is measured
        before anything is written, and which `launch.evaluate` will read. "": the published data set or one with as many
        classes and such images, without a measurement; or none.
      examples: how many of the test images are classified, from the first on; 0 for all.
      any_accuracy: accept an accuracy that is not the published one.
      norm, epsilon: threat model that `launch.evaluate` will use, "linf" or "l2" and a number or "8/255"; by default the
        published one, or else L-infinity 8/255.
      image_shape, classes: as for `models.weights.read`; by default those of `data`, where it is given.
      say: is given one line per finding.
      **options: see `models.weights.read`.

    Raises:
      InputError: the file does not fit; the directory is taken; the data set cannot be opened or has other images or classes;
        the clean accuracy is far from the published one. Nothing has been written then.
    """
    workdir = pathlib.Path(workdir)
    _check_free(workdir)
    dataset, threat = None, None
    if norm or epsilon is not None:
        if not norm or epsilon is None:
            raise InputError(f'norm is "{norm}" and epsilon is {epsilon}; give both, such as linf and 8/255, or neither')
        threat = Config.from_dict({"threat": {"norm": norm, "epsilon": epsilon}}).threat
    if data:
        arrays = ",".join(os.path.abspath(path.strip()) for path in data.split(",")) if "," in data else ""
        section = DataConfig(name="arrays" if arrays else data, arrays=arrays)
        dataset, _ = open_own_data(Config(data=section))
        image_shape, classes = _agreed(dataset, image_shape, classes)
    found = weights.read(
        source, name, image_shape=image_shape, classes=classes, data="" if "," in data else data, **options)
    entry = found.published
    if not data:
        section = DataConfig(name=_data_of(found))
    config = Config(method=MethodConfig("pgd_at"), student=found.model.name, data=section, threat=threat or (
        ThreatConfig(entry.norm, entry.epsilon) if entry else ThreatConfig()))
    for line in _findings(source, found):
        say(line)
    record = _record(source, found)
    if dataset:
        record["clean_accuracy"] = _clean_accuracy(found, dataset, examples, any_accuracy, say)
    with appearing(workdir, directory=True) as directory:
        write_json(directory / "config.json", config.to_dict())
        write_json(directory / "import.json", record)
        metadata = {
            "config": config.to_dict(), "model": dict(found.model.specification), "teacher_step": None,
            "imported": record, "counters": dict(found.accounts.counters), "jaxrd": jaxrd.__version__}
        checkpoint.save_variables(directory, found.variables, metadata)
    parameters = models.parameter_count(found.variables)
    size = "x".join(map(str, found.model.image_shape))
    images = config.data.arrays or config.data.name
    images += "" if data or entry else " (assumed)" if images else "images that --data names (none is given)"
    radius = f"{config.threat.norm} {config.threat.epsilon:.4g}" + ("" if entry or norm else " (--norm and --epsilon: another)")
    say(f"launch.evaluate will attack {images} within {radius}")
    say(f"{workdir}: {found.model.name}, {found.model.classes} classes, images {size}, {parameters:,} parameters; use it as "
        f"--config.teacher={workdir}, or python -m launch.evaluate --workdir={workdir}")
    return found


def export_weights(
    workdir: str | pathlib.Path,
    output: str | pathlib.Path,
    format: str,
    *,
    step: str | int = "last",
    batch_norm_set: int = 0,
    sub_block1: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Writes the weights of a run's checkpoint (its weight average, where it kept one) to a file, and reads it again.

    Args:
      workdir: a run directory, or an imported one.
      output: the file; it does not exist yet.
      format: "torch" (a state_dict), "safetensors" or "stablehlo": see `models.weights`.
      step: see `models.restore`.
      batch_norm_set: which one, where the model has several.
      sub_block1: see `models.weights.state_dict`.
      say: is given one line per finding.

    Raises:
      InputError: an unknown format, step or set; the output exists or cannot be written; the file read again is not what was
        written.
    """
    choose("format", format, EXPORT_FORMATS)
    output = pathlib.Path(output)
    _check_output(output)
    model, variables, origin = checkpoint.restore_model(workdir, step)
    model = models.create(**model.specification | {"dtype": "float32"})  # as it is evaluated
    if not 0 <= batch_norm_set < model.batch_norm_sets:
        raise InputError(f"batch_norm_set is {batch_norm_set}; {workdir} has {model.batch_norm_sets}, counted from 0")
    with appearing(output) as path:
        if format == "stablehlo":
            path.write_bytes(weights.stablehlo(model, variables, batch_norm_set=batch_norm_set))
            checked = _check_program(output, path, model, variables, batch_norm_set)
        else:
            state = weights.state_dict(
                model, variables, batch_norm_set=batch_norm_set, counters=origin["counters"], sub_block1=sub_block1)
            if format == "torch":
                weights.write_torch(path, state)
                written = {key: leaf.array() for key, leaf in torch_file.read(str(path)).items()}
            else:
                weights.write_safetensors(path, state, model)
                written, _ = safetensors_file.read(str(path))
            checked = _check_state(output, state, written)
        size = path.stat().st_size
    which = f"step {origin['step']} of {workdir}" + (", its weight average" if origin["weights"] == "average" else "")
    which += f", BatchNorm set {batch_norm_set} of {model.batch_norm_sets}" if model.batch_norm_sets > 1 else ""
    say(f"{output}: {model.name}, {model.classes} classes, {which}, {size / 2**20:,.1f} MiB; {checked}")
    mean, std = model.specification["mean"], model.specification["std"]
    if format == "stablehlo":
        say(f"images float32 [batch, {', '.join(map(str, model.image_shape))}] in [0, 1] -> logits; any batch size from 1 on, "
            "no gradients; run it with jax.export.deserialize(bytearray(data)).call(images)")
    elif mean is not None:
        say(f"the file holds no normalisation: the class must subtract mean {mean} and divide by std {std}")
    elif model.name.startswith("dm_"):
        say("the network takes images in [0, 1] as they are, its public class normalises them: construct it with "
            "mean=(0, 0, 0), std=(1, 1, 1), and import the file with --normalization=none")
    else:
        say("images in [0, 1] go in as they are: the network has no normalisation")


def _check_free(workdir: pathlib.Path) -> None:
    """Raises InputError where the directory is taken; before a large file is read."""
    if workdir.exists() and workdir.samefile("."):
        raise InputError(f"--workdir={workdir} is the current directory, in which this command runs; name one in it")
    if workdir.is_dir() and not any(workdir.iterdir()):
        return
    if workdir.exists():
        what = "holds a run" if checkpoint.has_checkpoints(workdir) else "exists"
        raise InputError(f"--workdir={workdir} {what} already; choose another one, or remove it")


def _check_output(output: pathlib.Path) -> None:
    if output.exists() or output.is_symlink():
        what = "is a directory; name a file in it" if output.is_dir() else "exists already; choose another name, or remove it"
        raise InputError(f"--output={output} {what}")


def _agreed(dataset: DataSet, image_shape, classes) -> tuple[tuple[int, ...], int]:
    """Returns the image shape and classes of the data set; InputError where others are asked for."""
    test = dataset.test
    for field, asked, there in (("image_shape", image_shape and tuple(image_shape), test.image_shape),
                                ("classes", classes, test.classes)):
        if asked and asked != there:
            raise InputError(f"{field} is {asked}, but {test.name} has {there}; leave it out, or give another data set")
    return test.image_shape, test.classes


def _data_of(found: weights.Imported) -> str:
    """Returns the data set that an imported model is of: published, assumed by its classes and images, or "" for unknown."""
    if found.published:
        return found.published.dataset
    by_images = {(8, 8, 1): {10: "jaxrd_digits"}, (32, 32, 3): {10: "cifar10", 100: "cifar100"},
                 (64, 64, 3): {200: "tiny_imagenet"}}
    return by_images.get(found.model.image_shape, {}).get(found.model.classes, "")


def _findings(source, found: weights.Imported) -> Iterator[str]:
    """Yields what was read, one line per finding, every key accounted for."""
    accounts = found.accounts
    where = f' of "{printable(accounts.container)}"' if accounts.container else ""
    prefix = f', without their prefix "{printable(accounts.prefix)}"' if accounts.prefix else ""
    yield f"{source}: {len(accounts.arrays)} arrays{where}{prefix}: the weights of {found.name}"
    if accounts.others:
        yield f"the file has other weights of this architecture too, which --entry would take: {some(accounts.others, 5)}"
    if accounts.partial:
        yield f"passed over, because arrays are missing there, such as BatchNorm's statistics: {some(accounts.partial, 5)}"
    if found.dtypes:
        yield f"converted to float32 from {', '.join(found.dtypes)}"
    mean, std = (found.model.specification[name] for name in ("mean", "std"))
    inside = "images in [0, 1] as they are" if mean is None else f"mean {mean}, std {std} inside the model"
    yield f"normalisation: {inside} ({found.normalization})"
    if accounts.counters:
        yield f"kept for export only: {len(accounts.counters)} counters of batches"
    if accounts.dead:
        yield f"left out, because its class never calls them: {some(accounts.dead)}"
    if accounts.unused or accounts.scalars:
        yield f"left out, because the model has no use for them: {some(accounts.unused + accounts.scalars)}"
    if entry := found.published:
        named = ("clean", entry.clean), ("AutoAttack", entry.autoattack)
        parts = [f"{value:.2f} % {name}" for name, value in named if value is not None]
        yield f"published: {', '.join(parts) or 'no accuracy known'} ({entry.paper})"


def _record(source, found: weights.Imported) -> dict[str, Any]:
    """Returns import.json: where the weights are from, and what became of every key."""
    source = pathlib.Path(source)
    with open(source, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    accounts = found.accounts
    return {
        "jaxrd": jaxrd.__version__, "name": found.name, "kind": found.kind,
        "file": {"name": source.name, "bytes": source.stat().st_size, "sha256": digest},
        "container": accounts.container, "other_containers": list(accounts.others), "prefix": accounts.prefix,
        "arrays": len(accounts.arrays), "counters": len(accounts.counters), "scalars": list(accounts.scalars),
        "dead": list(accounts.dead), "unused": list(accounts.unused),
        "converted_from": list(found.dtypes), "normalization": found.normalization,
        "published": found.published and dataclasses.asdict(found.published)}


def _clean_accuracy(found, dataset: DataSet, examples: int, any_accuracy: bool, say) -> dict[str, Any]:
    """Measures the clean accuracy on test images and compares it with the published one."""
    test = dataset.test
    if 0 < examples < len(test):
        test = dataclasses.replace(test, images=test.images[:examples], labels=test.labels[:examples])
    with jax.default_matmul_precision("highest"):
        measured = 100 * robustness.run_attack(
            found.model, found.variables, test, robustness.PROTOCOLS["clean"], ThreatConfig().build(),
            mesh=parallel.data_mesh(), keep_images=False).accuracy
    say(f"clean accuracy {measured:.2f} % of {len(test):,} images of {test.name}")
    known = found.published and found.published.clean
    if known:
        # On the 10,000 images of the published figure the same ones are wrong, but for rounding; fewer are a sample.
        whole = len(test) == 10_000
        allowed = 0.2 if whole else 400 * math.sqrt(known / 100 * (1 - known / 100) / len(test)) + 0.2
        if abs(measured - known) > allowed and not any_accuracy:
            raise InputError(
                f"clean accuracy is {measured:.2f} % of {len(test):,} images of {test.name}, {found.name} is published with "
                f"{known:.2f} %, more than {allowed:.2f} away; nothing was written. Is this the right data set, file and "
                "normalisation? --any_accuracy takes it all the same")
    elif measured <= 200 / found.model.classes:
        say("that is hardly better than chance: is this the right data set, and the right normalisation?")
    return {"data": test.name, "examples": len(test), "percent": measured}


def _check_state(output, state: dict[str, np.ndarray], written: dict[str, np.ndarray]) -> str:
    """Compares a file that was read again with what went into it, bit for bit; returns what to say about it."""
    for key in {**state, **written}:
        same = key in written and key in state and (
            written[key].dtype == state[key].dtype and written[key].tobytes() == state[key].tobytes()
            and written[key].shape == state[key].shape)
        if not same:
            raise InputError(f"{output}: {key} is not what was written when read again; is the disk faulty? Nothing was kept")
    return f"{len(state)} entries, read again and equal bit for bit"


def _check_program(output, path, model, variables, batch_norm_set) -> str:
    """Runs a program that was read again beside the model, at two batch sizes; returns what to say about it."""
    program = jax.export.deserialize(bytearray(path.read_bytes()))
    largest = 0.0
    for batch in (1, 7):
        images = np.random.default_rng(batch).uniform(size=(batch, *model.image_shape)).astype(np.float32)
        with jax.default_matmul_precision("highest"):
            expected, _ = jax.jit(model.apply, static_argnums=(2, 3))(variables, images, False, batch_norm_set)
        difference = float(np.max(np.abs(np.asarray(program.call(images)) - expected)))
        if not difference <= 1e-5 * max(1.0, float(np.max(np.abs(expected)))):
            raise InputError(
                f"{output}: read again, the program's logits differ by {difference:g} from the model's on this platform "
                f"({jax.default_backend()}); nothing was kept, export to torch or safetensors instead")
        largest = max(largest, difference)
    return f"read again, logits within {largest:.1g} of the model's"
