"""What an MLflow run is: one state of code, parameters and model, complete, and mended by one command."""

import os
import re
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
import yaml
from mlflow.entities import Run

from lineage import UserError, git, lock, registry, store
from mnist_mlp import record
from mnist_mlp.recipe import data
from tests import project, stopping

TRACK = (sys.executable, "-m", "stages.track")


@pytest.fixture
def repository(finished: Path, tmp_path: Path) -> Path:
    """A finished repository in another place, with its MLflow store."""
    return project.copy(finished, tmp_path / "repository")


def client(folder: Path) -> mlflow.MlflowClient:
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    return mlflow.MlflowClient()


def model_id(run: Run) -> str:
    """Name the run's model; after one was lost, the one that took its place."""
    assert run.outputs is not None
    models = [mlflow.get_logged_model(output.model_id) for output in run.outputs.model_outputs]
    return max(models, key=lambda model: model.creation_timestamp).model_id


def assert_complete(folder: Path, run: Run) -> None:
    """As after one `dvc repro` from an empty store, with the files that are in `results` now."""
    found = client(folder)
    assert run.info.status == "FINISHED"
    history = (folder / "results/history.csv").read_text().splitlines()
    points = found.get_metric_history(run.info.run_id, "test_acc")
    assert [f"{point.value:.6f}" for point in points] == [row.split(",")[-1] for row in history[1:]]
    assert {artifact.path for artifact in found.list_artifacts(run.info.run_id)} >= {
        "params.yaml", "dvc.lock.yaml", "metrics.json", "per_digit.json", "plots"
    }  # fmt: skip
    for path in ("metrics.json", "plots/test_acc.png", "plots/wrong_digits.png"):
        content = Path(found.download_artifacts(run.info.run_id, path)).read_bytes()
        assert content == (folder / "results" / path).read_bytes()
    location = Path(found.get_logged_model(model_id(run)).artifact_location.removeprefix("file://"))
    assert folder in location.parents
    assert list(location.rglob("*.pt2"))


def champion(folder: Path) -> str:
    """Load the champion in a process of its own, for MLflow remembers where a model was; give its version."""
    script = "from mnist_mlp import champion\nprint(champion.load()[0].version)"
    return project.run(folder, sys.executable, "-c", script).stdout.strip()


def alias(folder: Path) -> str:
    """Read which version is the champion, without loading it."""
    return str(client(folder).get_model_version_by_alias(record.NAME, registry.CHAMPION).version)


def test_other_parameters_of_later_stages_are_another_run_of_the_same_model(repository: Path) -> None:
    """Among them a small number: DVC writes 1e-05, which some readers of YAML take for text."""
    (before,) = project.runs(repository)
    project.edit(repository, {"plot.dpi": 90})
    params = repository / "params.yaml"
    params.write_text(params.read_text().replace("target_accuracy: 0.5", "target_accuracy: 1e-5"))
    assert project.stages_run(project.run(repository, "dvc", "repro").stdout) == ["evaluate", "plot", "track"]
    new, old = project.runs(repository)
    assert (old.info.status, old.data.to_dictionary()) == ("FINISHED", before.data.to_dictionary())
    commit = new.data.tags["git.commit"][:7]
    assert new.info.run_name == f"main-{commit} evaluate.target_accuracy=1e-05 plot.dpi=90"
    assert (new.data.params["plot.dpi"], new.data.params["evaluate.target_accuracy"]) == ("90", "1e-05")
    assert model_id(new) == model_id(old)
    assert_complete(repository, new)
    found = client(repository)
    plots = [Path(found.download_artifacts(run.info.run_id, "plots/test_acc.png")).read_bytes() for run in (new, old)]
    assert plots[0] != plots[1]


@pytest.mark.full
def test_a_training_is_not_continued_with_other_parameters(repository: Path) -> None:
    project.edit(repository, {"train.epochs": 1})
    project.run(repository, "dvc", "repro", "train")
    project.edit(repository, {"plot.dpi": 90})
    project.run(repository, "dvc", "repro")
    new, before = project.runs(repository)  # the training is in MLflow's trash: its results are in the new run
    assert (new.data.params["plot.dpi"], new.data.params["train.epochs"]) == ("90", "1")
    assert before.data.params["train.epochs"] == "2"
    assert_complete(repository, new)


@pytest.mark.full
def test_a_training_is_continued_with_the_code_that_gave_its_results(repository: Path) -> None:
    """The run gets the code at the pipeline's end, where `dvc.lock` has shown that all results are of it."""
    train = repository / "stages/train.py"
    train.write_text(train.read_text() + "# edited\n")
    project.run(repository, "dvc", "repro", "train")
    (training, _) = project.runs(repository)
    (repository / "stages/new.py").write_text("NEW = 1\n")
    project.run(repository, "dvc", "repro")
    new, _ = project.runs(repository)
    assert new.info.run_id == training.info.run_id
    assert_complete(repository, new)
    patch = Path(client(repository).download_artifacts(new.info.run_id, "uncommitted.patch.txt")).read_text()
    assert "+# edited" in patch
    assert "+NEW = 1" in patch

    project.run(repository, sys.executable, "-m", "stages.train")  # once more, by hand: what it gives is there already
    assert "was complete" in project.run(repository, *TRACK).stdout
    assert [run.info.run_id for run in project.runs(repository)][:1] == [new.info.run_id]
    done = project.run(repository, sys.executable, "-m", "mnist_mlp.verify", new.info.run_id)
    assert "identical" in done.stdout


def test_a_run_that_mlflow_has_lost_is_not_finished(repository: Path) -> None:
    """Though MLflow answers again at the end of the training."""
    script = """if True:
        import mlflow
        from lineage import runs
        from mnist_mlp import params, record

        def refuse(*arguments, **options):
            raise mlflow.exceptions.MlflowException("away")

        config = params.load()
        with runs.live(record.EXPERIMENT, record.flat(config), record.dataset(config), record.TAGS) as run:
            run.send(refuse)
            run.send(mlflow.log_metric, "train_loss", 1.0)
    """
    done = project.run(repository, sys.executable, "-c", script)
    assert done.stderr.startswith("MLflow is lost (away); the training goes on.")
    assert project.runs(repository)[0].info.status == "FAILED"


def test_a_database_that_refuses_is_one_line_and_the_run_has_failed(repository: Path) -> None:
    """Such as a full or read-only one. MLflow itself prints a hundred lines."""
    with sqlite3.connect(repository / "mlflow.db") as database:
        database.execute("CREATE TRIGGER refuse BEFORE INSERT ON params BEGIN INSERT INTO away VALUES (1); END")
    done = project.run(repository, sys.executable, "-m", "stages.train", check=False)
    reason = "(sqlite3.OperationalError) no such table: main.away"
    assert (done.returncode, done.stderr) == (1, f"train: MLflow refuses: {reason}\n")
    assert project.runs(repository)[0].info.status == "FAILED"


def test_another_code_is_another_run_with_the_change_that_is_not_committed(repository: Path) -> None:
    (before,) = project.runs(repository)
    evaluate = repository / "stages/evaluate.py"
    evaluate.write_text(evaluate.read_text().replace("    # Lists", '    metrics["twice"] = 2.0\n    # Lists'))
    (repository / "stages/new.py").write_text("NEW = 1\n")
    pipeline = repository / "dvc.yaml"
    pipeline.write_text(pipeline.read_text().replace("desc: Score", "desc: Score all"))
    (repository / "own.png").write_bytes(b"read by no stage")
    project.run(repository, "dvc", "repro")
    new, old = project.runs(repository)
    assert old.data.to_dictionary() == before.data.to_dictionary()
    assert new.info.run_name == f"main-{new.data.tags['git.commit'][:7]}+"  # for changes that are not committed
    assert_complete(repository, new)
    patch = Path(client(repository).download_artifacts(new.info.run_id, "uncommitted.patch.txt")).read_text()
    assert '+    metrics["twice"] = 2.0' in patch
    assert "+NEW = 1" in patch
    assert "+    desc: Score all" in patch
    assert "own.png" not in patch
    assert "params.yaml" not in patch

    project.commit(repository)
    project.run(repository, *TRACK)
    assert len(project.runs(repository)) == 2  # the commit holds what the run has, so it is the same state


@pytest.mark.full
def test_a_git_that_fails_counts_as_unknown_until_it_works_again(repository: Path, tmp_path: Path) -> None:
    broken = tmp_path / "bin"
    broken.mkdir()
    (broken / "git").write_text("#!/bin/sh\nexit 128\n")
    (broken / "git").chmod(0o755)
    env = project.environment()
    env["PATH"] = f"{broken}:{env['PATH']}"
    (repository / "mlflow.db").unlink()
    project.run(repository, sys.executable, "-m", "stages.train", env=env)
    project.run(repository, *TRACK, env=env)
    (unknown,) = project.runs(repository)
    assert unknown.data.tags["git.commit"] == unknown.data.tags["git.patch.md5"] == git.UNKNOWN

    project.run(repository, *TRACK)
    (known,) = project.runs(repository)
    assert known.info.run_id == unknown.info.run_id
    assert git.UNKNOWN not in known.data.tags.values()
    assert git.UNKNOWN not in str(known.info.run_name)


def test_a_run_that_is_continued_and_interrupted_stays_finished(repository: Path) -> None:
    project.run(repository, *TRACK)  # the copy is the store's place now
    (run,) = project.runs(repository)
    client(repository).delete_tag(run.info.run_id, "dvc.lock.md5")
    artifacts = Path(run.info.artifact_uri.removeprefix("file://"))
    shutil.rmtree(artifacts / "plots")
    (artifacts / "dvc.lock.yaml").unlink()
    assert stopping.in_write(repository, "dvc.lock.yaml", signal.SIGTERM, *TRACK) == 130
    assert (artifacts / "plots").exists()
    assert not (artifacts / "dvc.lock.yaml").exists()
    assert client(repository).get_run(run.info.run_id).info.status == "FINISHED"
    project.run(repository, *TRACK)
    (run,) = project.runs(repository)
    assert_complete(repository, run)


def no_store(folder: Path) -> None:
    (folder / "mlflow.db").unlink()
    shutil.rmtree(folder / "mlruns")


def no_files(folder: Path) -> None:
    shutil.rmtree(folder / "mlruns")


def no_alias(folder: Path) -> None:
    client(folder).delete_registered_model_alias(record.NAME, registry.CHAMPION)


def no_version(folder: Path) -> None:
    client(folder).delete_model_version(record.NAME, "1")


def no_registry(folder: Path) -> None:
    client(folder).delete_registered_model(record.NAME)


def cut_model(folder: Path) -> None:
    """As a full disk or a killed process leaves it; MLflow notices neither."""
    (model,) = (folder / "mlruns").rglob("*.pt2")
    os.truncate(model, 5000)


def deleted_run(folder: Path) -> None:
    (run,) = project.runs(folder)
    client(folder).delete_run(run.info.run_id)


def no_run_files(folder: Path) -> None:
    """Of the run itself; those of its model stay."""
    shutil.rmtree(folder / "mlruns" / project.runs(folder)[0].info.run_id)


def test_one_command_heals_the_store(repository: Path) -> None:
    no_store(repository)
    before = project.contents(repository)
    project.run(repository, *TRACK)
    (run,) = project.runs(repository)
    assert_complete(repository, run)
    assert champion(repository) == "1"
    assert project.contents(repository) == before
    assert "was complete" in project.run(repository, *TRACK).stdout
    assert project.runs(repository)[0].info.run_id == run.info.run_id


@pytest.mark.full
def test_one_command_heals_whatever_is_missing_in_the_store(repository: Path) -> None:
    damages: list[Callable[[Path], None]] = [no_alias, no_version, no_registry, deleted_run, cut_model, no_run_files]
    for damage in damages:
        damage(repository)
        project.run(repository, *TRACK)
        assert_complete(repository, project.runs(repository)[0])
        version = client(repository).get_model_version(record.NAME, alias(repository))
        assert version.tags["model.md5"] == project.runs(repository)[0].data.tags["model.md5"], damage
        assert version.tags["run"] == project.runs(repository)[0].info.run_id, damage
    assert champion(repository) == alias(repository)  # it loads


@pytest.mark.full
def test_a_model_whose_storing_was_interrupted_is_stored_again(repository: Path) -> None:
    """The process ends when the model's files are there and before they are known to be all."""
    no_store(repository)
    script = """if True:
        import mlflow, os, runpy, sys
        mlflow.MlflowClient.set_logged_model_tags = lambda *_: os._exit(9)
        sys.argv = ["track"]
        runpy.run_module("stages.track", run_name="__main__")"""
    assert project.run(repository, sys.executable, "-c", script, check=False).returncode == 9
    project.run(repository, *TRACK)
    new, old = project.runs(repository)
    assert (old.info.status, new.info.status) == ("KILLED", "FINISHED")
    assert_complete(repository, new)
    version = client(repository).get_model_version(record.NAME, alias(repository))
    assert model_id(new) in str(version.source)
    assert len(client(repository).search_model_versions(f"name = '{record.NAME}'")) == 1


def test_a_version_leads_to_a_complete_run_also_if_an_interrupted_one_has_stored_its_model(repository: Path) -> None:
    (first,) = project.runs(repository)
    client(repository).delete_tag(first.info.run_id, "dvc.lock.md5")
    project.edit(repository, {"evaluate.target_accuracy": 0.6})
    project.run(repository, "dvc", "repro", "evaluate")
    project.run(repository, "dvc", "repro")
    second = project.runs(repository)[0]
    assert second.info.run_id != first.info.run_id
    assert model_id(second) == model_id(first)
    assert client(repository).get_model_version(record.NAME, "1").tags["run"] == second.info.run_id


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
    assert_complete(folder, run)
    (folder / "params.yaml").write_bytes(good)
    assert project.stages_run(project.run(folder, "dvc", "repro", "plot").stdout) == ["plot"]
    for name in project.RESULTS[1:]:  # without dvc.lock, in which `track` is still that of the other run
        assert (folder / name).read_bytes() == (finished / name).read_bytes(), name


def test_results_of_other_parameters_are_refused(repository: Path) -> None:
    project.edit(repository, {"train.lr": 0.05})
    done = project.run(repository, *TRACK, check=False)
    line = f"track: params.yaml: train.lr is 0.05, and the results were made with {project.LR}; run `dvc repro`\n"
    assert (done.returncode, done.stderr) == (1, line)
    project.edit(repository, {"train.lr": project.LR})
    (repository / "results/history.csv").write_text("epoch\n")
    done = project.run(repository, *TRACK, check=False)
    assert done.stderr == "track: results/history.csv has changed since stage train last ran; run `dvc repro`\n"


@pytest.mark.full
def test_a_moved_folder_keeps_its_store_and_nothing_is_written_to_the_old_place(
    repository: Path, tmp_path: Path
) -> None:
    project.run(repository, *TRACK)  # the copy is the store's place now
    moved = tmp_path / "moved"
    repository.rename(moved)
    output = project.run(moved, *TRACK).stdout
    assert f"its paths now lead to file://{moved}/mlruns" in output
    (run,) = project.runs(moved)
    assert run.info.artifact_uri.startswith(f"file://{moved}/mlruns")
    assert_complete(moved, run)
    assert champion(moved) == "1"
    assert client(moved).get_model_version_download_uri(record.NAME, "1").startswith(f"file://{moved}/mlruns")

    no_files(moved)
    project.run(moved, *TRACK)  # logs a run and a model anew
    assert_complete(moved, project.runs(moved)[0])
    assert champion(moved) == "2"
    assert not repository.exists()


@pytest.mark.full
def test_a_moved_folder_is_noticed_wherever_the_store_is(repository: Path, tmp_path: Path) -> None:
    """It may lie deeper in the folder, and moves with it, or somewhere else, and is refused."""
    (repository / "kept").mkdir()
    stores = {place: f"sqlite:///{place}/own.db" for place in ("kept", tmp_path)}
    for uri in stores.values():
        project.run(repository, *TRACK, env=project.environment(MLFLOW_TRACKING_URI=uri))
    moved = tmp_path / "moved"
    repository.rename(moved)
    inside, outside = (
        project.run(moved, *TRACK, env=project.environment(MLFLOW_TRACKING_URI=uri), check=False)
        for uri in stores.values()
    )
    assert f"its paths now lead to file://{moved}/mlruns" in inside.stdout
    reason = f"keeps its files in file://{repository}/mlruns, which is gone; move it back, or name another"
    assert outside.stderr == f"track: sqlite:///{tmp_path}/own.db {reason}\n"
    assert not repository.exists()


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
def test_data_of_ones_own_under_dvc_are_no_unknown_code(repository: Path) -> None:
    """`dvc add` makes Git ignore them."""
    (repository / "data/own.csv").write_text("1\n")
    project.run(repository, "dvc", "add", "data/own.csv")
    pipeline = repository / "dvc.yaml"
    depends = "cmd: python -m stages.plot\n    deps:\n"
    pipeline.write_text(pipeline.read_text().replace(depends, f"{depends}    - data/own.csv\n"))
    project.commit(repository)
    project.run(repository, "dvc", "repro")
    project.run(repository, *TRACK)
    new, _ = project.runs(repository)
    assert new.data.tags["git.patch.md5"] == "none"


@pytest.mark.recipe
def test_what_a_stage_reads_is_in_the_patch_also_beside_a_result(repository: Path) -> None:
    """A result in data/ or stages/, a dependency that is missing, and one outside the repository hide nothing."""
    pipeline = repository / "dvc.yaml"
    deps = ["data", "stages", "missing.csv", "../outside.csv", "/etc/hostname"]
    stage = {
        "cmd": "true",
        "deps": deps,
        "outs": [{"data/made.csv": {"cache": False}}, {"stages/made.csv": {"cache": False}}],
    }
    content = yaml.safe_load(pipeline.read_text())
    content["stages"]["clean"] = stage
    pipeline.write_text(yaml.safe_dump(content))
    project.commit(repository)
    for name in ("data/made.csv", "data/new.csv", "stages/made.csv", "stages/new.py"):
        (repository / name).write_text("1\n")
    (repository / "data/published_history.csv").unlink()
    script = "import sys\nfrom lineage import git\nsys.stdout.buffer.write(git.patch())"
    patch = project.run(repository, sys.executable, "-c", script).stdout
    changed = re.findall(r"^diff --git a/(\S+)", patch, re.MULTILINE)
    assert changed == ["data/new.csv", "data/published_history.csv", "stages/new.py"]


def test_an_address_that_cannot_be_a_store_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "foo://x")
    with pytest.raises(UserError, match="names a kind of store that nothing here can open"):
        store.connect("any")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setattr(store, "ROOT", tmp_path / "50%25")
    with pytest.raises(UserError, match="MLflow cannot use a store in a path that holds '%25'; rename the folder"):
        store.connect("any")


@pytest.mark.full
def test_evaluate_register_false_leaves_the_registry_alone(repository: Path) -> None:
    no_registry(repository)
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
    no_registry(repository)
    project.edit(repository, {"evaluate.target_accuracy": 0.999})
    output = project.run(repository, "dvc", "repro").stdout
    assert "not registered, because the target is missed; there is no champion of these data" in output
    done = project.run(repository, sys.executable, "-m", "mnist_mlp.predict", "any.png", check=False)
    assert "; the results miss the target, " in done.stderr
    assert "so there is no champion; change params.yaml, then run `make repro`\n" in done.stderr


def better(folder: Path, digest: str = data.DIGEST) -> str:
    """Register the model a second time, as a version that is said to be better."""
    (run,) = project.runs(folder)
    tags = {"accuracy": "0.999", "data.digest": digest}
    return str(mlflow.register_model(f"models:/{model_id(run)}", record.NAME, tags=tags).version)


def test_a_champion_set_by_hand_without_figures_gives_way_to_one_that_has_them(repository: Path) -> None:
    project.run(repository, *TRACK)  # the copy is the store's place now
    found = client(repository)
    run = found.create_run(project.runs(repository)[0].info.experiment_id)
    found.log_text(run.info.run_id, "by hand", "model/MLmodel")
    tags = {"data.digest": data.DIGEST}
    unknown = found.create_model_version(record.NAME, f"{run.info.artifact_uri}/model", run.info.run_id, tags)
    found.set_registered_model_alias(record.NAME, registry.CHAMPION, unknown.version)
    project.run(repository, *TRACK)
    assert alias(repository) == "1"

    found.log_metric(run.info.run_id, "accuracy", 0.999)  # by which its run tells that it is the better one
    project.run(repository, *TRACK)
    assert alias(repository) == str(unknown.version)


def test_a_model_of_other_data_is_no_champion_and_is_neither_served_nor_proved(repository: Path) -> None:
    """As after a change of the data set, or with two data sets on one server."""
    project.run(repository, *TRACK)  # the copy is the store's place now
    other = better(repository, digest="0" * 32)
    client(repository).set_registered_model_alias(record.NAME, registry.CHAMPION, other)
    origin = f"made from other data than {data.NAME} as mnist_mlp/recipe/data.py describes it"
    for command in (("predict", "any.png"), ("serve", "--port", "5555")):
        done = project.run(repository, sys.executable, "-m", f"mnist_mlp.{command[0]}", *command[1:], check=False)
        reason = f"{registry.CHAMPION}, version {other}, was {origin}; `make track` makes it from the results\n"
        assert done.returncode == 1
        assert done.stderr.endswith(reason)
    assert f"{record.NAME} version 1, the champion" in project.run(repository, *TRACK).stdout
    assert alias(repository) == "1"

    (run,) = project.runs(repository)
    client(repository).set_tag(run.info.run_id, "data.digest", "0" * 32)
    done = project.run(repository, sys.executable, "-m", "mnist_mlp.verify", check=False)
    commit = run.data.tags["git.commit"]
    line = f"verify: run {run.info.run_id} was {origin}; check its commit out first: {commit}\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_a_run_whose_commit_is_gone_gets_the_present_one(repository: Path) -> None:
    """As after `git commit --amend`, when Git has cleaned up, or in a colleague's clone."""
    project.run(repository, *TRACK)  # the copy is the store's place now
    (run,) = project.runs(repository)
    client(repository).set_tag(run.info.run_id, "git.commit", "0" * 40)
    assert "was complete" in project.run(repository, *TRACK).stdout
    (run,) = project.runs(repository)
    assert run.data.tags["git.commit"] == project.run(repository, "git", "rev-parse", "HEAD").stdout.strip()
    assert_complete(repository, run)


@pytest.mark.recipe
def test_the_published_history_is_a_run_and_no_candidate(repository: Path) -> None:
    found = client(repository)
    (ours,) = project.runs(repository)
    query = ([ours.info.experiment_id], "attributes.run_name = 'published'")
    (published,) = found.search_runs(*query)
    rows = (repository / "data/published_history.csv").read_text().splitlines()
    points = found.get_metric_history(published.info.run_id, "test_acc")
    assert [f"{point.step},{point.value:.6f}" for point in points] == [
        f"{row.split(',')[0]},{row.split(',')[4]}" for row in rows[1:]
    ]
    assert [version.run_id for version in found.search_model_versions(f"name = '{record.NAME}'")] == [ours.info.run_id]
    found.delete_run(published.info.run_id)
    project.run(repository, *TRACK)
    assert found.search_runs(*query) == []


@pytest.mark.recipe
def test_the_published_run_is_completed_after_a_kill_and_kept_once(repository: Path) -> None:
    found = client(repository)
    identity = found.get_experiment_by_name(record.EXPERIMENT).experiment_id  # type: ignore[union-attr]
    (published,) = found.search_runs([identity], "attributes.run_name = 'published'")
    found.delete_run(published.info.run_id)
    with sqlite3.connect(repository / "mlflow.db") as database:  # from MLflow's trash
        database.execute("DELETE FROM runs WHERE lifecycle_stage = 'deleted'")
    found.create_run(identity, run_name="published")  # and here the process was killed
    for _ in range(2):
        project.run(repository, *TRACK)
        (published,) = found.search_runs([identity], "attributes.run_name = 'published'")
        assert len(found.get_metric_history(published.info.run_id, "test_acc")) == 20
        assert published.info.status == "FINISHED"


def test_an_experiment_of_a_server_on_the_same_database_keeps_its_place(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of two clones that come to a new store at once, none fails."""
    monkeypatch.chdir(repository)
    monkeypatch.setattr(store, "ROOT", repository)
    found = client(repository)
    other = found.create_experiment("other", artifact_location="mlflow-artifacts:/7")
    looks = iter([None])
    look = mlflow.get_experiment_by_name
    monkeypatch.setattr(mlflow, "get_experiment_by_name", lambda name: next(looks, look(name)))
    store.connect("other")
    assert found.get_experiment(other).artifact_location == "mlflow-artifacts:/7"
