"""Other data than a run's own: their records are right, cost nothing of what stands in evaluation.json, and nothing twice."""

import concurrent.futures
import contextlib
import io
import json
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrd import attacks, models
from jaxrd.evaluation import evaluate as evaluation
from jaxrd.evaluation import other_data, robustness
from jaxrd.evaluation import record as records
from jaxrd.training import checkpoint
from tests.launch.commands import check_one_line, run_all
from tests.support import assert_input_error


def prepare(root, name, images, labels, *, config="", classes=10, split="test"):
    """Prepares a TFDS data set of one split."""
    import tensorflow_datasets as tfds

    def info(self):
        return OfflineInfo(builder=self, features=tfds.features.FeaturesDict({
            "image": tfds.features.Tensor(shape=images.shape[1:], dtype=images.dtype),
            "label": tfds.features.ClassLabel(num_classes=classes)}), disable_shuffling=True)

    def examples(self, _):
        return {split: ((place, {"image": image, "label": int(label)})
                        for place, (image, label) in enumerate(zip(images, labels)))}

    class OfflineInfo(tfds.core.DatasetInfo):
        def initialize_from_bucket(self):
            pass

    with tfds.core.registered.skip_registration():
        builder = type(name, (tfds.core.GeneratorBasedBuilder,), {
            "name": name, "VERSION": tfds.core.Version("1.0.0"), "_info": info, "_split_generators": examples,
            "_generate_examples": None,
            "BUILDER_CONFIGS": [tfds.core.BuilderConfig(name=config)] if config else []})
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        builder(file_format="array_record", data_dir=root, **({"config": config} if config else {})).download_and_prepare()


@pytest.fixture(scope="module")
def images():
    """(images [60, 8, 8, 1] uint8, labels) that no run has seen."""
    from sklearn import datasets

    digits = datasets.load_digits()
    return np.round(digits.images[400:460] * (255 / 16)).astype(np.uint8)[..., np.newaxis], digits.target[400:460]


@pytest.fixture(scope="module")
def prepared(images, tmp_path_factory):
    """A directory of prepared data sets: two that fit the tiny model, corrupted ones, and three that do not fit."""
    root = tmp_path_factory.mktemp("tfds")
    pixels, labels = images
    noise = np.random.default_rng(0).integers(0, 120, pixels.shape)
    prepare(root, "cifar10_1", pixels[:40], labels[:40], config="v4")  # its first config, which the bare name stands for
    for config, strength in (("fog_1", 0.5), ("fog_5", 1.5), ("brightness_1", 1.0)):
        worse = np.clip(pixels + strength * noise, 0, 255).astype(np.uint8)
        prepare(root, "cifar10_corrupted", worse, labels, config=config)
    prepare(root, "svhn_cropped", pixels, labels, classes=12)
    prepare(root, "mnist", np.repeat(pixels, 2, axis=1), labels)
    prepare(root, "kmnist", pixels, labels, split="train")
    return root


@pytest.fixture
def workdir(tiny_teacher, tmp_path):
    """A copy of a run that has learnt something, not evaluated."""
    shutil.copytree(tiny_teacher, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def file(images, tmp_path):
    np.savez(tmp_path / "new.npz", images=images[0], labels=images[1])
    return str(tmp_path / "new.npz")


def evaluate(workdir, attacks="clean", **options):
    # All sets are multiples of 20 images: nearly everything is compiled once.
    return evaluation.evaluate(
        workdir, attacks, **{"devices": jax.devices()[:1], "say": lambda _: None, "batch_size": 20} | options)


def content(workdir):
    return json.loads((workdir / "evaluation.json").read_text())


@pytest.fixture
def no_attacks(monkeypatch):
    """From the call of what it returns on, no attack may be run."""
    def forbid():
        monkeypatch.setattr(robustness, "run_attack", lambda *_, **__: pytest.fail("an attack was run"))

    return forbid


@pytest.fixture(params=["double", pytest.param("real", marks=pytest.mark.slow)])
def short_cascade(request, monkeypatch):
    """AutoAttack of few steps, or a double that refuses the directory of other images as it does, and breaks every other."""
    module = sys.modules["jaxrd.attacks.autoattack"]
    for name, value in (("_STEPS", 3), ("_QUERIES", 10), ("_TARGETS", 1)):
        monkeypatch.setattr(module, name, value)

    class Double:
        def __init__(self, key, network, images, labels, *, threat, version, batch_size, mesh):
            self.images, self.labels, self.threat, self.version = images, labels, threat, version

        def attack(self, rows, *, resume, say, writer):
            if (resume / "images.npy").exists():
                np.testing.assert_array_equal(np.load(resume / "images.npy"), self.images)
            resume.mkdir(parents=True, exist_ok=True)
            np.save(resume / "images.npy", self.images)

        def result(self, outcome, say):
            n = len(self.labels)
            robust = np.arange(n) % 2 == 0
            return attacks.AutoAttackResult(
                self.images, self.labels, robust, np.ones(n, bool), np.where(robust, -1, 2), ("clean", "apgd-ce", "apgd-t"),
                {"clean": 1.0, "apgd-ce": 0.9, "apgd-t": robust.mean()}, np.zeros(n, np.float32), np.arange(n), [],
                {"clean": (n, 0)}, {}, {"clean": 0.1}, robust.mean(), self.version, self.threat, {})

    if request.param == "double":
        monkeypatch.setattr(robustness, "prepare", Double)


def correct(workdir, pixels, labels):
    """Which images the run's model has right, by its logits."""
    return np.argmax(models.logits_fn(*models.restore(workdir))(pixels.astype(np.float32) / 255), axis=-1) == labels


def test_a_record_says_what_was_measured_on_which_images_and_weights(workdir, file, prepared, images):
    lines = []
    found = evaluate(workdir, None, data=f"{file}, cifar10_1", data_directory=prepared, say=lines.append)
    assert content(workdir) == {"other_data": found} and list(found) == [file, "cifar10_1"]
    for name, count in ((file, 60), ("cifar10_1", 40)):
        record = found[name]
        assert set(record["accuracy"]) == set(record["attacks"]) == set(record["seconds"]) == {"clean", "pgd20"}
        assert record["accuracy"]["clean"] == pytest.approx(correct(workdir, *(part[:count] for part in images)).mean())
        assert 0 < record["accuracy"]["pgd20"] < record["accuracy"]["clean"] - 0.1
        assert {key: record["data"][key] for key in ("name", "split", "examples", "of")} == {
            "name": name, "split": "test", "examples": count, "of": count}
        assert record["threat"] == {"norm": "linf", "epsilon": 0.1, "bounds": [0.0, 1.0]} and record["seed"] == 0
        run = record["run"]
        assert (run["step"], run["checkpoint"], run["weights"], run["method"]) == (200, "last", "newest", "pgd_at")
    assert len({record["data"]["sha256"] for record in found.values()}) == 2
    accuracy = found["cifar10_1"]["accuracy"]
    assert lines[1].startswith(
        f"{workdir}: cifar10_1 (2 of 2): clean {accuracy['clean']:.1%}, pgd20 {accuracy['pgd20']:.1%} of 40 images (")


def test_on_the_same_images_the_numbers_are_those_of_the_own_data(workdir, tiny_arrays):
    own = evaluate(workdir, "clean,fgsm,pgd20", seed=3)
    test = tiny_arrays.split(",")[1]
    other = evaluate(workdir, "clean,fgsm,pgd20", seed=3, data=[test])[test]
    for part in ("accuracy", "attacks", "threat", "seed", "jaxrd"):
        assert other[part] == own[part]
    assert own["run"] == {key: value for key, value in other["run"].items() if key != "sha256"}


def test_own_and_other_records_leave_each_other_alone(workdir, file, prepared):
    own = evaluate(workdir, "clean,pgd20")
    gallery = (workdir / "evaluation" / "gallery.npz").stat().st_mtime_ns
    other = evaluate(workdir, data=file)
    assert content(workdir) == own | {"other_data": other}
    assert (workdir / "evaluation" / "gallery.npz").stat().st_mtime_ns == gallery
    other |= evaluate(workdir, data="cifar10_1", data_directory=prepared, step=100)
    for step in ("last", 100):  # and an own record of another checkpoint
        again = evaluate(workdir, "fgsm", step=step)
        assert again["other_data"] == content(workdir)["other_data"] == other
        assert set(again["accuracy"]) == ({"clean", "pgd20", "fgsm"} if step == "last" else {"fgsm"})


def test_other_attacks_on_the_same_terms_are_kept_and_what_is_on_record_is_not_run_again(workdir, file, no_attacks):
    first = evaluate(workdir, "clean", data=file)[file]
    second = evaluate(workdir, "fgsm", data=file)[file]
    assert second["accuracy"] == first["accuracy"] | {"fgsm": second["accuracy"]["fgsm"]}
    before = content(workdir)
    moved = workdir.rename(workdir.with_name("renamed"))
    no_attacks()
    lines = []
    third = evaluate(moved, "clean,fgsm", data=file, say=lines.append)[file]
    assert third["accuracy"] == second["accuracy"] and third["run"]["workdir"] == str(moved)
    assert lines[0].endswith("of 60 images (on record)")
    for part in ("accuracy", "attacks", "seconds", "cascades", "data"):
        assert content(moved)["other_data"][file][part] == before["other_data"][file][part]


@pytest.mark.parametrize("change", ["seed", "step", "images", "attack"])
def test_another_evaluation_takes_the_place_of_the_earlier(workdir, file, images, change):
    evaluate(workdir, "clean,fgsm", data=file)
    path = workdir / "evaluation.json"
    earlier = content(workdir)
    record = earlier["other_data"][file]
    record["accuracy"] = {"clean": 0.125, "fgsm": 0.125}
    if change == "attack":  # as an earlier version might have defined it
        record["attacks"]["clean"]["description"] = "Something else."
    path.write_text(json.dumps(earlier))
    if change == "images":
        np.savez(file, images=255 - images[0], labels=images[1])
    options = {"seed": {"seed": 1}, "step": {"step": 100}}.get(change, {})
    found = evaluate(workdir, "clean", data=file, **options)[file]["accuracy"]
    assert found["clean"] != 0.125 and found.get("fgsm") == (0.125 if change == "attack" else None)


def test_weights_that_took_the_place_of_others_are_measured_anew(workdir, file):
    model, variables, origin = checkpoint.restore_model(workdir, "last")
    accuracy = []
    for scale in (1, -1):  # as a run that was trained once more would leave the same step
        shutil.rmtree(workdir / "checkpoints")
        weights = jax.tree.map(lambda x, scale=scale: scale * x, variables["params"])
        checkpoint.save_variables(workdir, variables | {"params": weights}, {
            "config": origin["config"], "model": model.specification})
        accuracy.append(evaluate(workdir, data=file)[file]["accuracy"]["clean"])
    assert accuracy[0] > 0.3 > accuracy[1]


def test_a_call_that_was_killed_goes_on(workdir, file, prepared):
    class Killed(Exception):
        pass

    def die(line):
        raise Killed

    with pytest.raises(Killed):
        evaluate(workdir, "clean,fgsm", data=["cifar10_1", file], data_directory=prepared, say=die)
    assert list(content(workdir)["other_data"]) == ["cifar10_1"]
    lines = []
    evaluate(workdir, "clean,fgsm", data=["cifar10_1", file], data_directory=prepared, say=lines.append)
    assert "on record" in lines[0] and "on record" not in lines[1]


def test_a_pattern_stands_for_all_that_is_prepared_and_nothing_is_evaluated_twice(workdir, file, prepared, tmp_path):
    lines = []
    (tmp_path / "link.npz").symlink_to(file)
    found = evaluate(workdir, data=f"cifar10_corrupted/*,cifar10_corrupted/fog_1,{file},{file},{tmp_path / 'link.npz'}",
                     data_directory=prepared, say=lines.append)
    assert list(found) == ["cifar10_corrupted/brightness_1", "cifar10_corrupted/fog_1", "cifar10_corrupted/fog_5", file]
    assert len(lines) == 4
    accuracy = [record["accuracy"]["clean"] for record in found.values()]
    assert len(set(accuracy)) > 1 and accuracy[3] > accuracy[2]  # the noise has cost something


def test_the_first_few_images_never_pass_for_all_of_them(workdir, file, images):
    whole = evaluate(workdir, data=file)[file]
    expected = correct(workdir, *images)
    count = next(count for count in (20, 40) if expected[:count].mean() != expected.mean())  # another accuracy
    name = f"{file}[:{count}]"
    few = evaluate(workdir, "clean,pgd20", data=file, examples=count)
    assert list(few) == [name] and set(content(workdir)["other_data"]) == {file, name}
    data = few[name]["data"]
    assert (data["examples"], data["of"], data["name"]) == (count, 60, name)
    assert few[name]["accuracy"]["clean"] == pytest.approx(expected[:count].mean())
    assert whole["accuracy"]["clean"] == pytest.approx(expected.mean())
    assert list(evaluate(workdir, data=file, examples=60)) == [file]  # that is all of them


def test_cascades_have_a_directory_for_each_data_set(workdir, file, images, short_cascade, no_attacks):
    nested = workdir.parent / "new_npz"
    nested.mkdir()
    other = nested / "x.npz"
    np.savez(other, images=images[0][:20], labels=images[1][:20])
    options = {"data": [file, str(other), file], "seed": 0}
    found = evaluate(workdir, "fast", **options) | evaluate(workdir, "fast", data=file, examples=20)
    files = {name: record["cascades"]["fast"]["file"] for name, record in found.items()}
    assert len(set(files.values())) == 3
    assert all(file.startswith("evaluation/fast-") and "-step200-seed0/" in file for file in files.values())
    for name, record in found.items():
        with np.load(workdir / files[name]) as saved:
            assert len(saved["labels"]) == record["data"]["examples"]
        assert record["accuracy"]["fast"] == record["cascades"]["fast"]["stages"]["apgd-t"]
    shutil.rmtree(workdir / pathlib.Path(files[file]).parent)
    lines = []
    evaluate(workdir, "fast", **options, say=lines.append)  # whose images are gone is measured again
    assert (workdir / files[file]).is_file() and "on record" in lines[-1] and "on record" not in lines[-2]
    no_attacks()
    evaluate(workdir, "fast", **options)


@settings(max_examples=50)
@given(st.lists(st.text(st.sampled_from("ab/_-.[:]15 é") | st.characters(codec="utf-8"), min_size=1, max_size=200), max_size=6))
def test_directories_have_plain_names_that_differ(names):
    names = {*names, "test", "validation", "a/b", "a_b", "x[:5]", "x_5_", "x" * 300, "y" + "x" * 300}
    plain = {other_data.file_name(name) for name in names}
    assert len(plain) == len(names) and not plain & {"test", "validation"}
    for name in plain:
        assert len(name) <= 100 and name.isascii() and not set(name) & set("/\\*?[]: \n")


def test_imported_weights_that_know_no_data_are_evaluated_on_what_is_named(workdir, file, images, tmp_path):
    model, variables, origin = checkpoint.restore_model(workdir, "last")
    config = origin["config"] | {"data": {"name": ""}}
    imported = tmp_path / "imported"
    imported.mkdir()
    checkpoint.save_variables(imported, variables, {
        "config": config, "model": model.specification, "imported": {"name": "cifar10/Linf/Somebody", "file": {"sha256": "0"}}})
    (imported / "config.json").write_text(json.dumps(config))
    assert_input_error(lambda: evaluate(imported), str(imported), "which images", "--data")
    record = evaluate(imported, data=file)[file]
    assert record["run"]["method"] == "cifar10/Linf/Somebody"
    assert record["accuracy"]["clean"] == pytest.approx(correct(workdir, *images).mean())


MISTAKES = {
    "unknown": ({"data": "no_such_data"}, ["--data", "'no_such_data'", "unknown"]),
    "not prepared": ({"data": "cifar10"}, ["--data", "'cifar10' is not prepared", "launch.prepare"]),
    "corruption": ({"data": "cifar10_corrupted/fog_2"}, ["cifar10_corrupted/fog_2", "not prepared"]),
    "pattern": ({"data": "cifar10_corrupted/snow_*"}, ["--data", "cifar10_corrupted/snow_*"]),
    "shape": ({"data": "mnist"}, ["mnist/test", "(16, 8, 1)", "(8, 8, 1)"]),
    "classes": ({"data": "svhn_cropped"}, ["svhn_cropped", "12 classes", "10"]),
    "no test split": ({"data": "kmnist"}, ["kmnist", "test", "train"]),
    "nothing": ({"data": " , "}, ["data is ' , '", "cifar10_1"]),
    "missing": ({"data": "FILES/gone.npz"}, ["gone.npz", "no such file"]),
    "damaged": ({"data": "FILES/damaged.npz"}, ["damaged.npz", "cannot be read"]),
    "keys": ({"data": "FILES/keys.npz"}, ["keys.npz", "'x'", "images"]),
    "labels": ({"data": "FILES/labels.npz"}, ["labels.npz", "0 to 10", "[0, 10)"]),
    "size": ({"data": "FILES/size.npz"}, ["size.npz", "(4, 8, 1)", "(8, 8, 1)"]),
    "one of several": ({"data": "cifar10_1,FILES/gone.npz"}, ["gone.npz"]),
    "split": ({"data": "cifar10_1", "split": "validation"}, ['split is "validation"', "--data"]),
    "teacher": ({"data": "cifar10_1", "teacher": "runs/t"}, ['"runs/t"', "--data"]),
    "examples": ({"data": "cifar10_1", "examples": 0}, ["examples is 0", "above 0"]),
    "half an example": ({"data": "cifar10_1", "examples": 0.5}, ["examples is 0.5", "above 0"]),
    "examples alone": ({"examples": 5}, ["examples is 5", "--data"]),
    "attack": ({"data": "cifar10_1", "attacks": "pdg20"}, ["pdg20", "pgd20"]),
}


@pytest.fixture(scope="module")
def files(images, tmp_path_factory):
    directory = tmp_path_factory.mktemp("files")
    pixels, labels = images
    np.savez(directory / "keys.npz", x=pixels, y=labels)
    np.savez(directory / "labels.npz", images=pixels, labels=np.where(np.arange(60) == 5, 10, labels))
    np.savez(directory / "size.npz", images=pixels[:, :4], labels=labels)
    np.savez(directory / "damaged.npz", images=pixels, labels=labels)
    whole = (directory / "damaged.npz").read_bytes()
    (directory / "damaged.npz").write_bytes(whole[:len(whole) // 2])
    return str(directory)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_evaluated(tiny_teacher, prepared, files, no_attacks, mistake):
    options, mentions = MISTAKES[mistake]
    options = {name: value.replace("FILES", files) if name == "data" else value for name, value in options.items()}
    no_attacks()
    assert_input_error(lambda: evaluate(tiny_teacher, **{"data_directory": prepared} | options), *mentions)
    assert not (tiny_teacher / "evaluation.json").exists()


def test_data_lie_where_the_run_says_unless_the_call_says_otherwise(workdir, prepared):
    for path in workdir.glob("checkpoints/*/_CHECKPOINT_METADATA"):
        text = path.read_text()
        assert '"directory": ""' in text
        path.write_text(text.replace('"directory": ""', f'"directory": "{prepared}"'))
    assert list(evaluate(workdir, data="cifar10_1")) == ["cifar10_1"]
    assert_input_error(lambda: evaluate(workdir, data="cifar10_1", data_directory=workdir), "not prepared", str(workdir))


def test_the_own_record_says_what_the_checkpoint_was_chosen_on_and_older_ones_count_as_validation(workdir):
    first = evaluate(workdir, "clean")
    assert first["data"]["selection"] == "validation"
    older = content(workdir)
    del older["data"]["selection"]
    (workdir / "evaluation.json").write_text(json.dumps(older))
    assert set(evaluate(workdir, "fgsm")["accuracy"]) == {"clean", "fgsm"}
    for path in workdir.glob("checkpoints/*/_CHECKPOINT_METADATA"):
        text = path.read_text()
        assert '"selection": "validation"' in text
        path.write_text(text.replace('"selection": "validation"', '"selection": "last"'))
    last = evaluate(workdir, "fgsm")
    assert last["data"]["selection"] == "last" and set(last["accuracy"]) == {"fgsm"}  # other terms
    assert_input_error(lambda: evaluate(workdir, split="validation"), "validation", '"last"', '"test"')


def test_the_command_line(workdir, file, prepared):
    base = f"evaluate --workdir={workdir} --data_dir={prepared}"
    good = f"{base} --data={file},cifar10_corrupted/* --examples=20 --batch_size=20"
    mistakes = {
        f"{base} --data=cifar10_2": ["--data: ", "cifar10_2"],
        f"{base} --data=": ["--data is empty", "--data=cifar10_1"],
        f"{base} --data=cifar10_1 --examples=0": ["--examples=0"],
        f"{base} --examples=5": ["examples is 5", "--data"],
        f"{base} --data=cifar10_1 --split=validation": ["validation", "--data"],
        f"{base} --dta=cifar10_1": ["--dta", "did you mean --data?"]}
    results = run_all([good, *mistakes], heavy=True)
    for line, words in mistakes.items():
        check_one_line(results[line], *words)
    status, out, error, _ = results[good]
    assert status == 0, error
    table = out.split("\n\n")[1].splitlines()
    assert table[0].split() == ["data", "images", "clean", "PGD-20"]
    accuracies = content(workdir)["other_data"][f"{file}[:20]"]["accuracy"]
    assert table[2].split() == ["new.npz", *"first 20 of 60".split(), *(f"{100 * value:.1f}" for value in accuracies.values())]
    assert [line.split("  ")[0] for line in table[2:]] == [
        "new.npz", *(f"cifar10_corrupted/{name}" for name in ("brightness_1", "fog_1", "fog_5")),
        "cifar10_corrupted, mean of 3 of 95"]
    assert "Other data" in (workdir / "report.html").read_text() and not (workdir / "evaluation" / "gallery.npz").exists()


def test_of_many_that_write_at_once_every_record_is_kept(tmp_path):
    path, names = tmp_path / "evaluation.json", [f"set {place}" for place in range(24)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        own = pool.submit(records.write, path, {"run": "own"})
        list(pool.map(lambda name: records.write(path, {"run": name}, name), names))
    own.result()
    assert records.read(path) == {"run": "own", "other_data": {name: {"run": name} for name in names}}
    assert list(tmp_path.iterdir()) == [path]
