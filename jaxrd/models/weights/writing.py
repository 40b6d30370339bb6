"""Models to the files of others: a PyTorch state_dict, safetensors, and a StableHLO program. PyTorch is not needed."""

import json
import os

import jax
import jax.export  # not part of `import jax`
import jax.numpy as jnp

import jaxrd
from jaxrd.errors import InputError
from jaxrd.models.batch_norm_sets import select_set
from jaxrd.models.weights import layouts, safetensors_file, torch_file
from jaxrd.models.weights.reading import SPECIFICATION
from jaxrd.models.zoo import Model

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def state_dict(
        model: Model, variables: dict, *, batch_norm_set: int = 0, counters: dict[str, int] | None = None,
        sub_block1: bool = False) -> dict:
    """Returns {key: NumPy array} as the public PyTorch class of the architecture names, shapes and orders them.

    The class normalises its images by the model's mean and std, which are not in it, or not at all where the model has none.

    Args:
      model: the model.
      variables: its variables.
      batch_norm_set: whose scale, bias and statistics are taken; the class has one set.
      counters: BatchNorm's num_batches_tracked by key; 0 without.
      sub_block1: for a wide ResNet of TRADES, also the entries of that name that some of its classes register and never call,
        with the values of block1.

    Raises:
      InputError: `sub_block1` of another network.
    """
    layout = layouts.entries(model.name, model.classes, model.image_shape[2])
    state = layouts.to_torch(select_set(variables, batch_norm_set, model.batch_norm_sets), layout, counters)
    if not sub_block1:
        return state
    if not any(key.startswith("block1.") for key in state):
        raise InputError(f"sub_block1 is a part of some classes of wide ResNets of TRADES, not of {model.name}; leave it out")
    dead = {f"sub_{key}": value for key, value in state.items() if key.startswith("block1.")}
    before = {key: value for key, value in state.items() if key.partition(".")[0] in ("conv1", "block1")}
    return before | dead | state


def write_torch(path: str | os.PathLike, state: dict) -> None:
    """Writes a state_dict that `torch.load(path, weights_only=True)` reads, in float32."""
    torch_file.write(os.fspath(path), state)


def write_safetensors(path: str | os.PathLike, state: dict, model: Model) -> None:
    """Writes a state_dict as safetensors; its metadata hold the model's specification, so that `reading.read` needs no name."""
    names = ("name", "classes", "image_shape", "mean", "std")
    specification = {name: model.specification[name] for name in names}
    metadata = {"format": "pt", "jaxrd": jaxrd.__version__, SPECIFICATION: json.dumps(specification)}
    safetensors_file.write(os.fspath(path), state, metadata)


def stablehlo(model: Model, variables: dict, *, batch_norm_set: int = 0) -> bytes:
    """Returns a serialised `jax.export.Exported`: images [batch, height, width, channels] float32 in [0, 1] -> logits.

    Eval mode, weights and normalisation inside, any batch size, compiled where it is called, on CPU, CUDA, ROCm or TPU.
    `jax.export.deserialize(bytearray(data)).call(images)` runs it, without jaxrd.
    """
    @jax.jit
    @jax.default_matmul_precision("highest")
    def logits(images):
        return model.apply(variables, images, False, batch_norm_set)[0]

    batch, = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *model.image_shape), jnp.float32)
    return jax.export.export(logits, platforms=PLATFORMS)(images).serialize()
