"""What a run says: metrics.jsonl, one console line per entry, and a progress bar where there is a terminal."""

import contextlib
import json
import pathlib
import sys
import time
from typing import Any

import jax
from tqdm import tqdm

from jaxrd.attacks.progress import duration
from jaxrd.config import Config
from jaxrd.files import disk_explained, replacing
from jaxrd.training.writers import open_writers


class Log:
    """metrics.jsonl and the console: one line per entry, and a progress bar where there is a terminal."""

    def __init__(self, workdir: pathlib.Path, config: Config, steps: int, *, resumed_at: int, devices: int):
        self.workdir, self.compiled = workdir, False
        self._steps, self._batch_size = steps, config.training.batch_size
        self._main = jax.process_index() == 0
        self._validation: dict[str, float] = {}
        path = workdir / "metrics.jsonl"
        kept = [entry for entry in read_metrics(path) if entry["step"] <= resumed_at]
        self._seconds_before = max((entry.get("seconds", 0.0) for entry in kept), default=0.0)
        if self._main:
            with disk_explained(str(path)):
                write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self._writers = open_writers(workdir, config, resumed_at=resumed_at) if self._main else []
        self._file = open(path, "a") if self._main else None
        self._began = time.perf_counter()
        self._begin_interval(resumed_at)
        self._bar = tqdm(total=steps, initial=resumed_at, unit="step", leave=False, disable=not sys.stderr.isatty())
        if resumed_at < steps:
            progress = f"resumed after step {resumed_at} of {steps}" if resumed_at else f"{steps} steps"
            self.say(f"{workdir}: {config.build_method().name}, {config.student}, seed {config.seed}, {progress} "
                     f"on {devices} {jax.default_backend()} device(s)")

    def close(self) -> None:
        self._bar.close()
        for writer in self._writers:
            writer.close()
        if self._file:
            with contextlib.suppress(OSError):  # said where it was written
                self._file.close()

    def say(self, line: str) -> None:
        if self._main:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def advance(self, step: int) -> None:
        self._bar.update(step - self._bar.n)

    def note_compilation(self, step: int, seconds: float) -> None:
        self.compiled = True
        self._begin_interval(step)
        self.say(f"compiled the train step in {seconds:.1f} s")

    def train(self, step: int, metrics: dict[str, float], learning_rate: float, *, waited: float) -> None:
        """Writes the metrics' means since the last entry, and the speed since then without validation and compilation.

        Args:
          step: the step that has ended.
          metrics: means since the last entry.
          learning_rate: of that step.
          waited: seconds since the last entry in which the loop waited for input; their share is written as "input_wait".
        """
        now = time.perf_counter()
        timed, speed = step - self._interval_step, {}
        if timed:
            elapsed = now - self._interval_began
            speed = {"images_per_second": round(self._batch_size * timed / elapsed, 1),
                     "input_wait": round(waited / elapsed, 5)}
        self._write({"step": step, "seconds": round(self._seconds_before + now - self._began, 3),
                     **{f"train/{name}": value for name, value in metrics.items()},
                     "learning_rate": learning_rate, **speed})
        terms = [f"{name} {value:.3f}" for name, value in metrics.items()
                 if f"weight/{name}" in metrics]
        accuracy = [f"{name} {metrics[f'accuracy/{name}']:.1%}" for name in ("clean", "adversarial", "mirrored")
                    if f"accuracy/{name}" in metrics]
        if "accuracy/clean" not in metrics and self._validation:
            accuracy.append(f"clean {self._validation['validation/clean_accuracy']:.1%} (validation)")
        pace = "first step, compilation included"
        if timed:
            eta = duration((self._steps - step) * (now - self._interval_began) / timed)
            pace = f"{speed['images_per_second']:,.0f} images/s  ETA {eta}"
        self.say(f"{self._position(step)}  loss {metrics['loss']:.4f} ({', '.join(terms)})  {', '.join(accuracy)}  {pace}")
        self._begin_interval(step)

    def validation(self, step: int, metrics: dict[str, float]) -> None:
        self._validation = metrics
        self._write({"step": step, **metrics})
        cosine = metrics.get("validation/gradient_cosine")
        self.say(f"{self._position(step)}  validation: clean {metrics['validation/clean_accuracy']:.1%}, "
                 f"PGD-10 {metrics['validation/pgd_accuracy']:.1%}"
                 + (f", gradient cosine {cosine:.3f}" if cosine is not None else ""))
        self._begin_interval(step)

    def _begin_interval(self, step: int) -> None:
        self._interval_step, self._interval_began = step, time.perf_counter()

    def _position(self, step: int) -> str:
        return f"step {step:>{len(str(self._steps))}}/{self._steps}"

    def _write(self, entry: dict[str, Any]) -> None:
        if self._file:
            with disk_explained(self._file.name):
                self._file.write(json.dumps(entry) + "\n")
                self._file.flush()
        for writer in self._writers:
            writer.write(entry["step"], {name: value for name, value in entry.items() if name != "step"})


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the entries of a metrics.jsonl, none where it is absent; a line that is not one JSON object is left out."""
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue  # A run that was killed leaves half a line behind; the resumed one writes that step again.
    return [entry for entry in entries if isinstance(entry, dict)]


def write_json(path: pathlib.Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    with replacing(path, "w") as file:
        file.write(text)
