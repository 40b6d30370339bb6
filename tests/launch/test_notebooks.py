"""The notebooks as they are committed, and the command that executes them."""

import base64
import importlib.util
import json
import re
import subprocess
import sys

import pytest

from jaxrd.errors import InputError
from launch import notebooks
from tests.launch.commands import ROOT, check_one_line, environment, run_all

NAMES = ("adversarial_paths", "gradient_matching", "own_term", "sweep_to_figure")
EXTRA = ("nbclient", "nbformat", "ipykernel", "pandas")
needs_the_extra = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in EXTRA),
    reason="executing notebooks takes the extra: pip install -e '.[notebooks]'")


# Absolute paths, addresses of objects, warnings and dates.
MACHINE = re.compile(
    r"(?<![\w.])/(?:tmp|home|root|Users|work|usr|var)/|site-packages|0x[0-9a-f]{6,}|Warning|\b20\d\d-\d\d-\d\d")


def cells(name, kind="code"):
    notebook = json.loads((notebooks.FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    return [cell | {"source": "".join(cell["source"])} for cell in notebook["cells"] if cell["cell_type"] == kind]


def outputs(name):
    return [output for cell in cells(name) for output in cell["outputs"]]


def texts(name):
    """What a reader reads of the outputs."""
    found = []
    for output in outputs(name):
        data = output.get("data", {})
        found += ["".join(value) for value in (output.get("text", ""), data.get("text/plain", ""), data.get("text/html", ""))]
    return found


def test_these_are_the_notebooks():
    assert sorted(path.stem for path in notebooks.FOLDER.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_committed_as_one_execution_from_top_to_bottom(name):
    numbers = [cell["execution_count"] for cell in cells(name)]
    assert numbers == list(range(1, len(numbers) + 1))
    for cell in cells(name):
        assert not [output for output in cell["outputs"] if output["output_type"] == "error" or output.get("name") == "stderr"]
        # What is printed or shown last is there; training, %%capture, is kept silent.
        quiet = cell["source"].startswith("%%capture")
        shows = re.search(r"^(print\(|plt\.show\(\)|    print\()", cell["source"], re.M)
        assert bool(cell["outputs"]) == bool(shows) or not quiet and cell["outputs"], cell["source"]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_tells_nothing_of_the_machine_that_executed_it(name):
    notebook = json.loads((notebooks.FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"}}
    assert all("execution" not in cell["metadata"] for cell in notebook["cells"])
    for text in texts(name):
        assert not MACHINE.search(text), text


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_has_figures_prose_and_a_bounded_size(name):
    figures = [base64.b64decode("".join(output["data"]["image/png"])) for output in outputs(name)
               if "image/png" in output.get("data", {})]
    assert figures and all(figure.startswith(b"\x89PNG") and len(figure) > 5000 for figure in figures)
    assert (notebooks.FOLDER / f"{name}.ipynb").stat().st_size < 600_000
    prose = cells(name, "markdown")
    assert prose[0]["source"].startswith("# ") and len(prose) >= len(cells(name)) / 2


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_hides_nothing_and_uses_public_names_only(name):
    source = "\n".join(cell["source"] for cell in cells(name))
    imported = {match[1] for match in re.finditer(r"^(?:from|import) (\w+)", source, re.M)}
    assert imported <= {"jaxrd", "jax", "numpy", "matplotlib", "pandas", "pathlib", "time"}
    assert not re.search(r"\._[a-z]|import _", source)
    assert "%run" not in source and "!" not in {line[:1] for line in source.splitlines()}


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_the_prose_stand_in_the_outputs(name):
    """Decimals of three figures or more, and percentages with a decimal, that the prose quotes of what came out."""
    shown = "\n".join(texts(name))
    for cell in cells(name, "markdown"):
        for number in re.findall(r"(?<![\d.])\d+\.\d{2,}(?![\d.])", re.sub(r"`[^`]*`|\$[^$]*\$", "", cell["source"])):
            assert number in shown or number in "\n".join(cell["source"] for cell in cells(name)), (number, cell["source"])


@pytest.fixture(scope="module")
def executed():
    """What one call says that executes all notebooks, which share what they train, and the files as they were before."""
    committed = {name: (notebooks.FOLDER / f"{name}.ipynb").read_bytes() for name in NAMES}
    done = subprocess.run([sys.executable, "-m", "launch.notebooks", "--check"], cwd=ROOT, env=environment(),
                          capture_output=True, text=True)
    return done, committed


@needs_the_extra
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_as_it_is_committed(name, executed):
    done, committed = executed
    assert re.search(rf"^{name}: \d+ s$", done.stdout, re.M), done.stderr
    assert (notebooks.FOLDER / f"{name}.ipynb").read_bytes() == committed[name]


@needs_the_extra
@pytest.mark.slow
def test_notebooks_say_what_they_took_and_no_more(executed):
    done, _ = executed
    assert done.returncode == 0 and done.stderr == "" and len(done.stdout.splitlines()) == len(NAMES)


@pytest.fixture(scope="module")
def mistakes():
    return run_all(["notebooks own_trem", "notebooks own_term.ipynb nothing", "notebooks --chekc", "notebooks --timeout=0"])


def test_a_mistake_on_the_command_line_is_one_line(mistakes):
    check_one_line(mistakes["notebooks own_trem"], '"own_trem"', 'did you mean "own_term"?', "adversarial_paths")
    check_one_line(mistakes["notebooks own_term.ipynb nothing"], '"nothing"', "known: adversarial_paths")
    check_one_line(mistakes["notebooks --chekc"], "--chekc", "did you mean --check?")
    check_one_line(mistakes["notebooks --timeout=0"], "timeout")


def test_without_the_extra_it_is_one_line():
    code = ("import runpy, sys; sys.modules['nbclient'] = None; sys.argv = ['launch.notebooks', 'own_term']; "
            "runpy.run_module('launch.notebooks', run_name='__main__', alter_sys=True)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    check_one_line((done.returncode, done.stdout, done.stderr), "nbclient", "pip install -e '.[notebooks]'")


def notebook_of(*sources, executed=False):
    """A notebook of these code cells, as nbformat writes one: fresh, or as it is after an execution."""
    return json.dumps({
        "nbformat": 4, "nbformat_minor": 5, "metadata": {},
        "cells": [{"cell_type": "code", "id": f"c{number}", "metadata": {}, "source": source, "outputs": [],
                   "execution_count": number + 1 if executed else None} for number, source in enumerate(sources)]})


# Executed in a process of its own, whose kernel's sockets are none of pytest's business.
EXECUTE = """
import pathlib, sys
from jaxrd.errors import InputError
from launch import notebooks
path = pathlib.Path(sys.argv[1])
try:
    notebooks.write(notebooks.execute(path, path.parent, timeout=60), path)
except InputError as error:
    print(error)
"""


def execute(path):
    done = subprocess.run([sys.executable, "-c", EXECUTE, str(path)], cwd=ROOT, env=environment(), text=True,
                          capture_output=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


@needs_the_extra
def test_it_executes_in_a_directory_and_writes_the_outputs(tmp_path):
    path = tmp_path / "some.ipynb"
    path.write_text(notebook_of("import pathlib, jaxrd\nprint(pathlib.Path.cwd().name)\nprint(jaxrd.__version__)", "1 + 1"))
    assert execute(path) == ""
    first, second = json.loads(path.read_text())["cells"]
    assert "".join(first["outputs"][0]["text"]).splitlines()[0] == tmp_path.name
    assert (first["execution_count"], second["execution_count"]) == (1, 2) and first["metadata"] == {}
    assert second["outputs"][0]["data"] == {"text/plain": ["2"]} or second["outputs"][0]["data"] == {"text/plain": "2"}
    written = path.read_bytes()
    execute(path)
    assert path.read_bytes() == written  # nothing in it changes from one execution to the next


@needs_the_extra
@pytest.mark.parametrize("executed", [False, True])
def test_a_failing_cell_is_named_and_nothing_is_written(tmp_path, executed):
    path = tmp_path / "some.ipynb"
    path.write_text(notebook_of("x = 1", "# three\ny = x / 0", "print('never')", executed=executed))
    before = path.read_bytes()
    said = execute(path)
    assert said.count("\n") == 1 and said.startswith("some, code cell 2 (# three): ZeroDivisionError")
    assert path.read_bytes() == before


@needs_the_extra
def test_a_users_mistake_in_a_notebook_is_shown_as_one_line(tmp_path):
    path = tmp_path / "some.ipynb"
    path.write_text(notebook_of(
        "from jaxrd import ThreatModel\ntry:\n    get_ipython().run_cell('ThreatModel(epsilon=8)')\nfinally:\n    pass"))
    assert execute(path) == ""
    shown = json.loads(path.read_text())["cells"][0]["outputs"]
    text = "".join("".join(output.get("text", output.get("traceback", ""))) for output in shown)
    assert "InputError: threat.epsilon is 8" in text and "Traceback" not in text and text.strip().count("\n") == 0


def test_the_line_of_an_input_error_is_all_that_ipython_renders():
    assert InputError("config.seed is -1")._render_traceback_() == ["InputError: config.seed is -1"]


@needs_the_extra
@pytest.mark.parametrize("content", ["{", "[]", '{"cells": 3}', ""])
def test_a_damaged_notebook_is_one_line(tmp_path, content):
    path = tmp_path / "some.ipynb"
    path.write_text(content)
    said = execute(path)
    assert said.count("\n") == 1 and said.startswith("some.ipynb cannot be read as a notebook: ")
