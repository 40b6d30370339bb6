"""The table of published classifiers agrees with itself, with jaxrd's architectures, and with figures typed a second time."""

import dataclasses
import functools
import re

import pytest

from jaxrd import ThreatModel
from jaxrd.models import architectures, published
from jaxrd.models.published import PUBLISHED
from tests.support import assert_input_error

EVERY = pytest.mark.parametrize("entry", PUBLISHED, ids=lambda entry: entry.identifier)
# Typed from RobustBench's model_info files and DeepMind's README, not from the table: architecture, clean, AutoAttack.
FIGURES = {
    "cifar10/Linf/Bartoldson2024Adversarial_WRN-94-16": ("dm_wrn94_16", 93.68, 73.71),
    "cifar10/Linf/Wang2023Better_WRN-70-16": ("dm_wrn70_16", 93.25, 70.69),
    "cifar10/Linf/Cui2023Decoupled_WRN-28-10": ("dm_wrn28_10", 92.16, 67.73),
    "cifar10/Linf/Wang2023Better_WRN-28-10": ("dm_wrn28_10", 92.44, 67.31),
    "cifar10/Linf/Rebuffi2021Fixing_28_10_cutmix_ddpm": ("dm_wrn28_10", 87.33, 60.73),
    "cifar10/Linf/Carmon2019Unlabeled": ("wrn28_10", 89.69, 59.53),
    "cifar10/Linf/Addepalli2021Towards_WRN34": ("wrn34_10", 85.32, 58.04),
    "cifar10/Linf/Chen2021LTD_WRN34_20": ("wrn34_20", 86.03, 57.71),
    "cifar10/Linf/Rade2021Helper_R18_ddpm": ("dm_preact_resnet18", 86.86, 57.09),
    "cifar10/Linf/Chen2021LTD_WRN34_10": ("wrn34_10", 85.21, 56.94),
    "cifar10/Linf/Rebuffi2021Fixing_R18_ddpm": ("dm_preact_resnet18", 83.53, 56.66),
    "cifar10/Linf/Jia2022LAS-AT_34_10": ("wrn34_10", 84.98, 56.26),
    "cifar10/Linf/Wu2020Adversarial": ("wrn34_10", 85.36, 56.17),
    "cifar10/Linf/Wu2020Adversarial_extra": ("wrn28_10", 88.25, 60.04),
    "cifar10/Linf/Sehwag2021Proxy_R18": ("resnet18", 84.59, 55.54),
    "cifar10/Linf/Rice2020Overfitting": ("wrn34_20", 85.34, 53.42),
    "cifar10/Linf/Zhang2019Theoretically": ("wrn34_10", 84.92, 53.08),
    "cifar10/Linf/Addepalli2022Efficient_RN18": ("resnet18", 85.71, 52.48),
    "cifar10/Linf/Addepalli2021Towards_RN18": ("resnet18", 80.24, 51.06),
    "cifar10/Linf/Engstrom2019Robustness": ("resnet50", 87.03, 49.25),
    "cifar10/Linf/Andriushchenko2020Understanding": ("preact_resnet18_raw", 79.84, 43.93),
    "cifar10/Linf/Wong2020Fast": ("preact_resnet18_raw", 83.34, 43.21),
    "cifar10/Linf/Standard": ("wrn28_10", 94.78, 0.0),
    "cifar10/L2/Wang2023Better_WRN-28-10": ("dm_wrn28_10", 95.16, 83.68),
    "cifar10/L2/Rice2020Overfitting": ("preact_resnet18", 88.67, 67.68),
    "cifar10/L2/Engstrom2019Robustness": ("resnet50", 90.83, 69.24),
    "cifar10/L2/Wu2020Adversarial": ("wrn34_10", 88.51, 73.66),
    "cifar100/Linf/Wang2023Better_WRN-70-16": ("dm_wrn70_16", 75.22, 42.66),
    "cifar100/Linf/Wang2023Better_WRN-28-10": ("dm_wrn28_10", 72.58, 38.77),
    "cifar100/Linf/Cui2023Decoupled_WRN-28-10": ("dm_wrn28_10", 73.85, 39.18),
    "cifar100/Linf/Rebuffi2021Fixing_28_10_cutmix_ddpm": ("dm_wrn28_10", 62.41, 32.06),
    "cifar100/Linf/Gowal2020Uncovering": ("dm_wrn70_16", 60.86, 30.03),
    "cifar100/Linf/Jia2022LAS-AT_34_10": ("wrn34_10", 64.89, 30.77),
    "cifar100/Linf/Chen2021LTD_WRN34_10": ("wrn34_10", 64.07, 30.59),
    "cifar100/Linf/Addepalli2022Efficient_WRN_34_10": ("wrn34_10", 68.75, 31.85),
    "cifar100/Linf/Wu2020Adversarial": ("wrn34_10", 60.38, 28.86),
    "cifar100/Linf/Rebuffi2021Fixing_R18_ddpm": ("dm_preact_resnet18", 56.87, 28.50),
    "cifar100/Linf/Addepalli2022Efficient_RN18": ("resnet18", 65.45, 27.67),
    "cifar100/Linf/Rice2020Overfitting": ("preact_resnet18", 53.83, 18.95),
    "cifar100/Linf/Sitawarin2020Improving": ("wrn34_10", 62.82, 24.57),
    # RobustBench has had other figures for these, before it replaced the weights or took over an external evaluation.
    "cifar10/Linf/Sehwag2021Proxy": ("wrn34_10", 86.68, 60.27),
    "cifar10/Linf/Gowal2020Uncovering_28_10_extra": ("dm_wrn28_10", 89.48, 62.76),
    "cifar10/L2/Wang2023Better_WRN-70-16": ("dm_wrn70_16", 95.54, 84.97),
    "cifar100/Linf/Cui2023Decoupled_WRN-34-10": ("wrn34_10", 65.76, 31.91),
    "cifar10/Linf/cifar10_linf_wrn70-16_with": ("dm_wrn70_16", 91.10, 65.88),
    "cifar10/L2/cifar10_l2_wrn28-10_cutmix_ddpm_v2": ("dm_wrn28_10", 91.79, 78.80),
    "cifar100/Linf/cifar100_linf_wrn70-16_without": ("dm_wrn70_16", 60.86, 30.03),
}
DEEPMIND = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
# Those of ReLU networks that normalise, the only ones that do: mean and std, to four decimals.
NORMALISATIONS = {
    "cifar10/Linf/Rice2020Overfitting": DEEPMIND["cifar10"],
    "cifar10/L2/Rice2020Overfitting": DEEPMIND["cifar10"],
    "cifar10/Linf/Wong2020Fast": DEEPMIND["cifar10"],
    "cifar10/Linf/Engstrom2019Robustness": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar10/L2/Engstrom2019Robustness": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar10/Linf/Hendrycks2019Using": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "cifar100/Linf/Hendrycks2019Using": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "cifar100/Linf/Rice2020Overfitting": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "cifar100/Linf/Wu2020Adversarial": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "cifar100/Linf/Chen2020Efficient": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
# First authors and years of those who use DeepMind's networks and no others; Cui et al. 2023 use both kinds.
SILU = {"Bartoldson2024", "Gowal2020", "Gowal2021", "Pang2022", "Rade2021", "Rebuffi2021", "Wang2023", "Xu2023"}


def test_identifiers_files_and_places_are_unique():
    for values in (published.names(), [entry.file for entry in PUBLISHED], [entry.where for entry in PUBLISHED]):
        assert len(set(values)) == len(values) == len(PUBLISHED) > 60


@EVERY
def test_the_architecture_is_one_of_ours_and_agrees_with_the_name(entry):
    assert re.fullmatch(
        r"resnet(18|34|50)|preact_resnet18(_raw)?|dm_preact_resnet18|mobilenet_v2|(dm_)?wrn\d+_\d+", entry.model)
    assert architectures.is_architecture(entry.model)
    if size := re.search(r"(?:_|wrn|WRN-?)(\d+)[-_](\d+)", entry.name):
        assert entry.model.removeprefix("dm_") == f"wrn{size[1]}_{size[2]}"
    elif depth := re.search(r"WRN(\d+)", entry.name):
        assert entry.model.startswith(f"wrn{depth[1]}_")
    elif depth := re.search(r"_(PA)?RN?(\d+)", entry.name):
        assert entry.model.endswith(f"resnet{depth[2]}") and (not depth[1] or "preact" in entry.model)


@EVERY
def test_deepminds_networks_are_those_of_its_followers(entry):
    follows = entry.name[:re.search("20..|$", entry.name).end()] in SILU or entry.format == "haiku"
    follows = follows or entry.name == "Cui2023Decoupled_WRN-28-10"
    assert entry.model.startswith("dm_") == follows


@EVERY
def test_the_normalisation_is_the_published_one(entry):
    expected = DEEPMIND[entry.dataset] if entry.model.startswith("dm_") else NORMALISATIONS.get(entry.identifier)
    if expected is None:
        assert entry.mean is None and entry.std is None
        return
    assert len(entry.mean) == len(entry.std) == 3
    assert all(0.4 < value < 0.6 for value in entry.mean) and all(0.15 < value <= 0.5 for value in entry.std)
    for values, rounded in zip((entry.mean, entry.std), expected):
        assert values == pytest.approx(rounded, abs=5.1e-5)


def test_cifar100_statistics_of_rice_and_wu_are_not_rounded():
    for name in ("Rice2020Overfitting", "Wu2020Adversarial"):
        entry = published.find(name, classes=100)
        assert [255 * value for value in entry.mean] == pytest.approx([129.304, 124.070, 112.434], abs=6e-4)
        assert [255 * value for value in entry.std] == pytest.approx([68.170, 65.392, 70.418], abs=6e-4)


@EVERY
def test_classes_radius_file_and_paper_agree_with_the_identifier(entry):
    dataset, threat, name = entry.identifier.split("/")
    assert entry.classes == {"cifar10": 10, "cifar100": 100}[dataset]
    assert ThreatModel(norm=entry.norm, epsilon=entry.epsilon).norm == threat.lower()
    if entry.format == "haiku":
        assert name.startswith(f"{dataset}_{threat.lower()}_wrn") and entry.file == f"{name}.npy"
        assert entry.where == f"storage.googleapis.com/dm-adversarial-robustness/{entry.file}"
        assert entry.epsilon == {"linf": 8 / 255, "l2": 128 / 255}[entry.norm]
        assert entry.paper.split()[0] in ("Gowal", "Rebuffi") and (entry.paper[:5] == "Gowal") == ("with" in name)
        return
    assert entry.format == "torch" and entry.file == f"{entry.identifier}.pt"
    assert re.fullmatch(r"Google Drive 1[\w-]{32}", entry.where)
    small_radius = entry.name in ("Zhang2019Theoretically", "Cui2020Learnable_34_10_LBGAT6")
    assert entry.epsilon == (0.5 if threat == "L2" else 0.031 if small_radius else 8 / 255)
    if name != "Standard":
        author, year = re.match(r"([A-Z][a-z]+)(20\d\d)", name).groups()
        assert entry.paper.startswith(f"{author} ") and int(entry.paper[-4:]) >= int(year)


@EVERY
def test_accuracies_are_percentages_and_attacks_cost_some(entry):
    assert 50 < entry.clean < 96 and 0 <= entry.autoattack < entry.clean - 5
    assert all(round(value, 2) == value for value in (entry.clean, entry.autoattack))
    if entry.name != "Standard":
        assert entry.autoattack > {"cifar10": 40, "cifar100": 15}[entry.dataset]


@pytest.mark.parametrize("identifier", FIGURES)
def test_figures_are_those_of_the_sources(identifier):
    entry = published.find(identifier)
    assert (entry.model, entry.clean, entry.autoattack) == FIGURES[identifier]


def test_deepminds_files_agree_with_their_twins_in_robustbench():
    twins = {}
    for entry in PUBLISHED:
        if entry.format == "haiku":
            twin = re.match(r"the network that RobustBench calls ([^;]+)", entry.note)[1]
            assert twins.setdefault(twin, entry) is entry, "two files for one network"
            if other := published.find(twin):
                assert (other.model, other.classes, other.mean, other.std, other.norm, other.clean, other.paper) == (
                    entry.model, entry.classes, entry.mean, entry.std, entry.norm, entry.clean, entry.paper)
                assert abs(other.autoattack - entry.autoattack) < 0.1
    assert len(twins) == 15 and sum(published.find(twin) is not None for twin in twins) >= 5


@EVERY
def test_every_identifier_finds_its_entry_with_the_threat_in_any_case(entry):
    dataset, threat, name = entry.identifier.split("/")
    for spelled in (threat, threat.lower(), threat.upper()):
        assert published.find(f"{dataset}/{spelled}/{name}") is entry
    assert published.find(entry.identifier, classes=entry.classes) is entry


@EVERY
def test_a_bare_name_with_its_classes_finds_the_entry_or_its_l_infinity_twin(entry):
    found = published.find(entry.name, classes=entry.classes)
    assert (found.name, found.dataset) == (entry.name, entry.dataset)
    if found is not entry:
        assert (found.norm, entry.norm) == ("linf", "l2")


def test_one_name_stands_for_three_networks():
    assert published.find("cifar10/Linf/Rice2020Overfitting").model == "wrn34_20"
    assert published.find("cifar10/L2/Rice2020Overfitting").model == "preact_resnet18"
    assert published.find("cifar100/Linf/Rice2020Overfitting").model == "preact_resnet18"
    assert published.find("Rice2020Overfitting", classes=10).identifier == "cifar10/Linf/Rice2020Overfitting"
    assert published.find("Rice2020Overfitting", classes=100).identifier == "cifar100/Linf/Rice2020Overfitting"
    assert_input_error(
        lambda: published.find("Rice2020Overfitting"), "Rice2020Overfitting", "cifar10 and cifar100",
        "cifar10/Linf/Rice2020Overfitting, cifar10/L2/Rice2020Overfitting, cifar100/Linf/Rice2020Overfitting")


def test_a_name_of_one_data_set_needs_no_classes_and_l_infinity_goes_first():
    assert published.find("Carmon2019Unlabeled").identifier == "cifar10/Linf/Carmon2019Unlabeled"
    assert published.find("Rebuffi2021Fixing_R18_cutmix_ddpm").norm == "l2"
    assert published.find("Engstrom2019Robustness").identifier == "cifar10/Linf/Engstrom2019Robustness"
    assert published.find("cifar10_l2_wrn70-16_with").model == "dm_wrn70_16"


def test_l_infinity_goes_first_wherever_it_stands_in_the_table(monkeypatch):
    monkeypatch.setattr(published, "PUBLISHED", PUBLISHED[::-1])
    assert published.find("Engstrom2019Robustness").norm == "linf"


def test_every_name_of_both_data_sets_is_refused_without_classes():
    both = {name for name in (entry.name for entry in PUBLISHED)
            if {entry.dataset for entry in PUBLISHED if entry.name == name} == {"cifar10", "cifar100"}}
    assert {"Wang2023Better_WRN-28-10", "Chen2021LTD_WRN34_10"} < both
    for name in both:
        identifiers = [entry.identifier for entry in PUBLISHED if entry.name == name]
        assert_input_error(functools.partial(published.find, name), name, *identifiers)


@pytest.mark.parametrize("name, classes, mentions", [
    ("Sitawarin2020Improving", 10, ("100 classes, not 10", "cifar100/Linf/Sitawarin2020Improving")),
    ("Standard", 100, ("10 classes, not 100", "cifar10/Linf/Standard")),
    ("Rice2020Overfitting", 200, ("10 or 100 classes, not 200", "cifar100/Linf/Rice2020Overfitting")),
    ("cifar100/linf/Rice2020Overfitting", 10, ("100 classes, not 10", "cifar100/Linf/Rice2020Overfitting")),
])
def test_other_classes_than_the_published_ones_are_refused(name, classes, mentions):
    assert_input_error(lambda: published.find(name, classes=classes), f'"{name}"', *mentions)


@pytest.mark.parametrize("name", [
    "wrn34_10", "resnet18", "", "/", "cifar10/Linf/", "Carmon", "carmon2019unlabeled", "Linf/Carmon2019Unlabeled",
    "cifar10/Carmon2019Unlabeled", "cifar10/L2/Carmon2019Unlabeled", "cifar100/Linf/Carmon2019Unlabeled",
    "cifar10/Linf/x/Carmon2019Unlabeled", "models/cifar10/Linf/Carmon2019Unlabeled", None,
])
def test_other_names_are_nobodys(name):
    assert published.find(name) is None
    assert published.find(name, classes=10) is None


def test_entries_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PUBLISHED[0].clean = 0.0


def test_the_table_has_one_aligned_line_for_every_entry():
    header, *lines = published.table().split("\n")
    columns = ["identifier", "model", "classes", "threat", "clean", "AutoAttack", "file", "where"]
    assert header.split() == columns
    assert len(lines) == len(PUBLISHED)
    for line, entry in zip(lines, PUBLISHED):
        cells = re.split(r" {2,}", line)
        assert cells[:3] == [entry.identifier, entry.model, str(entry.classes)]
        assert cells[4:] == [f"{entry.clean:.2f}", f"{entry.autoattack:.2f}", entry.file, entry.where]
        for column in ("identifier", "model", "file", "where"):
            cell, start = getattr(entry, column), header.index(column)
            assert line[start:start + len(cell)] == cell
        for column, cell in (("clean", cells[4]), ("AutoAttack", cells[5])):
            end = header.index(column) + len(column)
            assert line[end - len(cell):end] == cell
    radii = {re.split(r" {2,}", line)[3] for line in lines}
    assert radii == {"Linf 8/255", "Linf 0.031", "L2 0.5", "L2 128/255"}


@pytest.mark.parametrize("text, expected", [
    ("LBGAT", ["cifar100/Linf/Cui2020Learnable_34_10_LBGAT6"]),
    ("bdm-at", ["cifar10/Linf/Wang2023Better_WRN-28-10", "cifar100/Linf/Wang2023Better_WRN-28-10"]),
    ("RESNET50", ["cifar10/Linf/Engstrom2019Robustness", "cifar10/L2/Engstrom2019Robustness"]),
    ("icml 2024", ["cifar10/Linf/Bartoldson2024Adversarial_WRN-94-16"]),
    ("CIFAR10/l2/Wu", ["cifar10/L2/Wu2020Adversarial"]),
    ("wrn34-20", ["cifar10/Linf/cifar10_linf_wrn34-20_without"]),
])
def test_the_table_keeps_what_contains_the_text_in_any_case(text, expected):
    assert [line.split()[0] for line in published.table(text).split("\n")[1:]] == expected


def test_the_table_does_not_search_places_and_says_when_it_is_empty():
    drive = PUBLISHED[0].where.removeprefix("Google Drive ")
    for text in (drive, "googleapis", "no such model"):
        assert published.table(text) == f'no published classifier contains "{text}"; an empty text lists all {len(PUBLISHED)}'


def test_a_number_that_no_source_gives_is_a_dash(monkeypatch):
    unknown = dataclasses.replace(PUBLISHED[0], clean=None, autoattack=None)
    monkeypatch.setattr(published, "PUBLISHED", (unknown,))
    assert re.split(r" {2,}", published.table().split("\n")[1])[4:6] == ["-", "-"]
