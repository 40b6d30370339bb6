"""What a run trains on: what chooses its best checkpoint, further images beside its own, and mixed images."""

import shutil

import jax
import numpy as np
import pytest

from jaxrd import models
from jaxrd.config import Config
from jaxrd.training import loop, opening
from jaxrd.training.log import read_metrics
from tests.support import assert_input_error

pytestmark = pytest.mark.usefixtures("quick_compilation")
ONE = {"devices": jax.devices()[:1]}


def entries(workdir, kind):
    return [entry for entry in read_metrics(workdir / "metrics.jsonl") if kind in entry]


def test_selection_last_trains_on_all_images_and_validates_on_none(tiny_config, tmp_path):
    config = tiny_config(data={"selection": "last"}, training={"steps": 4})
    dataset, source = opening.open_data(config)
    assert len(source) == 200 and dataset.validation is None
    assert int(loop.train(config, tmp_path / "run", **ONE).step) == 4
    assert entries(tmp_path / "run", "train/loss") and not entries(tmp_path / "run", "validation/pgd_accuracy")
    models.restore(tmp_path / "run")
    models.restore(tmp_path / "run", step=2)
    assert_input_error(
        lambda: models.restore(tmp_path / "run", step="best"), "none is the best", "config.data.selection", "2, 4")


def test_selection_test_trains_on_all_images_and_validates_on_the_test_images(tiny_config, tmp_path, capsys):
    config = tiny_config(data={"selection": "test"}, training={"steps": 2})
    dataset, source = opening.open_data(config)
    assert len(source) == 200 and dataset.validation is dataset.test and len(dataset.test) == 40
    loop.train(config, tmp_path / "run", **ONE)
    assert "chosen on 40 TEST images: its accuracy on them will be optimistic" in capsys.readouterr().out
    (entry,) = entries(tmp_path / "run", "validation/clean_accuracy")
    assert entry["validation/clean_accuracy"] * 40 == pytest.approx(round(entry["validation/clean_accuracy"] * 40))
    models.restore(tmp_path / "run", step="best")


def test_a_run_with_further_images_ends_its_epochs_with_its_own_and_goes_on_like_an_uninterrupted_one(
        tiny_config, tiny_arrays, tmp_path, capsys):
    extra = tmp_path / "generated.npz"
    with np.load(tiny_arrays.split(",")[0]) as file:
        np.savez(extra, image=255 - file["images"][:50], label=file["labels"][:50])
    mixed = {"extra": str(extra), "extra_fraction": 0.25}
    config = tiny_config(data=mixed, training={"steps": None, "epochs": 0.5})
    _, source = opening.open_data(config)
    assert len(source) == 160 + 50 and source.epoch == 160 and config.steps(source.epoch) == 5
    share = source.labels[source.indices(config.seed, 0, 16)]
    assert len(share) == 16 and (source.indices(config.seed, 0, 16) >= 160).sum() == 4
    whole = loop.train(config, tmp_path / "whole", **ONE)
    assert f"trains on 160 images of {tiny_arrays} and 50 of {extra}, 25% of each batch; the best" in capsys.readouterr().out
    # Killed after the checkpoint of step 2: what came later is not there.
    part = tmp_path / "part"
    loop.train(config, part, **ONE)
    for step in ("4", "5"):
        for path in (part / "checkpoints").glob(step):
            shutil.rmtree(path)
    resumed = loop.train(config, part, **ONE)
    for ours, theirs in zip(jax.tree.leaves(whole.params), jax.tree.leaves(resumed.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    plain = loop.train(tiny_config(training={"steps": 5}), tmp_path / "plain", **ONE)
    assert any((np.asarray(ours) != np.asarray(theirs)).any()
               for ours, theirs in zip(jax.tree.leaves(whole.params), jax.tree.leaves(plain.params)))


def test_further_images_that_do_not_fit_are_refused_before_anything_is_written(tiny_config, tmp_path):
    def refused(mentions, **section):
        assert_input_error(lambda: loop.train(tiny_config(data=section), tmp_path / "run", **ONE), "config.data", *mentions)
        assert not (tmp_path / "run").exists()

    images = np.zeros((30, 8, 8, 1), np.uint8)
    for name, arrays in {"beyond": {"images": images, "labels": np.full(30, 10)},
                         "larger": {"images": np.zeros((30, 9, 9, 1), np.uint8), "labels": np.zeros(30, int)},
                         "fine": {"images": images, "labels": np.zeros(30, int)},
                         "keys": {"x": images}}.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    refused(["no such file"], extra=str(tmp_path / "none.npz"))
    refused(["[0, 10)"], extra=str(tmp_path / "beyond.npz"))
    refused(["(9, 9, 1)"], extra=str(tmp_path / "larger.npz"))
    refused(["['x']"], extra=str(tmp_path / "keys.npz"))
    refused(["extra_fraction=0.01", "16 images"], extra=str(tmp_path / "fine.npz"), extra_fraction=0.01)
    refused(["extra"], extra="no_such_data_set")


@pytest.mark.parametrize("mixing", ["mixup", "cutmix"])
def test_a_run_on_mixed_images_is_the_same_on_one_device_and_on_four(tiny_config, tmp_path, mixing):
    config = tiny_config(data={"mixing": mixing, "cutout": 2}, training={"steps": 2})
    states = [loop.train(config, tmp_path / str(devices), devices=jax.devices()[:devices]) for devices in (1, 4)]
    for ours, theirs in zip(*(jax.tree.leaves(state.params) for state in states), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    for path in ("1", "4"):
        assert all(np.isfinite(entry["train/loss"]) for entry in entries(tmp_path / path, "train/loss"))


@pytest.mark.parametrize("resident", [True, False])
def test_where_the_images_lie_changes_nothing_and_may_change_in_a_resumed_run(tiny_config, tmp_path, resident):
    config = tiny_config(training={"steps": 4}, data={"resident": resident})
    state = loop.train(config, tmp_path / "run", **ONE)
    other = loop.train(tiny_config(training={"steps": 4}), tmp_path / "other", **ONE)
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    values = config.to_dict()
    values["data"]["resident"] = None
    loop.train(Config.from_dict(values), tmp_path / "run", **ONE)


@pytest.mark.parametrize("section, mentions", [
    ({"selection": "tset"}, ["config.data.selection", "tset", "validation"]),
    ({"extra_fraction": 1.0}, ["config.data.extra_fraction", "1.0", "between 0 and 1"]),
    ({"mixing": "cutmx"}, ["config.data.mixing", "cutmx", "cutmix"]),
    ({"mixing_alpha": 0.0}, ["config.data.mixing_alpha", "above 0"]),
    ({"cutout": -1}, ["config.data.cutout", "-1"]),
    ({"resident": "maybe"}, ["config.data.resident", "true or false or None"]),
])
def test_bad_values_are_refused_by_the_configuration(tiny_config, section, mentions):
    assert_input_error(lambda: tiny_config(data=section), *mentions)


def test_a_method_that_needs_one_true_class_refuses_mixing(tiny_config):
    assert_input_error(
        lambda: tiny_config(method={"name": "mart"}, data={"mixing": "mixup"}), "config.data.mixing", "mixup", "mart")


def test_a_run_is_not_resumed_on_other_images(tiny_config, tiny_arrays, tmp_path):
    train, test = tiny_arrays.split(",")
    with np.load(train) as file:
        images, labels = file["images"], file["labels"]
    own = tmp_path / "train.npz"
    np.savez(own, images=images, labels=labels)
    config = tiny_config(data={"arrays": f"{own},{test}"}, training={"steps": 2})
    loop.train(config, tmp_path / "run", **ONE)
    loop.train(config, tmp_path / "run", **ONE)
    np.savez(own, images=255 - images, labels=labels)
    assert_input_error(lambda: loop.train(config, tmp_path / "run", **ONE), str(own), "other images", "--workdir")
    np.savez(own, images=images, labels=labels)
    loop.train(config, tmp_path / "run", **ONE)


def test_evaluation_has_no_use_for_the_further_images(tiny_config, tiny_arrays, tmp_path):
    from jaxrd.evaluation.evaluate import evaluate

    extra = tmp_path / "generated.npz"
    with np.load(tiny_arrays.split(",")[0]) as file:
        np.savez(extra, images=file["images"][:50], labels=file["labels"][:50])
    loop.train(tiny_config(data={"extra": str(extra), "extra_fraction": 0.5}, training={"steps": 1}), tmp_path / "run", **ONE)
    extra.unlink()
    record = evaluate(tmp_path / "run", "clean", curve="none", say=lambda line: None, **ONE)
    assert record["data"]["examples"] == 40 and record["data"]["train_examples"] == 160


def test_a_cutout_larger_than_the_images_is_refused_before_anything_is_written(tiny_config, tmp_path):
    config = tiny_config(data={"cutout": 9})
    assert_input_error(lambda: loop.train(config, tmp_path / "run", **ONE), "config.data", "cutout is 9", "at most 8")
    assert not (tmp_path / "run").exists()


def test_the_path_method_takes_its_negatives_of_a_mixture_too(tiny_config, tiny_arrays, tiny_teacher, tmp_path):
    config = tiny_config(
        method={"name": "path", "path_points": 1}, teacher=str(tiny_teacher), training={"steps": 1},
        data={"extra": tiny_arrays.split(",")[0], "extra_fraction": 0.5})
    assert int(loop.train(config, tmp_path / "run", **ONE).step) == 1


def test_an_earlier_checkpoint_is_evaluated_on_data_that_have_moved(tiny_config, tiny_arrays, tmp_path):
    from jaxrd.data import preparation
    from jaxrd.evaluation.evaluate import evaluate

    splits = {}
    for split, path in zip(("train", "test"), tiny_arrays.split(",")):
        with np.load(path) as file:
            splits[split] = file["images"], file["labels"]
    preparation.prepare_arrays("mine", splits, tmp_path / "here", say=lambda line: None)

    def config(place, steps):
        return tiny_config(data={"arrays": "", "name": "mine", "directory": str(tmp_path / place)},
                           training={"steps": steps, "checkpoint_every": 2})

    stop = config("here", 4)
    loop.train(stop, tmp_path / "run", **ONE)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    (tmp_path / "here").rename(tmp_path / "there")
    loop.train(config("there", 4), tmp_path / "run", **ONE)
    for step in (2, 4):
        record = evaluate(tmp_path / "run", "clean", step=step, curve="none", say=lambda line: None, **ONE)
        assert record["data"]["examples"] == 40
