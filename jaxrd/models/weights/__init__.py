"""Weights in and out: files of PyTorch, safetensors and DeepMind's Haiku to models, and models to files.

`read` gives a model and its variables; `state_dict`, `write_torch`, `write_safetensors` and `stablehlo` give them away.
`jaxrd.training.exchange` does the same from and to run directories.
"""

from jaxrd.models.weights.reading import FORMATS, NORMALIZATIONS, Imported, read
from jaxrd.models.weights.writing import state_dict, stablehlo, write_safetensors, write_torch

__all__ = [
    "FORMATS", "NORMALIZATIONS", "Imported", "read", "stablehlo", "state_dict", "write_safetensors", "write_torch"]
