"""CIFAR-10-C as TFDS has it: 95 data sets, 19 corruptions of the CIFAR-10 test images in five severities, and means over them.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (ICLR 2019): 15
corruptions, and four more to tune on. A mean is only as good as what is in it, so every mean says how many it is of.
"""

import re
import statistics
from collections.abc import Collection, Mapping

BASE = "cifar10_corrupted"
_MAIN = ("brightness", "contrast", "defocus_blur", "elastic", "fog", "frost", "frosted_glass_blur", "gaussian_noise",
         "impulse_noise", "jpeg_compression", "motion_blur", "pixelate", "shot_noise", "snow", "zoom_blur")
_MORE = ("gaussian_blur", "saturate", "spatter", "speckle_noise")
CORRUPTIONS = (*_MAIN, *_MORE)
SEVERITIES = (1, 2, 3, 4, 5)
TOTAL = len(CORRUPTIONS) * len(SEVERITIES)
MAIN = frozenset((corruption, severity) for corruption in _MAIN for severity in SEVERITIES)

Place = tuple[str, int]  # corruption, severity


def place_of(name: str) -> Place | None:
    """Returns the corruption and severity of a data set's name in evaluation.json; None where it is another data set.

    >>> place_of("cifar10_corrupted/fog_3:1.0.0[:500]")
    ('fog', 3)
    """
    match = re.match(rf"{BASE}/(\w+)_(\d)(?::[\w.]+)?(?:\[:\d+\])?$", name)
    place = match and (match[1], int(match[2]))
    return place if place and place[0] in CORRUPTIONS and place[1] in SEVERITIES else None


def mean_name(places: Collection[Place]) -> str:
    """Returns what a mean over some of the data sets is called, which says how many they are."""
    if len(places) == 1:
        (corruption, severity), = places
        return f"{BASE}/{corruption}_{severity}"
    which = " (the 15 main corruptions)" if frozenset(places) == MAIN else ""
    return f"{BASE}, mean of {f'{len(places)} of' if len(places) < TOTAL else 'all'} {TOTAL}{which}"


def grid(accuracy: Mapping[Place, float]) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows of a table, corruptions by severities, with the means of both; in percent.

    Args:
      accuracy: of each data set that was evaluated; "-" stands for the others of a corruption. A mean over fewer than five
        severities, or over other corruptions than the mean beside it, says of how many it is.
    """
    corruptions = [name for name in CORRUPTIONS if any(place[0] == name for place in accuracy)]
    body = []
    for name in sorted(corruptions):
        row = [accuracy.get((name, severity)) for severity in SEVERITIES]
        known = [value for value in row if value is not None]
        few = f" ({len(known)} of {len(SEVERITIES)})" if len(known) < len(SEVERITIES) else ""
        body.append([name.replace("_", " "), *map(_percent, row), _percent(statistics.fmean(known)) + few])
    columns = [[value for (_, at), value in accuracy.items() if at == severity] for severity in SEVERITIES]
    counts = {len(column) for column in columns if column}
    alike = len(counts) == 1
    means = [_percent(statistics.fmean(column) if column else None)
             + (f" ({len(column)} of {len(CORRUPTIONS)})" if column and not alike else "") for column in columns]
    label = f"mean of {counts.pop()} of {len(CORRUPTIONS)}" if alike else "mean"
    few = f" ({len(accuracy)} of {TOTAL})" if len(accuracy) < TOTAL else ""
    body.append([label, *means, _percent(statistics.fmean(accuracy.values())) + few])
    return ["severity", *map(str, SEVERITIES), "mean"], body


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
