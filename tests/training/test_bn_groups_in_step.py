"""BatchNorm groups in training: groups of a batch are groups of examples with all their views; a run has them and resumes."""

import dataclasses
import json
import shutil

import chex
import jax
import numpy as np
import optax
import pytest

from jaxrd import ThreatModel, distillation, models, objectives
from jaxrd.distillation import Term
from jaxrd.distillation.views import ADVERSARIAL, CLEAN, View
from jaxrd.evaluation.evaluate import evaluate
from jaxrd.training import loop, parallel, state as states, step
from jaxrd.training.collectives import collectives
pytestmark = pytest.mark.usefixtures("quick_compilation")

BATCH, GROUPS, SHAPE, CLASSES = 16, 4, (8, 8, 1), 10


def recipe(bn_groups):
    """Two views that are forwarded as one batch, and a third of its own, whose forward goes without the statistics."""
    views = (dataclasses.replace(CLEAN, together="pair"), dataclasses.replace(ADVERSARIAL, together="pair"),
             View("mirrored", lambda known: 1 - known["clean"], updates_statistics=False))

    def loss(student, teacher, labels):
        pair = objectives.kl_divergence(student["clean"], student["adversarial"])
        return pair + objectives.cross_entropy(student["mirrored"], labels)

    method = distillation.Method(
        "own", distillation.cross_entropy_attack(), views, (Term("own", loss, student=("clean", "adversarial", "mirrored")),))
    student = models.create("resnet6_w4", classes=CLASSES, image_shape=SHAPE, bn_groups=bn_groups)
    inner = distillation.InnerMaximisation(ThreatModel(epsilon=0.1), 0.05, 1)
    return step.Recipe(method, student, None, inner, optax.sgd(0.1), steps=10)


def test_a_group_holds_all_views_of_its_examples_and_stays_on_its_device():
    mesh, whole, alone = parallel.data_mesh(), recipe(GROUPS), recipe(None)
    draw = np.random.default_rng(0)
    batch = {name: (draw.uniform(size=(BATCH, 1, 1, 1)) * draw.uniform(size=(BATCH, *SHAPE))).astype(np.float32)
             for name in ("clean", "adversarial")}
    batch["mirrored"] = 1 - batch["clean"]
    labels = draw.integers(0, CLASSES, BATCH).astype(np.int32)
    state = states.create(whole.student, whole.optimizer, jax.random.key(0), weight_average=False)

    def gradients(recipe):
        return jax.jit(lambda state, views, labels: step.gradients_of(recipe, state, views, {}, labels))

    placed = jax.device_put((state, batch, labels), (parallel.replicated(mesh), *2 * [parallel.sharded(mesh)]))
    program = gradients(whole).lower(*placed).compile()
    rows = BATCH // GROUPS
    by_itself = gradients(alone)
    parts = [by_itself(state, *jax.tree.map(lambda x: x[index * rows:(index + 1) * rows], (batch, labels)))
             for index in range(GROUPS)]
    expected = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *parts)
    found = program(*placed)
    chex.assert_trees_all_close(found[:2], expected[:2], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[2]["loss"], expected[2]["loss"], rtol=1e-5)
    # What crosses devices is the gradient of each forward, what moves the statistics, and the metrics, all at the end.
    exchanged = collectives(program.as_text())
    assert {each.kind for each in exchanged} == {"all-reduce"} and len(exchanged) <= 2
    params, statistics = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state.params, state.batch_stats))
    assert sum(each.bytes for each in exchanged) <= 4 * (2 * params + statistics + len(found[2]))


def test_a_run_with_groups_is_another_run_resumes_and_is_evaluated_on_any_batch(tiny_config, tmp_path):
    options = {"training": {"steps": 2, "checkpoint_every": 1}, "attack": {"steps": 1}, "data": {"selection": "last"}}
    config = tiny_config(bn_groups=2, **options)

    def train(config, workdir):
        return jax.device_get(loop.train(config, workdir, devices=jax.devices()[:1]).variables)

    whole = train(config, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "2")
    chex.assert_trees_all_equal(train(config, tmp_path / "resumed"), whole)
    plain = train(tiny_config(**options), tmp_path / "plain")
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(a != b)), whole, plain)))

    assert json.loads((tmp_path / "run" / "config.json").read_text())["bn_groups"] == 2
    model, _ = models.restore(tmp_path / "run")
    assert model.specification["bn_groups"] == 2
    # Which two groups would not divide.
    found = evaluate(tmp_path / "run", "clean", batch_size=7, devices=jax.devices()[:1], say=lambda line: None)
    assert found["data"]["examples"] == 40 and 0 <= found["accuracy"]["clean"] <= 1
