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
from jaxrd.attacks.outcome import Outcome, Tally
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
    job = prepare(
        key, logits_fn, images, labels, threat=threat, version=version, batch_size=batch_size, index=index, mesh=mesh)
    return job.result(job.attack(np.arange(len(job.index)), resume=resume, say=say), say)


@jax.default_matmul_precision("highest")
def prepare(key, logits_fn, images, labels, *, threat: ThreatModel, version, batch_size: int, index=None, mesh=None) -> "Job":
    """Returns an evaluation of which several processes can each attack a part; arguments and errors as for `autoattack`."""
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
    return Job(logits_fn, network, points, keys, index, threat, version, stages, flags, sizes, mesh)


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
class Job:
    """A prepared evaluation: what is attacked, and how. All its points are here, whoever attacks them.

    Attributes:
      logits_fn: as the user gave it.
      network: the same, as an argument of compiled code.
      points: "images" [n, h, w, c] float32 and "labels" [n] int32.
      keys: [n] typed keys.
      index: [n] int, what they follow.
      threat: norm, radius, bounds.
      version: of the cascade, or the attacks' names joined by "+".
      stages: of the cascade.
      flags: about what had to change in them.
      sizes: from `batch_sizes`.
      mesh: devices that share each batch, or None.
    """

    logits_fn: LogitsFn
    network: Network
    points: dict[str, np.ndarray]
    keys: Array
    index: np.ndarray
    threat: ThreatModel
    version: str
    stages: list[Stage]
    flags: list[str]
    sizes: list[int]
    mesh: Mesh | None

    @jax.default_matmul_precision("highest")
    def attack(self, rows: np.ndarray, *, resume: str | pathlib.Path | None = None, say: Callable[[str], None] | None = None,
               writer: str = "") -> Outcome:
        """Runs the cascade on some of the points.

        Args:
          rows: [k] int, which of the n points; none at all is possible.
          resume, say: see `autoattack`.
          writer: see `Records.open`.

        Raises:
          InputError: logits that are not finite; a `resume` directory of another evaluation.
        """
        images, n = self.points["images"], len(self.index)
        began = time.perf_counter()
        robust = np.zeros(n, bool)
        robust[rows] = self.score_all(images, rows)
        threat, size = self.threat, self.sizes[0]
        flags = self.flags + trust.inspect(
            self.logits_fn, self.network, images, self.keys, threat.bounds, size, randomised=self.version == "rand")
        configuration = {
            "version": self.version, "norm": threat.norm, "epsilon": threat.epsilon, "bounds": list(threat.bounds),
            "attacks": {stage.name: f"{len(stage.runs)} x {stage.runs[0].search}" for stage in self.stages}}
        metadata = {"jaxrd": jaxrd.__version__, "jax": jax.__version__, **fingerprint(
            self.network, self.points, self.keys, configuration, size)}
        records = Records.open(resume, metadata, n, images.shape[1:], rows=rows, writer=writer)
        if say and records.finished:
            say(f"going on after {records.finished} finished batches of {resume}")
        _warn(say, flags)

        adversarial, clean_correct, attack_index = images.copy(), robust.copy(), np.where(robust, -1, 0)
        tallies = {"clean": Tally(len(rows), len(rows), 0, 0, time.perf_counter() - began)}
        part = "" if len(rows) == n else f" (a share of {n} points)"
        for place, stage in enumerate(self.stages, 1):
            tally = tallies[stage.name] = Tally()
            with Progress(say, stage.name + part, len(stage.runs), len(rows)) as progress:
                for number in range(len(stage.runs)):
                    left = np.flatnonzero(robust)
                    progress.begin(number, len(left))
                    for record, known in self.batches(stage, number, left, records):
                        broken = record.indices[record.fooled]
                        adversarial[broken], robust[broken], attack_index[broken] = record.images, False, place
                        tally.add(record)
                        progress.batch(len(record.indices), int(np.sum(robust)), recorded=known)
        rescored = np.zeros(n, bool)
        rescored[rows] = self.score_all(adversarial, rows)
        return Outcome(rows, adversarial, clean_correct, attack_index, rescored, tallies, flags, metadata)

    def result(self, outcome: Outcome, say: Callable[[str], None] | None = None) -> AutoAttackResult:
        """Returns the result of an outcome that holds all points; `say` is given the flags that are left to raise."""
        accuracy, tallies = outcome.accuracy, outcome.tallies
        zero_gradients = {stage.name: tallies[stage.name].zero_gradients for stage in self.stages
                          if isinstance(stage.runs[0].search, Apgd)}
        by_gradient = {stage.name for stage in self.stages if stage.runs[0].search.differentiates}
        late = trust.review(accuracy, zero_gradients, {name: tally.points for name, tally in tallies.items()}, by_gradient,
                            len(self.index))
        rescored = float(np.mean(outcome.rescored))
        if rescored != accuracy[self.stages[-1].name] and not self.network.randomised:
            late.append(f"re-scoring: the returned images score {rescored:.2%}, the attacks reported "
                        f"{np.mean(outcome.robust):.2%}; the network does not give the same answer twice")
        _warn(say, late)
        return AutoAttackResult(
            images=outcome.images, labels=self.points["labels"], robust=outcome.robust, clean_correct=outcome.clean_correct,
            attack_index=outcome.attack_index, stages=tuple(accuracy), per_attack_accuracy=accuracy, index=self.index,
            flags=outcome.flags + late, distances=_distances(self.points["images"], outcome.images, self.threat.norm),
            passes={name: (tally.forwards, tally.backwards) for name, tally in tallies.items()}, zero_gradients=zero_gradients,
            seconds={name: round(tally.seconds, 3) for name, tally in tallies.items()}, rescored_accuracy=rescored,
            version=self.version, threat=self.threat, metadata=outcome.metadata)

    def score_all(self, images: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Returns whether the network is right about `images[rows]`, which stand for all points; always in the same shape."""
        points = self.points | {"images": images}
        return score(self.network, points, self.keys, size=self.sizes[0], mesh=self.mesh, indices=rows)

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
