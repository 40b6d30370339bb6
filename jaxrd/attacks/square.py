"""Square, a random search that needs no gradients, only logits (Andriushchenko et al. 2020, "Square Attack: a query-efficient
black-box adversarial attack via random search").

A square window of the perturbation is redrawn at random, and the change is kept where it raises the margin. The windows shrink
as the queries pass. The algorithm is that of the official code, quirks included, with these differences:

- Every point draws from a key of its own, so windows and colours are each point's, as in the paper; the official code shares a
  window among the batch.
- Success is a wrong argmax. The official code stops at a margin of 0 already and asks the argmax afterwards; where logits are
  quantised, a tie that the argmax reads as right would end the search there without success.
- Images of any shape: windows never exceed the shorter side, and L2 starts from whole tiles only.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrd import objectives
from jaxrd.attacks.network import LogitsFn, Network
from jaxrd.attacks.results import AttackResult
from jaxrd.attacks.search import Passes, Run, State, attack, check_count, judged, step_keys, wide
from jaxrd.threat import ThreatModel

Array = jax.Array

_TINY = 1e-12
_SHARE = 0.8  # of the pixels, in the first windows
_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # the last iterations, from 0, before the share is halved


def square(
    key: Array,
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    *,
    threat: ThreatModel,
    queries: int = 5000,
    restarts: int = 1,
) -> AttackResult:
    """Searches the threat model at random; points that are misclassified, as they are or by an earlier run, are left alone.

    Args:
      key: one typed key, or [batch] typed keys (see `jaxrd.threat.example_keys`).
      logits_fn: images [batch, h, w, c] -> logits [batch, classes]; a randomised one takes (images, key).
      images: [batch, h, w, c] float32 inside the threat model's bounds.
      labels: [batch] int, the true classes.
      threat: "linf" or "l2", radius and bounds.
      queries: images that a run tries for each point, after its start. The schedule of the windows counts in queries, whatever
        their number, so a longer run begins as a shorter one.
      restarts: runs with other random numbers.

    Returns:
      `AttackResult`; its `loss` is the largest margin max_{c != y} z_c - z_y reached, and that of the image itself where it is
      misclassified as it is. A search ends at the first misclassified point.

    Raises:
      InputError: arguments outside those ranges, images outside the bounds, labels that do not fit, logits that are not finite.

    Example:
      >>> logits_fn = lambda x: x.reshape(len(x), -1)
      >>> result = square(jax.random.key(0), logits_fn, jnp.array([[0.6, 0.5, 0.1]]).reshape(1, 1, 1, 3), jnp.array([0]),
      ...                 threat=ThreatModel("linf", 0.1), queries=100)
      >>> bool(result.fooled[0])
      True
    """
    for name, value in (("queries", queries), ("restarts", restarts)):
        check_count(f"square {name}", value)
    runs = [Run(Square(queries), restart=restart) for restart in range(restarts)]
    return attack(runs, key, logits_fn, images, labels, threat)


@dataclasses.dataclass(frozen=True)
class Square:
    """Square as a `Search`: see `square`."""

    queries: int = 5000
    differentiates = False
    stops_early = True

    @property
    def steps(self) -> int:
        return self.queries

    @property
    def cost(self) -> dict[str, Passes]:
        return {"start": Passes(1), "step": Passes(1), "finish": Passes()}

    def value(self, logits: Array, labels: Array) -> Array:
        return objectives.margin(logits, labels)

    def rows(self) -> Any:
        iterations = np.arange(self.queries, dtype=np.int32)
        return {"step": iterations + 1, "halvings": np.searchsorted(_HALVED_AFTER, iterations).astype(np.int32)}

    def start(self, network: Network, batch: State, threat: ThreatModel) -> State:
        state = {name: batch[name] for name in ("images", "labels", "key")}
        points = (_stripes if threat.norm == "linf" else _tiles)(state, threat)
        margin, wrong, finite = _ask(network, state, points, 0)
        return state | {"points": points, "margin": margin, "active": ~wrong, "finite": finite}

    def step(self, network: Network, state: State, row: Any, threat: ThreatModel) -> State:
        points = (_recolour if threat.norm == "linf" else _move_mass)(state, row, threat)
        margin, wrong, finite = _ask(network, state, points, row["step"])
        active = state["active"]
        accepted = active & ((margin > state["margin"]) | wrong)
        return state | {
            "points": jnp.where(wide(accepted), points, state["points"]),
            "margin": jnp.where(accepted, margin, state["margin"]),
            "active": active & ~wrong, "finite": state["finite"] & (finite | ~active)}

    def finish(self, network: Network, state: State, threat: ThreatModel) -> AttackResult:
        return AttackResult(state["points"], ~state["active"], state["margin"])


def uniforms(keys: Array, count: int) -> Array:
    """Returns the random numbers of one step, [batch, count] float32 in [0, 1): all that a point needs, in a single draw.

    Step number i, from 1, draws from `fold_in(key of the point, i)`, the start from `fold_in(key of the point, 0)`. A number
    below 1/2 stands for the sign -1; a number u for the window position floor(u (side - window)), at most side - window - 1: as
    in the official code, windows that do not fill the image leave its last row and column as they started. In order:

    - L-infinity, start: the sign of each column's stripe, [w, c]; step: row and column of the window, a sign per channel;
    - L2, start: for each tile, row by row, whether its pattern is transposed (from 1/2), then a sign per channel; step: row and
      column of the first window, those of the second, whether the pattern is transposed, a sign per channel.

    Args:
      keys: [batch] typed keys, those of the step.
      count: how many.
    """
    return jax.vmap(lambda key: jax.random.uniform(key, (count,), jnp.float32))(keys)


@functools.cache
def window_sizes(norm: str, height: int, width: int) -> tuple[int, ...]:
    """Returns the sides of the windows before the first halving of their share of the pixels and after each.

    round(sqrt(share h w)) within 1 and the shorter side; for L2 at least 3 and odd, as far as the shorter side allows.
    """
    shorter = min(height, width)
    sizes = [round((_SHARE / 2**halvings * height * width) ** 0.5) for halvings in range(len(_HALVED_AFTER) + 1)]
    if norm == "linf":
        return tuple(min(max(size, 1), shorter) for size in sizes)
    return tuple(min(max(size, 3) | 1, (shorter - 1) | 1) for size in sizes)


@functools.cache
def pattern(size: int) -> np.ndarray:
    """Returns the L2 pattern eta, [size, size] float32 of unit length: a pyramid above one of the opposite sign.

    A pyramid's value at Chebyshev distance d from its centre is sum_{k >= d} 1 / (k + 1)^2, cut off at the pattern's edge; both
    have the same length (eq. 2 of the paper). A single pixel is all that there is of size 1.
    """
    halves = [_pyramid(size // 2, size), -_pyramid(size - size // 2, size)]
    stacked = np.concatenate([half / max(np.linalg.norm(half), _TINY) for half in halves])
    return (stacked / np.linalg.norm(stacked)).astype(np.float32)


def _pyramid(height, width):
    rows, columns = np.abs(np.arange(height) - height // 2), np.abs(np.arange(width) - width // 2)
    weights = 1.0 / np.arange(1, max(height, width) // 2 + 2) ** 2
    return np.cumsum(weights[::-1])[::-1][np.maximum(rows[:, None], columns)]


def _ask(network, state, points, number):
    """Returns (margin, whether misclassified, whether the logits are finite) at the points."""
    # The network's own noise, where it has some, is not that of the attack.
    logits = network(points, jax.vmap(jax.random.fold_in, (0, None))(step_keys(state, number), 2**31 - 1))
    correct, finite = judged(logits, state["labels"])
    return objectives.margin(logits, state["labels"]), ~correct, finite


def _stripes(state, threat):
    """The L-infinity start: each column of each channel moved up or down by epsilon."""
    batch, _, width, channels = state["images"].shape
    signs = _signs(uniforms(step_keys(state, 0), width * channels)).reshape(batch, 1, width, channels)
    return jnp.clip(state["images"] + threat.epsilon * signs, *threat.bounds)


def _recolour(state, row, threat):
    """The L-infinity proposal: a window of one colour."""
    points = state["points"]
    size = jnp.array(window_sizes("linf", *points.shape[1:3]))[row["halvings"]]
    numbers = uniforms(step_keys(state, row["step"]), 2 + points.shape[3])
    inside, _ = _window(numbers[:, :2], size, points.shape)
    colours = 2 * threat.epsilon * _signs(numbers[:, None, None, 2:])
    return threat.project(state["images"], points + jnp.where(inside, colours, 0.0))


def _tiles(state, threat):
    """The L2 start: five tiles, or the few more that fit, along each axis."""
    batch, height, width, channels = state["images"].shape
    size = max(min(height, width) // 5, 1)
    first = [max((side - 5 * size) // 2, 0) for side in (height, width)]
    tiles = [min(side // size, (side - offset) // size) for side, offset in zip((height, width), first)]
    numbers = uniforms(step_keys(state, 0), tiles[0] * tiles[1] * (1 + channels)).reshape(batch, *tiles, 1, 1, 1 + channels)
    eta = pattern(size)[..., None]
    eta = jnp.where(numbers[..., :1] < 0.5, eta, eta.swapaxes(0, 1)) * _signs(numbers[..., 1:])
    covered = [count * size for count in tiles]
    tiled = eta.swapaxes(2, 3).reshape(batch, *covered, channels)
    rest = [(offset, side - offset - length) for offset, side, length in zip(first, (height, width), covered)]
    return _on_sphere(state["images"], jnp.pad(tiled, ((0, 0), *rest, (0, 0))), threat)


def _move_mass(state, row, threat):
    """The L2 proposal: what the perturbation has in two windows, and what it has left to epsilon, goes to the first of them."""
    images, delta = state["images"], state["points"] - state["images"]
    _, height, width, channels = images.shape
    sizes = window_sizes("l2", height, width)
    size = jnp.array(sizes)[row["halvings"]]
    numbers = uniforms(step_keys(state, row["step"]), 5 + channels)
    first, place = _window(numbers[:, 0:2], size, images.shape)
    second, _ = _window(numbers[:, 2:4], size, images.shape)

    # The pattern of this size, shifted to the first window of each point.
    side = max(sizes)
    patterns = np.stack([np.pad(pattern(size), (0, side - size)) for size in sizes])
    transposed = (numbers[:, 4] >= 0.5)[:, None, None]
    rows, columns = (jnp.clip(axis, 0, side - 1) for axis in place)
    eta = jnp.asarray(patterns.reshape(len(sizes), -1))[row["halvings"]][
        jnp.where(transposed, columns * side + rows, rows * side + columns)]

    old = jnp.where(first, delta, 0.0)
    new = jnp.where(first, eta[..., None] * _signs(numbers[:, None, None, 5:]), 0.0) + old / (_TINY + _length(old, (1, 2)))
    left = jnp.maximum(threat.epsilon**2 - _length(delta) ** 2, 0.0) / channels
    new = new / (_TINY + _length(new, (1, 2))) * jnp.sqrt(left + _length(jnp.where(first | second, delta, 0.0)) ** 2)
    return _on_sphere(images, jnp.where(first, new, jnp.where(second, 0.0, delta)), threat)


def _on_sphere(images, delta, threat):
    return jnp.clip(images + delta / (_TINY + _length(delta)) * threat.epsilon, *threat.bounds)


def _window(numbers, size, shape):
    """Returns which pixels a window has, [batch, h, w, 1] bool, and their coordinates in it, [batch, h, 1], [batch, 1, w]."""
    _, height, width, _ = shape
    corner = jnp.floor(numbers * (jnp.array([height, width]) - size)).astype(jnp.int32)
    rows = jnp.arange(height)[:, None] - corner[:, 0, None, None]
    columns = jnp.arange(width) - corner[:, 1, None, None]
    inside = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
    return inside[..., None], (rows, columns)


def _signs(numbers):
    return jnp.where(numbers < 0.5, -1.0, 1.0)


def _length(delta, axes=(1, 2, 3)):
    return jnp.sqrt(jnp.sum(delta**2, axis=axes, keepdims=True))
