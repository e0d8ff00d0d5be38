"""A server in a process of its own, for as long as it is needed."""

import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

NEVER = 300  # seconds. Only a server that hangs takes so long, on a busy machine too


class Server(NamedTuple):
    url: str
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """End it and its workers, without a chance to say goodbye."""
        os.killpg(self.process.pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(
    *command: str, port: int | None = None, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Run a server on 127.0.0.1, on a free port unless told which; `{port}` in the command stands for it.

    It is yielded once it answers `/health`, and ended, with its workers, at the end.
    """
    port = port or free_port()
    server = Server(
        f"http://127.0.0.1:{port}",
        subprocess.Popen(
            [argument.format(port=port) for argument in command],
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        ),
    )
    try:
        deadline = time.monotonic() + NEVER
        while not _answers(server.url):
            if server.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no answer from: {' '.join(command)}")
            time.sleep(0.1)
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGTERM)
        server.process.wait(NEVER)


@contextmanager
def silent() -> Iterator[tuple[int, list[object]]]:
    """Accept all connections and never answer; give the port, and a list that grows with each connection."""
    accepted: list[object] = []

    def accept() -> None:
        with suppress(OSError):  # the end
            while True:
                accepted.append(listener.accept())

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield int(listener.getsockname()[1]), accepted
        listener.shutdown(socket.SHUT_RDWR)


def _answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(f"{url}/health", timeout=5).status == 200)
    except OSError:
        return False
