"""MLflow: one run for one pipeline run, with everything that leads from its numbers back to their origin.

``train`` opens the run; ``evaluate`` and ``plot`` add to it. They find it by the MD5 of the model file, which is what
``dvc.lock`` holds too: a run id in a DVC output would change ``dvc.lock`` at every run for nothing.
"""

import csv
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

# A server that is down is to be reported within seconds; by MLflow's own defaults it would take minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

import mlflow
import numpy as np
from filelock import FileLock
from mlflow.data.http_dataset_source import HTTPDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from sqlalchemy.exc import SQLAlchemyError

from stages import CPUINFO, HISTORY, MODEL, StageError, data
from stages.params import Params

EXPERIMENT = "mnist"
REGISTERED = "mnist-mlp"
CHAMPION = "champion"
ROOT = Path(os.environ.get("DVC_ROOT", ".")).resolve()  # the repository, even where DVC works in a temporary copy of it


class Tracked:
    """The active MLflow run. Once the server is lost, the stage goes on without it."""

    def __init__(self, run_id: str) -> None:
        """Start with a server that has just answered."""
        self.run_id = run_id
        self.lost = False

    def log(self, call: Callable[[], object]) -> None:
        """Make a call to MLflow, unless the server is lost; say so once."""
        if self.lost:
            return
        try:
            call()
        except (MlflowException, OSError) as error:
            self.lost = True
            print(f"MLflow is lost ({_shown(error)}); going on. `dvc repro` sends it what it missed", file=sys.stderr)

    def log_epoch(self, epoch: int, figures: Mapping[str, float]) -> None:
        """Log one epoch's figures, with ``step`` = epoch."""
        self.log(lambda: mlflow.log_metrics(dict(figures), step=epoch))

    def log_model(self, p: Params, weights: bytes) -> None:
        """Log the model that the weights make: raw images in, probabilities out.

        Args:
            p: the parameters that it was trained with.
            weights: the content of the model file.
        """
        from mlflow.models import ModelSignature
        from mlflow.types import Schema, TensorSpec

        from stages import net  # only here: it imports torch, for which plot has no other use

        model = net.mlp(p.model.hidden)
        net.load_weights(model, weights, str(MODEL))
        requirements = [f"{name}=={importlib.metadata.version(name)}" for name in ("mlflow", "numpy", "torch")]
        self.log(
            lambda: mlflow.pytorch.log_model(
                net.ImageClassifier(model, p.data.mean, p.data.std).eval(),
                name="model",
                serialization_format="pt2",  # no pickle
                signature=ModelSignature(
                    Schema([TensorSpec(np.dtype(np.uint8), (-1, 28, 28))]),
                    Schema([TensorSpec(np.dtype(np.float32), (-1, 10))]),
                ),
                input_example=data.load("t10k")[0][:2],
                pip_requirements=requirements,
            )
        )
        self.log(lambda: mlflow.set_tag("model.md5", md5(weights)))  # last: a run that is found by it is whole


@contextmanager
def new_run(p: Params, **tags: str) -> Iterator[Tracked]:
    """Open a run with the parameters, the data set, and tags that say what made it; close it as what it ended as.

    Raises:
        StageError: no MLflow store is to be had.
    """
    connect()
    source = HTTPDatasetSource(p.data.mirrors[0])
    with _run(run_name=os.environ.get("DVC_EXP_NAME"), tags=_origin() | tags) as tracked:
        mlflow.log_params(p.flat())
        dataset = MetaDataset(source, name="MNIST", digest=data.DIGEST)  # type: ignore[abstract]
        mlflow.log_input(dataset, context="training")
        mlflow.log_artifact("params.yaml")
        yield tracked


@contextmanager
def run_of_model(p: Params) -> Iterator[Tracked]:
    """Open the run that trained the model file; where this store has none, a new one, filled from the files.

    Raises:
        StageError: no MLflow store is to be had, it was lost on the way, or the model file is damaged.
    """
    weights = MODEL.read_bytes()
    connect()
    runs = _search(f"tags.`model.md5` = '{md5(weights)}'")
    note = f"Trained elsewhere, or while MLflow was away: filled in from `{HISTORY}` and `{MODEL}`."
    with _run(run_id=runs[0].info.run_id) if runs else new_run(p, **{"mlflow.note.content": note}) as tracked:
        if not runs:
            for row in csv.DictReader(HISTORY.open()):
                tracked.log_epoch(int(row.pop("epoch")), {name: float(value) for name, value in row.items()})
            tracked.log_model(p, weights)
        yield tracked
    if tracked.lost:  # unlike a training, this takes seconds: DVC is to take it for undone and repeat it
        raise StageError("MLflow has not got all of it; `dvc repro` runs this stage again")


def register(tracked: Tracked, p: Params, accuracy: float) -> str:
    """Register the run's model, once for the same bytes, and make it champion if it is better than the present one.

    Args:
        tracked: the active run.
        p: for the target, which a model must reach to be registered.
        accuracy: on the test set, exact.

    Returns:
        What came of it, for people.
    """
    if accuracy < p.evaluate.target_accuracy:
        return "not registered: the target is missed"
    client, digest = mlflow.MlflowClient(), md5(MODEL.read_bytes())
    with _lock():
        for version in client.search_model_versions(f"name = '{REGISTERED}'"):
            if version.tags.get("model.md5") == digest:
                return f"registered already: {REGISTERED} version {version.version}"
        run = client.get_run(tracked.run_id)
        assert run.outputs is not None
        tags = {key: run.data.tags[key] for key in ("git.commit", "data.digest", "model.md5")}
        figures = {name: str(run.data.metrics[name]) for name in ("accuracy", "batch_mean_accuracy", "loss")}
        model = f"models:/{run.outputs.model_outputs[0].model_id}"
        version = mlflow.register_model(model, REGISTERED, tags=tags | figures)
        try:
            champion = client.get_model_version_by_alias(REGISTERED, CHAMPION)
        except MlflowException:
            champion = None
        if champion and float(champion.tags["accuracy"]) >= accuracy:
            return f"registered: {REGISTERED} version {version.version}; champion stays version {champion.version}"
        client.set_registered_model_alias(REGISTERED, CHAMPION, version.version)
        return f"registered: {REGISTERED} version {version.version}, the new champion"


def md5(content: bytes) -> str:
    """Hash a file's content as DVC does."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def store() -> str:
    """Name the store: MLFLOW_TRACKING_URI, or mlflow.db in the repository, where `mlflow ui` looks by itself.

    Raises:
        StageError: it is a server, and does not answer.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("http"):
        try:  # as MLflow asks, with its credentials and certificates, but only once: it would go on for minutes
            http_request(get_default_host_creds(uri), "/health", "GET", timeout=5, max_retries=0).raise_for_status()
        except (MlflowException, OSError) as error:
            raise StageError(
                f"no MLflow server answers at MLFLOW_TRACKING_URI, start it or unset it: {_shown(error)}"
            ) from None
    if uri.startswith("sqlite:///"):
        uri = f"sqlite:///{ROOT / uri.removeprefix('sqlite:///')}"
    return uri


def connect() -> None:
    """Make the store ready for a run.

    Raises:
        StageError: no MLflow store is to be had.
    """
    uri = store()
    artifacts = (ROOT / "mlruns").as_uri() if uri.startswith("sqlite:///") else None
    mlflow.set_tracking_uri(uri)
    try:
        with _lock():  # whoever comes first makes the tables
            if uri.startswith("sqlite:///"):
                _create(Path(uri.removeprefix("sqlite:///")))
            if mlflow.get_experiment_by_name(EXPERIMENT) is None:
                mlflow.create_experiment(EXPERIMENT, artifacts)
            mlflow.set_experiment(EXPERIMENT)
            _close_left_running()
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise StageError(f"MLflow at {_shown(uri)} refuses: {_shown(error)}") from None


def _create(database: Path) -> None:
    """Make MLflow's tables under another name first: killed in its many migrations, it would leave a broken store."""
    if database.exists():
        return
    part = database.with_name(database.name + ".part")
    part.unlink(missing_ok=True)
    mlflow.MlflowClient(f"sqlite:///{part}").search_experiments()
    part.replace(database)


def _lock() -> FileLock:
    """Let one process of this repository at a time do what must not be done twice."""
    path = ROOT / ".dvc/tmp/mlflow.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)


def _search(condition: str) -> list[Run]:
    """Find runs of the experiment, the newest first."""
    runs: list[Run] = mlflow.search_runs(experiment_names=[EXPERIMENT], filter_string=condition, output_format="list")
    return runs


def _close_left_running() -> None:
    """Mark the runs of killed processes of this machine, which had no time to do so, as killed."""
    for run in _search(f"attributes.status = 'RUNNING' and tags.host = '{platform.node()}'"):
        try:
            os.kill(int(run.data.tags["pid"]), 0)  # signal 0 only asks whether the process is there
        except PermissionError:  # it is, and another user's
            continue
        except ProcessLookupError:
            mlflow.MlflowClient().set_terminated(run.info.run_id, "KILLED")


@contextmanager
def _run(
    run_id: str | None = None, run_name: str | None = None, tags: Mapping[str, str] | None = None
) -> Iterator[Tracked]:
    """Start or resume a run, and end it as what it came to."""
    process = {"host": platform.node(), "pid": str(os.getpid())}
    run = mlflow.start_run(run_id, run_name=run_name, tags={**(tags or {}), **process})
    tracked, status = Tracked(run.info.run_id), "FAILED"
    try:
        yield tracked
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except MlflowException as error:
        raise StageError(f"MLflow refuses: {_shown(error)}") from None
    finally:
        tracked.log(lambda: mlflow.end_run(status))


def _origin() -> dict[str, str]:
    """Say what makes the run: which code, data, versions and machine."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "mlflow", "dvc")}
    return versions | {
        "git.commit": os.environ.get("DVC_EXP_BASELINE_REV") or _git("rev-parse", "HEAD"),
        "git.branch": _git("-C", str(ROOT), "rev-parse", "--abbrev-ref", "HEAD"),
        # All that decides what comes out, but for the parameters: these are in the run.
        "git.uncommitted": _git("status", "--porcelain", "--", "stages", "data", "dvc.yaml"),
        "data.digest": data.DIGEST,
        "python": platform.python_version(),
        "cpu": cpu(),
    }


def cpu() -> str:
    """Name the processor."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    names = [line for line in lines if line.startswith("model name")]
    return names[0].partition(": ")[2] if names else platform.machine()


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()


def _shown(text: object) -> str:
    """Keep the first line, without the user and password that a URI in it may hold."""
    return re.sub(r"//[^/@\s]*@", "//", str(text).strip().splitlines()[0])
