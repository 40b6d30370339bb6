"""bfloat16 bodies: each network and the attack by itself, float32 everywhere else, and the same training up to rounding."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import datasets

from jaxrd import ThreatModel, distillation, models, objectives
from jaxrd.config import Config
from jaxrd.training import loop, opening, parallel, state as states, step, validation
from tests.support import assert_input_error

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPE, THREAT = (8, 8, 1), ThreatModel("linf", 0.1)
STUDENT, TEACHER = (models.create(name, classes=10, image_shape=SHAPE) for name in ("resnet6_w4", "resnet6_w8"))


def recipe(name="adaad+igdm", **options):
    method = distillation.method(name)
    values = {"method": method, "student": STUDENT, "teacher": TEACHER, "steps": 50, "optimizer": optax.sgd(0.05, 0.9),
              "inner": distillation.InnerMaximisation(THREAT, 0.05, 2)}
    return step.Recipe(**values | options)


HALF = {"student": {"student": models.variant(STUDENT, dtype="bfloat16"), "attack_dtype": "float32"},
        "teacher": {"teacher": models.variant(TEACHER, dtype="bfloat16"), "attack_dtype": "float32"},
        "attack": {"attack_dtype": "bfloat16"}}


def convolutions(of) -> dict[str, set]:
    """Returns the dtypes of convolutions by the part of the step that they are in, by a look at the traced program."""
    state = jax.eval_shape(lambda: states.create(of.student, of.optimizer, jax.random.key(0), weight_average=False))
    teacher = jax.eval_shape(of.teacher.init, jax.random.key(0))
    batch = {"images": jax.ShapeDtypeStruct((8, *SHAPE), np.uint8), "labels": jax.ShapeDtypeStruct((8,), np.int32)}
    mesh = parallel.data_mesh(jax.devices()[:1])
    hlo = step.make_train_step(of, mesh).lower(state, teacher, batch).as_text(dialect="hlo", debug_info=True)
    found = {}
    for dtype, name in re.findall(r"= (\w+)\[[^=]*convolution\(.*op_name=\"([^\"]*)\"", hlo):
        # The body of the attack is a function of its own here, whose names begin anew.
        part = next((scope for scope in step.SCOPES if re.search(rf"(?<!\w){scope}(?!\w)", name)), "attack")
        found.setdefault(part, set()).add(dtype)
    return found


@pytest.mark.parametrize("part", HALF)
def test_each_part_computes_in_its_own_dtype(part):
    dtypes = convolutions(recipe(**HALF[part]))
    assert set(dtypes) == {"attack", "teacher", "student"}
    assert dtypes == {name: {"bf16"} if name == part else {"f32"} for name in dtypes}


def test_an_attack_in_bfloat16_moves_float32_points_and_leaves_what_terms_read_alone():
    of, exact = recipe("rslad", attack_dtype="bfloat16"), recipe("rslad")
    state = states.create(STUDENT, of.optimizer, jax.random.key(0), weight_average=False)
    variables = TEACHER.init(jax.random.key(1))
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(16, *SHAPE)), jnp.float32)
    labels = jnp.arange(16) % 10
    (views, clean), (expected, expected_clean) = (
        step.attack(one, jax.random.key(2), state, variables, images, labels) for one in (of, exact))
    np.testing.assert_array_equal(clean, expected_clean)
    points = views["adversarial"]
    assert points.dtype == jnp.float32 and jnp.max(jnp.abs(points - images)) <= 0.1 + 1e-6
    assert jnp.min(points) >= 0 and jnp.max(points) <= 1
    moved = jnp.mean(points == expected["adversarial"])
    assert 0.5 < moved < 1, "most signs are those of float32, and some are not"
    objective = [distillation_objective(state, clean, view) for view in (views["clean"], points, expected["adversarial"])]
    assert objective[1] > objective[0] and abs(objective[1] - objective[2]) < 0.1 * (objective[2] - objective[0])


def distillation_objective(state, teacher_clean, points):
    logits = STUDENT.apply({"params": state.params, "batch_stats": state.batch_stats}, points, False)[0]
    return float(jnp.mean(objectives.kl_divergence(teacher_clean, logits)))


def losses(of, steps=50):
    mesh = parallel.data_mesh(jax.devices()[:1])
    state = parallel.replicate(states.create(of.student, of.optimizer, jax.random.key(0), weight_average=False), mesh)
    variables = TEACHER.init(jax.random.key(1)) if of.teacher else None
    digits = datasets.load_digits()
    images, labels = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None], digits.target.astype(np.int32)
    train_step, found = step.make_train_step(of, mesh), []
    for index in range(steps):
        rows = np.arange(32 * index, 32 * index + 32) % len(images)
        batch = parallel.put_batch({"images": images[rows], "labels": labels[rows]}, mesh)
        state, metrics = train_step(state, variables, batch)
        found.append(float(metrics["loss"]))
    return np.asarray(found)


def test_fifty_steps_have_the_same_losses():
    """Each path against float32: within a tenth of the loss, step by step, and within 2 % on the average."""
    student, teacher = (models.variant(model, dtype="bfloat16") for model in (STUDENT, TEACHER))
    for name, learnt, paths in (
            ("trades", 0.9, ({"attack_dtype": "bfloat16"}, {"student": student}, {"gradient_checkpointing": True},
                             {"joint_views": False})),
            ("akd", 0.95, ({"teacher": teacher}, {"student": student, "teacher": teacher}))):
        base = {"teacher": None if name == "trades" else TEACHER}
        exact = losses(recipe(name, **base))
        assert exact[-1] < learnt * exact[0]
        for options in paths:
            found = losses(recipe(name, **base | options))
            np.testing.assert_allclose(found, exact, rtol=0.1)
            assert abs(found.mean() / exact.mean() - 1) < 0.02


def test_what_a_run_is_told(tiny_config, tiny_teacher, tmp_path):
    config = tiny_config(method={"name": "ard"}, teacher=str(tiny_teacher), teacher_dtype="bfloat16", dtype="bfloat16",
                         attack={"dtype": "float32"}, training={"gradient_checkpointing": True, "steps": 2})
    dataset, source = opening.open_data(config)
    of, _ = opening.build_recipe(config, dataset, source.epoch, parallel.data_mesh(jax.devices()[:1]))
    assert (of.student.specification["dtype"], of.teacher.specification["dtype"], of.attack_dtype) == (
        "bfloat16", "bfloat16", "float32")
    assert of.gradient_checkpointing and of.attacked_student.specification["dtype"] == "float32"
    loop.train(config, tmp_path / "run", devices=jax.devices()[:1])
    restored, variables = models.restore(str(tmp_path / "run"))
    assert restored.specification["dtype"] == "bfloat16"
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(variables))


def test_the_validation_of_a_bfloat16_run_is_in_float32(monkeypatch, tiny_config):
    seen = []

    def run_attack(model, *_, **__):
        seen.append(model.specification["dtype"])
        assert jax.config.jax_default_matmul_precision == "highest"  # or accelerators would round float32 products
        return validation.robustness.Result(np.ones(4, bool), np.zeros((4, *SHAPE), np.float32), 0.0)

    monkeypatch.setattr(validation.robustness, "run_attack", run_attack)
    monkeypatch.setattr(validation.robustness, "gradient_alignment", lambda model, variables, teacher, *_, **__: seen.append(
        model.specification["dtype"]) or seen.append(teacher.specification["dtype"]) or {"gradient_cosine": 0.0})
    source = opening.open_data(tiny_config())[1]
    half = [models.variant(one, dtype="bfloat16") for one in (STUDENT, TEACHER)]
    validation.validate(half[0], {}, source, THREAT, None, teacher=half[1], teacher_variables={})
    assert len(seen) == 6 and set(seen) == {"float32"}


@pytest.mark.parametrize("field, values", [
    ("teacher_dtype", {"teacher_dtype": "fp8"}), ("attack.dtype", {"attack": {"dtype": "half"}})])
def test_other_dtypes_are_refused(field, values):
    assert_input_error(lambda: Config.from_dict(values), f"config.{field}", '"bfloat16"')
