"""Accuracy under attack over a whole data set, in padded and masked batches.

Every random number follows the index of its image, so the same model, images and seed give the same answer whatever the batch
size, the padding or the number of devices. Attacks advance in chunks of a few steps per compiled call: one compilation serves
every attack length and every radius, and the long loops stay out of XLA's CPU backend, which runs them slowly.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxrd import attacks, objectives
from jaxrd.data.augment import to_float
from jaxrd.data.source import Source
from jaxrd.errors import InputError
from jaxrd.evaluation import alignment
from jaxrd.models import Model
from jaxrd.threat import ThreatModel
from jaxrd.training import parallel

Array = jax.Array

_CHUNK = 10  # attack steps per compiled call
_CW_CONFIDENCE = 50.0


def _cw(logits: Array, labels: Array) -> Array:
    """The margin, capped where the attack is confident enough (Carlini & Wagner 2017, kappa = 50)."""
    return jnp.minimum(objectives.margin(logits, labels), _CW_CONFIDENCE)


OBJECTIVES = {"cross_entropy": objectives.cross_entropy, "margin": objectives.margin, "cw": _cw}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One evaluation attack, as it will stand in the result file.

    Attributes:
      objectives: names in `OBJECTIVES`; each is climbed in `restarts` runs.
      steps: gradient steps of a run.
      relative_step: length of a step in units of epsilon.
      start: see `ThreatModel.random_start`.
      restarts: runs per objective.
      description: one sentence for the reader of a table.
    """

    objectives: tuple[str, ...] = ()
    steps: int = 0
    relative_step: float = 0.0
    start: str = "none"
    restarts: int = 1
    description: str = ""

    @property
    def runs(self) -> list[tuple[str, int]]:
        return [(objective, restart) for objective in self.objectives for restart in range(self.restarts)]


PROTOCOLS = {
    "clean": Protocol(description="Accuracy on the images as they are."),
    "fgsm": Protocol(("cross_entropy",), 1, 1.0, description=(
        "One steepest gradient step of length epsilon on the cross-entropy, from the clean image.")),
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


@dataclasses.dataclass(frozen=True)
class Result:
    """What one attack left of a model.

    Attributes:
      robust: [n] bool, still classified correctly.
      images: [n, h, w, c] float32, the adversarial images (of the last run that moved each); None if not kept.
      seconds: wall time.
    """

    robust: np.ndarray
    images: np.ndarray | None
    seconds: float

    @property
    def accuracy(self) -> float:
        return float(np.mean(self.robust))


def protocols(names: str | list[str]) -> dict[str, Protocol]:
    """Returns the protocols of comma-separated names, in that order; raises InputError for one that is unknown."""
    names = [name.strip() for name in (names.split(",") if isinstance(names, str) else names) if name.strip()]
    for name in names:
        if name not in PROTOCOLS:
            raise InputError(f'attacks: "{name}" is not one of {", ".join(PROTOCOLS)}')
    if not names:
        raise InputError(f"attacks: none given; choose from {', '.join(PROTOCOLS)}")
    return {name: PROTOCOLS[name] for name in names}


def run_attack(
    model: Model,
    variables: dict,
    source: Source,
    protocol: Protocol,
    threat: ThreatModel,
    *,
    mesh: jax.sharding.Mesh,
    seed: int = 0,
    batch_size: int = 256,
    keep_images: bool = True,
) -> Result:
    """Attacks every image of `source`.

    Several runs (restarts, objectives) count the worst case per image, the clean image included; only images that are still
    classified correctly go on to the next run. A single run attacks every image once, as the papers do.

    Args:
      model: the model, applied in eval mode.
      variables: its variables.
      source: images and labels.
      protocol: the attack.
      threat: norm and radius.
      mesh: devices that share each batch.
      seed: of the random starts.
      batch_size: images per batch, at most; rounded so that batches are equal and the devices can share them.
      keep_images: bring the adversarial images to the host; without, `Result.images` is None.

    Raises:
      InputError: the model gives logits that are not finite.
    """
    began = time.perf_counter()
    n = len(source)
    adversarial = np.array(jax.device_get(to_float(source.images)), np.float32) if keep_images else None
    robust = np.ones(n, bool)
    variables = jax.device_put(variables, parallel.replicated(mesh))
    key = jax.random.key(seed)
    worst_case = len(protocol.runs) > 1
    if worst_case or not protocol.runs:
        for indices, rows, batch in _batches(source, np.arange(n), batch_size, mesh):
            robust[indices] = _score(model, variables, batch["images"], batch["labels"], rows)
    for number, (objective, _) in enumerate(protocol.runs):
        run_key = jax.random.fold_in(key, number)
        left = np.flatnonzero(robust) if worst_case else np.arange(n)
        for indices, rows, batch in _batches(source, left, batch_size, mesh):
            points = _climb(model, variables, run_key, batch, objective, protocol, threat)
            if keep_images:
                adversarial[indices] = np.asarray(points)[rows]
            robust[indices] = _score(model, variables, points, batch["labels"], rows)
    return Result(robust, adversarial, time.perf_counter() - began)


def robustness_curve(model, variables, source, threat: ThreatModel, radii: list[float], *, mesh, seed=0, batch_size=256,
                     name: str = "pgd20", known: dict[float, float] | None = None) -> dict:
    """Returns {"attack", "epsilon": [...], "accuracy": [...]}: accuracy under one attack at several radii, 0 being clean.

    Args:
      model, variables, source, threat, mesh, seed, batch_size: see `run_attack`.
      radii: in the units of epsilon, 0 for the clean images.
      name: the attack, one of `PROTOCOLS`.
      known: radius -> accuracy that has been measured already.
    """
    accuracy = []
    for radius in radii:
        if known and radius in known:
            accuracy.append(known[radius])
            continue
        protocol = PROTOCOLS[name if radius else "clean"]
        at_radius = dataclasses.replace(threat, epsilon=radius) if radius else threat
        accuracy.append(run_attack(
            model, variables, source, protocol, at_radius, mesh=mesh, seed=seed, batch_size=batch_size,
            keep_images=False).accuracy)
    return {"attack": name, "epsilon": [float(radius) for radius in radii], "accuracy": accuracy}


def gradient_alignment(student, student_variables, teacher, teacher_variables, source, *, mesh, batch_size=256) -> dict:
    """Returns the mean gradient distance and cosine of two models over `source`, with their definition."""
    sums, replicated = np.zeros(2), parallel.replicated(mesh)
    student_variables, teacher_variables = jax.device_put((student_variables, teacher_variables), replicated)
    for _, rows, batch in _batches(source, np.arange(len(source)), batch_size, mesh):
        measured = _alignment(student, student_variables, teacher, teacher_variables, batch["images"], batch["labels"])
        sums += np.sum(np.asarray(measured)[:, rows], axis=1)
    distance, cosine = sums / len(source)
    return {"gradient_distance": float(distance), "gradient_cosine": float(cosine), "definition": alignment.DEFINITION}


def predictions(model: Model, variables: dict, images: np.ndarray) -> np.ndarray:
    """Returns the predicted class of a few images, [n] int."""
    return np.asarray(_predict(model, variables, jnp.asarray(images)))


def _batches(source: Source, indices: np.ndarray, batch_size: int, mesh) -> Iterator[tuple[np.ndarray, slice, dict]]:
    """Yields (indices, the rows that are theirs, sharded batch): equal batches, the last one padded by repeating images.

    The batch size depends on the whole source and not on how many indices are left, so that it is compiled for once.
    """
    count = math.ceil(len(source) / batch_size)
    size = math.ceil(math.ceil(len(source) / count) / mesh.size) * mesh.size
    for first in range(0, len(indices), size):
        part = indices[first:first + size]
        padded = np.resize(part, size)
        batch = parallel.put_batch(source.batch(padded) | {"index": padded.astype(np.int32)}, mesh)
        yield part, slice(0, len(part)), batch | {"images": to_float(batch["images"])}


def _climb(model, variables, key, batch, objective: str, protocol: Protocol, threat: ThreatModel) -> Array:
    points = _start(key, batch["index"], batch["images"], threat, protocol.start)
    step_size = protocol.relative_step * threat.epsilon
    for first in range(0, protocol.steps, _CHUNK):
        steps = min(_CHUNK, protocol.steps - first)
        points = _advance(model, variables, batch, points, threat, step_size, objective, steps)
    return points


@functools.partial(jax.jit, static_argnames="kind")
def _start(key: Array, index: Array, images: Array, threat: ThreatModel, kind: str) -> Array:
    return threat.random_start(jax.vmap(jax.random.fold_in, (None, 0))(key, index), images, kind)


@functools.partial(jax.jit, static_argnames=("model", "objective", "steps"))
def _advance(model, variables, batch, points, threat, step_size, objective: str, steps: int) -> Array:
    def climb(images):
        return OBJECTIVES[objective](model.apply(variables, images, train=False)[0], batch["labels"])

    def body(points, _):
        return attacks.ascent_step(climb, batch["images"], points, threat, step_size), None

    return jax.lax.scan(body, points, length=steps, unroll=attacks.loop_unroll())[0]


def _score(model: Model, variables: dict, images: Array, labels: Array, rows: slice) -> np.ndarray:
    correct, finite = (np.asarray(flags)[rows] for flags in _correct(model, variables, images, labels))
    if not np.all(finite):
        raise InputError(
            f"{np.sum(~finite)} of the {len(finite)} images of a batch get logits that are not finite from model {model.name}; "
            "a comparison with NaN would count them as robust: check the checkpoint and its dtype")
    return correct


@functools.partial(jax.jit, static_argnames="model")
def _predict(model, variables, images) -> Array:
    return jnp.argmax(model.apply(variables, images, train=False)[0], axis=-1)


@functools.partial(jax.jit, static_argnames="model")
def _correct(model, variables, images, labels) -> tuple[Array, Array]:
    logits, _ = model.apply(variables, images, train=False)
    return objectives.correct(logits, labels), jnp.all(jnp.isfinite(logits), axis=-1)


@functools.partial(jax.jit, static_argnames=("student", "teacher"))
def _alignment(student, student_variables, teacher, teacher_variables, images, labels) -> Array:
    def gradients(model, variables):
        return alignment.input_gradients(lambda images: model.apply(variables, images, train=False)[0], images, labels)

    a, b = gradients(student, student_variables), gradients(teacher, teacher_variables)
    return jnp.stack([alignment.gradient_distance(a, b), alignment.gradient_cosine(a, b)])
