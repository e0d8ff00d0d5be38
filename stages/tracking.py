"""MLflow: one run for one pipeline run, with everything that leads from its numbers back to their origin.

``train`` opens the run; ``evaluate`` and ``plot`` add to it. They find it by the MD5 of the model file, which is what
``dvc.lock`` holds too: a run id in a DVC output would change ``dvc.lock`` at every run for nothing.
"""

import csv
import hashlib
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
import urllib.error
import urllib.request
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
from mlflow.exceptions import MlflowException

from stages import HISTORY, MODEL, StageError, data
from stages.params import Params

EXPERIMENT = "mnist"
ROOT = Path(os.environ.get("DVC_ROOT", ".")).resolve()  # the repository, even where DVC works in a temporary copy of it


class Tracked:
    """The active MLflow run. Once the server is lost, the stage goes on without it."""

    def __init__(self) -> None:
        """Start with a server that has just answered."""
        self.lost = False

    def log(self, call: Callable[[], object]) -> None:
        """Make a call to MLflow, unless the server is lost; say so once."""
        if self.lost:
            return
        try:
            call()
        except (MlflowException, OSError) as error:
            self.lost = True
            print(f"MLflow is lost ({_first_line(error)}); going on. `dvc repro` sends it what it missed", file=sys.stderr)

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
    _connect()
    source = HTTPDatasetSource(p.data.mirrors[0])
    with _closing(mlflow.start_run(run_name=os.environ.get("DVC_EXP_NAME"))) as tracked:
        mlflow.set_tags(_origin() | tags)
        mlflow.log_params(p.flat())
        mlflow.log_input(MetaDataset(source, name="MNIST", digest=data.DIGEST), context="training")
        mlflow.log_artifact("params.yaml")
        yield tracked


@contextmanager
def run_of_model(p: Params) -> Iterator[Tracked]:
    """Open the run that trained the model file; where this store has none, a new one, filled from the files.

    Raises:
        StageError: no MLflow store is to be had, or the model file is damaged.
    """
    weights = MODEL.read_bytes()
    _connect()
    runs = mlflow.search_runs(
        [mlflow.get_experiment_by_name(EXPERIMENT).experiment_id],
        f"tags.model.md5 = '{md5(weights)}'",
        max_results=1,
        output_format="list",
    )  # the newest first
    if runs:
        with _closing(mlflow.start_run(run_id=runs[0].info.run_id)) as tracked:
            yield tracked
        return
    note = f"Trained elsewhere, or while MLflow was away: filled in from `{HISTORY}` and `{MODEL}`."
    with new_run(p, **{"mlflow.note.content": note}) as tracked:
        for row in csv.DictReader(HISTORY.open()):
            tracked.log_epoch(int(row.pop("epoch")), {name: float(value) for name, value in row.items()})
        tracked.log_model(p, weights)
        yield tracked


def md5(content: bytes) -> str:
    """Hash a file's content as DVC does."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _connect() -> None:
    """Choose the store: MLFLOW_TRACKING_URI, or mlflow.db in the repository, where `mlflow ui` looks by itself."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("http"):
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5)  # noqa: S310
        except (OSError, ValueError) as error:
            raise StageError(f"no MLflow server answers at MLFLOW_TRACKING_URI={uri} ({error}); start it, or unset it") from None
    artifacts = None
    if uri.startswith("sqlite:///"):
        uri = f"sqlite:///{ROOT / uri.removeprefix('sqlite:///')}"
        artifacts = (ROOT / "mlruns").as_uri()
    mlflow.set_tracking_uri(uri)
    try:
        with FileLock(ROOT / ".dvc/tmp/mlflow.lock"):  # whoever comes first makes the tables, the others wait
            if mlflow.get_experiment_by_name(EXPERIMENT) is None:
                mlflow.create_experiment(EXPERIMENT, artifacts)
            mlflow.set_experiment(EXPERIMENT)
            _close_left_running()
    except (MlflowException, OSError) as error:
        raise StageError(f"MLflow at {uri} refuses: {_first_line(error)}") from None


def _close_left_running() -> None:
    """Mark the runs of killed processes of this machine, which had no time to do so, as killed."""
    for run in mlflow.search_runs(
        [mlflow.get_experiment_by_name(EXPERIMENT).experiment_id],
        f"attributes.status = 'RUNNING' and tags.host = '{platform.node()}'",
        output_format="list",
    ):
        if not Path(f"/proc/{run.data.tags['pid']}").exists():
            mlflow.MlflowClient().set_terminated(run.info.run_id, "KILLED")


@contextmanager
def _closing(run: mlflow.ActiveRun) -> Iterator[Tracked]:
    tracked, status = Tracked(), "FAILED"
    try:
        tracked.log(lambda: mlflow.set_tags({"host": platform.node(), "pid": str(os.getpid())}))
        yield tracked
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracked.log(lambda: mlflow.end_run(status))


def _origin() -> dict[str, str]:
    """Say what makes the run: which code, data, versions and machine."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "mlflow", "dvc")}
    return {
        "git.commit": _git("rev-parse", "HEAD"),
        "git.branch": os.environ.get("DVC_EXP_GIT_BRANCH") or _git("rev-parse", "--abbrev-ref", "HEAD"),
        # What a run's own stages write is no uncommitted code, and the parameters are in the run.
        "git.uncommitted": _git("status", "--porcelain", "--", ".", ":!results", ":!dvc.lock", ":!params.yaml"),
        "data.digest": data.DIGEST,
        "python": platform.python_version(),
        "cpu": _cpu(),
        "threads": os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count()),
    } | versions


def _cpu() -> str:
    """Name the processor."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(": ")[2] if names else platform.machine()


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
