"""How a run scales on paper: what a step computes and what its devices tell each other, set against what devices can do.

Nothing is run. The figures of a step are those of its program; speed of devices and links is the caller's assumption. The model
is the usual one for data parallelism: every device computes its share of the batch, and the gradient is added up over all of
them, each sending and receiving 2 (n - 1) / n of its bytes in 2 log2(n) hops, which can go on while the backward pass does.
BatchNorm's statistics are a few numbers, but the layers wait for them: their hops are added, not hidden.
"""

import dataclasses
import math

import jax
import numpy as np

from jaxrd import models
from jaxrd.errors import InputError
from jaxrd.performance import counting
from jaxrd.training import parallel
from jaxrd.training.collectives import collectives
from jaxrd.training.recipe import Recipe, joint_forwards
from jaxrd.training.step import make_train_step, shardings

BACKWARD_SHARE = 2 / 3  # of a forward and backward pass; in the last of them the gradient travels


@dataclasses.dataclass(frozen=True)
class StepCost:
    """What one step takes, whatever it runs on.

    Attributes:
      flops: floating-point operations for one example, attack and teacher included, as XLA counts those of the program.
      last_flops: of those, the forward and backward pass of all views that gives the gradient.
      gradient_bytes: what is added up over the devices: a float32 for each of the student's parameters.
      state_bytes: parameters, statistics, optimiser's state and weight average: a checkpoint, and what each device holds.
      image_bytes: of one example, with its label, on its way to a device.
      exchanges: how often the layers of a step wait for statistics of the whole batch: for the mean and the variance of each
        BatchNorm, and for their gradients together; 0 where its groups lie within devices (`bn_groups`).
    """

    flops: float
    last_flops: float
    gradient_bytes: int
    state_bytes: int
    image_bytes: int
    exchanges: int = 0


def step_cost(
    recipe: Recipe, mesh: jax.sharding.Mesh, teacher_variables: dict | None, batch: int = 8, *, pixels=np.uint8,
) -> StepCost:
    """Returns the cost of a step from its program, which is traced and neither compiled nor run.

    Args:
      recipe: the run's, without accumulation.
      mesh: any devices, whose number divides `batch`.
      teacher_variables: the teacher's, or their shapes; None without a teacher.
      batch: examples of the program; what it takes for each hardly depends on it.
      pixels: dtype of the images as they come, see `abstract_arguments`.

    Raises:
      InputError: on a backend that does not count operations.
    """
    state = recipe.state_shapes
    rows = batch_shapes(recipe, (batch,), pixels=pixels)

    def last(variables, images):
        return recipe.student.apply(variables, images, True)[0].sum()

    variables = {"params": state.params, "batch_stats": state.batch_stats}
    images = jax.ShapeDtypeStruct((batch, *recipe.student.image_shape), np.float32)
    whole, gradient = (
        counting.operations(make_train_step(recipe, mesh), state, teacher_variables, rows),
        counting.operations(jax.grad(last, allow_int=True), variables, images))
    if whole is None or gradient is None:
        raise InputError(f"operations are not counted on {jax.default_backend()}; add --cpu_devices=1")
    flops, last_flops = whole.total, sum(len(forward) for forward in recipe.method.student_forwards) * gradient.total
    # Views that are not forwarded together wait for their own.
    forwards = len(joint_forwards(recipe))
    layers = len(jax.tree.leaves(state.batch_stats)) // 2 // recipe.student.batch_norm_sets
    held = (state.params, state.batch_stats, state.opt_state, state.average)
    return StepCost(
        flops / batch, last_flops / batch, 4 * models.parameter_count({"params": state.params}),
        sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(held)),
        sum(math.prod(leaf.shape[1:]) * leaf.dtype.itemsize for leaf in rows.values()),
        0 if recipe.student.specification.get("bn_groups") else 3 * layers * forwards)


@dataclasses.dataclass(frozen=True)
class OnPaper:
    """A number of devices, on paper.

    Attributes:
      devices: how many.
      batch: images a step.
      compute_seconds: of a step.
      reduce_seconds: of the gradient's all-reduce, were nothing else going on.
      wait_seconds: for BatchNorm's statistics.
      hidden: whether the backward pass, during which it travels, takes longer.
      least_batch: images for each device from which it does.
      images_per_second: over all devices, the part of the all-reduce that is not hidden included.
      input_bytes_per_second: of images for each device.
    """

    devices: int
    batch: int
    compute_seconds: float
    reduce_seconds: float
    wait_seconds: float
    hidden: bool
    least_batch: int
    images_per_second: float
    input_bytes_per_second: float


def on_paper(
    cost: StepCost, devices: int, batch_per_device: int, flops: float, link: float, latency: float = 0.0,
) -> OnPaper:
    """Returns what `devices` devices would do.

    Args:
      cost: of a step.
      devices: how many share a batch.
      batch_per_device: images that each takes of it.
      flops: floating-point operations a second that a device reaches, above 0: its peak times a utilisation.
      link: bytes a second that a device sends and receives at once, above 0, over the slowest link.
      latency: seconds of a hop.
    """
    compute = cost.flops * batch_per_device / flops
    hops = 2 * math.ceil(math.log2(devices)) * latency
    reduce = 2 * (devices - 1) / devices * cost.gradient_bytes / link + hops
    wait = cost.exchanges * hops
    backward = BACKWARD_SHARE * cost.last_flops / flops  # for one image
    total = compute + wait + max(0.0, reduce - backward * batch_per_device)
    return OnPaper(devices, devices * batch_per_device, compute, reduce, wait, reduce <= backward * batch_per_device,
                   max(1, math.ceil(reduce / backward)), devices * batch_per_device / total,
                   cost.image_bytes * batch_per_device / total)


def paper_table(cost: StepCost, rows: list[OnPaper]) -> str:
    """Returns a Markdown table of numbers of devices."""
    lines = ["| devices | batch | compute | BatchNorm waits | all-reduce | hidden | from images per device | images/s | "
             "input per device |",
             "| ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |"]
    for row in rows:
        lines.append(
            f"| {row.devices:,} | {row.batch:,} | {1e3 * row.compute_seconds:.1f} ms | {1e3 * row.wait_seconds:.1f} ms | "
            f"{1e3 * row.reduce_seconds:.2f} ms | "
            f"{'yes' if row.hidden else 'no'} | {row.least_batch} | {row.images_per_second:,.0f} | "
            f"{row.input_bytes_per_second / 1e6:.1f} MB/s |")
    return "\n".join(lines)


def collectives_table(recipe: Recipe, teacher_variables: dict | None, counts: list[int], batch: int) -> str:
    """Returns a Markdown table of the collectives in the compiled step, on several numbers of devices of this process.

    Args:
      recipe: the run's.
      teacher_variables: the teacher's, or their shapes; None without a teacher.
      counts: numbers of devices.
      batch: images of a step, which each of them divides.
    """
    shapes = recipe.state_shapes
    kernels = [leaf.shape for leaf in jax.tree.leaves(shapes.params) if len(leaf.shape) > 1]
    lines = [f"Parameters: {4 * models.parameter_count({'params': shapes.params}):,} bytes, of which kernels "
             f"{sum(4 * math.prod(shape) for shape in kernels):,}.", "",
             "| devices | collectives | bytes | of which kernels' gradients | kinds |", "| ---: | ---: | ---: | ---: | --- |"]
    for count in counts:
        mesh = parallel.data_mesh(jax.devices()[:count])
        program = make_train_step(recipe, mesh).lower(*abstract_arguments(recipe, mesh, teacher_variables, batch)).compile()
        found = collectives(program.as_text())
        kinds = ", ".join(sorted({one.kind for one in found})) or "none"
        reduced = sum(one.bytes_of(kernels) for one in found if one.kind == "all-reduce")
        lines.append(f"| {count} | {len(found)} | {sum(one.bytes for one in found):,} | {reduced:,} | {kinds} |")
    return "\n".join(lines)


def abstract_arguments(
    recipe: Recipe, mesh: jax.sharding.Mesh, teacher_variables: dict | None, batch: int, *, teacher_clean: bool = False,
    pixels=np.uint8,
) -> tuple:
    """Returns the arguments of a step as shapes with shardings: (state, teacher's variables, batch).

    Args:
      recipe: the run's.
      mesh: the devices.
      teacher_variables: the teacher's, or their shapes; None without a teacher.
      batch: images of a step.
      teacher_clean: the batch comes with the teacher's logits on its images.
      pixels: dtype of the images as they come: uint8, or float32.
    """
    def placed(tree, placement):
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, placement)

    state = recipe.state_shapes
    everywhere = jax.tree.map(lambda _: parallel.replicated(mesh), teacher_variables)
    cut = (batch,) if recipe.accumulation == 1 else (recipe.accumulation, batch // recipe.accumulation)
    found = batch_shapes(recipe, cut, teacher_clean=teacher_clean, pixels=pixels)
    split = parallel.sharded(mesh, recipe.accumulation)
    return (placed(state, shardings(recipe, mesh)), placed(teacher_variables, everywhere),
            placed(found, dict.fromkeys(found, split)))


def batch_shapes(
    recipe: Recipe, cut: tuple[int, ...], *, teacher_clean: bool = False, pixels=np.uint8,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch, cut into [batch] or [micro-batches, batch / micro-batches]; see `abstract_arguments`."""
    images = jax.ShapeDtypeStruct((*cut, *recipe.student.image_shape), pixels)
    labels = jax.ShapeDtypeStruct(cut, np.int32)
    roles = ["", *(["partner"] if recipe.augmentation.mixes else []), *(["negative"] if recipe.method.negatives else [])]
    found = {name: value for role in roles for name, value in (
        (f"{role or 'image'}s", images), (f"{role}_labels" if role else "labels", labels))}
    logits = jax.ShapeDtypeStruct((*cut, recipe.student.classes), np.float32)
    return found | ({"teacher_clean": logits} if teacher_clean else {})
