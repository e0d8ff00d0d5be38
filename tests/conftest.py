"""What several test files start from: MNIST's real files, a mirror of them, and a repository whose pipeline has run."""

import gzip
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from mnist_mlp.recipe.data import RAW, SHA256
from tests import project

ROOT = Path(__file__).parents[1]
# A shell starts what it runs in the background with Ctrl-C ignored, and all that is started from there inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The files that take longest, so that they start first. The second needs no repository while the first one makes it.
FIRST = (
    "test_make_it_yours",
    "test_server",
    "test_predict",
    "test_experiments",
    "test_study",
    "test_verify",
    "test_runs",
    "test_pipeline",
)


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # pytest-xdist would begin with the files of the most tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder for all of pytest's processes."""
    folder = tmp_path_factory.getbasetemp()
    return folder if worker_id == "master" else folder.parent


@pytest.fixture(scope="session")
def mnist(shared: Path) -> Path:
    """The folder with MNIST's four files, which are fetched unless they are there."""
    raw = ROOT / RAW
    with FileLock(shared / "mnist.lock"):
        if not all((raw / name).exists() for name in SHA256):
            subprocess.run([sys.executable, "-m", "stages.download"], cwd=ROOT, check=True)
    return raw


@pytest.fixture(scope="session")
def mirror(mnist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the four files gzipped, to be used as ``file://{mirror}``."""
    folder = tmp_path_factory.mktemp("mirror")
    for name in SHA256:
        (folder / f"{name}.gz").write_bytes(gzip.compress((mnist / name).read_bytes(), compresslevel=1))
    return folder


@pytest.fixture(scope="session")
def finished(mnist: Path, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository after its first `dvc repro`, all committed. Not to be changed: copy it."""

    def make() -> Path:
        folder = project.make(tmp_path_factory.mktemp("finished"), mnist)
        project.run(folder, "dvc", "repro")
        project.commit(folder)
        return folder

    return once(shared, "finished", make)


@pytest.fixture(scope="session")
def tried(finished: Path, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after one more `dvc repro`, with `project.TRIED`, and one that goes back. Not to be changed: copy it."""

    def make() -> Path:
        folder = project.copy(finished, tmp_path_factory.mktemp("tried") / "repository")
        project.edit(folder, project.TRIED)
        project.run(folder, "dvc", "repro")
        project.run(folder, "git", "checkout", "--quiet", "params.yaml")
        project.run(folder, "dvc", "repro")
        return folder

    return once(shared, "tried", make)


def once(shared: Path, name: str, make: Callable[[], Path]) -> Path:
    """Make a folder in one of pytest's processes; the others wait for it."""
    where = shared / f"{name}.txt"
    with FileLock(shared / f"{name}.lock"):
        if not where.exists():
            where.write_text(str(make()))
    return Path(where.read_text())
