"""Processes that are stopped at an event: in the middle of a write, or when they have printed a line. No clock."""

import os
import signal
import subprocess
from pathlib import Path

from tests import project

# Python imports this file before all others. It replaces `open`: of a file whose path contains STOP_AT, half is
# written, and then all processes of the group get a signal. How the project writes, and by which name, does not matter.
HALFWAY = """
import builtins, io, os

class Half(io.FileIO):
    def write(self, content):
        content = content.encode() if isinstance(content, str) else bytes(content)
        super().write(content[: len(content) // 2])
        os.killpg(0, int(os.environ["STOP_BY"]))

def open_(path, mode="r", *more, **options):
    if "w" in mode and not isinstance(path, int) and os.environ["STOP_AT"] in os.fsdecode(path):
        return Half(path, "w")
    return real(path, mode, *more, **options)

real = io.open
io.open = builtins.open = open_
"""


def in_write(folder: Path, path: str, number: signal.Signals, *command: str) -> int:
    """Run a command, and send its processes a signal when half of a file is written; give the exit status."""
    scripts = folder.parent / "halfway"
    scripts.mkdir(exist_ok=True)
    (scripts / "sitecustomize.py").write_text(HALFWAY)
    with subprocess.Popen(
        command, cwd=folder, env=project.environment(PYTHONPATH=str(scripts), STOP_AT=path, STOP_BY=str(int(number))),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    ) as process:  # fmt: skip
        process.communicate(timeout=project.NEVER)  # until all that hold the pipe have ended
    return process.returncode


def after_line(folder: Path, start: str, number: signal.Signals, *command: str) -> int:
    """Run a command, and send its processes a signal when they have printed such a line; give the exit status."""
    with subprocess.Popen(
        command, cwd=folder, env=project.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert any(line.startswith(start) for line in process.stdout)
        os.killpg(process.pid, number)
        process.communicate(timeout=project.NEVER)
    return process.returncode
