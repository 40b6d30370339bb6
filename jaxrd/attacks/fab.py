"""FAB and FAB-T, the fast adaptive boundary attack (Croce & Hein 2020, "Minimally distorted adversarial examples with a fast
adaptive boundary attack"): a search for the nearest adversarial image, of which the radius is only asked at the end.

The algorithm is that of the official code:

- A step takes the decision boundary for the hyperplane that it is to first order at the current point: towards one class
  (FAB-T, one gradient), or towards the class whose hyperplane is nearest (FAB, one gradient per class).
- Current point and image are projected onto it, inside the box, both displacements are stretched by 1.05, and the next point
  lies between the two ends: at most a tenth of the way from the point's to the image's.
- From an adversarial point, whatever its class, the search goes on a tenth closer to the image.

The paper's final search on the line to the image is absent there, and hence from AutoAttack. `fab` has it, by bisection: the
stretched steps alone end half a percent beyond the boundary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrd.attacks.network import LogitsFn, Network, as_network, classes_of
from jaxrd.attacks.pgd import loop_unroll
from jaxrd.attacks.projections import onto_hyperplane
from jaxrd.attacks.results import AttackResult
from jaxrd.attacks.search import (
    Passes, Run, State, attack, check_count, check_target, judged, step_keys, targets_of, unit_noise, wide)
from jaxrd.errors import InputError
from jaxrd.threat import ThreatModel

Array = jax.Array

_TINY = 1e-12
_CLASSES_AT_ONCE = 10  # gradients of untargeted FAB
_LARGE = 1e10  # the true class's distance to itself: beyond any other
_MOST_TOWARDS_IMAGE = 0.1  # alpha_max
_STRETCH = 1.05  # eta
_BACKWARD = 0.9  # beta
_ORDER = {"linf": jnp.inf, "l2": 2}
_DUAL_ORDER = {"linf": 1, "l2": 2}


def fab(
    key: Array,
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    *,
    threat: ThreatModel,
    steps: int = 100,
    target: Array | None = None,
    restarts: int = 1,
    targets: int = 0,
    final_search: int = 20,
) -> AttackResult:
    """Searches for the nearest adversarial images by FAB; images misclassified as they are are left alone.

    Args:
      key: one typed key, or [batch] typed keys (see `jaxrd.threat.example_keys`).
      logits_fn: images [batch, h, w, c] -> logits [batch, classes]; a randomised one takes (images, key).
      images: [batch, h, w, c] float32 inside the threat model's bounds.
      labels: [batch] int, the true classes.
      threat: "linf" or "l2", radius and bounds.
      steps: steps of a run.
      target: [batch] int, the class whose boundary is approached; with it or with `targets` any misclassification counts.
      restarts: runs for each target; the first starts at the image, the others at random, half a radius from it. The nearest
        image of all runs is the one returned.
      targets: how many of the most likely wrong classes to aim at, one after the other (FAB-T), at most classes - 1; 0 with no
        `target`: all classes at once (FAB), with a gradient for each of them in every step.
      final_search: bisections between the image and the adversarial one, a forward pass each, at the end of a run; 0 for the
        official code's result.

    Returns:
      `AttackResult`; its `loss` is minus the distance of the nearest adversarial image found, inside the radius or not, -inf
      where none was found, and 0 where the image is misclassified as it is.

    Raises:
      InputError: arguments outside those ranges, images outside the bounds, labels that do not fit, logits that are not finite.

    Example:
      >>> logits_fn = lambda x: x.reshape(len(x), -1)
      >>> result = fab(jax.random.key(0), logits_fn, jnp.array([[0.6, 0.5, 0.1]]).reshape(1, 1, 3, 1), jnp.array([0]),
      ...              threat=ThreatModel("linf", 0.1))
      >>> bool(result.fooled[0]), round(-float(result.loss[0]), 2)
      (True, 0.05)
    """
    threat.check_images(images)
    for name, value, least in (
            ("steps", steps, 1), ("restarts", restarts, 1), ("targets", targets, 0), ("final_search", final_search, 0)):
        check_count(f"fab {name}", value, least)
    network = as_network(logits_fn, images)
    classes = classes_of(network, images)
    if target is not None and targets:
        raise InputError(f"fab targets is {targets} with target given; use one of them")
    if target is not None:
        check_target("fab target", target, labels, classes)
    search = Fab(target is not None or targets > 0, steps, classes, target is not None, final_search)
    ranks = range(2, 2 + min(targets, classes - 1)) if targets else [0]
    runs = [Run(search, rank, restart) for rank in ranks for restart in range(restarts)]
    return attack(runs, key, network, images, labels, threat, best_of_runs=True, target=target)


@dataclasses.dataclass(frozen=True)
class Fab:
    """FAB as a `Search`: see `fab`.

    Attributes:
      targeted: whether one class's boundary is approached, that of the batch's "target" or "rank", instead of the nearest.
      steps: steps.
      classes: the number of classes; may be left out where `targeted`.
      target_known: whether the batch has "target", so that no forward pass is needed to find it.
      final_search: bisections at the end.
    """

    targeted: bool
    steps: int = 100
    classes: int = 0
    target_known: bool = False
    final_search: int = 0
    differentiates = True
    stops_early = False

    def __post_init__(self):
        if not self.targeted and self.classes < 2:
            raise InputError(f"fab classes is {self.classes}; give the number of classes, 2 or more, where targeted is False")

    @property
    def cost(self) -> dict[str, Passes]:
        return {"start": Passes(int(self.targeted and not self.target_known)),
                "step": Passes(2, 1 if self.targeted else self.classes), "finish": Passes(self.final_search)}

    def value(self, logits: Array, labels: Array) -> Array:
        return jnp.zeros(labels.shape, jnp.float32)

    def rows(self) -> Any:
        return np.arange(1, self.steps + 1, dtype=np.int32)

    def start(self, network: Network, batch: State, threat: ThreatModel) -> State:
        images, labels = batch["images"], batch["labels"]
        state = {name: batch[name] for name in ("images", "labels", "key")}
        if self.targeted:
            state["target"] = targets_of(network, batch)
        points = jnp.where(wide(batch["restart"] > 0), jnp.clip(
            images + threat.epsilon / 2 * unit_noise(step_keys(batch, 0), images, threat.norm), *threat.bounds), images)
        return state | {
            "points": points, "nearest": images, "distance": jnp.full(labels.shape, jnp.inf, jnp.float32),
            "finite": jnp.ones(labels.shape, bool)}

    def step(self, network: Network, state: State, row: Any, threat: ThreatModel) -> State:
        images, labels, shape = state["images"], state["labels"], state["images"].shape
        boundary = self._boundary_to_target if self.targeted else self._nearest_boundary
        gap, normal, finite = boundary(network, state, step_keys(state, 2 * row), threat)

        flat = (2, shape[0], -1)
        both = jnp.stack([state["points"], images]).reshape(flat)
        normal = normal.reshape(flat[1:])
        excess = jnp.stack([gap, gap + jnp.sum(normal * (both[1] - both[0]), axis=-1)])
        displacement = onto_hyperplane(both, normal, excess, threat.norm, threat.bounds)
        length = jnp.maximum(jnp.linalg.norm(displacement, _ORDER[threat.norm], axis=-1), 1e-8)
        weight = wide(jnp.minimum(length[0] / (length[0] + length[1]), _MOST_TOWARDS_IMAGE))
        from_point, from_image = (both + _STRETCH * displacement).reshape(2, *shape)
        moved = jnp.clip((1 - weight) * from_point + weight * from_image, *threat.bounds)

        logits = network(moved, step_keys(state, 2 * row + 1))
        right, finite_there = judged(logits, labels)
        adversarial = ~right
        distance = threat.distance(images, moved)
        nearer = adversarial & (distance < state["distance"])
        return state | {
            "points": jnp.where(wide(adversarial), images + _BACKWARD * (moved - images), moved),
            "nearest": jnp.where(wide(nearer), moved, state["nearest"]),
            "distance": jnp.where(nearer, distance, state["distance"]),
            "finite": state["finite"] & finite & finite_there}

    def finish(self, network: Network, state: State, threat: ThreatModel) -> AttackResult:
        images, nearest = state["images"], state["nearest"]
        if not self.final_search:
            return AttackResult(nearest, state["distance"] <= threat.epsilon, -state["distance"])

        def halve(number, bounds):
            right, wrong, finite = bounds  # shares of the way from the image to the nearest adversarial one
            middle = (right + wrong) / 2
            logits = network(images + wide(middle) * (nearest - images), step_keys(state, 2 * self.steps + 2 + number))
            correct, finite_there = judged(logits, state["labels"])
            return jnp.where(correct, middle, right), jnp.where(correct, wrong, middle), finite & finite_there

        ends = (jnp.zeros(len(images), jnp.float32), jnp.ones(len(images), jnp.float32), jnp.ones(len(images), bool))
        _, share, finite = jax.lax.fori_loop(0, self.final_search, halve, ends)
        nearest = images + wide(share) * (nearest - images)
        found = jnp.isfinite(state["distance"])
        distance = jnp.where(found, threat.distance(images, nearest), jnp.inf)
        return AttackResult(nearest, distance <= threat.epsilon, jnp.where(finite | ~found, -distance, jnp.nan))

    def _boundary_to_target(self, network, state, keys, threat):
        """Returns (z_t - z_y [batch], its gradient [batch, h, w, c], whether the logits are finite [batch]) at the points."""

        def gap(points):
            logits = network(points, keys)
            gap = _at(logits, state["target"]) - _at(logits, state["labels"])
            return jnp.sum(gap), (gap, jnp.all(jnp.isfinite(logits), axis=-1))

        normal, (gap, finite) = jax.grad(gap, has_aux=True)(state["points"])
        return gap, normal, finite

    def _nearest_boundary(self, network, state, keys, threat):
        """The same for the class t whose |z_t - z_y| / ||gradient||_dual is the smallest."""
        labels = state["labels"]
        logits, pullback = jax.vjp(lambda points: network(points, keys), state["points"])
        seeds = jnp.broadcast_to(jnp.eye(self.classes, dtype=logits.dtype)[:, None], (self.classes, *logits.shape))
        # All at once, they would take the memory of as many backward passes.
        if self.classes <= _CLASSES_AT_ONCE or loop_unroll() is True:
            groups = [seeds[first:first + _CLASSES_AT_ONCE] for first in range(0, self.classes, _CLASSES_AT_ONCE)]
            gradients = jnp.concatenate([jax.vmap(pullback)(group)[0] for group in groups])
        else:
            (gradients,) = jax.lax.map(pullback, seeds, batch_size=_CLASSES_AT_ONCE)
        gradients = gradients.reshape(self.classes, len(labels), -1)
        rows = jnp.arange(len(labels))
        gaps, normals = logits.T - _at(logits, labels), gradients - gradients[labels, rows]
        gaps = jnp.where(jnp.arange(self.classes)[:, None] == labels, _LARGE, gaps)
        nearest = jnp.argmin(jnp.abs(gaps) / (jnp.linalg.norm(normals, _DUAL_ORDER[threat.norm], axis=-1) + _TINY), axis=0)
        return gaps[nearest, rows], normals[nearest, rows], jnp.all(jnp.isfinite(logits), axis=-1)


def _at(logits, labels):
    return jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
