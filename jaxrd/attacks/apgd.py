"""APGD, projected gradient descent that chooses its own step size (Croce & Hein 2020, "Reliable evaluation of adversarial
robustness with an ensemble of diverse parameter-free attacks").

The algorithm is that of the official code, quirks included, where the paper leaves a choice:

- It starts with one pixel at least on the border of the L-infinity ball, or on the sphere for L2.
- Its step, 2 epsilon at first, is halved at fixed checkpoints and per point: where at most 3/4 of the steps since the last
  checkpoint have raised the loss, or where neither the step nor the best loss has changed since. A halved point goes on from
  the best point so far; the momentum still refers to the iterate before.
- The loss before the first step counts as 0 when steps that raise it are counted.
- With EOT the gradient is a mean, loss and prediction are those of the last pass.
- A point that is misclassified is searched on; the latest adversarial point is the one returned.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrd import objectives
from jaxrd.attacks.network import LogitsFn, Network, as_network, classes_of
from jaxrd.attacks.pgd import loop_unroll
from jaxrd.attacks.results import AttackResult
from jaxrd.attacks.search import (
    Passes, Run, State, attack, check_classes, check_count, check_labels, check_target, judged, step_keys,
    targets_of, unit_noise, wide)
from jaxrd.errors import InputError, choose
from jaxrd.threat import ThreatModel

Array = jax.Array

_MOMENTUM = 0.75  # weight of the gradient step; the rest is the step before
_RAISED = 0.75  # share of steps that must have raised the loss
_LOSSES = {"ce": objectives.cross_entropy, "dlr": objectives.dlr, "margin": objectives.margin,
           "dlr-targeted": objectives.targeted_dlr}


def apgd(
    key: Array,
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    *,
    threat: ThreatModel,
    loss: str = "ce",
    steps: int = 100,
    restarts: int = 1,
    target: Array | None = None,
    targets: int = 9,
    x_init: Array | None = None,
    eot: int = 1,
) -> AttackResult:
    """Searches the threat model by APGD; points that are misclassified, as they are or by an earlier run, are left alone.

    Args:
      key: one typed key, or [batch] typed keys (see `jaxrd.threat.example_keys`).
      logits_fn: images [batch, h, w, c] -> logits [batch, classes]; a randomised one takes (images, key).
      images: [batch, h, w, c] float32 inside the threat model's bounds, one batch for the device.
      labels: [batch] int, the true classes.
      threat: "linf" or "l2", radius and bounds.
      loss: "ce", cross-entropy; "dlr", the difference-of-logits ratio (3 classes at least); "dlr-targeted", towards a class
        (4 classes at least), where any misclassification counts as success; "margin", the numerator of "dlr".
      steps: gradient steps of a run.
      restarts: runs from random starts, for each target.
      target: [batch] int, the class to aim at with "dlr-targeted"; None: the most likely wrong ones, one after the other.
      targets: how many of those, at most classes - 1.
      x_init: [batch, h, w, c], where to start instead of at random (with one run only).
      eot: gradients that are averaged for each step, for a randomised `logits_fn`.

    Returns:
      `AttackResult`; its `loss` is the largest value of the loss at any iterate of any run (with several targets, of the loss
      towards any of them), and that of the image itself where it is misclassified as it is: DLR's for "dlr-targeted".

    Raises:
      InputError: arguments outside those ranges, images outside the bounds, labels that do not fit, logits that are not finite.

    Example:
      >>> logits_fn = lambda x: x.reshape(len(x), -1)
      >>> result = apgd(jax.random.key(0), logits_fn, jnp.array([[0.6, 0.5, 0.1]]).reshape(1, 1, 3, 1), jnp.array([0]),
      ...               threat=ThreatModel("linf", 0.1))
      >>> bool(result.fooled[0])
      True
    """
    threat.check_images(images)
    choose("apgd loss", loss, _LOSSES)
    for name, value in (("steps", steps), ("restarts", restarts), ("targets", targets), ("eot", eot)):
        check_count(f"apgd {name}", value)
    network = as_network(logits_fn, images)
    classes = classes_of(network, images)
    check_classes("apgd loss", loss, classes)
    if target is not None and loss != "dlr-targeted":
        raise InputError(f'apgd target is given with loss "{loss}", which has none; use loss="dlr-targeted"')
    if x_init is not None and restarts > 1:
        raise InputError(f"apgd restarts is {restarts} with x_init; they would all be the same run: use restarts=1")
    if x_init is not None:
        _check_start(x_init, images, threat)
    if target is not None:
        check_labels(labels, images, classes)
        check_target("apgd target", target, labels, classes)
    ranks = range(2, 2 + min(targets, classes - 1)) if loss == "dlr-targeted" and target is None else [0]
    runs = [Run(Apgd(loss, steps, eot, target is not None), rank, restart) for rank in ranks for restart in range(restarts)]
    return attack(runs, key, network, images, labels, threat, target=target, start=x_init)


def _check_start(x_init, images, threat) -> None:
    if jnp.shape(x_init) != jnp.shape(images):
        raise InputError(f"apgd x_init is {list(jnp.shape(x_init))}; give one start per image, {list(images.shape)}")
    if any(isinstance(value, jax.core.Tracer) for value in (x_init, images, threat.epsilon)):
        return
    start, low, high = np.asarray(x_init), *threat.bounds
    away = float(np.max(threat.distance(jnp.asarray(images), jnp.asarray(start)), initial=0.0))
    inside = np.all((low - 1e-6 <= start) & (start <= high + 1e-6))  # not where it is NaN
    if not (inside and away <= threat.epsilon * (1 + 1e-5)):
        raise InputError(
            f"apgd x_init reaches from {start.min():g} to {start.max():g} and up to {away:g} from the images; it must lie in "
            f"{threat.bounds} and within epsilon = {threat.epsilon:g}")


@functools.cache
def checkpoints(steps: int) -> dict[int, int]:
    """Returns after which steps, counted from 1, the step size is looked at -> the number of steps since the last time."""
    window = max(int(0.22 * steps), 1)
    found, at = {}, window
    while at <= steps:
        found[at] = window
        window = max(window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
        at += window
    return found


@dataclasses.dataclass(frozen=True)
class Apgd:
    """APGD as a `Search`: see `apgd`.

    Attributes:
      loss, steps, eot: as there.
      target_known: whether the batch has "target", so that no forward pass is needed to find it.
    """

    loss: str = "ce"
    steps: int = 100
    eot: int = 1
    target_known: bool = False
    differentiates = True
    stops_early = False

    @property
    def cost(self) -> dict[str, Passes]:
        step = Passes(self.eot, self.eot)
        clean = self.loss == "dlr-targeted" and not self.target_known
        return {"start": Passes(self.eot + clean, self.eot), "step": step, "finish": Passes()}

    def value(self, logits: Array, labels: Array) -> Array:
        return (_LOSSES["dlr"] if self.loss == "dlr-targeted" else _LOSSES[self.loss])(logits, labels)

    def rows(self) -> Any:
        found = checkpoints(self.steps)
        numbers = np.arange(1, self.steps + 1, dtype=np.int32)
        return {"step": numbers, "window": np.array([found.get(int(number), 0) for number in numbers], np.int32)}

    def start(self, network: Network, batch: State, threat: ThreatModel) -> State:
        images, labels = batch["images"], batch["labels"]
        state = {name: batch[name] for name in ("images", "labels", "key")}
        if self.loss == "dlr-targeted":
            state["target"] = targets_of(network, batch)
        points = batch["start"] if "start" in batch else jnp.clip(
            images + threat.epsilon * unit_noise(batch["key"], images, threat.norm), *threat.bounds)
        loss, gradients, right, finite = self._climb(network, state, points, 0)
        none = jnp.zeros(labels.shape, bool)
        zero = jnp.zeros(labels.shape, jnp.float32)
        return state | {
            "points": points, "before": points, "gradients": gradients,
            "step_size": jnp.full(labels.shape, 2.0 * threat.epsilon, jnp.float32),
            "best": points, "best_loss": loss, "best_gradients": gradients, "adversarial": points, "fooled": ~right,
            "loss": zero, "raised": zero, "loss_at_check": loss, "halved": ~none, "finite": finite,
            "zero_gradient": jnp.max(jnp.abs(gradients), axis=(1, 2, 3)) == 0}

    def step(self, network: Network, state: State, row: Any, threat: ThreatModel) -> State:
        images, points = state["images"], state["points"]
        weight = jnp.where(row["step"] == 1, 1.0, _MOMENTUM)
        ahead = threat.project(images, points + threat.steepest_step(state["gradients"], wide(state["step_size"])))
        moved = threat.project(
            images, points + weight * (ahead - points) + (1 - weight) * (points - state["before"]))
        loss, gradients, right, finite = self._climb(network, state, moved, row["step"])

        better = loss > state["best_loss"]
        best, best_gradients = _where(better, moved, state["best"]), _where(better, gradients, state["best_gradients"])
        best_loss = jnp.where(better, loss, state["best_loss"])
        raised = state["raised"] + (loss > state["loss"])

        checked = row["window"] > 0
        stuck = ~state["halved"] & (state["loss_at_check"] >= best_loss)
        halve = checked & ((raised <= _RAISED * row["window"]) | stuck)
        return state | {
            "points": _where(halve, best, moved), "before": points, "gradients": _where(halve, best_gradients, gradients),
            "step_size": jnp.where(halve, state["step_size"] / 2, state["step_size"]),
            "best": best, "best_loss": best_loss, "best_gradients": best_gradients,
            "adversarial": _where(~right, moved, state["adversarial"]), "fooled": state["fooled"] | ~right,
            "loss": loss, "raised": jnp.where(checked, 0.0, raised),
            "loss_at_check": jnp.where(checked, best_loss, state["loss_at_check"]),
            "halved": jnp.where(checked, halve, state["halved"]), "finite": state["finite"] & finite}

    def finish(self, network: Network, state: State, threat: ThreatModel) -> AttackResult:
        return AttackResult(state["adversarial"], state["fooled"], state["best_loss"])

    def _climb(self, network, state, points, number):
        """Returns (loss, gradients, whether classified correctly, whether the logits are finite) at the points."""

        def objective(points, keys):
            logits = network(points, keys)
            others = (state["target"],) if self.loss == "dlr-targeted" else ()
            loss = _LOSSES[self.loss](logits, state["labels"], *others)
            return jnp.sum(loss), (loss, *judged(logits, state["labels"]))

        climb = jax.grad(objective, has_aux=True)
        if self.eot == 1:
            gradients, told = climb(points, step_keys(state, number))
            return told[0], gradients, *told[1:]

        def draw(total, number):
            gradients, told = climb(points, step_keys(state, number))
            return total + gradients, told

        total, told = jax.lax.scan(draw, jnp.zeros_like(points), number * self.eot + jnp.arange(self.eot), unroll=loop_unroll())
        loss, right, finite = told
        return loss[-1], total / self.eot, right[-1], jnp.all(finite, axis=0)


def _where(condition, a, b):
    return jnp.where(wide(condition), a, b)
