"""Named views of a batch: the points at which student and teacher are compared.

An attack generates some views (every attack "adversarial"); the others follow from those. A view is forwarded once, whoever
asks for it, in the order in which a method declares its views.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax

Array = jax.Array
LogitsFn = Callable[[Array], Array]  # images -> logits
# "clean", "negative" where the method has negatives, and what the attack generated: name -> images [batch, h, w, c].
Known = Mapping[str, Array]
Readout = Callable[[LogitsFn, Array, Known, Array], Array]  # (network, points, known, labels) -> [batch, ...]

# Whose classes: those of the images, or of their negatives (images of another class, one for each). Entries of the batch.
LABELS = ("labels", "negative_labels")


@dataclasses.dataclass(frozen=True)
class View:
    """One named view.

    Attributes:
      name: what terms ask for.
      points: from the images known so far ("clean", "negative" and what the attack generated) to this view's,
        [batch, h, w, c].
      updates_statistics: whether the student's train-mode forward of this view moves the BatchNorm running statistics.
        Its own batch statistics normalise it either way.
      batch_norm_set: which of the student's BatchNorm sets normalises it; 0 is the one used at test.
      together: views that share this name are forwarded by the student as one batch, normalised by their common statistics.
      readout: what terms get instead of the logits, such as an input gradient: (network, points, known, labels) ->
        [batch, ...], where the network is images -> logits. Such a view never moves the running statistics.
      always: forwarded by the student even where no term reads it, for the sake of the running statistics.
      labels: which entry of the batch holds the true classes of its points, for its accuracy and its readout: "labels", or
        "negative_labels" where they follow from the negatives. Such a view makes a method one with negatives.
    """

    name: str
    points: Callable[[Known], Array]
    updates_statistics: bool = True
    batch_norm_set: int = 0
    together: str | None = None
    readout: Readout | None = None
    always: bool = False
    labels: str = "labels"


def generated(name: str, **options) -> View:
    """Returns the view of what the attack generated under this name; `options` are those of `View`."""
    return View(name, lambda known: known[name], **options)


CLEAN = generated("clean")
ADVERSARIAL = generated("adversarial")
NEGATIVE = generated("negative", labels="negative_labels")  # an image of another class for each, from the data


def displaced(name: str, along: str, scale: float, **options) -> View:
    """Returns the view x + scale * (along - x), not clipped to the pixel bounds."""
    return View(name, lambda known: known["clean"] + scale * (known[along] - known["clean"]), **options)


# x - d, not clipped to the pixel bounds, as in the published IGDM code. Kept out of the running statistics: it is no image
# that the student will be asked about, and letting it in costs robust accuracy on digits (measured: README).
MIRRORED = View("mirrored", lambda known: 2 * known["clean"] - known["adversarial"], updates_statistics=False)
