"""Projected gradient descent and its path: the inner maximisation of adversarial training and of distillation.

Madry et al. 2018. An attack sees functions and arrays only: `objective` maps images to one number per example, and whose
logits, labels or teachers went into it is its own affair.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrd.threat import ThreatModel

Array = jax.Array
Objective = Callable[[Array], Array]  # images -> [batch], larger is worse for the model


def pgd(
    key: Array,
    objective: Objective,
    images: Array,
    *,
    threat: ThreatModel,
    step_size: float,
    steps: int = 10,
    start: str = "uniform",
    descend: bool = False,
    project_start: bool = True,
) -> Array:
    """Returns images that (nearly) maximise the objective inside the threat model.

    x_0 = start(x),  x_{k+1} = project(x_k + step(grad objective(x_k))), where the step is the steepest one of the norm, and
    projection is onto the ball, then the pixel bounds. The last iterate is returned, not the best.

    FGSM is `steps=1, start="none", step_size=epsilon`.

    Args:
      key: one typed key, or [batch] typed keys (see `jaxrd.threat.example_keys`).
      objective: images [batch, h, w, c] -> [batch]. Where examples depend on each other (BatchNorm by batch statistics),
        each is moved for the good of the sum and not of its own.
      images: [batch, h, w, c] float32 inside the threat model's bounds.
      threat: the norm, radius and pixel bounds.
      step_size: length of one step in pixel units of [0, 1], at most 2 epsilon.
      steps: number of gradient steps.
      start: "uniform", "gaussian" (x + 0.001 N(0, 1)) or "none".
      descend: minimise instead: the targeted path.
      project_start: put the start inside ball and bounds (see `ThreatModel.random_start`).

    Returns:
      [batch, h, w, c] float32, without gradient to anything.

    Raises:
      InputError: images of another rank, dtype or range (the range where it can be read: not under jit); a step size or
        start that makes no sense.
    """
    points, _ = _walk(key, objective, images, threat, step_size, steps, start, descend, project_start, path=False)
    return points


def pgd_path(
    key: Array,
    objective: Objective,
    images: Array,
    *,
    threat: ThreatModel,
    step_size: float,
    steps: int = 10,
    start: str = "uniform",
    descend: bool = False,
    project_start: bool = True,
) -> Array:
    """Returns every iterate of `pgd` after the start, [steps, batch, h, w, c]; the last entry is what `pgd` returns.

    Arguments and errors as for `pgd`.
    """
    _, path = _walk(key, objective, images, threat, step_size, steps, start, descend, project_start, path=True)
    return path


def ascent_step(objective: Objective, images: Array, points: Array, threat: ThreatModel, step_size: float) -> Array:
    """Returns the points after one step of gradient ascent and the projection: the body of `pgd`.

    Args:
      objective: images -> [batch].
      images: [batch, h, w, c], the clean images.
      points: [batch, h, w, c], the current iterates.
      threat: the norm, radius and pixel bounds.
      step_size: length of the step, in pixel units; negative descends.
    """
    gradients = jax.grad(lambda points: jnp.sum(objective(points)))(points)
    return threat.project(images, points + threat.steepest_step(gradients, step_size))


def _walk(key, objective, images, threat, step_size, steps, start, descend, project_start, path):
    threat.check_images(images)
    threat.check_step_size(step_size)
    images = jax.lax.stop_gradient(images)
    signed = -step_size if descend else step_size

    def body(points, _):
        points = jax.lax.stop_gradient(ascent_step(objective, images, points, threat, signed))
        return points, points if path else None

    points = threat.random_start(key, images, start, project=project_start)
    if steps == 1:  # an unrolled scan of one step would still be compiled as a loop
        points, path = body(points, None)
        return points, path[None] if path is not None else None
    return jax.lax.scan(body, points, length=steps, unroll=loop_unroll())


@functools.cache
def loop_unroll() -> int | bool:
    """How attack loops are compiled: unrolled on CPU, rolled elsewhere.

    XLA's CPU backend runs convolution gradients inside loop bodies 6 to 90 times slower than outside (jax issue 12868).
    """
    return True if jax.default_backend() == "cpu" else 1
