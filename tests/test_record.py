"""What MLflow keeps of MNIST: the champion by its target, the tutorial's figures, and what DVC restores."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest

from lineage import lock, registry, store
from mnist_mlp import record
from mnist_mlp.published import PUBLISHED
from mnist_mlp.recipe import METRICS
from tests import project

TRACK = (sys.executable, "-m", "stages.track")


@pytest.fixture
def repository(finished: Path, tmp_path: Path) -> Path:
    """A finished repository in another place, with its MLflow store."""
    return project.copy(finished, tmp_path / "repository")


def client(folder: Path) -> mlflow.MlflowClient:
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    return mlflow.MlflowClient()


@pytest.mark.full
def test_going_back_trains_nothing_again_and_stages_from_the_cache_are_a_run_too(
    finished: Path, tried: Path, tmp_path: Path
) -> None:
    folder = project.copy(tried, tmp_path / "repository", store=False)
    good = (folder / "params.yaml").read_bytes()
    project.edit(folder, project.TRIED)
    # DVC restores no plain output that is in Git, so `plot` draws again.
    assert project.stages_run(project.run(folder, "dvc", "repro").stdout) == ["plot", "track"]
    (run,) = project.runs(folder)
    assert run.data.params["train.lr"] == "0.05"
    assert run.data.metrics["accuracy"] == json.loads((folder / METRICS).read_text())["accuracy"]
    (folder / "params.yaml").write_bytes(good)
    assert project.stages_run(project.run(folder, "dvc", "repro", "plot").stdout) == ["plot"]
    for name in project.RESULTS[1:]:  # without dvc.lock, in which `track` is still that of the other run
        assert (folder / name).read_bytes() == (finished / name).read_bytes(), name


@pytest.mark.full
def test_a_stage_that_is_renamed_leaves_no_trace(repository: Path) -> None:
    """DVC keeps the old stage in dvc.lock."""
    pipeline = repository / "dvc.yaml"
    pipeline.write_text(pipeline.read_text().replace("  plot:\n    desc", "  draw:\n    desc"))
    project.run(repository, "dvc", "repro")
    assert {"plot", "draw"} <= lock.read_stages((repository / "dvc.lock").read_bytes()).keys()
    pipeline.write_text(pipeline.read_text().replace("stages/plot.py", "stages/draw.py").replace("s.plot", "s.draw"))
    (repository / "stages/plot.py").rename(repository / "stages/draw.py")
    project.run(repository, "dvc", "repro")
    project.run(repository, *TRACK)
    project.commit(repository)
    done = project.run(repository, sys.executable, "-m", "mnist_mlp.verdict", "--check")
    assert "reproduced: model" in done.stdout


@pytest.mark.full
def test_evaluate_register_false_leaves_the_registry_alone(repository: Path) -> None:
    client(repository).delete_registered_model(record.NAME)
    project.edit(repository, {"evaluate.register": False})
    assert "not registered: evaluate.register is false" in project.run(repository, "dvc", "repro").stdout
    assert client(repository).search_registered_models() == []
    for command in (("predict", "any.png"), ("verify", f"models:/{record.NAME}@{registry.CHAMPION}")):
        done = project.run(repository, sys.executable, "-m", f"mnist_mlp.{command[0]}", command[1], check=False)
        assert done.stderr.endswith(
            "; params.yaml: evaluate.register is false; set it to true, then run `make repro`\n"
        )


@pytest.mark.full
def test_a_missed_target_is_said_and_there_is_no_champion(repository: Path) -> None:
    client(repository).delete_registered_model(record.NAME)
    project.edit(repository, {"evaluate.target_accuracy": 0.999})
    output = project.run(repository, "dvc", "repro").stdout
    assert "not registered, because the target is missed; there is no champion of these data" in output
    done = project.run(repository, sys.executable, "-m", "mnist_mlp.predict", "any.png", check=False)
    assert "; the results miss the target, " in done.stderr
    assert "so there is no champion; change params.yaml, then run `make repro`\n" in done.stderr


@pytest.fixture
def published(mnist: Path, tmp_path: Path, enter: Callable[[Path], None]) -> Callable[[], list[mlflow.entities.Run]]:
    """A new store, in which the tutorial's history is a run; finds that run."""
    (tmp_path / PUBLISHED).parent.mkdir()
    (tmp_path / PUBLISHED).write_bytes((project.REPOSITORY / PUBLISHED).read_bytes())
    enter(tmp_path)
    store.connect(record.EXPERIMENT)
    record.publish(record.EXPERIMENT)
    return lambda: store.search(record.EXPERIMENT, f"attributes.run_name = '{record.PUBLISHED_RUN}'")


def assert_published(run: mlflow.entities.Run) -> None:
    rows = [row.split(",") for row in Path(PUBLISHED).read_text().splitlines()[1:]]
    points = mlflow.MlflowClient().get_metric_history(run.info.run_id, "test_acc")
    assert [(point.step, f"{point.value:.6f}") for point in points] == [(int(row[0]), row[4]) for row in rows]
    assert (run.info.status, run.data.tags[record.COLOUR]) == ("FINISHED", "#000000")


@pytest.mark.recipe
def test_the_published_history_is_a_run_which_stays_away_if_a_user_deletes_it(
    published: Callable[[], list[mlflow.entities.Run]],
) -> None:
    (run,) = published()
    assert_published(run)
    assert [file.path for file in mlflow.MlflowClient().list_artifacts(run.info.run_id)] == [PUBLISHED.name]
    mlflow.MlflowClient().delete_run(run.info.run_id)
    record.publish(record.EXPERIMENT)
    assert published() == []


@pytest.mark.recipe
def test_the_published_run_is_completed_after_a_kill_and_kept_once(
    published: Callable[[], list[mlflow.entities.Run]], monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = store.experiment_id(record.EXPERIMENT)
    monkeypatch.setattr(record, "PUBLISHED_RUN", "another")
    mlflow.MlflowClient().create_run(identity, run_name="another")  # and here the process was killed
    for _ in range(2):
        record.publish(record.EXPERIMENT)
        (run,) = store.search(record.EXPERIMENT, "attributes.run_name = 'another'")
        assert_published(run)
