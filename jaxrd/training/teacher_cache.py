"""The teacher's logits on the training images, computed once: where an image is the same in every epoch, so are they."""

import jax
import numpy as np
from jax.tree_util import Partial

from jaxrd.config import Config
from jaxrd.data.augment import to_float
from jaxrd.data.source import Source
from jaxrd.errors import InputError
from jaxrd.evaluation import robustness, shares
from jaxrd.training import processes
from jaxrd.training.recipe import Recipe

LEAST_EPOCHS = 2  # from which it is done unasked: in the first the table costs what it saves


def applies(recipe: Recipe, config: Config, source: Source) -> bool:
    """Returns whether the run takes T(x) from a table: where that saves forwards of the teacher, and it is not told otherwise.

    Raises:
      InputError: it is told to, and the images change from epoch to epoch.
    """
    asked = config.training.cache_teacher
    if not recipe.augmentation.is_identity:
        if asked:
            raise InputError(
                "config.training.cache_teacher is True, but augmented images, and the teacher's logits on them, are others in "
                "every epoch; leave it at None, or set data.shift=0, data.flip=false, data.cutout=0 and data.mixing=none")
        return False
    epochs = recipe.steps * config.training.batch_size / len(source)
    unasked = asked is None and epochs >= LEAST_EPOCHS and not config.data.extra  # which may be too many to go through first
    return recipe.reads_teacher_on_clean and bool(asked or unasked)


def clean_logits(
    recipe: Recipe, teacher_variables: dict, source: Source, mesh: jax.sharding.Mesh, batch_size: int,
) -> np.ndarray:
    """Returns the teacher's logits on every image of a source, float32 [n, classes].

    Of several processes all make this call; each computes its share.

    Args:
      recipe: one with a teacher.
      teacher_variables: on the devices.
      source: the training images.
      mesh: the devices of the run.
      batch_size: images that are forwarded at once, at most.
    """
    with processes.together():
        mesh = shares.local_mesh(mesh)
    teacher = robustness.on_mesh(recipe.teacher, teacher_variables, mesh)
    return shares.per_example(Partial(_logits, teacher), np.asarray(source.images), batch_size=batch_size, mesh=mesh)


def _logits(teacher, images):
    return teacher(to_float(images))
