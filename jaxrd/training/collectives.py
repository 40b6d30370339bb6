"""What the devices of a compiled step tell each other: its collectives and their bytes, read from the compiled program.

How many there are depends on the compiler: XLA combines small ones, on GPU and TPU more than on CPU.
"""

import dataclasses
import math
import re
from collections.abc import Collection

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4,
          "s64": 8, "u64": 8, "f64": 8}
_OPERATION = re.compile(
    r"= (?P<shapes>.*?) (?P<kind>all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: "all-reduce", "all-gather", "all-to-all", "collective-permute" or "reduce-scatter".
      arrays: dtype and shape of each array that comes out of it.
    """

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def bytes(self) -> int:
        """Of all arrays, as they are on one device."""
        return sum(_BYTES[dtype] * math.prod(shape) for dtype, shape in self.arrays)

    def bytes_of(self, shapes: Collection[tuple[int, ...]]) -> int:
        """Returns the bytes of the arrays that have one of these shapes, whose axes the compiler may have exchanged.

        Gradients of kernels are told by those of the kernels: BatchNorm's statistics have others.
        """
        wanted = {_without_order(shape) for shape in shapes}
        return sum(_BYTES[dtype] * math.prod(shape) for dtype, shape in self.arrays if _without_order(shape) in wanted)


def _without_order(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size > 1))


def collectives(program: str) -> list[Collective]:
    """Returns the collectives of a compiled program, in its order.

    Args:
      program: `compiled.as_text()`. What stands in the body of a loop is counted once.
    """
    return [
        Collective(found["kind"], tuple(
            (dtype, tuple(int(size) for size in shape.split(",") if size)) for dtype, shape in _ARRAY.findall(found["shapes"])
            if dtype in _BYTES))
        for found in map(_OPERATION.search, program.splitlines()) if found]
