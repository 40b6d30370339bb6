"""What the attacks of AutoAttack have in common, and the loop that drives them over many images.

An attack is a `Search`: pure functions that start, advance and finish a batch of points. On arrays, the loop over its steps is
a Python loop over a compiled piece of it: points that need no more work leave the batch, progress can be shown, and the
gradients of convolutions stay out of compiled loops, which XLA's CPU backend runs 6 to 90 times slower. Under `jax.jit` it is a
scan. Every random number follows the key of its point, so results do not depend on batch size, padding or devices.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrd import objectives
from jaxrd.attacks.network import LogitsFn, Network, as_network, classes_of
from jaxrd.attacks.pgd import loop_unroll
from jaxrd.attacks.results import AttackResult
from jaxrd.errors import InputError
from jaxrd.threat import ThreatModel, example_keys

Array = jax.Array
State = dict[str, Array]  # every leaf [batch, ...]

_TINY = 1e-12
LEAST_CLASSES = {"dlr": 3, "dlr-targeted": 4}  # that a loss is defined for


class Passes(NamedTuple):
    """Network passes per image."""

    forwards: int = 0
    backwards: int = 0


class Search(Protocol):
    """An iterated attack on a batch of points, hashable: one compilation serves all searches that are equal.

    `start` is given the batch {"images", "labels", "key" [batch] typed keys, "rank", "restart" [batch] int32, and where the
    caller has them "target" [batch] int32, "start" [batch, h, w, c]: where to begin}. The state has "finite" [batch] bool:
    whether all logits were; where `stops_early`, "active" [batch] bool: which points need more steps; and at the start it may
    have "zero_gradient" [batch] bool.
    """

    steps: int
    differentiates: bool
    stops_early: bool
    cost: dict[str, Passes]  # of "start", one "step", "finish"

    def value(self, logits: Array, labels: Array) -> Array:
        """Returns the `loss` of images that need no attack, since these are their logits already, [batch]."""

    def rows(self) -> Any:
        """Returns what differs from step to step: a pytree of numpy arrays [steps, ...]."""

    def start(self, network: Network, batch: State, threat: ThreatModel) -> State: ...

    def step(self, network: Network, state: State, row: Any, threat: ThreatModel) -> State: ...

    def finish(self, network: Network, state: State, threat: ThreatModel) -> AttackResult:
        """Returns the result; `images` may be anything where `fooled` is False."""


class Found(NamedTuple):
    """What a search found for one batch, on the host.

    Attributes:
      indices: [k] the points, as the caller numbers them.
      images: [k, h, w, c] float32, what the search ended with; adversarial where `fooled`.
      fooled: [k] bool.
      loss: [k] float32.
      zero_gradients: how many points had a gradient of exactly 0 at the start.
      forwards, backwards: passes through the network, in images, without padding.
    """

    indices: np.ndarray
    images: np.ndarray
    fooled: np.ndarray
    loss: np.ndarray
    zero_gradients: int
    forwards: int
    backwards: int


def batch_sizes(batch_size: int, devices: int = 1) -> list[int]:
    """Returns the few sizes that batches are padded to: the largest first, then halves, each a multiple of the devices."""
    sizes = {math.ceil(batch_size / 2**halvings / devices) * devices for halvings in range(6)}
    return sorted((size for size in sizes if size >= min(8, batch_size)), reverse=True)


def run_search(
    search: Search,
    network: Network,
    points: dict[str, np.ndarray],
    keys: Array,
    indices: np.ndarray,
    threat: ThreatModel,
    *,
    sizes: Sequence[int],
    mesh: Mesh | None = None,
) -> Iterator[Found]:
    """Attacks `points[indices]`, batch after batch.

    Args:
      search: the attack.
      network: the function under attack; on the devices of `mesh`, replicated, where there is one.
      points: "images" [n, h, w, c] and "labels" [n], with the other entries that `Search.start` knows.
      keys: [n] typed keys, one per point.
      indices: [k] int, which of the n points.
      threat: norm and radius.
      sizes: from `batch_sizes`; a batch is padded to the least that holds it.
      mesh: devices that share each batch.

    Raises:
      InputError: logits that are not finite.
    """
    for first in range(0, len(indices), sizes[0]):
        yield _run_batch(search, network, points, keys, indices[first:first + sizes[0]], threat, sizes, mesh)


def _run_batch(search, network, points, keys, indices, threat, sizes, mesh) -> Found:
    def fit(count):
        return min(size for size in sizes if size >= count)

    padded = np.resize(indices, fit(len(indices)))
    batch = _put({name: value[padded] for name, value in points.items()} | {"key": keys[padded]}, mesh)
    state, zero_gradients = _start(search, network, batch, threat)
    state = _put(state, mesh)  # its constants came back on every device, and would be compiled for once more
    zero_gradients = int(np.sum(np.asarray(zero_gradients)[:len(indices)]))
    spent = np.array(search.cost["start"]) * len(indices)
    rows = search.rows()
    chunk = _chunk(search)
    live, size = np.arange(len(indices)), len(padded)  # row i of the state is point live[i] of this batch
    images = np.empty((len(indices), *points["images"].shape[1:]), np.float32)
    fooled, loss = np.zeros(len(indices), bool), np.zeros(len(indices), np.float32)

    def keep(rows):  # the results of some rows of the state
        result, finite = _finish(search, network, state, threat)
        _check_finite(np.asarray(finite)[rows])
        part = live[rows]
        images[part], fooled[part], loss[part] = (np.asarray(value)[rows] for value in result)

    for first in range(0, search.steps, chunk):
        if search.stops_early:
            active = np.asarray(state["active"])[:len(live)]
            if not active.any():
                break
            if (smaller := fit(int(active.sum()))) < size:
                keep(np.flatnonzero(~active))
                live, rows_left, size = live[active], np.resize(np.flatnonzero(active), smaller), smaller
                state = _put(_take(state, rows_left), mesh)
        steps = min(chunk, search.steps - first)
        state = _advance(search, network, state, _part(rows, first, steps), threat)
        if mesh is not None and mesh.size > 1 and jax.default_backend() == "cpu":
            # XLA's collectives between CPU devices of one process deadlock with several calls in flight.
            jax.block_until_ready(state)
        spent = spent + np.array(search.cost["step"]) * steps * len(live)
    keep(np.arange(len(live)))
    spent = spent + np.array(search.cost["finish"]) * len(indices)
    return Found(indices, images, fooled, loss, zero_gradients, int(spent[0]), int(spent[1]))


def _chunk(search) -> int:
    """Returns the steps per compiled call, at most."""
    return 100 if not search.differentiates else 1 if jax.default_backend() == "cpu" else 25


def score(network: Network, points: dict[str, np.ndarray], keys: Array, *, size: int, mesh: Mesh | None = None,
          indices: np.ndarray | None = None) -> np.ndarray:
    """Returns whether `points[indices]` ("images", "labels") are classified correctly, [k] bool, in batches of one size.

    Args:
      network, points, keys, mesh: see `run_search`.
      size: of every batch.
      indices: [k] int, which of the n points; by default all of them.

    Raises:
      InputError: logits that are not finite.
    """
    indices = np.arange(len(points["labels"])) if indices is None else indices
    correct = np.zeros(len(indices), bool)
    for first in range(0, len(correct), size):
        rows = indices[first:first + size]
        padded = np.resize(rows, size)
        batch = _put({name: points[name][padded] for name in ("images", "labels")} | {"key": keys[padded]}, mesh)
        right, finite = (np.asarray(value)[:len(rows)] for value in _correct(network, batch))
        _check_finite(finite)
        correct[first:first + size] = right
    return correct


class Run(NamedTuple):
    """One run of an attack: the search, the rank of its target among the clean logits (2: the runner-up), the restart."""

    search: Search
    rank: int = 0
    restart: int = 0

    def keys(self, keys: Array) -> Array:
        """Returns the keys of this run, [n], from those of the attack."""
        return fold(keys, self.rank, self.restart)

    def points(self, points: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the points with the target's rank and the restart."""
        n = len(points["labels"])
        return points | {"rank": np.full(n, self.rank, np.int32), "restart": np.full(n, self.restart, np.int32)}


@jax.default_matmul_precision("highest")  # accelerators round the products of float32 by default, which masks gradients
def attack(
    runs: Sequence[Run],
    key: Array,
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    threat: ThreatModel,
    *,
    best_of_runs: bool = False,
    **points: Array | None,
) -> AttackResult:
    """Returns the outcome of several runs, each on the points that those before it left: the body of every public attack.

    Args:
      runs: in the order in which they are tried.
      key: one typed key, or [batch] typed keys.
      logits_fn: images -> logits.
      images: [batch, h, w, c] float32.
      labels: [batch] int.
      threat: norm and radius.
      best_of_runs: give every run all points, and keep of each the adversarial image with the largest loss.
      **points: further entries of `Search.start`'s batch; None is left out.

    Raises:
      InputError: images, labels or a function that do not fit.
    """
    threat.check_images(images)
    network = as_network(logits_fn, images)
    check_labels(labels, images, classes_of(network, images))
    given = {"images": images, "labels": labels} | {name: value for name, value in points.items() if value is not None}
    keys = example_keys(key, images.shape[0])
    if any(isinstance(leaf, jax.core.Tracer) for leaf in (*given.values(), keys, *network.leaves, threat.epsilon)):
        return _attack_traced(runs, network, given, keys, threat, best_of_runs)
    keys = uncommitted(keys)
    given = {name: np.asarray(value, np.int32 if name in ("labels", "target") else np.float32) for name, value in given.items()}
    if not (n := len(given["labels"])):
        raise InputError("images are none; give at least one")
    sizes = batch_sizes(n)
    right, finite, value = map(np.asarray, _clean(runs[0].search, network, given | {"key": keys}))
    _check_finite(finite)
    if (own := right & (given.get("target", -1) == given["labels"])).any():
        raise InputError(f"target is {given['labels'][own][0]} for an image of that class; give another class")
    result = [given["images"].copy(), ~right, np.where(right, -np.inf, value).astype(np.float32)]
    for run in runs:
        left = np.flatnonzero(right if best_of_runs else ~result[1])
        for found in run_search(run.search, network, run.points(given), run.keys(keys), left, threat, sizes=sizes):
            new = found.fooled & (~result[1][found.indices] | (found.loss > result[2][found.indices]))
            adversarial = found.indices[new]
            result[0][adversarial], result[1][adversarial] = found.images[new], True
            result[2][found.indices] = np.maximum(result[2][found.indices], found.loss)
    return AttackResult(*map(jnp.asarray, result))


def _attack_traced(runs, network, points, keys, threat, best_of_runs) -> AttackResult:
    points = {name: value.astype(jnp.int32 if name in ("labels", "target") else jnp.float32) for name, value in (
        (name, jnp.asarray(value)) for name, value in points.items())}
    right, _, value = _clean(runs[0].search, network, points | {"key": keys})
    result = AttackResult(points["images"], ~right, jnp.where(right, -jnp.inf, value))
    for run in runs:
        batch = points | {name: jnp.full(keys.shape, value, jnp.int32) for name, value in (
            ("rank", run.rank), ("restart", run.restart))} | {"key": run.keys(keys)}
        state = run.search.start(network, batch, threat)
        state.pop("zero_gradient", None)
        state, _ = jax.lax.scan(lambda state, row, search=run.search: (search.step(network, state, row, threat), None), state,
                                run.search.rows(), unroll=loop_unroll() if run.search.steps <= 20 else 1)
        found = run.search.finish(network, state, threat)
        left = right if best_of_runs else ~result.fooled
        new = left & found.fooled & (~result.fooled | (found.loss > result.loss))
        result = AttackResult(
            jnp.where(wide(new), found.images, result.images), result.fooled | new,
            jnp.where(left, jnp.maximum(result.loss, found.loss), result.loss))
    return jax.tree.map(jax.lax.stop_gradient, result)


def check_labels(labels: Array, images: Array, classes: int) -> None:
    """Raises InputError where labels are not [batch] integers in [0, classes); values are read from concrete arrays only."""
    if not hasattr(labels, "dtype"):
        raise InputError(f"labels are a {type(labels).__name__}; give an array with one integer for each image")
    if jnp.ndim(labels) != 1 or len(labels) != len(images) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise InputError(
            f"labels are {labels.dtype}{list(jnp.shape(labels))}; give one integer for each of the {len(images)} images")
    if isinstance(labels, jax.core.Tracer) or not len(labels):
        return
    values = np.asarray(labels)
    if values.min() < 0 or values.max() >= classes:
        raise InputError(f"labels reach from {values.min()} to {values.max()}, but logits_fn has {classes} classes; "
                         f"give classes from 0 to {classes - 1}")


def judged(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Returns whether each image is classified correctly, and whether its logits are finite, both [batch] bool."""
    return objectives.correct(logits, labels), jnp.all(jnp.isfinite(logits), axis=-1)


def wide(values: Array) -> Array:
    """Returns one value per image, [batch], shaped to meet images: [batch, 1, 1, 1]."""
    return values[:, None, None, None]


def uncommitted(keys: Array) -> Array:
    """Returns the keys tied to no device, so that they may meet weights on any."""
    return jax.random.wrap_key_data(np.asarray(jax.random.key_data(keys)), impl=jax.random.key_impl(keys))


def step_keys(state: State, row: Any) -> Array:
    """Returns the keys of one step, [batch]."""
    return jax.vmap(jax.random.fold_in, (0, None))(state["key"], row)


def unit_noise(keys: Array, images: Array, norm: str) -> Array:
    """Returns random directions of length 1 in the norm, one per image and shaped like them.

    Uniform in [-1, 1] per pixel and scaled so that one pixel is at +-1 for "linf"; uniform on the sphere for "l2".
    """
    size = math.prod(images.shape[1:])
    if norm == "linf":
        noise = jax.vmap(lambda key: jax.random.uniform(key, (size,), jnp.float32, -1.0, 1.0))(keys)
        length = jnp.max(jnp.abs(noise), axis=1, keepdims=True)
    else:
        noise = jax.vmap(lambda key: jax.random.normal(key, (size,), jnp.float32))(keys)
        length = jnp.sqrt(jnp.sum(noise**2, axis=1, keepdims=True))
    return (noise / (length + _TINY)).reshape(images.shape)


def targets_of(network: Network, batch: State) -> Array:
    """Returns the target classes, [batch]: those given, or the class of the given rank among the clean logits (1: the top)."""
    if "target" in batch:
        return batch["target"]
    logits = network(batch["images"], jax.vmap(jax.random.fold_in, (0, None))(batch["key"], 2**31 - 1))
    order = jnp.argsort(logits, axis=-1, descending=True)
    return jnp.take_along_axis(order, batch["rank"][:, None] - 1, axis=1)[:, 0]


def check_target(field: str, target: Array, labels: Array, classes: int) -> None:
    """Raises InputError where `target` is not one class per label; values are read from concrete arrays only."""
    shape, dtype = jnp.shape(target), jnp.asarray(target).dtype
    if shape != jnp.shape(labels) or not jnp.issubdtype(dtype, jnp.integer):
        raise InputError(f"{field} is {dtype}{list(shape)}; give one integer for each label, {list(jnp.shape(labels))}")
    if isinstance(target, jax.core.Tracer):
        return
    target = np.asarray(target)
    outside = (target < 0) | (target >= classes)
    if outside.any():
        raise InputError(f"{field} has {target[outside][0]}, but logits_fn has {classes} classes; give classes from 0 to "
                         f"{classes - 1}")


def check_classes(field: str, loss: str, classes: int) -> None:
    """Raises InputError where a loss is not defined for so few classes."""
    if classes < (least := LEAST_CLASSES.get(loss, 2)):
        others = '"ce", "margin" or "dlr"' if classes == 3 else '"ce" or "margin"'
        raise InputError(f'{field} is "{loss}", which needs {least} classes; logits_fn has {classes}: use {others}')


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raises InputError unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise InputError(f"{name} is {value!r}; it must be a whole number of at least {least}")


def _check_finite(finite: np.ndarray) -> None:
    if not np.all(finite):
        raise InputError(
            f"{np.sum(~finite)} of the {len(finite)} images of a batch get logits that are not finite, as they are or on an "
            "attack's way; a comparison with NaN would count them as robust: check the checkpoint of the model, its dtype, and "
            "its gradients (a square root or a norm at 0?)")


def _part(rows, first, count):
    return jax.tree.map(lambda row: row[first:first + count], rows)


def _put(batch, mesh: Mesh | None):
    if mesh is None:
        return batch
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec(mesh.axis_names[0])))


@functools.partial(jax.jit, static_argnums=0)
def _start(search, network, batch, threat):
    state = search.start(network, batch, threat)
    return {name: value for name, value in state.items() if name != "zero_gradient"}, state.get(
        "zero_gradient", jnp.zeros(batch["labels"].shape, bool))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _advance(search, network, state, rows, threat):
    if len(jax.tree.leaves(rows)[0]) == 1:  # a scan of one step is compiled as a loop all the same
        return search.step(network, state, jax.tree.map(lambda row: row[0], rows), threat)
    return jax.lax.scan(lambda state, row: (search.step(network, state, row, threat), None), state, rows)[0]


@functools.partial(jax.jit, static_argnums=0)
def _finish(search, network, state, threat):
    result = search.finish(network, state, threat)
    return result, state["finite"] & ~jnp.isnan(result.loss)  # a finish that forwards says so by its loss


@functools.partial(jax.jit, static_argnums=0)
def _clean(search, network, batch):
    logits = network(batch["images"], batch["key"])
    return *judged(logits, batch["labels"]), search.value(logits, batch["labels"])


@jax.jit
def _take(state, rows):
    return jax.tree.map(lambda leaf: leaf[rows], state)


@jax.jit
def fold(keys: Array, *numbers: int) -> Array:
    """Returns each of the keys [n] folded with the numbers, one after the other."""
    for number in numbers:
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
    return keys


@jax.jit
def _correct(network, batch):
    return judged(network(batch["images"], batch["key"]), batch["labels"])
