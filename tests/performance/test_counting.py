"""XLA's operations of a program, whatever its loops are compiled to, against what XLA says of programs without loops."""

import importlib

import jax
import jax.numpy as jnp
import pytest

from jaxrd.performance import counting
from jaxrd.training import step
from tests.performance.support import ONE_DEVICE, recipe, shapes

X = jax.ShapeDtypeStruct((4, 8), jnp.float32)
PRODUCT = 2 * 4 * 8 * 8  # of X and an 8 x 8 matrix


def test_a_loop_counts_as_often_as_it_turns_and_dead_code_not_at_all():
    def program(x):
        matrix = jnp.ones((8, 8))

        def body(carry, _):
            unread = x @ matrix
            return (carry[0] @ matrix, unread), None

        (found, _), _ = jax.lax.scan(body, (x, x), None, length=7)
        return found, jax.lax.cond(True, lambda x: x @ matrix, lambda x: x, x)

    found = counting.operations(program, X)
    assert found.matrix == {"float32": 8 * PRODUCT} and not found.endless
    assert counting.operations(lambda x: program(x)[1], X).of_matrices == PRODUCT


def test_what_a_turn_hands_to_the_next_is_read():
    def program(x):
        def body(carry, _):
            older, newer = carry
            return (newer, older @ jnp.ones((8, 8))), None

        return jax.lax.scan(body, (x, x), None, length=5)[0][0]

    assert counting.operations(program, X).of_matrices == 5 * PRODUCT


def test_a_loop_of_unknown_length_says_so():
    found = counting.operations(
        lambda x: jax.lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: x @ jnp.ones((8, 8)), x), X)
    assert found.endless and found.of_matrices == PRODUCT


def test_a_whole_step_counts_what_xla_counts_of_it_unrolled(monkeypatch):
    of = recipe("rslad+igdm", steps=6)
    arguments = shapes(of, 4)
    whole = step.make_train_step(of, ONE_DEVICE).lower(*arguments).cost_analysis()["flops"]
    monkeypatch.setattr(importlib.import_module("jaxrd.attacks.pgd"), "loop_unroll", lambda: 1)
    found = counting.operations(step.make_train_step(of, ONE_DEVICE), *arguments)
    assert found.total == pytest.approx(whole, rel=2e-3)
    rolled = step.make_train_step(of, ONE_DEVICE).lower(*arguments).cost_analysis()["flops"]
    assert rolled < 0.8 * whole  # or there was nothing to it


@pytest.mark.parametrize("dtype, precision, platform, expected", [
    ("bfloat16", None, "gpu", "bfloat16"), ("float32", None, "cpu", "float32"), ("float32", None, "gpu", "tensorfloat32"),
    ("float32", "highest", "gpu", "float32"), ("float32", None, "tpu", "bfloat16"), ("float32", "high", "gpu", "tensorfloat32"),
    ("float32", "tensorfloat32", "gpu", "tensorfloat32"), ("float32", "F32_F32_F32", "gpu", "float32")])
def test_what_products_are_computed_in(dtype, precision, platform, expected):
    x = jax.ShapeDtypeStruct((4, 8), dtype)
    with jax.default_matmul_precision(precision):
        found = counting.operations(lambda x: x @ jnp.ones((8, 8), dtype), x, platform=platform)
    assert found.matrix == {expected: PRODUCT}
