"""scikit-learn's handwritten digits as a TensorFlow Datasets builder that needs neither TensorFlow nor a network."""

import pathlib
from collections.abc import Callable

import numpy as np
import tensorflow_datasets as tfds

from jaxrd.data import publication
from jaxrd.data.array_builder import VERSION, OfflineInfo, QuietBuilder
from jaxrd.data.source import stratified_order

SPLITS = {"train": 1000, "validation": 197, "test": 600}
_SPLIT_SEED = 1797


def prepare(root: pathlib.Path, say: Callable[[str], object] = lambda line: None) -> pathlib.Path:
    """Prepares the digits unless they are there; safe when several processes do so at once or one is killed half-way.

    Args:
      root: where TFDS keeps its data sets.
      say: is given what happens, line by line.

    Returns:
      The directory of the prepared data set.

    Raises:
      InputError: if `root` cannot be written.
    """
    def build(empty, kept):
        del kept
        tfds.disable_progress_bar()
        builder = JaxrdDigits(file_format="array_record", data_dir=empty)
        builder.download_and_prepare()
        return pathlib.Path(builder.data_dir), {}

    return publication.publish(JaxrdDigits.name, VERSION, root, publication.Origin("digits", VERSION), build, say)


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


class JaxrdDigits(QuietBuilder):
    """1,797 grey 8x8 images of handwritten digits: 1,000 to train, 197 to validate, 600 to test."""

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
