"""A run in MLflow, and what goes into it: all that leads from a number back to its origin.

``train`` opens the run and logs each epoch as it ends. ``track``, the pipeline's last stage, adds metrics, plots and
``dvc.lock``. It adds them only to a run of the same code, parameters and model; otherwise it makes a complete new one
from the files in ``results/``. Runs and files belong together by the MD5 of the model file, which is in ``dvc.lock``
too: a run id in a DVC output would change ``dvc.lock`` at every run for nothing.
"""

import csv
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import yaml
from mlflow.data.http_dataset_source import HTTPDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import LoggedModelOutput, Run
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

import lineage
from lineage import UserError, cpu, git, lock
from mnist_mlp import store
from mnist_mlp.params import Params
from mnist_mlp.published import published_history
from mnist_mlp.recipe import HISTORY, METRICS, MODEL, PLOTS, data
from mnist_mlp.recipe.params import SOURCES

# Two files of a run: each with its name, of an ending that MLflow's page shows, and its name in runs of older states.
LOCK = ("dvc.lock.yaml", "dvc.lock")
PATCH = ("uncommitted.patch.txt", "uncommitted.patch")
CLEAN = "none"  # the digest of no patch
FILES = "files"  # a tag of a logged model: each file and its size


class LiveRun:
    """The active MLflow run of a training. If its server is lost, the training goes on without it."""

    run_id = ""
    lost = False

    def start(self, config: Params) -> None:
        """Open the run with the parameters, the data set, and tags that say what it is made from.

        Raises:
            UserError: MLflow refuses.
        """
        try:
            patch = git.patch()
            started = "Not complete: `make track` adds the results."
            tags = provenance(patch) | {MLFLOW_RUN_NOTE: started}
            self.run_id = mlflow.start_run(run_name=run_name(config, patch), tags=tags).info.run_id
            # MLflow's page keeps this order.
            mlflow.log_params(dict(sorted(config.flat().items(), key=lambda item: item[0] in SOURCES)))
            source = HTTPDatasetSource(config.data.mirrors[0])
            dataset = MetaDataset(source, name=data.NAME, digest=data.DIGEST)  # type: ignore[abstract]
            mlflow.log_input(dataset, context="training")
            mlflow.log_artifact("params.yaml")
            if patch:
                log_patch(self.run_id, patch)
        except (MlflowException, OSError) as error:
            self.lost = True
            raise UserError(f"MLflow refuses: {store.first_line(error)}") from None

    def log_epoch(self, epoch: int, figures: Mapping[str, float]) -> None:
        """Log one epoch's figures, with ``step`` = epoch. MLflow adds the time, which is an axis of its charts."""
        self._send(mlflow.log_metrics, figures, step=epoch)

    def log_model(self, config: Params, weights: bytes) -> None:
        """Log the model that the weights make; see ``log_model`` below."""
        self._send(log_model, config, weights)

    def end(self, status: str, reason: str) -> None:
        """Close the run. One that was lost has failed, but MLflow would close it as finished when the process ends."""
        if reason:
            self._send(mlflow.set_tag, MLFLOW_RUN_NOTE, reason)
        if not self.lost:
            self._send(mlflow.end_run, status)
        else:
            with suppress(MlflowException, OSError):
                mlflow.end_run("FAILED")

    def _send(self, call: Callable[..., object], *arguments: Any, **options: Any) -> None:
        if self.lost:
            return
        try:
            call(*arguments, **options)
        except (MlflowException, OSError) as error:
            self.lost = True
            reason = store.first_line(error)
            print(
                f"MLflow is lost ({reason}); the training goes on. Stage `track` will send everything", file=sys.stderr
            )


@contextmanager
def new_run(config: Params) -> Iterator[LiveRun]:
    """Open a run; close it as it ended.

    Raises:
        UserError: no MLflow store is available.
    """
    store.connect()
    live, status, reason = LiveRun(), "FAILED", ""
    try:
        live.start(config)
        yield live
        status = "FINISHED"
    except KeyboardInterrupt as error:
        status, reason = "KILLED", "Interrupted."
        traceback.clear_frames(error.__traceback__)  # they may hold a lock of SQLite, for which `end` would wait
        raise
    except Exception as error:
        reason = f"Failed: {store.first_line(error) or type(error).__name__}"
        raise
    finally:
        live.end(status, reason)


def log_patch(run_id: str, patch: bytes) -> None:
    """Store the changes that were not committed with a run."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, PATCH[0])
        file.write_bytes(patch)  # as bytes: a file in it need not be UTF-8
        mlflow.MlflowClient().log_artifact(run_id, str(file))


def log_model(config: Params, weights: bytes) -> None:
    """Log a model to the active run: raw images (N, *SHAPE) in, probabilities (N, CLASSES) out.

    Args:
        config: the parameters that it was trained with.
        weights: the content of the model file.
    """
    from mlflow.models import ModelSignature  # here: these load PyTorch, which takes seconds, and track rarely needs it
    from mlflow.types import Schema, TensorSpec

    from mnist_mlp.recipe import net

    model = net.mlp(config.model.hidden)
    net.load_weights(model, weights, str(MODEL))
    digest = lineage.md5(weights)
    logged = mlflow.pytorch.log_model(
        net.ImageClassifier(model, config.data.mean, config.data.std).eval(),
        name=f"{store.EXPERIMENT}-{digest[:7]}",
        serialization_format="pt2",  # no pickle
        signature=ModelSignature(
            Schema([TensorSpec(np.dtype(np.uint8), (-1, *data.SHAPE))]),
            Schema([TensorSpec(np.dtype(np.float32), (-1, data.CLASSES))]),
        ),
        input_example=data.load("t10k")[0][:2],
        pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in ("mlflow", "numpy", "torch")],
    )
    # After all files are there: a model that is found by its tag is whole, or has lost files since.
    client = mlflow.MlflowClient()
    client.set_logged_model_tags(logged.model_id, {"model.md5": digest, FILES: json.dumps(_files(logged.model_id))})
    mlflow.set_tag("model.md5", digest)  # last: a run that is found by it has all of the training


def track(config: Params) -> tuple[Run, bool]:
    """Make MLflow's record of the present results complete.

    Returns:
        The run of these results, and whether there was something to add.

    Raises:
        UserError: the results are not those of the present code and parameters, or MLflow cannot take them.
    """
    recorded = lock.recorded(config.flat())
    store.connect()
    try:
        with store.lock():  # a second process waits, and then finds the run
            digest = lineage.md5(json.dumps(recorded, sort_keys=True).encode())
            run = _find(config, digest)
            if run and run.data.tags.get("dvc.lock.md5") == digest:
                return run, False
            if run is None:
                with new_run(config) as live:
                    _log_training(config)
                if live.lost:
                    raise UserError("MLflow did not get all of it; `make track` sends it again")
                run = mlflow.get_run(live.run_id)
            _log_results(run.info.run_id, config, recorded, digest)
            return mlflow.get_run(run.info.run_id), True
    except (MlflowException, OSError) as error:
        raise UserError(f"MLflow refuses: {store.first_line(error)}; `make track` tries again") from None


def is_repeatable(run: Run) -> bool:
    """Look whether a complete run can be run again: its commit is here, and it has the other files of its origin."""
    try:
        found = {artifact.path for artifact in mlflow.MlflowClient().list_artifacts(run.info.run_id)}
    except (MlflowException, OSError):
        return False
    patch = [] if run.data.tags.get("git.patch.md5") == CLEAN else [PATCH]
    whole = all(found.intersection(names) for names in (("params.yaml",), LOCK, *patch))
    return whole and git.has_commit(run.data.tags.get("git.commit", git.UNKNOWN))


def download(run_id: str, names: tuple[str, str], folder: Path) -> Path:
    """Fetch a file of a run into a folder, by the first of its names that the run has.

    Raises:
        MlflowException, OSError: the run has no such file, or it cannot be read.
    """
    client = mlflow.MlflowClient()
    found = {artifact.path for artifact in client.list_artifacts(run_id)}
    return Path(client.download_artifacts(run_id, next((n for n in names if n in found), names[0]), str(folder)))


def model_of(run: Run) -> str | None:
    """Give the id of the run's logged model, if it is whole."""
    for output in run.outputs.model_outputs if run.outputs else []:
        if is_whole(output.model_id):
            return str(output.model_id)
    return None


def is_whole(model_id: str) -> bool:
    """Look whether a logged model has every file in the size that it had when it was stored."""
    try:
        recorded = json.loads(mlflow.get_logged_model(model_id).tags.get(FILES, "{}"))  # none if it is not of ours
        files = _files(model_id)
        return bool(files) and recorded.items() <= files.items()
    except (MlflowException, OSError):
        return False


def _files(model_id: str, folder: str | None = None) -> dict[str, int]:
    """List the files of a logged model with their sizes in bytes."""
    sizes: dict[str, int] = {}
    for found in mlflow.MlflowClient().list_logged_model_artifacts(model_id, folder):
        sizes |= _files(model_id, found.path) if found.is_dir else {found.path: found.file_size or 0}
    return sizes


def _find(config: Params, digest: str) -> Run | None:
    """Find the run of the present state: the same code, parameters and model, and the same DVC experiment if any."""
    code, experiment = git.code_md5(), os.environ.get("DVC_EXP_NAME")
    git_fails = git.patch() is None  # otherwise, a run that was made when it failed gives way to a new one
    params = {name: str(value) for name, value in config.flat().items()}
    found = store.search(f"tags.`model.md5` = '{lineage.md5(MODEL.read_bytes())}' and status = 'FINISHED'")
    # Those that lack something come first: a training that was forced is completed, though an older run is the same.
    for run in sorted(found, key=lambda run: "dvc.lock.md5" in run.data.tags):
        tags = run.data.tags
        if experiment and run.info.run_name != experiment:
            continue
        if "dvc.lock.md5" in tags:
            # The hashes of all code, data, parameters and results.
            same = tags["dvc.lock.md5"] == digest and (git_fails or is_repeatable(run))
        else:
            known = git.UNKNOWN not in (code, tags.get("git.patch.md5"))
            same = known and tags.get("code.md5") == code and run.data.params == params
        if same and model_of(run):
            return run
    return None


def _log_training(config: Params) -> None:
    """Log to the active run what a training logs, from the files that it has left."""
    run = mlflow.active_run()
    assert run
    with HISTORY.open() as file:
        mlflow.MlflowClient().log_batch(run.info.run_id, store.points(list(csv.DictReader(file))))
    weights = MODEL.read_bytes()
    digest = lineage.md5(weights)
    client = mlflow.MlflowClient()
    for model in client.search_logged_models([run.info.experiment_id], f"tags.`model.md5` = '{digest}'"):
        if is_whole(model.model_id):
            client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, 0)])
            client.set_tag(run.info.run_id, "model.md5", digest)
            return
    log_model(config, weights)


def _log_results(run_id: str, config: Params, recorded: dict[str, Any], digest: str) -> None:
    """Add what evaluate and plot have made. The run's status stays as it is, also if this is interrupted."""
    client = mlflow.MlflowClient()
    metrics = json.loads(METRICS.read_text())
    if "per_digit.json" not in {artifact.path for artifact in client.list_artifacts(run_id)}:
        table = {"digit": list(range(data.CLASSES)), "precision": metrics["precision"], "recall": metrics["recall"]}
        client.log_table(run_id, table, "per_digit.json")
    client.log_artifact(run_id, str(METRICS))
    for plot in sorted(PLOTS.glob("*.png")):
        client.log_artifact(run_id, str(plot), "plots")
    client.log_text(run_id, yaml.safe_dump({"schema": "2.0", "stages": recorded}, sort_keys=False), LOCK[0])
    # The mean of batches is the last point of test_acc already, and MLflow's page shows each metric before the curves.
    for name in {"accuracy", "validation_accuracy"} & metrics.keys():
        client.log_metric(run_id, name, metrics[name])
    client.set_tag(run_id, MLFLOW_RUN_NOTE, _description(run_id, config, metrics))
    client.set_tag(run_id, "dvc.lock.md5", digest)  # last: a run that has it is complete


def _description(run_id: str, config: Params, metrics: Mapping[str, float]) -> str:
    """Say in Markdown what came out, and how to prove it; MLflow's page shows the first lines."""
    published = "".join(f", published {row['test_acc']:.4%}" for row in published_history()[-1:])
    target = config.evaluate.target_accuracy
    reached = "reached" if metrics["accuracy"] >= target else "missed"
    return f"""\
Test accuracy **{metrics["accuracy"]:.2%}** of {data.SIZES["t10k"]:,} images: target {target:.2%} {reached}. \
Mean of batches {metrics["batch_mean_accuracy"]:.4%}{published}.

Prove it: `make verify MODEL={run_id}`
"""


def run_name(config: Params, patch: bytes | None) -> str:
    """Name a run as DVC's experiment, or else by what makes it: ``main-81cb9b3+ train.lr=0.05``.

    That is the branch, the commit, a plus for changes that are not committed, and up to three parameters that are not
    those of the commit.
    """
    if name := os.environ.get("DVC_EXP_NAME"):
        return name
    try:
        committed = YAML(typ="safe").load(git.run("show", f"{git.commit()}:params.yaml").stdout)
        before = {f"{section}.{key}": value for section, keys in committed.items() for key, value in keys.items()}
    except (YAMLError, AttributeError, ValueError):  # none, or another file
        before = {}
    changed = [
        f"{name}={value}"
        for name, value in config.flat().items()
        if before and before.get(name) != value and name not in SOURCES
    ]
    more = ["..."] if len(changed) > 3 else []
    edited = "" if patch is not None and set(git.changed_files(patch)) <= {"params.yaml"} else "+"
    return " ".join([f"{git.branch()}-{git.commit()[:7]}{edited}", *changed[:3], *more])


def provenance(patch: bytes | None) -> dict[str, str]:
    """Say what makes the run: which code, data, versions, machine and process."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "mlflow", "dvc")}
    return versions | {
        "git.commit": git.commit(),
        "git.branch": git.branch(),
        "git.patch.md5": git.UNKNOWN if patch is None else lineage.md5(patch) if patch else CLEAN,
        "code.md5": git.code_md5(),
        "data.digest": data.DIGEST,
        "python": platform.python_version(),
        "cpu": cpu(),
        "host": platform.node(),
        "pid": str(os.getpid()),
    }
