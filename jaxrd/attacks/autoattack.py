"""AutoAttack: the cascade of parameter-free attacks that robust accuracies are reported with (Croce & Hein 2020).

    standard   APGD on the cross-entropy, targeted APGD (9 targets), targeted FAB (9 targets), Square (5,000 queries)
    plus       the same with 5 restarts, untargeted APGD-DLR and untargeted FAB besides
    rand       APGD on cross-entropy and DLR, gradients averaged over 20 draws: for randomised defences
    fast       APGD on the cross-entropy and targeted APGD. Not AutoAttack: say APGD-CE + APGD-T where you report it

Each attack starts from the clean image of every point that is still classified correctly, so the accuracy after each stage is
that of the worst case over the attacks so far. Two things differ from the official code. Random numbers follow each point's
index and not the batch that it came in, so results do not depend on batch size or devices; with this, Square draws its windows
for each image, as its paper has it. And points are gathered anew for each target and restart over the whole data set, so no pass
is spent on a point that is broken already.
"""

import dataclasses
import json
import os
import pathlib
import time
import zlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxrd
from jaxrd.attacks import trust
from jaxrd.attacks.apgd import Apgd
from jaxrd.attacks.fab import Fab
from jaxrd.attacks.network import LogitsFn, as_network, classes_of
from jaxrd.attacks.progress import Progress
from jaxrd.attacks.records import Record, Records, fingerprint
from jaxrd.attacks.search import Run, batch_sizes, check_count, check_labels, fold, run_search, score
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


@dataclasses.dataclass(frozen=True)
class AutoAttackResult:
    """What a cascade found, on the host.

    Attributes:
      images: [n, h, w, c] float32, adversarial where one was found, else the clean ones.
      labels: [n] int32.
      robust: [n] bool, still classified correctly.
      clean_correct: [n] bool.
      attack_index: [n] int, the place in `stages` of what broke the point: 0 (clean) where it was wrong already; -1: robust.
      stages: ("clean", then the attacks in their order).
      per_attack_accuracy: stage -> accuracy after it.
      distances: [n] float32, of `images` to the clean ones in the threat model's norm.
      index: [n] int, what the random numbers of each point followed.
      flags: what makes the numbers doubtful, one line each; empty is good.
      passes: stage -> (forward, backward) passes through the network, in images.
      zero_gradients: stage -> points whose gradient was exactly 0 at a start, for the attacks by gradient.
      seconds: stage -> wall time, of all sittings together.
      rescored_accuracy: accuracy on `images` in a pass of its own.
      version: of the cascade, or the attacks' names joined by "+".
      threat: norm, radius, bounds.
      metadata: fingerprints of model, data and configuration, and the versions of jaxrd and jax.
    """

    images: np.ndarray
    labels: np.ndarray
    robust: np.ndarray
    clean_correct: np.ndarray
    attack_index: np.ndarray
    stages: tuple[str, ...]
    per_attack_accuracy: dict[str, float]
    distances: np.ndarray
    index: np.ndarray
    flags: list[str]
    passes: dict[str, tuple[int, int]]
    zero_gradients: dict[str, int]
    seconds: dict[str, float]
    rescored_accuracy: float
    version: str
    threat: ThreatModel
    metadata: dict

    @property
    def accuracy(self) -> float:
        """Robust accuracy."""
        return float(np.mean(self.robust))

    def save(self, path: str | pathlib.Path) -> pathlib.Path:
        """Writes everything to one .npz: arrays by name (images as float32: eight bits would undo attacks), the rest as JSON
        under "metadata". Returns the path; a kill leaves the old file or the new one.
        """
        path = pathlib.Path(path)
        if path.suffix != ".npz":
            raise InputError(f'result path "{path}" must end in .npz')
        rest = {name: getattr(self, name) for name in _REST} | {"threat": dataclasses.asdict(self.threat)}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "wb") as file:
            np.savez(file, metadata=json.dumps(rest), **{name: getattr(self, name) for name in _ARRAYS})
        os.replace(temporary, path)
        return path

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "AutoAttackResult":
        """Reads what `save` wrote; raises InputError where the file is missing, damaged or another one."""
        try:
            with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
                rest = json.loads(str(file["metadata"]))
                arrays = {name: file[name] for name in _ARRAYS}
            threat = rest.pop("threat")
            rest |= {"threat": ThreatModel(threat["norm"], threat["epsilon"], tuple(threat["bounds"])),
                     "stages": tuple(rest["stages"]), "passes": {name: tuple(pair) for name, pair in rest["passes"].items()}}
            return cls(**arrays, **rest)
        except FileNotFoundError:
            raise InputError(f'result path "{path}" does not exist; it is what AutoAttackResult.save wrote') from None
        except Exception as error:  # whatever a damaged zip, array or JSON raises
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{path} is no saved AutoAttackResult, or is damaged ({line}); run the evaluation again") from None


_ARRAYS = ("images", "labels", "robust", "clean_correct", "attack_index", "distances", "index")
_REST = tuple(field.name for field in dataclasses.fields(AutoAttackResult) if field.name not in (*_ARRAYS, "threat"))


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

    The network must be in eval mode, and compute in float32 where the number is to be compared with published ones.

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
    classes = classes_of(network, images)
    labels = np.asarray(labels)
    check_labels(labels, images, classes)
    check_count("autoattack batch_size", batch_size)
    points = {"images": np.asarray(images, np.float32), "labels": labels.astype(np.int32)}
    n = len(labels)
    if not n:
        raise InputError("images are none; give at least one")
    stages, flags = cascade(version, classes)
    version = version if isinstance(version, str) else "+".join(version)
    index = _checked_index(index, n)
    keys = example_keys(key, n) if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(index))
    if mesh is not None:
        network = jax.device_put(network, NamedSharding(mesh, PartitionSpec()))
    sizes = batch_sizes(min(batch_size, n), 1 if mesh is None else mesh.size)
    judge = {"size": sizes[0], "mesh": mesh}

    began = time.perf_counter()
    robust = score(network, points, keys, **judge)
    few = slice(0, sizes[0])
    flags += trust.inspect(logits_fn, network, points["images"][few], keys[few], randomised=version == "rand")
    metadata = {"jaxrd": jaxrd.__version__, "jax": jax.__version__, **fingerprint(
        network, points, keys, {"version": version, "attacks": [repr(stage) for stage in stages], "norm": threat.norm,
                                "epsilon": float(threat.epsilon), "bounds": list(threat.bounds)})}
    records = Records.open(resume, metadata, n, points["images"].shape[1:])
    for flag in flags:
        _warn(say, flag)

    adversarial, clean_correct = points["images"].copy(), robust.copy()
    attack_index = np.where(robust, -1, 0)
    accuracy, passes, zero_gradients, attacked = {"clean": float(np.mean(robust))}, {"clean": (n, 0)}, {}, {}
    seconds = {"clean": time.perf_counter() - began}
    for place, stage in enumerate(stages, 1):
        stage_keys = fold(keys, np.uint32(zlib.crc32(stage.name.encode())))
        spent, zero, count, took = np.zeros(2, int), 0, 0, 0.0
        with Progress(say, stage.name, len(stage.runs), n) as progress:
            for number, run in enumerate(stage.runs):
                left = np.flatnonzero(robust)
                progress.begin(number, len(left))
                for record in _batches(run, number, stage, network, points, stage_keys, left, threat, sizes, mesh, records, judge):
                    broken = record.indices[record.fooled]
                    adversarial[broken], robust[broken], attack_index[broken] = record.images, False, place
                    spent, took = spent + (record.forwards, record.backwards), took + record.seconds
                    zero, count = zero + record.zero_gradients, count + len(record.indices)
                    progress.batch(len(record.indices), int(np.sum(robust)))
        accuracy[stage.name], passes[stage.name] = float(np.mean(robust)), (int(spent[0]), int(spent[1]))
        seconds[stage.name], attacked[stage.name] = took, count
        if isinstance(stage.runs[0].search, Apgd):
            zero_gradients[stage.name] = zero
    by_gradient = {stage.name for stage in stages if stage.runs[0].search.differentiates}
    late = trust.review(accuracy, zero_gradients, attacked, by_gradient, n)
    rescored = float(np.mean(score(network, points | {"images": adversarial}, keys, **judge)))
    if rescored != np.mean(robust) and not network.randomised:
        late.append(f"re-scoring: the returned images score {rescored:.2%}, the attacks reported {np.mean(robust):.2%}; the network "
                    "does not give the same answer twice")
    for flag in late:
        _warn(say, flag)
    return AutoAttackResult(
        images=adversarial, labels=points["labels"], robust=robust, clean_correct=clean_correct, attack_index=attack_index,
        stages=("clean", *(stage.name for stage in stages)), per_attack_accuracy=accuracy,
        distances=np.asarray(threat.distance(points["images"], adversarial), np.float32), index=index, flags=flags + late,
        passes=passes, zero_gradients=zero_gradients, seconds={name: round(value, 3) for name, value in seconds.items()},
        rescored_accuracy=rescored, version=version, threat=threat, metadata=metadata)


def cascade(version: str | Sequence[str], classes: int) -> tuple[list[Stage], list[str]]:
    """Returns the stages of a version and the flags about what had to change for so few classes.

    DLR is defined for 3 classes and more, targeted DLR for 4. Below, the untargeted loss takes the place of the targeted one, and
    the margin that of DLR; targets are at most the wrong classes there are.

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
        names = tuple(version)
        for name in names:
            choose("autoattack version: attack", name, ATTACKS)
        if not names or len(set(names)) < len(names):
            raise InputError(f"autoattack version is {list(names)}; name each attack once, such as ['apgd-ce', 'square']")
    restarts, eot = _RESTARTS if version == "plus" else 1, _EOT if version == "rand" else 1
    targets = min(_TARGETS, classes - 1)
    stages, flags = [], []
    for name in names:
        loss = {"apgd-ce": "ce", "apgd-dlr": "dlr", "apgd-t": "dlr-targeted"}.get(name)
        if loss == "dlr-targeted" and classes < 4 or loss == "dlr" and classes < 3:
            given = "dlr" if classes == 3 else "margin"
            flags.append(f"classes: {classes} are too few for the loss of {name}; one run of APGD on "
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


def _batches(run, number, stage, network, points, keys, left, threat, sizes, mesh, records, judge):
    """Yields the batches of a run: first those on record, then the others as they are attacked, and puts them on record."""
    done = records.of(stage.name, number, left)
    yield from done
    left = np.setdiff1d(left, np.concatenate([left[:0], *(record.indices for record in done)]))
    began = time.perf_counter()
    for found in run_search(run.search, network, run.points(points), run.keys(keys), left, threat, sizes=sizes, mesh=mesh):
        fooled, forwards = found.fooled.copy(), found.forwards
        hits = np.flatnonzero(fooled)
        if len(hits) and not network.randomised:
            # A point on the border may change sides with the shape of its batch: what counts is the pass that scores all images.
            rows = found.indices[hits]
            fooled[hits] = ~score(network, {"images": found.images[hits], "labels": points["labels"][rows]}, keys[rows], **judge)
            forwards += len(hits)
        now = time.perf_counter()
        record = Record(stage.name, number, found.indices, fooled, found.images[fooled], forwards, found.backwards,
                        found.zero_gradients, now - began)
        began = now
        records.add(record)
        yield record


def _checked_index(index, n: int) -> np.ndarray:
    if index is None:
        return np.arange(n)
    index = np.asarray(index)
    if index.shape != (n,) or not np.issubdtype(index.dtype, np.integer) or index.min() < 0:
        raise InputError(f"autoattack index is {index.dtype}{list(index.shape)}; give one whole number of at least 0 per image, [{n}]")
    return index


def _warn(say, flag: str) -> None:
    if say:
        say(f"warning: {flag}")
