"""MLflow on a server: nothing changes but where the run goes, and a server that is away costs no result."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Run

from lineage import registry
from mnist_mlp import record
from tests import project
from tests.loopback import NEVER, Server, free_port, running, silent

TRACK = (sys.executable, "-m", "stages.track")


@pytest.fixture
def repository(finished: Path, tmp_path: Path) -> Path:
    """A finished repository to do things to, without a store of its own."""
    return project.copy(finished, tmp_path / "repository", store=False)


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """An empty PostgreSQL database; its URI."""
    pytest.importorskip("psycopg")
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs:
        pytest.skip("no PostgreSQL here")
    user = "nobody" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
    with tempfile.TemporaryDirectory() as name:  # not pytest's: its folders are closed to other users
        folder = Path(name)
        if user:
            shutil.chown(folder, user)

        def run(program: str, *arguments: str) -> None:
            subprocess.run(
                [str(programs[-1].with_name(program)), "-D", str(folder / "data"), *arguments],
                user=user, extra_groups=[] if user else None, cwd=folder, check=True, stdout=subprocess.DEVNULL,
            )  # fmt: skip

        run("initdb", "--auth", "trust", "--username", "mlflow", "--no-sync")
        options = f"-k {folder} -c listen_addresses= -c fsync=off"  # reached by a file in its folder: no port is taken
        run("pg_ctl", "start", "-w", "-l", str(folder / "log"), "-o", options)
        try:
            yield f"postgresql://mlflow@/postgres?host={folder}"
        finally:
            run("pg_ctl", "stop", "-w", "-m", "immediate")


def server(database: str, folder: Path, port: int) -> AbstractContextManager[Server]:
    """Run an MLflow server over a database, with the artifacts in a folder."""
    env = project.environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")  # eight more processes, for other purposes
    return running(
        "mlflow", "server", "--port", "{port}", "--workers", "1", "--backend-store-uri", database,
        "--artifacts-destination", str(folder / "artifacts"), port=port, cwd=folder, env=env,
    )  # fmt: skip


def runs(port: int) -> list[Run]:
    """Read the server's runs, the newest first."""
    return project.runs_at(f"http://127.0.0.1:{port}")


@pytest.mark.full
def test_the_pipeline_works_unchanged_and_its_results_outlive_the_server(
    finished: Path, repository: Path, postgres: str, tmp_path: Path
) -> None:
    port = free_port()
    env = project.environment(MLFLOW_TRACKING_URI=f"http://127.0.0.1:{port}")

    with server(postgres, tmp_path, port) as mlflow_server:
        mlflow.MlflowClient(f"http://127.0.0.1:{port}").create_experiment("another team's")
        output = project.run(repository, *TRACK, env=env).stdout
        identity = runs(port)[0].info.experiment_id
        assert f"\nhttp://127.0.0.1:{port}/#/experiments/{identity}/runs?" in output
        assert project.contents(repository) == project.contents(finished)
        assert not (repository / "mlflow.db").exists()
        (run,) = runs(port)
        assert run.info.status == "FINISHED"
        assert run.info.artifact_uri.startswith("mlflow-artifacts:")
        artifacts = {artifact.path for artifact in mlflow.MlflowClient().list_artifacts(run.info.run_id)}
        assert artifacts >= {"params.yaml", "dvc.lock.yaml", "metrics.json", "plots"}
        assert mlflow.pyfunc.load_model(f"models:/{record.NAME}@{registry.CHAMPION}")

        project.edit(repository, {"train.epochs": 4})
        training = subprocess.Popen(
            ["dvc", "repro", "train"],
            cwd=repository, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        assert training.stdout is not None
        lines = []
        for line in training.stdout:
            lines.append(line)
            if line.startswith("epoch  0"):
                mlflow_server.kill()
        assert training.wait(NEVER) == 0
    output = "".join(lines)
    assert output.count("MLflow is lost") == 1
    assert "Traceback" not in output
    assert len((repository / "results/history.csv").read_text().splitlines()) == 5

    with server(postgres, tmp_path, port):  # to which it is new what the results hold
        done = project.run(repository, "dvc", "repro", env=env)
        assert "Stage 'train' didn't change, skipping" in done.stdout
        newest, broken, first = runs(port)
        assert first.info.run_id == run.info.run_id
        assert broken.info.status == "KILLED"
        assert newest.info.status == "FINISHED"
        assert len(mlflow.MlflowClient().get_metric_history(newest.info.run_id, "test_acc")) == 4
        assert newest.data.metrics["accuracy"] > 0.5
        assert mlflow.pyfunc.load_model(f"models:/{record.NAME}@{registry.CHAMPION}")


@pytest.mark.full
def test_a_server_that_is_down_is_one_line_and_nothing_is_lost(finished: Path, repository: Path) -> None:
    good = (repository / "params.yaml").read_bytes()
    project.edit(repository, {"train.lr": 0.06})
    with silent() as (port, asked):
        env = project.environment(MLFLOW_TRACKING_URI=f"http://user:secret@127.0.0.1:{port}/mlflow")
        done = project.run(repository, "dvc", "repro", env=env, check=False)
        assert len(asked) == 1
    assert done.returncode != 0
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("train: "))
    assert line.startswith("train: no MLflow store answers at MLFLOW_TRACKING_URI, start it or unset it: ")
    assert not any(word in done.stdout + done.stderr for word in ("secret", "epoch", "Traceback", "WARN"))
    (repository / "params.yaml").write_bytes(good)
    project.run(repository, "dvc", "repro", "plot")
    assert project.contents(repository) == project.contents(finished)
