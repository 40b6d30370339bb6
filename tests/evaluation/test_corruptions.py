"""Means over corruptions are those of the numbers that are there, and say how many these are."""

import itertools
import re
import statistics

import numpy as np
import pytest

from jaxrd.evaluation import corruptions
from jaxrd.evaluation.corruptions import CORRUPTIONS, MAIN, SEVERITIES

ALL = list(itertools.product(CORRUPTIONS, SEVERITIES))


def test_the_data_sets_are_those_of_tfds():
    from tensorflow_datasets.image_classification import cifar10_corrupted

    configs = {config.name for config in cifar10_corrupted.Cifar10Corrupted.BUILDER_CONFIGS}
    assert {f"{corruption}_{severity}" for corruption, severity in ALL} == configs and len(ALL) == corruptions.TOTAL == 95
    assert len(MAIN) == 75 and MAIN < set(ALL)
    assert {corruptions.place_of(f"cifar10_corrupted/{name}") for name in configs} == set(ALL)


@pytest.mark.parametrize("name, place", [
    ("cifar10_corrupted/fog_3", ("fog", 3)), ("cifar10_corrupted/gaussian_noise_5[:200]", ("gaussian_noise", 5)),
    ("cifar10_corrupted/fog_3:1.0.0", ("fog", 3)), ("cifar10_corrupted/fog_3:1.0.0[:7]", ("fog", 3)),
    ("cifar10_corrupted/fog_6", None), ("cifar10_corrupted/fog_0", None), ("cifar10_corrupted/mist_3", None),
    ("mnist_corrupted/fog_3", None), ("cifar10_corrupted", None), ("cifar10_1", None), ("a/cifar10_corrupted/fog_3", None),
    ("cifar10_corrupted/fog_3.npz", None)])
def test_names(name, place):
    assert corruptions.place_of(name) == place


def test_the_name_of_a_mean_says_of_how_many():
    assert corruptions.mean_name(ALL) == "cifar10_corrupted, mean of all 95"
    assert corruptions.mean_name(ALL[:94]) == "cifar10_corrupted, mean of 94 of 95"
    assert corruptions.mean_name(ALL[:75]) != corruptions.mean_name(ALL[20:])
    assert corruptions.mean_name(MAIN) == "cifar10_corrupted, mean of 75 of 95 (the 15 main corruptions)"
    assert corruptions.mean_name({("fog", 3)}) == "cifar10_corrupted/fog_3"


def test_the_grid_of_all_has_every_number_and_the_means_of_rows_columns_and_the_whole():
    values = np.random.default_rng(0).uniform(size=95)
    header, body = corruptions.grid(dict(zip(ALL, values)))
    assert header == ["severity", "1", "2", "3", "4", "5", "mean"]
    square = values.reshape(19, 5)[np.argsort(CORRUPTIONS)]
    expected = np.block([[square, square.mean(1, keepdims=True)], [square.mean(0), square.mean()]])
    found = np.array([[float(cell) for cell in row[1:]] for row in body])
    np.testing.assert_allclose(found, 100 * expected, atol=0.051)
    assert [row[0] for row in body] == [*(name.replace("_", " ") for name in sorted(CORRUPTIONS)), "mean of 19 of 19"]


@pytest.mark.parametrize("missing", [[("fog", 2)], [("snow", severity) for severity in SEVERITIES], ALL[:93],
                                     [place for place in ALL if place[1] != 3]])
def test_what_is_missing_is_seen_in_every_mean_that_lacks_it(missing):
    accuracy = {place: index / 100 for index, place in enumerate(ALL) if place not in missing}
    _, body = corruptions.grid(accuracy)
    *rows, last = body
    assert [row[0] for row in rows] == sorted({name.replace("_", " ") for name, _ in accuracy})
    for row in rows:
        own = {severity: value for (name, severity), value in accuracy.items() if name.replace("_", " ") == row[0]}
        assert row[1:6] == [f"{100 * own[severity]:.1f}" if severity in own else "-" for severity in SEVERITIES]
        mean = f"{100 * statistics.fmean(own.values()):.1f}"
        assert row[6] == (mean if len(own) == 5 else f"{mean} ({len(own)} of 5)")
    for severity in SEVERITIES:
        own = [value for (_, at), value in accuracy.items() if at == severity]
        count = re.search(r"(\d+) of 19", last[severity] if "(" in last[severity] else last[0])
        assert last[severity].split(" ")[0] == (f"{100 * statistics.fmean(own):.1f}" if own else "-")
        assert not own or int(count[1]) == len(own)
    assert last[6] == f"{100 * statistics.fmean(accuracy.values()):.1f} ({len(accuracy)} of 95)"
