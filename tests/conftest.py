"""What several test files start from: MNIST's real files, a mirror of them, and a repository whose pipeline has run."""

import gzip
import subprocess
import sys
from pathlib import Path

import pytest

from stages.data import RAW, SHA256
from tests import project

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def mnist() -> Path:
    """The folder with MNIST's four files, which are fetched unless they are there."""
    raw = ROOT / RAW
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
def finished(mnist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository after its first `dvc repro`, all committed. Not to be changed: copy it."""
    folder = project.make(tmp_path_factory.mktemp("finished"), mnist)
    project.run(folder, "dvc", "repro")
    project.commit(folder)
    return folder
