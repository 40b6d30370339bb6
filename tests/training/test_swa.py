"""The stochastic weight average of a run is the mean of the weights that it says, with statistics of its own."""

import dataclasses
import functools
import shutil

import jax
import numpy as np
import optax
import pytest

from jaxrd import ThreatModel, attacks, distillation, models, objectives
from jaxrd.config import Config
from jaxrd.data.augment import Augmentation
from jaxrd.training import checkpoint, loop, opening, parallel, state as states, step, swa, validation
from jaxrd.training.log import read_metrics
from jaxrd.training.snapshots import Snapshots
from tests.support import assert_input_error


@pytest.mark.parametrize("steps, start, every, taken", [
    (10, 0.5, 2, [6, 8, 10]), (10, 0.5, 3, [7, 10]), (10, 1.0, 3, [10]), (10, 0.01, 4, [2, 6, 10]), (10, 0.2, 100, [10]),
    (7, 0.4, 1, [3, 4, 5, 6, 7]), (1, 0.5, 1, [1])])
def test_the_average_is_the_mean_of_the_snapshots_and_before_them_the_newest(steps, start, every, taken):
    snapshots, average = Snapshots.until(steps, start, every), 0.0
    weights = np.random.default_rng(0).normal(size=steps + 1)
    for step in range(1, steps + 1):
        rate = float(snapshots.rate(np.int32(step)))
        average = rate * weights[step] + (1 - rate) * average
        so_far = [each for each in taken if each <= step]
        assert average == pytest.approx(np.mean(weights[so_far]) if so_far else weights[step], abs=1e-6)


@pytest.fixture(scope="module")
def config(tiny_config):
    """Six steps of which the weights after the 2nd, 4th and 6th are averaged, all of them saved."""
    return tiny_config(
        data={"shift": 0}, training={"checkpoint_every": 1, "keep": 9, "swa_start": 0.3, "swa_every": "32 examples"})


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """(workdir, last state, training images, recipe). Read only."""
    workdir = tmp_path_factory.mktemp("swa") / "run"
    state = loop.train(config, workdir, devices=jax.devices()[:1])
    dataset, source = opening.open_data(config)
    recipe, _ = opening.build_recipe(config, dataset, source.epoch, mesh(1))
    return workdir, state, source, recipe


def mesh(devices):
    return parallel.data_mesh(jax.devices()[:devices])


def saved(run, step):
    workdir, state, _, _ = run
    with checkpoint.Checkpoints(workdir) as checkpoints:
        return checkpoints.restore(step, state)


def assert_close(found, expected, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol), found, expected)


def measured_statistics(student, params, batches):
    """Each batch's, solved for from where it moves two unlike starts of the running statistics, averaged over the batches."""
    apply = jax.jit(functools.partial(student.apply, train=True))
    ones = jax.tree.map(np.ones_like, student.init(jax.random.key(0))["batch_stats"])
    per_batch = [jax.tree.map(lambda leaf: (np.asarray(leaf) - 0.9) / 0.1, apply(
        {"params": params, "batch_stats": ones}, points)[1]) for points in batches]
    return jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *per_batch)


def test_weights_are_the_mean_of_what_was_saved(run):
    weights = {step: saved(run, step).params for step in (1, 2, 4, 6)}
    for step, taken in ((1, (1,)), (2, (2,)), (4, (2, 4)), (5, (2, 4)), (6, (2, 4, 6))):
        mean = jax.tree.map(lambda *leaves: np.mean([np.asarray(leaf) for leaf in leaves], axis=0), *(
            weights[each] for each in taken))
        assert_close(saved(run, step).average["params"], mean)


def adversarial(run, config, at, count=10):
    """What PGD-AT forwards: one epoch of training images, attacked by two steps, on the average in state `at`."""
    _, state, source, recipe = run
    variables = {"params": at.average["params"], "batch_stats": at.batch_stats}

    @jax.jit
    def attacked(key, images, labels):
        def objective(x):
            return objectives.cross_entropy(recipe.student.apply(variables, x, False)[0], labels)

        return attacks.pgd(key, objective, images, threat=config.threat.build(), step_size=0.05, steps=2, start="uniform")

    for index in range(count):
        rows = source.batch(source.indices(config.seed, index, 16))
        _, key = jax.random.split(jax.random.fold_in(jax.random.fold_in(state.key, 2**31 - 1), index))
        yield attacked(key, rows["images"] / np.float32(255), rows["labels"])


def test_statistics_are_those_of_the_average_on_what_training_forwards(run, config):
    for step in (2, 6):  # also on the way, for validation
        state = saved(run, step)
        expected = measured_statistics(run[3].student, state.average["params"], adversarial(run, config, state))
        # Another program takes another sign where a gradient is rounding: a pixel by two steps of 0.05.
        assert_close(state.average["batch_stats"], expected, atol=5e-4)
    first = saved(run, 1)
    assert_close(first.average["batch_stats"], first.batch_stats, atol=0)


def test_what_is_validated_saved_and_restored_is_the_average(run, config):
    workdir, state, _, _ = run
    model, variables, origin = checkpoint.restore_model(workdir)
    assert origin["weights"] == "average"
    assert_close(variables, state.average, atol=0)
    dataset, _ = opening.open_data(config)
    accuracies = validation.validate(model, variables, dataset.validation, config.threat.build(), mesh(1))
    assert accuracies.items() <= read_metrics(workdir / "metrics.jsonl")[-1].items()


def test_a_resumed_run_has_the_same_average(run, config, tmp_path):
    """Interrupted between two snapshots, and validated less often from there."""
    workdir, state, _, _ = run
    shutil.copytree(workdir, tmp_path / "run")
    for step in (4, 5, 6):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    rarer = dataclasses.replace(config, training=dataclasses.replace(config.training, checkpoint_every=6))
    assert_close(loop.train(rarer, tmp_path / "run", devices=jax.devices()[:1]).average, state.average, atol=0)


def test_any_number_of_devices_estimates_the_same_whatever_was_there_before(run, config):
    _, state, source, recipe = run
    spoiled = state.replace(average=state.average | {"batch_stats": jax.tree.map(np.ones_like, state.batch_stats)})
    spread = jax.device_put(spoiled, parallel.replicated(mesh(4)))
    found = swa.reestimate(recipe, spread, None, source, config, mesh(4))
    assert_close(found.average, state.average, atol=1e-4)
    assert all(leaf.sharding.num_devices == 4 for leaf in jax.tree.leaves(found.average))


def test_batches_are_bounded(run, config, monkeypatch):
    _, state, source, recipe = run
    monkeypatch.setattr(swa, "BATCHES", 2)
    found = swa.reestimate(recipe, state, None, source, config, mesh(1)).average
    points = adversarial(run, config, state, count=2)
    assert_close(found["batch_stats"], measured_statistics(recipe.student, found["params"], points), atol=1e-4)


def test_every_forward_that_moves_the_statistics_counts_and_no_other():
    generator = np.random.default_rng(0)
    rows = {"images": generator.integers(0, 256, (16, 8, 8, 1), dtype=np.uint8),
            "labels": generator.integers(0, 10, 16).astype(np.int32)}
    student = models.create("resnet6_w4", classes=10, image_shape=(8, 8, 1))
    for name, options, images in (
            ("trades", {}, [16, 16]), ("trades+igdm", {}, [16, 16]),
            ("trades+igdm", {"mirrored_statistics": True}, [16, 16, 16])):
        method = distillation.method(name, igdm_control="mirror" if "igdm" in name else "none", **options)
        recipe = step.Recipe(method, student, None, distillation.InnerMaximisation(ThreatModel(epsilon=0.1), 0.05, 1),
                             optax.sgd(0.1), 4, Augmentation(shift=1))
        state = states.create(student, recipe.optimizer, jax.random.key(0), weight_average=False)
        points = jax.eval_shape(lambda: swa._points(recipe, 0, state, None, rows))
        assert [each.shape[0] for each in points] == images


def test_a_run_without_one_is_left_as_it_is(run, config):
    _, state, source, recipe = run
    assert swa.reestimate(dataclasses.replace(recipe, snapshots=None), state, None, source, config, mesh(1)) is state
    early = state.replace(step=np.int32(1))
    assert swa.reestimate(recipe, early, None, source, config, mesh(1)) is early


def test_there_is_one_average():
    assert_input_error(lambda: Config.from_dict({"training": {"swa_start": 0.5, "weight_average": 0.9}}),
                       "config.training.swa_start is 0.5", "weight_average=0.9")
