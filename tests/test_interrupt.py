"""Ctrl-C while a command still imports its libraries."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

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
