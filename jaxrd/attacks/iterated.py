"""PGD, MI-FGSM and the Carlini-Wagner margin attack with restarts: attacks of fixed step size that return an `AttackResult`.

The inner maximisation of training is `jaxrd.attacks.pgd`, which returns images; here a run is scored at its last iterate.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrd import objectives
from jaxrd.attacks.network import LogitsFn, Network, as_network, classes_of
from jaxrd.attacks.results import AttackResult
from jaxrd.attacks.search import Passes, Run, State, attack, check_classes, check_count, judged, step_keys, wide
from jaxrd.errors import InputError, choose, need
from jaxrd.threat import ThreatModel

Array = jax.Array

_CW_CONFIDENCE = 50.0


def cw_margin(logits: Array, labels: Array) -> Array:
    """Returns the margin, capped where the attack is confident enough (Carlini & Wagner 2017, kappa = 50), [batch]."""
    return jnp.minimum(objectives.margin(logits, labels), _CW_CONFIDENCE)


LOSSES = {"ce": objectives.cross_entropy, "margin": objectives.margin, "cw": cw_margin, "dlr": objectives.dlr}


def pgd_attack(
    key: Array,
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    *,
    threat: ThreatModel,
    loss: str = "ce",
    steps: int = 20,
    step_size: float | None = None,
    start: str = "uniform",
    restarts: int = 1,
) -> AttackResult:
    """Attacks by projected gradient ascent (Madry et al. 2018), a run after another on the points that are still robust.

    FGSM is `steps=1, start="none", step_size=threat.epsilon`.

    Args:
      key: one typed key, or [batch] typed keys.
      logits_fn: images [batch, h, w, c] -> logits [batch, classes]; a randomised one takes (images, key).
      images: [batch, h, w, c] float32 inside the threat model's bounds.
      labels: [batch] int, the true classes.
      threat: norm, radius and bounds.
      loss: "ce", cross-entropy; "margin", max_{c != y} z_c - z_y; "cw", the margin up to 50; "dlr", the difference-of-logits
        ratio (3 classes at least).
      steps: gradient steps of a run.
      step_size: length of a step in pixel units, at most 2 epsilon; by default epsilon / 4 (2/255 at 8/255).
      start: "uniform", "gaussian" (x + 0.001 N(0, 1)) or "none".
      restarts: runs.

    Returns:
      `AttackResult`; its `loss` is that of the last iterate, the largest over the runs.

    Raises:
      InputError: arguments outside those ranges, images outside the bounds, labels that do not fit, logits that are not finite.
    """
    if start not in ("uniform", "gaussian", "none"):
        raise InputError(f'attack start is "{start}"; use "uniform", "gaussian" or "none"')
    if start == "none" and restarts != 1:
        raise InputError(
            f'attack restarts is {restarts} with start "none"; they would all be the same run: use start="uniform"')
    return _attack(Ascent(loss, steps, start), key, logits_fn, images, labels, threat, step_size, 4, restarts)


def cw_linf(
    key: Array,
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    *,
    threat: ThreatModel,
    steps: int = 30,
    step_size: float | None = None,
    restarts: int = 1,
) -> AttackResult:
    """Attacks the Carlini-Wagner margin by projected gradient ascent inside the ball: `pgd_attack` with loss "cw".

    The "CW" column of the distillation papers (30 steps of 2/255, one uniform start; IAD's and Madry's code), not the
    minimum-norm attack of that name. Arguments, result and errors as for `pgd_attack`.
    """
    return pgd_attack(
        key, logits_fn, images, labels, threat=threat, loss="cw", steps=steps, step_size=step_size, restarts=restarts)


def mi_fgsm(
    logits_fn: LogitsFn,
    images: Array,
    labels: Array,
    *,
    threat: ThreatModel,
    loss: str = "ce",
    steps: int = 10,
    step_size: float | None = None,
    momentum: float = 1.0,
) -> AttackResult:
    """Attacks by gradient steps with momentum from the image itself (Dong et al. 2018, MI-FGSM).

    g_{k+1} = mu g_k + grad / ||grad||_1, x_{k+1} = project(x_k + step(g_{k+1})). Deterministic, hence without a key.

    Args:
      logits_fn, images, labels, threat, loss, steps: as for `pgd_attack`.
      step_size: length of a step in pixel units, at most 2 epsilon; by default epsilon / steps.
      momentum: mu, 0 or more.

    Returns, raises: as for `pgd_attack`.
    """
    need(momentum >= 0, "mi_fgsm momentum", momentum, "0 or more, such as 1.0")
    search = Ascent(loss, steps, "none", float(momentum))
    return _attack(search, jax.random.key(0), logits_fn, images, labels, threat, step_size, steps, 1)


def _attack(search, key, logits_fn, images, labels, threat, step_size, default, restarts):
    threat.check_images(images)
    choose("attack loss", search.loss, LOSSES)
    network = as_network(logits_fn, images)
    check_classes("attack loss", search.loss, classes_of(network, images))
    check_count("attack steps", search.steps)
    check_count("attack restarts", restarts)
    if step_size is None:
        step_size = threat.epsilon / default
    threat.check_step_size(step_size)
    runs = [Run(search, restart=restart) for restart in range(restarts)]
    return attack(runs, key, network, images, labels, threat, step_size=jnp.full(len(images), step_size, jnp.float32))


@dataclasses.dataclass(frozen=True)
class Ascent:
    """Gradient ascent with a fixed step size, and with momentum where that is not None, as a `Search`.

    Its batch has "step_size" [batch] besides.
    """

    loss: str = "ce"
    steps: int = 20
    start_kind: str = "uniform"
    momentum: float | None = None
    differentiates = True
    stops_early = False
    cost = {"start": Passes(), "step": Passes(1, 1), "finish": Passes(1)}

    def value(self, logits: Array, labels: Array) -> Array:
        return LOSSES[self.loss](logits, labels)

    def rows(self) -> Any:
        return np.arange(self.steps, dtype=np.int32)

    def start(self, network: Network, batch: State, threat: ThreatModel) -> State:
        state = {name: batch[name] for name in ("images", "labels", "key", "step_size")}
        state["points"] = threat.random_start(batch["key"], batch["images"], self.start_kind).astype(jnp.float32)
        if self.momentum is not None:
            state["velocity"] = jnp.zeros_like(batch["images"])
        return state | {"finite": jnp.ones(batch["labels"].shape, bool)}

    def step(self, network: Network, state: State, row: Any, threat: ThreatModel) -> State:
        keys = step_keys(state, row)
        gradients = jax.grad(lambda points: jnp.sum(self.value(network(points, keys), state["labels"])))(state["points"])
        if self.momentum is not None:
            length = jnp.sum(jnp.abs(gradients), axis=(1, 2, 3), keepdims=True)
            gradients = self.momentum * state["velocity"] + gradients / jnp.where(length > 0, length, 1.0)
            state = state | {"velocity": gradients}
        moved = threat.steepest_step(gradients, wide(state["step_size"]))
        return state | {"points": threat.project(state["images"], state["points"] + moved)}

    def finish(self, network: Network, state: State, threat: ThreatModel) -> AttackResult:
        logits = network(state["points"], step_keys(state, np.int32(self.steps)))
        correct, finite = judged(logits, state["labels"])
        return AttackResult(
            state["points"], ~correct,
            jnp.where(finite, self.value(logits, state["labels"]), jnp.nan))
