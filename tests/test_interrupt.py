"""Ctrl-C at the worst moments: while a command imports its libraries, and while MLflow writes to SQLite."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import project

ROOT = Path(__file__).parents[1]

# A library that gets Ctrl-C while Python imports it. Like NumPy, it turns KeyboardInterrupt into an error of its own.
LIBRARY = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    raise RecursionError from None
"""


@pytest.mark.parametrize(("command", "library"), [("stages.download", "tqdm"), ("mnist_mlp.predict", "numpy")])
def test_ctrl_c_during_the_imports_ends_a_command_without_a_traceback(
    command: str, library: str, tmp_path: Path
) -> None:
    (tmp_path / f"{library}.py").write_text(LIBRARY)
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-m", command], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


# Ctrl-C when SQLite has written a parameter or a metric, and not yet let go of its lock.
IN_A_WRITE = """
import mlflow, os, signal, sys
from sqlalchemy import engine, event
from lineage import run_command, runs
from mnist_mlp import params, record

def interrupt(connection, cursor, statement, *more):
    if statement.startswith("INSERT INTO " + sys.argv[1]):
        event.remove(engine.Engine, "after_cursor_execute", interrupt)
        os.kill(os.getpid(), signal.SIGINT)

def main():
    event.listen(engine.Engine, "after_cursor_execute", interrupt)
    config = params.load()
    with runs.live(record.EXPERIMENT, record.flat(config), record.dataset(config), record.TAGS) as run:
        run.send(mlflow.log_metric, "train_loss", 1.0)

run_command(main)
"""


@pytest.mark.parametrize("table", ["params", "metrics"])
def test_ctrl_c_in_a_write_to_mlflow_ends_the_run_as_killed(finished: Path, tmp_path: Path, table: str) -> None:
    folder = project.copy(finished, tmp_path / "repository")
    project.run(folder, sys.executable, "-m", "stages.track")  # the copy is the store's place now
    done = project.run(folder, sys.executable, "-c", IN_A_WRITE, table, check=False)
    assert (done.returncode, done.stderr) == (130, "")
    assert project.runs(folder)[0].info.status == "KILLED"
