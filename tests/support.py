"""What tests of several rooms share."""

import math
import re

import numpy as np
import pytest

from jaxrd.errors import InputError


def assert_input_error(call, *mentions):
    """Asserts that `call()` is answered with one line that mentions the field, the value and the way out."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for mention in mentions:
        assert mention in message, message


def changed_copies(directory, content):
    """Yields the paths of 1,500 files like `content`, one to three bytes of each changed at random."""
    generator = np.random.default_rng(0)
    for trial in range(1500):
        changed = bytearray(content)
        for position in generator.integers(len(content), size=1 + trial % 3):
            changed[position] ^= int(generator.integers(1, 256))
        # A new file: what was read before may still be mapped into memory.
        path = directory / f"changed{trial % 2}"
        path.unlink(missing_ok=True)
        path.write_bytes(changed)
        yield path


def collectives(program):
    """Returns (kind, numbers that each device receives) of every exchange between devices in a compiled program."""
    found = []
    for line in program.as_text().splitlines():
        # Of a combined one the shapes are a tuple, with blanks and comments in it.
        match = re.match(r"\s*(?:ROOT )?\S+ = (.*?) "
                         r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", line)
        if match:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            found.append((match[2], sum(math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes)))
    return found
