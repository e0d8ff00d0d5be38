"""A server in a process of its own, for as long as it is needed."""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def running(*command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Iterator[str]:
    """Run a server on a free port of 127.0.0.1, which stands for ``{port}`` in the command.

    Returns:
        Its URL, once it answers ``/ping``.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    arguments = [argument.format(port=port) for argument in command]
    process = subprocess.Popen(
        arguments, cwd=cwd, env={**os.environ, **(env or {})}, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while not _answers(f"{url}/ping"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no answer from: {' '.join(arguments)}")
            time.sleep(0.1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # with its workers, where it has any
        process.wait(30)


def _answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(url, timeout=5).status == 200)
    except OSError:
        return False
