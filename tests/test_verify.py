"""`make verify`: what a run recorded is run again, and is the same, or it is said what is not."""

import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

from stages import MODEL, tracking
from tests import project

CHAMPION = f"models:/{tracking.REGISTERED}@{tracking.CHAMPION}"


@pytest.fixture
def repository(finished: Path, tmp_path: Path) -> Path:
    """A finished repository to do things to; its store's files stay in the first one's `mlruns`."""
    folder = tmp_path / "repository"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("mlruns"))
    return folder


def verify(folder: Path, model: str) -> subprocess.CompletedProcess[str]:
    return project.run(folder, sys.executable, "-m", "stages.verify", model, check=False)


def files(folder: Path) -> dict[Path, tuple[int, bytes]]:
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def test_a_champion_is_proved_and_nothing_is_touched(finished: Path) -> None:
    (run,) = project.runs(finished)
    before = files(finished)
    done = verify(finished, CHAMPION)
    assert done.returncode == 0, done.stderr
    assert "Running stage 'train'" in done.stdout
    commit = run.data.tags["git.commit"]
    assert f"identical: run {run.info.run_id}, commit {commit[:10]}, every figure and byte" in done.stdout
    assert files(finished) == before


def test_a_figure_that_does_not_come_out_again_is_shown_with_both_values(repository: Path) -> None:
    """And neither later commits, nor the workspace's parameters, code and results, have to do with it."""
    (run,) = project.runs(repository)
    client = mlflow.MlflowClient(f"sqlite:///{repository}/mlflow.db")
    (true,) = (m.value for m in client.get_metric_history(run.info.run_id, "test_loss") if m.step == 1)
    client.log_metric(run.info.run_id, "test_loss", 0.123456, step=1)
    client.log_metric(run.info.run_id, "accuracy", 1.0)  # differs too, but later
    client.set_tag(run.info.run_id, "torch", "1.0")
    project.edit(repository, {"train.lr": 0.05})
    (repository / "stages/train.py").write_text("raise SystemExit")
    project.commit(repository)
    (repository / MODEL).unlink()

    done = verify(repository, run.info.run_id)
    assert done.returncode == 1, done.stderr
    torch = run.data.tags["torch"]
    assert done.stdout.splitlines()[-3:] == [
        f"different: run {run.info.run_id}, commit {run.data.tags['git.commit'][:10]}",
        f"epoch 1: test_loss is 0.123456 in the run, {true} here",
        f"torch is 1.0 in the run, {torch} here",
    ]


def test_a_run_from_uncommitted_code_is_refused(repository: Path) -> None:
    with (repository / "stages/train.py").open("a") as file:
        file.write("# not committed\n")
    (repository / "picture.png").touch()  # which has no part in it
    script = (
        "from stages import params, tracking\nwith tracking.new_run(params.load()): pass"  # as `train` begins and ends
    )
    project.run(repository, sys.executable, "-c", script)
    (run, _) = project.runs(repository)
    done = verify(repository, run.info.run_id)
    assert done.returncode == 2
    assert done.stdout == ""
    reason = "was made from uncommitted code, which is lost: M stages/train.py"
    assert done.stderr == f"verify: run {run.info.run_id} {reason}\n"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("0123456789abcdef0123456789abcdef", "Run with id=0123456789abcdef0123456789abcdef not found"),
        ("models:/mnist-mlp@nobody", "alias nobody not found"),
        ("models:/mnist-mlp", "a registered model is models:/NAME@ALIAS or models:/NAME/VERSION"),
    ],
)
def test_an_unknown_model_is_refused_in_one_line(finished: Path, model: str, reason: str) -> None:
    done = verify(finished, model)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert reason in done.stderr


def test_a_commit_of_another_repository_is_refused(repository: Path) -> None:
    (run,) = project.runs(repository)
    client = mlflow.MlflowClient(f"sqlite:///{repository}/mlflow.db")
    client.set_tag(run.info.run_id, "git.commit", "0" * 40)
    done = verify(repository, CHAMPION)
    assert done.returncode == 2
    assert f"commit {'0' * 40}, which is not in this repository; try `git fetch`" in done.stderr


def test_without_a_store_none_is_made(repository: Path) -> None:
    (repository / "mlflow.db").unlink()
    done = verify(repository, CHAMPION)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "no MLflow store" in done.stderr
    assert not (repository / "mlflow.db").exists()
    assert not (repository / "mlruns").exists()
