"""What MLflow keeps of MNIST: the champion by its target, the tutorial's figures, and what DVC restores."""

import json
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest

from lineage import UserError, store
from mnist_mlp import champion, params, record
from mnist_mlp.published import PUBLISHED
from mnist_mlp.recipe import METRICS
from tests import project


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
    assert {name: run.data.params[name] for name in project.TRIED} == {k: str(v) for k, v in project.TRIED.items()}
    assert run.data.metrics["accuracy"] == json.loads((folder / METRICS).read_text())["accuracy"]
    (folder / "params.yaml").write_bytes(good)
    assert project.stages_run(project.run(folder, "dvc", "repro", "plot").stdout) == ["plot"]
    for name in project.RESULTS[1:]:  # without dvc.lock, in which `track` is still that of the other run
        assert (folder / name).read_bytes() == (finished / name).read_bytes(), name


def test_without_a_champion_it_is_said_why_and_what_to_do(
    finished: Path, tmp_path: Path, enter: Callable[[Path], None]
) -> None:
    folder = project.copy(finished, tmp_path / "repository")
    enter(folder)
    (run,) = project.runs(folder)
    mlflow.MlflowClient().delete_registered_model(record.NAME)
    cases: list[tuple[dict[str, object], str, str]] = [
        (
            {"evaluate.register": False},
            "not registered: evaluate.register is false",
            "params.yaml: evaluate.register is false; set it to true, then run `make repro`",
        ),
        (
            {"evaluate.register": True, "evaluate.target_accuracy": 0.999},
            "not registered, because the target is missed; there is no champion of these data",
            "the results miss the target, .*, so there is no champion; change params.yaml, then run `make repro`",
        ),
    ]
    for edit, decision, advice in cases:
        project.edit(folder, edit)
        assert record.decide(run, params.load()) == decision
        assert mlflow.MlflowClient().search_registered_models() == []
        with pytest.raises(UserError, match=f"^MLflow has no usable .*; {advice}$"):
            champion.load()


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
