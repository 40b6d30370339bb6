"""Images and labels: prepared (`preparation`), opened (`opening`), in host memory (`source`), augmented (`augment`)."""

from jaxrd.data import augment
from jaxrd.data.opening import DataSet, open_arrays, open_dataset, open_split, open_test, open_tfds
from jaxrd.data.source import Mixture, Source, from_arrays, mixture

__all__ = [
    "DataSet", "Mixture", "Source", "augment", "from_arrays", "mixture", "open_arrays", "open_dataset", "open_split",
    "open_test", "open_tfds"]
