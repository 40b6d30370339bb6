"""A checkpoint gives back what was saved, keeps what was asked for, and says in one line what is wrong with it."""

import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrd import models
from jaxrd.config import OptimizerConfig
from jaxrd.errors import InputError
from jaxrd.training import checkpoint, parallel, schedule, state as states
from tests.support import assert_input_error

METADATA = {"config": {"seed": 3}, "model": models.create("resnet6_w4", classes=10, image_shape=(8, 8, 1)).specification,
            "teacher_step": 40}


def make(seed=0, name="resnet6_w4", devices=1, average=True):
    """A state in which every leaf has a value of its own."""
    model = models.create(name, classes=10, image_shape=(8, 8, 1))
    optimizer = schedule.optimizer(OptimizerConfig(), 10)
    state = states.create(model, optimizer, jax.random.key(seed), weight_average=average)
    leaves, tree = jax.tree.flatten(state.replace(key=jnp.zeros(())))
    filled = jax.tree.unflatten(
        tree, [(jnp.arange(leaf.size).reshape(leaf.shape) + index + seed).astype(leaf.dtype)
               for index, leaf in enumerate(leaves)]).replace(key=state.key)
    return jax.device_put(filled, parallel.replicated(parallel.data_mesh(jax.devices()[:devices])))


def comparable(state):
    return jax.tree.map(np.asarray, state.replace(key=jax.random.key_data(state.key)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with steps 1 and 2."""
    workdir = tmp_path_factory.mktemp("saved")
    with checkpoint.Checkpoints(workdir, keep=5) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make(step), METADATA, {checkpoint.BEST_METRIC: 1 / step})
    return workdir


@pytest.mark.parametrize("devices", [1, 4])
def test_a_state_comes_back_to_the_bit_on_any_number_of_devices(saved, devices):
    with checkpoint.Checkpoints(saved) as checkpoints:
        found = checkpoints.restore(2, make(7, devices=devices))
    expected = make(2)
    chex.assert_trees_all_equal(comparable(found), comparable(expected))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert found.key.dtype == expected.key.dtype
    assert all(leaf.sharding.num_devices == devices for leaf in jax.tree.leaves(found))


def test_a_state_without_a_weight_average_comes_back_without_one(tmp_path):
    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, make(1, average=False), METADATA, {})
        checkpoints.wait()
        found = checkpoints.restore(1, make(7, average=False))
        chex.assert_trees_all_equal(comparable(found), comparable(make(1, average=False)))
        _, variables, origin = checkpoints.restore_variables(1)
    assert origin["weights"] == "newest"
    chex.assert_trees_all_equal(variables, {"params": make(1).params, "batch_stats": make(1).batch_stats})


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    state, expected = make(1), comparable(make(1))
    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, METADATA, {})
        overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 + 7, state), donate_argnums=0)
        jax.block_until_ready(overwrite(state.replace(key=jnp.zeros(()))))
        checkpoints.wait()
        chex.assert_trees_all_equal(comparable(checkpoints.restore(1, make(7))), expected)


def test_the_newest_and_the_best_are_kept(tmp_path):
    accuracy = {1: 0.1, 2: 0.4, 3: 0.3, 4: None, 5: 0.2, 6: 0.25}
    state = make()
    with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, value in accuracy.items():
            checkpoints.save(step, state, METADATA, {} if value is None else {checkpoint.BEST_METRIC: value})
        checkpoints.wait()
        assert checkpoints.steps == [2, 5, 6]
        assert checkpoints.best_step == 2
    assert checkpoint.restore_model(tmp_path, "best")[2]["step"] == 2
    assert checkpoint.restore_model(tmp_path, "last")[2]["step"] == 6
    assert checkpoint.restore_model(tmp_path, 5)[2]["step"] == 5
    with pytest.raises(InputError, match="no checkpoint of step 4; there are 2, 5, 6"):
        checkpoint.restore_model(tmp_path, 4)


def test_the_later_of_two_equals_is_the_best(tmp_path):
    with checkpoint.Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make(), METADATA, {checkpoint.BEST_METRIC: 0.5})
        checkpoints.wait()
        assert checkpoints.best_step == 2


def test_a_model_comes_back_with_its_average_and_its_origin(saved):
    model, variables, origin = checkpoint.restore_model(saved)
    assert (model.name, model.classes, model.image_shape) == ("resnet6_w4", 10, (8, 8, 1))
    chex.assert_trees_all_equal(variables, make(2).average)
    assert origin == {
        "step": 2, "config": {"seed": 3}, "teacher_step": 40, "teacher_file": None, "weights": "average", "imported": None,
        "counters": {}}


def test_what_a_kill_left_of_a_save_goes_with_the_next_run_and_no_reader_minds_it(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    left = tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "2", left)
    assert checkpoint.restore_model(tmp_path)[2]["step"] == 2
    assert left.exists()  # it may be another process's, still at work
    with checkpoint.Checkpoints(tmp_path, keep=5) as checkpoints:
        assert checkpoints.steps == [1, 2]
        checkpoints.save(3, make(3), METADATA, {})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2", "3"]
    assert checkpoint.restore_model(tmp_path)[2]["step"] == 3


@pytest.mark.parametrize("other, difference", [
    (make(name="resnet6_w6"), r"\.bn1\.mean is float32\[4\], this run needs float32\[6\]"),
    (make(average=False), r"average\.\S+ is float32\S+, this run needs absent"),
])
def test_a_checkpoint_of_another_run_is_refused_by_its_first_difference(saved, other, difference):
    with checkpoint.Checkpoints(saved) as checkpoints, pytest.raises(InputError, match=difference) as caught:
        checkpoints.restore(2, other)
    assert "\n" not in str(caught.value) and "another workdir" in str(caught.value)


def test_damage_is_one_line_that_names_the_step(saved, tmp_path):
    for number, damage in enumerate((_truncate_everything, _delete_the_state, _delete_the_metadata)):
        workdir = tmp_path / str(number)
        shutil.copytree(saved, workdir)
        damage(workdir / "checkpoints" / "2")
        with pytest.raises(InputError) as caught:
            checkpoint.restore_model(workdir)
        assert "\n" not in str(caught.value) and "checkpoints/2" in str(caught.value), damage
        shutil.rmtree(workdir / "checkpoints" / "2")  # the way out that the message names
        assert checkpoint.restore_model(workdir)[2]["step"] == 1


def _truncate_everything(step):
    for path in step.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def _delete_the_state(step):
    shutil.rmtree(step / "state")


def _delete_the_metadata(step):
    (step / "_CHECKPOINT_METADATA").unlink()


@pytest.mark.parametrize("content", ["", "{", "null", "[1]", f'{{"{checkpoint.BEST_METRIC}": "high"}}', None])
def test_metrics_that_cannot_be_read_cost_no_checkpoint(saved, tmp_path, content):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoints" / "1" / "metrics" / "metrics"
    if content is None:
        path.unlink()  # as one that was not validated has none
        assert checkpoint.restore_model(tmp_path, "best")[2]["step"] == 2
    else:
        path.write_text(content)
        assert_input_error(lambda: checkpoint.restore_model(tmp_path, "best"), f"{path.parents[1]}: its validation metrics",
                           "take the last, or one of the steps 1, 2")
    assert checkpoint.restore_model(tmp_path, 1)[2]["step"] == 1
    with checkpoint.Checkpoints(tmp_path, keep=5) as checkpoints:  # a run that goes on
        assert len(checkpoints.set_aside) == (content is not None)
        assert checkpoints.steps == [1, 2] and checkpoints.best_step == 2
        checkpoints.restore(1, make(7))


def test_nothing_to_restore_is_one_line(tmp_path):
    with pytest.raises(InputError, match="no such run directory"):
        checkpoint.restore_model(tmp_path / "absent")
    with pytest.raises(InputError, match="no finished checkpoint"):
        checkpoint.restore_model(tmp_path)
    assert list(tmp_path.iterdir()) == []  # looking leaves nothing behind


def test_regular_checkpoints_stay_besides_the_newest_and_the_best(tmp_path):
    state = make()
    with checkpoint.Checkpoints(tmp_path, keep=2, keep_every=4) as checkpoints:
        for step in range(1, 12):
            checkpoints.save(step, state, METADATA, {checkpoint.BEST_METRIC: 1.0 if step == 3 else step / 100})
    assert checkpoint.steps_of(tmp_path) == [3, 4, 8, 10, 11]
    # A later run of the same directory may keep less.
    with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(12, state, METADATA, {checkpoint.BEST_METRIC: 0.12})
    assert checkpoint.steps_of(tmp_path) == [3, 11, 12]
