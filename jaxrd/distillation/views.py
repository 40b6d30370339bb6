"""Named views of a batch: the points at which student and teacher are compared.

An attack generates some views (every attack "adversarial"); the others follow from those. A view is forwarded once, whoever
asks for it, in the order in which a method declares its views.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class View:
    """One named view.

    Attributes:
      name: what terms ask for.
      points: from the images known so far ("clean" and what the attack generated) to this view's, [batch, h, w, c].
      updates_statistics: whether the student's train-mode forward of this view moves the BatchNorm running statistics.
        Its own batch statistics normalise it either way.
    """

    name: str
    points: Callable[[Mapping[str, Array]], Array]
    updates_statistics: bool = True


CLEAN = View("clean", lambda known: known["clean"])
ADVERSARIAL = View("adversarial", lambda known: known["adversarial"])

# x - d, not clipped to the pixel bounds, as in the published IGDM code. Kept out of the running statistics: it is no image
# that the student will be asked about, and letting it in costs robust accuracy on digits (measured: README).
MIRRORED = View("mirrored", lambda known: 2 * known["clean"] - known["adversarial"], updates_statistics=False)
