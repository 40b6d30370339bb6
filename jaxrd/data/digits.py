"""scikit-learn's handwritten digits as a TensorFlow Datasets builder that needs neither TensorFlow nor a network."""

import contextlib
import io
import pathlib

import numpy as np
import tensorflow_datasets as tfds

from jaxrd.data.source import stratified_order
from jaxrd.errors import InputError

SPLITS = {"train": 1000, "validation": 197, "test": 600}
_SPLIT_SEED = 1797


def prepare(root: pathlib.Path) -> pathlib.Path:
    """Prepares the digits unless they are there; safe when several processes do so at once or one is killed half-way.

    Args:
      root: where TFDS keeps its data sets.

    Returns:
      The directory of the prepared data set.

    Raises:
      InputError: if `root` cannot be written.
    """
    path = root / JaxrdDigits.name / str(JaxrdDigits.VERSION)
    if path.exists():
        return path
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            JaxrdDigits(file_format="array_record", data_dir=root).download_and_prepare()
    except OSError as error:
        # TFDS writes to a directory of its own and renames it at the end, which fails where another process was first.
        if not path.exists():
            reason = " ".join(str(error).split())
            raise InputError(f"{path}: the digits cannot be prepared ({reason}): pass another directory") from error
    return path


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Reads the 1,797 digits bundled with scikit-learn.

    Returns:
      images: [1797, 8, 8, 1] uint8, round(value * 255 / 16) of the original 17 grey levels.
      labels: [1797] int64, in [0, 10).
    """
    from sklearn import datasets

    digits = datasets.load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return images[..., np.newaxis], digits.target


def split_indices(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Divides the digits into train, validation and test, the same for everyone and stratified by class.

    Args:
      labels: [1797] int, in [0, 10), in scikit-learn's order.

    Returns:
      split name -> sorted positions; the three are disjoint and cover every digit.
    """
    # RandomState rather than default_rng: NumPy promises that its stream never changes.
    shuffled = np.random.RandomState(_SPLIT_SEED).permutation(len(labels))
    order = stratified_order(labels, shuffled)
    ends = np.cumsum(list(SPLITS.values()))
    return {name: np.sort(part) for name, part in zip(SPLITS, np.split(order, ends[:-1]), strict=True)}


class OfflineInfo(tfds.core.DatasetInfo):
    """TFDS's `DatasetInfo` without the look into a public bucket that every builder makes before it is prepared."""

    def initialize_from_bucket(self) -> None:
        """Does nothing."""


class JaxrdDigits(tfds.core.GeneratorBasedBuilder):
    """1,797 grey 8x8 images of handwritten digits: 1,000 to train, 197 to validate, 600 to test."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}

    def _info(self) -> tfds.core.DatasetInfo:
        return OfflineInfo(
            builder=self,
            description="The digits bundled with scikit-learn (test part of UCI's optical recognition set).",
            # A Tensor rather than an Image: TFDS encodes PNG with TensorFlow.
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html",
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        images, labels = load_digits()
        parts = split_indices(labels)
        return {name: self._generate_examples(images, labels, part) for name, part in parts.items()}

    def _generate_examples(self, images, labels, indices):
        for index in indices:
            yield int(index), {"image": images[index], "label": int(labels[index])}
