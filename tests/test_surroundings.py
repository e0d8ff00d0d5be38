"""Wherever a command is started from, it works in its own repository, or says in one line why not."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lineage import UserError, git
from mnist_mlp import params, record
from mnist_mlp.published import published_history
from mnist_mlp.recipe import HISTORY, METRICS, MODEL, PREDICTIONS, data
from tests import project


@pytest.fixture
def repository(finished: Path, tmp_path: Path) -> Path:
    return project.copy(finished, tmp_path / "repository")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


def test_a_command_works_from_another_folder_and_leaves_nothing_there(repository: Path, elsewhere: Path) -> None:
    env = project.environment(PYTHONPATH=str(repository))
    (line,) = project.run(elsewhere, sys.executable, "-m", "stages.track", "--news", env=env).stdout.splitlines()
    assert line.endswith(f"its paths now lead to file://{repository}/mlruns")  # and all is complete: no other news
    assert not list(elsewhere.iterdir())


@pytest.mark.full
def test_a_notebook_beside_the_clone_can_use_the_package(repository: Path, elsewhere: Path) -> None:
    cells = f"""if True:
        import sys
        sys.path.insert(0, {str(repository)!r})
        from mnist_mlp.recipe import data, training
        from mnist_mlp import champion, params
        config = params.load().replaced({{"train.epochs": 1}})
        print(*training.train(training.new_model(config), training.load(config), config))
        version, classify = champion.load()
        print(classify(data.load("t10k")[0][:3]).argmax(1))"""
    done = project.run(elsewhere, sys.executable, "-c", cells)
    assert "test_acc" in done.stdout
    predictions = np.genfromtxt(repository / PREDICTIONS, delimiter=",", names=True)
    assert str(predictions["predicted"][:3].astype(int)) in done.stdout
    assert not list(elsewhere.iterdir())


def test_the_code_of_another_clone_is_refused(repository: Path, tmp_path: Path) -> None:
    """As with PYTHONSAFEPATH, under which Python does not look into the working folder."""
    other = project.copy(repository, tmp_path / "other")
    env = project.environment(PYTHONPATH=str(repository), PYTHONSAFEPATH="1")
    project.run(repository, sys.executable, "-m", "mnist_mlp.params", env=env)
    done = project.run(other / "results", sys.executable, "-m", "stages.evaluate", env=env, check=False)
    line = f"evaluate: this is the code of {repository}, and {other} has its own; unset PYTHONSAFEPATH and PYTHONPATH\n"
    assert (done.returncode, done.stderr) == (2, line)


def test_a_python_without_the_packages_is_told_what_to_do_and_the_results_come_back(
    finished: Path, repository: Path
) -> None:
    """As after `dvc repro` by a DVC from elsewhere, which has removed what the stage makes."""
    for path in (MODEL, HISTORY):
        (repository / path).unlink()
    command = (sys.executable, "-S", "-m", "stages.train")  # -S: without the packages
    done = project.run(repository, *command, env=project.environment(DVC_STAGE="train"), check=False)
    line = f"train: {sys.executable} has no torch, mlflow, dvc; type `make setup`, then `source .venv/bin/activate`; "
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{line}when this is mended, `dvc repro` makes what DVC has removed, or takes it")
    assert len(done.stderr.splitlines()) == 1
    project.run(repository, "dvc", "repro")
    assert project.contents(repository) == project.contents(finished)


@pytest.mark.full
def test_dvc_keeps_no_experiment_in_a_shallow_clone_which_is_said(
    repository: Path, tmp_path: Path, enter: Callable[[Path], None]
) -> None:
    clone = tmp_path / "shallow"
    project.run(tmp_path, "git", "clone", "--quiet", "--depth", "1", f"file://{repository}", str(clone))
    shutil.copytree(repository / data.RAW, clone / data.RAW)
    shutil.copytree(repository / ".dvc/cache", clone / ".dvc/cache")  # as `dvc pull` fills it
    project.run(clone, "git", "config", "user.name", "test")
    project.run(clone, "git", "config", "user.email", "test@localhost")
    experiment = ("dvc", "exp", "run", "--temp", "--name", "tried", "-S", "plot.dpi=80")
    advice = "git fetch --unshallow"
    line = f"DVC keeps no experiment in a shallow clone, so only MLflow has it;\ntype `{advice}`"
    assert line in project.run(clone, *experiment).stdout
    assert [run.info.run_name for run in project.runs(clone)] == ["tried"]
    assert "tried" not in project.run(clone, "dvc", "exp", "list").stdout
    project.run(clone, *advice.split())
    enter(clone)
    assert git.keeps_experiments()


@pytest.mark.recipe
def test_published_figures_may_be_missing_or_empty(repository: Path, enter: Callable[[Path], None]) -> None:
    published = repository / "data/published_history.csv"
    header, *_ = published.read_text().splitlines()
    enter(repository)
    published.write_text(f"{header}\n")
    assert published_history() == []
    published.unlink()
    project.run(repository, sys.executable, "-m", "stages.plot")
    assert ", published" not in project.run(repository, sys.executable, "-m", "mnist_mlp.verdict").stdout
    assert "published" not in record.summary(params.load(), json.loads(METRICS.read_text()))
    for wrong in ("epoch,accuracy\n0,0.9\n", f"{header}\n1,1,1,1,1\n", f"{header}\n0,nan,1,1,1\n"):
        published.write_text(wrong)
        with pytest.raises(
            UserError, match=r"^data/published_history.csv: each row needs the epoch, from 0, and number"
        ):
            published_history()


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
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{project.REPOSITORY}"}
    done = subprocess.run([sys.executable, "-m", command], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
