"""Data sets in host memory (`source`, `tfds_reader`) and augmentation inside the compiled step (`augment`)."""

from jaxrd.data import augment
from jaxrd.data.source import (
    DataSet, Mixture, Source, from_arrays, mixture, open_arrays, open_dataset, open_split, open_test, open_tfds)

__all__ = [
    "DataSet", "Mixture", "Source", "augment", "from_arrays", "mixture", "open_arrays", "open_dataset", "open_split",
    "open_test", "open_tfds"]
