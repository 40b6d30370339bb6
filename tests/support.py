"""What tests of several rooms share."""

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
