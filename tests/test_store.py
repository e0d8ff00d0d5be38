"""MLflow's store: who only reads it leaves it as it is, and who is refused is told what helps."""

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from alembic import command
from mlflow.store.db.utils import _get_alembic_config

import lineage
from lineage import UserError, registry, store
from tests import project
from tests.loopback import silent
from tests.toy import toy

TOY = (sys.executable, "-m", "toy")
CHAMPION = f"models:/{toy.NAME}@{registry.CHAMPION}"
LOAD = """if True:
    import mlflow, lineage, toy
    from lineage import registry
    load = registry.load_champion
    lineage.run_command(lambda: load(toy.NAME, toy.dataset().digest, "", mlflow.pyfunc.load_model, str))"""


@pytest.fixture
def repository(fitted: Path, tmp_path: Path, enter: Callable[[Path], None]) -> Path:
    """The project in tests/toy with its store, and the commands of the link."""
    folder = project.copy(fitted, tmp_path / "repository")
    enter(folder)
    store.connect(toy.NAME)  # the copy is the store's place now
    return folder


@pytest.mark.full
def test_who_only_reads_may_do_so_on_a_read_only_disk_and_a_writer_gets_no_advice_that_harms(repository: Path) -> None:
    """In a mount namespace of its own: to root, who may write everywhere, permissions show nothing."""
    if project.run(repository, "unshare", "-rm", "true", check=False).returncode:
        pytest.skip("no mount namespaces here")
    commands = [[*TOY, "prove", CHAMPION], [sys.executable, "-c", LOAD], [*TOY, "track"]]
    script = (
        f"mount --bind . . && mount -o remount,bind,ro . && cd . && cd $PWD && {' && '.join(map(shlex.join, commands))}"
    )
    done = project.run(repository, "unshare", "-rm", "sh", "-c", script, check=False)
    assert done.stdout.endswith("identical\n")
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert line.startswith("toy: MLflow at sqlite:///")
    assert line.endswith("you may not write there: work in a clone of your own")


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("[Errno 13] Permission denied: 'mlflow.lock'", "you may not write there: work in a clone of your own"),
        (
            "(sqlite3.OperationalError) attempt to write a readonly database",
            "you may not write there: work in a clone of your own",
        ),
        ("(sqlite3.OperationalError) database is locked", "another process holds it: try again when that has ended"),
        ("(sqlite3.OperationalError) database or disk is full", "make room on the disk"),
        ("file is not a database", "it is damaged: move it away (its runs are in it), and `make track` makes one"),
        ("unable to open database file", "you may not write there: work in a clone of your own"),
    ],
)
def test_each_cause_of_a_refusal_has_its_own_advice(reason: str, advice: str) -> None:
    assert f"refuses: {reason}; {advice}" in str(store.refusal("sqlite:////place/mlflow.db", OSError(reason)))
    assert str(store.refusal("http://user:secret@host", OSError(reason))) == f"MLflow at http://host refuses: {reason}"


@pytest.mark.full
def test_the_store_of_an_older_mlflow_is_left_as_it_is_until_the_user_has_upgraded_it(repository: Path) -> None:
    address = f"sqlite:///{repository}/mlflow.db"
    command.downgrade(_get_alembic_config(address), "-1")
    before = (repository / "mlflow.db").read_bytes()
    advice = f"keep a copy of the file, and type: mlflow db upgrade '{address}'"
    reason = f"{address} is of another MLflow release than {mlflow.__version__}; if of a newer one, use that"
    for use in (store.open_to_read, lambda: store.connect(toy.NAME)):
        with pytest.raises(UserError) as refused:
            use()
        assert str(refused.value) == f"{reason}; if of an older one, {advice}"
    assert (repository / "mlflow.db").read_bytes() == before
    project.run(repository, *shlex.split(advice.partition(": ")[2]))
    assert "was complete" in project.run(repository, *TOY, "track").stdout


def test_a_proxy_that_catches_a_server_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    reason = r"http://127.0.0.1:9: \[Errno \d+\] Connection refused"
    with pytest.raises(UserError, match=f"MLFLOW_TRACKING_URI, start it or unset it: {reason}$"):
        store.uri()
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "kept")
    monkeypatch.setenv("MLFLOW_RUN_ID", "forgotten")
    monkeypatch.setenv("http_proxy", "http://user:secret@127.0.0.1:10")
    with pytest.raises(UserError, match=r"the proxy http://127.0.0.1:10 was asked; export NO_PROXY=127.0.0.1 to ask"):
        store.uri()
    assert (os.environ["MLFLOW_TRACKING_TOKEN"], "MLFLOW_RUN_ID" in os.environ) == ("kept", False)


@pytest.mark.full
def test_no_variable_of_mlflow_but_the_servers_steers_a_run(repository: Path) -> None:
    """Notebooks, clouds and `mlflow run` export the id of a run: that run stays as it was."""
    mlflow.set_tracking_uri(f"sqlite:///{repository}/mlflow.db")
    (victim,) = store.search(toy.NAME, "")
    steering = {"RUN_ID": victim.info.run_id, "RUN_NAME": "theirs", "EXPERIMENT_NAME": "theirs", "EXPERIMENT_ID": "7",
                "ENABLE_SYSTEM_METRICS_LOGGING": "true", "RUN_CONTEXT": '{"theirs": "1"}'}  # fmt: skip
    env = project.environment(**{f"MLFLOW_{name}": value for name, value in steering.items()})
    project.run(repository, *TOY, "fit", env=env)
    new, old = store.search(toy.NAME, "")
    assert old.to_dictionary() == victim.to_dictionary()
    assert (new.info.status, new.info.run_name[:5]) == ("FINISHED", "main-")
    assert "theirs" not in new.data.tags
    assert not any(name.startswith("system/cpu") for name in new.data.metrics)


def test_an_address_that_cannot_be_a_store_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "foo://x")
    with pytest.raises(UserError, match="names a kind of store that nothing here can open"):
        store.connect("any")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setattr(lineage, "ROOT", tmp_path / "50%25")
    with pytest.raises(UserError, match="MLflow cannot use a store in a path that holds '%25'; rename the folder"):
        store.connect("any")


def test_an_experiment_of_a_server_on_the_same_database_keeps_its_place(
    tmp_path: Path, enter: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of two clones that come to a new store at once, none fails."""
    enter(tmp_path)
    store.connect("ours")
    other = mlflow.create_experiment("other", artifact_location="mlflow-artifacts:/7")
    looks = iter([None])
    look = mlflow.get_experiment_by_name
    monkeypatch.setattr(mlflow, "get_experiment_by_name", lambda name: next(looks, look(name)))
    store.connect("other")
    assert mlflow.get_experiment(other).artifact_location == "mlflow-artifacts:/7"


@pytest.mark.parametrize("scheme", ["http", pytest.param("postgresql", marks=pytest.mark.full)])
def test_a_server_that_is_down_is_asked_once_and_reported_in_one_line(
    scheme: str, tmp_path: Path, enter: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """It accepts and is silent, which takes longest. MLflow itself would ask again for minutes, and warn each time."""
    enter(tmp_path)
    with silent() as (port, asked):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{scheme}://user:secret@127.0.0.1:{port}/mlflow")
        with pytest.raises(UserError) as refused:
            store.connect("any")
        assert len(asked) == 1
    assert str(refused.value).startswith("no MLflow store answers at MLFLOW_TRACKING_URI, start it or unset it: ")
    assert "127.0.0.1" in str(refused.value) or "timeout" in str(refused.value)
    assert "secret" not in str(refused.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:"])
def test_a_store_in_memory_is_refused(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage would have one of its own, and all would be lost."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI names a store in memory, .*; name a file or a server"):
        store.connect("any")


def test_what_is_left_of_a_store_that_was_half_made_goes_away(tmp_path: Path, enter: Callable[[Path], None]) -> None:
    """As after a kill in the middle of MLflow's many migrations."""
    enter(tmp_path)
    Path("mlflow.db.part").write_bytes(b"half of it")
    store.connect("any")
    assert Path("mlflow.db").stat().st_size > 400_000
    assert [path.name for path in tmp_path.glob("mlflow.db*")] == ["mlflow.db"]
