"""What tests of several rooms share."""

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
