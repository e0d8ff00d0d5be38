"""The link of ``lineage`` in another project: three small stages without PyTorch, in tests/toy.

Most tests call the stages in this process; the first run of the project, and the proofs, are real `dvc repro`s.
"""

import json
import os
import re
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from sqlalchemy import engine, event

import lineage
from lineage import UserError, git, lock, proof, registry, runs, store
from tests import project, stopping
from tests.toy import toy

CHAMPION = f"models:/{toy.NAME}@{registry.CHAMPION}"


@pytest.fixture
def repository(fitted: Path, tmp_path: Path, enter: Callable[[Path], None]) -> Path:
    """The project after its first `dvc repro`, in another place, with its MLflow store. This process works there."""
    folder = project.copy(fitted, tmp_path / "repository")
    enter(folder)
    store.connect(toy.NAME)
    return folder


def run_stages(*names: str) -> None:
    """Run stages and keep their results as `dvc repro` does, but for the processes; all of them unless named."""
    for name in names or ("fit", "score"):
        getattr(toy, name)()
        project.dvc("commit", "--force", "--quiet", name)
    if not names:
        toy.track()


def found(view: str = "active") -> list[Run]:
    """The runs, the newest first."""
    return store.search(toy.NAME, "", mlflow.entities.ViewType.from_string(f"{view}_only"))


def only() -> Run:
    (run,) = found()
    return run


def client() -> mlflow.MlflowClient:
    return mlflow.MlflowClient()


def artifacts(run: Run) -> dict[str, bytes]:
    """The files of a run."""
    folder = Path(run.info.artifact_uri.removeprefix("file://"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def patch_of(run: Run) -> str:
    return artifacts(run)[runs.PATCH].decode()


def alias() -> str:
    return str(client().get_model_version_by_alias(toy.NAME, registry.CHAMPION).version)


def assert_complete(run: Run) -> None:
    """As after one `dvc repro` from an empty store, with the files that are in `results` now."""
    assert run.info.status == "FINISHED"
    history = [row.split(",") for row in toy.HISTORY.read_text().splitlines()[1:]]
    points = client().get_metric_history(run.info.run_id, "loss")
    assert [[str(point.step), f"{point.value:.6f}"] for point in points] == history
    files = artifacts(run)
    assert {"params.yaml", runs.LOCK, "metrics.json"} <= files.keys()
    assert files["metrics.json"] == toy.METRICS.read_bytes()
    assert yaml.safe_load(files[runs.LOCK])["stages"] == lock.recorded(toy.load_params())
    assert run.data.metrics["accuracy"] == json.loads(toy.METRICS.read_text())["accuracy"]
    assert runs.model_of(run)


# What a run is


def test_one_repro_is_one_run_that_leads_back_to_commit_data_and_parameters(fitted: Path, repository: Path) -> None:
    run, tags = only(), only().data.tags
    assert_complete(run)
    assert tags["git.commit"] == project.run(repository, "git", "rev-parse", "HEAD~").stdout.strip()
    assert (tags["git.branch"], tags["git.patch.md5"], run.info.run_name) == (
        "main", runs.CLEAN, f"main-{tags['git.commit'][:7]}"
    )  # fmt: skip
    assert tags[runs.DATA] == lineage.file_md5("points.csv")
    assert run.data.params == {"fit.epochs": "5", "fit.lr": "0.1", "score.near": "1.0"}
    assert {"python", "mlflow", "dvc", "cpu", "host", "pid"} <= tags.keys()
    assert f"make verify MODEL={run.info.run_id}" in tags["mlflow.note.content"]
    toy.track()
    assert only().to_dictionary() == run.to_dictionary()


def test_parameters_of_a_later_stage_are_another_run_of_the_same_model(repository: Path) -> None:
    """Among them a small number: DVC writes 1e-05, which some readers of YAML take for text."""
    before = only()
    params = repository / "params.yaml"
    params.write_text(params.read_text().replace("near: 1.0", "near: 1e-5"))
    run_stages("score")
    toy.track()
    new, old = found()
    assert (old.info.status, old.data.to_dictionary()) == ("FINISHED", before.data.to_dictionary())
    assert new.info.run_name == f"main-{new.data.tags['git.commit'][:7]} score.near=1e-05"
    assert new.data.params["score.near"] == "1e-05"
    assert runs.model_of(new) == runs.model_of(old)
    assert_complete(new)


def test_going_back_is_the_run_that_was_there(repository: Path) -> None:
    before = only()
    project.edit(repository, {"fit.lr": 0.2})
    run_stages()
    assert len(found()) == 2
    project.run(repository, "git", "checkout", "--quiet", ".")
    project.dvc("checkout", "--quiet", "--force")
    toy.track()
    assert found()[1].data.to_dictionary() == before.data.to_dictionary()
    assert len(found()) == 2


def test_another_code_is_another_run_with_the_change_that_is_not_committed(repository: Path) -> None:
    before = only()
    code = repository / "toy.py"
    code.write_text(code.read_text() + "TWICE = 2\n")
    (repository / "lineage/new.py").write_text("NEW = 1\n")
    (repository / "own.png").write_bytes(b"read by no stage")
    run_stages()
    new, old = found()
    assert old.data.to_dictionary() == before.data.to_dictionary()
    assert new.info.run_name == f"main-{new.data.tags['git.commit'][:7]}+"  # for changes that are not committed
    assert_complete(new)
    assert re.findall(r"^diff --git a/(\S+)", patch_of(new), re.MULTILINE) == ["lineage/new.py", "toy.py"]
    assert "+TWICE = 2" in patch_of(new)

    Path(new.info.artifact_uri.removeprefix("file://"), runs.PATCH).unlink()
    toy.track()
    assert "+TWICE = 2" in patch_of(found()[0])
    project.commit(repository)
    toy.track()
    assert len(found()) == 2  # the commit holds what the run has, so it is the same state


def test_parameters_are_named_as_dvc_names_them_however_deep_they_lie() -> None:
    expected = {"seed": 1, "fit.lr": 1e-5, "fit.line.slope": 2}
    assert lock.read_params(b"seed: 1\nfit:\n  lr: 1e-05\n  line:\n    slope: 2\n") == expected
    stages = [{"seed": 1, "fit": {"lr": 1e-5}}, {"fit.line": {"slope": 2}}, {"fit.line.slope": 2}]
    assert lock.parameters({str(n): {"params": {"params.yaml": used}} for n, used in enumerate(stages)}) == expected


def test_a_stage_that_dvc_yaml_no_longer_has_is_no_part_of_the_state(repository: Path) -> None:
    """DVC keeps the entry of a stage that was renamed."""
    before = only()
    locked = repository / "dvc.lock"
    locked.write_text(locked.read_text() + "  renamed:\n    cmd: 'true'\n")
    toy.track()
    assert only().data.to_dictionary() == before.data.to_dictionary()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda: project.edit(Path(), {"fit.lr": 0.05}), "params.yaml: fit.lr is 0.05, and the results were made with"),
        (lambda: toy.HISTORY.write_text("epoch\n"), "results/history.csv has changed since stage fit last ran; run"),
        (toy.MODEL.unlink, "results/line.json is missing; run `dvc repro`"),
        (lambda: Path("dvc.lock").unlink(), "there is no dvc.lock, so there are no results yet; run `dvc repro`"),
        (lambda: Path("dvc.lock").write_text("<<<<<<<"), "dvc.lock or dvc.yaml is damaged, or in a merge; run `git"),
        (
            lambda: Path("dvc.yaml").write_text(Path("dvc.yaml").read_text().replace("  fit:", "  adjust:")),
            "stage adjust has not run; run `dvc repro`",
        ),
        (
            lambda: Path("dvc.yaml").write_text(Path("dvc.yaml").read_text().replace("  score:", "  judge:")),
            "stage judge has not run; run `dvc repro`",
        ),
        (
            lambda: Path("dvc.yaml").write_text(Path("dvc.yaml").read_text().replace("toy score", "toy --fast score")),
            "the command of stage score has changed since it last ran; run `dvc repro`",
        ),
        (
            lambda: Path("params.yaml").write_text(Path("params.yaml").read_text().replace("lr:", "rate:")),
            "params.yaml: fit.lr is missing, and the results were made with 0.1; run `dvc repro`",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_results_of_another_state_are_refused(repository: Path, damage: Callable[[], object], reason: str) -> None:
    damage()
    with pytest.raises(UserError, match=re.escape(reason)):
        toy.track()


@pytest.mark.parametrize(
    "part",
    ["matrix: {a: [1]}", "foreach: [1]", "wdir: .", "deps: ['${a}']", "outs: [{'${a}': {}}]", "cmd: 'echo ${a}'",
     "params: [{other.yaml: [a]}]"],
)  # fmt: skip
def test_what_only_dvc_can_read_is_refused(part: str) -> None:
    with pytest.raises(UserError, match=r"^dvc.yaml: stage fit has foreach, matrix, wdir, \$\{...\} or a file of"):
        lock.pipeline_stages(f"stages: {{fit: {{{part}}}}}".encode())


def test_stages_that_others_write_are_read() -> None:
    stages = {"fit": {"cmd": "echo \\${HOME}", "params": [{"params.yaml": ["lr"]}, "epochs"]}}
    assert lock.pipeline_stages(yaml.safe_dump({"stages": stages}).encode()) == stages
    with pytest.raises(UserError, match="is damaged, or in a merge"):
        lock.read_stages(b"stages: {fit: text}")
    folder = {"fit": {"outs": ["results"]}, lock.TRACK: {"deps": ["results/line.json"]}}
    assert lock._upstream(folder, lock.TRACK) == {"fit", lock.TRACK}


def test_what_runs_beside_or_after_track_is_no_part_of_the_state(repository: Path) -> None:
    """DVC may run it later, so `track` cannot wait for it. A proof of the commit runs what needs no `track`."""
    content = yaml.safe_load(Path("dvc.yaml").read_text())
    content["stages"]["track"]["outs"] = ["tracked.txt"]
    content["stages"] |= {
        "page": {"cmd": "cp tracked.txt page.txt", "deps": ["tracked.txt"], "outs": ["page.txt"]},
        "beside": {"cmd": "echo 1 > beside.txt", "outs": ["beside.txt"]},
        "more": {"cmd": "cp beside.txt more.txt", "deps": ["beside.txt"], "plots": ["more.txt"]},
    }
    Path("dvc.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    toy.track()
    assert_complete(found()[0])
    assert lock.recorded(toy.load_params()).keys() == {"fit", "score"}
    assert lock.without_track(Path("dvc.yaml").read_bytes()) == ["fit", "score", "beside", "more"]
    assert lock.paths(content["stages"]["more"]) == ["more.txt"]


def test_a_url_that_a_stage_depends_on_is_left_to_dvc(repository: Path) -> None:
    content = yaml.safe_load(lock.LOCK.read_text())
    content["stages"]["fit"]["deps"].append({"path": "http://127.0.0.1:9/points.csv", "checksum": "1"})
    lock.LOCK.write_text(yaml.safe_dump(content))
    toy.track()
    assert_complete(found()[0])


def test_a_folder_inside_of_a_git_repository_is_refused(repository: Path) -> None:
    """From its commits nothing could be run again."""
    shutil.rmtree(".git")
    project.run(repository.parent, "git", "init", "--quiet")
    with pytest.raises(UserError, match=f"^this is the folder {repository.name}/ of a Git repository; it needs a"):
        toy.fit()


# A run is completed, or written from the files


def test_a_training_is_completed_with_the_code_that_gave_its_results(repository: Path) -> None:
    """The run gets the code at the pipeline's end, where `dvc.lock` has shown that all results are of it."""
    code = repository / "toy.py"
    code.write_text(code.read_text() + "# edited\n")
    run_stages("fit")
    training = found()[0]
    assert "Not complete" in training.data.tags["mlflow.note.content"]
    (repository / "lineage/new.py").write_text("NEW = 1\n")
    run_stages("score")
    toy.track()
    new = found()[0]
    assert new.info.run_id == training.info.run_id
    assert_complete(new)
    assert all(added in patch_of(new) for added in ("+# edited", "+NEW = 1"))

    toy.fit()  # once more, by hand: what it gives is there already
    toy.track()
    assert [run.info.run_id for run in found()][:1] == [new.info.run_id]


def test_a_training_with_other_parameters_is_not_completed(repository: Path) -> None:
    project.edit(repository, {"fit.epochs": 6})
    run_stages("fit")
    project.edit(repository, {"score.near": 2.0})
    run_stages("score")
    toy.track()
    new, before = found()  # the training is in MLflow's trash: its results are in the new run
    assert (new.data.params["score.near"], new.data.params["fit.epochs"]) == ("2.0", "6")
    assert before.data.params["fit.epochs"] == "5"
    assert_complete(new)
    assert len(found("deleted")) == 1


@pytest.fixture
def without_store(fitted: Path, tmp_path: Path, enter: Callable[[Path], None]) -> Path:
    """As after `rm -r mlflow.db mlruns`, or in a clone that has pulled the results."""
    folder = project.copy(fitted, tmp_path / "repository", store=False)
    enter(folder)
    return folder


def test_a_lost_store_is_made_anew_from_the_results(without_store: Path) -> None:
    files = {path: path.read_bytes() for path in (toy.MODEL, toy.HISTORY, toy.METRICS)}
    toy.track()
    assert_complete(only())
    assert alias() == "1"
    assert {path: path.read_bytes() for path in files} == files


def no_alias() -> None:
    client().delete_registered_model_alias(toy.NAME, registry.CHAMPION)


def no_version() -> None:
    client().delete_model_version(toy.NAME, "1")


def no_registry() -> None:
    client().delete_registered_model(toy.NAME)


def cut_model() -> None:
    """As a full disk or a killed process leaves it; MLflow notices neither."""
    (model,) = Path("mlruns").rglob("artifacts/line.json")
    os.truncate(model, 5)


def deleted_run() -> None:
    client().delete_run(only().info.run_id)


def no_run_files() -> None:
    """Of the run itself; those of its model stay."""
    shutil.rmtree(only().info.artifact_uri.removeprefix("file://"))


def no_files() -> None:
    shutil.rmtree("mlruns")


@pytest.mark.parametrize("damage", [no_alias, no_version, no_registry, cut_model, deleted_run, no_run_files, no_files])
def test_track_mends_whatever_is_missing_in_the_store(repository: Path, damage: Callable[[], None]) -> None:
    damage()
    toy.track()
    assert_complete(only())
    version = client().get_model_version(toy.NAME, alias())
    assert version.tags["model.md5"] == only().data.tags["model.md5"]
    assert version.tags["run"] == only().info.run_id
    assert toy.hash_model(CHAMPION)  # it loads


def test_a_model_whose_storing_was_interrupted_is_stored_again(
    without_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends when the model's files are there and before they are known to be all."""
    interrupt(monkeypatch, mlflow.MlflowClient, "set_logged_model_tags", toy.track)
    toy.track()
    new, old = found()
    assert (old.info.status, new.info.status) == ("KILLED", "FINISHED")
    assert_complete(new)
    (version,) = client().search_model_versions(f"name = '{toy.NAME}'")
    assert str(runs.model_of(new)) in str(version.source)


def interrupt(monkeypatch: pytest.MonkeyPatch, place: object, name: str, stage: Callable[[], None]) -> None:
    """Run a stage, and press Ctrl-C when it calls a function."""

    def pressed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(place, name, pressed)
        with pytest.raises(KeyboardInterrupt):
            stage()


def test_a_run_whose_completion_was_interrupted_is_completed(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client().delete_tag(only().info.run_id, runs.DIGEST)
    no_run_files()
    interrupt(monkeypatch, mlflow.MlflowClient, "log_text", toy.track)
    assert artifacts(only()).keys() == {"params.yaml", "metrics.json"}
    assert only().info.status == "FINISHED"
    toy.track()
    assert_complete(only())


def test_a_version_leads_to_a_complete_run_also_if_an_interrupted_one_has_stored_its_model(repository: Path) -> None:
    interrupted = only()
    client().delete_tag(interrupted.info.run_id, runs.DIGEST)
    project.edit(repository, {"score.near": 2.0})
    run_stages("score")
    toy.track()
    assert only().info.run_id != interrupted.info.run_id
    assert runs.model_of(only()) == runs.model_of(interrupted)
    assert client().get_model_version(toy.NAME, "1").tags["run"] == only().info.run_id


def test_an_experiment_of_dvc_is_one_run_of_its_name_also_for_an_equal_state(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = only()
    monkeypatch.setenv("DVC_EXP_NAME", "tried")
    for _ in range(2):
        toy.track()
        new, old = found()
        assert (new.info.run_name, new.data.tags[runs.EXPERIMENT]) == ("tried", "tried")
        assert old.data.to_dictionary() == before.data.to_dictionary()
    assert new.data.tags[runs.DIGEST] == old.data.tags[runs.DIGEST]
    assert_complete(new)
    monkeypatch.delenv("DVC_EXP_NAME")
    toy.track()
    assert len(found()) == 2


def test_a_training_of_an_experiment_of_dvc_is_left_to_that_experiment(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experiments that run at once can train the same model."""
    monkeypatch.setenv("DVC_EXP_NAME", "tried")
    toy.fit()
    monkeypatch.delenv("DVC_EXP_NAME")
    client().delete_tag(found()[1].info.run_id, runs.DIGEST)
    toy.track()
    training, ours = found()
    assert (training.info.run_name, runs.DIGEST in training.data.tags) == ("tried", False)
    assert_complete(ours)


def test_one_process_at_a_time_looks_for_the_run_of_a_state(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else two that come at once would each write one."""
    choose = runs._choose

    def choose_alone(*found: Any) -> Run | None:
        assert store.lock().is_locked
        return choose(*found)

    monkeypatch.setattr(runs, "_choose", choose_alone)
    toy.track()


def test_a_run_whose_commit_is_gone_gets_the_present_one(repository: Path) -> None:
    """As after `git commit --amend`, when Git has cleaned up, or in a colleague's clone."""
    client().set_tag(only().info.run_id, "git.commit", "0" * 40)
    toy.track()
    assert only().data.tags["git.commit"] == project.run(repository, "git", "rev-parse", "HEAD").stdout.strip()
    assert_complete(only())


def test_a_git_that_fails_counts_as_unknown_until_it_works_again(
    without_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "bin"
    broken.mkdir()
    (broken / "git").write_text("#!/bin/sh\nexit 128\n")
    (broken / "git").chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{broken}:{os.environ['PATH']}")
        toy.track()
    unknown = only()
    assert unknown.data.tags["git.commit"] == unknown.data.tags["git.patch.md5"] == git.UNKNOWN
    toy.track()
    assert only().info.run_id == unknown.info.run_id
    assert git.UNKNOWN not in [*only().data.tags.values(), *str(only().info.run_name).split("-")]


# What belongs to a run's code


def test_what_a_stage_reads_is_in_the_patch_also_beside_a_result(repository: Path) -> None:
    """A result among the inputs, a dependency that is missing, and one outside the repository hide nothing."""
    content = yaml.safe_load(Path("dvc.yaml").read_text())
    content["stages"]["clean"] = {
        "cmd": "true",
        "deps": ["lineage", "missing.csv", "../outside.csv", "/etc/hostname"],
        "outs": [{"lineage/made.csv": {"cache": False}}],
    }
    Path("dvc.yaml").write_text(yaml.safe_dump(content))
    project.commit(repository)
    for name in ("made.csv", "new.csv", "zahl ä.py"):
        (repository / "lineage" / name).write_text("1\n")
    Path("lineage/pages.py").unlink()
    changed = git.changed_files(git.patch() or b"")
    assert changed == ["lineage/new.csv", "lineage/pages.py", "lineage/zahl ä.py"]


def test_data_of_ones_own_under_dvc_are_no_unknown_code(repository: Path) -> None:
    """`dvc add` makes Git ignore them."""
    Path("own.csv").write_text("1\n")
    project.dvc("add", "--quiet", "own.csv")
    pipeline = Path("dvc.yaml")
    pipeline.write_text(pipeline.read_text().replace("    - points.csv\n", "    - own.csv\n    - points.csv\n"))
    project.commit(repository)
    assert git.patch() == b""


# A training that MLflow or the user stops


def test_a_training_goes_on_when_mlflow_is_lost_and_its_run_is_not_finished(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though MLflow answers again at the end of the training."""

    def refuse() -> None:
        raise MlflowException("away")

    with runs.live(runs.Training(toy.NAME, toy.load_params(), toy.dataset())) as run:
        run.send(refuse)
        run.send(mlflow.log_metric, "loss", 1.0)
    assert capsys.readouterr().err == (
        "MLflow is lost (away); the training goes on. Stage `track` will send everything\n"
    )
    assert found()[0].info.status == "FAILED"
    assert "loss" not in found()[0].data.metrics


def test_a_training_that_fails_says_why_in_its_run(repository: Path) -> None:
    with pytest.raises(ValueError, match="a bug"), runs.live(runs.Training(toy.NAME, toy.load_params(), toy.dataset())):
        raise ValueError("a bug")
    assert (found()[0].info.status, found()[0].data.tags["mlflow.note.content"]) == ("FAILED", "Failed: a bug")


def test_a_database_that_refuses_is_one_line_and_the_run_has_failed(repository: Path) -> None:
    """Such as a full or read-only one."""
    with sqlite3.connect("mlflow.db") as database:
        database.execute("CREATE TRIGGER refuse BEFORE INSERT ON params BEGIN INSERT INTO away VALUES (1); END")
    with pytest.raises(UserError, match=r"^MLflow refuses: \(sqlite3.OperationalError\) no such table: main.away$"):
        toy.fit()
    assert found()[0].info.status == "FAILED"


def test_what_mlflow_refuses_is_one_line_wherever_it_does(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, line = only(), "^MLflow refuses: no more; `make track` tries again$"

    def refuse(*_: object, **__: object) -> None:
        raise MlflowException("no more")

    calls: list[tuple[str, Callable[[], object]]] = [
        ("search_model_versions", lambda: registry.crown(toy.NAME, toy.dataset().digest, ["accuracy"])),
        ("search_model_versions", lambda: registry.register(run, toy.NAME, "", ["accuracy"])),
        ("set_tag", toy.track),
    ]
    for name, use in calls:
        with monkeypatch.context() as patch:
            patch.setattr(mlflow.MlflowClient, name, refuse)
            with pytest.raises(UserError, match=line):
                use()


def test_two_first_runs_at_once_are_both_kept(without_store: Path) -> None:
    """MLflow refuses to add a data set that another run has added since this one looked."""
    added: list[object] = []

    def overtake(_: object, __: object, statement: str, values: tuple[object, ...], *more: object) -> None:
        if statement.startswith("INSERT INTO datasets") and not added:
            added.append(values)
            with closing(sqlite3.connect("mlflow.db")) as database, database:
                database.execute(statement, values)

    event.listen(engine.Engine, "before_cursor_execute", overtake)
    toy.fit()
    event.remove(engine.Engine, "before_cursor_execute", overtake)
    assert added
    assert only().info.status == "FINISHED"
    inputs = only().inputs
    assert inputs
    assert inputs.dataset_inputs[0].dataset.digest == toy.dataset().digest


@pytest.mark.parametrize("table", ["params", "metrics"])
def test_ctrl_c_in_a_write_to_mlflow_ends_the_run_as_killed(repository: Path, table: str) -> None:
    """When SQLite has written a parameter or a metric, and has not yet let go of its lock."""

    def interrupt(_: object, __: object, statement: str, *more: object) -> None:
        if statement.startswith(f"INSERT INTO {table}"):
            event.remove(engine.Engine, "after_cursor_execute", interrupt)
            os.kill(os.getpid(), signal.SIGINT)

    event.listen(engine.Engine, "after_cursor_execute", interrupt)
    with pytest.raises(KeyboardInterrupt):
        toy.fit()
    assert found()[0].info.status == "KILLED"


@pytest.mark.parametrize("moment", ["search_runs", "start_run"])
def test_ctrl_c_before_a_run_is_open_leaves_none(
    repository: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    interrupt(monkeypatch, mlflow, moment, toy.fit)
    assert only().info.status == "FINISHED"


def test_a_run_whose_process_was_killed_is_marked_by_the_next(repository: Path) -> None:
    ended = project.run(repository, sys.executable, "-c", "import os; print(os.getpid())").stdout.strip()
    killed = client().create_run(store.experiment_id(toy.NAME), tags=runs.provenance(b"") | {"pid": ended})
    alive = client().create_run(store.experiment_id(toy.NAME), tags=runs.provenance(b"") | {"pid": str(os.getppid())})
    toy.fit()
    statuses = {run.info.run_id: run.info.status for run in found()}
    assert (statuses[killed.info.run_id], statuses[alive.info.run_id]) == ("KILLED", "RUNNING")


# The champion


def by_hand(tags: dict[str, str] | None = None) -> str:
    """Register the newest run's model as MLflow's page does: without tags, unless told."""
    return str(mlflow.register_model(f"models:/{runs.model_of(found()[0])}", toy.NAME, tags=tags).version)


def test_the_best_version_becomes_champion_and_of_equal_ones_the_first_stays(repository: Path) -> None:
    equal = by_hand()
    toy.track()
    assert alias() == "1"
    client().set_registered_model_alias(toy.NAME, registry.CHAMPION, equal)
    toy.track()
    assert alias() == equal
    no_alias()
    toy.track()
    assert alias() == "1"
    project.edit(repository, {"fit.lr": 0.001})
    run_stages()
    worse, better = found()
    assert worse.data.metrics["accuracy"] < better.data.metrics["accuracy"]
    client().set_registered_model_alias(toy.NAME, registry.CHAMPION, by_hand())
    toy.track()
    assert alias() == "1"


def test_a_version_without_figures_or_of_another_kind_gives_way_to_one_of_the_pipeline(repository: Path) -> None:
    unknown = by_hand({runs.DATA: toy.dataset().digest})
    with mlflow.start_run(only().info.run_id):
        other = mlflow.pyfunc.log_model(
            name="other", python_model=lambda model_input: model_input, pip_requirements=["mlflow"]
        )
    tags = {runs.DATA: toy.dataset().digest, "accuracy": "1.0"}
    foreign = str(mlflow.register_model(other.model_uri, toy.NAME, tags=tags).version)
    wrong = [by_hand({runs.DATA: toy.dataset().digest, "accuracy": text}) for text in ("nan", "1.5", "97 %")]
    for version in (unknown, foreign, *wrong):
        client().set_registered_model_alias(toy.NAME, registry.CHAMPION, version)
        toy.track()
        assert alias() == "1"
    best = registry.crown(toy.NAME, toy.dataset().digest, ["another", "accuracy"])
    assert best
    assert str(best.version) == "1"
    assert runs.model_of(only()) != other.model_id
    first = by_hand({runs.DATA: toy.dataset().digest, "another": "0.1", "accuracy": "0.1"})
    best = registry.crown(toy.NAME, toy.dataset().digest, ["another", "accuracy"])
    assert best
    assert str(best.version) == first  # a version with the first metric comes before all others


def test_a_champion_of_which_nothing_tells_the_data_is_refused(repository: Path) -> None:
    unknown = by_hand()
    client().set_registered_model_alias(toy.NAME, registry.CHAMPION, unknown)
    client().delete_tag(only().info.run_id, runs.DATA)
    reason = f"{CHAMPION}, version {unknown}, was made from data that nothing names; do this"
    with pytest.raises(UserError, match=reason):
        registry.load_champion(
            toy.NAME, toy.dataset().digest, "other points", mlflow.pyfunc.load_model, lambda: "do this"
        )


def test_a_model_whose_files_are_damaged_is_one_line(repository: Path) -> None:
    (description,) = Path("mlruns").rglob("artifacts/MLmodel")
    os.truncate(description, 10)
    with pytest.raises(UserError, match=f"^MLflow has no usable {CHAMPION}: .*; `python -m toy track` makes it$"):
        toy.hash_model(CHAMPION)


def test_a_model_of_other_data_is_no_champion_and_is_neither_loaded_nor_proved(repository: Path) -> None:
    """As after a change of the data set, or with two data sets on one server."""
    run = only()
    tags = {"accuracy": "1.0", runs.DATA: "0" * 32}
    other = mlflow.register_model(f"models:/{runs.model_of(run)}", toy.NAME, tags=tags)
    client().set_registered_model_alias(toy.NAME, registry.CHAMPION, other.version)
    with pytest.raises(UserError, match=f"{CHAMPION}, version 2, was made from other points; do this"):
        registry.load_champion(
            toy.NAME, toy.dataset().digest, "other points", mlflow.pyfunc.load_model, lambda: "do this"
        )
    toy.track()
    assert alias() == "1"

    client().set_tag(run.info.run_id, runs.DATA, "0" * 32)
    reason = f"run {run.info.run_id} was made from other points; check its commit out first: "
    with pytest.raises(UserError, match=reason):
        toy.prove(run.info.run_id)


# The proof


def test_a_run_is_proved_with_a_change_that_was_committed_only_after_it_and_nothing_is_touched(
    repository: Path,
) -> None:
    """Edit, run, commit: the usual order. The change is stored with the run."""
    with toy.POINTS.open("a") as points:
        points.write("3.0,7.5\n")
    run_stages()
    project.commit(repository)
    project.edit(repository, {"fit.lr": 0.5})
    identity = found()[0].info.run_id

    def files() -> dict[Path, bytes]:
        found = (path for path in repository.rglob("*") if path.is_file())
        return {path: path.read_bytes() for path in found if {".git", "__pycache__"}.isdisjoint(path.parts)}

    before = files()
    assert toy.prove(identity).difference == []
    assert files() == before


def test_a_figure_that_does_not_come_out_again_is_shown_with_both_values(repository: Path) -> None:
    """And neither later commits, nor the workspace's parameters, code and results, have to do with it."""
    run = only()
    (true,) = (row.split(",")[1] for row in toy.HISTORY.read_text().splitlines() if row.startswith("3,"))
    client().log_metric(run.info.run_id, "loss", 0.5, step=3)
    client().log_metric(run.info.run_id, "accuracy", 0.25)  # differs too, but later
    client().set_tag(run.info.run_id, "python", "3.0")
    project.edit(repository, {"fit.lr": 0.05})
    (repository / "line.py").unlink()
    project.commit(repository)
    shutil.rmtree(repository / "results")
    found = toy.prove(run.info.run_id)
    assert found.origin == f"run {run.info.run_id}, commit {run.data.tags['git.commit'][:10]}"
    assert found.difference == [
        f"epoch 3: loss is 0.5 in the run, {float(true)} here",
        f"python is 3.0 in the run, {run.data.tags['python']} here",
    ]


def test_every_result_and_the_stored_model_are_compared(repository: Path, enter: Callable[[Path], None]) -> None:
    (model,) = Path("mlruns").rglob("artifacts/line.json")
    good = model.read_text()
    model.write_text(good.replace("0", "1", 1))
    locked = Path(only().info.artifact_uri.removeprefix("file://"), runs.LOCK)
    (line,) = toy.prove(CHAMPION).difference[:1]
    assert re.fullmatch(r"the MD5 of its predictions is \w{32} in the run, \w{32} here", line)
    model.write_text(good)
    enter(repository)  # the proof has left its clone's store open
    digest = lock.results(lock.read_stages(locked.read_bytes()))[str(toy.METRICS)]
    locked.write_text(locked.read_text().replace(digest, "f" * 32))
    (line,) = toy.prove(CHAMPION).difference[:1]
    assert line == f"{toy.METRICS} is {'f' * 32} in the run, {digest} here"


def lose_files(run: Run) -> None:
    no_files()


def damage_patch(run: Run) -> None:
    client().set_tag(run.info.run_id, "git.patch.md5", "0" * 32)
    runs.log_patch(run.info.run_id, b"another")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda run: client().set_tag(run.info.run_id, "git.patch.md5", git.UNKNOWN), "does not know its git.patch"),
        (lambda run: client().set_tag(run.info.run_id, "git.commit", "a" * 40), "was made from commit a{40}, which is"),
        (lambda run: client().delete_tag(run.info.run_id, runs.DIGEST), "recorded no dvc.lock.md5; `make repro`"),
        (lambda run: client().delete_tag(run.info.run_id, "git.commit"), "is none of the pipeline's"),
        (lambda run: client().set_terminated(run.info.run_id, "KILLED"), "is KILLED, not finished; `make track` makes"),
        (lose_files, "the files of run .* are lost, so it has no proof; `make track` makes a run of the present"),
        (damage_patch, r"its uncommitted.patch.txt is damaged"),
    ],
    ids=["code unknown", "other repository", "incomplete", "foreign", "killed", "files lost", "patch damaged"],
)
def test_a_run_that_cannot_be_proved_is_refused(repository: Path, change: Callable[[Run], None], reason: str) -> None:
    change(only())
    with pytest.raises(UserError, match=reason):
        toy.prove(only().info.run_id)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("f" * 32, "Run with id=f{32} not found; `make track` makes a run of the present results"),
        (f"models:/{toy.NAME}@nobody", "alias nobody not found"),
        (f"models:/{toy.NAME}", f"accepted are {proof.FORMS}"),
        ("nonsense", f"'nonsense' is not known here; accepted are {proof.FORMS}"),
    ],
)
def test_what_names_no_model_is_refused(repository: Path, model: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        assert proof.is_revision(model) or proof.find(model)


def test_who_asks_for_a_proof_where_there_is_no_store_makes_none(without_store: Path) -> None:
    with pytest.raises(UserError, match=r"there is no MLflow store at .*; `make track` makes one from the results"):
        proof.find(CHAMPION)
    assert not Path("mlflow.db").exists()


@pytest.fixture
def copies(tmp_path: Path, enter: Callable[[Path], None]) -> Path:
    """A project of three stages that copy; the first one's result is in Git, that of the last is another each time."""
    folder = tmp_path / "copies"
    folder.mkdir()
    enter(folder)
    Path("in.txt").write_text("in")
    stages = {
        "first": {"cmd": "cp in.txt first.txt", "deps": ["in.txt"], "outs": [{"first.txt": {"cache": False}}]},
        "second": {"cmd": "cp first.txt second.txt", "deps": ["first.txt"], "outs": ["second.txt"]},
        "alone": {"cmd": "mkdir -p alone; cat alone.in > alone/out", "deps": ["in.txt"], "outs": ["alone"]},
    }
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    Path("alone.in").write_text("1")
    project.run(folder, "git", "init", "--quiet")
    project.dvc("init", "--quiet")
    project.dvc("cache", "dir", "--quiet", str(tmp_path / "cache"))  # shared with the clone in which a proof is run
    project.dvc("repro", "--quiet")
    project.commit(folder)
    return folder


def test_a_commit_is_proved_without_any_store_and_later_changes_have_no_part_in_it(
    copies: Path, tmp_path: Path, enter: Callable[[Path], None]
) -> None:
    """In a clone that has, of the files in Git, only those of the last commit."""
    Path("in.txt").write_text("other")
    project.commit(copies)
    project.run(copies, "git", "config", "uploadpack.allowFilter", "true")
    project.run(tmp_path, "git", "clone", "--quiet", "--filter=blob:none", f"file://{copies}", "a clone")
    enter(tmp_path / "a clone")
    assert proof.prove_commit("HEAD~", []).difference == []
    assert not Path("mlflow.db").exists()


def test_every_stage_is_run_again_also_one_on_which_no_other_depends(copies: Path) -> None:
    Path("alone.in").write_text("2")  # on which the stage does not say that it depends
    project.commit(copies)
    (line,) = proof.prove_commit("HEAD", []).difference
    assert line.startswith(f"alone is {lock.path_md5('alone')} in dvc.lock, ")


def test_a_commit_with_other_results_in_git_than_in_dvc_lock_is_different(copies: Path) -> None:
    Path("first.txt").write_text("better")
    project.commit(copies)
    (line,) = proof.prove_commit("HEAD", []).difference
    assert line == f"first.txt is {lineage.md5(b'better')} in Git, {lineage.md5(b'in')} in dvc.lock"
    project.run(copies, "git", "checkout", "--quiet", "HEAD~", "first.txt")
    Path("alone/out").write_text("better")
    project.run(copies, "git", "add", "--force", "alone")
    project.commit(copies)
    (line,) = proof.prove_commit("HEAD", []).difference
    assert line.startswith(f"alone is {lock.path_md5('alone')} in Git, ")


def test_a_commit_without_results_is_refused(copies: Path) -> None:
    Path("dvc.lock").unlink()
    project.commit(copies)
    with pytest.raises(UserError, match=r"^commit \w{10} has no dvc.lock with results$"):
        proof.prove_commit("HEAD", [])


def test_a_pipeline_that_fails_when_run_again_is_no_difference(copies: Path) -> None:
    Path("alone.in").unlink()
    project.commit(copies)
    with pytest.raises(UserError, match="the pipeline fails when run again; the reason is above"):
        proof.prove_commit("HEAD", [])


def test_a_result_that_only_one_side_has_is_a_difference() -> None:
    first_difference = proof._first_difference
    assert first_difference({"a": "1"}, {"a": "1", "b": "2"}, "in dvc.lock") == ["b is missing in dvc.lock, 2 here"]
    assert first_difference({"a": "1", "b": "2"}, {"a": "1"}, "in dvc.lock") == ["b is 2 in dvc.lock, missing here"]


def test_the_users_git_hooks_do_not_run_in_the_clone_that_proves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".gitconfig").write_text(f"[core]\n\thooksPath = {tmp_path}\n")
    (tmp_path / "post-checkout").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "post-checkout").chmod(0o755)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / ".gitconfig"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(project.REPOSITORY)
    assert (proof._clone("HEAD", tmp_path, []) / "dvc.yaml").exists()


# A store that moves


def test_a_moved_folder_keeps_its_store_and_nothing_is_written_to_the_old_place(
    repository: Path, tmp_path: Path, enter: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    moved = repository.rename(tmp_path / "moved")
    enter(moved)
    toy.track()
    assert f"its paths now lead to file://{moved}/mlruns" in capsys.readouterr().out
    assert only().info.artifact_uri.startswith(f"file://{moved}/mlruns")
    assert_complete(only())
    assert client().get_model_version_download_uri(toy.NAME, "1").startswith(f"file://{moved}/mlruns")
    assert toy.hash_model(CHAMPION)

    no_files()
    toy.track()  # logs a model anew
    assert_complete(only())
    assert alias() == "2"
    assert not repository.exists()


def test_a_moved_folder_is_noticed_wherever_the_store_is(
    without_store: Path, tmp_path: Path, enter: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """It may lie deeper in the folder, and moves with it, or somewhere else, and is refused."""
    (without_store / "kept").mkdir()
    inside, outside = "sqlite:///kept/own.db", f"sqlite:///{tmp_path}/own.db"
    for uri in (inside, outside):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        toy.track()
    moved = without_store.rename(tmp_path / "moved")
    enter(moved)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", inside)
    toy.track()
    assert f"its paths now lead to file://{moved}/mlruns" in capsys.readouterr().out
    monkeypatch.setenv("MLFLOW_TRACKING_URI", outside)
    reason = f"keeps its files in file://{without_store}/mlruns, which is gone; move it back, or name another"
    with pytest.raises(UserError, match=reason):
        toy.track()
    assert not without_store.exists()


# Files that are written


WRITE = "import pathlib, lineage; lineage.run_command(lambda: lineage.write(pathlib.Path('file'), 1000 * 'theirs'))"


def test_killed_in_the_middle_of_a_write_a_file_is_as_it_was(tmp_path: Path) -> None:
    project.put_code(tmp_path)
    (tmp_path / "file").write_text("whole")
    assert stopping.in_write(tmp_path, "file", signal.SIGKILL, sys.executable, "-c", WRITE) == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")]
    assert (tmp_path / "file").read_text() == "whole"
    with (tmp_path / "file").open() as reader:
        lineage.write(tmp_path / "file", "new")
        assert reader.read() == "whole"  # the new file takes the old one's name, and nothing is written into that


@pytest.mark.parametrize(("mount", "reason"), [("size=4k", "No space left on device"), ("ro", "Read-only file system")])
def test_on_a_full_or_read_only_disk_a_file_is_as_it_was_which_is_said(tmp_path: Path, mount: str, reason: str) -> None:
    """In a mount namespace of its own, where the folder is a small or a read-only file system."""
    project.put_code(tmp_path)
    script = f"""
        mount -t tmpfs -o size=64m tmpfs /mnt && cp -a . /mnt && echo whole > /mnt/file
        size=$(du -sk /mnt | cut -f1)k; mount -o remount,{mount.replace("4k", "$size")} /mnt && cd /mnt
        python -B -c "{WRITE}"; status=$?
        cat file; exit $status"""
    if project.run(tmp_path, "unshare", "-rm", "true", check=False).returncode:
        pytest.skip("no mount namespaces here")
    done = project.run(tmp_path, "unshare", "-rm", "sh", "-c", script, check=False)
    line = f"-c: cannot write file: {reason}; what was there before is untouched\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "whole\n", line)


def test_two_processes_may_write_one_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one writes when ours is written, but does not have its name yet."""
    file = tmp_path / "file"
    script = f"import pathlib, lineage; lineage.write(pathlib.Path({str(file)!r}), 'theirs')"

    def other(_: int) -> None:
        project.run(project.REPOSITORY, sys.executable, "-c", script)
        assert file.read_text() == "theirs"

    monkeypatch.setattr(os, "fsync", other)
    lineage.write(file, "ours")
    assert {path: path.read_text() for path in tmp_path.iterdir()} == {file: "ours"}


# As users start it


@pytest.mark.full
def test_experiments_of_dvc_and_a_proof_from_the_command_line(fitted: Path, tmp_path: Path) -> None:
    folder = project.copy(fitted, tmp_path / "repository")
    project.run(folder, "git", "config", "user.name", "test")
    project.run(folder, "git", "config", "user.email", "test@localhost")
    project.run(folder, "dvc", "exp", "run", "--temp", "--name", "tried", "--set-param", "fit.lr=0.2")
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    new, old = mlflow.search_runs(experiment_names=[toy.NAME], output_format="list")
    assert (new.info.run_name, new.data.params["fit.lr"], old.data.params["fit.lr"]) == ("tried", "0.2", "0.1")
    head = project.run(folder, "git", "rev-parse", "HEAD").stdout.strip()
    assert (new.data.tags["git.commit"], new.data.tags["git.patch.md5"]) == (head, runs.CLEAN)
    output = project.run(folder, sys.executable, "-m", "toy", "prove", CHAMPION).stdout
    assert output.endswith("identical\n")
