"""Sources: what they accept, and that their batches are a pure function of (seed, step)."""

import itertools
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from jaxrd import files
from jaxrd.data import from_arrays, mixture, open_arrays, open_dataset, open_split, open_test
from jaxrd.data.selection import Selection
from jaxrd.data.source import stratified_order
from jaxrd.errors import InputError
from tests.support import assert_input_error


def images_of(n, shape=(4, 4, 1), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def source_of(n, classes=3):
    return from_arrays(images_of(n), np.random.default_rng(1).permutation(np.arange(n) % classes), classes=classes)


@pytest.mark.parametrize("n, batch_size", [(12, 4), (10, 4), (7, 7), (5, 13), (1, 3)])
def test_batches_run_through_one_permutation_per_epoch(n, batch_size):
    source, epochs = source_of(n), 6
    steps = -(-epochs * n // batch_size)
    batches = [source.indices(3, step, batch_size) for step in range(steps)]
    assert all(batch.shape == (batch_size,) for batch in batches)
    stream = np.concatenate(batches)[: epochs * n].reshape(epochs, n)
    assert (np.sort(stream) == np.arange(n)).all()
    assert (stream[2] == np.random.default_rng([3, 2]).permutation(n)).all()
    if n > 5:
        assert len({tuple(epoch) for epoch in stream}) == epochs


def test_indices_do_not_depend_on_the_order_of_calls():
    forward = [source_of(10).indices(0, step, 4) for step in range(40)]
    source = source_of(10)
    for step in np.random.default_rng(0).permutation(40):
        source.indices(9, int(step), 3)
        indices = source.indices(0, int(step), 4)
        assert (indices == forward[step]).all()
        indices[:] = 0  # the caller's copy, not the cached order
    assert any((forward[step] != source.indices(1, step, 4)).any() for step in range(3))


def test_batch_gathers_images_with_their_labels():
    source = source_of(20)
    batch = source.batch(np.array([5, 0, 5]))
    assert (batch["images"] == source.images[[5, 0, 5]]).all() and (batch["labels"] == source.labels[[5, 0, 5]]).all()
    assert batch["labels"].dtype == np.int32 and batch["images"].dtype == np.uint8
    assert len(source) == 20 and source.image_shape == (4, 4, 1)


@pytest.mark.parametrize("arguments", [(-1, 0, 4), (0, -1, 4), (0, 0, 0), (0, 1.5, 4), (True, 0, 4)])
def test_indices_reject_bad_arguments(arguments):
    assert_input_error(lambda: source_of(10).indices(*arguments), "pass an integer")


def test_partners_are_the_batch_itself_in_another_order():
    source = source_of(50)
    orders = []
    for step in range(20):
        indices, partners = source.indices(3, step, 16), source.partners(3, step, 16)
        assert (np.sort(partners) == np.sort(indices)).all() and (partners != indices).any()
        assert (source.partners(3, step, 16) == partners).all()
        orders.append(tuple(np.argsort(partners)))
    assert len(set(orders)) == 20
    assert any((source.partners(4, step, 16) != source.partners(3, step, 16)).any() for step in range(3))


@pytest.mark.parametrize("counts", [(40, 40, 40), (5, 100, 1, 60), (30, 0, 10, 0, 10)])
def test_negatives_are_of_another_class_uniform_over_classes_and_within_them(counts):
    """Chi-square tests at 1e-4 of the class of the negative given that of the image, and of the image within its class."""
    labels = np.random.default_rng(2).permutation(np.repeat(np.arange(len(counts)), counts))
    source = from_arrays(np.zeros((len(labels), 1, 1, 1), np.uint8), labels, classes=len(counts))
    batch_size, steps = 64, 400
    drawn = np.stack([(source.indices(1, step, batch_size), source.negatives(1, step, batch_size)) for step in range(steps)])
    images, negatives = drawn.transpose(1, 0, 2).reshape(2, -1)
    own, other = labels[images], labels[negatives]
    assert (own != other).all()
    present = np.flatnonzero(counts)
    for label in present:
        seen = np.bincount(other[own == label], minlength=len(counts))[present[present != label]]
        if len(seen) > 1:
            assert stats.chisquare(seen).pvalue > 1e-4
        within = np.bincount(negatives[other == label], minlength=len(labels))[labels == label]
        if len(within) > 1:
            assert stats.chisquare(within).pvalue > 1e-4
    assert (source.negatives(1, 5, batch_size) == drawn[5, 1]).all()
    assert (source.negatives(2, 5, batch_size) != drawn[5, 1]).any()


def test_negatives_need_two_classes():
    source = from_arrays(images_of(4), np.ones(4, int), name="mine")
    assert_input_error(lambda: source.negatives(0, 0, 4), "mine", "class 1", "two classes")


@pytest.mark.parametrize("fraction, batch_size, share", [(0.7, 128, 90), (0.5, 10, 5), (0.3, 7, 2), (0.98, 64, 63)])
def test_a_mixture_has_the_same_share_in_every_batch_and_runs_through_both(fraction, batch_size, share):
    main, extra = source_of(23), from_arrays(images_of(61, seed=9), np.arange(61) % 3, classes=3, name="generated")
    mixed = mixture(main, extra, fraction)
    assert len(mixed) == 84 and mixed.epoch == 23 and mixed.classes == 3 and mixed.image_shape == (4, 4, 1)
    np.testing.assert_array_equal(mixed.images[:], np.concatenate([main.images, extra.images]))
    np.testing.assert_array_equal(mixed.labels, np.concatenate([main.labels, extra.labels]))
    batches = np.stack([mixed.indices(5, step, batch_size) for step in range(60)])
    is_extra = batches >= 23
    assert (is_extra.sum(axis=1) == share).all()
    # Spread evenly: any part of the batch has its share, to within one image.
    running = np.cumsum(is_extra[0]) - np.arange(1, batch_size + 1) * share / batch_size
    assert np.abs(running).max() <= 1
    for stream, n in ((batches[~is_extra], 23), (batches[is_extra] - 23, 61)):
        epochs = stream[: len(stream) // n * n].reshape(-1, n)
        assert (np.sort(epochs) == np.arange(n)).all()
    assert (batches[~is_extra][:23] == np.random.default_rng([5, 0]).permutation(23)).all()
    step = 17
    assert (mixed.indices(5, step, batch_size) == batches[step]).all()
    assert (np.sort(mixed.partners(5, step, batch_size)) == np.sort(batches[step])).all()
    assert (mixed.labels[mixed.negatives(5, step, batch_size)] != mixed.labels[batches[step]]).all()


def test_no_two_draws_share_a_stream():
    """The orders of either part of a mixture of two equal sources, epoch by epoch, and those of partners, step by step."""
    n = 40
    mixed = mixture(source_of(n), source_of(n), 0.5)
    batches = np.stack([mixed.indices(1, step, n) for step in range(16)])
    first, second = batches[batches < n].reshape(-1, n), batches[batches >= n].reshape(-1, n) - n
    partners = []
    for step in range(8):
        positions = {position: place for place, position in enumerate(mixed.indices(1, step, n))}
        partners.append([positions[position] for position in mixed.partners(1, step, n)])
    orders = [tuple(order) for order in (*first, *second, *partners)]
    assert len(first) == len(second) == 8 and len(set(orders)) == 24


def test_no_part_is_taken_of_a_mixture():
    mixed = mixture(source_of(40), source_of(40), 0.5)
    assert_input_error(lambda: mixed.subset(20, seed=0), "is a mixture", "mix after that")


def test_mixture_rejects_what_does_not_fit():
    main = source_of(20)
    beyond = from_arrays(images_of(4), np.array([0, 1, 3, 2]), name="beyond")
    assert_input_error(lambda: mixture(main, beyond, 0.5), "beyond", "labels reach 3", "3 classes", "[0, 3)")
    for fraction in (0.0, 1.0, -1.0, 1.5):
        assert_input_error(lambda: mixture(main, main, fraction), "extra_fraction", str(fraction))
    assert_input_error(lambda: mixture(main, main, 0.01).indices(0, 0, 8), "extra_fraction=0.01", "8 images", "larger batch")
    assert_input_error(lambda: mixture(main, main, 0.99).indices(0, 0, 8), "extra_fraction=0.99", "8 images")
    other = from_arrays(images_of(5, (5, 5, 1)), LABELS[:1].repeat(5), name="other")
    assert_input_error(lambda: mixture(main, other, 0.5), "other", "(5, 5, 1)", "(4, 4, 1)")
    floats = from_arrays(images_of(5).astype(np.float32) / 255, LABELS[:1].repeat(5), name="other")
    assert_input_error(lambda: mixture(main, floats, 0.5), "float32", "uint8")


@pytest.mark.parametrize("examples", [4, 10, 23, 60])
def test_subset_is_balanced_nested_and_seeded(examples):
    labels = np.repeat(np.arange(4), [3, 30, 40, 50])
    source = from_arrays(np.arange(123, dtype=np.uint8).reshape(-1, 1, 1, 1), labels)
    subset = source.subset(examples, seed=5)
    chosen = subset.images.ravel()
    assert len(subset) == examples == len(set(chosen)) and subset.classes == 4
    assert (subset.labels == labels[chosen]).all()
    counts = np.bincount(subset.labels, minlength=4)
    plentiful = counts[1:] if counts[0] == 3 else counts
    assert np.ptp(plentiful) <= 1
    assert (source.subset(examples, seed=5).images == subset.images).all()
    assert set(chosen) <= set(source.subset(examples + 20, seed=5).images.ravel())
    assert set(chosen) != set(source.subset(examples, seed=6).images.ravel())


def test_subset_of_everything_is_everything():
    source = source_of(30)
    assert (source.subset(30, seed=0).images == source.images).all()


@pytest.mark.parametrize("examples, seed", [(31, 0), (2, 0), (0, 0), (3.0, 0), (10, -1)])
def test_subset_rejects_bad_arguments(examples, seed):
    assert_input_error(lambda: source_of(30).subset(examples, seed), f"={examples if seed == 0 else seed}")


def test_every_prefix_of_a_stratified_order_keeps_the_shares():
    labels = np.repeat(np.arange(3), [10, 30, 60])
    order = stratified_order(labels, np.random.default_rng(0).permutation(100))
    assert (np.sort(order) == np.arange(100)).all()
    for size in range(1, 101):
        counts = np.bincount(labels[order[:size]], minlength=3)
        assert np.abs(counts - size * np.array([0.1, 0.3, 0.6])).max() <= 1


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_images_become_float32(dtype):
    images = np.linspace(0, 1, 4 * 8 * 8, dtype=dtype).reshape(4, 8, 8, 1)
    source = from_arrays(images, [0, 1, 2, 0])
    assert source.images.dtype == np.float32 and source.labels.dtype == np.int32 and source.classes == 3
    assert (source.images == images.astype(np.float32)).all()


LABELS = np.array([0, 1, 2, 1])
FLOATS = images_of(4) / 255


def with_value(value):
    images = FLOATS.copy()
    images[1, 2, 3, 0] = value
    return images


@pytest.mark.parametrize(
    "images, labels, classes, mentions",
    [
        (images_of(4)[..., 0], LABELS, None, ["shape (4, 4, 4)", "images[..., None]"]),
        (images_of(4)[:0], LABELS[:0], None, ["shape (0, 4, 4, 1)"]),
        (images_of(4, (3, 32, 32)), LABELS, None, ["channel first", "transpose"]),
        (images_of(4).astype(np.int64), LABELS, None, ["int64", "uint8"]),
        (FLOATS * 255, LABELS, None, ["0..255"]),
        ((FLOATS - 0.5) / 0.25, LABELS, None, ["normalised"]),
        (with_value(1.00001), LABELS, None, ["clip"]),
        (with_value(np.nan), LABELS, None, ["finite"]),
        (with_value(-np.inf), LABELS, None, ["finite"]),
        (images_of(4), LABELS[:3], None, ["4 images", "3 labels"]),
        (images_of(4), np.eye(4)[LABELS], None, ["labels have shape (4, 4)"]),
        (images_of(4), LABELS.astype(np.float32), None, ["float32", "astype"]),
        (images_of(4), LABELS - 1, None, ["-1", "[0, 2)"]),
        (images_of(4), LABELS, 2, ["[0, 2)"]),
        (images_of(4), LABELS + 2**32, None, ["labels reach", "without gaps"]),
        (images_of(4), LABELS * 100_000_000, None, ["labels reach 200000000"]),
        (images_of(4), LABELS, 0, ["classes=0"]),
    ],
)
def test_from_arrays_rejects(images, labels, classes, mentions):
    assert_input_error(lambda: from_arrays(images, labels, classes=classes, name="mine"), *mentions)


@pytest.fixture
def npz(tmp_path):
    """Writes train.npz (100 images, 4 classes) and test.npz (20) and returns their paths."""
    paths = []
    for name, n in (("train", 100), ("test", 20)):
        paths.append(str(tmp_path / f"{name}.npz"))
        np.savez_compressed(paths[-1], images=images_of(n, seed=n), labels=np.arange(n) % 4)
    return paths


def test_open_arrays_splits_a_stratified_validation_part_off(npz):
    data = open_dataset("ignored", arrays=",".join(npz), validation_fraction=0.2)
    assert [len(data.train), len(data.validation), len(data.test)] == [80, 20, 20]
    assert (np.bincount(data.validation.labels) == 5).all()
    together = np.concatenate([data.train.images, data.validation.images]).reshape(100, -1)
    assert {tuple(row) for row in together} == {tuple(row) for row in images_of(100, seed=100).reshape(100, -1)}
    assert (data.test.images == images_of(20, seed=20)).all()
    assert data.train.classes == data.validation.classes == data.test.classes == 4
    assert data.validation.name == "arrays/validation"
    assert (open_arrays(*npz, validation_fraction=0.2).validation.images == data.validation.images).all()


def test_open_arrays_takes_the_classes_from_train_and_no_stray_label_for_a_class(npz):
    train, test = npz
    classes = open_arrays(*npz).train.classes
    assert open_arrays(*npz).test.classes == classes
    np.savez(test, images=images_of(2), labels=[classes, 0])
    assert_input_error(lambda: open_arrays(*npz), test, f"[0, {classes})")
    np.savez(train, images=images_of(4), labels=[0, 1, 9000, 1])
    assert_input_error(lambda: open_arrays(*npz), train, "9000", "no image has label 2")


@pytest.mark.parametrize("arrays", ["a.npz", "a.npz,", "a.npz,b.npz,c.npz", ","])
def test_arrays_must_name_two_files(arrays):
    assert_input_error(lambda: open_dataset("x", arrays=arrays), "train.npz,test.npz")


def test_open_arrays_rejects_bad_files(npz, tmp_path):
    train, test = npz
    other = str(tmp_path / "other.npz")
    assert_input_error(lambda: open_arrays(train, other), other, "no such file")
    assert_input_error(lambda: open_arrays(str(tmp_path), test), "no such file")
    np.savez(other, x=images_of(3), y=[0, 1, 2])
    assert_input_error(lambda: open_arrays(other, test), "['x', 'y']")
    np.savez(other, images=images_of(3, (8, 8, 1)), labels=[0, 1, 2])
    assert_input_error(lambda: open_arrays(train, other), "(4, 4, 1)", "(8, 8, 1)")
    np.savez(other, images=np.array([None, 1], object), labels=[0, 1])
    assert_input_error(lambda: open_arrays(other, test), other)
    np.savez(other, images=images_of(2), labels=[0, 1])
    assert_input_error(lambda: open_arrays(other, other, validation_fraction=0.9), "none to train on")
    with open(other, "wb") as file:
        np.save(file, images_of(3))
    assert_input_error(lambda: open_arrays(other, test), other)
    for fraction in (0, 1, -0.1, float("nan")):
        assert_input_error(lambda: open_arrays(train, test, validation_fraction=fraction), "validation_fraction")


def test_damaged_npz_never_escapes_as_another_error(npz, tmp_path):
    train, test = npz
    good = pathlib.Path(train).read_bytes()
    rng = np.random.default_rng(0)
    damaged = str(tmp_path / "damaged.npz")
    flips = [good[:i] + bytes([good[i] ^ 0x55]) + good[i + 1 :] for i in rng.integers(0, len(good), 60)]
    cuts = [good[: int(size)] for size in np.linspace(0, len(good) - 1, 20)]
    failures = 0
    for content in itertools.chain(flips, cuts):
        with open(damaged, "wb") as file:
            file.write(content)
        try:
            open_arrays(damaged, test)
        except InputError as error:
            failures += 1
            assert damaged in str(error) and "\n" not in str(error)
    assert failures > 60


def test_arrays_do_not_import_tfds(npz):
    code = (
        "import sys; import jaxrd.data; from jaxrd.data import open_dataset; "
        f"open_dataset('jaxrd_digits', arrays={','.join(npz)!r}); "
        "assert not {'tensorflow', 'tensorflow_datasets', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_images_of_the_test_split_are_read_when_they_are_asked_for(npz, monkeypatch):
    read = []
    original = files.read_arrays
    monkeypatch.setattr(files, "read_arrays", lambda path, names: read.append((path, tuple(names))) or original(path, names))
    data = open_arrays(*npz)
    assert (npz[1], ("labels",)) in read and not any(path == npz[1] and "images" in names for path, names in read)
    assert (data.test.images == images_of(20, seed=20)).all() and data.test is data.test
    assert [names for path, names in read if path == npz[1]] == [("labels",), ("images", "labels")]


def test_selection_says_what_chooses_the_best_checkpoint(npz):
    last = open_arrays(*npz, selection="last")
    assert last.validation is None and (last.train.images == images_of(100, seed=100)).all()
    on_test = open_arrays(*npz, selection="test")
    assert len(on_test.train) == 100 and on_test.validation is on_test.test
    assert len(open_arrays(*npz, selection="validation").train) == 90
    assert_input_error(lambda: open_arrays(*npz, selection="tset"), "tset", "test")


def test_keys_of_generated_sets_are_read_too(npz, tmp_path):
    path = str(tmp_path / "generated.npz")
    np.savez(path, image=images_of(6), label=np.arange(6) % 4)
    assert (open_arrays(path, npz[1]).train.labels != 9).all()
    source = open_split(path, "train", classes=4)
    assert (source.images == images_of(6)).all() and source.classes == 4 and source.name == path
    (source,) = open_test(path, classes=4)
    assert (source.labels == np.arange(6) % 4).all() and source.name == path
    assert_input_error(lambda: open_test(path, classes=3), path, "[0, 3)")
    assert_input_error(lambda: open_test(str(tmp_path / "none.npz"), classes=3), "no such file")


def test_parts_of_a_memory_map_stay_on_disk(tmp_path):
    np.save(tmp_path / "images.npy", images_of(30))
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    source = from_arrays(mapped, np.arange(30) % 3)
    assert isinstance(source.images, np.memmap)
    part = source.subset(9, seed=0)
    assert isinstance(part.images, Selection) and (part.images[:] == source_like(mapped, part)).all()
    assert isinstance(from_arrays(images_of(30), np.arange(30) % 3).subset(9, seed=0).images, np.ndarray)
    np.save(tmp_path / "floats.npy", images_of(30).astype(np.float32) / 255)
    floats = from_arrays(np.load(tmp_path / "floats.npy", mmap_mode="r"), np.arange(30) % 3)
    assert str(floats.images.filename) == str(tmp_path / "floats.npy") and not floats.images.flags.writeable
    assert isinstance(floats.subset(9, seed=0).images, Selection)
    copied = from_arrays(np.load(tmp_path / "floats.npy", mmap_mode="r")[[2, 1, 0]], np.arange(3))
    assert type(copied.subset(3, seed=0).images) is not Selection
    batch = part.batch(np.array([8, 0]))
    assert type(batch["images"]) is np.ndarray and batch["images"].shape == (2, 4, 4, 1)


def source_like(images, part):
    """The rows of `images` that a subset of 9 with seed 0 holds, found by their content."""
    flat = {image.tobytes(): index for index, image in enumerate(images)}
    return images[[flat[image.tobytes()] for image in part.images[:]]]


def test_a_fingerprint_is_of_images_labels_and_classes():
    source = source_of(200)
    other = images_of(200)
    other[-1] = 255 - other[-1]
    prints = {source.fingerprint, from_arrays(other, source.labels).fingerprint,
              from_arrays(images_of(200), source.labels[::-1]).fingerprint,
              from_arrays(images_of(200), source.labels, classes=4).fingerprint,
              from_arrays(images_of(199), source.labels[:199]).fingerprint}
    assert len(prints) == 5 and source.fingerprint == source_of(200).fingerprint
    assert source.part(np.arange(200), "all").fingerprint == source.fingerprint
