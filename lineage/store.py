"""Where MLflow's store is, and how it is opened: a server or database, or by default mlflow.db in the repository."""

import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
# A model's .pt2 file contains its weights as a pickle. With this setting MLflow opens the file only if that pickle
# holds nothing but tensors.
os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
# A server that is down should be reported within seconds; with MLflow's own values this takes minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
os.environ.setdefault("PGCONNECT_TIMEOUT", "5")  # seconds; read by PostgreSQL's client library

import mlflow
import sqlalchemy
from filelock import FileLock
from mlflow.entities import Experiment, Run, ViewType
from mlflow.exceptions import MlflowException
from mlflow.store.db.utils import _get_latest_schema_revision, create_sqlalchemy_engine
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from requests.utils import get_environ_proxies
from sqlalchemy.exc import NoSuchModuleError, SQLAlchemyError

import lineage
from lineage import UserError

SQLITE = "sqlite:///"
# MLflow's remarks on tables that it creates, files that it does not find, and databases that refuse, with a hundred
# lines of traceback. What matters of it is raised as well, and is said in one line.
for _remarks in ("mlflow.store.db.utils", "mlflow.store.artifact.artifact_repo"):
    logging.getLogger(_remarks).setLevel(logging.CRITICAL)
# What helps if a database that is a file refuses, by words of SQLite or of the system.
ADVICE = {
    "permission denied|readonly|read-only|unable to open": "; you may not write there: work in a clone of your own",
    "not a database|malformed|no such table": "; it is damaged: move it away (its runs are in it), and `make track` "
    "makes one of the present results",
    "locked": "; another process holds it: try again when that has ended",
    "disk is full|no space": "; make room on the disk",
}
KEPT = ("TRACKING_", "REGISTRY_URI", "WORKSPACE", "S3_", "MYSQL_SSL_", "HTTP_", "DISABLE_TELEMETRY",
        "ALLOW_PICKLE_DESERIALIZATION", "ENABLE_ARTIFACTS_PROGRESS_BAR")  # fmt: skip
CHOSEN = os.environ.get("MLFLOW_TRACKING_URI", "")  # by the user; MLflow itself sets the variable later


def uri() -> str:
    """Name the store: MLFLOW_TRACKING_URI, or mlflow.db in the repository, where `mlflow ui` looks by itself.

    Raises:
        UserError: it is a server or a database that does not answer.
    """
    # Only where a server is, and how to log in there, is for the caller's environment to say. Notebooks, clouds and
    # `mlflow run` export more, such as MLFLOW_RUN_ID: the run of that id would be taken over.
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        if not name.removeprefix("MLFLOW_").startswith(KEPT):
            del os.environ[name]
    address = os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    if address in ("sqlite://", f"{SQLITE}:memory:"):
        raise UserError(
            "MLFLOW_TRACKING_URI names a store in memory, which ends with each stage; name a file or a server"
        )
    if address.startswith(SQLITE):
        if odd := re.search(r"\?|%[0-9a-fA-F]{2}", str(lineage.ROOT)):  # as in an address
            raise UserError(
                f"{lineage.ROOT}: MLflow cannot use a store in a path that holds {odd[0]!r}; rename the folder"
            )
        return f"{SQLITE}{lineage.ROOT / address.removeprefix(SQLITE)}"
    try:  # once, as MLflow asks, with its credentials and certificates; MLflow itself would try again for minutes
        if address.startswith("http"):
            answer = http_request(get_default_host_creds(address), "/health", "GET", timeout=5, max_retries=0)
            answer.raise_for_status()
            if answer.text.strip() != "OK":
                raise OSError("what answers is no MLflow server")
        elif "://" in address and not address.startswith("file:"):
            engine = create_sqlalchemy_engine(address)
            engine.connect().close()
            engine.dispose()
    except (ImportError, NoSuchModuleError) as error:
        raise UserError(f"MLFLOW_TRACKING_URI names a kind of store that nothing here can open: {error}") from None
    except (MlflowException, SQLAlchemyError, OSError) as error:
        advice, target = "start it or unset it", urlsplit(address)
        if proxy := get_environ_proxies(address).get(target.scheme):
            advice = f"the proxy {first_line(proxy)} was asked; export NO_PROXY={target.hostname} to ask the server"
        cause = re.search(r"\[Errno -?\d+\] [\w ]+", str(error))  # in the words of several libraries around it
        reason = f"{first_line(address)}: {cause[0]}" if cause else first_line(error)
        raise UserError(f"no MLflow store answers at MLFLOW_TRACKING_URI, {advice}: {reason}") from None
    return address


def open_to_read() -> None:
    """Open the store that is there, and write nothing to it: it may be somebody else's, or on a disk that is read-only.

    Raises:
        UserError: there is no store, or it cannot be read.
    """
    address = uri()
    if address.startswith(SQLITE):
        if not Path(address.removeprefix(SQLITE)).exists():
            raise UserError(f"there is no MLflow store at {address}; `make track` makes one from the results")
        check_tables(address)
    mlflow.set_tracking_uri(address)


def connect(experiment: str) -> None:
    """Open the store at an experiment, and make both if they are not there.

    Raises:
        UserError: no MLflow store is available.
    """
    address = uri()
    mlflow.set_tracking_uri(address)
    try:
        with lock():  # whoever comes first makes the tables
            if address.startswith(SQLITE):
                _create_tables(Path(address.removeprefix(SQLITE)))
                check_tables(address)
            artifacts = (lineage.ROOT / "mlruns").as_uri() if address.startswith(SQLITE) else None
            found = mlflow.get_experiment_by_name(experiment) or _create(experiment, artifacts)
            old = found.artifact_location
            ours = old.startswith("file://") and old.endswith("/mlruns")  # not a place that a user has chosen
            if ours and artifacts and old != artifacts:
                if lineage.ROOT in Path(address.removeprefix(SQLITE)).parents:
                    _follow_moved_folder(address, old, artifacts)
                elif not Path(unquote(urlsplit(old).path)).parent.exists():
                    raise UserError(f"{address} keeps its files in {old}, which is gone; move it back, or name another")
            mlflow.set_experiment(experiment)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise refusal(address, error) from None


def check_tables(address: str) -> None:
    """Refuse a database with the tables of another MLflow release, which MLflow would change without asking.

    Raises:
        UserError: it is of another release, or cannot be read.
    """
    file = f"file:{quote(address.removeprefix(SQLITE))}?mode=ro"
    try:
        with closing(sqlite3.connect(file, uri=True)) as database:
            (found,) = database.execute("SELECT version_num FROM alembic_version").fetchone()
    except (sqlite3.Error, TypeError) as error:
        raise refusal(address, error) from None
    if found != _get_latest_schema_revision():
        raise UserError(
            f"{address} is of another MLflow release than {mlflow.__version__}; if of a newer one, use that; if of an "
            f"older one, keep a copy of the file, and type: mlflow db upgrade '{address}'"
        )


def refusal(address: str, error: Exception) -> UserError:
    """Say that a store refuses, and what helps."""
    text = first_line(error)
    advice = next((advice for words, advice in ADVICE.items() if re.search(words, str(error), re.IGNORECASE)), "")
    return UserError(f"MLflow at {first_line(address)} refuses: {text}{advice if address.startswith(SQLITE) else ''}")


@contextmanager
def in_one_line(command: str) -> Iterator[None]:
    """Where MLflow refuses, say so, and which command tries again.

    Raises:
        UserError: MLflow refuses.
    """
    try:
        yield
    except (MlflowException, OSError) as error:
        raise UserError(f"MLflow refuses: {first_line(error)}; `{command}` tries again") from None


def experiment_id(name: str) -> str:
    """Look an experiment up in the store that ``connect`` has opened."""
    experiment = mlflow.get_experiment_by_name(name)
    assert experiment
    return str(experiment.experiment_id)


def search(experiment: str, condition: str, view: int = ViewType.ACTIVE_ONLY) -> list[Run]:
    """Find runs of an experiment, the newest first."""
    found: list[Run] = mlflow.search_runs(
        experiment_names=[experiment], filter_string=condition, run_view_type=view, output_format="list"
    )
    return found


def lock() -> FileLock:
    """Let one process of this repository at a time do what must not be done twice."""
    path = lineage.ROOT / ".dvc/tmp/mlflow.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path, is_singleton=True)  # so that who holds it may take it again


def first_line(text: object) -> str:
    """Keep the first line that says something, without the user and password that an address in it may hold."""
    said = re.sub(r"^\(raised as a result of Query-invoked autoflush.*\n", "", str(text).strip())  # SQLAlchemy's
    return re.sub(r"//[^/@\s]*@", "//", said.partition("\n")[0])


def _create(name: str, artifacts: str | None) -> Experiment:
    """Create an experiment, unless another clone does so at the same time."""
    try:
        mlflow.create_experiment(name, artifacts)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return mlflow.get_experiment_by_name(name)  # type: ignore[return-value]  # it is there now


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
