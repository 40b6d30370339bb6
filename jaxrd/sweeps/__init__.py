"""Sweeps: points of configuration fields, each with the same seeds, trained, evaluated and compared in one table.

    from jaxrd import sweeps

    table = sweeps.run("configs/digits.py:ard+igdm", grid={"method.igdm": [0, 1, 10]}, seeds=[0, 1, 2],
                       attacks="clean,pgd20", baseline="method.igdm=0", workdir="runs/alpha")
    print(table)                                            # mean ± sd, and differences from the baseline, seed by seed
    table.frame()                                           # one row per run, as a pandas DataFrame
    table.summary()                                         # one row per point
    sweeps.plots.against(table, "method.igdm", "pgd20")     # a matplotlib figure
    sweeps.read("runs/alpha")                               # the same table, later

`python -m launch.sweep` is the same as a command; `description` has the form of its files.
"""

from jaxrd.sweeps import plots
from jaxrd.sweeps.results import Table, read
from jaxrd.sweeps.sweep import run

__all__ = ["Table", "plots", "read", "run"]
