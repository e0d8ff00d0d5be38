"""A run of MLflow for one state of ``dvc.lock``: all that leads from a number back to its origin.

A stage that trains opens a run with ``live``, and logs each epoch as it ends. The pipeline's last stage calls
``track``: it makes that run complete, or writes a whole one from the files that the stages have left. A run is found by
the digest of ``dvc.lock``, and by the MD5 of the model file, which is in ``dvc.lock`` too: a run id in a DVC output
would change ``dvc.lock`` at every run for nothing.
"""

import csv
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import psutil
import yaml
from mlflow.data.dataset import Dataset
from mlflow.entities import LoggedModelOutput, Metric, Run
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE
from mlflow.utils.time import get_current_time_millis

from lineage import UserError, cpu, file_md5, git, lock, md5, store

PARAMS = Path("params.yaml")
# Two files of a run, with endings that MLflow's page shows.
LOCK = "dvc.lock.yaml"
PATCH = "uncommitted.patch.txt"
CLEAN = "none"  # the digest of no patch
# Tags of a run.
DIGEST = "dvc.lock.md5"  # of which state of dvc.lock it is; comes last: a run that has it was complete
MODEL = "model.md5"  # comes last of what a training logs
DATA = "data.digest"
EXPERIMENT = "dvc.experiment"
FILES = "files"  # a tag of a logged model: each file and its size


class Training(NamedTuple):
    """What a run is made from: what its stage ``train`` and its stage ``track`` both know."""

    experiment: str  # its name in MLflow
    params: Mapping[str, object]  # by their dotted names, in the order that MLflow's page will show
    dataset: Dataset  # the data, with their digest
    tags: Mapping[str, str] = {}  # more of them, such as the version of a library that decides bytes
    unnamed: Sequence[str] = ()  # the parameters that are left out of the run's name, because they decide no byte


class Results(NamedTuple):
    """What the stages have left in files, for a run that is to be complete."""

    history: Path  # a CSV file with the figures of each epoch, and the column ``epoch``
    model: Path  # the model's file
    log_model: Callable[[], str]  # stores the model that this file makes in the active run, and gives its id
    metrics: Mapping[str, float]  # by their names
    files: Mapping[str, Sequence[Path]]  # to store with the run, by the folder in it; "" for none
    note: str  # what came out, in Markdown; how to prove it is added
    tables: Mapping[str, Mapping[str, Sequence[float]]] = {}  # columns by their names, by the name of the table's file

    @property
    def model_md5(self) -> str:
        """Hash the model's file."""
        return str(file_md5(str(self.model)))

    def artifacts(self) -> set[str]:
        """List the artifacts of a run that has these results."""
        stored = {folder or path.name for folder in self.files for path in self.files[folder]}
        return {str(PARAMS), LOCK, *self.tables, *stored}


class LiveRun:
    """The active MLflow run of a training. If its server is lost, the training goes on without it."""

    id = ""
    lost = False

    def send(self, call: Callable[..., object], *arguments: Any, **options: Any) -> None:
        """Call a function that writes to MLflow, unless MLflow is lost."""
        if self.lost:
            return
        try:
            call(*arguments, **options)
        except (MlflowException, OSError) as error:
            self.lost = True
            print(
                f"MLflow is lost ({store.first_line(error)}); the training goes on. "
                f"Stage `{lock.TRACK}` will send everything",
                file=sys.stderr,
            )

    def end(self, status: str, note: str) -> None:
        """Close the run. One that was lost has failed, but MLflow would close it as finished when the process ends."""
        if mlflow.active_run() is None:  # else MLflow would open a run to write the note in
            return
        if note:
            self.send(mlflow.set_tag, MLFLOW_RUN_NOTE, note)
        if not self.lost:
            self.send(mlflow.end_run, status)
        else:
            with suppress(MlflowException, OSError):
                mlflow.end_run("FAILED")


@contextmanager
def live(training: Training) -> Iterator[LiveRun]:
    """Open a run with parameters, data set and tags that say what it is made from; close it as it ended.

    Raises:
        UserError: no MLflow store is available, or it refuses.
    """
    store.connect(training.experiment)
    run, status, note = LiveRun(), "FAILED", ""
    try:
        try:
            _end_killed_runs(training.experiment)
            patch = git.patch()
            tags = {MLFLOW_RUN_NOTE: "Not complete: `make track` adds the results.", DATA: training.dataset.digest}
            tags |= {**provenance(patch), **training.tags}
            run.id = mlflow.start_run(run_name=run_name(training, patch), tags=tags).info.run_id
            mlflow.log_params(dict(training.params))
            _log_dataset(training.dataset)
            mlflow.log_artifact(str(PARAMS))
        except (MlflowException, OSError) as error:
            run.lost = True
            raise UserError(f"MLflow refuses: {store.first_line(error)}") from None
        yield run
        status = "FINISHED"
    except KeyboardInterrupt as error:
        status, note = "KILLED", "Interrupted."
        traceback.clear_frames(error.__traceback__)  # they may hold a lock of SQLite, for which `end` would wait
        raise
    except Exception as error:
        note = f"Failed: {store.first_line(error) or type(error).__name__}"
        raise
    finally:
        run.end(status, note)


def _log_dataset(dataset: Dataset) -> None:
    """Give the active run its data set.

    MLflow looks whether its store has the data set, and then adds it. Of two first runs at once it refuses the second.
    """
    try:
        mlflow.log_input(dataset, context="training")
    except MlflowException as error:
        if error.error_code != "BAD_REQUEST":
            raise
        mlflow.log_input(dataset, context="training")  # by now it is there


def _end_killed_runs(experiment: str) -> None:
    """Mark runs as killed whose process on this machine is gone and had no time to do so."""
    client = mlflow.MlflowClient()
    for run in store.search(experiment, f"attributes.status = 'RUNNING' and tags.host = '{platform.node()}'"):
        if not psutil.pid_exists(int(run.data.tags["pid"])):
            client.set_tag(run.info.run_id, MLFLOW_RUN_NOTE, "Its process was killed, or the machine went down.")
            client.set_terminated(run.info.run_id, "KILLED")


@store.in_one_line("make track")
def track(training: Training, recorded: Mapping[str, Any], results: Results) -> tuple[Run, bool]:
    """Make MLflow's record of the present results complete: one run for this state of ``dvc.lock``.

    Args:
        training: as for ``live``.
        recorded: the stages of ``dvc.lock``, which ``lock.recorded`` has compared with the files.
        results: what these stages have left.

    Returns:
        The run, and whether there was something to add.

    Raises:
        UserError: no MLflow store is available, or it refuses.
    """
    digest = md5(json.dumps(recorded, sort_keys=True).encode())
    store.connect(training.experiment)
    client = mlflow.MlflowClient()
    with store.lock():  # a second process waits, and then finds the run
        same = store.search(training.experiment, f"tags.`{MODEL}` = '{results.model_md5}'")
        run = _choose(same, digest, training.params)
        added = run is None or not _is_complete(run, digest, results.artifacts())
        run = run or _write(training, results)
        identity = run.info.run_id
        if added:
            _complete(run, recorded, results)
        if added or not git.has_commit(run.data.tags["git.commit"]):
            _set_origin(identity, training)
        client.set_tag(identity, DIGEST, digest)
        for other in same:
            if DIGEST not in other.data.tags and other.info.run_id != identity and _is_of_this_experiment(other):
                client.delete_run(other.info.run_id)  # to MLflow's trash
        return client.get_run(identity), added


def _write(training: Training, results: Results) -> Run:
    """Write a whole training from the files that it has left."""
    with live(training) as run:
        history = list(csv.DictReader(results.history.read_text().splitlines()))
        mlflow.MlflowClient().log_batch(run.id, points(history))
        add_model(run.id, results.model_md5, results.log_model)
    return mlflow.get_run(run.id)


def _choose(same: list[Run], digest: str, params: Mapping[str, object]) -> Run | None:
    """Choose of the runs with this model that of this state, or else the newest training that lacks its results."""
    name = os.environ.get("DVC_EXP_NAME")
    for run in same:
        if run.data.tags.get(DIGEST) == digest and name in (None, run.info.run_name):
            return run
    values = {key: str(value) for key, value in params.items()}
    for run in same:
        trained = run.info.status == "FINISHED" and DIGEST not in run.data.tags
        if trained and run.data.params == values and _is_of_this_experiment(run):
            return run
    return None


def _is_of_this_experiment(run: Run) -> bool:
    return bool(run.data.tags.get(EXPERIMENT) == os.environ.get("DVC_EXP_NAME"))


def _is_complete(run: Run, digest: str, needed: set[str]) -> bool:
    """Look whether a run has all of this state; a user may have deleted files in ``mlruns``."""
    if run.data.tags.get(DIGEST) != digest or run.info.status != "FINISHED" or not model_of(run):
        return False
    patch = () if run.data.tags.get("git.patch.md5") in (CLEAN, git.UNKNOWN) else (PATCH,)
    return needed.union(patch) <= {artifact.path for artifact in mlflow.MlflowClient().list_artifacts(run.info.run_id)}


def _complete(run: Run, recorded: Mapping[str, Any], results: Results) -> None:
    """Add what the other stages have made. If this is interrupted, it can be done again."""
    client, identity = mlflow.MlflowClient(), run.info.run_id
    if not model_of(run):
        with mlflow.start_run(identity):
            add_model(identity, results.model_md5, results.log_model)
    client.log_artifact(identity, str(PARAMS))
    for folder, paths in results.files.items():
        for path in paths:
            client.log_artifact(identity, str(path), folder or None)
    client.log_text(identity, yaml.safe_dump({"schema": "2.0", "stages": recorded}, sort_keys=False), LOCK)
    for metric, value in results.metrics.items():
        client.log_metric(identity, metric, value)
    there = {artifact.path for artifact in client.list_artifacts(identity)}
    for name in results.tables.keys() - there:  # MLflow adds rows to a table that is there
        client.log_table(identity, dict(results.tables[name]), name)
    client.set_tag(identity, MLFLOW_RUN_NOTE, f"{results.note}\n\nProve it: `make verify MODEL={identity}`\n")
    if client.get_run(identity).info.status != "FINISHED":  # a process that completed it before was interrupted
        client.set_terminated(identity)


def _set_origin(run_id: str, training: Training) -> None:
    """Say from which commit and changes the run can be run again now; a commit can be gone later."""
    client, patch = mlflow.MlflowClient(), git.patch()
    if patch:
        log_patch(run_id, patch)
    client.update_run(run_id, name=run_name(training, patch))
    for key, value in origin(patch).items():
        client.set_tag(run_id, key, value)


def log_patch(run_id: str, patch: bytes) -> None:
    """Store the changes that were not committed with a run."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, PATCH)
        file.write_bytes(patch)  # as bytes: a file in it need not be UTF-8
        mlflow.MlflowClient().log_artifact(run_id, str(file))


def add_model(run_id: str, model_md5: str, log_model: Callable[[], str]) -> None:
    """Give the active run its model: the stored one of the same bytes, if its files are whole, or a new one.

    Args:
        run_id: the active run.
        model_md5: the MD5 of the model's file.
        log_model: stores the model in the active run, and gives its id.
    """
    client = mlflow.MlflowClient()
    experiment = client.get_run(run_id).info.experiment_id
    for model in client.search_logged_models([experiment], f"tags.`{MODEL}` = '{model_md5}'"):
        if is_whole(model.model_id):
            client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
            break
    else:
        identity = log_model()
        # After all files are there: a model that is found by its tag is whole, or has lost files since.
        client.set_logged_model_tags(identity, {MODEL: model_md5, FILES: json.dumps(_files(identity))})
    client.set_tag(run_id, MODEL, model_md5)


def model_of(run: Run) -> str | None:
    """Give the id of the run's logged model, if it is whole."""
    for output in run.outputs.model_outputs if run.outputs else []:
        if is_whole(output.model_id):
            return str(output.model_id)
    return None


def is_whole(model_id: str) -> bool:
    """Look whether a logged model of the pipeline has every file in the size that it had when it was stored."""
    try:
        stored = json.loads(mlflow.get_logged_model(model_id).tags.get(FILES, "{}"))  # none if it is not of ours
        return bool(stored) and stored.items() <= _files(model_id).items()
    except (MlflowException, OSError):
        return False


def _files(model_id: str, folder: str | None = None) -> dict[str, int]:
    """List the files of a logged model with their sizes in bytes."""
    sizes: dict[str, int] = {}
    for found in mlflow.MlflowClient().list_logged_model_artifacts(model_id, folder):
        sizes |= _files(model_id, found.path) if found.is_dir else {found.path: found.file_size or 0}
    return sizes


def points(history: Sequence[Mapping[str, str | float]]) -> list[Metric]:
    """Make metrics of the rows of a history file, with ``step`` = epoch."""
    now = get_current_time_millis()
    return [
        Metric(name, float(value), now, int(row["epoch"]))
        for row in history
        for name, value in row.items()
        if name != "epoch"
    ]


def run_name(training: Training, patch: bytes | None) -> str:
    """Name a run as DVC's experiment, or else by what makes it: ``main-81cb9b3+ train.lr=0.05``.

    That is the branch, the commit, a plus for changes that are not committed, and up to three parameters that are not
    those of the commit.
    """
    if experiment := os.environ.get("DVC_EXP_NAME"):
        return experiment
    try:
        before = lock.read_params(git.run("show", f"{git.commit()}:{PARAMS}").stdout)
    except UserError:  # none, or another file
        before = {}
    changed = [
        f"{key}={value}"
        for key, value in training.params.items()
        if before and before.get(key) != value and key not in training.unnamed
    ]
    more = ["..."] if len(changed) > 3 else []
    edited = "" if patch is not None and set(git.changed_files(patch)) <= {str(PARAMS)} else "+"
    return " ".join([f"{git.branch()}-{git.commit()[:7]}{edited}", *changed[:3], *more])


def origin(patch: bytes | None) -> dict[str, str]:
    """Say from which code a run can be run again."""
    digest = git.UNKNOWN if patch is None else md5(patch) if patch else CLEAN
    return {"git.commit": git.commit(), "git.branch": git.branch(), "git.patch.md5": digest}


def provenance(patch: bytes | None) -> dict[str, str]:
    """Say what makes a run: which code, versions, machine and process, and DVC's experiment if it is one."""
    experiment = os.environ.get("DVC_EXP_NAME")
    return {
        **{library: importlib.metadata.version(library) for library in ("mlflow", "dvc")},
        **origin(patch),
        **({EXPERIMENT: experiment} if experiment else {}),
        "python": platform.python_version(),
        "cpu": cpu(),
        "host": platform.node(),
        "pid": str(os.getpid()),
    }
