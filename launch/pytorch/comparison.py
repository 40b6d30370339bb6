"""The parent's side of `--compare=torch`: a child process that steps in PyTorch, in turn with what steps here.

Imports neither torch, which only the child needs, nor jax.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

from launch.pytorch import jobs
from launch.pytorch.jobs import Job

OURS = "jaxrd"
_TURN = 0.5  # seconds of a turn, where a step is shorter: as in training, the next one begins before the one before is awaited
_MOST = 100  # steps of a turn
_ROOT = pathlib.Path(__file__).parents[2]


class VariantError(RuntimeError):
    """A variant that failed in the child, in one line; the others go on."""


def require_torch() -> None:
    """Raises InputError where PyTorch is not installed; it is looked for, not imported."""
    if importlib.util.find_spec("torch") is None:
        raise _input_error("--compare=torch needs PyTorch; pip install -e '.[parity]'")


def share_accelerator() -> None:
    """Leaves JAX to take a GPU's memory as it needs it, not three quarters of it at once; before JAX starts a backend."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def job_of(config, recipe, **options) -> Job:
    """Returns the job that is a configuration's step.

    Args:
      config: a `jaxrd.config.Config`.
      recipe: the `jaxrd.training.step.Recipe` that was made of it.
      **options: further fields of `Job`: variants, flavour, device, threads, tf32.

    Raises:
      InputError: the configuration has what the PyTorch side does not.
    """
    method, inner = recipe.method, recipe.inner
    base = method.name.partition("+")[0]
    defaults = {field.name: field.default for field in dataclasses.fields(config.method)}
    for name, default in defaults.items() if method.name in jobs.METHODS else ():  # of an unknown method its name is at fault
        # The method's own options; what presets say of running statistics does not change a step's arithmetic.
        if name.startswith((f"{base}_", "igdm_")) and name != "igdm_ramp" or name == "attack":
            _refuse_unless(f"method.{name}", getattr(config.method, name), default)
    for field, value, known in (
            ("threat.norm", inner.threat.norm, "linf"), ("optimizer.name", config.optimizer.name, "sgd"),
            ("attack.batch_statistics", config.attack.batch_statistics, False), ("bn_groups", config.bn_groups, None),
            ("training.accumulation", config.training.accumulation, 1), ("data.mixing", config.data.mixing, "none"),
            ("training.label_smoothing", config.training.label_smoothing, 0)):
        _refuse_unless(field, value, known)
    student, optimizer = recipe.student, config.optimizer
    job = Job(
        method=method.name, student=student.name, teacher=recipe.teacher.name if recipe.teacher else None,
        classes=student.classes, image_shape=tuple(student.image_shape), batch_size=config.training.batch_size,
        attack_steps=inner.steps, step_size=inner.step_size, epsilon=inner.threat.epsilon, start=inner.start or "",
        project_start=inner.project_start, igdm=next((term.weight for term in method.terms if term.name == "igdm"), 0.0),
        learning_rate=optimizer.learning_rate, momentum=optimizer.momentum, weight_decay=optimizer.weight_decay,
        nesterov=optimizer.nesterov, seed=config.seed, **options)
    _check(job)
    return job


class TorchSteps:
    """A child process that takes one step of a job in PyTorch whenever it is told to; a context manager.

    Attributes:
      job: what it steps.
      variants: names of those that have not failed, in order.
      errors: what those that have say, by name.
      memory: peak bytes on a GPU in the first step of a variant, by name.
      facts: {"torch": version, "device": name, "threads": number} of the child.

    Args:
      job: the job.
      environment: variables of the child besides those of this process.

    Raises:
      InputError: PyTorch is not installed, or has not what the job asks for; the child could not start, or has ended.
    """

    def __init__(self, job: Job, environment: dict[str, str] | None = None):
        require_torch()
        _check(job)
        self.job, self.variants, self.errors, self.memory, self.facts = job, job.variants, {}, {}, {}
        self._environment, self._child, self._log = environment or {}, None, None

    def __enter__(self) -> "TorchSteps":
        self._log = tempfile.TemporaryFile()
        self._child = subprocess.Popen(
            [sys.executable, "-m", "launch.pytorch.worker"], cwd=_ROOT, env=os.environ | self._environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True)
        try:
            self.facts = self._ask(json.dumps(dataclasses.asdict(self.job)))
            if "error" in self.facts:
                raise _input_error(f"--compare=torch: {self.facts['error']}")
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *exception) -> None:
        self._close()

    def warm_up(self) -> dict[str, float | str]:
        """Runs the first step of every variant and returns its seconds, compilation and all, or what went wrong, by name."""
        results = {}
        for variant in self.variants:
            try:
                answer = self._answer(variant, f"warm_up {variant}")
            except VariantError as error:
                results[variant] = str(error)
            else:
                results[variant] = answer["seconds"]
                if "memory" in answer:
                    self.memory[variant] = answer["memory"]
        return results

    def step(self, variant: str, times: int = 1) -> float:
        """Runs so many steps, one right after another, and returns the seconds of one, by the child's clock.

        Raises:
          VariantError: one failed; the variant is no longer among `variants`.
        """
        return self._answer(variant, f"{variant} {times}")["seconds"]

    def _answer(self, variant, line):
        answer = self._ask(line)
        if "error" in answer:
            self.errors[variant] = answer["error"]
            self.variants = tuple(other for other in self.variants if other != variant)
            raise VariantError(answer["error"])
        return answer

    def _ask(self, line: str) -> dict:
        if self._child is None:
            raise RuntimeError("the PyTorch process is not running; use TorchSteps in a with statement")
        try:
            print(line, file=self._child.stdin, flush=True)
            answer = self._child.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            status = self._child.wait()
            self._log.seek(0)
            last = self._log.read().decode(errors="replace").strip().rpartition("\n")[2][:200]
            raise _input_error(f"--compare=torch: the PyTorch process has ended, with status {status}{last and ': '}{last}")
        return json.loads(answer)

    def _close(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        try:
            child.stdin.close()  # at the end of its input it ends, and the compilers that it has started with it
        except BrokenPipeError:
            pass
        try:
            child.wait(timeout=5)
        except subprocess.TimeoutExpired:  # in the middle of a step that nobody waits for
            child.kill()
            child.wait()
        child.stdout.close()
        self._log.close()


def compare(jax_steps: Callable[[int], None], steps: TorchSteps, turns: int) -> dict[str, list[float]]:
    """Returns the seconds of a step in each turn, under "jaxrd" and by variant: all step in every turn, so that what disturbs
    one disturbs all. A first turn, of one step each, is not measured, and says how many steps the others have: one, or as many
    as take half a second. A variant that fails is left out; `steps.errors` has the reason.

    Args:
      jax_steps: takes so many steps and returns when they are done.
      steps: the running child.
      turns: number of measured turns.
    """
    seconds: dict[str, list[float]] = {OURS: [], **{variant: [] for variant in steps.variants}}
    times = dict.fromkeys(seconds, 1)
    for turn in range(turns + 1):
        began = time.perf_counter()
        jax_steps(times[OURS])
        taken = {OURS: (time.perf_counter() - began) / times[OURS]}
        jobs.settle()
        for variant in steps.variants:
            try:
                taken[variant] = steps.step(variant, times[variant])
            except VariantError:
                del seconds[variant]
        if turn:
            for name, value in taken.items():
                seconds[name].append(value)
        else:
            times = {name: min(_MOST, max(1, round(_TURN / max(value, 1e-9)))) for name, value in taken.items()}
    return seconds


class Ratio(NamedTuple):
    """How a variant compares with jaxrd.

    Attributes:
      seconds: median of its seconds a step.
      ratio: median over turns of its seconds divided by jaxrd's in the same turn: above 1 where jaxrd is faster.
      lower, upper: first and third quartile of that ratio.
    """

    seconds: float
    ratio: float
    lower: float
    upper: float


def ratios(seconds: dict[str, list[float]]) -> dict[str, Ratio]:
    """Returns the comparison of every variant with jaxrd, by name, from what `compare` returned."""
    ours = seconds[OURS]
    result = {}
    for variant, theirs in seconds.items():
        if variant != OURS:
            by_turn = [their / our for their, our in zip(theirs, ours, strict=True)]
            lower, middle, upper = statistics.quantiles(by_turn, n=4, method="inclusive") if len(by_turn) > 1 else 3 * by_turn
            result[variant] = Ratio(statistics.median(theirs), middle, lower, upper)
    return result


def table(seconds: dict[str, list[float]], warm_up: dict[str, float | str], errors: dict[str, str]) -> list[str]:
    """Returns the lines of a table: milliseconds a step and ratio of every variant, of those that failed the reason.

    Args:
      seconds: what `compare` returned.
      warm_up: what `TorchSteps.warm_up` returned.
      errors: `TorchSteps.errors`, after both.
    """
    lines = [f"  {'':<16}{'ms per step':>12}{'of jaxrd':>12}{'quartiles':>18}{'first step':>14}",
             f"  {OURS:<16}{1e3 * statistics.median(seconds[OURS]):>12.2f}{1:>11.2f}x"]
    for variant, found in ratios(seconds).items():
        lines.append(f"  {variant:<16}{1e3 * found.seconds:>12.2f}{found.ratio:>11.2f}x"
                     f"{f'{found.lower:.2f} to {found.upper:.2f}':>18}{warm_up[variant]:>12.1f} s")
    return lines + [f"  {variant:<16}failed: {reason}" for variant, reason in errors.items()]


def _check(job: Job) -> None:
    if wrong := jobs.fault(job):
        raise _input_error(f"--compare=torch: {wrong}")


def _refuse_unless(field: str, value, known) -> None:
    if value != known:
        raise _input_error(f"--compare=torch: config.{field} is {value}, which the PyTorch side does not have; it has {known}")


def _input_error(message: str) -> Exception:
    from jaxrd.errors import InputError  # whose package imports jax

    return InputError(message)
