"""Runs the commands as their users run them, `python -m launch.train ...`, with one saving: a process that has imported jaxrd
forks for each of them, before JAX has started anything.
"""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]

# Reads [[module, argument, ...], ...] and writes [[status, stdout, stderr, imported heavy modules], ...].
RUNNER = """
import json, os, runpy, sys, tempfile, traceback, warnings
warnings.filterwarnings("ignore", "os.fork")
from launch import command
commands, heavy = json.load(sys.stdin)
if heavy:
    from jaxrd.evaluation import evaluate, report
    from jaxrd.training import loop
results = []
for module, *arguments in commands:
    out, err, left = (tempfile.TemporaryFile() for _ in range(3))
    child = os.fork()
    if not child:
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        sys.argv[1:] = arguments
        status = 0
        try:
            runpy.run_module(f"launch.{module}", run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
        left.write(json.dumps([name for name in ("orbax", "tensorflow_datasets", "optax") if name in sys.modules]).encode())
        for file in (sys.stdout, sys.stderr, left):
            file.flush()
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for file in (out, err, left):
        file.seek(0)
    results.append([status, out.read().decode(), err.read().decode(), json.loads(left.read() or b"[]")])
json.dump(results, sys.stdout)
"""


def environment(**variables):
    return {**os.environ, "JAX_PLATFORMS": "cpu", **variables}


def run_all(lines, *, heavy=False):
    """Runs command lines ("train --config=...") and returns {line: (status, stdout, stderr, heavy modules imported)}."""
    done = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps([[line.split() for line in lines], heavy]), cwd=ROOT, text=True,
        stdout=subprocess.PIPE, env=environment(PYTHONPATH=str(ROOT)), check=True)
    return dict(zip(lines, json.loads(done.stdout)))


def check_one_line(result, *words):
    status, _, error, *_ = result
    assert status == 1, error
    assert error.startswith("error: ") and error.count("\n") == 1, error
    for word in words:
        assert word in error
