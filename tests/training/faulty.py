"""`launch.train` as one of several processes, to which something happens: `python -m tests.training.faulty`.

The variable FAULT, such as "kill in a save:1", is a moment and the number of the process that it befalls; the others train as
ever. What is patched here is only where and when the signal comes.
"""

import os
import pathlib
import signal
import threading
import time

from launch import command, start, train  # first, as in every command: it has XLA silenced before that is imported

SAVED, STOPPED, UNSAVED = 4, 6, 8  # the last step that is saved, that after which the fault comes, the next to be saved


def main() -> None:
    moment, process = os.environ["FAULT"].split(":")
    if start.supposed_process_id() == int(process):
        {"kill in training": kill_in_training, "kill in a save": kill_in_a_save,
         "kill in the first step": kill_in_the_first_step,
         "SIGTERM": lambda: signal_in_training("SIGTERM"), "SIGUSR1": lambda: signal_in_training("SIGUSR1")}[moment]()
    train.main()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def signal_in_training(name: str) -> None:
    at_step(STOPPED, lambda log: signal.raise_signal(signal.Signals[name]))


def kill_in_training() -> None:
    def saved_then_killed(log):
        until((log.workdir / "checkpoints" / str(SAVED)).exists)
        kill()

    at_step(STOPPED, saved_then_killed)


def at_step(wanted, happen) -> None:
    from jaxrd.training.log import Log

    advance = Log.advance
    Log.advance = lambda log, step: advance(log, step) if step != wanted else (advance(log, step), happen(log))


def kill_in_a_save() -> None:
    """In the thread that waits until everything is written, before it tells the others and names the directory."""
    from orbax.checkpoint._src.checkpointers import async_checkpointer

    wait = async_checkpointer._background_wait_for_commit_futures

    def killed(directory, *arguments, **options):
        if pathlib.Path(directory).name.startswith(str(UNSAVED)):
            until(lambda: any(pathlib.Path(directory).parent.glob(f"{UNSAVED}.*tmp*")))
            kill()
        return wait(directory, *arguments, **options)

    async_checkpointer._background_wait_for_commit_futures = killed


def kill_in_the_first_step() -> None:
    from jaxrd.training import loop

    make = loop.make_train_step

    def made(*arguments):
        train_step = make(*arguments)

        def first(*arguments):
            threading.Timer(0.5, kill).start()  # while it is traced and compiled, which takes seconds
            return train_step(*arguments)

        return first

    loop.make_train_step = made


def until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)


if __name__ == "__main__":
    command.define_config()
    command.run(main)
