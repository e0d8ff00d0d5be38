"""The proof: run again what made a model, and compare.

For a model or run of MLflow: the run holds the commit, the changes that were not committed, the parameters and the
digest of the data that it was made from. The pipeline is run again from these, in a temporary clone with an MLflow
store of its own. Then all is compared: every epoch's figures, every file of ``dvc.lock``, and the stored model.

For a Git revision no store is needed: the pipeline of that commit is run again, and every file is compared with the
commit's ``dvc.lock``.

The workspace and the store are only read. The clone uses the virtual environment that this uses. Where that is another
than the run's, a difference is followed by what differs.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from lineage import UserError, git, lock, md5, registry, runs, store

ENVIRONMENT = ("python", "mlflow", "dvc", "cpu")
NEEDED = ("git.commit", "git.patch.md5", runs.DATA, runs.MODEL, runs.DIGEST)
FORMS = "models:/NAME@ALIAS, models:/NAME/VERSION, the id of an MLflow run, or a Git revision"
# The run's settings, not ours: the commit may have set others.
NOT_PASSED_ON = ("DVC_", "GIT_", "MLFLOW_", "CUBLAS_")

Values = dict[str, str]  # what is compared, by name; what comes first in a run comes first


class Project(NamedTuple):
    """What the proof must know of a project."""

    data: str  # the digest of the present data; a run from others is refused
    other_data: str  # words for these
    history: Path  # a CSV file with the figures of each epoch, and the column ``epoch``
    metrics: Path  # a JSON file with the results; those that a run has are compared
    hash_model: Callable[[str], Values]  # what is to be compared of a stored model, from its MLflow address
    data_files: Sequence[Path] = ()  # to copy into the clone, if they are here, so that they are not fetched again
    tags: Sequence[str] = ()  # of a run, which say more of the environment that decides bytes


class Proof(NamedTuple):
    """What was run again, and lines on the first difference: none if all is identical."""

    origin: str
    difference: list[str]


def prove_commit(revision: str, data_files: Sequence[Path]) -> Proof:
    """Run the pipeline of a commit again, and compare every file with the commit's ``dvc.lock``.

    Args:
        revision: a Git revision.
        data_files: what to copy into the clone, if it is here, so that it is not fetched again.
    """
    commit = _git("rev-parse", "--verify", f"{revision}^{{commit}}")
    name = f"commit {commit[:10]}"
    committed_lock, pipeline = (git.run("show", f"{commit}:{file}") for file in ("dvc.lock", "dvc.yaml"))
    stages = {} if committed_lock.returncode else lock.locked_stages(committed_lock.stdout, pipeline.stdout)
    expected = _results(stages, name)
    print(f"running {name} again", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        clone = _clone(commit, Path(folder), data_files)
        if forged := _forged(clone, expected):
            return Proof(name, forged)
        _run_again(clone)
        actual = _actual(clone)
    return Proof(name, _first_difference(expected, actual, "in dvc.lock"))


def _forged(clone: Path, expected: Values) -> list[str]:
    """Compare the results that are in Git with the commit's ``dvc.lock``: people read the former."""
    with chdir(clone):
        for path, digest in expected.items():
            if git.run("ls-files", "--", path).stdout and (found := lock.path_md5(path)) != digest:
                return [f"{path} is {found} in Git, {digest} in dvc.lock"]
    return []


def prove_run(run: Run, model: str, project: Project) -> Proof:
    """Run again what made a model, and compare it with its run in MLflow.

    Args:
        run: as ``find`` gives it.
        model: as for ``find``; for the id of a run, the run's own model is compared.
        project: what to compare, and how.

    Raises:
        UserError: the run cannot be proved.
    """
    _check(run, project)
    origin = f"run {run.info.run_id}, commit {run.data.tags['git.commit'][:10]}"
    print(f"running again: {origin}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        files = _expected(run, Path(folder))
        stored = project.hash_model(model if model.startswith("models:/") else _model_uri(run))
        clone = _clone(run.data.tags["git.commit"], Path(folder), project.data_files)
        _put_parameters_and_changes(run, clone)
        _run_again(clone)
        rows = list(csv.DictReader((clone / project.history).read_text().splitlines()))
        results = json.loads((clone / project.metrics).read_text())
        names = [name for name in results if name in run.data.metrics]
        epochs = _logged_epochs(run, [name for name in rows[0] if name != "epoch"])
        metrics = {name: str(run.data.metrics[name]) for name in names}
        expected = {runs.DATA: run.data.tags[runs.DATA], **epochs, **files, **metrics, **stored}
        again, rebuilt = _run_of(clone, project)
        metrics = {name: str(results[name]) for name in names}
        made = {path: digest for path, digest in _actual(clone).items() if path in files}  # what `track` depends on
        actual = {runs.DATA: again.data.tags[runs.DATA], **_epochs(rows), **made, **metrics, **rebuilt}
    difference = _first_difference(expected, actual, "in the run")
    return Proof(origin, difference and difference + _environment(run, again, (*project.tags, *ENVIRONMENT)))


def _run_of(clone: Path, project: Project) -> tuple[Run, Values]:
    """Find the run of the training in the clone's own store, and hash its model."""
    with chdir(clone):  # MLflow makes a folder for artifacts wherever it opens a store
        mlflow.set_tracking_uri(f"sqlite:///{clone}/mlflow.db")
        (run,) = mlflow.search_runs(
            filter_string=f"tags.`{runs.MODEL}` != ''", search_all_experiments=True, output_format="list"
        )
        return run, project.hash_model(_model_uri(run))


def _environment(run: Run, again: Run, names: Sequence[str]) -> list[str]:
    """Say which of some tags differ between two runs."""
    theirs, ours = run.data.tags, again.data.tags
    lines = [
        f"{name} is {theirs.get(name)} in the run, {ours.get(name)} here"
        for name in names
        if theirs.get(name) != ours.get(name)
    ]
    return lines or [f"the environment is the same: {', '.join(names)}"]


def _first_difference(expected: Values, actual: Values, where: str) -> list[str]:
    for name in expected | actual:
        theirs, ours = expected.get(name, "missing"), actual.get(name, "missing")
        if theirs != ours:
            return [f"{name} is {theirs} {where}, {ours} here"]
    return []


def is_revision(model: str) -> bool:
    """Tell a Git revision from a name in MLflow. A run id has 32 hexadecimal digits, a full commit 40."""
    if model.startswith("models:/") or re.fullmatch(r"[0-9a-f]{32}", model):
        return False
    if not git.has_commit(model):
        git.check()
        raise UserError(f"{model!r} is not known here; accepted are {FORMS}")
    return True


def find(model: str, advice: str = "") -> Run:
    """Find the run that says where a model comes from, in the store that MLFLOW_TRACKING_URI names.

    Args:
        model: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, or a run id.
        advice: what to do if there is no such model.

    Raises:
        UserError: there is no such model or run, or the store cannot be read.
    """
    store.open_to_read()
    try:
        if not model.startswith("models:/"):
            return _run(model)
        parts = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", model)
        if not parts:
            raise UserError(f"{model} is not the name of a model; accepted are {FORMS}")
        name, alias, version = parts.groups()
        client = mlflow.MlflowClient()
        try:
            found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)
        except MlflowException as error:
            raise UserError(f"{store.first_line(error)}{advice and '; '}{advice}") from None
        identity = found.tags.get(registry.RUN) or found.run_id
        if not identity:
            raise UserError(f"{model} was registered without a run, which would say where it comes from")
        return _run(identity)
    except SQLAlchemyError as error:
        raise store.refusal(mlflow.get_tracking_uri(), error) from None


def _run(identity: str) -> Run:
    try:
        return mlflow.get_run(identity)
    except MlflowException as error:
        raise UserError(f"{store.first_line(error)}; `make track` makes a run of the present results") from None


def _check(run: Run, project: Project) -> None:
    """Refuse a run whose origin is not known, or is not available here."""
    tags, name = run.data.tags, f"run {run.info.run_id}"
    if "git.commit" not in tags:
        raise UserError(f"{name} is none of the pipeline's, so nothing can be run again")
    if run.info.status != "FINISHED":
        raise UserError(f"{name} is {run.info.status}, not finished; `make track` makes a run of the present results")
    if missing := [key for key in NEEDED if key not in tags]:
        raise UserError(
            f"{name} recorded no {', '.join(missing)}; `make repro` completes the run of the present results"
        )
    if unknown := [key for key in NEEDED if tags[key] == git.UNKNOWN]:
        raise UserError(
            f"{name} does not know its {', '.join(unknown)}, because Git failed; `make track` makes a new run"
        )
    if tags[runs.DATA] != project.data:
        raise UserError(f"{name} was made from {project.other_data}; check its commit out first: {tags['git.commit']}")
    commit = tags["git.commit"]
    if not git.has_commit(commit):
        git.check()
        raise UserError(
            f"{name} was made from commit {commit}, which is not in this repository; "
            "try `git fetch`, or `make track` for a run of the present results"
        )


def _expected(run: Run, folder: Path) -> Values:
    identity = run.info.run_id
    try:
        recorded_lock = Path(mlflow.MlflowClient().download_artifacts(identity, runs.LOCK, str(folder)))
    except (MlflowException, OSError):
        raise UserError(
            f"the files of run {identity} are lost, so it has no proof; `make track` makes a run of the present results"
        ) from None
    return _results(lock.read_stages(recorded_lock.read_bytes()), f"run {identity}")


def _logged_epochs(run: Run, names: Sequence[str]) -> Values:
    """Give what the run has logged of each epoch."""
    client, identity = mlflow.MlflowClient(), run.info.run_id
    points = {(p.step, name): p.value for name in names for p in client.get_metric_history(identity, name)}
    return {f"epoch {epoch}: {name}": str(points[epoch, name]) for epoch, name in sorted(points)}


def _epochs(history: list[dict[str, str]]) -> Values:
    values = {(int(row["epoch"]), name): float(row[name]) for row in history for name in row if name != "epoch"}
    return {f"epoch {epoch}: {name}": str(values[epoch, name]) for epoch, name in sorted(values)}


def _model_uri(run: Run) -> str:
    outputs = run.outputs.model_outputs if run.outputs else []
    if not outputs:
        raise UserError(f"run {run.info.run_id} has no model in MLflow; `make track` completes the run of the results")
    return f"models:/{runs.model_of(run) or outputs[0].model_id}"


def _results(stages: dict[str, Any], origin: str) -> Values:
    results = lock.results(stages)
    if not results:
        raise UserError(f"{origin} has no dvc.lock with results")
    return results


def _actual(clone: Path) -> Values:
    return lock.results(lock.locked_stages((clone / lock.LOCK).read_bytes(), (clone / "dvc.yaml").read_bytes()))


def _clone(commit: str, folder: Path, data_files: Sequence[Path]) -> Path:
    """Check a commit out, and put the data beside."""
    clone = folder / "clone"
    _git("archive", "--output", os.devnull, commit)  # fetches the files that a partial clone lacks
    _git("clone", "--quiet", "--no-checkout", "--shared", ".", str(clone))  # with commits that are on no branch, too
    _git("-C", str(clone), "checkout", "--quiet", "--detach", commit)
    for file in data_files:
        if file.exists():  # the pipeline checks it, and fetches what is not right
            (clone / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, clone / file)
    return clone


def _put_parameters_and_changes(run: Run, clone: Path) -> None:
    client = mlflow.MlflowClient()
    client.download_artifacts(run.info.run_id, str(runs.PARAMS), str(clone))
    if run.data.tags["git.patch.md5"] == runs.CLEAN:
        return
    patch = Path(client.download_artifacts(run.info.run_id, runs.PATCH, str(clone.parent)))
    if md5(patch.read_bytes()) != run.data.tags["git.patch.md5"]:
        raise UserError(f"run {run.info.run_id}: its {patch.name} is damaged")
    _git("-C", str(clone), "apply", "--whitespace=nowarn", str(patch))


def _run_again(clone: Path) -> None:
    """Run every stage of the pipeline in the clone, but for the one that would register the model."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(NOT_PASSED_ON)} | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "MLFLOW_TRACKING_URI": f"sqlite:///{clone}/mlflow.db",
        "DVC_SITE_CACHE_DIR": str(clone / ".dvc/site"),
    }
    stages = lock.without_track((clone / "dvc.yaml").read_bytes())
    (clone / lock.LOCK).unlink(missing_ok=True)  # what is in it afterwards has been made here
    # By --force and --no-commit nothing is taken from, or put into, a cache that this user's repositories may share.
    # By --quiet DVC does not ask to commit or push what it made; the stages still print their lines.
    command = [sys.executable, "-m", "dvc", "repro", "--quiet", "--force", "--no-commit", *stages]
    if subprocess.run(command, cwd=clone, env=environment, check=False).returncode:
        raise UserError("the pipeline fails when run again; the reason is above")


def _git(*arguments: str) -> str:
    done = git.run(*arguments)
    if done.returncode:
        raise UserError(f"git {arguments[0]} fails: {done.stderr.decode(errors='replace')}")
    return done.stdout.decode(errors="replace").strip()
