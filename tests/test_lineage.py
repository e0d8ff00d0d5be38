"""The link in another project: three small stages without PyTorch, on a copy of the folder ``lineage``."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Run

from tests import project


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[Path]:
    """The other project, committed."""
    folder = tmp_path / "toy"
    shutil.copytree(project.REPOSITORY / "tests/toy", folder)
    shutil.copytree(project.REPOSITORY / "lineage", folder / "lineage")
    (folder / "gitignore").rename(folder / ".gitignore")
    project.run(folder, "git", "init", "--quiet", "--initial-branch", "main")
    project.run(folder, "dvc", "init", "--quiet")
    project.commit(folder)
    yield folder
    mlflow.set_tracking_uri("")


def command(folder: Path, *arguments: str) -> str:
    return project.run(folder, sys.executable, "-m", "toy", *arguments).stdout


def runs(folder: Path) -> list[Run]:
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    found: list[Run] = mlflow.search_runs(experiment_names=["line"], output_format="list")
    return found


def test_in_another_project_each_state_of_dvc_lock_is_one_run_which_is_proved(toy: Path) -> None:
    project.run(toy, "dvc", "repro")
    project.commit(toy)
    (first,) = runs(toy)
    assert (first.info.status, first.data.params) == ("FINISHED", {"fit.epochs": "5", "fit.lr": "0.1"})
    project.edit(toy, {"fit.lr": 0.2})
    project.run(toy, "dvc", "repro")
    assert len(runs(toy)) == 2
    project.run(toy, "git", "checkout", "--quiet", ".")
    project.run(toy, "dvc", "repro")
    assert len(runs(toy)) == 2
    assert "was complete; champion" in command(toy, "track")
    for run in runs(toy):
        assert command(toy, "prove", run.info.run_id).endswith("identical\n")
    mlflow.MlflowClient().log_metric(first.info.run_id, "loss", 0.5, step=3)
    assert "epoch 3: loss is 0.5 in the run" in command(toy, "prove", first.info.run_id)


def test_in_another_project_a_lost_store_is_made_anew_and_a_training_is_completed(toy: Path) -> None:
    project.run(toy, "dvc", "repro", "score")
    (training,) = runs(toy)
    command(toy, "track")
    (run,) = runs(toy)
    assert run.info.run_id == training.info.run_id
    (toy / "mlflow.db").unlink()
    shutil.rmtree(toy / "mlruns")
    assert "is now complete; champion 1" in command(toy, "track")
    (new,) = runs(toy)
    assert new.data.tags["dvc.lock.md5"] == run.data.tags["dvc.lock.md5"]
    assert new.data.metrics == run.data.metrics
    assert command(toy, "prove", "models:/line@champion").endswith("identical\n")
