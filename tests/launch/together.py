"""A command of several processes for the tests: sums over all devices in turn, and ends as it is told.

`python -m tests.launch.together [--steps=N] [--how=...]` with the flags of `launch.start`. Prints "step N" as it goes.
"""

import faulthandler
import os
import time

from absl import flags

from launch import command, start  # first, as in every command: it has XLA silenced before that is imported

InputError = command.InputError

_STEPS = flags.DEFINE_integer("steps", 5, "How many sums.")
_HOW = flags.DEFINE_string("how", "well", "How process 1 ends after the first sum, or all of them.")
start.define_flags()


def main() -> None:
    start.initialize()
    import jax
    import numpy as np

    from jaxrd.training import processes

    for step in range(1, _STEPS.value + 1):
        total = processes.gather(np.full(2, jax.process_index() + 1.0)).sum()
        if processes.is_main():
            print(f"step {step}: {total:g} over {jax.device_count()} devices", flush=True)
        if step > 1:
            time.sleep(0.05)
        elif _HOW.value == "all refuse":
            raise InputError("the same in all")
        elif jax.process_index() == 1:
            _end(_HOW.value)
        if _HOW.value == "together":
            with processes.together():
                if jax.process_index() == 1:
                    raise InputError("refused, together")
    faulthandler.dump_traceback_later(60, exit=True)  # what hangs from here on says where


def _end(how: str) -> None:
    if how == "refuse":
        raise InputError("refused by one alone")
    if how == "raise":
        raise ArithmeticError("a bug of one")
    if how == "late":
        time.sleep(3)
    if how == "vanish":
        os._exit(3)


if __name__ == "__main__":
    command.run(main)
