"""MLflow's model registry: versions of a model, and the one to use, which bears the alias ``champion``."""

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, suppress
from io import StringIO
from typing import Any

import mlflow
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from lineage import UserError, runs, store

CHAMPION = "champion"
RUN = "run"  # a tag of a version: the complete run that says where it comes from


def uri(model: str) -> str:
    """Give the address of the champion."""
    return f"models:/{model}@{CHAMPION}"


@store.in_one_line("make track")
def register(run: Run, model: str, about: str, ranks: Sequence[str]) -> ModelVersion:
    """Find the version with the bytes of a run's model, or make it.

    Args:
        run: a complete run.
        model: the name of the registered model.
        about: its description.
        ranks: the metrics by which ``crown`` chooses; the last is named in the version's description.

    Raises:
        UserError: MLflow refuses.
    """
    client, identity = mlflow.MlflowClient(), run.info.run_id
    tags = {RUN: identity} | {name: run.data.tags[name] for name in ("git.commit", runs.DATA, runs.MODEL)}
    tags |= {name: str(run.data.metrics[name]) for name in ranks if name in run.data.metrics}
    result = f"{ranks[-1].capitalize()} {run.data.metrics[ranks[-1]]:.2%}"
    for version in versions(model):
        if version.tags.get(runs.MODEL) == tags[runs.MODEL] and _is_usable(version):
            if not _is_complete(version.tags.get(RUN)):
                client.set_model_version_tag(model, version.version, RUN, identity)
            return version
    with redirect_stderr(StringIO()):  # MLflow's words on what the caller says
        version = mlflow.register_model(f"models:/{runs.model_of(run)}", model, tags=tags)
    if not client.get_registered_model(model).description:
        client.update_registered_model(model, about)
    origin = f"{result}, from run `{run.info.run_name}`. Prove it: `make verify MODEL={identity}`"
    return client.update_model_version(model, version.version, origin)


@store.in_one_line("make track")
def crown(model: str, data: str, ranks: Sequence[str]) -> ModelVersion | None:
    """Give the alias to the best version from these data. Of equal ones the champion stays, else it is the oldest.

    An accuracy on other data says nothing here. A version that has the first metric comes before all that have only the
    next one, and so on.

    Args:
        model: the name of the registered model.
        data: the digest of the data.
        ranks: metrics in [0, 1] to choose by, the higher the better: the first that a version has.

    Returns:
        The champion; none if no version is from these data.

    Raises:
        UserError: MLflow refuses.
    """
    champion = _champion(model)
    ours = [version for version in versions(model) if _facts(version).get(runs.DATA) == data]
    key = {v.version: (_merit(v, ranks), v.version == champion, -int(v.version)) for v in ours}
    ranked = sorted(ours, key=lambda version: key[version.version], reverse=True)
    best = next(filter(_is_usable, ranked), None)
    if best and best.version != champion:
        mlflow.MlflowClient().set_registered_model_alias(model, CHAMPION, best.version)
    return best


def load_champion(
    model: str, data: str, other_data: str, loader: Callable[..., Any], advice: Callable[[], str]
) -> tuple[ModelVersion, Any]:
    """Load the champion.

    Args:
        model: the name of the registered model.
        data: the digest of the data that it must be made from.
        other_data: words for any others.
        loader: as for ``load``.
        advice: likewise.

    Returns:
        Its version, and the model.

    Raises:
        UserError: no MLflow store is available, or as for ``load``.
    """
    store.open_to_read()
    try:
        version = mlflow.MlflowClient().get_model_version_by_alias(model, CHAMPION)
        facts = _facts(version)
    except (MlflowException, OSError) as error:
        raise _unusable(uri(model), error, advice) from None
    if facts.get(runs.DATA) != data:
        origin = other_data if runs.DATA in facts else "data that nothing names"
        raise UserError(f"{uri(model)}, version {version.version}, was made from {origin}; {advice()}")
    return version, load(uri(model), loader, advice)


def load(address: str, loader: Callable[..., Any], advice: Callable[[], str]) -> Any:
    """Load a model from MLflow, as a whole: its files are no longer there when this returns.

    Args:
        address: of the model, such as ``models:/NAME@ALIAS``.
        loader: MLflow's function that loads a model of its kind, with the argument ``dst_path``.
        advice: says what to do if there is none.

    Returns:
        What the loader gives.

    Raises:
        UserError: there is no such model, or it cannot be loaded.
    """
    try:
        with tempfile.TemporaryDirectory() as copy:  # MLflow writes a file beside the model that it loads
            return loader(address, dst_path=copy)
    except Exception as error:  # a damaged file can raise anything
        raise _unusable(address, error, advice) from None


def _unusable(address: str, error: Exception, advice: Callable[[], str]) -> UserError:
    reason = store.first_line(error).partition(". ")[0].rstrip(".")
    return UserError(f"MLflow has no usable {address}: {reason}; {advice()}")


def versions(model: str) -> list[ModelVersion]:
    """List the versions of a registered model."""
    return list(mlflow.MlflowClient().search_model_versions(f"name = '{model}'"))


def _facts(version: ModelVersion) -> Mapping[str, Any]:
    """Say what is known of a version: by its tags or, where it was registered by hand, by its run."""
    if runs.DATA in version.tags:
        return version.tags
    try:
        run = mlflow.get_run(version.run_id or "")
    except MlflowException:
        return {}
    return {**run.data.tags, **run.data.metrics}


def _champion(model: str) -> int | str | None:
    try:  # from a database the number is an int, from a server it is text
        return mlflow.MlflowClient().get_model_version_by_alias(model, CHAMPION).version
    except MlflowException:
        return None


def _is_usable(version: ModelVersion) -> bool:
    """Look whether the version's files are there; they can be lost, and a new version then takes its place."""
    logged = re.search(r"\bm-[0-9a-f]{32}\b", version.source or "")  # where it is; MLflow does not fill in `model_id`
    return logged is not None and runs.is_whole(logged[0])


def _is_complete(run_id: str | None) -> bool:
    try:
        run = mlflow.get_run(run_id or "")
    except MlflowException:
        return False
    return bool(run.info.lifecycle_stage == "active" and runs.DIGEST in run.data.tags)


def _merit(version: ModelVersion, ranks: Sequence[str]) -> tuple[int, float]:
    """Say by which metric a version is ranked, the first being the highest, and its value."""
    facts = _facts(version)
    for place, name in enumerate(ranks):
        with suppress(KeyError, ValueError):  # a tag can be set by hand
            if 0 <= (value := float(facts[name])) <= 1:  # and a metric can be NaN
                return -place, value
    return -len(ranks), 0.0
