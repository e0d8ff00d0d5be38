"""What people see first: MLflow's tables, DVC's page of plots, and a terminal of 80 columns."""

import base64
import json
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException

from lineage import pages, store
from mnist_mlp import record
from mnist_mlp.published import PUBLISHED
from mnist_mlp.recipe.history import FIGURES
from mnist_mlp.recipe.params import SOURCES
from tests import project

WIDTH = 80


def client(folder: Path) -> mlflow.MlflowClient:
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    return mlflow.MlflowClient()


def experiment(folder: Path, name: str = record.EXPERIMENT) -> Experiment:
    found = client(folder).get_experiment_by_name(name)
    assert found
    return found


def table(folder: Path, name: str = record.EXPERIMENT) -> dict[str, Any]:
    """Decode the view of an experiment's runs, as MLflow's page does."""
    view = json.loads(experiment(folder, name).tags[pages.TAG])
    assert view["name"] == pages.VIEW
    kind, _, state = view["state"].partition(";")
    assert kind == "deflate"
    found: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(state)))
    return found


def test_the_address_that_track_prints_opens_a_table_with_numbers_the_best_run_first(finished: Path) -> None:
    lead = rf"^to see it: cd {finished} && (\S+/mlflow) ui\n(.+)$"
    ((program, address),) = re.findall(lead, (finished / project.OUTPUT).read_text(), re.MULTILINE)
    assert os.access(program, os.X_OK)
    identity = experiment(finished).experiment_id
    assert address == (
        f"http://127.0.0.1:5000/#/experiments/{identity}/runs?workflowType=machine_learning&viewStateShareKey=results"
    )
    found = table(finished)
    assert (found["orderByKey"], found["orderByAsc"]) == ("metrics.`accuracy`", False)
    (run,) = project.runs(finished)
    for column in found["selectedColumns"]:
        kind, name = re.fullmatch(r"(metrics|params)\.`(.*)`", column).groups()  # type: ignore[union-attr]
        assert name in getattr(run.data, kind)
    assert "*Model training* once" in experiment(finished).tags["mlflow.note.content"]


def test_the_view_is_of_the_mlflow_that_is_installed_by_the_lock() -> None:
    """After a renewal of the libraries: look at the page, then name the new release."""
    assert f"mlflow=={pages.RELEASE} " in (project.REPOSITORY / "requirements.txt").read_text()


def test_a_server_of_another_release_gets_no_view_and_one_that_refuses_it_fails_no_run(
    tmp_path: Path, enter: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(tmp_path)
    store.connect(record.EXPERIMENT)
    assert "viewStateShareKey" in record.lead()
    with monkeypatch.context() as patch:
        patch.setattr(pages, "RELEASE", "0.0")
        assert "viewStateShareKey" not in record.lead()

    def refuse(*_: object) -> None:
        raise MlflowException("no more tags")

    monkeypatch.setattr(mlflow.MlflowClient, "set_experiment_tag", refuse)
    monkeypatch.setattr(pages, "VIEW", "another")
    monkeypatch.setattr(pages, "TAG", "another")
    assert record.lead().endswith("workflowType=machine_learning")


def test_the_line_to_the_page_quotes_the_folder_and_tells_no_password_and_a_users_note_stays(
    tmp_path: Path, enter: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    enter(folder)
    store.connect(record.STUDY)
    assert record.lead_to_study(["a"]).startswith(f"to see it: cd '{folder}' && ")
    grouped = table(folder, record.STUDY)["groupBy"]["groupByKeys"]
    assert grouped == [{"mode": "tag", "groupByData": record.SETTING}]
    identity = experiment(folder, record.STUDY).experiment_id
    client(folder).set_experiment_tag(identity, "mlflow.note.content", "mine")
    monkeypatch.setattr(store, "CHOSEN", "sqlite:////elsewhere.db")
    assert '/mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"\n' in record.lead_to_study(["a"])
    monkeypatch.setattr(store, "CHOSEN", "http://user:secret@host/")
    assert record.lead_to_study(["a"]).startswith("to see it, open\nhttp://host/#/experiments/")
    assert experiment(folder, record.STUDY).tags["mlflow.note.content"] == "mine"


def test_a_runs_page_begins_with_the_recipe_and_ends_with_where_the_data_come_from(finished: Path) -> None:
    (run,) = project.runs(finished)
    names = list(run.data.params)
    assert names[-2:] == list(SOURCES)
    (version,) = client(finished).search_model_versions("name LIKE '%'")
    assert f"make verify MODEL={run.info.run_id}" in (version.description or "")
    assert "champion" in (client(finished).get_registered_model(version.name).description or "")
    assert run.outputs is not None
    (logged,) = run.outputs.model_outputs
    name = f"{record.EXPERIMENT}-{run.data.tags['model.md5'][:7]}"
    assert client(finished).get_logged_model(logged.model_id).name == name


@pytest.mark.recipe
def test_dvc_shows_each_figure_once_ours_and_the_published_one(finished: Path) -> None:
    shown = json.loads(project.run(finished, "dvc", "plots", "show", "--json").stdout)["data"]
    shown = {name.removeprefix("dvc.yaml::"): plots for name, plots in shown.items()}
    curves = [name.replace("_", " ") for name in FIGURES]
    assert shown.keys() == {*curves, "confusion", "results/history.csv"}
    for name, figure in zip(curves, FIGURES, strict=True):
        content = shown[name][0]["content"]
        assert {row["filename"] for row in content["data"]["values"]} == {"results/history.csv", str(PUBLISHED)}
        assert f"'field': '{figure}'" in str(content)
    axes = shown["confusion"][0]["content"]["spec"]["encoding"]
    assert (axes["x"]["field"], axes["y"]["field"]) == ("predicted", "actual")  # as in the picture


def test_a_terminal_of_80_columns_is_wide_enough_and_is_told_each_thing_once(finished: Path) -> None:
    output = (finished / project.OUTPUT).read_text()
    ours = [line for line in output.splitlines() if not line.startswith(("to see it: ", "http://"))]
    assert [line for line in ours if len(line) > WIDTH] == []
    number = r"\d\.\d{4} +\d+\.\d\d %"
    epochs = [
        line for line in ours if re.fullmatch(rf"epoch +\d+  train {number}(  val {number})?  test {number}", line)
    ]
    assert len(epochs) == project.SMALL["train.epochs"]
    assert output.count("MLflow: ") == output.count("http://") == 1
    assert "loading PyTorch" in output
