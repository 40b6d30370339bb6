"""`launch.benchmark --compare=torch`: a config's step in turn with the same step in plain PyTorch, in a process of its own."""

import dataclasses
import os

import jax

from jaxrd.errors import InputError
from launch.pytorch import comparison

_LEAST_TURNS = 5


def variants_of(names: list[str] | None) -> tuple[str, ...]:
    """Returns the variants to time: those named, or on CPU all but the compiled one in bfloat16, on accelerators all."""
    from launch.pytorch import jobs

    if names:
        return tuple(name.strip() for name in names)
    return tuple(name for name in jobs.VARIANTS if jax.default_backend() != "cpu" or name != "compile+bf16")


def compare(workload, variants: list[str] | None, flavour: str, turns: int | None) -> dict:
    """Times a workload's step and PyTorch's variants of it in turn, prints the table and returns its figures.

    Args:
      workload: a `jaxrd.performance.workload.Workload` on one device.
      variants: of `launch.pytorch.jobs.VARIANTS`; None for those that are usual on the backend.
      flavour: "least" or "published", see `launch.pytorch.steps`.
      turns: how often each takes a step, besides the first; 5 by default.

    Raises:
      InputError: the configuration has what the PyTorch side does not.
    """
    from jaxrd.performance.counting import precision_of
    from jaxrd.performance.measurement import header

    backend, config = jax.default_backend(), workload.config
    if backend not in ("cpu", "gpu"):
        raise InputError(f"--compare=torch compares on one and the same device, a GPU or a CPU, and JAX runs on {backend}; "
                         "set JAX_PLATFORMS=cpu to compare on this machine's CPU")
    job = comparison.job_of(
        config, workload.recipe, variants=variants_of(variants), flavour=flavour,
        device="cuda" if backend == "gpu" else "cpu", threads=len(os.sched_getaffinity(0)))
    step, compilation = workload.compile()
    state, batch = workload.state(), workload.batch()

    def ours(times):
        nonlocal state
        for _ in range(times):
            state, metrics = step(state, workload.teacher_variables, batch)
        jax.block_until_ready((state, metrics))

    precisions = {name: precision_of(dtype) for name, dtype in workload.recipe.dtypes.items()}
    alike = len({*precisions.values()}) == 1
    in_words = precisions["student"] if alike else ", ".join(map(": ".join, precisions.items()))
    with comparison.TorchSteps(job) as torch_steps:
        facts = torch_steps.facts
        print(f"{workload.description}, teacher {job.teacher or 'none'}, {job.attack_steps} attack steps; jax {jax.__version__} "
              f"on {jax.devices()[0].device_kind}, products in {in_words}; PyTorch {facts['torch']} on {facts['device']} with "
              f"{facts['threads']} threads, forwards: {flavour}", flush=True)
        warm_up = torch_steps.warm_up()
        seconds = comparison.compare(ours, torch_steps, turns or _LEAST_TURNS)
        found = comparison.ratios(seconds)
        for line in comparison.table(seconds, warm_up, torch_steps.errors):
            print(line)
        table = "; jaxrd's has T(x) from a table" if workload.cached else ""
        print(f"  medians of {len(seconds[comparison.OURS])} turns; above 1: jaxrd is faster. PyTorch's step has no "
              f"augmentation, metrics or input{table}")
        return header(workload) | {
            "compilation_seconds": compilation, "pytorch": dataclasses.asdict(job) | facts, "seconds": seconds,
            "pytorch_first_step_seconds": warm_up, "pytorch_errors": torch_steps.errors,
            "pytorch_peak_bytes": torch_steps.memory, "ratios": {name: ratio._asdict() for name, ratio in found.items()}}
