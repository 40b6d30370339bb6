"""Data sets in host memory (`source`, `tfds_reader`) and augmentation inside the compiled step (`augment`)."""

from jaxrd.data import augment
from jaxrd.data.source import DataSet, Source, from_arrays, open_arrays, open_dataset, open_tfds

__all__ = ["DataSet", "Source", "augment", "from_arrays", "open_arrays", "open_dataset", "open_tfds"]
