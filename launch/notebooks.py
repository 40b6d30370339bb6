"""Executes the notebooks in launch/notebooks and keeps what they show: `python -m launch.notebooks [NAME ...] [--check]`.

Each runs in a fresh kernel and an empty directory, which the notebooks of one call share: they train a small teacher there
once. Its outputs are written back into it, without times, so that what changes in a file is what changed in a notebook. With
--check nothing is written. Reading and changing them takes Jupyter and no command:

    pip install -e '.[notebooks]'
    jupyter lab launch/notebooks
"""

import functools
import os
import pathlib
import tempfile
import time

from absl import flags

from jaxrd.errors import InputError, suggest
from launch import command

FOLDER = pathlib.Path(__file__).with_suffix("")
_ROOT = FOLDER.parents[1]
_CHECK = flags.DEFINE_bool("check", False, "Execute them, and write nothing back.")
_TIMEOUT = flags.DEFINE_integer("timeout", 600, "Seconds that a cell may take.", lower_bound=1)


def main(names: list[str]) -> None:
    known = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    chosen = [name.removesuffix(".ipynb").rpartition("/")[2] for name in names]
    for given, name in zip(names, chosen):
        if name not in known:
            raise InputError(f'"{given}" is no notebook; {suggest(name, known)}')
    say = functools.partial(print, flush=True)
    with tempfile.TemporaryDirectory(prefix="jaxrd-notebooks-") as directory:
        for name in chosen or known:
            began = time.perf_counter()
            notebook = execute(FOLDER / f"{name}.ipynb", pathlib.Path(directory), _TIMEOUT.value)
            if not _CHECK.value:
                write(notebook, FOLDER / f"{name}.ipynb")
            say(f"{name}: {'' if _CHECK.value else 'executed and written, '}{time.perf_counter() - began:.0f} s")


def execute(path: pathlib.Path, directory: pathlib.Path, timeout: int = 600):
    """Returns the notebook as it is after every cell has run in a fresh kernel that works in `directory`.

    Args:
      path: the .ipynb file, which stays as it is.
      directory: what paths in the notebook are relative to.
      timeout: seconds that a cell may take.

    Raises:
      InputError: the extra is not installed; the file is no notebook; a cell fails, or takes too long.
    """
    try:
        import ipykernel
        import nbclient
        import nbformat
    except ImportError as error:
        raise InputError(f"notebooks need {error.name}, which is not installed: pip install -e '.[notebooks]'") from None
    del ipykernel  # only the kernel's own process needs it
    try:
        notebook = nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat's own for what is no notebook, json's, the file system's
        raise InputError(f"{path.name} cannot be read as a notebook: {str(error).splitlines()[0]}") from None
    for cell in notebook.cells:
        if cell.cell_type == "code":  # what is left after a failure is of this execution
            cell.outputs, cell.execution_count = [], None
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    client = nbclient.NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", coalesce_streams=True,
        resources={"metadata": {"path": str(directory)}},
        extra_arguments=["--log-level=50"])  # kernels warn of the local port that they listen on, and of interruptions
    try:
        client.execute()
    except nbclient.exceptions.CellExecutionError as error:
        raise InputError(_failed(path.stem, notebook, f"{error.ename}: {error.evalue}")) from None
    except nbclient.exceptions.CellTimeoutError:
        raise InputError(_failed(path.stem, notebook, f"not finished after {timeout} s; raise --timeout")) from None
    except nbclient.exceptions.DeadKernelError:
        raise InputError(_failed(path.stem, notebook, "its kernel died (out of memory?)")) from None
    return notebook


def write(notebook, path: pathlib.Path) -> None:
    """Writes an executed notebook without what differs from one execution to the next: times, and the kernel's version."""
    import nbformat

    from jaxrd.files import replacing

    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"}}
    with replacing(path, "w") as file:
        file.write(nbformat.writes(notebook) + "\n")


def _failed(name: str, notebook, what: str) -> str:
    """Returns one line on the cell that ran last: its number among the code cells, its first line, what was wrong."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    number = max((index for index, cell in enumerate(cells, 1) if cell.execution_count or cell.outputs), default=1)
    first = cells[number - 1].source.strip().splitlines()[0]
    return f"{name}, code cell {number} ({first}): {' '.join(what.split())}"


if __name__ == "__main__":
    command.run(main, arguments=True)
