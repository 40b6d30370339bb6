"""Where metrics go besides metrics.jsonl, where a run asks for it: TensorBoard (by tensorboardX) and Weights & Biases.

Both are extras, imported only when `config.training.writers` names them. A writer has `write(step, values)` and `close()`.
"""

import hashlib
import pathlib

from jaxrd.config import Config
from jaxrd.errors import InputError


def open_writers(workdir: pathlib.Path, config: Config, *, resumed_at: int) -> list:
    """Returns the writers that `config.training.writers` names, comma-separated.

    Args:
      workdir: the run directory; both keep their files under it.
      config: the run's configuration.
      resumed_at: the step after which the run goes on; what was logged beyond it is superseded.

    Raises:
      InputError: one whose package is not installed.
    """
    return [WRITERS[name](workdir, config, resumed_at) for name in config.training.writer_names]


class TensorBoard:
    """Event files under `workdir/tensorboard`: `tensorboard --logdir=runs` shows all runs side by side."""

    def __init__(self, workdir: pathlib.Path, config: Config, resumed_at: int):
        try:
            import tensorboardX
        except ImportError:
            raise _missing("tensorboard", "tensorboardX") from None
        self._writer = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=resumed_at + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One W&B run per run directory, continued when the directory is; WANDB_* variables choose project, entity and mode."""

    def __init__(self, workdir: pathlib.Path, config: Config, resumed_at: int):
        try:
            import wandb
        except ImportError:
            raise _missing("wandb", "wandb") from None
        identity = hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16]
        self._run = wandb.init(
            id=identity, name=workdir.name, dir=str(workdir), config=config.to_dict(), resume="allow")

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


WRITERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def _missing(extra: str, package: str) -> InputError:
    return InputError(f"config.training.writers names {extra}, but {package} is not installed: pip install {package}")
