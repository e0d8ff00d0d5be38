"""MLflow's model registry: versions of ``mnist-mlp``, and the one to use, which bears the alias ``champion``."""

import json
import re
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import mlflow
import numpy as np
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from numpy.typing import NDArray

from lineage import HERE, UserError
from mnist_mlp import params, store, tracking
from mnist_mlp.params import Params
from mnist_mlp.recipe import METRICS, data

Classifier = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
NAME = "mnist-mlp"
CHAMPION = "champion"
ABOUT = (
    f"Models of {data.NAME} that reach the target: raw images in, probabilities out. A version names its run and "
    f"commit. `{CHAMPION}` is the best one: `make serve` answers from it, `make verify` proves it."
)
TAGS = ("git.commit", "data.digest", "model.md5")
RUN = "run"
OTHER_DATA = f"other data than {data.NAME} as mnist_mlp/recipe/data.py describes it"
FIGURES = ("validation_accuracy", "accuracy")  # to choose by: the first that a version has


def register(run: Run, config: Params) -> str:
    """Make the run's model a version if it reaches the target, once for the same bytes, and decide who is champion.

    Args:
        run: a complete run.
        config: for the target, and for ``evaluate.register``.

    Returns:
        What came of it, for people.
    """
    if not config.evaluate.register_model:
        return "not registered: evaluate.register is false"
    reached = run.data.metrics["accuracy"] >= config.evaluate.target_accuracy
    try:
        with store.lock():
            version = _version_of(run) if reached else None
            champion = _decide()
    except MlflowException as error:
        raise UserError(f"MLflow refuses: {store.first_line(error)}; `make track` tries again") from None
    state = f"{NAME} version {version.version}" if version else "not registered, because the target is missed"
    if champion is None:
        return f"{state}; there is no champion of these data"
    same = version and champion.version == version.version
    return f"{state}, the champion" if same else f"{state}; the champion is version {champion.version}"


def _version_of(run: Run) -> ModelVersion:
    """Find the version with the bytes of the run's model, or make it.

    The tag ``run`` names a complete run, which says where the version comes from. MLflow's own link leads to the run
    that has stored the model first; that one may have been interrupted later.
    """
    for version in _versions():
        if version.tags.get("model.md5") == run.data.tags["model.md5"] and _usable(version):
            if not _is_complete(version.tags.get(RUN)):
                mlflow.MlflowClient().set_model_version_tag(NAME, version.version, RUN, run.info.run_id)
            return version
    identity = run.info.run_id
    tags = {RUN: identity} | {name: run.data.tags[name] for name in TAGS}
    tags |= {name: str(run.data.metrics[name]) for name in FIGURES if name in run.data.metrics}
    with redirect_stderr(StringIO()):  # MLflow's words on what `register` says
        version = mlflow.register_model(f"models:/{tracking.model_of(run)}", NAME, tags=tags)
    client, accuracy = mlflow.MlflowClient(), f"{run.data.metrics['accuracy']:.2%}"
    if not client.get_registered_model(NAME).description:
        client.update_registered_model(NAME, ABOUT)
    about = f"Test accuracy {accuracy}, from run `{run.info.run_name}`. Prove it: `make verify MODEL={identity}`"
    return client.update_model_version(NAME, version.version, about)


def _decide() -> ModelVersion | None:
    """Give the alias to the best version of the present data. Of equal ones the champion stays, else it is the oldest.

    The digest of the data covers the test set: an accuracy on another one says nothing here. A version with a
    validation accuracy comes before all that were only tested: to choose by the test set is to train on it.

    It looks again after each change: of several clones that register at once on one server, the last to change
    anything sees the versions of all.
    """
    client = mlflow.MlflowClient()
    while True:
        champion = _champion()
        ours = filter(_is_of_present_data, _versions())
        ranked = sorted(ours, key=lambda v: (_merit(v), str(v.version) == champion, -int(v.version)), reverse=True)
        best = next(filter(_usable, ranked), None)
        if best is None or str(best.version) == champion:
            return best
        client.set_registered_model_alias(NAME, CHAMPION, best.version)


def _versions() -> list[ModelVersion]:
    return list(mlflow.MlflowClient().search_model_versions(f"name = '{NAME}'"))


def _champion() -> str | None:
    try:
        return str(mlflow.MlflowClient().get_model_version_by_alias(NAME, CHAMPION).version)
    except MlflowException:
        return None


def _is_of_present_data(version: ModelVersion) -> bool:
    run = _run_of(version)
    return version.tags.get("data.digest", run and run.data.tags.get("data.digest")) == data.DIGEST


def _run_of(version: ModelVersion) -> Run | None:
    try:
        return mlflow.get_run(version.run_id or "")
    except MlflowException:
        return None


def _usable(version: ModelVersion) -> bool:
    """Look whether the version's files are there; they can be lost, and a new version then takes its place."""
    logged = re.search(r"\bm-[0-9a-f]{32}\b", version.source or "")  # where it is; MLflow does not fill in `model_id`
    if logged:
        return tracking.is_whole(logged[0])
    try:  # a version that was made by hand, from files
        return bool(mlflow.artifacts.list_artifacts(artifact_uri=f"models:/{NAME}/{version.version}"))
    except (MlflowException, OSError):
        return False


def _is_complete(run_id: str | None) -> bool:
    try:
        run = mlflow.get_run(run_id or "")
    except MlflowException:
        return False
    there = run.info.status == "FINISHED" and run.info.lifecycle_stage == "active"
    return there and "dvc.lock.md5" in run.data.tags and tracking.is_repeatable(run)


def _merit(version: ModelVersion) -> tuple[bool, float]:
    """Say whether a version has a validation accuracy, and what to rank it by: 0 if neither it nor its run tells."""
    found: dict[str, Any] = dict(version.tags)
    if found.keys().isdisjoint(FIGURES) and (run := _run_of(version)):
        found = run.data.metrics
    validation = "validation_accuracy" in found
    try:
        value = float(found.get(FIGURES[0] if validation else FIGURES[1], 0))
    except ValueError:  # a tag that somebody has set by hand
        value = 0.0
    return validation, value if 0 <= value <= 1 else 0.0


def load() -> tuple[ModelVersion, Classifier]:
    """Load the champion.

    Returns:
        Its version, and a function from raw images (N, *SHAPE), uint8, 0 for paper to 255 for ink, to probabilities
        (N, CLASSES), float32; any N from 1.

    Raises:
        UserError: no MLflow store is available, or no champion in it, or its files are lost, damaged or unsafe.
    """
    import torch

    store.open_to_read()
    uri = f"models:/{NAME}@{CHAMPION}"
    try:
        version = mlflow.MlflowClient().get_model_version_by_alias(NAME, CHAMPION)
        if not _is_of_present_data(version):
            raise UserError(f"{uri}, version {version.version}, was made from {OTHER_DATA}; {advice()}")
        with tempfile.TemporaryDirectory() as copy:  # MLflow writes a file beside the model that it loads
            model = mlflow.pytorch.load_model(uri, dst_path=copy)
    except (MlflowException, OSError, RuntimeError) as error:
        reason = store.first_line(error).partition(". ")[0].rstrip(".")
        raise UserError(f"MLflow has no usable {uri}: {reason}; {advice()}") from None

    def classify(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.no_grad():
            probabilities: NDArray[np.float32] = model(torch.from_numpy(images)).numpy()
        return probabilities

    return version, classify


def advice() -> str:
    """Say what to do if there is no champion."""
    try:
        config, accuracy = params.load(), json.loads((HERE / METRICS).read_text())["accuracy"]
    except (UserError, OSError, ValueError, KeyError):
        return "run `make repro`"
    if not config.evaluate.register_model:
        return "params.yaml: evaluate.register is false; set it to true, then run `make repro`"
    if accuracy < (target := config.evaluate.target_accuracy):
        missed = f"the results miss the target, {accuracy:.2%} of {target:.2%}"
        return f"{missed}, so there is no champion; change params.yaml, then run `make repro`"
    return "`make track` makes it from the results"
