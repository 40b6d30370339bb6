"""What this machine's matrix units are seen to compute: a large product, and the convolution that most of a network is.

The best that a program can hope for here and now, whatever a data sheet says: one operation alone, on operands that are there,
many in flight. A utilisation against it says what the rest of a program costs.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxrd.performance import timing
from jaxrd.performance.operations import Layer

SECONDS = 0.2  # of timed calls for each ceiling, at least one call
# Operations of the product: on CPU some 20 ms, on an accelerator some milliseconds.
_FLOP = {"cpu": 2e9}
_FLOP_OF_ACCELERATORS = 1e12
# An accelerator is done with one small convolution before the next is started: so many operations go into one program.
_FLOP_OF_A_PROGRAM = {"cpu": 0.0}
_FLOP_OF_ACCELERATORS_PROGRAM = 5e11
_MOST_OF_A_PROGRAM = 32
_NUMBERS = ("NHWC", "HWIO", "NHWC")


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """What one operation reached.

    Attributes:
      operation: "matrix product", or "convolution", "its image gradient", "its kernel gradient".
      precision: what it is computed in.
      size: of its operands, in words.
      flop_per_second: reached on one device; padding's zeros are not counted.
    """

    operation: str
    precision: str
    size: str
    flop_per_second: float


def ceilings(
    layers: Sequence[Layer], batch: int, *, precisions: Sequence[str] | None = None, flop: float | None = None,
    seconds: float = SECONDS,
) -> list[Ceiling]:
    """Returns what the first device reaches, measured.

    Args:
      layers: of the networks; the 3x3 convolution of stride 1 with the most operations among them is timed. None of them: a
        product alone is.
      batch: images of a device in a forward pass.
      precisions: "float32", "tensorfloat32", "bfloat16"; by default what the backend has.
      flop: operations of the product; by default as many as take milliseconds.
      seconds: of timed calls for each.
    """
    backend = jax.default_backend()
    if precisions is None:
        precisions = ("float32", "tensorfloat32", "bfloat16") if backend == "gpu" else ("float32", "bfloat16")
    found = []
    for precision in precisions:
        programs = _programs(
            dominating(layers), batch, flop or _FLOP.get(backend, _FLOP_OF_ACCELERATORS), precision,
            _FLOP_OF_A_PROGRAM.get(backend, _FLOP_OF_ACCELERATORS_PROGRAM))
        for name, size, operations, function, inputs in programs:
            with jax.default_matmul_precision("tensorfloat32" if precision == "tensorfloat32" else "float32"):
                compiled = timing.compiled(lambda sets, function=function: [function(*one) for one in sets], inputs)
            found.append(Ceiling(name, precision, size, len(inputs) * operations / _seconds(compiled, inputs, seconds)))
    return found


def dominating(layers: Sequence[Layer]) -> Layer | None:
    """Returns the convolution of stride 1 that, with those like it, has the most operations; None where there is none."""
    totals: dict[tuple, float] = {}
    for layer in layers:
        if layer.kind == "convolution" and set(layer.strides) == {1} and layer.shape[:2] == (3, 3):
            key = layer.shape, layer.images
            totals[key] = totals.get(key, 0.0) + layer.flop
    if not totals:
        return None
    best = max(totals, key=totals.get)
    return next(layer for layer in layers if (layer.shape, layer.images) == best)


def _programs(layer: Layer | None, batch: int, flop: float, precision: str, flop_of_a_program: float):
    """Yields (operation, size, operations, function, its arguments: one tuple for each time that a program holds it)."""
    dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    generator = np.random.default_rng(0)

    def drawn(*shape):  # not all alike: a device that switches fewer transistors is faster
        return jnp.asarray(generator.standard_normal(shape, np.float32), dtype)

    side = max(128, round((flop / 2) ** (1 / 3) / 128) * 128)
    yield "matrix product", f"{side} x {side} x {side}", 2.0 * side**3, jnp.matmul, [(drawn(side, side), drawn(side, side))]
    if layer is None:
        return
    images_shape, outputs = (batch, *layer.images[1:]), layer.shape[3]
    times = int(np.clip(math.ceil(flop_of_a_program / (batch * layer.flop)), 1, _MOST_OF_A_PROGRAM))

    def convolution(images, kernel):
        return jax.lax.conv_general_dilated(
            images, kernel, (1, 1), "SAME", dimension_numbers=_NUMBERS,
            feature_group_count=images_shape[3] // layer.shape[2])

    def image_gradient(cotangent, kernel):
        images = jax.ShapeDtypeStruct(images_shape, dtype)
        return jax.linear_transpose(lambda images: convolution(images, kernel), images)(cotangent)[0]

    def kernel_gradient(cotangent, images):
        kernel = jax.ShapeDtypeStruct(layer.shape, dtype)
        return jax.linear_transpose(lambda kernel: convolution(images, kernel), kernel)(cotangent)[0]

    images, kernels, cotangents = ([drawn(*shape) for _ in range(times)] for shape in (
        images_shape, layer.shape, (*images_shape[:3], outputs)))
    window = "x".join(map(str, layer.shape[:2]))
    size = f"{batch} x {images_shape[1]}x{images_shape[2]}, {images_shape[3]} to {outputs} channels, {window}"
    for name, function, inputs in (
            ("convolution", convolution, (images, kernels)), ("its image gradient", image_gradient, (cotangents, kernels)),
            ("its kernel gradient", kernel_gradient, (cotangents, images))):
        yield name, size, batch * layer.flop, function, list(zip(*inputs, strict=True))


def _seconds(function: Callable, inputs: list, seconds: float) -> float:
    """Returns the seconds of a call among many, of which a few are always in flight; the best of three runs."""
    def run(calls):
        began, pending = time.perf_counter(), []
        for _ in range(calls):
            pending = [*pending[-3:], function(inputs)]
        jax.block_until_ready(pending)
        return (time.perf_counter() - began) / calls

    run(1)
    one = run(1)
    calls = max(1, round(seconds / 3 / one))
    return min(run(calls) for _ in range(3)) if 3 * one < seconds else one
