"""Floating-point operations of a program, by XLA's cost analysis, whatever its loops are compiled to.

XLA counts the body of a loop once, and attack loops stay loops on accelerators. So every equation of the traced program is
given to XLA, and counted as often as it runs: what a loop of known length holds, that many times. For programs without loops it
comes to what XLA says of the whole. Equations whose results nobody reads are left out, as the compiler leaves them out.
"""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import jax

# What takes place in a matrix unit, where there is one.
MATRIX_PRIMITIVES = {"conv_general_dilated": "convolution", "dot_general": "dense"}
_NOT_COUNTED = ("while", "sharding_constraint")  # a loop whose body stands beside it, and what speaks of devices alone


@dataclasses.dataclass(frozen=True)
class Operations:
    """Floating-point operations; a multiplication and an addition are two.

    Attributes:
      matrix: of convolutions and matrix products, by what they are computed in: "bfloat16", "tensorfloat32", "float32", ...
      other: of all else: normalisation, activations, losses, the optimiser.
      endless: whether there is a loop of a length that only a run knows; its body is counted once.
    """

    matrix: dict[str, float]
    other: float
    endless: bool = False

    @property
    def of_matrices(self) -> float:
        return sum(self.matrix.values())

    @property
    def total(self) -> float:
        return self.of_matrices + self.other


def operations(function: Callable, *arguments: Any, platform: str | None = None) -> Operations | None:
    """Returns the operations of function(*arguments), which is traced, and neither compiled nor run.

    Args:
      function: a pure function, compiled or not.
      *arguments: arrays, or their shapes.
      platform: whose arithmetic float32 products take at JAX's default precision ("gpu": TF32; "tpu": bfloat16); None for the
        default backend.

    Returns:
      None where nobody counts: on accelerators JAX has no count before compilation, and JAX_PLATFORMS may leave out the CPU,
      which counts for them.
    """
    groups, endless = collections.defaultdict(list), False
    for equation, times in equations(jax.make_jaxpr(function)(*arguments).jaxpr):
        endless |= equation.primitive.name == "while"
        groups[times, precision(equation, platform)].append(equation)
    matrix, other = collections.Counter(), 0.0
    for (times, kind), members in groups.items():
        found = _counted(members)
        if found is None:
            return None
        if kind is None:
            other += times * found
        else:
            matrix[kind] += times * found
    return Operations(dict(matrix), other, endless)


def precision(equation, platform: str | None = None) -> str | None:
    """Returns what a convolution or matrix product is computed in; None for any other equation."""
    if equation.primitive.name not in MATRIX_PRIMITIVES:
        return None
    asked = equation.params.get("precision")
    asked = str(asked[0] if isinstance(asked, tuple) else asked).rpartition(".")[2].upper()  # of both operands, which are alike
    return precision_of(str(equation.invars[0].aval.dtype), asked, platform)


def precision_of(dtype: str, asked: str = "DEFAULT", platform: str | None = None) -> str:
    """Returns what a product of this dtype is computed in.

    Args:
      dtype: of its operands.
      asked: JAX's name of the precision that was asked for.
      platform: "gpu", "tpu" or "cpu"; None for the default backend.
    """
    platform = platform or jax.default_backend()
    if dtype != "float32":
        return dtype
    if asked in ("NONE", "DEFAULT"):
        return {"gpu": "tensorfloat32", "cuda": "tensorfloat32", "tpu": "bfloat16"}.get(platform, "float32")
    if asked in ("HIGH", "TF32_TF32_F32") and platform != "cpu":
        return "tensorfloat32"
    return "bfloat16" if asked.startswith("BF16_BF16_F32") else "float32"


def equations(jaxpr, whole: Callable[[Any], bool] = lambda equation: False) -> list[tuple[Any, int]]:
    """Returns the equations of a traced program that its results come from, each with how often it runs, the last ones first.

    Those of functions inside stand in place of the call; of the branches of a condition those of the longest.

    Args:
      jaxpr: the program.
      whole: which calls stand as they are.
    """
    return _read(jaxpr, [True] * len(jaxpr.outvars), 1, whole)[0]


def _read(jaxpr, wanted: list[bool], times: int, whole) -> tuple[list[tuple[Any, int]], list[bool]]:
    """Returns the equations that the wanted results come from, and which of the arguments those read."""
    live = {variable for variable, needed in zip(jaxpr.outvars, wanted, strict=True) if needed and _is_variable(variable)}
    found = []
    for equation in reversed(jaxpr.eqns):
        needed = [variable in live for variable in equation.outvars]
        if not any(needed) and not equation.effects:
            continue
        inside, reads = _inside(equation, needed, times, whole)
        found += inside
        live |= {variable for variable, read in zip(equation.invars, reads, strict=True) if read and _is_variable(variable)}
    return found, [variable in live for variable in jaxpr.invars]


def _inside(equation, needed: list[bool], times: int, whole) -> tuple[list[tuple[Any, int]], list[bool]]:
    everything = [True] * len(equation.invars)
    name, parameters = equation.primitive.name, equation.params
    if name == "scan":
        return _scan(equation, needed, times, whole)
    if name == "while":
        body = _plain(parameters["body_jaxpr"])
        return [(equation, 0), *_read(body, [True] * len(body.outvars), times, whole)[0]], everything
    if name == "cond":
        branches = [_read(_plain(branch), needed, times, whole)[0] for branch in parameters["branches"]]
        return max(branches, key=len), everything
    functions = [_plain(value) for key, value in parameters.items() if key in ("jaxpr", "call_jaxpr", "fun_jaxpr")]
    if functions and not whole(equation) and len(functions[0].outvars) == len(needed):
        found, reads = _read(functions[0], needed, times, whole)
        return found, reads if len(reads) == len(everything) else everything
    return [(equation, times)], everything


def _scan(equation, needed: list[bool], times: int, whole) -> tuple[list[tuple[Any, int]], list[bool]]:
    parameters, needed = equation.params, list(needed)
    body, constants, carries = _plain(parameters["jaxpr"]), parameters["num_consts"], parameters["num_carry"]
    while True:  # what one turn reads of the carry, the turn before has to give
        found, reads = _read(body, needed, times * parameters["length"], whole)
        carried = [a or b for a, b in zip(needed[:carries], reads[constants:constants + carries], strict=True)]
        if carried == needed[:carries]:
            return found, reads
        needed[:carries] = carried


def _plain(jaxpr):
    return getattr(jaxpr, "jaxpr", jaxpr)


def _is_variable(value) -> bool:
    return not hasattr(value, "val")


def _counted(members: list) -> float | None:
    """Returns XLA's count of these equations, each once: of a program for the CPU that has them next to each other."""
    members = [equation for equation in members if equation.primitive.name not in _NOT_COUNTED]
    shapes = [[jax.ShapeDtypeStruct(value.aval.shape, value.aval.dtype) for value in equation.invars] for equation in members]

    def program(inputs):
        return [equation.primitive.bind(*values, **equation.params) for equation, values in zip(members, inputs, strict=True)]

    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            found = jax.jit(program).lower(shapes).cost_analysis()
    except (NotImplementedError, RuntimeError):  # RuntimeError: no such backend, or XLA's own
        return None
    return None if found is None else float(found.get("flops", 0.0))
