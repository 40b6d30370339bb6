"""AutoAttack: the cascade of parameter-free attacks that robust accuracies are reported with (Croce & Hein 2020).

    standard   APGD on the cross-entropy, targeted APGD (9 targets), targeted FAB (9 targets), Square (5,000 queries)
    plus       APGD on the cross-entropy, APGD on DLR and untargeted FAB in 5 restarts each, Square, targeted APGD, targeted FAB
    rand       APGD on cross-entropy and DLR, gradients averaged over 20 draws: for randomised defences
    fast       APGD on the cross-entropy and targeted APGD. Not AutoAttack: say APGD-CE + APGD-T where you report it

Each attack starts from the clean image of every point that is still classified correctly, so the accuracy after each stage is
that of the worst case over the attacks so far. Two things differ from the official code. Random numbers follow each point's
index and not the batch that it came in, so batch size and devices move results by rounding only; with this, Square draws its
windows for each image, as its paper has it. And points are gathered anew for each target and restart over the whole data set,
so no run is given a point that an earlier one has broken; within a run all go on to the end, as there.
"""

import dataclasses
import pathlib
import time
import zlib
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxrd
from jaxrd.attacks import trust
from jaxrd.attacks.apgd import Apgd
from jaxrd.attacks.fab import Fab
from jaxrd.attacks.network import LogitsFn, Network, as_network, classes_of
from jaxrd.attacks.progress import Progress
from jaxrd.attacks.records import Record, Records, fingerprint
from jaxrd.attacks.results import AutoAttackResult
from jaxrd.attacks.search import (
    LEAST_CLASSES, Run, batch_sizes, check_count, check_labels, fold, run_search, score, uncommitted)
from jaxrd.attacks.square import Square
from jaxrd.errors import InputError, choose
from jaxrd.threat import ThreatModel, example_keys

Array = jax.Array

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
    "fast": ("apgd-ce", "apgd-t"),
}
ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
_STEPS, _QUERIES, _TARGETS, _EOT, _RESTARTS = 100, 5000, 9, 20, 5


@dataclasses.dataclass(frozen=True)
class Stage:
    """One attack of a cascade: its name and its runs (targets, restarts), each on the points that those before it left."""

    name: str
    runs: tuple[Run, ...]


@jax.default_matmul_precision("highest")
def autoattack(
    key: Array,
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    *,
    threat: ThreatModel,
    version: str | Sequence[str] = "standard",
    batch_size: int = 250,
    index: Array | None = None,
    mesh: Mesh | None = None,
    resume: str | pathlib.Path | None = None,
    say: Callable[[str], None] | None = print,
) -> AutoAttackResult:
    """Runs a cascade of attacks on a function `images -> logits`.

    The network must be in eval mode. Products of float32 are computed in full precision, whatever the accelerator's default is;
    a network whose layers compute in bfloat16 is attacked as it is. Not for use under `jax.jit`.

    Args:
      key: one typed key, such as jax.random.key(0).
      logits_fn: images [batch, h, w, c] -> logits [batch, classes]; for version "rand" (images, key) -> logits.
      images: [n, h, w, c] float32 inside the threat model's bounds.
      labels: [n] int, the true classes.
      threat: "linf" or "l2", radius and bounds.
      version: "standard", "plus", "rand" or "fast" (see the head of this file), or the names of attacks, of
        "apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t" and "square", in the order to be tried.
      batch_size: images per batch, at most; batches of fewer points are padded to a half of it, a quarter, and so on.
      index: [n] int, the place of each image in its data set, which its random numbers follow; by default 0 to n - 1. A
        subset evaluated with its own indices gives what the whole gave.
      mesh: devices of one axis that share each batch; one device by default.
      resume: a directory that finished batches are recorded in. Called again with the same model, data and configuration,
        an evaluation goes on after its last finished batch.
      say: is given one line per batch where stderr is no terminal (where it is, there is a bar for each attack), and each
        flag; None: quiet.

    Returns:
      `AutoAttackResult`. Where there are too few classes for a loss, its flags say what took the place of the attack.

    Raises:
      InputError: images outside the bounds, labels that do not fit, an unknown version; logits that are not finite; a `resume`
        directory that belongs to another model, data or configuration, or is damaged.
    """
    threat.check_images(images)
    network = as_network(logits_fn, images)
    labels = np.asarray(labels)
    check_labels(labels, images, classes := classes_of(network, images))
    check_count("autoattack batch_size", batch_size)
    points = {"images": np.asarray(images, np.float32), "labels": labels.astype(np.int32)}
    n = len(labels)
    if not n:
        raise InputError("images are none; give at least one")
    stages, flags = cascade(version, classes)
    version = version if isinstance(version, str) else "+".join(version)
    index = _checked_index(index, n)
    if getattr(key, "ndim", None) == 0 and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(uncommitted(key), jnp.asarray(index, jnp.uint32))
    else:
        keys = uncommitted(example_keys(key, n))
    if mesh is not None:
        network = jax.device_put(network, NamedSharding(mesh, PartitionSpec()))
    sizes = batch_sizes(min(batch_size, n), 1 if mesh is None else mesh.size)
    threat = ThreatModel(threat.norm, float(threat.epsilon), tuple(map(float, threat.bounds)))
    job = _Job(network, points, keys, threat, sizes, mesh)

    began = time.perf_counter()
    robust = job.score(points["images"], np.arange(n))
    flags += trust.inspect(logits_fn, network, points["images"], keys, threat.bounds, sizes[0], randomised=version == "rand")
    configuration = {
        "version": version, "norm": threat.norm, "epsilon": threat.epsilon, "bounds": list(threat.bounds),
        "attacks": {stage.name: f"{len(stage.runs)} x {stage.runs[0].search}" for stage in stages}}
    metadata = {"jaxrd": jaxrd.__version__, "jax": jax.__version__, **fingerprint(
        network, points, keys, configuration, sizes[0])}
    records = Records.open(resume, metadata, n, points["images"].shape[1:])
    if say and records.finished:
        say(f"going on after {records.finished} finished batches of {resume}")
    _warn(say, flags)

    adversarial, clean_correct, attack_index = points["images"].copy(), robust.copy(), np.where(robust, -1, 0)
    accuracy, tallies = {"clean": float(np.mean(robust))}, {"clean": _Tally(n, n, 0, 0, time.perf_counter() - began)}
    for place, stage in enumerate(stages, 1):
        tally = tallies[stage.name] = _Tally()
        with Progress(say, stage.name, len(stage.runs), n) as progress:
            for number in range(len(stage.runs)):
                left = np.flatnonzero(robust)
                progress.begin(number, len(left))
                for record, known in job.batches(stage, number, left, records):
                    broken = record.indices[record.fooled]
                    adversarial[broken], robust[broken], attack_index[broken] = record.images, False, place
                    tally.add(record)
                    progress.batch(len(record.indices), int(np.sum(robust)), recorded=known)
        accuracy[stage.name] = float(np.mean(robust))
    zero_gradients = {stage.name: tallies[stage.name].zero_gradients for stage in stages
                      if isinstance(stage.runs[0].search, Apgd)}
    by_gradient = {stage.name for stage in stages if stage.runs[0].search.differentiates}
    late = trust.review(accuracy, zero_gradients, {name: tally.points for name, tally in tallies.items()}, by_gradient, n)
    rescored = float(np.mean(job.score(adversarial, np.arange(n))))
    if rescored != accuracy[stages[-1].name] and not network.randomised:
        late.append(f"re-scoring: the returned images score {rescored:.2%}, the attacks reported {np.mean(robust):.2%}; the "
                    "network does not give the same answer twice")
    _warn(say, late)
    return AutoAttackResult(
        images=adversarial, labels=points["labels"], robust=robust, clean_correct=clean_correct, attack_index=attack_index,
        stages=tuple(accuracy), per_attack_accuracy=accuracy, index=index, flags=flags + late,
        distances=_distances(points["images"], adversarial, threat.norm),
        passes={name: (tally.forwards, tally.backwards) for name, tally in tallies.items()}, zero_gradients=zero_gradients,
        seconds={name: round(tally.seconds, 3) for name, tally in tallies.items()}, rescored_accuracy=rescored,
        version=version, threat=threat, metadata=metadata)


def cascade(version: str | Sequence[str], classes: int) -> tuple[list[Stage], list[str]]:
    """Returns the stages of a version and the flags about what had to change for so few classes.

    DLR is defined for 3 classes and more, targeted DLR for 4. Below, the untargeted loss takes the place of the targeted one,
    and the margin that of DLR; targets are at most the wrong classes there are.

    Args:
      version: a name, or names of attacks.
      classes: number of logits.

    Raises:
      InputError: an unknown version or attack, or the same attack twice.
    """
    if isinstance(version, str):
        choose("autoattack version", version, VERSIONS)
        names = VERSIONS[version]
    else:
        names = tuple(version) if isinstance(version, Sequence) else (version,)
        for name in names:
            choose("autoattack version: attack", name, ATTACKS)
        if not names or len(set(names)) < len(names):
            raise InputError(f"autoattack version is {list(names)}; name each attack once, such as ['apgd-ce', 'square']")
    restarts, eot = _RESTARTS if version == "plus" else 1, _EOT if version == "rand" else 1
    targets = min(_TARGETS, classes - 1)
    stages, flags = [], []
    for name in names:
        loss = {"apgd-ce": "ce", "apgd-dlr": "dlr", "apgd-t": "dlr-targeted"}.get(name)
        if classes < LEAST_CLASSES.get(loss, 2):
            given = "dlr" if classes == 3 else "margin"
            flags.append(f"classes: {classes} are too few for the loss of {name}; APGD on "
                         f"{'DLR' if given == 'dlr' else 'the margin'} takes its place")
            loss = given
        if loss == "dlr-targeted":
            runs = _targeted(Apgd(loss, _STEPS, eot), targets)
        elif loss:
            runs = [Run(Apgd(loss, _STEPS, eot), restart=restart) for restart in range(restarts)]
        elif name == "fab":
            runs = [Run(Fab(targeted=False, classes=classes, steps=_STEPS), restart=restart) for restart in range(restarts)]
        elif name == "fab-t":
            runs = _targeted(Fab(targeted=True, steps=_STEPS), targets)
        else:
            runs = [Run(Square(queries=_QUERIES))]
        stages.append(Stage(name, tuple(runs)))
    return stages, flags


def _targeted(search, targets):
    return [Run(search, rank) for rank in range(2, 2 + targets)]


@dataclasses.dataclass(frozen=True)
class _Job:
    """What all attacks of an evaluation work on, and how."""

    network: Network
    points: dict[str, np.ndarray]
    keys: Array
    threat: ThreatModel
    sizes: list[int]
    mesh: Mesh | None

    def score(self, images: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Returns whether the network is right about `images`, which stand for the points `rows`; always in the same shape."""
        labelled = {"images": images, "labels": self.points["labels"][rows]}
        return score(self.network, labelled, self.keys[rows], size=self.sizes[0], mesh=self.mesh)

    def batches(self, stage: Stage, number: int, left: np.ndarray, records: Records) -> Iterator[tuple[Record, bool]]:
        """Yields the batches of a run, and whether they were on record; those first, then the others, which it records."""
        done = records.of(stage.name, number, left)
        yield from ((record, True) for record in done)
        left = np.setdiff1d(left, np.concatenate([left[:0], *(record.indices for record in done)]))
        run, keys = stage.runs[number], fold(self.keys, np.uint32(zlib.crc32(stage.name.encode())))
        began = time.perf_counter()
        for found in run_search(run.search, self.network, run.points(self.points), run.keys(keys), left, self.threat,
                                sizes=self.sizes, mesh=self.mesh):
            fooled, forwards = found.fooled.copy(), found.forwards
            if fooled.any() and not self.network.randomised:
                # A point on the border may change sides with the shape of its batch: the pass that scores all images decides.
                fooled[fooled] = ~self.score(found.images[fooled], found.indices[fooled])
                forwards += int(np.sum(found.fooled))
            seconds, began = time.perf_counter() - began, time.perf_counter()
            record = Record(stage.name, number, found.indices, fooled, found.images[fooled], forwards, found.backwards,
                            found.zero_gradients, seconds)
            records.add(record)
            yield record, False


@dataclasses.dataclass
class _Tally:
    """What a stage took: points attacked, counted for each run, passes in images, points without a gradient, wall time."""

    points: int = 0
    forwards: int = 0
    backwards: int = 0
    zero_gradients: int = 0
    seconds: float = 0.0

    def add(self, record: Record) -> None:
        self.points += len(record.indices)
        self.forwards += record.forwards
        self.backwards += record.backwards
        self.zero_gradients += record.zero_gradients
        self.seconds += record.seconds


def _checked_index(index, n: int) -> np.ndarray:
    if index is None:
        return np.arange(n)
    index = np.asarray(index)
    if index.shape != (n,) or not np.issubdtype(index.dtype, np.integer) or index.min() < 0 or index.max() >= 2**32:
        raise InputError(
            f"autoattack index is {index.dtype}{list(index.shape)}; give one whole number of at least 0 and below 2^32 "
            f"per image, [{n}]")
    return index


def _distances(images: np.ndarray, adversarial: np.ndarray, norm: str) -> np.ndarray:
    """On the host and image by image: the whole data set may be more than a device holds."""
    deltas = ((there - here).ravel() for here, there in zip(images, adversarial))
    return np.array([np.abs(delta).max() if norm == "linf" else np.linalg.norm(delta) for delta in deltas], np.float32)


def _warn(say, flags: list[str]) -> None:
    for flag in flags if say else ():
        say(f"warning: {flag}")
