"""From a tracked model back to its origin, and the proof: ``make verify MODEL=models:/mnist-mlp@champion``.

A run holds the commit, the parameters and the digest of the data that it was made from. The same is run again, in a
temporary clone with an MLflow store of its own, and the two runs are compared: every epoch's figures, the model's bytes
and the metrics. The workspace and the run's store are only read. The clone uses the virtual environment that this uses:
where that is another than the run's, a difference is followed by what differs.

Exit status: 0 for identical, 1 for different, 2 where it cannot be told, and why.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import chdir
from pathlib import Path

os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"

import mlflow
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from stages import MODEL, StageError, data, run, tracking

EVERY_EPOCH = ("train_loss", "train_acc", "test_loss", "test_acc")
ENVIRONMENT = ("python", "torch", "mlflow", "dvc", "cpu", "threads")
NEEDED = ("git.commit", "git.uncommitted", "data.digest", "model.md5", "accuracy")
# The run's settings, not ours: stages/__init__.py sets some of these, and the commit may have set others.
NOT_PASSED_ON = ("DVC_", "GIT_", "MLFLOW_", "ATEN_", "ONEDNN_", "CUBLAS_")


def main() -> None:
    """Verify one model, say what came of it, and exit with the status that says so too."""
    parser = argparse.ArgumentParser(
        prog="python -m stages.verify", description="Run again what made a model, and compare."
    )
    parser.add_argument("model", help="models:/NAME@ALIAS, models:/NAME/VERSION, or the id of an MLflow run")
    start = time.perf_counter()
    try:
        tracked, difference = verify(parser.parse_args().model)
    except (StageError, MlflowException, OSError) as error:
        parser.exit(2, f"verify: {' '.join(str(error).split())}\n")
    origin = f"run {tracked.info.run_id}, commit {tracked.data.tags['git.commit'][:10]}"
    if difference:
        print(f"different: {origin}", *difference, sep="\n")
        sys.exit(1)
    print(f"identical: {origin}, every figure and byte, run again in {time.perf_counter() - start:.0f} s")


def verify(model: str) -> tuple[Run, list[str]]:
    """Run again what made a model.

    Args:
        model: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, or a run id.

    Returns:
        The run, and lines on the first figure that differs and on the environment: none if all are identical.

    Raises:
        StageError: no such model, or its run cannot be verified.
    """
    store = tracking.store()
    if store.startswith("sqlite:///") and not Path(store.removeprefix("sqlite:///")).exists():
        raise StageError(f"no MLflow store at {store}; `make repro` makes one")  # so would MLflow, by looking into it
    mlflow.set_tracking_uri(store)
    tracked = _find(model)
    _check(tracked)
    recorded = _facts(tracked, _weights(model, tracked))

    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        _clone(tracked, clone)
        again, weights = _run_again(clone)
        obtained = _facts(again, weights)
    labels = [label for label in obtained | recorded if recorded.get(label) != obtained.get(label)]
    if not labels:
        return tracked, []
    theirs, ours = tracked.data.tags, again.data.tags
    environment = [_compare(name, theirs, ours) for name in ENVIRONMENT if theirs.get(name) != ours.get(name)]
    same = f"the environment is the same: {', '.join(ENVIRONMENT)}"
    return tracked, [_compare(labels[0], recorded, obtained), *(environment or [same])]


def _compare(name: str, theirs: dict[str, str], ours: dict[str, str]) -> str:
    return f"{name} is {theirs.get(name, 'missing')} in the run, {ours.get(name, 'missing')} here"


def _find(model: str) -> Run:
    client = mlflow.MlflowClient()
    if not model.startswith("models:/"):
        return client.get_run(model)
    parts = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", model)
    if not parts:
        raise StageError(f"{model}: a registered model is models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, version = parts.groups()
    found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)
    if not found.run_id:
        raise StageError(f"{model} was registered without a run, which would say where it comes from")
    return client.get_run(found.run_id)


def _check(tracked: Run) -> None:
    """Refuse a run whose origin is not known, or cannot be had here."""
    tags, name = tracked.data.tags, f"run {tracked.info.run_id}"
    if tracked.info.status != "FINISHED":
        raise StageError(f"{name} is {tracked.info.status}; only a finished run can be verified")
    if uncommitted := tags.get("git.uncommitted"):
        raise StageError(f"{name} was made from uncommitted code, which is lost: {uncommitted.replace(chr(10), ', ')}")
    if missing := [key for key in NEEDED if key not in tags | tracked.data.metrics]:
        raise StageError(f"{name} recorded no {', '.join(missing)}; `make repro` makes runs that record all of it")
    commit = tags["git.commit"]
    if _git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}").stdout.strip() != commit:
        raise StageError(f"{name} was made from commit {commit}, which is not in this repository; try `git fetch`")


def _facts(tracked: Run, weights: str) -> dict[str, str]:
    """List by name all that must be equal, what comes first in a run first."""
    client, tags = mlflow.MlflowClient(), tracked.data.tags
    points = [point for name in EVERY_EPOCH for point in client.get_metric_history(tracked.info.run_id, name)]
    points.sort(key=lambda point: (point.step, point.timestamp))
    scores = {
        name: str(value)
        for name, value in sorted(tracked.data.metrics.items())
        if name not in (*EVERY_EPOCH, "epoch_seconds") and not name.startswith("system/")
    }
    return {
        "data.digest": tags["data.digest"],
        **tracked.data.params,
        **{f"epoch {point.step}: {point.key}": str(point.value) for point in points},
        "model.md5": tags["model.md5"],
        "the MD5 of the model's weights": weights,
        **scores,
    }


def _weights(model: str, tracked: Run) -> str:
    """Hash the weights of the model that the store holds, as the file that they came from: tags alone prove nothing."""
    from safetensors import torch as safetensors  # only here: it imports torch, for which a refusal has no use

    if not model.startswith("models:/"):
        outputs = tracked.outputs.model_outputs if tracked.outputs else []
        if not outputs:
            raise StageError(f"run {tracked.info.run_id} has no model in MLflow")
        model = f"models:/{outputs[0].model_id}"
    try:
        with tempfile.TemporaryDirectory() as copy:  # where it lies MLflow would write a file of its own beside it
            tensors = mlflow.pytorch.load_model(model, dst_path=copy).state_dict()
    except (MlflowException, OSError, RuntimeError) as error:
        raise StageError(f"{model}: its files are lost, damaged or unsafe ({str(error).partition('. ')[0]})") from None
    content = safetensors.save({name.removeprefix("net."): tensor for name, tensor in tensors.items()})
    return tracking.md5(content)


def _clone(tracked: Run, clone: Path) -> None:
    """Check the run's commit out, without the results in it, and put the run's parameters and the data beside."""
    commit = tracked.data.tags["git.commit"]
    print(f"running {commit[:10]} again, with the parameters of run {tracked.info.run_id}", flush=True)
    for command in (
        ["clone", "--quiet", "--no-checkout", "--shared", ".", str(clone)],  # with commits that are on no branch, too
        ["-C", str(clone), "checkout", "--quiet", "--detach", commit],
    ):
        if (done := _git(*command)).returncode:
            raise StageError(f"git cannot give commit {commit}: {done.stderr}")
    shutil.rmtree(clone / MODEL.parent, ignore_errors=True)
    mlflow.MlflowClient().download_artifacts(tracked.info.run_id, "params.yaml", str(clone))
    for name in data.SHA256:
        if (data.RAW / name).exists():  # the stage `download` checks it, and fetches what is not right
            (clone / data.RAW).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(data.RAW / name, clone / data.RAW / name)


def _run_again(clone: Path) -> tuple[Run, str]:
    """Run the pipeline in the clone, every stage of it; give its MLflow run, and the MD5 of its model file."""
    store = f"sqlite:///{clone}/mlflow.db"
    environment = _environment() | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "MLFLOW_TRACKING_URI": store,
        "DVC_SITE_CACHE_DIR": str(clone / ".dvc/site"),
    }
    # By --force and --no-commit nothing is taken from, or put into, a cache that this user's repositories may share.
    command = [sys.executable, "-m", "dvc", "repro", "--force", "--no-commit", "evaluate"]
    if subprocess.run(command, cwd=clone, env=environment, check=False).returncode:
        raise StageError("the pipeline fails when run again; the reason is above")
    with chdir(clone):  # MLflow makes a folder for artifacts wherever it opens a store
        mlflow.set_tracking_uri(store)
        (again,) = mlflow.search_runs(experiment_names=[tracking.EXPERIMENT], output_format="list")
    return again, tracking.md5((clone / MODEL).read_bytes())


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(NOT_PASSED_ON)}


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], env=_environment(), capture_output=True, text=True, check=False)


if __name__ == "__main__":
    run(main)
