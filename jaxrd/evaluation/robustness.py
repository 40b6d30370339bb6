"""Accuracy under attack over a whole data set, in padded and masked batches.

Every random number follows the index of its image, so the same model, images and seed give the same answer whatever the batch
size, the padding or the number of devices. `PROTOCOLS` are attacks of fixed step size, `CASCADES` the versions of AutoAttack.

In a run of several processes all of them make the same call. Each attacks its share of the points on its own devices, and all
return the same result, that of one process up to rounding (`shares`).
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxrd import models
from jaxrd.attacks import AutoAttackResult
from jaxrd.attacks.autoattack import prepare
from jaxrd.attacks.iterated import Ascent
from jaxrd.attacks.network import Network
from jaxrd.attacks.search import batch_sizes, run_search, score
from jaxrd.data.source import Source
from jaxrd.errors import InputError
from jaxrd.evaluation import alignment, shares
from jaxrd.evaluation.alignment.batching import equal_batches
from jaxrd.models import Model
from jaxrd.threat import ThreatModel, example_keys
from jaxrd.training import parallel, processes

Array = jax.Array

OBJECTIVES = {"cross_entropy": "ce", "margin": "margin", "cw": "cw"}  # name in a result file -> loss of `jaxrd.attacks`


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One evaluation attack of fixed step size, as it will stand in the result file.

    Attributes:
      objectives: names in `OBJECTIVES`; each is climbed in `restarts` runs.
      steps: gradient steps of a run.
      relative_step: length of a step in units of epsilon.
      start: see `ThreatModel.random_start`.
      restarts: runs per objective.
      description: one sentence for the reader of a table.
      momentum: MI-FGSM's, where there is one.
    """

    objectives: tuple[str, ...] = ()
    steps: int = 0
    relative_step: float = 0.0
    start: str = "none"
    restarts: int = 1
    description: str = ""
    momentum: float | None = None

    @property
    def runs(self) -> list[tuple[str, int]]:
        return [(objective, restart) for objective in self.objectives for restart in range(self.restarts)]

    def definition(self, epsilon: float) -> dict:
        """Returns what the attack was, in words and numbers, for the result file."""
        if not self.runs:
            return {"description": self.description}
        return {
            "objective": " and ".join(self.objectives), "steps": self.steps, "step_size": self.relative_step * epsilon,
            "start": self.start, "restarts": self.restarts, **({} if self.momentum is None else {"momentum": self.momentum}),
            "description": self.description}


@dataclasses.dataclass(frozen=True)
class Cascade:
    """A version of AutoAttack, or of what is faster and no AutoAttack, as it will stand in the result file.

    Attributes:
      version: see `jaxrd.attacks.autoattack`.
      description: one sentence for the reader of a table.
    """

    version: str
    description: str

    def definition(self, epsilon: float) -> dict:
        return {"version": self.version, "description": self.description}


PROTOCOLS = {
    "clean": Protocol(description="Accuracy on the images as they are."),
    "fgsm": Protocol(("cross_entropy",), 1, 1.0, description=(
        "One steepest gradient step of length epsilon on the cross-entropy, from the clean image.")),
    "mim": Protocol(("cross_entropy",), 10, 0.1, momentum=1.0, description=(
        "MI-FGSM: 10 steps of epsilon/10 on the cross-entropy with momentum 1, from the clean image.")),
    "pgd10": Protocol(("cross_entropy",), 10, 0.25, "uniform", description=(
        "10 steps of epsilon/4 on the cross-entropy, one uniform random start.")),
    "pgd20": Protocol(("cross_entropy",), 20, 0.25, "uniform", description=(
        "20 steps of epsilon/4 (2/255 at 8/255) on the cross-entropy, one uniform random start.")),
    "cw30": Protocol(("cw",), 30, 0.25, "uniform", description=(
        "30 steps of epsilon/4 on the Carlini-Wagner margin (confidence 50), one uniform random start; by projected gradient "
        "inside the ball, not the minimum-norm attack of that name.")),
    "strong": Protocol(("cross_entropy", "margin"), 100, 0.1, "uniform", 3, description=(
        "Worst case per image over the clean image and six runs of 100 steps of epsilon/10: cross-entropy and margin, three "
        "uniform random starts each.")),
}
CASCADES = {
    "autoattack": Cascade("standard", (
        "AutoAttack, version standard: worst case per image over APGD on the cross-entropy, targeted APGD on DLR and targeted "
        "FAB (9 targets, 100 steps each), and Square (5,000 queries).")),
    "autoattack_plus": Cascade("plus", (
        "AutoAttack, version plus: worst case per image over APGD on the cross-entropy, APGD on DLR and untargeted FAB in five "
        "restarts each, Square (5,000 queries), and targeted APGD and FAB (9 targets).")),
    "fast": Cascade("fast", (
        "Worst case per image over APGD on the cross-entropy and targeted APGD on DLR (9 targets), 100 steps each: the first "
        "two of AutoAttack's four attacks, and not AutoAttack.")),
}


@dataclasses.dataclass(frozen=True)
class Result:
    """What one attack left of a model.

    Attributes:
      robust: [n] bool, still classified correctly.
      images: [n, h, w, c] float32, the adversarial images (of the last run that moved each); None if not kept.
      seconds: wall time, of the slowest process.
      cascade: stage by stage, for a `Cascade`.
    """

    robust: np.ndarray
    images: np.ndarray | None
    seconds: float
    cascade: AutoAttackResult | None = None

    @property
    def accuracy(self) -> float:
        return float(np.mean(self.robust))


def protocols(names: str | list[str]) -> dict[str, Protocol | Cascade]:
    """Returns the attacks of comma-separated names, in that order; raises InputError for one that is unknown."""
    known = PROTOCOLS | CASCADES
    names = [name.strip() for name in (names.split(",") if isinstance(names, str) else names) if name.strip()]
    for name in names:
        if name not in known:
            raise InputError(f'attacks: "{name}" is not one of {", ".join(known)}')
    if not names:
        raise InputError(f"attacks: none given; choose from {', '.join(known)}")
    return {name: known[name] for name in names}


def run_attack(
    model: Model,
    variables: dict,
    source: Source,
    protocol: Protocol | Cascade,
    threat: ThreatModel,
    *,
    mesh: jax.sharding.Mesh,
    seed: int = 0,
    batch_size: int = 256,
    keep_images: bool = True,
    resume: str | pathlib.Path | None = None,
    say: Callable[[str], None] | None = None,
) -> Result:
    """Attacks every image of `source`.

    Several runs (restarts, objectives) count the worst case per image, the clean image included; only images that are still
    classified correctly go on to the next run. A single run attacks every image once, as the papers do.

    Args:
      model: the model, applied in eval mode.
      variables: its variables, on the host, on devices of this process, or replicated or divided over those of all processes.
      source: images and labels.
      protocol: the attack.
      threat: norm and radius.
      mesh: devices that share each batch; in several processes each takes those of its own.
      seed: of the random starts.
      batch_size: images per batch of a process, at most; rounded so that batches are equal and the devices can share them.
      keep_images: without, `Result.images` is None.
      resume: a directory for what a cascade has finished, to go on from; see `jaxrd.attacks.autoattack`. Several processes
        share it, and any number of them may go on.
      say: is given the progress of a cascade, in the main process that of its share.

    Raises:
      InputError: the model gives logits that are not finite; a resume directory of another evaluation. Where one process meets
        them, all raise.
    """
    began = time.perf_counter()
    n = len(source)
    rows = shares.rows(n)
    variables = shares.local(variables)
    say = say if processes.is_main() else None
    with processes.together():
        mesh = shares.local_mesh(mesh)
        network = Network(models.logits_fn(model, jax.device_put(variables, parallel.replicated(mesh))))
        points = {"images": float_images(source.images), "labels": np.asarray(source.labels, np.int32)}
        size = equal_batches(shares.largest(n), batch_size)
        key = jax.random.key(seed)
        try:
            if isinstance(protocol, Cascade):
                job = prepare(key, network, points["images"], points["labels"], threat=threat, version=protocol.version,
                              batch_size=size, mesh=mesh)
                writer = f"process-{jax.process_index()}-" if jax.process_count() > 1 else ""
                outcome = job.attack(rows, resume=resume, say=say, writer=writer)
            else:
                robust, adversarial = _attack(network, points, rows, protocol, threat, key, size, mesh, keep_images)
        except InputError as error:
            raise InputError(f"{error} (model {model.name})") from None
    if isinstance(protocol, Cascade):
        found = job.result(shares.complete_outcome(outcome), say)
        robust, adversarial = found.robust, found.images if keep_images else None
    else:
        found, robust = None, shares.complete(robust)
        adversarial = shares.complete(adversarial) if keep_images else None
    return Result(robust, adversarial, shares.longest(time.perf_counter() - began), found)


def _attack(network, points, rows, protocol: Protocol, threat, key, size, mesh, keep_images):
    """Returns (robust [n], images [n, h, w, c] or None), in which `rows` have been attacked; see `run_attack`."""
    n, sizes = len(points["labels"]), batch_sizes(size, mesh.size)
    adversarial, robust = points["images"].copy() if keep_images else None, np.ones(n, bool)
    keys = example_keys(key, n)
    worst_case = len(protocol.runs) > 1
    if worst_case or not protocol.runs:
        robust[rows] = score(network, points, keys, size=sizes[0], mesh=mesh, indices=rows)
    points = points | {"step_size": np.full(n, protocol.relative_step * threat.epsilon, np.float32)}
    for number, (objective, _) in enumerate(protocol.runs):
        search = Ascent(OBJECTIVES[objective], protocol.steps, protocol.start, protocol.momentum)
        keys = example_keys(jax.random.fold_in(key, number), n)
        left = rows[robust[rows]] if worst_case else rows
        for batch in run_search(search, network, points, keys, left, threat, sizes=sizes, mesh=mesh):
            robust[batch.indices] = ~batch.fooled
            if keep_images:
                adversarial[batch.indices] = batch.images
    return robust, adversarial


def robustness_curve(model, variables, source, threat: ThreatModel, radii: list[float], *, mesh, seed=0, batch_size=256,
                     name: str = "pgd20", known: dict[float, float] | None = None, resume: pathlib.Path | None = None,
                     say: Callable[[str], None] | None = None) -> dict:
    """Returns {"attack", "epsilon": [...], "accuracy": [...]}: accuracy under one attack at several radii, 0 being clean.

    Args:
      model, variables, source, threat, mesh, seed, batch_size: see `run_attack`.
      radii: in the units of epsilon, 0 for the clean images.
      name: the attack, one of `PROTOCOLS` or `CASCADES`.
      known: radius -> accuracy that has been measured already.
      resume: for a cascade, a directory with one for each radius in it.
      say: as for `run_attack`.
    """
    accuracy = []
    for radius in radii:
        if known and radius in known:
            accuracy.append(known[radius])
            continue
        protocol = (PROTOCOLS | CASCADES)[name if radius else "clean"]
        at_radius = dataclasses.replace(threat, epsilon=radius) if radius else threat
        accuracy.append(run_attack(
            model, variables, source, protocol, at_radius, mesh=mesh, seed=seed, batch_size=batch_size, keep_images=False,
            resume=resume / f"radius{radius:g}" if resume else None, say=say).accuracy)
    return {"attack": name, "epsilon": [float(radius) for radius in radii], "accuracy": accuracy}


def gradient_alignment(student, student_variables, teacher, teacher_variables, source, *, mesh, batch_size=256) -> dict:
    """Returns the mean gradient distance and cosine of two models over `source`, with their definition."""
    with processes.together():
        mesh = shares.local_mesh(mesh)
    networks = on_mesh(student, student_variables, mesh), on_mesh(teacher, teacher_variables, mesh)
    found = shares.per_example(
        Partial(compare_gradients, *networks), float_images(source.images), np.asarray(source.labels, np.int32),
        batch_size=batch_size, mesh=mesh)
    distance, cosine = (float(np.mean(values, dtype=np.float64)) for values in found)
    return {"gradient_distance": distance, "gradient_cosine": cosine, "definition": alignment.DEFINITION}


def compare_gradients(student_fn, teacher_fn, images: Array, labels: Array) -> tuple[Array, Array]:
    """Returns the distance and the cosine of two networks' input gradients, [batch] each: see `alignment.DEFINITION`."""
    a, b = (alignment.input_gradients(logits_fn, images, labels) for logits_fn in (student_fn, teacher_fn))
    return alignment.gradient_distance(a, b), alignment.gradient_cosine(a, b)


def on_mesh(model: Model, variables: dict, mesh: jax.sharding.Mesh) -> Partial:
    """Returns images -> logits with the variables on every device of a mesh of this process's devices.

    Args:
      model, variables: see `run_attack`; of several processes all make this call.
      mesh: from `shares.local_mesh`.
    """
    return models.logits_fn(model, jax.device_put(shares.local(variables), parallel.replicated(mesh)))


def float_images(images: np.ndarray) -> np.ndarray:
    """Returns images as float32 in [0, 1], on the host: what `augment.to_float` gives on a device, to the last bit."""
    images = np.asarray(images)
    return images.astype(np.float32) / np.float32(255) if images.dtype == np.uint8 else images.astype(np.float32)


def predictions(model: Model, variables: dict, images: np.ndarray) -> np.ndarray:
    """Returns the predicted class of a few images, [n] int; each process computes all of them."""
    return np.asarray(_predict(model, shares.local(variables), jnp.asarray(images)))


@functools.partial(jax.jit, static_argnames="model")
def _predict(model, variables, images) -> Array:
    return jnp.argmax(model.apply(variables, images, train=False)[0], axis=-1)
