"""What is measured: the train step of a configuration, with its data, its networks and the devices.

The step is compiled from shapes alone, so that one that does not fit into memory is refused before any batch lies there.
"""

import dataclasses
import functools
import time
import types

import jax
import numpy as np

from jaxrd import data, models
from jaxrd.config import Config
from jaxrd.data.source import Source
from jaxrd.errors import InputError
from jaxrd.performance import memory
from jaxrd.training import opening, parallel, scaling, state as states, teacher_cache
from jaxrd.training.feeding import Feeder
from jaxrd.training.step import Recipe, make_train_step, shardings

_MOST_RANDOM = 50_000  # images, as many as CIFAR trains on
_MOST_RANDOM_BYTES = 200 * 2**20


@dataclasses.dataclass(frozen=True)
class Workload:
    """The train step of a configuration.

    Attributes:
      config: the configuration.
      mesh: the devices.
      source: what it trains on.
      recipe: what the step is compiled for.
      teacher_variables: on the devices; None without a teacher.
    """

    config: Config
    mesh: jax.sharding.Mesh
    source: Source
    recipe: Recipe
    teacher_variables: dict | None

    @property
    def batch_size(self) -> int:
        return self.config.training.batch_size

    @functools.cached_property
    def cached(self) -> bool:
        """Whether a batch comes with the teacher's logits on its images, as in training."""
        return teacher_cache.applies(self.recipe, self.config, self.source)

    @functools.cached_property
    def _table(self) -> np.ndarray | None:
        # Of zeros: what a step takes does not depend on them, and the teacher need not go through all images first.
        return np.zeros((len(self.source), self.source.classes), np.float32) if self.cached else None

    @property
    def description(self) -> str:
        """What to call its step in a message."""
        return f"the train step of {self.recipe.method.name} ({self.config.student}, batch {self.batch_size})"

    def shapes(self) -> tuple:
        """Returns the shapes of the step's arguments: (state, teacher's variables, batch)."""
        return scaling.abstract_arguments(
            self.recipe, self.mesh, self.teacher_variables, self.batch_size, teacher_clean=self.cached,
            pixels=self.source.images.dtype)

    def compile(self) -> tuple[jax.stages.Compiled, float]:
        """Returns the step, compiled, and the seconds that it took.

        Raises:
          InputError: it needs more memory than a device has.
        """
        began = time.perf_counter()
        compiled = memory.compile_within(
            make_train_step(self.recipe, self.mesh), self.shapes(), self.mesh.local_devices, self.description)
        return compiled, time.perf_counter() - began

    def state(self) -> states.TrainState:
        """Returns a fresh state, on the devices."""
        state = self.recipe.fresh_state(jax.random.key(self.config.seed))
        return parallel.replicate(state, self.mesh, shardings(self.recipe, self.mesh))

    def feeder(self) -> Feeder:
        """Returns its batches, to be used in a `with`."""
        return Feeder(self.source, self.mesh, seed=self.config.seed, batch_size=self.batch_size,
                      partners=self.recipe.augmentation.mixes, negatives=self.recipe.method.negatives,
                      resident=self.config.data.resident, accumulation=self.recipe.accumulation, teacher_clean=self._table)

    def batch(self) -> dict[str, jax.Array]:
        """Returns its first batch, on the devices."""
        with self.feeder() as batches:
            return next(batches)


def open_workload(
    config: Config, mesh: jax.sharding.Mesh, *, random_images: tuple[int, ...] | None = None, classes: int = 10,
    teacher_model: str | None = None,
) -> Workload:
    """Returns the workload of a configuration.

    Args:
      config: a validated configuration.
      mesh: the devices.
      random_images: (height, width, channels) of random images to take in place of the configuration's data.
      classes: of those.
      teacher_model: architecture of an untrained teacher in place of the configuration's.

    Raises:
      InputError: as training does; where the teacher is missing, with the way to do without.
    """
    training = config.training
    parallel.check_batch_size("config.training.batch_size", training.batch_size, mesh, accumulation=training.accumulation,
                              bn_groups=config.bn_groups)
    if random_images is None:
        dataset, source = opening.open_data(config)
    else:
        source = random_source(random_images, classes)
        dataset = types.SimpleNamespace(train=source)
    teacher = None
    if teacher_model:
        teacher = models.create(teacher_model, classes=source.classes, image_shape=source.image_shape)
    try:
        recipe, variables = opening.build_recipe(config, dataset, source.epoch, mesh, teacher=teacher)
    except InputError as error:
        if str(error).startswith("config.teacher") and not teacher_model:
            raise InputError(f"{error}; or time an untrained one: --teacher_model={config.student}") from None
        raise
    return Workload(config, mesh, source, recipe, variables)


def random_source(shape: tuple[int, ...], classes: int = 10) -> Source:
    """Returns random uint8 images with random labels: 50,000, or fewer where they are large.

    Raises:
      InputError: fewer than 2 classes.
    """
    if classes < 2:
        raise InputError(f"--classes={classes}; it must be at least 2, such as 10")
    count = max(min(_MOST_RANDOM, _MOST_RANDOM_BYTES // int(np.prod(shape))), 2 * classes)
    generator = np.random.default_rng(0)
    images = np.frombuffer(generator.bytes(count * int(np.prod(shape))), np.uint8).reshape(count, *shape)
    return data.from_arrays(images, generator.permutation(np.arange(count) % classes), classes=classes)
