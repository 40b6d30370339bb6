"""Models by name, each behind two pure functions: `init(key)` and `apply(variables, images, train, batch_norm_set)`."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
import numbers

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxrd.errors import InputError, nearest_multiples
from jaxrd.models import architectures, published
from jaxrd.models.batch_norm_sets import add_sets, replace_statistics, select_set
from jaxrd.models.normalization import BatchLayout, normalize_images

Array = jax.Array
Variables = dict

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Model:
    """An image classifier as two pure functions, whatever library its layers come from.

    Attributes:
      name: of the architecture, whatever identifier `create` was called with.
      classes: number of logits.
      image_shape: (height, width, channels) of one image.
      init: init(key) -> variables {"params": ..., "batch_stats": ...}, all float32.
      apply: apply(variables, images, train, batch_norm_set=0, views=(True,)) -> (logits [batch, classes] float32, new
        batch_stats), for images [batch, height, width, channels] float in [0, 1]. `train` is a Python bool: True normalises by
        the batch and returns updated statistics, False normalises by the running statistics and returns them unchanged.
        `batch_norm_set` is a Python int: whose scale, bias and statistics are used, and moved; those of other sets are
        returned as they are. Raises InputError where the images have another shape or are integers, where there is no
        such set, or where `train` and `bn_groups` do not divide the batch.
        `views`, in train mode, says that the batch is several views of each example, next to each other: each view is
        normalised by its own statistics, and moves the running ones, in its turn, where it says True: what a forward for each,
        one after another, comes to.
      specification: the arguments of `create` as JSON can hold them: `create(**specification)` is this model again.
      batch_norm_sets: number of sets of BatchNorm parameters and statistics.
      joint_views: whether `apply` takes `views`; without, each has a forward of its own.
    """

    name: str
    classes: int
    image_shape: tuple[int, int, int]
    init: Callable[[Array], Variables]
    apply: Callable[..., tuple[Array, Variables]]
    specification: dict = dataclasses.field(compare=False)
    batch_norm_sets: int = 1
    joint_views: bool = False


def create(
        name: str,
        *,
        classes: int,
        image_shape: Sequence[int] = (32, 32, 3),
        dtype: str = "float32",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        batch_norm_sets: int = 1,
        bn_groups: int | None = None,
) -> Model:
    """Returns the model of that name.

    Names: "resnet18", "resnet34" and "resnet50" (He et al. 2016, the CIFAR layout); "resnet{depth}_w{width}", the same
    with `width` instead of 64 channels in the first stage, and also with depth 6, 8 or 10: one block in each of 2, 3 or
    4 stages; "preact_resnet18" (He et al. 2016, "Identity Mappings", as in the code of Rice et al. 2020 and IGDM) and
    "preact_resnet18_raw" (as in that of Wong et al. 2020: no BatchNorm before the pool, shortcuts from the raw input);
    "mobilenet_v2" (Sandler et al. 2018, the CIFAR layout of the distillation papers); "wrn{depth}_{width}" (Zagoruyko and
    Komodakis 2016, as in TRADES), depth 6n + 4; "dm_wrn{depth}_{width}" and "dm_preact_resnet18", those of DeepMind (Gowal et
    al. 2020) with SiLU; "_w{width}" after any of the 18 layers deep sets the channels of the first stage. These take any
    image size ("dm_preact_resnet18" from 8x8 on): the last layer pools over all of it.

    An identifier of RobustBench in `jaxrd.models.published`, such as "Wang2023Better_WRN-28-10" or, where that is not one
    model alone, "cifar100/Linf/Wang2023Better_WRN-28-10", stands for its architecture and, unless they are given, its mean
    and std, on the images that it is published for.

    Args:
      name: as above.
      classes: number of logits, at least 2.
      image_shape: (height, width, channels).
      dtype: "float32" or "bfloat16": what the layers before the pool compute in. Parameters, statistics, pool, linear
        layer and logits are float32 either way.
      mean: per channel, subtracted from the images inside the model; None with `std` None: images stay in [0, 1].
      std: per channel, above 0; the images are divided by it.
      batch_norm_sets: with more than 1, every BatchNorm layer has that many sets of scale, bias and running statistics,
        equal at first, and `apply` says which one it uses. Set k > 0 lies under "batch_norm_k" of "params" and of
        "batch_stats", set 0 where it lies without the others; all other weights are shared.
      bn_groups: how many groups of the batch of one forward each BatchNorm normalises by their own statistics in train mode:
        group g of a batch of n is its rows g n / bn_groups to (g + 1) n / bn_groups, and the running statistics move by the
        mean of the groups' (ghost BatchNorm, Hoffer et al. 2017; per-replica BatchNorm, with a group for each replica). What
        comes out does not depend on how many devices share the batch. None or 1: the whole batch. Eval mode does not read it,
        and the variables are the same with any.

    Raises:
      InputError: an unknown name, or an argument outside those ranges.

    Example:
      >>> model = create("resnet6_w8", classes=10, image_shape=(8, 8, 1))
      >>> variables = model.init(jax.random.key(0))
      >>> logits, _ = model.apply(variables, jnp.zeros([4, 8, 8, 1]), False)
      >>> logits.shape
      (4, 10)
    """
    if not (isinstance(classes, numbers.Integral) and classes >= 2):
        raise InputError(f"model classes is {classes!r}; it must be a whole number of at least 2, such as 10")
    image_shape = tuple(image_shape)
    if len(image_shape) != 3 or not all(isinstance(size, numbers.Integral) and size > 0 for size in image_shape):
        raise InputError(f"model image_shape is {image_shape}; give (height, width, channels), such as (32, 32, 3)")
    if dtype not in _DTYPES:
        raise InputError(f'model dtype is {dtype!r}; use "float32" or "bfloat16"')
    name, mean, std = _resolved(name, classes, image_shape, mean, std)
    mean, std = _checked_statistics(mean, std, channels=image_shape[2])
    if not (isinstance(batch_norm_sets, numbers.Integral) and batch_norm_sets >= 1):
        raise InputError(f"model batch_norm_sets is {batch_norm_sets!r}; it must be a whole number of at least 1")
    if not (bn_groups is None or isinstance(bn_groups, numbers.Integral) and bn_groups >= 1):
        raise InputError(
            f"model bn_groups is {bn_groups!r}; it must be a whole number of at least 1, or None for the whole batch")
    return _create(
        name, int(classes), tuple(map(int, image_shape)), dtype, mean, std, int(batch_norm_sets), int(bn_groups or 1),
        False)


# Cached, so that two equal models are one static argument, and what was compiled for the first serves the second.
@functools.lru_cache(maxsize=None)
def _create(name, classes, image_shape, dtype, mean, std, sets, bn_groups, checkpointing) -> Model:
    module = architectures.module(name, classes, _DTYPES[dtype], checkpointing)
    if min(image_shape[:2]) < (smallest := getattr(module, "smallest_side", 1)):
        raise InputError(
            f'model image_shape is {image_shape}, of which "{name}" would leave nothing; give sides of at least {smallest}, or '
            "another model")

    # Compiled, because only then is the forward pass that discovers the parameter shapes not computed.
    @jax.jit
    def init(key):
        return add_sets(dict(module.init(key, jnp.zeros((1, *image_shape)), train=False)), sets)

    def apply(variables, images, train, batch_norm_set=0, views=(True,)):
        _check_images(images, name, image_shape)
        batch_norm_set = _checked_set(batch_norm_set, name, sets)
        images = normalize_images(images, mean, std)
        batch_stats = variables["batch_stats"]
        variables = select_set(variables, batch_norm_set, sets)
        if not train:
            return module.apply(variables, images, train=False), batch_stats
        _check_groups(images, name, bn_groups, len(views))
        layout = BatchLayout(bn_groups, tuple(views))
        # A batch of one part takes Flax's own layer.
        logits, updated = module.apply(
            variables, images, train=layout if layout != BatchLayout() else True, mutable=["batch_stats"])
        return logits, replace_statistics(batch_stats, batch_norm_set, updated["batch_stats"])

    specification = {
        "name": name, "classes": classes, "image_shape": image_shape, "dtype": dtype, "mean": mean, "std": std,
        "batch_norm_sets": sets, "bn_groups": bn_groups if bn_groups > 1 else None}
    return Model(name, classes, image_shape, init, apply, specification, sets, joint_views=True)


def variant(model: Model, *, dtype: str | None = None, gradient_checkpointing: bool = False) -> Model:
    """Returns a model of the same function and the same variables, computed otherwise.

    Args:
      model: one that `create` made; one of one's own counts as float32, and can be had as it is only.
      dtype: "float32" or "bfloat16", see `create`; None for the model's own.
      gradient_checkpointing: keep for the backward pass only what enters each residual block, and compute the rest again there
        (Chen et al. 2016). It is no part of the specification: a model that is restored keeps everything.

    Raises:
      InputError: another dtype than those; a model of one's own, which has to be made so by its maker.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise InputError(f'model dtype is {dtype!r}; use "float32" or "bfloat16"')
    own = model.specification
    if dtype in (None, own.get("dtype", "float32")) and not gradient_checkpointing:
        return model
    if "dtype" not in own:
        raise InputError(
            f'model "{model.name}" was not made by models.create, so neither its dtype nor what it keeps for the backward pass '
            "can be chosen here; make it as it is to be, and leave both at their defaults")
    return _create(own["name"], own["classes"], own["image_shape"], dtype or own["dtype"], own["mean"], own["std"],
                   own["batch_norm_sets"], own["bn_groups"] or 1, gradient_checkpointing)


def logits_fn(model: Model, variables: Variables) -> Partial:
    """Returns the function images -> logits of a model in eval mode: what attacks and alignment tools take.

    A pytree with the variables as leaves: as an argument of compiled code, one compilation serves all variables of a model.
    """
    return Partial(_evaluation(model), variables)


@functools.lru_cache(maxsize=None)
def _evaluation(model: Model) -> Callable[[Variables, Array], Array]:
    return lambda variables, images: model.apply(variables, images, False)[0]


def parameter_count(variables: Variables) -> int:
    """Returns the number of trained parameters, without BatchNorm's running statistics.

    Args:
      variables: what `init` returns, or its shapes from `jax.eval_shape`.
    """
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))


def restore(workdir: str, step: str | int = "last") -> tuple[Model, Variables]:
    """Returns the model of a run directory, or of an imported teacher, and its variables.

    Args:
      workdir: a directory that training or a weight import has written.
      step: "last", "best" (by robust accuracy) or a step number.
    """
    from jaxrd.training import checkpoint  # Here, because training imports models.

    return checkpoint.restore_model(workdir, step)[:2]


def _resolved(name: str, classes: int, image_shape: tuple, mean, std):
    """Returns the architecture, mean and std that a published identifier stands for; those of other names are as given."""
    if architectures.is_architecture(name) or (entry := published.find(str(name), classes=classes)) is None:
        return name, mean, std  # where it is neither, `_create` says so
    if image_shape != (32, 32, 3):
        raise InputError(
            f'model "{entry.identifier}" is published for images (32, 32, 3), not {image_shape}; for others name its '
            f'architecture, "{entry.model}"')
    return (entry.model, entry.mean, entry.std) if mean is None and std is None else (entry.model, mean, std)


def _checked_statistics(mean, std, channels: int):
    """Returns mean and std as tuples of floats, or both None; raises InputError where they do not fit the channels."""
    if mean is None and std is None:
        return None, None
    if mean is None or std is None:
        raise InputError(f"model mean is {mean} and std is {std}; give both, or neither to leave images in [0, 1]")
    mean, std = tuple(float(value) for value in mean), tuple(float(value) for value in std)
    if not len(mean) == len(std) == channels:
        raise InputError(f"model mean {mean} and std {std} must have one value per channel of the images: {channels}")
    if not all(0 <= value <= 1 for value in mean):
        raise InputError(f"model mean is {mean}; give it in units of [0, 1], for instance 125.3 / 255 instead of 125.3")
    if not all(0 < value <= 1 for value in std):
        raise InputError(f"model std is {std}; it must be above 0 and in units of [0, 1], for instance 63 / 255")
    return mean, std


def _check_images(images: Array, name: str, image_shape: tuple[int, int, int]) -> None:
    """Raises InputError where a batch has the wrong shape or holds integers; it reads no values: free under jit."""
    if images.ndim != 4 or images.shape[1:] != image_shape:
        expected = ", ".join(map(str, image_shape))
        raise InputError(
            f'images have shape {list(images.shape)}, but model "{name}" takes [batch, {expected}]; '
            "resize them, or create the model with their image_shape")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(f"images are {images.dtype}; give float32 in [0, 1], such as images / 255")


def _check_groups(images: Array, name: str, bn_groups: int, views: int) -> None:
    """Raises InputError where a batch cannot be cut into equal groups of examples with their views."""
    if len(images) % (bn_groups * views):
        raise InputError(
            f'a batch of {len(images)} images cannot be cut into {bn_groups} equal groups'
            + (f" of {views} views" if views > 1 else "") + f', the bn_groups of model "{name}" in '
            f"train mode; give {nearest_multiples(len(images), bn_groups * views)} images, or create the model with other "
            "bn_groups")


def _checked_set(batch_norm_set: int, name: str, sets: int) -> int:
    """Returns batch_norm_set; raises InputError where the model has no such set."""
    if isinstance(batch_norm_set, numbers.Integral) and 0 <= batch_norm_set < sets:
        return int(batch_norm_set)
    has = "only set 0" if sets == 1 else f"sets 0 to {sets - 1}"
    raise InputError(
        f'batch_norm_set is {batch_norm_set!r}, but model "{name}" has {has}; '
        "give one of these, or create the model with more batch_norm_sets")
