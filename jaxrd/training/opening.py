"""What a configuration names, opened: its data, its teacher, its student, and what the step is compiled for.

A run that has begun is held to what it began with: the same images, the same teacher.
"""

import contextlib
import dataclasses
import pathlib

import jax

from jaxrd import data, models
from jaxrd.config import Config
from jaxrd.data.opening import DataSet
from jaxrd.distillation import InnerMaximisation
from jaxrd.errors import InputError
from jaxrd.training import checkpoint, parallel, schedule, teacher_cache
from jaxrd.training.checks import check_teacher, check_teacher_gradient
from jaxrd.training.recipe import Recipe
from jaxrd.training.snapshots import Snapshots


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run is made of.

    Attributes:
      config: its configuration.
      dataset: its data set; `dataset.validation` chooses the best checkpoint.
      source: what it trains on.
      recipe: what its step is compiled for.
      teacher_variables: on the devices; None without a teacher.
      teacher_step: which checkpoint of the teacher it distils; None without a teacher.
      teacher_file: the fingerprint of the teacher's file, where that was imported.
      images: fingerprints of the images to train and to validate on.
    """

    config: Config
    dataset: DataSet
    source: data.Source
    recipe: Recipe
    teacher_variables: dict | None
    teacher_step: int | None
    teacher_file: str | None
    images: list[str]

    @property
    def cached(self) -> bool:
        """Whether the teacher's logits on the images of a batch come from a table."""
        return teacher_cache.applies(self.recipe, self.config, self.source)


def open_run(config: Config, workdir: pathlib.Path, mesh: jax.sharding.Mesh) -> Run:
    """Returns what the run of a configuration in a directory is made of; where it has begun there, what it began with.

    Raises:
      InputError: something is missing, does not fit, or is not what the run began with.
    """
    dataset, source = open_data(config)
    teacher_step, teacher_file = _teacher_of(config, workdir)
    images = _images_of(dataset, source, config, workdir)
    recipe, teacher_variables = build_recipe(config, dataset, source.epoch, mesh, teacher_step=teacher_step)
    with _naming("config.data"):
        recipe.augmentation.check_image(source.image_shape)
        if recipe.method.negatives:
            source.negatives(config.seed, 0, config.training.batch_size)  # refuses data of one class
    return Run(config, dataset, source, recipe, teacher_variables, teacher_step, teacher_file, images)


def open_data(config: Config) -> tuple[DataSet, data.Source]:
    """Returns the data set of a configuration and the source that it trains on: `open_own_data` and its further images."""
    dataset, train_source = open_own_data(config)
    section = config.data
    if section.extra:
        with _naming("config.data.extra"):
            extra = data.open_split(
                section.extra, section.extra_split, classes=train_source.classes, directory=section.directory or None)
            train_source = data.mixture(train_source, extra, section.extra_fraction)
            train_source.indices(config.seed, 0, config.training.batch_size)  # refuses a fraction that rounds to none or all
    return dataset, train_source


def open_own_data(config: Config) -> tuple[DataSet, data.Source]:
    """Returns the data set of a configuration and what it trains on of it: all of the training split, or a draw."""
    section = config.data
    with _naming("config.data"):
        dataset = data.open_dataset(
            section.name, arrays=section.arrays, directory=section.directory or None,
            validation_fraction=section.validation_fraction, selection=section.selection)
        train_source = dataset.train
        if section.examples is not None:
            train_source = train_source.subset(section.examples, config.seed)
    return dataset, train_source


def build_recipe(
    config: Config, dataset: DataSet, train_examples: int, mesh, *, teacher: models.Model | None = None,
    teacher_step: int | str = "last",
) -> tuple[Recipe, dict | None]:
    """Returns what the step is compiled for, and the teacher's variables on the devices (None without a teacher).

    Args:
      config: the run's configuration.
      dataset: what it trains on: classes and image shape.
      train_examples: how many images an epoch has.
      mesh: the devices.
      teacher: an untrained teacher, for timing, in place of the one in `config.teacher`.
      teacher_step: which checkpoint of the one in `config.teacher`.
    """
    classes, image_shape = dataset.train.classes, dataset.train.image_shape
    method, variables = config.build_method(), None
    student = models.create(
        config.student, classes=classes, image_shape=image_shape, dtype=config.dtype, batch_norm_sets=method.batch_norm_sets,
        # Of one forward, which is that of a micro-batch.
        bn_groups=config.bn_groups and config.bn_groups // config.training.accumulation)
    if method.needs_teacher:
        if teacher:
            variables = teacher.init(jax.random.key(0))
        else:
            with _naming("config.teacher"):
                teacher, variables, _ = checkpoint.restore_model(config.teacher, teacher_step)
        with _naming("config.teacher_dtype"):
            teacher = models.variant(teacher, dtype=config.teacher_dtype)
        check_teacher(config.teacher, teacher, student)
        if method.needs_teacher_gradient:
            check_teacher_gradient(config.teacher, teacher, variables, dataset.train.images[:16], method)
        variables = parallel.replicate(variables, mesh)
    steps = config.steps(train_examples)
    return Recipe(
        method=method, student=student, teacher=teacher if method.needs_teacher else None,
        inner=InnerMaximisation(
            config.threat.build(), config.attack.step_size, config.attack.steps, config.attack.start or None,
            config.attack.project_start),
        optimizer=schedule.optimizer(
            config.optimizer, steps, batch_size=config.training.batch_size, epoch=train_examples),
        steps=steps,
        augmentation=config.build_augmentation(),
        weight_average=config.training.weight_average, snapshots=Snapshots.of(config, train_examples),
        label_smoothing=config.training.label_smoothing,
        attack_batch_statistics=config.attack.batch_statistics,
        accumulation=config.training.accumulation, joint_views=config.training.joint_views,
        attack_dtype=config.attack.dtype, gradient_checkpointing=config.training.gradient_checkpointing,
        shard_state=config.training.shard_state,
    ), variables


def _teacher_of(config: Config, workdir: pathlib.Path) -> tuple[int | None, str | None]:
    """Returns the teacher's step that this run distils, and the fingerprint of its file where it was imported.

    They are its newest when the run began, and those ever after: a teacher that went on training in between, or another one in
    its place, would otherwise change under a resumed run.
    """
    if not config.build_method().needs_teacher:
        return None, None
    with _naming("config.teacher"):
        there = checkpoint.steps_of(config.teacher)
        file = checkpoint.file_of(checkpoint.newest_metadata(config.teacher))
    if not checkpoint.has_checkpoints(workdir):
        return there[-1], file
    began = checkpoint.newest_metadata(workdir)
    began_with = began.get("teacher_step", there[-1])
    if "teacher_file" in began and began["teacher_file"] != file:
        raise InputError(
            f"{workdir} was begun with another teacher in {config.teacher}, of other imported weights; choose another "
            "--workdir, or import those again")
    if began_with not in there:
        raise InputError(
            f"{workdir} was begun with step {began_with} of its teacher {config.teacher}, which now holds "
            f"{', '.join(map(str, there))}; choose another --workdir, or bring that checkpoint back")
    return began_with, file


def _images_of(dataset: DataSet, source: data.Source, config: Config, workdir: pathlib.Path) -> list[str]:
    """Returns the fingerprints of the images to train and to validate on; InputError where the run was begun on others."""
    images = [source.fingerprint, *([dataset.validation.fingerprint] if dataset.validation is not None else [])]
    if checkpoint.has_checkpoints(workdir):
        began_with = checkpoint.newest_metadata(workdir).get("images", images)
        if began_with != images:
            raise InputError(
                f"{workdir} was begun with other images than are now in {config.data.arrays or config.data.name}"
                + (f" and {config.data.extra}" if config.data.extra else "")
                + "; choose another --workdir, or bring those back")
    return images


@contextlib.contextmanager
def _naming(field: str):
    """Begins the message of an InputError with the field that it is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{field}: {error}") from None
