"""Trains one run, or goes on with it: `python -m launch.train --config=configs/digits.py:ard+igdm --workdir=runs/ard+igdm`."""

from absl import flags

from jaxrd import config as configs
from jaxrd.errors import InputError
from launch import command, start

_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory; resumes where it holds checkpoints.")
_PRINT = flags.DEFINE_bool("print_config", False, "Print every field of the configuration with its meaning, and stop.")
start.define_flags()


def main() -> None:
    config = command.config()
    if _PRINT.value:
        print(configs.describe(config))
        return
    if not _WORKDIR.value:
        raise InputError("--workdir is missing; give the run's directory, such as --workdir=runs/a")
    start.initialize()
    from jaxrd.training import loop, parallel
    parallel.enable_compilation_cache()
    parallel.prepare_process()
    loop.train(config, _WORKDIR.value)


if __name__ == "__main__":
    command.define_config()
    command.run(main)
