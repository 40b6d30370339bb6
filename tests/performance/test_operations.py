"""Operations in closed form: layers by hand, passes by the table of test_cost, and the whole against XLA's own count."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxrd import distillation, models, objectives
from jaxrd.distillation import views
from jaxrd.distillation.composition import Method, Term
from jaxrd.performance import counting, operations
from jaxrd.training import scaling, step
from tests.performance.support import ONE_DEVICE, recipe, shapes

K = 4


def closed(of, batch=4):
    return operations.closed_form(of, scaling.batch_shapes(of, (batch,)))


def passes(of, batch=4):
    return operations.passes(of, scaling.batch_shapes(of, (batch,)))


def test_the_layers_of_a_small_network_by_hand():
    model = models.create("resnet6_w4", classes=10, image_shape=(8, 8, 1))
    # Of 3x3 taps at 8x8 positions all but a frame lie inside: (8 * 3 - 2) ** 2; at stride 2, (4 * 3 - 1) ** 2.
    inside, strided, small = 22**2, 11**2, (4 * 3 - 2) ** 2
    expected = [
        (1 * 4 * inside, 9 * 64), (4 * 4 * inside, 9 * 64), (4 * 4 * inside, 9 * 64),
        (4 * 8 * strided, 9 * 16), (8 * 8 * small, 9 * 16), (4 * 8 * 16, 16), (8 * 10, 1)]
    found = operations.layers_of(model)
    assert sorted(layer.flop for layer in found) == sorted(2.0 * count for count, _ in expected)
    assert found[0].shape == (3, 3, 1, 4) and found[0].flop == 2 * 4 * inside and found[0].padded == 2 * 4 * 9 * 64
    assert found[-1].kind == "dense" and found[-1].flop == found[-1].padded == 2 * 8 * 10


@pytest.mark.parametrize("name, multiply_adds", [("resnet18", 0.5554e9), ("wrn34_10", 6.67e9)])
def test_published_counts_are_those_with_padding(name, multiply_adds):
    """0.56 G and 6.67 G multiply-adds at 32x32: what is quoted for these networks."""
    padded = sum(layer.padded for layer in operations.layers_of(models.create(name, classes=10)))
    assert padded / 2 == pytest.approx(multiply_adds, rel=0.01)


@pytest.mark.parametrize("name, attack, teacher_in_attack, teacher, student", [
    ("pgd_at", (K, K, 0), None, None, (1, 0, 1)),
    ("trades", (K + 1, K, 0), None, None, (2, 0, 2)),
    ("ard", (K, K, 0), None, (1, 0, 0), (1, 0, 1)),
    ("rslad+igdm", (K, K, 0), (1, 0, 0), (2, 0, 0), (3, 0, 3)),
    ("adaad+igdm", (K, K, 0), (K, K, 0), (2, 0, 0), (2, 0, 2)),
    ("dgad", (K, K, 0), (K, K, 0), (2, 0, 0), (2, 0, 2)),
    ("pgd_at+awp", (K, K, 0), None, None, (2, 0, 2))])
def test_passes_are_those_that_are_executed(name, attack, teacher_in_attack, teacher, student):
    found = passes(recipe(name, steps=K))
    assert found["attack"]["student"] == operations.Passes(*attack)
    assert found["attack"].get("teacher") == (teacher_in_attack and operations.Passes(*teacher_in_attack))
    assert found.get("teacher", {}).get("teacher") == (teacher and operations.Passes(*teacher))
    assert found["student"] == {"student": operations.Passes(*student)}


def test_a_method_of_ones_own_is_counted_too():
    """One that climbs twice, and whose loss reads the student at two points and the teacher at one."""
    def generate(key, context, inner):
        points = context.images
        for _ in range(2):
            points = points + jax.grad(lambda points: jnp.sum(objectives.cross_entropy(
                context.student(points), context.labels)))(points)
        return {"adversarial": points}

    method = Method(
        "mine", distillation.inner_maximisation.Attack(generate), (views.CLEAN, views.ADVERSARIAL),
        (Term("term", lambda student, teacher, labels: objectives.kl_divergence(teacher["clean"], student["clean"])
              + objectives.cross_entropy(student["adversarial"], labels), ("clean", "adversarial"), ("clean",)),))
    found = passes(recipe("mine", method=method))
    assert found == {"attack": {"student": operations.Passes(2, 2, 0)}, "teacher": {"teacher": operations.Passes(1, 0, 0)},
                     "student": {"student": operations.Passes(2, 0, 2)}}


@pytest.mark.parametrize("name", ["pgd_at", "trades", "ard", "rslad", "rslad+igdm", "adaad", "adaad+igdm", "dgad", "path"])
def test_both_counts_agree_on_digits(name):
    agree(recipe(name, steps=2))


@pytest.mark.parametrize("name, student, teacher, whole", [
    ("trades", "resnet18", None, True), ("rslad+igdm", "resnet18", "wrn34_10", True), ("adaad", "wrn34_10", "resnet18", True),
    ("ard", "mobilenet_v2", "preact_resnet18", False)])
def test_both_counts_agree_on_networks_of_full_size(name, student, teacher, whole):
    """Nothing is compiled. Normalisation is too little to matter there, but for MobileNetV2."""
    agree(recipe(name, student, teacher, steps=2, image_shape=(32, 32, 3)), whole)


def agree(of, whole=False, batch=4):
    found = counting.operations(step.make_train_step(of, ONE_DEVICE), *shapes(of, batch))
    expected = batch * closed(of, batch).total
    assert expected == pytest.approx(found.of_matrices, rel=1e-3)
    if whole:
        assert expected == pytest.approx(found.total, rel=0.05)


def test_what_is_computed_otherwise_takes_the_same_passes_and_xla_sees_how():
    """bfloat16 in the attack, the student's blocks forwarded once more for the gradient, T(x) from a table."""
    plain = recipe("rslad")
    other = dataclasses.replace(plain, attack_dtype="bfloat16", gradient_checkpointing=True)
    assert closed(other) == closed(plain)
    counted = {name: counting.operations(step.make_train_step(of, ONE_DEVICE), *shapes(of, 4))
               for name, of in (("plain", plain), ("other", other))}
    in_attack = 4 * operations.Passes(2, 2, 0).flop(operations.layers_of(plain.student))
    assert counted["other"].matrix["bfloat16"] == pytest.approx(in_attack, rel=0.01)
    assert set(counted["plain"].matrix) == {"float32"}
    # The stem and the last layer are no blocks.
    again = counted["other"].of_matrices - counted["plain"].of_matrices
    blocks = 2 * 4 * sum(layer.flop for layer in operations.layers_of(plain.student)[1:-1])
    assert 0.5 * blocks < again <= 1.001 * blocks
    rows = scaling.batch_shapes(plain, (4,)) | {"teacher_clean": jax.ShapeDtypeStruct((4, 10), jnp.float32)}
    assert set(operations.passes(plain, rows)["attack"]) == {"student"}


@pytest.mark.parametrize("name", ["rslad+jvp", "rslad+direct"])
def test_derivatives_of_another_kind_are_not_counted(name):
    assert closed(recipe(name)) is None
