"""How XLA is asked to compile the train step: options for `jax.jit` by backend, for measured reasons.

Evaluation goes without them: its attacks leave points on the very boundary of a decision, and a network that is compiled
otherwise rounds otherwise there. What an attack says of a point is what a user's own forward says.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


@functools.cache
def options() -> dict[str, str]:
    """Returns `compiler_options` for a top-level `jax.jit` on the default backend; none but on CPU.

    On CPU convolutions go to Eigen and not to YNNPACK, XLA's default there, which runs those of fewer than 128 channels on one
    thread (jax 0.10.2): on two cores a step of RSLAD+IGDM on a ResNet-18 takes a fifth less. A jaxlib that does not know the
    option does without.
    """
    if jax.default_backend() != "cpu":
        return {}
    chosen = {"xla_cpu_experimental_ynn_fusion_type": ""}
    try:
        jax.jit(lambda: 0, compiler_options=chosen).lower().compile()
    except Exception:  # whichever error jaxlib has for an option that it does not know
        return {}
    return chosen


def jit(function: Callable, **arguments) -> Callable:
    """Returns `jax.jit(function, **arguments)` with `options()`.

    JAX takes such options on the outermost compiled function alone: where this one is traced as a part of another, it goes
    without.
    """
    outermost, inner = jax.jit(function, compiler_options=options(), **arguments), jax.jit(function, **arguments)

    @functools.wraps(function)
    def call(*positional, **keywords):
        # Traced where an argument says so, or where arithmetic on nothing gives a tracer: the arguments may all be constants.
        leaves = [*jax.tree.leaves((positional, keywords)), jnp.add(0, 0)]
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
        return (inner if traced else outermost)(*positional, **keywords)

    call.lower = outermost.lower
    return call
