"""A few steps under JAX's profiler, and where their time goes: `traces` reads what this captures."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax

from jaxrd.errors import InputError
from jaxrd.files import NOT_WRITTEN
from jaxrd.performance import traces
from jaxrd.performance.workload import Workload

STEPS = 3
_STEP = "jaxrd_step"


def capture(workload: Workload, step: Callable, directory: str | pathlib.Path, steps: int = STEPS) -> None:
    """Writes a trace of a few steps, after as many that warm up, each awaited before the next is begun.

    Args:
      workload: whose step it is.
      step: compiled.
      directory: made where it is not; `tensorboard --logdir` and Perfetto read what is there.
      steps: how many.

    Raises:
      InputError: the directory cannot be written.
    """
    state, batch = workload.state(), workload.batch()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every call of a Python function would be an event
    try:
        pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror if error.errno in NOT_WRITTEN else "it is no directory"
        raise InputError(f"--trace={directory} cannot be written ({reason}); choose another place") from None
    for _ in range(steps):
        state, metrics = step(state, workload.teacher_variables, batch)
        jax.block_until_ready((state, metrics))
    with jax.profiler.trace(str(directory), profiler_options=options):
        for number in range(steps):
            with jax.profiler.StepTraceAnnotation(_STEP, step_num=number):
                state, metrics = step(state, workload.teacher_variables, batch)
                jax.block_until_ready((state, metrics))


def where_time_goes(directory: str | pathlib.Path, program: str, top: int = 10) -> dict[str, Any]:
    """Returns what a captured trace says, for each of its steps, with units in the keys, as JSON can hold it.

    Args:
      directory: where the trace is.
      program: the text of the compiled step.
      top: how many instructions to list.

    Raises:
      InputError: no trace is there, or none of that program.
    """
    trace, known = traces.read(directory), traces.instructions(program)
    ran, steps = traces.events(trace, known), traces.windows(trace, _STEP)
    if not ran:
        raise InputError(f"the trace in {directory} has no instruction of the train step; this backend does not record them")
    on_cpu = jax.default_backend() == "cpu"
    found, count = traces.summarise(ran, known, steps, pooled=on_cpu, top=top), max(1, len(steps))
    return {
        "steps": count, "wall_seconds": found.wall / count, "covered_seconds": found.covered / count,
        "pooled_seconds": found.pooled / count,
        "by_scope_seconds": {name: seconds / count for name, seconds in found.by_scope.items()},
        "by_kind_seconds": {name: seconds / count for name, seconds in found.by_kind.items()},
        "top": [{"instruction": name, "seconds": seconds / count, "times": times / count, "kind": one.kind, "scope": one.scope,
                 "op_name": one.op_name} for name, seconds, times, one in found.top]}
