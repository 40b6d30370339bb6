"""Command lines: `python -m launch.train`, `launch.evaluate`, `launch.benchmark`, from the root of the repository."""

import os
import sys

if any(argument.startswith(("--coordinator", "-coordinator")) for argument in sys.argv) or any(
        os.environ.get(name, "1") != "1" for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")):
    # Of several processes: what XLA would log of a lost one, in pages, `jaxrd.training.startup` says in a line. jaxlib reads
    # it once, when it is imported. 1 is what JAX itself sets, and a parent process may have handed down.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
