"""TFDS builders that write arrays of images in the order they have, without TensorFlow and without a network."""

import dataclasses
import errno
import hashlib
import itertools
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer, file_adapters

VERSION = "1.0.0"
CHUNK = 500
_SHARD = 2**27  # bytes of images in a record file, about


@dataclasses.dataclass(frozen=True)
class Split:
    """The images of one split, wherever they come from.

    Attributes:
      examples: how many.
      chunks: returns them in order, as (images [k, height, width, channel], labels [k]); may be called more than once.
    """

    examples: int
    chunks: Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]


def split_of(images: np.ndarray, labels: np.ndarray) -> Split:
    """Makes a split of images [n, height, width, channel] and labels [n]."""
    def chunks():
        for start in range(0, len(images), CHUNK):
            yield images[start:start + CHUNK], labels[start:start + CHUNK]

    return Split(len(images), chunks)


def digests(split: Split) -> dict[str, str]:
    """Returns the SHA-256 of the images' and of the labels' bytes: C order, labels as little-endian int64."""
    return digest_and(split, lambda images: None)


def digest_and(split: Split, also: Callable[[np.ndarray], object]) -> dict[str, str]:
    """Returns the same as `digests`, and shows each chunk of images to `also` on the way."""
    of_images, of_labels = hashlib.sha256(), hashlib.sha256()
    for images, labels in split.chunks():
        of_images.update(np.ascontiguousarray(images).data)
        of_labels.update(np.ascontiguousarray(labels, "<i8").data)
        also(images)
    return {"images": of_images.hexdigest(), "labels": of_labels.hexdigest()}


class OfflineInfo(tfds.core.DatasetInfo):
    """TFDS's `DatasetInfo` without the look into a public bucket that every builder makes before it is prepared."""

    def initialize_from_bucket(self) -> None:
        """Does nothing."""


class QuietBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A builder that prints nothing, so that several may work in threads of one process."""

    VERSION = tfds.core.Version(VERSION)
    RELEASE_NOTES = {str(VERSION): "Initial release."}

    def _log_download_bytes(self) -> None:
        pass

    def _log_download_done(self) -> None:
        pass


class ArrayBuilder(QuietBuilder, skip_registration=True):
    """Writes splits of images under a name that is chosen when the builder is made.

    Args:
      name: of the data set.
      image_shape: (height, width, channel).
      dtype: of the images.
      labels: names of the classes, or how many there are.
      description: of the data set.
      **options: data_dir and file_format, as for every builder.
    """

    def __init__(
        self, name: str, image_shape: Sequence[int], dtype, labels: Sequence[str] | int, description: str = "", **options
    ):
        self.name = name
        self._image_shape, self._dtype, self._labels = tuple(image_shape), np.dtype(dtype), labels
        self._description, self._splits = description, {}
        super().__init__(**options)

    def write(self, splits: dict[str, Split], count: Callable[[int], object]) -> pathlib.Path:
        """Writes the data set and returns its directory; `count` is told about every image."""
        self._splits, self._count = splits, count
        tfds.disable_progress_bar()
        self.download_and_prepare()
        return pathlib.Path(self.data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        label = {"num_classes": self._labels} if isinstance(self._labels, int) else {"names": self._labels}
        # A Tensor rather than an Image: TFDS encodes PNG with TensorFlow. As bytes: as integers they take twelve times as long.
        image = tfds.features.Tensor(shape=self._image_shape, dtype=self._dtype, encoding="bytes")
        return OfflineInfo(
            builder=self,
            description=self._description,
            features=tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(**label)}),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _download_and_prepare(self, dl_manager, download_config) -> None:
        """Writes the records as they come: TFDS's own way collects them first, and needs TensorFlow beyond 1,000 MB of them."""
        del dl_manager, download_config
        self.info.set_splits(tfds.core.splits.SplitDict([self._written(*split) for split in self._splits.items()]))

    def _written(self, name: str, split: Split) -> tfds.core.splits.SplitInfo:
        template = self._get_filename_template(split_name=name)
        examples, size = self._examples(split), split.examples * math.prod(self._image_shape) * self._dtype.itemsize
        lengths = [len(part) for part in np.array_split(np.arange(split.examples), 1 + size // _SHARD)]
        paths = [template.sharded_filepath(shard_index=index, num_shards=len(lengths)) for index in range(len(lengths))]
        adapter = file_adapters.ADAPTER_FOR_FORMAT[self.info.file_format]
        for path, length in zip(paths, lengths):
            try:
                adapter.write_examples(path, itertools.islice(examples, length))
            except RuntimeError as error:  # "write() failed: No space left on device; writing ..."
                raise OSError(errno.EIO, str(error).partition(";")[0]) from error
        # Also lets it come to its end: `islice` stops after the last example, before that chunk is counted.
        if next(examples, None) is not None:
            raise ValueError(f"{name} has more than {split.examples} examples")
        written = sum(path.stat().length for path in paths)
        return tfds.core.splits.SplitInfo(name=name, shard_lengths=lengths, num_bytes=written, filename_template=template)

    def _examples(self, split: Split) -> Iterator[tuple[int, bytes]]:
        serializer = example_serializer.ExampleSerializer(self.info.features.get_serialized_info())
        key = 0
        for images, labels in split.chunks():
            for image, label in zip(images, labels, strict=True):
                example = self.info.features.encode_example({"image": image, "label": int(label)})
                yield key, serializer.serialize_example(example)
                key += 1
            self._count(len(images))

    def _split_generators(self, dl_manager):
        raise NotImplementedError  # `_download_and_prepare` does without

    def _generate_examples(self):
        raise NotImplementedError
