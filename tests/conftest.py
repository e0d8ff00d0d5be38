"""What several test files start from: MNIST's real files, and repositories whose pipeline has run, made once."""

import gzip
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
from filelock import FileLock
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

import lineage
from mnist_mlp.recipe.data import RAW, SHA256
from tests import project

ROOT = Path(__file__).parents[1]
# A shell starts what it runs in the background with Ctrl-C ignored, and all that is started from there inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Two tests at a time on two cores: threads of one process that wait for each other would only slow down the other.
os.environ["OMP_NUM_THREADS"] = "1"

Make = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Make:
    """Make a folder in one of pytest's processes; the others wait for it. Not to be changed: copy it."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent

    def made(name: str, make: Callable[[Path], None]) -> Path:
        folder, ready = shared / name, shared / f"{name}.ready"
        with FileLock(shared / f"{name}.lock"):
            if not ready.exists():
                folder.mkdir()
                make(folder)
                ready.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def mnist(once: Make) -> Path:
    """The folder with MNIST's four files, which are fetched unless they are there."""

    def fetch(_: Path) -> None:
        if not all((ROOT / RAW / name).exists() for name in SHA256):
            subprocess.run([sys.executable, "-m", "stages.download"], cwd=ROOT, check=True)

    once("mnist", fetch)
    return ROOT / RAW


@pytest.fixture(scope="session")
def mirror(mnist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the four files gzipped, to be used as ``file://{mirror}``."""
    folder = tmp_path_factory.mktemp("mirror")
    for name in SHA256:
        (folder / f"{name}.gz").write_bytes(gzip.compress((mnist / name).read_bytes(), compresslevel=1))
    return folder


@pytest.fixture(scope="session")
def finished(mnist: Path, once: Make) -> Path:
    """A repository after its first `dvc repro`, all committed, with what that has printed."""

    def make(folder: Path) -> None:
        project.make(folder, mnist)
        output = project.run(folder, "dvc", "repro").stdout
        (folder / project.OUTPUT).write_text(output)
        project.commit(folder)

    return once("finished", make)


@pytest.fixture(scope="session")
def tried(finished: Path, once: Make) -> Path:
    """The same after one more `dvc repro`, with `project.TRIED`, and one that goes back."""

    def make(folder: Path) -> None:
        project.copy(finished, folder)
        project.edit(folder, project.TRIED)
        project.run(folder, "dvc", "repro")
        project.run(folder, "git", "checkout", "--quiet", "params.yaml")
        project.run(folder, "dvc", "repro")

    return once("tried", make)


@pytest.fixture(scope="session")
def fitted(once: Make) -> Path:
    """The project in tests/toy with a copy of ``lineage``, after its first `dvc repro`, all committed."""

    def make(folder: Path) -> None:
        shutil.copytree(ROOT / "tests/toy", folder, dirs_exist_ok=True)
        shutil.copytree(ROOT / "lineage", folder / "lineage")
        (folder / "gitignore").rename(folder / ".gitignore")
        project.run(folder, "git", "init", "--quiet", "--initial-branch", "main")
        project.run(folder, "dvc", "init", "--quiet")
        project.commit(folder)
        project.run(folder, "dvc", "repro")
        project.commit(folder)

    return once("fitted", make)


@pytest.fixture
def enter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Let this process work in a repository, as a command that is started there does."""

    def go(folder: Path) -> None:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(lineage, "HERE", folder)
        monkeypatch.setattr(lineage, "ROOT", folder)
        for name in [name for name in os.environ if name.startswith(("DVC_", "MLFLOW_TRACKING_"))]:
            monkeypatch.delenv(name)
        _artifact_repos_cache.clear()  # its places are known by the ids of runs, which a copy of a store has too

    yield go
    mlflow.set_tracking_uri("")


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command's ``main`` in this process; give exit status, output and errors."""

    def run(main: Callable[[], object], *arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        status = 0
        try:
            main()
        except SystemExit as ended:
            status = int(ended.code or 0)
        return status, *capsys.readouterr()

    return run
