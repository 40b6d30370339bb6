"""What makes a robust accuracy doubtful: signs that a model hides its gradients or answers differently each time.

The checks of the official AutoAttack (randomised models, probabilities instead of logits, zero gradients, Square ahead of the
attacks by gradient), for every loss and not only for DLR, with an audit of the traced function and of the images' range. They
return flags: one line each, its first word saying which.
"""

import re
from collections.abc import Iterator

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from jaxrd.attacks.network import LogitsFn, Network, logits_of

Array = jax.Array

_PASSES = 5
_DIRECTION = 1e-4  # between logits scaled to length 1, as the official check has it
_PROBABILITY = 1e-5
_ZERO_SHARE = 0.1
_SQUARE_LEAD = 0.002
_DARK = 2 / 255
_FEW = 16
_DRAWS = {"random_bits", "threefry2x32", "random_seed", "rng_uniform", "rng_bit_generator"}
_CALLBACKS = {"pure_callback", "io_callback"}
_CUSTOM_GRADIENTS = {"custom_vjp_call", "custom_vjp_call_jaxpr"}
_LOOPS = {"while"}


def inspect(logits_fn: LogitsFn, network: Network, images: np.ndarray, keys: Array, bounds: tuple[float, float], batch: int, *,
            randomised: bool) -> list[str]:
    """Returns flags about a function and the images before they are attacked.

    Args:
      logits_fn: as the user gave it.
      network: the same, as an argument of compiled code.
      images: [n, h, w, c], all of them.
      keys: [n] typed keys.
      bounds: lowest and highest pixel value.
      batch: how many of the images to look at in the network.
      randomised: whether a randomised function is what the evaluation is made for.
    """
    flags = []
    if images.max() - bounds[0] <= _DARK * (bounds[1] - bounds[0]):
        flags.append(f"range: the images reach only up to {images.max():.2g}; were they divided by 255 twice?")
    images, keys = images[:batch], keys[:batch]
    logits = np.asarray(logits_of(network, images, keys), np.float64)
    between = (-_PROBABILITY < logits) & (logits < 1 + _PROBABILITY)
    if np.all(between) and np.all(np.abs(logits.sum(1) - 1) < _PROBABILITY * logits.shape[1]):
        flags.append("probabilities: all outputs lie in [0, 1] and sum to 1, as after a softmax; return the logits, for "
                     "gradients vanish through a softmax and attacks look weak")
    if randomised:
        if not network.randomised:
            flags.append('randomised: logits_fn takes no key, so there is nothing to average over; use version "standard"')
        return flags
    if network.randomised:
        return flags + ['randomised: logits_fn takes a key; version "rand" averages gradients over its draws']
    others = [np.asarray(logits_of(network, images, keys), np.float64) for _ in range(_PASSES - 1)]
    apart = max(float(np.linalg.norm(_scaled(logits) - _scaled(other), axis=1).max()) for other in others)
    few = jnp.asarray(images[:_FEW])
    traced = [jax.make_jaxpr(lambda images: logits_fn(images))(few) for _ in range(2)]  # jax remembers traces by function
    if apart > _DIRECTION or not _same(*traced):
        flags.append('randomised: the same images get other logits each time; give logits_fn a key, (images, key) -> logits, '
                     'and evaluate it with version "rand"')
    names = set(_primitives(traced[0].jaxpr))
    if names & _DRAWS:
        flags.append("randomised: logits_fn draws random numbers from a key of its own, the same ones each time; give it a key "
                     "as its second argument if they are to be a defence")
    if names & (_CALLBACKS | _CUSTOM_GRADIENTS | _LOOPS):
        what = ", ".join(sorted(names & (_CALLBACKS | _CUSTOM_GRADIENTS | _LOOPS)))
        flags.append(f"dynamic: logits_fn contains {what}: its gradients may not be those of what it computes")
    return flags


def review(accuracy: dict[str, float], zero_gradients: dict[str, int], attacked: dict[str, int], by_gradient: set[str],
           n: int) -> list[str]:
    """Returns flags about what the attacks came to.

    Args:
      accuracy: stage -> accuracy after it, in order.
      zero_gradients: stage -> points that had a gradient of 0 at a start.
      attacked: stage -> points attacked, counted for each run.
      by_gradient: the stages that climb gradients.
      n: number of points.
    """
    flags = []
    for stage, count in zero_gradients.items():
        if attacked[stage] and count / attacked[stage] > _ZERO_SHARE:
            flags.append(f"gradients: {count / attacked[stage]:.0%} of the points have a gradient of exactly 0 at the start of "
                         f"{stage}; attacks by gradient say nothing about them")
    stages = list(accuracy)
    if "square" in stages:
        before = stages[:stages.index("square")]
        lead = accuracy[before[-1]] - accuracy["square"]
        if by_gradient & set(before) and lead > _SQUARE_LEAD and round(lead * n) > 1:
            flags.append(f"square: without gradients, Square breaks {lead:.2%} more than all attacks before it; the gradients "
                         "of this network mislead")
    return flags


def _scaled(logits):
    return logits / np.maximum(np.linalg.norm(logits, axis=1, keepdims=True), 1e-12)


def _same(one, other) -> bool:
    """Whether two traces of a function are the same program with the same constants."""
    texts = [re.sub(r"0x[0-9a-f]+", "", str(closed.jaxpr)) for closed in (one, other)]
    return texts[0] == texts[1] and all(
        a is b or np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(one.consts, other.consts))


def _primitives(jaxpr) -> Iterator[str]:
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _primitives(inner)
