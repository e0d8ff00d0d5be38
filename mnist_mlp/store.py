"""Where MLflow's store is, and how it is opened: a server or database, or by default mlflow.db in the repository."""

import csv
import os
import platform
import re
from pathlib import Path

# A server that is down should be reported within seconds; with MLflow's own values this takes minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("PGCONNECT_TIMEOUT", "5")  # seconds; read by PostgreSQL's client library

import mlflow
import sqlalchemy
from filelock import FileLock
from mlflow.entities import Metric, Run, ViewType
from mlflow.exceptions import MlflowException
from mlflow.store.db.utils import create_sqlalchemy_engine
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from mlflow.utils.time import get_current_time_millis
from sqlalchemy.exc import SQLAlchemyError

from mnist_mlp import PUBLISHED, UserError

EXPERIMENT = "mnist"
PUBLISHED_RUN = "published"
ROOT = Path(os.environ.get("DVC_ROOT", ".")).resolve()  # the repository, even where DVC works in a temporary copy of it
SQLITE = "sqlite:///"


def uri() -> str:
    """Name the store: MLFLOW_TRACKING_URI, or mlflow.db in the repository, where `mlflow ui` looks by itself.

    Raises:
        UserError: it is a server or a database that does not answer.
    """
    address = os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    if address.startswith(SQLITE):
        return f"{SQLITE}{ROOT / address.removeprefix(SQLITE)}"
    try:  # once, as MLflow asks, with its credentials and certificates; MLflow itself would try again for minutes
        if address.startswith("http"):
            http_request(get_default_host_creds(address), "/health", "GET", timeout=5, max_retries=0).raise_for_status()
        elif "://" in address and not address.startswith("file:"):
            engine = create_sqlalchemy_engine(address)
            engine.connect().close()
            engine.dispose()
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        raise UserError(f"nothing answers at MLFLOW_TRACKING_URI, start it or unset it: {first_line(error)}") from None
    return address


def connect() -> None:
    """Open the store, and make in it what every run needs.

    Raises:
        UserError: no MLflow store is available.
    """
    address = uri()
    mlflow.set_tracking_uri(address)
    try:
        with lock():  # whoever comes first makes the tables
            if address.startswith(SQLITE):
                _create_tables(Path(address.removeprefix(SQLITE)))
            artifacts = (ROOT / "mlruns").as_uri() if address.startswith(SQLITE) else None
            experiment = mlflow.get_experiment_by_name(EXPERIMENT)
            if experiment is None:
                mlflow.create_experiment(EXPERIMENT, artifacts)
            elif Path(address.removeprefix(SQLITE)).parent == ROOT and experiment.artifact_location != artifacts:
                _follow_moved_folder(address, experiment.artifact_location, str(artifacts))
            mlflow.set_experiment(EXPERIMENT)
            _add_published_run()
            _end_runs_of_killed_processes()
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise UserError(f"MLflow at {first_line(address)} refuses: {first_line(error)}") from None


def search(condition: str, view: int = ViewType.ACTIVE_ONLY) -> list[Run]:
    """Find runs of the experiment, the newest first."""
    found: list[Run] = mlflow.search_runs(
        experiment_names=[EXPERIMENT], filter_string=condition, run_view_type=view, output_format="list"
    )
    return found


def lock() -> FileLock:
    """Let one process of this repository at a time do what must not be done twice."""
    path = ROOT / ".dvc/tmp/mlflow.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path, is_singleton=True)  # so that who holds it may take it again


def first_line(text: object) -> str:
    """Keep the first line, without the user and password that an address in it may hold."""
    return re.sub(r"//[^/@\s]*@", "//", str(text).strip().partition("\n")[0])


def _create_tables(database: Path) -> None:
    """Make MLflow's tables under another name first: killed in its many migrations, it would leave a broken store."""
    if database.exists():
        return
    part = database.with_name(database.name + ".part")
    part.unlink(missing_ok=True)
    mlflow.MlflowClient(f"{SQLITE}{part}").search_experiments()
    part.replace(database)


def _follow_moved_folder(address: str, old: str, new: str) -> None:
    """Change the folder in all paths of the store: MLflow keeps absolute ones, and would write to the old place."""
    columns = {
        "experiments": ["artifact_location"],
        "runs": ["artifact_uri"],
        "logged_models": ["artifact_location"],
        "model_versions": ["source", "storage_location"],
    }
    engine = sqlalchemy.create_engine(address)
    with engine.begin() as transaction:
        for table, names in columns.items():
            for name in names:
                update = f"UPDATE {table} SET {name} = :new || substr({name}, :length) WHERE instr({name}, :old) = 1"  # noqa: S608
                transaction.execute(sqlalchemy.text(update), {"new": new, "old": old, "length": len(old) + 1})
    engine.dispose()
    print(f"MLflow's store was made in {old.removesuffix('/mlruns')}: its paths now lead to {new}", flush=True)


def _add_published_run() -> None:
    """Add the tutorial's history once, so that charts can show it beside ours. If a user deletes it, it stays away."""
    if search(f"attributes.run_name = '{PUBLISHED_RUN}'", ViewType.ALL):
        return
    note = "The figures that the tutorial prints, from `data/published_history.csv`. No model belongs to them."
    with mlflow.start_run(run_name=PUBLISHED_RUN, tags={"mlflow.note.content": note}) as run:
        with PUBLISHED.open() as file:
            history = list(csv.DictReader(file))
        log_history(run.info.run_id, history)


def log_history(run_id: str, history: list[dict[str, str]]) -> None:
    """Log the rows of a history file in one request, with ``step`` = epoch."""
    now = get_current_time_millis()
    points = [
        Metric(name, float(value), now, int(row["epoch"]))
        for row in history
        for name, value in row.items()
        if name != "epoch"
    ]
    mlflow.MlflowClient().log_batch(run_id, metrics=points)


def _end_runs_of_killed_processes() -> None:
    """Mark runs as killed whose process on this machine is gone and had no time to do so."""
    for run in search(f"attributes.status = 'RUNNING' and tags.host = '{platform.node()}'"):
        try:
            os.kill(int(run.data.tags["pid"]), 0)  # signal 0 only asks whether the process exists
        except PermissionError:  # it exists, and is another user's
            continue
        except ProcessLookupError:
            mlflow.MlflowClient().set_terminated(run.info.run_id, "KILLED")
