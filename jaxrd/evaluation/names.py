"""What attacks, norms, radii and measures are called in tables and figures, and the order in which attacks stand there."""

import math
from collections.abc import Iterable

ALIGNMENT = {  # what evaluation.json has under "alignment", and its heading
    "gradient_cosine": "grad cosine", "gradient_distance": "grad distance", "taylor_remainder": "Taylor remainder",
    "central_remainder": "central remainder", "point_distance_uniform": "distance, uniform",
    "point_distance_adversarial": "distance, PGD-20"}
MEASURES = {**ALIGNMENT, "seconds_per_step": "s/step"}  # what is measured besides accuracies
COLUMNS = ("gradient_cosine", "gradient_distance", "seconds_per_step")  # of them, those that comparisons of runs show
SMALLER_IS_BETTER = ("gradient_distance", "point_distance_uniform", "point_distance_adversarial")

_ORDER = ("clean", "fgsm", "mim", "pgd", "cw", "strong", "fast", "autoattack", "autoattack_plus")
# "fast" is named after its two attacks: half of AutoAttack must not pass for the whole.
_KEYS = {"fast": "APGD-CE+T", "autoattack_plus": "AutoAttack+"}
_WORDS = {"fgsm": "FGSM", "mim": "MI-FGSM", "pgd": "PGD", "cw": "CW", "apgd": "APGD", "fab": "FAB", "ce": "CE", "dlr": "DLR",
          "t": "T", "square": "Square", "autoattack": "AutoAttack"}


def attack_name(key: str) -> str:
    """Returns an attack's name as papers print it: "pgd20" as "PGD-20", "apgd_ce" as "APGD-CE"."""
    if key in _KEYS:
        return _KEYS[key]
    words = []
    for part in key.split("_"):
        stem = part.rstrip("0123456789")
        words.append("-".join(word for word in (_WORDS.get(stem, stem), part[len(stem):]) if word))
    return ("-" if words[0].isupper() else " ").join(words)


def attack_order(key: str) -> tuple[int, str, int]:
    """Returns what to sort attacks by: the weak before the strong, fewer steps before more, unknown ones last by name."""
    stem = key.rstrip("0123456789")
    return _ORDER.index(stem) if stem in _ORDER else len(_ORDER), stem, int(key[len(stem):] or 0)


def strongest(keys: Iterable[str]) -> str | None:
    """Returns the attack that a comparison is about: AutoAttack where it is among them, else the strongest; None of none.

    Attacks that are not known here are the strongest only where no other is.
    """
    keys = set(keys)
    known = [key for key in keys if key.rstrip("0123456789") in _ORDER]
    return "autoattack" if "autoattack" in keys else max(known or keys, key=attack_order, default=None)


def norm_name(norm: str) -> str:
    """Returns a norm as papers print it: "linf" as "L∞"."""
    return {"linf": "L∞", "l2": "L2", "l1": "L1"}.get(norm, norm)


def epsilon_text(epsilon: float) -> str:
    """Returns a radius as it is usually written: in 255ths where it is a small whole number of them."""
    levels = epsilon * 255
    if 0 < levels < 32.5 and math.isclose(levels, round(levels), rel_tol=1e-5):
        return f"{round(levels)}/255"
    return f"{epsilon:.4g}"
