"""A configuration measured: the figures of its step in one nested dictionary, with units in the keys, as JSON can hold it.

The parts are compiled alone, on what the parts before them give, so they need not sum to the step, which XLA fuses as one.
"""

import dataclasses
import os
from typing import Any

import jax

from jaxrd.performance import ceilings as ceiling, counting, devices, memory, operations, pieces, steps, timing
from jaxrd.performance.workload import Workload
from jaxrd.training import scaling
from jaxrd.training.environment import environment
from jaxrd.training.step import make_train_step

AGREE = 0.05  # by which the two counts of operations may differ


def header(workload: Workload) -> dict[str, Any]:
    """Returns what was measured, and on what."""
    recipe, mesh = workload.recipe, workload.mesh
    return {
        "method": recipe.method.name, "student": workload.config.student,
        "teacher": recipe.teacher.name if recipe.teacher else None, "batch_size": workload.batch_size,
        "dtypes": recipe.dtypes, "micro_batches": recipe.accumulation, "attack_steps": recipe.inner.steps,
        "image_shape": list(recipe.student.image_shape), "classes": recipe.student.classes,
        "devices": mesh.size, "device_kind": mesh.local_devices[0].device_kind,
        "platform": jax.default_backend(), "cores": os.cpu_count(), "environment": environment(),
        "config": workload.config.to_dict()}


def measure(
    workload: Workload, *, repeats: int | None = None, peak_flops: float | None = None, with_ceilings: bool = True,
) -> dict[str, Any]:
    """Returns all figures of a workload's step.

    Args:
      workload: what is measured.
      repeats: of each timed call; None for 5 to 30, as time allows.
      peak_flops: FLOP/s of a device in place of the published ones.
      with_ceilings: measure what the device reaches, which takes seconds.

    Raises:
      InputError: the step needs more memory than there is; a peak that none can be.
    """
    figures = header(workload)
    peaks = devices.peaks_of(figures["device_kind"], peak_flops)
    step, cold = workload.compile()
    jax.clear_caches()
    _, cached = workload.compile()
    figures["compilation"] = {"cold_seconds": cold, "cached_seconds": cached}
    figures["operations"] = of_step = _operations(workload)
    device = workload.mesh.local_devices[0]
    with memory.shortage_explained(device, workload.description):
        times = steps.step_times(workload, step, repeats)
        figures["memory"] = _memory(step, device)  # before the parts, which hold more at once than the step does
        figures["parts"] = _parts(workload, repeats, of_step)
    figures["step"] = {name: getattr(times, name).to_dict() for name in (
        "whole", "input_wait", "dispatch", "between", "in_training")}
    figures["images_per_second"] = workload.batch_size / times.in_training.median
    measured = []
    if with_ceilings:
        layers = operations.layers_of(workload.recipe.student)
        if workload.recipe.teacher:
            layers += operations.layers_of(workload.recipe.teacher)
        measured = ceiling.ceilings(layers, max(1, workload.batch_size // workload.recipe.accumulation // workload.mesh.size))
    figures["ceilings"] = [{"operation": one.operation, "precision": one.precision, "size": one.size,
                            "flop_per_second": one.flop_per_second} for one in measured]
    figures["utilisation"] = _utilisation(workload, of_step, peaks, measured, times.in_training.median)
    return figures


def _parts(workload: Workload, repeats: int | None, counted: dict[str, Any]) -> dict[str, dict[str, Any]]:
    recipe, batch = workload.recipe, workload.batch()
    if recipe.accumulation > 1:  # of one micro-batch
        batch = jax.tree.map(lambda array: array[0], batch)
        recipe = dataclasses.replace(recipe, accumulation=1)
    programs: dict[str, Any] = {}

    def evaluate(name, function, *arguments):
        programs[name] = timing.compiled(function, *arguments)
        return programs[name](*arguments)

    parts = pieces.parts(recipe, jax.random.key(1), workload.state(), workload.teacher_variables, batch, evaluate)
    seconds = timing.in_turn({
        name: lambda name=name, arguments=arguments: programs[name](*arguments) for name, (_, arguments) in parts.items()},
        repeats)
    found = {name: spread.to_dict() for name, spread in seconds.items()}
    for name, flop in counted["closed_form"]["by_part_flop"].items() if counted["closed_form"] else ():
        if name in found:
            found[name]["closed_form_flop"] = flop / workload.recipe.accumulation
            found[name]["flop_per_second"] = flop / workload.recipe.accumulation / found[name]["median_seconds"]
    # Of medians that were timed in turn: what the gradient takes more than the loss.
    found["student backward"] = {
        "median_seconds": found["student"]["median_seconds"] - found["student forward"]["median_seconds"]}
    return found


def _operations(workload: Workload) -> dict[str, Any]:
    recipe = dataclasses.replace(workload.recipe, accumulation=1)
    teacher = jax.eval_shape(recipe.teacher.init, jax.random.key(0)) if recipe.teacher else None
    comes = {"teacher_clean": workload.cached, "pixels": workload.source.images.dtype}
    arguments = scaling.abstract_arguments(recipe, workload.mesh, teacher, workload.batch_size, **comes)
    found = counting.operations(make_train_step(recipe, workload.mesh), *arguments)
    closed = operations.closed_form(recipe, scaling.batch_shapes(recipe, (workload.batch_size,), **comes))
    result: dict[str, Any] = {"xla": None, "closed_form": None, "difference": None, "agree": None}
    if found:
        result["xla"] = {
            "total_flop": found.total, "matrix_flop": found.of_matrices, "other_flop": found.other,
            "matrix_flop_by_precision": found.matrix, "has_loop_of_unknown_length": found.endless}
    if closed:
        result["closed_form"] = {
            "flop": workload.batch_size * closed.total, "with_padding_flop": workload.batch_size * closed.total_padded,
            "by_part_flop": {part: workload.batch_size * flop for part, flop in closed.flop.items()},
            "passes_batches": {part: {network: dataclasses.asdict(passes) for network, passes in networks.items()}
                               for part, networks in closed.passes.items()}}
    if found and closed:
        result["difference"] = result["closed_form"]["flop"] / found.of_matrices - 1
        result["agree"] = abs(result["difference"]) <= AGREE
    return result


def _memory(step: jax.stages.Compiled, device: jax.Device) -> dict[str, Any]:
    planned, peak = memory.planned(step) or {}, memory.peak_in_use(device)
    found: dict[str, Any] = {f"planned_{name}_bytes": size for name, size in planned.items()}
    if peak:
        found[f"peak_of_{peak[1]}_bytes"] = peak[0]
    return found | {"available_bytes": memory.memory_of(device)}


def _utilisation(workload, counted, peaks, measured, seconds) -> dict[str, Any]:
    """Returns the part of a peak, and of measured ceilings, that a step on each device comes to."""
    flop = counted["xla"]["matrix_flop_by_precision"] if counted["xla"] else None
    dtypes = {*workload.recipe.dtypes.values()}
    if flop is None and counted["closed_form"] and len(dtypes) == 1 and None not in dtypes:
        flop = {counting.precision_of(*dtypes): counted["closed_form"]["flop"]}
    if flop is None:
        return {"flop_per_second_of_a_device": None, "precisions": [], "peak_flop_per_second": peaks, "of_peak": None,
                "of_ceiling": {}}
    each = {kind: count / workload.mesh.size for kind, count in flop.items()}

    def part(speeds):
        least = devices.least_seconds(each, speeds)
        return least and least / seconds

    operations_timed = dict.fromkeys(one.operation for one in measured)
    return {
        "flop_per_second_of_a_device": sum(each.values()) / seconds, "precisions": list(each), "peak_flop_per_second": peaks,
        "of_peak": part(peaks) if peaks else None,
        "of_ceiling": {operation: part({one.precision: one.flop_per_second for one in measured if one.operation == operation})
                       for operation in operations_timed}}
