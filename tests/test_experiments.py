"""DVC's experiments, remotes and MLflow's registry: every experiment is one run, and none is lost."""

import json
import shutil
import subprocess
from pathlib import Path

import mlflow
import pytest

from lineage import registry
from mnist_mlp import record
from mnist_mlp.recipe import METRICS
from tests import project
from tests.conftest import Make

pytestmark = pytest.mark.full

UP_TO_DATE = "Data and pipelines are up to date."
# Metrics and parameters only: the columns with a slash are hashes of code and data.
TABLE = ("dvc", "exp", "show", "--no-pager", "--only-changed", "--drop", ".*/|Created|Executor|batch_mean|loss")


@pytest.fixture(scope="session")
def explored(tried: Path, once: Make) -> Path:
    """A finished repository after four queued experiments, two at a time, on a store that did not exist.

    DVC's cache has the results of the first, as after a look at the same value without an experiment.
    """

    def make(folder: Path) -> None:
        project.copy(tried, folder, store=False)
        project.run(folder, "dvc", "exp", "run", "--queue", "-S", "train.lr=0.05,0.08")
        diverging = ("-S", f"train.lr={project.DIVERGING}", "--name", "diverging")
        project.run(folder, "dvc", "exp", "run", "--queue", *diverging)
        project.run(folder, "dvc", "exp", "run", "--queue", "-S", "plot.dpi=80", "--name", "plots-only")
        quiet = subprocess.DEVNULL  # DVC's workers keep its output open, long after the experiments
        command = ["dvc", "exp", "run", "--run-all", "--jobs", "2"]
        subprocess.run(command, cwd=folder, env=project.environment(), stdout=quiet, stderr=quiet)

    return once("explored", make)


def experiments(folder: Path) -> dict[str, str]:
    """Read the names and states of the experiments that start from HEAD."""
    revisions = json.loads(project.run(folder, "dvc", "exp", "show", "--json").stdout)
    listed = next(revision["experiments"] or [] for revision in revisions if revision["name"] == "main")
    return {found["name"] or found["revs"][0]["name"]: found["executor"]["state"] for found in listed}


def good(folder: Path) -> list[str]:
    return sorted(name for name, state in experiments(folder).items() if state == "success")


def test_every_queued_experiment_is_one_run_of_the_same_name_in_the_repositorys_store(explored: Path) -> None:
    head = project.run(explored, "git", "rev-parse", "HEAD").stdout.strip()
    runs = project.runs(explored)
    status = {"success": "FINISHED", "failed": "FAILED"}
    assert len(runs) == 4
    assert {run.info.run_name: run.info.status for run in runs} == {
        name: status[state] for name, state in experiments(explored).items()
    }
    assert {(run.data.params["train.lr"], run.data.params["plot.dpi"]): run.info.status for run in runs} == {
        ("0.05", "100"): "FINISHED", ("0.08", "100"): "FINISHED",
        (str(project.DIVERGING), "100"): "FAILED", (str(project.LR), "80"): "FINISHED",
    }  # fmt: skip
    for run in runs:
        tags = run.data.tags
        assert (tags["git.commit"], tags["git.branch"], tags["git.patch.md5"]) == (head, "main", "none")
        if run.info.status == "FINISHED":
            assert run.data.metrics.keys() >= {"test_acc", "accuracy"}
            assert (explored / "mlruns") in Path(run.info.artifact_uri.removeprefix("file://")).parents
            assert {"plots", "metrics.json"} <= {
                artifact.path for artifact in mlflow.MlflowClient().list_artifacts(run.info.run_id)
            }


def test_the_champion_is_the_best_even_of_models_registered_at_once(explored: Path) -> None:
    ended = [run for run in project.runs(explored) if run.info.status == "FINISHED"]
    accuracies = {run.data.tags["model.md5"]: run.data.metrics["accuracy"] for run in ended}
    client = mlflow.MlflowClient()
    versions = client.search_model_versions(f"name = '{record.NAME}'")
    assert {version.tags["model.md5"]: float(version.tags["accuracy"]) for version in versions} == accuracies
    champion = client.get_model_version_by_alias(record.NAME, registry.CHAMPION)
    assert float(champion.tags["accuracy"]) == max(accuracies.values())


@pytest.mark.recipe
def test_the_table_of_experiments_fits_a_terminal(explored: Path) -> None:
    lines = project.run(explored, *TABLE, env=project.environment(COLUMNS="80")).stdout.splitlines()
    table = "\n".join(lines)
    assert max(map(len, lines)) <= 80
    assert "…" not in table
    assert all(word in table for word in ("accuracy", "train.lr", "diverging", "Failed", *good(explored)))


def test_two_revisions_compare(explored: Path) -> None:
    names = [name for name in good(explored) if name != "plots-only"]
    metrics = project.run(explored, "dvc", "metrics", "diff", "--all", "--json", *names).stdout
    numbers = {name for name, value in json.loads((explored / METRICS).read_text()).items() if isinstance(value, float)}
    assert json.loads(metrics)[str(METRICS)].keys() == numbers >= {"accuracy", "batch_mean_accuracy", "loss"}
    project.run(explored, "dvc", "plots", "diff", *names)
    page = (explored / "dvc_plots/index.html").read_text()
    assert all(word in page for word in ("train_loss", "test_acc", "predicted", *names))
    assert project.run(explored, "git", "status", "--porcelain").stdout == ""


def test_a_removed_experiment_stays_readable_in_mlflow(explored: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    shutil.copytree(explored, folder)
    project.run(folder, "dvc", "queue", "remove", "--failed")
    project.run(folder, "dvc", "exp", "remove", *experiments(folder))
    assert experiments(folder) == {}
    assert len(project.runs(folder)) == 4
    version = mlflow.MlflowClient().get_model_version_by_alias(record.NAME, registry.CHAMPION)
    assert mlflow.pyfunc.load_model(f"models:/{record.NAME}/{version.version}")


def test_a_clone_pulls_data_model_and_experiments_and_computes_nothing_again(
    finished: Path, explored: Path, tmp_path: Path
) -> None:
    folder, remote, clone = tmp_path / "repository", tmp_path / "remote.git", tmp_path / "a clone"
    shutil.copytree(explored, folder)
    store = ("dvc", "remote", "add", "--local", "--default", "store", str(tmp_path / "store"))
    name = good(folder)[0]
    project.run(tmp_path, "git", "init", "--quiet", "--bare", "--initial-branch", "main", str(remote))
    project.run(folder, "git", "remote", "add", "origin", str(remote))
    project.run(folder, "git", "push", "--quiet", "origin", "main")
    project.run(folder, *store)
    project.run(folder, "dvc", "push")
    project.run(folder, "dvc", "exp", "push", "origin", name)

    project.run(tmp_path, "git", "clone", "--quiet", str(remote), str(clone))
    project.run(clone, *store)
    project.run(clone, "dvc", "pull")
    assert project.stages_run(project.run(clone, "dvc", "repro").stdout) == ["track"]
    assert project.contents(clone) == project.contents(finished)
    assert project.run(clone, "git", "status", "--porcelain").stdout == ""

    project.run(clone, "dvc", "exp", "pull", "origin", name)
    project.run(clone, "dvc", "exp", "apply", name)
    assert project.stages_run(project.run(clone, "dvc", "repro").stdout) == ["track"]
    assert UP_TO_DATE in project.run(clone, "dvc", "repro").stdout
    assert len(project.runs(clone)) == 2  # MLflow of the clone has been told of both
    assert project.contents(clone) != project.contents(finished)
