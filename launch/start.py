"""The flags of the commands that run as several processes: given by hand, by `launch.local`, or found in a cluster."""

import os
import re
import sys

from absl import flags

flags.disclaim_key_flags()  # they stand in the help of the commands that take them


def define_flags() -> None:
    """Defines how this process finds the others, and whether its arithmetic is to be repeatable."""
    flags.DEFINE_string("coordinator", None, "Of several processes: HOST:PORT of process 0. By default what the cluster says.")
    flags.DEFINE_integer("processes", None, "How many processes there are. By default what the cluster says, else 1.")
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0. By default what the cluster says.")
    flags.DEFINE_integer("cpu_devices", None, "Run on so many fake CPU devices in each process.")
    flags.DEFINE_float("start_timeout", 300.0, "Seconds to wait for the other processes.")
    flags.DEFINE_bool("deterministic", False, "On GPUs: XLA's deterministic operations, without autotuning, so that a run "
                      "given again comes to the same bits; slower. Not tested on one yet.")


def initialize() -> None:
    """Makes this process one of several where flags or a cluster say so; first in main, before JAX starts a backend."""
    from jaxrd.training import startup

    values = flags.FLAGS
    if values.deterministic:
        add_xla_flag("--xla_gpu_deterministic_ops=true")
    startup.initialize(values.coordinator, values.processes, values.process_id, local_devices=values.cpu_devices,
                       timeout=values.start_timeout)


def add_xla_flag(flag: str) -> None:
    """Adds to what XLA reads when the first backend starts."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def supposed_process_id() -> int:
    """Returns which process this seems to be before anything is parsed, so that one alone answers a wrong command."""
    if match := re.search(r"(?:^| )--?process_id[= ](\d+)(?: |$)", " ".join(sys.argv)):
        return int(match[1])
    if os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return int(os.environ.get("SLURM_PROCID", 0))
    return int(os.environ.get("OMPI_COMM_WORLD_RANK", 0))
