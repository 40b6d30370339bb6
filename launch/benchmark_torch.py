"""`launch.benchmark --compare=torch`: a config's step in turn with the same step in plain PyTorch, in a process of its own."""

import dataclasses
import os

import jax

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
    from jaxrd.performance.measurement import header

    job = comparison.job_of(
        workload.config, workload.recipe, variants=variants_of(variants), flavour=flavour,
        device="cuda" if jax.default_backend() == "gpu" else "cpu", threads=len(os.sched_getaffinity(0)))
    step, compilation = workload.compile()
    state, batch = workload.state(), workload.batch()

    def ours():
        nonlocal state
        state, metrics = step(state, workload.teacher_variables, batch)
        jax.block_until_ready((state, metrics))

    with comparison.TorchSteps(job) as torch_steps:
        facts = torch_steps.facts
        print(f"{workload.description}, teacher {job.teacher or 'none'}, {job.attack_steps} attack steps; jax {jax.__version__} "
              f"on {jax.devices()[0].device_kind}, PyTorch {facts['torch']} on {facts['device']} with {facts['threads']} "
              f"threads, forwards: {flavour}", flush=True)
        warm_up = torch_steps.warm_up()
        seconds = comparison.compare(ours, torch_steps, turns or _LEAST_TURNS)
        found = comparison.ratios(seconds)
        for line in comparison.table(seconds, warm_up, torch_steps.errors):
            print(line)
        print(f"  medians of {len(seconds[comparison.OURS])} turns; above 1: jaxrd is faster. PyTorch's step has no "
              "augmentation, metrics or input" + ("; jaxrd's has T(x) from a table" if workload.cached else ""))
        return header(workload) | {
            "compilation_seconds": compilation, "pytorch": dataclasses.asdict(job) | facts, "seconds": seconds,
            "pytorch_first_step_seconds": warm_up, "pytorch_errors": torch_steps.errors,
            "pytorch_peak_bytes": torch_steps.memory, "ratios": {name: ratio._asdict() for name, ratio in found.items()}}
