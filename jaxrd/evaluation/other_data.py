"""Evaluation on other data than a run's own, with the same classes and image shape: new test sets, corrupted images.

Each data set has a record of its own under "other_data" in evaluation.json. It holds fingerprints of the weights and of the
images, so that what stands on record need not be measured again, and is never taken for the result of other weights.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxrd.data.opening import open_test
from jaxrd.data.source import Source
from jaxrd.errors import InputError, need
from jaxrd.evaluation import record, robustness
from jaxrd.evaluation.subject import Subject
from jaxrd.training import processes

ATTACKS = "clean,pgd20"


def check_options(data: str | list[str], *, split: str, teacher: str, examples: int | None) -> None:
    """Raises InputError where options of `evaluate.evaluate` do not go together."""
    if not data:
        if examples is not None:
            raise InputError(f"examples is {examples}, which goes with other data; name some with --data, or leave it out")
        return
    if split != "test":
        raise InputError(f'split is "{split}", but with --data the test images are taken; leave one of the two out')
    if teacher:
        raise InputError(f'teacher is "{teacher}", but gradients are compared on the run\'s own data; leave it or --data out')
    if examples is not None:
        need(isinstance(examples, int) and examples > 0, "examples", examples, "a whole number above 0")


def evaluate(
    subject: Subject,
    chosen: dict[str, robustness.Protocol | robustness.Cascade],
    data: str | list[str],
    examples: int | None,
    *,
    mesh: jax.sharding.Mesh,
    seed: int,
    batch_size: int,
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Attacks the checkpoint on every data set and puts each on record as soon as one of its attacks is through.

    Args:
      subject: the checkpoint.
      chosen: the attacks, from `robustness.protocols`.
      data, examples: see `evaluate.evaluate`.
      mesh, seed, batch_size, say: see `robustness.run_attack`.

    Returns:
      name -> record.

    Raises:
      InputError: a data set that cannot be opened or does not fit the model, before any of them is evaluated.
    """
    with processes.together():
        sources = _open(subject, data, examples)
    weights = record.fingerprint(jax.tree.leaves(subject.variables))
    path = subject.workdir / "evaluation.json"
    records = {}
    for place, (name, (source, size)) in enumerate(sources.items(), 1):
        found = subject.record({
            "name": name, "split": "test", "examples": len(source), "of": size,
            "sha256": record.fingerprint([source.images, source.labels])}, seed)
        found["run"]["sha256"] = weights
        earlier = processes.from_main(lambda name=name, found=found: _moved_here(
            record.read(path).get(record.OTHER_DATA), name, found))
        record.keep_earlier(found, earlier)
        known = processes.from_main(lambda found=found: [
            attack for attack, protocol in chosen.items() if _on_record(subject, found, attack, protocol)])
        missing = {attack: protocol for attack, protocol in chosen.items() if attack not in known}
        seconds = 0.0
        for _, result in subject.attacked(
                source, missing, found, data=file_name(name), mesh=mesh, seed=seed, batch_size=batch_size, say=say):
            seconds += result.seconds
            record.write(path, found, name)
        if not missing:  # its directory may have been renamed
            record.write(path, found, name)
        accuracies = ", ".join(f"{attack} {found['accuracy'][attack]:.1%}" for attack in chosen)
        spent = f"{seconds:.1f} s" if missing else "on record"
        position = f" ({place} of {len(sources)})" if len(sources) > 1 else ""
        say(f"{name}{position}: {accuracies} of {len(source):,} images ({spent})")
        records[name] = found
    return records


def file_name(name: str) -> str:
    """Returns what a data set is called in the names of directories, another one for each data set.

    Args:
      name: as in evaluation.json: a TFDS name or a path, with [:N] where only N images are taken.
    """
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[-80:]
    # "test" and "validation" stand for the run's own data there.
    if plain == name and name not in ("test", "validation"):
        return plain
    return f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _open(subject: Subject, data, examples) -> dict[str, tuple[Source, int]]:
    """Returns name -> (images, how many the whole data set has) of all data, each once."""
    specs = [spec.strip() for spec in (data.split(",") if isinstance(data, str) else map(str, data)) if spec.strip()]
    if not specs:
        raise InputError(f"data is {data!r}; name a prepared data set, such as cifar10_1, or a file, such as images.npz")
    model, opened, seen = subject.model, {}, set()
    for spec in specs:
        try:
            found = open_test(spec, classes=model.classes, directory=subject.config.data.directory or None)
        except InputError as error:
            raise InputError(f"--data: {error}") from None
        for source in found:
            if (source.classes, source.image_shape) != (model.classes, model.image_shape):
                raise InputError(
                    f"--data: {source.name} has images {source.image_shape} of {source.classes} classes, the model of "
                    f"{subject.workdir} takes {model.image_shape} of {model.classes}; name data like those it was trained on")
            identity = os.path.realpath(spec) if spec.endswith(".npz") else source.name
            if identity in seen:
                continue
            seen.add(identity)
            name, size = source.name.removesuffix("/test"), len(source)
            if examples is not None and examples < size:
                name = f"{name}[:{examples}]"
                source = dataclasses.replace(
                    source, images=np.asarray(source.images[:examples]), labels=source.labels[:examples])
            opened[name] = source, size
    return opened


def _moved_here(others: Any, name: str, found: dict) -> Any:
    """Returns the earlier record of a data set as if it had been written in this directory: the weights say whose it is."""
    try:
        return others[name] | {"run": others[name]["run"] | {"workdir": found["run"]["workdir"]}}
    except (KeyError, TypeError):
        return None


def _on_record(subject: Subject, found: dict, attack: str, protocol) -> bool:
    """Returns whether an attack has been measured as it is defined now, and its images, if it keeps them, are there."""
    if attack not in found["accuracy"] or found["attacks"].get(attack) != protocol.definition(subject.threat.epsilon):
        return False
    if not isinstance(protocol, robustness.Cascade):
        return True
    file = found["cascades"].get(attack, {}).get("file")
    return bool(file) and (subject.workdir / file).is_file()
